"""Compute a share of the steps, crowded at the start or the end of the run."""

import math
from dataclasses import dataclass

from ..context import SCOPES, PassState, Policy, Step, Verdict
from ..errors import ConfigError
from ..registry import policies
from ..schedule import spaced


@policies.register("spaced")
@dataclass(frozen=True)
class Spaced(Policy):
    """Compute a share of the steps, rounded up, spaced by a power law (`schedule.spaced`).

    share: of the run's steps, above 0 and at most 1. exponent: 1 spaces them evenly, as `interval` does where the
    share is one in a whole number; above 1 they crowd the start, below 1 the end.
    """

    share: float = 0.5
    exponent: float = 1.0

    scopes = frozenset(SCOPES)

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1 or not 0 < self.exponent < math.inf:
            raise ConfigError(
                "spaced: share must be above 0 and at most 1, and exponent above 0, "
                f"not {self.share} and {self.exponent}"
            )

    def computed(self, total: int) -> tuple[int, ...]:
        """The computed steps of a run of `total` steps."""
        count = max(1, math.ceil(total * self.share - 1e-9))  # a share of a whole number of steps is that number
        return spaced(total, count, self.exponent, length=count * math.ceil(total / count))

    def decide(self, step: Step, value: float | None, state: PassState) -> Verdict:
        if step.total is None:
            raise ConfigError("spaced needs the run's number of steps: pass num_steps to diffusion_cache.run")
        return Verdict(step.index in self.computed(step.total), "spaced")
