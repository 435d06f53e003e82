"""Polynomial extrapolation by Newton's divided differences, exact on uneven steps.

TaylorSeer (arXiv 2503.06923) forecasts features by a Taylor expansion with finite differences; its recursion is
`taylor_paper`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ..context import Feature, Forecaster, Query
from ..errors import ConfigError
from ..registry import forecasters


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
        if not isinstance(self.order, int) or not 0 <= self.order <= 7:
            raise ConfigError(f"taylor: order must be a whole number from 0 to 7, not {self.order!r}")

    @property
    def history(self) -> int:
        return self.order + 1

    @property
    def exact_degree(self) -> int:
        return self.order

    def weights(self, query: Query) -> tuple[float, ...]:
        return polynomial_weights(query.nodes, query.target, self.order)


def polynomial_weights(nodes: Sequence[float], target: float, order: int) -> tuple[float, ...]:
    """One per node: the polynomial of at most that degree through the last order + 1 nodes, read at the target."""
    used = nodes[-order - 1 :]
    weights = [0.0] * (len(nodes) - len(used))
    # Lagrange's form of the same polynomial gives the weights directly
    for a, node in enumerate(used):
        weight = 1.0
        for b, other in enumerate(used):
            if b != a:
                weight *= (target - other) / (node - other)
        weights.append(weight)
    return tuple(weights)
