"""LeMiCa: the schedule whose worst gap does the least damage."""

from dataclasses import dataclass

import numpy as np

from ..planning.dynamic import Best, best_schedule
from ..planning.surrogate import Array, edge_damages
from ..registry import systems
from .optimal import Optimal


@systems.register("lemica")
@dataclass(frozen=True)
class LeMiCa(Optimal):
    """The schedule whose worst gap between computed steps does the least damage; of those, the least sum.

    The paper goes on with the second worst (lexicographic minimax), where this takes the sum.
    """

    order: int = 0

    paper = "LeMiCa (arXiv 2511.00090)"

    def best(self, damage: Array, count: int) -> Best:
        only, edges = range(count, count + 1), edge_damages(damage)
        worst = best_schedule(edges, only, "minimax")[count].worst
        return best_schedule(np.where(edges > worst, np.inf, damage), only, "sum")[count]
