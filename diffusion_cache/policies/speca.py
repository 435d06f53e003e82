"""Verify a forecast on the last block, which is always computed: SpeCa (arXiv 2509.11628).

Where the blocks before the last are forecast, the last one runs on what was forecast and gives x. With x̂ what is
forecast of its output from its own history, e = mean|x̂ − x| / mean|x| is how far forecasts are off by now. A step is
accepted while e ≤ max(τ·β^(s/T), floor) at step s of T.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ..context import Needs, PassState, Past, Policy, Step, Verdict
from ..errors import ConfigError
from ..registry import policies
from ..signals import relative_l1
from .thresholds import check_threshold

FLOOR = 0.01


@policies.register("speca")
@dataclass(frozen=True)
class SpeCa(Policy):
    """Reuse until the error seen at the last block passes a bound that falls from `threshold` to `threshold`·`decay`.

    The step after one that is not accepted is computed; with rollback, that very step is computed once more, which
    costs its last block twice. The bound never falls below 0.01.
    """

    threshold: float = 0.1
    decay: float = 0.5
    rollback: bool = False

    scopes = frozenset({"stack"})
    tuned = "threshold"

    def __post_init__(self) -> None:
        check_threshold(self.name, self.threshold)
        if not 0 < self.decay <= 1:
            raise ConfigError(f"speca: decay must be above 0 and at most 1, not {self.decay}")

    @property
    def needs(self) -> Needs:
        return Needs(signals=("tail_output", "tail_forecast"), tail=1, verify=True, rollback=self.rollback)

    def measure(self, signals: Mapping[str, Tensor], past: Past) -> Tensor:
        return relative_l1(signals["tail_forecast"], signals["tail_output"])

    def decide(self, step: Step, value: float | None, state: PassState) -> Verdict:
        if value is None:
            return Verdict(
                state.consecutive > 0 and not self.rollback, "not verified" if state.consecutive else "draft"
            )
        if step.total is None and self.decay < 1:
            raise ConfigError("speca needs the number of steps: pass num_steps to diffusion_cache.run, or decay=1")
        progress = (step.index - (not self.rollback)) / (step.total or 1)
        bound = max(self.threshold * self.decay**progress, FLOOR)
        # written so that NaN computes
        return Verdict(not value <= bound, f"error {value:.3g}")
