"""Compute at explicitly listed steps."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

from ..context import SCOPES, Needs, PassState, Policy, Step, Verdict
from ..errors import ConfigError, DiffusionCacheWarning
from ..registry import policies


@policies.register("mask")
@dataclass(frozen=True)
class Mask(Policy):
    """Compute where the mask is 1 and reuse where it is 0.

    mask: one entry a step ("1001001" or a sequence of 0/1). The first step is computed whatever it says. blocks: at
    scope block, names of the blocks that are reused there, neighbours as one span; the others are always computed.
    others: masks for runs of their lengths. A run of any other length uses `mask` stretched to it: the share of
    computed steps and where they are dense are kept; source: whose mask it is, which is then told of.
    """

    mask: str | Sequence[int]
    blocks: Sequence[str] = ()
    others: Sequence[str | Sequence[int]] = ()
    source: str = ""

    scopes = frozenset(SCOPES)

    def __post_init__(self) -> None:
        if isinstance(self.blocks, str) or not all(isinstance(name, str) for name in self.blocks):
            raise ConfigError(f"mask: blocks must be a sequence of names, not {self.blocks!r}")
        if isinstance(self.others, str) or not isinstance(self.others, Sequence):
            raise ConfigError(f"mask: others must be a sequence of masks, not {self.others!r}")
        object.__setattr__(self, "mask", _parsed(self.mask))
        object.__setattr__(self, "others", tuple(map(_parsed, self.others)))
        object.__setattr__(self, "blocks", tuple(self.blocks))

    @property
    def needs(self) -> Needs:
        return Needs(blocks=tuple(self.blocks))

    @cached_property
    def _computed(self) -> dict[int, frozenset[int]]:
        """By the run's number of steps."""
        return {len(mask): _ones(mask) for mask in (*self.others, self.mask)}

    def computed(self, total: int) -> frozenset[int]:
        """The computed steps of a run of `total` steps."""
        if total not in self._computed:
            self._computed[total] = self._rescaled(total)
        return self._computed[total]

    def departure(self, total: int | None) -> str:
        if not self.source or total is None or total in {len(mask) for mask in (self.mask, *self.others)}:
            return ""
        return (
            f"{self.source} is for {len(self.mask)} steps, and this run has {total}: its list is stretched, and what "
            "is known of it does not hold. Take one for these steps, or a policy for any number ('spaced', 'interval')"
        )

    def _rescaled(self, total: int) -> frozenset[int]:
        length = len(self.mask)
        before = list(accumulate((entry == "1" for entry in self.mask), initial=0))

        def computed_before(step: int) -> int:
            """Computed steps due before this one: the mask's count up to the same fraction of its length, scaled."""
            entry, part = divmod(step * length, total)
            due = before[entry] * total + (part if part and self.mask[entry] == "1" else 0)
            return -(-due // length)

        return frozenset(step for step in range(total) if computed_before(step + 1) > computed_before(step))

    def decide(self, step: Step, value: float | None, state: PassState) -> Verdict:
        if step.total is None:
            raise ConfigError("mask needs the run's number of steps: pass num_steps to diffusion_cache.run")
        return Verdict(step.index in self.computed(step.total), "mask")


def _parsed(mask: Any) -> str:
    """A mask as text, its first step computed."""
    given = mask if isinstance(mask, (str, Sequence)) else ()
    digits = [str(int(entry)) if entry in (0, 1) else entry for entry in given]
    entries = "".join(digit if digit in ("0", "1") else "?" for digit in digits)
    if not entries or "?" in entries:
        raise ConfigError(f"mask: give a string or sequence of 0 and 1, one a step, not {mask!r}")
    if entries[0] == "0":
        warnings.warn(
            "The mask starts with a reused step; the first step is computed, as there is nothing to reuse yet.",
            DiffusionCacheWarning,
            stacklevel=4,
        )
    return "1" + entries[1:]


def _ones(mask: str | Sequence[int]) -> frozenset[int]:
    return frozenset(step for step, entry in enumerate(mask) if entry == "1")
