"""Reuse the last computed feature as it is."""

from dataclasses import dataclass

from ..context import Feature, Forecaster, Query
from ..registry import forecasters


@forecasters.register("reuse")
@dataclass(frozen=True)
class Reuse(Forecaster):
    """F̂ = F_c: the last computed residual or output."""

    feature: Feature = "auto"

    scale_free = True

    @property
    def history(self) -> int:
        return 1

    @property
    def exact_degree(self) -> int:
        return 0

    def weights(self, query: Query) -> tuple[float, ...]:
        return (0.0,) * (len(query.nodes) - 1) + (1.0,)
