"""Compute early where two forecasts disagree, at a fixed number of computed steps: RACER.

The risk of reusing a step is ‖ĥ_c − ĥ_t‖ / ‖ĥ_c‖, where ĥ_c, ĥ_t are what a Chebyshev ridge regression and the line
through the last two features forecast. A step at risk is computed at once, and the next computed one dropped for it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from ..context import SCOPES, Needs, PassState, Past, Policy, Step, Verdict
from ..errors import ConfigError
from ..registry import policies
from ..schedule import Schedule
from .mask import Mask
from .thresholds import check_threshold


@policies.register("racer")
@dataclass(frozen=True)
class Racer(Policy):
    """Go by a schedule, one step in `every` or a mask as of policy "mask", and refresh early above `threshold`.

    As many steps are computed as the schedule has. What the source leaves open is ours: the threshold, for which steps
    will be the worst is not known before; at most one refresh between two scheduled steps; the regression, of degree
    4 with ridge 0.1 on the last `risk_history` features less the newest, which are kept for it whatever the forecaster
    keeps. Its shrinking of forecasts is corrector="shrink".
    """

    every: int = 3
    mask: str | Sequence[int] = ()
    threshold: float = 0.3
    risk_history: int = 5

    scopes = frozenset(SCOPES)

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ConfigError(f"racer: every must be at least 1, not {self.every} (1 computes every step)")
        check_threshold(self.name, self.threshold)
        if self.risk_history < 3:
            raise ConfigError(
                f"racer: risk_history must be at least 3 features, not {self.risk_history}: two give one line alone"
            )
        if not isinstance(self.mask, Sequence) or self.mask:
            object.__setattr__(self, "mask", Mask(self.mask).mask)

    @property
    def needs(self) -> Needs:
        return Needs(signals=("disagreement",), history=self.risk_history)

    @cached_property
    def _schedules(self) -> dict[int, Schedule]:
        return {}

    def schedule(self, total: int) -> Schedule:
        if total not in self._schedules:
            computed = Mask(self.mask).computed(total) if self.mask else range(0, total, self.every)
            self._schedules[total] = Schedule.uniform(step in computed for step in range(total))
        return self._schedules[total]

    def measure(self, signals: Mapping[str, Tensor], past: Past) -> Tensor:
        return signals["disagreement"]

    def decide(self, step: Step, value: float | None, state: PassState) -> Verdict:
        if step.total is None:
            raise ConfigError("racer needs the run's number of steps: pass num_steps to diffusion_cache.run")
        assert value is not None  # without one, the schedule is gone by
        # written so that NaN computes
        return Verdict(not value <= self.threshold, f"risk {value:.3g}")
