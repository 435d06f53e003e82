"""MeanCache (arXiv 2601.19961): the velocity from a computed step on, by what the path has shown on the way there."""

from dataclasses import dataclass

from ..context import Feature, Forecaster, NoiseLevels, Query
from ..errors import ConfigError
from ..registry import forecasters


@forecasters.register("average_velocity")
@dataclass(frozen=True)
class AverageVelocity(Forecaster):
    """û = v_t + (s − t)·(u − v_r)/(t − r) with u = (z_t − z_r)/(t − r): the mean velocity from t to s on a curved path.

    r, t: σ of the last two computed steps, z and v the denoiser's input and output there; s: σ that the reused step
    ends at, 0 after the last one. The paper's code restarts from its last forecast instead of v_t. For whole denoisers
    whose output is a flow's velocity; no promise for polynomials in the step. The difference of inputs that are
    stored in half precision keeps few digits.
    """

    feature: Feature = "output"

    scopes = frozenset({"denoiser"})
    keeps_inputs = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.feature == "residual":
            raise ConfigError("average_velocity: feature must be output or auto, as velocities are averaged")

    def for_run(self, noise_levels: NoiseLevels) -> "Averaged":
        if noise_levels and noise_levels.form != "flow":
            raise ConfigError(
                "forecaster 'average_velocity' is for flow samplers, whose denoiser gives a velocity, and this run has "
                "another: take forecaster='sampler' or 'taylor'"
            )
        return Averaged(self.feature, noise_levels.times("forecaster 'average_velocity'"))

    @property
    def history(self) -> int:
        return 2

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
        return (1.0,) if len(query.nodes) == 1 else (-self._reach(query), 1.0)

    def input_weights(self, query: Query) -> tuple[float, ...]:
        if len(query.nodes) == 1:
            return (0.0,)
        r, t = (self.sigmas[int(node)] for node in query.nodes)
        slope = self._reach(query) / (t - r)
        return (-slope, slope)

    def _reach(self, query: Query) -> float:
        """(s − t)/(t − r)."""
        r, t = (self.sigmas[int(node)] for node in query.nodes)
        return (self.sigmas[int(query.target) + 1] - t) / (t - r)
