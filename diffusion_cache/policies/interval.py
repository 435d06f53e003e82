"""Compute every N-th step (FORA, arXiv 2407.01425; the uniform schedule other methods are compared with)."""

from dataclasses import dataclass

from ..context import SCOPES, PassState, Policy, Step, Verdict
from ..errors import ConfigError
from ..registry import policies


@policies.register("interval")
@dataclass(frozen=True)
class Interval(Policy):
    """Compute a step, reuse the next every − 1. Steps that a guard computes restart the count."""

    every: int = 2

    scopes = frozenset(SCOPES)

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ConfigError(f"interval: every must be at least 1, not {self.every} (1 computes every step)")

    def decide(self, step: Step, value: float | None, state: PassState) -> Verdict:
        return Verdict(step.index - state.last_computed >= self.every, "interval")
