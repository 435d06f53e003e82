"""Adams–Bashforth on the sampler's own noise levels: the mean over a step, in place of what is there at its start."""

from dataclasses import dataclass

from ..context import TIMED, Feature, Forecaster, Query
from ..errors import ConfigError
from ..registry import forecasters
from .weights import mean_weights


@forecasters.register("sampler")
@dataclass(frozen=True)
class Sampler(Forecaster):
    """F̂ = 1/(t' − t)·∫ P(u) du over the reused step from t to t'; P: the polynomial through the last `order` features.

    The variable is the one that the sampler integrates in (`NoiseLevels.times`), taken to end at 0. On even steps,
    with the newest feature at the step itself, these are the weights of the Adams–Bashforth method of that order.
    Needs a pipeline whose sampler tells its noise levels. It aims at the path that a sampler of many small steps would
    take, and not at the uncached run, whose step goes by the value at its start.
    """

    order: int = 2
    feature: Feature = "auto"

    timed = TIMED

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.order <= 5:
            raise ConfigError(f"sampler: order must be from 1 to 5, not {self.order}")

    @property
    def history(self) -> int:
        return self.order

    @property
    def exact_degree(self) -> int:
        return 0

    def weights(self, query: Query) -> tuple[float, ...]:
        points, start, end = query.in_time()
        return mean_weights(tuple(points), start, end)
