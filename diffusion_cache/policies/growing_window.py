"""Reuse more steps in a row the further a run has come: the schedule of Spectrum (arXiv 2603.01623)."""

import math
from dataclasses import dataclass

from ..context import SCOPES, PassState, Policy, Step, Verdict
from ..errors import ConfigError
from ..registry import policies


@policies.register("growing_window")
@dataclass(frozen=True)
class GrowingWindow(Policy):
    """Compute one step in floor(w), where w is `window` at first and grows by `growth` with each window.

    How many windows there have been is told by the steps that were reused, so that warm-up steps, or others that a
    guard computes, do not make it grow; below 2, every step is computed. After warmup=5, growth 0.75 computes 14 of 50
    steps and growth 3 computes 10.
    """

    window: float = 2.0
    growth: float = 0.75

    scopes = frozenset(SCOPES)

    def __post_init__(self) -> None:
        if not 1 <= self.window < math.inf or not 0 <= self.growth < math.inf:
            raise ConfigError(
                f"growing_window: window must be at least 1 and growth at least 0, not {self.window} and {self.growth}"
            )

    def decide(self, step: Step, value: float | None, state: PassState) -> Verdict:
        window, before = self.window, state.reused - state.consecutive
        while before > 0:
            before -= max(math.floor(window) - 1, 1)
            window += self.growth
        return Verdict(state.consecutive + 1 >= math.floor(window), "window")
