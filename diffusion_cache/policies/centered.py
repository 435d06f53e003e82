"""Compute steps that crowd around one point of the run: DeepCache's non-uniform 1:N (arXiv 2312.00858, section 3.3)."""

import math
from dataclasses import dataclass

from ..context import SCOPES, PassState, Policy, Step, Verdict
from ..errors import ConfigError
from ..registry import policies
from ..schedule import distinct


@policies.register("centered")
@dataclass(frozen=True)
class Centered(Policy):
    """As many steps as `interval` computes, spaced by a power law: c + sign(u)·|u|^power with u evenly spaced.

    every: one step in so many is computed. center: c, where they are densest, as a share of the run's steps. power:
    1 spaces them evenly, 2 quadratically.
    """

    every: int = 2
    center: float = 0.3
    power: float = 1.4

    scopes = frozenset(SCOPES)

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ConfigError(f"centered: every must be at least 1, not {self.every} (1 computes every step)")
        if not 0 <= self.center <= 1 or not 1 <= self.power < math.inf:
            raise ConfigError(
                f"centered: center must be from 0 to 1 and power at least 1, not {self.center} and {self.power}"
            )

    def computed(self, total: int) -> list[int]:
        """The computed steps of a run of `total` steps."""
        count, center = -(-total // self.every), self.center * total
        low, high = -(center ** (1 / self.power)), (count * self.every - center) ** (1 / self.power)
        even = [low + (high - low) * j / count for j in range(count)]
        return distinct([center + math.copysign(abs(u) ** self.power, u) for u in even], total)

    def decide(self, step: Step, value: float | None, state: PassState) -> Verdict:
        if step.total is None:
            raise ConfigError("centered needs the run's number of steps: pass num_steps to diffusion_cache.run")
        return Verdict(step.index in self.computed(step.total), "centered")
