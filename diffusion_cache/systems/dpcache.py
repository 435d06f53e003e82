"""DPCache: the schedule with the least sum of damages, by dynamic programming over pairs of computed steps."""

from dataclasses import dataclass

from ..planning.dynamic import Best, best_schedule
from ..planning.surrogate import Array
from ..registry import systems
from .optimal import Optimal


@systems.register("dpcache")
@dataclass(frozen=True)
class DPCache(Optimal):
    """The schedule with the least sum of damages at so many evaluations."""

    paper = "DPCache (arXiv 2602.22654)"

    def best(self, damage: Array, count: int) -> Best:
        return best_schedule(damage, range(count, count + 1), "sum")[count]
