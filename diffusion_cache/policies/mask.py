"""Compute at explicitly listed steps."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from ..context import SCOPES, PassState, Policy, Step, Verdict
from ..errors import ConfigError, DiffusionCacheWarning
from ..registry import policies


@policies.register("mask")
@dataclass(frozen=True)
class Mask(Policy):
    """Compute where the mask is 1 and reuse where it is 0.

    mask: one entry a step ("1001001" or a sequence of 0/1). A run of another length uses it rescaled: the computed steps keep
    their relative places, first on first and last on last. The first step is computed whatever the mask says.
    """

    mask: str | Sequence[int]

    scopes = frozenset(SCOPES)

    def __post_init__(self) -> None:
        entries = list(self.mask) if isinstance(self.mask, (str, Sequence)) else None
        if not entries or not all(str(int(x) if isinstance(x, bool) else x) in ("0", "1") for x in entries):
            raise ConfigError(f"mask: give a string or sequence of 0 and 1, one a step, not {self.mask!r}")
        computes = tuple(int(entry) for entry in entries)
        if not computes[0]:
            warnings.warn(
                "The mask starts with a reused step; the first step is computed, as there is nothing to reuse yet.",
                DiffusionCacheWarning,
                stacklevel=2,
            )
        object.__setattr__(self, "mask", "1" + "".join(map(str, computes[1:])))

    @cached_property
    def _rescaled(self) -> dict[int, frozenset[int]]:
        return {}

    def computed(self, total: int) -> frozenset[int]:
        """The computed steps of a run of `total` steps."""
        if total not in self._rescaled:
            length = len(self.mask)
            steps = [step for step in range(length) if self.mask[step] == "1"]
            scale = (total - 1) / (length - 1) if length > 1 else 0.0
            self._rescaled[total] = frozenset(int(step * scale + 0.5) for step in steps)
        return self._rescaled[total]

    def decide(self, step: Step, signals: Mapping[str, Tensor], state: PassState) -> Verdict:
        if step.total is None:
            raise ConfigError("mask needs the run's number of steps: pass num_steps to diffusion_cache.run")
        return Verdict(step.index in self.computed(step.total), "mask")
