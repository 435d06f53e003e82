"""Adams–Bashforth on the sampler's own noise levels: the mean over a step, in place of what is there at its start."""

from collections.abc import Sequence
from dataclasses import dataclass

from numpy.polynomial import Polynomial

from ..context import Feature, Forecaster, NoiseLevels, Query
from ..errors import ConfigError
from ..registry import forecasters


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

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.order <= 5:
            raise ConfigError(f"sampler: order must be from 1 to 5, not {self.order}")

    def for_run(self, noise_levels: NoiseLevels) -> "Integrated":
        return Integrated(self.order, self.feature, noise_levels.times("forecaster 'sampler'"))

    @property
    def history(self) -> int:
        return self.order

    @property
    def exact_degree(self) -> int:
        return 0

    def weights(self, query: Query) -> tuple[float, ...]:
        raise ConfigError("forecaster 'sampler' has weights within a run only, from for_run")


@dataclass(frozen=True)
class Integrated(Sampler):
    """`Sampler` in one run; times: the sampler's variable at each step and after the last one."""

    times: tuple[float, ...] = ()

    name = "sampler"

    def weights(self, query: Query) -> tuple[float, ...]:
        step = int(query.target)
        points = [self.times[int(node)] for node in query.nodes]
        return mean_weights(points, self.times[step], self.times[step + 1])


def mean_weights(points: Sequence[float], start: float, end: float) -> tuple[float, ...]:
    """Of each point's value in the mean, from start to end, of the polynomial through all of them."""
    weights = []
    for a, point in enumerate(points):
        basis = Polynomial([1.0])
        for b, other in enumerate(points):
            if b != a:
                basis *= Polynomial([start - other, 1.0]) / (point - other)  # in u − start, which keeps digits
        weights.append(float(basis.integ()(end - start)) / (end - start))
    return tuple(weights)
