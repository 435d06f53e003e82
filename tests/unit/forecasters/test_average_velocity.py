"""Average velocities, on paths whose true ones are known."""

import math

import pytest
import torch

from diffusion_cache.context import NoiseLevels, Query
from diffusion_cache.errors import ConfigError
from diffusion_cache.forecasters import AverageVelocity

SIGMAS = (1.0, 0.8, 0.65, 0.5, 0.2, 0.0)
TIMES = NoiseLevels([2 * (math.log(max(1 - s, 1e-30)) - math.log(s)) for s in SIGMAS[:-1]], "flow").times("x")


def forecast(forecaster, query, velocities, inputs):
    weights, input_weights = forecaster.weights(query), forecaster.input_weights(query)
    assert len(weights) == len(input_weights) == len(query.nodes)
    found = sum(w * v for w, v in zip(weights, velocities, strict=True))
    return found + sum(w * z for w, z in zip(input_weights, inputs, strict=True))


def test_is_the_formula():
    generator = torch.Generator().manual_seed(0)
    velocities, inputs = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64)
    r, t, s = SIGMAS[0], SIGMAS[2], SIGMAS[4]
    expected = velocities[2] + (s - t) * (inputs[2] - inputs[0] - (t - r) * velocities[0]) / (t - r) ** 2
    found = forecast(AverageVelocity(), Query([0, 1, 2], 3, times=TIMES), velocities, inputs)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("target", "end"), [(3, 0.2), (4, 0.0)])
def test_is_the_mean_velocity_where_velocities_change_evenly(target, end):
    """z = z0 + aσ + bσ²: v = a + 2bσ, whose mean from t to s is a + b(s + t). The last step ends at 0."""
    a, b = 0.7, -1.3
    times = SIGMAS[:3]
    velocities, inputs = [a + 2 * b * x for x in times], [2 + a * x + b * x**2 for x in times]
    found = forecast(AverageVelocity(), Query([0, 1, 2], target, times=TIMES), velocities, inputs)
    assert found == pytest.approx(a + b * (end + times[2]))


def test_what_is_negated_is_forecast_negated():
    generator = torch.Generator().manual_seed(0)
    velocities, inputs = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64)
    query = Query([0, 1, 2], 3, times=TIMES)
    expected = -forecast(AverageVelocity(), query, velocities, inputs)
    found = forecast(AverageVelocity(), query._replace(direction=-1.0), -velocities, inputs)
    torch.testing.assert_close(found, expected)


def test_without_a_direction_the_last_is_reused():
    query = Query([0, 1, 2], 3, times=TIMES, direction=0.0)
    assert AverageVelocity().weights(query) == (0.0, 0.0, 1.0)
    assert AverageVelocity().input_weights(query) == (0.0, 0.0, 0.0)


def test_one_node_is_reused():
    forecaster = AverageVelocity()
    assert forecaster.weights(Query([1], 2, times=TIMES)) == (1.0,)
    assert forecaster.input_weights(Query([1], 2, times=TIMES)) == (0.0,)


def test_goes_back_by_its_lag():
    """The steps between are stored, and have no part in it."""
    forecaster = AverageVelocity(lag=3)
    assert forecaster.history == 4
    query = Query([0, 1, 2, 3], 4, times=TIMES)
    assert forecaster.weights(query)[1:3] == forecaster.input_weights(query)[1:3] == (0.0, 0.0)
    assert forecaster.weights(query)[0] == pytest.approx(-(0.0 - 0.5) / (0.5 - 1.0))


@pytest.mark.parametrize("form", ["epsilon", "v_prediction", "other"])
def test_other_samplers_are_refused(form):
    with pytest.raises(
        ConfigError, match=r"a sampler of form flow, which this run does not tell.*take forecaster='taylor'"
    ):
        NoiseLevels([-1.0, 1.0], form).times("forecaster 'average_velocity'", AverageVelocity.timed)


def test_bad_options_and_use_outside_of_a_run():
    with pytest.raises(ConfigError, match=r"^average_velocity: lag must be at least 2"):
        AverageVelocity(1)
    with pytest.raises(ConfigError, match=r"^average_velocity: feature must be output"):
        AverageVelocity(feature="residual")
    with pytest.raises(ConfigError, match="within a run only"):
        AverageVelocity().weights(Query([0], 1))
