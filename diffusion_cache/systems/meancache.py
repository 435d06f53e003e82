"""MeanCache: the schedule with the least sum of powers of its gaps' damages, which keeps peaks down."""

import math
from dataclasses import dataclass

from ..errors import ConfigError
from ..planning.dynamic import Best, best_schedule
from ..planning.surrogate import Array, edge_powers
from ..registry import systems
from .optimal import Optimal


@systems.register("meancache")
@dataclass(frozen=True)
class MeanCache(Optimal):
    """The schedule with the least sum, over gaps between computed steps, of their damage to the power `gamma`.

    Its schedules only: forecasts are Taylor's here, not the paper's average velocities.
    """

    gamma: float = 2.0

    paper = "MeanCache (arXiv 2601.19961)"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.gamma < math.inf:
            raise ConfigError(f"meancache: gamma must be above 0 and finite, not {self.gamma}")

    def best(self, damage: Array, count: int) -> Best:
        return best_schedule(edge_powers(damage, self.gamma), range(count, count + 1), "sum")[count]
