"""TaylorSeer's recursion as published (arXiv 2503.06923, equations 2 and 4; kept for comparison with `taylor`)."""

from dataclasses import dataclass
from math import factorial

from ..context import Feature, Forecaster, Query
from ..registry import forecasters
from .weights import check_degree, expansion_weights


@forecasters.register("taylor_paper")
@dataclass(frozen=True)
class TaylorPaper(Forecaster):
    """F̂ = Σ_i D_i k^i / i! with D_0 = F, D_{i+1} = (D_i − D_i of the computed step before) / gap, k steps ahead.

    Exact to degree 1 only: dividing by the last gap alone is no second derivative (t² on 0, 1, 2 gives 14 at 4).
    """

    order: int = 1
    feature: Feature = "auto"

    scale_free = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_degree("taylor_paper: order", self.order)

    @property
    def history(self) -> int:
        return self.order + 1

    @property
    def exact_degree(self) -> int:
        return min(self.order, 1)

    def weights(self, query: Query) -> tuple[float, ...]:
        ahead = query.target - query.nodes[-1]
        terms = [ahead**i / factorial(i) for i in range(len(query.nodes))]
        return expansion_weights(query.nodes, terms)
