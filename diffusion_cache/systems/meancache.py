"""MeanCache: the schedule with the least sum of powers of damages, which keeps peaks down."""

from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import ConfigError
from ..planning.dynamic import Best, best_schedule
from ..planning.surrogate import Array
from ..registry import systems
from .optimal import Optimal


@systems.register("meancache")
@dataclass(frozen=True)
class MeanCache(Optimal):
    """The schedule with the least sum of damages to the power `gamma` at so many evaluations.

    Its schedules only: forecasts are Taylor's here, not the paper's average velocities.
    """

    gamma: float = 2.0

    paper = "MeanCache (arXiv 2601.19961)"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.gamma > 0:
            raise ConfigError(f"meancache: gamma must be above 0, not {self.gamma}")

    def best(self, damage: Array, computed: range) -> Mapping[int, Best]:
        return best_schedule(damage, computed, "power", self.gamma)
