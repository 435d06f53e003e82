"""Spectrum (arXiv 2603.01623): a ridge regression on Chebyshev polynomials over the whole run, blended with a line."""

import math
from dataclasses import dataclass

from ..context import Feature, Forecaster, Query
from ..errors import ConfigError
from ..registry import forecasters
from .weights import polynomial_weights, ridge_weights


@forecasters.register("chebyshev")
@dataclass(frozen=True)
class Chebyshev(Forecaster):
    """F̂ = (1 − blend)·line + blend·φ(τ)ᵀ(ΦᵀΦ + ridge·I)⁻¹ΦᵀF with φ = (T_0, …, T_degree), τ = 2·step/(steps − 1) − 1.

    The line is the one through the last two features. The ridge shrinks even what is constant; anchored: it is on the
    features less the last one, which is added again. The paper regresses on all computed steps and keeps
    degree + 1 sums of them; here the last `keep` features are kept, and older ones are forgotten. Where the run's
    length is not known, the steps up to the one that is forecast stand for it.
    """

    degree: int = 4
    ridge: float = 0.1
    blend: float = 0.5
    anchored: bool = False
    keep: int = 5
    feature: Feature = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.degree <= 16:
            raise ConfigError(f"chebyshev: degree must be from 0 to 16, not {self.degree}")
        if not 0 < self.ridge < math.inf:
            raise ConfigError(f"chebyshev: ridge must be a finite number above 0, not {self.ridge}")
        if not 0 <= self.blend <= 1:
            raise ConfigError(f"chebyshev: blend must be from 0 to 1, not {self.blend}")
        if self.keep < 2:
            raise ConfigError(f"chebyshev: keep must be at least 2 features, not {self.keep}")

    @property
    def history(self) -> int:
        return self.keep

    @property
    def exact_degree(self) -> int | None:
        if self.blend == 0:
            return 1
        return 0 if self.anchored else None

    def weights(self, query: Query) -> tuple[float, ...]:
        total = query.total or int(query.target) + 1
        spectral = list(ridge_weights(tuple(query.nodes), query.target, total, self.degree, self.ridge))
        if self.anchored:
            spectral[-1] += 1.0 - sum(spectral)
        line = polynomial_weights(query.nodes, query.target, 1)
        return tuple((1 - self.blend) * a + self.blend * b for a, b in zip(line, spectral, strict=True))
