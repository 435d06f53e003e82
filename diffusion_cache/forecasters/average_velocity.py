"""MeanCache (arXiv 2601.19961): the velocity from a computed step on, by what the path has shown on the way there."""

from dataclasses import dataclass

from ..context import Feature, Forecaster, NoiseLevels, Query
from ..errors import ConfigError
from ..registry import forecasters


@forecasters.register("average_velocity")
@dataclass(frozen=True)
class AverageVelocity(Forecaster):
    """û = v_t + (s − t)·(u − v_r)/(t − r) with u = (z_t − z_r)/(t − r): the mean velocity from t to s on a curved path.

    t, r: σ of the last computed step and of the one `lag` computed steps before it; z, v: the denoiser's input and
    output there; s: σ that the reused step ends at, 0 after the last one. Over a single Euler step u is v_r, and
    nothing is learned of the path: so with one node, or two that are neighbours, v_t is reused. (The paper's code
    starts again from its last forecast instead of v_t.) For denoisers of a flow; no promise for polynomials in the
    step. Differences of inputs that are stored in half precision keep few digits.
    """

    lag: int = 2
    feature: Feature = "output"

    scopes = frozenset({"denoiser"})
    keeps_inputs = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lag < 2:
            raise ConfigError(f"average_velocity: lag must be at least 2 computed steps, not {self.lag}")
        if self.feature == "residual":
            raise ConfigError("average_velocity: feature must be output or auto, as velocities are averaged")

    def for_run(self, noise_levels: NoiseLevels) -> "Averaged":
        if noise_levels and noise_levels.form != "flow":
            raise ConfigError(
                "forecaster 'average_velocity' is for flow samplers, whose denoiser gives a velocity, and this run has "
                "another: take forecaster='sampler' or 'taylor'"
            )
        return Averaged(self.lag, self.feature, noise_levels.times("forecaster 'average_velocity'"))

    @property
    def history(self) -> int:
        return self.lag + 1

    @property
    def exact_degree(self) -> None:
        return None

    def weights(self, query: Query) -> tuple[float, ...]:
        raise ConfigError("forecaster 'average_velocity' has weights within a run only, from for_run")


@dataclass(frozen=True)
class Averaged(AverageVelocity):
    """`AverageVelocity` in one run; sigmas: of each step and after the last one."""

    sigmas: tuple[float, ...] = ()

    name = "average_velocity"

    def weights(self, query: Query) -> tuple[float, ...]:
        if len(query.nodes) == 1:
            return (1.0,)
        reach, _ = self._reach(query)
        return (-reach, *self._between(query), 1.0)

    def input_weights(self, query: Query) -> tuple[float, ...]:
        if len(query.nodes) == 1:
            return (0.0,)
        reach, apart = self._reach(query)
        return (-reach / apart, *self._between(query), reach / apart)

    def _reach(self, query: Query) -> tuple[float, float]:
        """(s − t)/(t − r), and t − r."""
        r, t = self.sigmas[int(query.nodes[0])], self.sigmas[int(query.nodes[-1])]
        return (self.sigmas[int(query.target) + 1] - t) / (t - r), t - r

    def _between(self, query: Query) -> tuple[float, ...]:
        return (0.0,) * (len(query.nodes) - 2)
