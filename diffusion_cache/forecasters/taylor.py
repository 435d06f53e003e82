"""Polynomial extrapolation by Newton's divided differences, exact on uneven steps.

TaylorSeer (arXiv 2503.06923) forecasts features by a Taylor expansion with finite differences; its recursion is
`taylor_paper`.
"""

from dataclasses import dataclass

from ..context import Feature, Forecaster, Query
from ..registry import forecasters
from .weights import check_degree, polynomial_weights


@forecasters.register("taylor")
@dataclass(frozen=True)
class Taylor(Forecaster):
    """The polynomial of degree `order` through the last order + 1 features, read at the step to forecast.

    With fewer features stored, the degree is what they allow.
    """

    order: int = 1
    feature: Feature = "auto"

    scale_free = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_degree("taylor: order", self.order)

    @property
    def history(self) -> int:
        return self.order + 1

    @property
    def exact_degree(self) -> int:
        return self.order

    def weights(self, query: Query) -> tuple[float, ...]:
        return polynomial_weights(query.nodes, query.target, self.order)
