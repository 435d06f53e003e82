"""A base for policies that add an increment at every step and compute when the sum passes a threshold."""

from dataclasses import dataclass

from ..context import PassState, Policy, Step, Verdict
from .thresholds import check_threshold


@dataclass(frozen=True)
class Accumulate(Policy):
    """Reuse while the sum of what was measured since the last computed step is below `threshold`.

    A policy of this kind declares its signals and defines `measure`, which gives the increment of this step. A sum that
    is not a number computes; with no increment yet, the step is computed.
    """

    threshold: float = 0.1

    tuned = "threshold"

    def __post_init__(self) -> None:
        check_threshold(self.name, self.threshold)

    def decide(self, step: Step, value: float | None, state: PassState) -> Verdict:
        if value is None:
            return Verdict(True, "nothing to compare with")
        total = state.accumulated + value
        # written so that NaN computes
        return Verdict(not total < self.threshold, f"sum {total:.3g}", accumulated=total)
