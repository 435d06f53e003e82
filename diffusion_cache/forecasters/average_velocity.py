"""MeanCache (arXiv 2601.19961): the velocity from a computed step on, by what the path has shown on the way there."""

from dataclasses import dataclass

from ..context import Feature, Forecaster, Query
from ..errors import ConfigError
from ..registry import forecasters


@forecasters.register("average_velocity")
@dataclass(frozen=True)
class AverageVelocity(Forecaster):
    """û = v_t + (s − t)·(u − v_r)/(t − r) with u = (z_t − z_r)/(t − r): the mean velocity from t to s on a curved path.

    t, r: σ of the last computed step and of the one `lag` computed steps before it; z, v: the denoiser's input and
    output there; s: σ that the reused step ends at, 0 after the last one. Over a single Euler step u is v_r, and
    nothing is learned of the path: so with one node, or two that are neighbours, v_t is reused. (The paper's code
    starts again from its last forecast instead of v_t.) Where pipelines negate the output, as the path tells, u is
    negated. z follows the guided velocity, which no single branch of guidance gives: what holds of û is what guidance
    makes of the branches' own, if all are reused at the same steps. For denoisers of a flow; no promise for polynomials
    in the step. Differences of inputs that are stored in half precision keep few digits.
    """

    lag: int = 2
    feature: Feature = "output"

    scopes = frozenset({"denoiser"})
    keeps_inputs = True
    timed = ("flow",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lag < 2:
            raise ConfigError(f"average_velocity: lag must be at least 2 computed steps, not {self.lag}")
        if self.feature == "residual":
            raise ConfigError("average_velocity: feature must be output or auto, as velocities are averaged")

    @property
    def history(self) -> int:
        return self.lag + 1

    @property
    def exact_degree(self) -> None:
        return None

    def weights(self, query: Query) -> tuple[float, ...]:
        reach, _ = _reach(query)
        return _at_ends(query, -reach, 1.0)

    def input_weights(self, query: Query) -> tuple[float, ...]:
        reach, apart = _reach(query)
        of_inputs = query.direction * reach / apart
        return _at_ends(query, -of_inputs, of_inputs)


def _reach(query: Query) -> tuple[float, float]:
    """(s − t)/(t − r), and t − r; no reach where nothing is known of the path, as with one node."""
    points, _, s = query.in_time()
    r, t = points[0], points[-1]
    return ((s - t) / (t - r), t - r) if len(points) > 1 and query.direction else (0.0, 1.0)


def _at_ends(query: Query, first: float, last: float) -> tuple[float, ...]:
    weights = [0.0] * len(query.nodes)
    weights[0] += first
    weights[-1] += last
    return tuple(weights)
