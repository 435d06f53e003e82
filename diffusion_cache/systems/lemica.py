"""LeMiCa: the schedule whose worst damage is least, ties broken by what comes after it."""

from collections.abc import Mapping
from dataclasses import dataclass

from ..planning.dynamic import Best, best_schedule
from ..planning.surrogate import Array
from ..registry import systems
from .optimal import Optimal


@systems.register("lemica")
@dataclass(frozen=True)
class LeMiCa(Optimal):
    """The schedule with the smallest worst damage at so many evaluations; of those, the one with the smallest sum.

    The paper goes on with the second worst (lexicographic minimax), where this takes the sum.
    """

    order: int = 0

    paper = "LeMiCa (arXiv 2511.00090)"

    def best(self, damage: Array, computed: range) -> Mapping[int, Best]:
        return best_schedule(damage, computed, "minimax")
