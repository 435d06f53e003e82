"""Compute at explicitly listed steps."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor

from ..context import SCOPES, PassState, Policy, Step, Verdict
from ..errors import ConfigError, DiffusionCacheWarning
from ..registry import policies


@policies.register("mask")
@dataclass(frozen=True)
class Mask(Policy):
    """Compute where the mask is 1 and reuse where it is 0.

    mask: one entry a step ("1001001" or a sequence of 0/1). A run of another length uses it rescaled: the share of
    computed steps and where they are dense are kept. The first step is computed whatever the mask says.
    """

    mask: str | Sequence[int]

    scopes = frozenset(SCOPES)

    def __post_init__(self) -> None:
        entries = "".join(str(int(entry) if entry in (0, 1) else entry) for entry in self._entries())
        if not entries or set(entries) - {"0", "1"}:
            raise ConfigError(f"mask: give a string or sequence of 0 and 1, one a step, not {self.mask!r}")
        if entries[0] == "0":
            warnings.warn(
                "The mask starts with a reused step; the first step is computed, as there is nothing to reuse yet.",
                DiffusionCacheWarning,
                stacklevel=2,
            )
        object.__setattr__(self, "mask", "1" + entries[1:])

    def _entries(self) -> Sequence[Any]:
        try:
            return list(self.mask)
        except TypeError:
            return []

    @cached_property
    def _rescaled(self) -> dict[int, frozenset[int]]:
        return {}

    def computed(self, total: int) -> frozenset[int]:
        """The computed steps of a run of `total` steps."""
        if total not in self._rescaled:
            self._rescaled[total] = self._rescale(total)
        return self._rescaled[total]

    def _rescale(self, total: int) -> frozenset[int]:
        length = len(self.mask)
        steps = [step for step, entry in enumerate(self.mask) if entry == "1"]
        if len(steps) == length or total == 1:
            return frozenset(range(total))
        count = max(1, round(len(steps) * total / length))
        # the j-th computed step sits where the same fraction of the mask's computed steps has passed
        quantiles = np.linspace(0, len(steps) - 1, count)
        places = np.interp(quantiles, range(len(steps)), steps) * (total - 1) / (length - 1)
        return frozenset(int(place + 0.5) for place in places)

    def decide(self, step: Step, signals: Mapping[str, Tensor], state: PassState) -> Verdict:
        if step.total is None:
            raise ConfigError("mask needs the run's number of steps: pass num_steps to diffusion_cache.run")
        return Verdict(step.index in self.computed(step.total), "mask")
