"""HiCache (arXiv 2508.16984): Taylor's expansion with scaled Hermite polynomials in place of powers."""

from dataclasses import dataclass
from math import factorial

from ..context import Feature, Forecaster, Query
from ..errors import ConfigError
from ..registry import forecasters
from .weights import check_degree, expansion_weights, hermite_polynomials


@forecasters.register("hermite")
@dataclass(frozen=True)
class Hermite(Forecaster):
    """F̂ = F + Σ_{i ≥ 1} D_i·σ^i·H_i(σk)/i!, k steps ahead, with H_1(x) = 2x, H_2(x) = 4x² − 2, ….

    D_i are `taylor_paper`'s differences, so k counts forwards like the steps. Exact for constants alone: the slope of
    linear features is taken 2σ² times, which σ below 1/√2 damps.
    """

    order: int = 2
    sigma: float = 0.5
    feature: Feature = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_degree("hermite: order", self.order)
        if not 0 < self.sigma <= 1:
            raise ConfigError(f"hermite: sigma must be above 0 and at most 1, not {self.sigma}")

    @property
    def history(self) -> int:
        return self.order + 1

    @property
    def exact_degree(self) -> int:
        return 0

    def weights(self, query: Query) -> tuple[float, ...]:
        values = hermite_polynomials(self.sigma * (query.target - query.nodes[-1]), len(query.nodes))
        return expansion_weights(query.nodes, [self.sigma**i * value / factorial(i) for i, value in enumerate(values)])
