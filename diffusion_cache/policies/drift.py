"""A guard for planned runs: compute a step more where a generation leaves the band that calibration runs kept to."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ..context import Needs, PassState, Past, Step, Verdict
from ..errors import ConfigError
from ..plan import Band
from ..signals import relative_l1

SIGNAL = "input"
FACTOR = 10.0


@dataclass(frozen=True)
class Drift:
    """Watches one of `plan.GUARD_SIGNALS` against its band at each step.

    factor: how many times its spread the signal may be above its mean. strict: an extra step is added to the planned
    ones; else the next one of them is dropped for it, so that the number of computed steps stays.

    An extra step need not be a gain: fitted weights forecast what leads back to the uncached path, and are not used
    where the history holds other steps than they were fitted for. The default factor is one that no sample of the
    profiled kind reached (32 by each of two plans of flux-digits; one of the 64 reached 6).
    """

    band: Band
    factor: float = FACTOR
    strict: bool = False

    def __post_init__(self) -> None:
        if not self.factor > 0:
            raise ConfigError(f"guard_factor must be a number above 0, not {self.factor}")

    @property
    def needs(self) -> Needs:
        return Needs(signals=(SIGNAL,), previous=1 if self.band.signal == "input_l1" else 2)

    @property
    def total(self) -> int:
        return len(self.band.mean)

    def measure(self, signals: Mapping[str, Tensor], past: Past) -> Tensor | None:
        """The signal of each batch row, [rows]; None at the first steps, which have nothing to be compared with."""
        now, before = signals[SIGNAL], past.previous[SIGNAL]
        if self.band.signal == "input_l1":
            return relative_l1(now, before)
        return relative_l1(now - before, before - past.earlier[0][SIGNAL]) if past.earlier else None

    def decide(self, step: Step, value: float | None, state: PassState) -> Verdict:
        """At a step that the plan reuses: whether to compute it all the same."""
        if value is None or not self.is_outside(step.index, value):
            return Verdict(False, "schedule")
        return Verdict(True, f"guard ({self.band.signal} {value:.3g})")

    def is_outside(self, step: int, value: float) -> bool:
        """Whether a signal is above the band of its step. NaN is, wherever there is a band."""
        limit = self.band.limit(step, self.factor)
        return limit is not None and not value <= limit
