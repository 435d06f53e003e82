"""FreqCa (arXiv 2510.08669): low frequencies over the tokens are reused, high ones extrapolated.

The paper leaves low frequencies as they are, and extrapolates high ones to second order in Hermite polynomials; here
it is the polynomial through the features. Where the bands part is ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from .. import ops
from ..context import Feature, NonLinear, Query
from ..errors import ConfigError
from ..registry import forecasters
from ..signals.bands import low_pass
from .weights import check_degree, polynomial_weights


@forecasters.register("frequency")
@dataclass(frozen=True)
class Frequency(NonLinear):
    """F̂ = P·(polynomial of degree `low`) + (1 − P)·(polynomial of degree `high`), P: frequencies up to `cutoff`.

    Up to it along every axis, in units of the highest frequency there: 0 leaves the mean alone, 1 everything. The axes
    are those of a feature [rows, channels, ...]; the square that tokens [rows, tokens, channels] make, if their number
    is one; else, as the layout of tokens cannot be told, the token axis. What has no such axis is all of low frequency.
    """

    low: int = 0
    high: int = 2
    cutoff: float = 0.25
    feature: Feature = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_degree("frequency: low", self.low)
        check_degree("frequency: high", self.high)
        if not 0 <= self.cutoff <= 1:
            raise ConfigError(f"frequency: cutoff must be from 0 to 1, not {self.cutoff}")

    @property
    def history(self) -> int:
        return max(self.low, self.high) + 1

    @property
    def exact_degree(self) -> int:
        return min(self.low, self.high)

    def forecast(self, query: Query, features: Sequence[Tensor]) -> Tensor:
        low, high = (
            ops.forecast(None, features, polynomial_weights(query.nodes, query.target, order))
            for order in (self.low, self.high)
        )
        return high + low_pass(low - high, self.cutoff)
