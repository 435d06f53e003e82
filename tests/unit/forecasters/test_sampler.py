"""Integrating what is stored over the sampler's next step, and the variables that samplers step in."""

import math

import numpy as np
import pytest
import torch
from numpy.polynomial import Polynomial

from diffusion_cache.context import NoiseLevels, Query
from diffusion_cache.errors import ConfigError
from diffusion_cache.forecasters import Sampler
from diffusion_cache.forecasters.weights import mean_weights

FLOW = NoiseLevels([2 * (math.log(1 - s) - math.log(s)) for s in (0.9, 0.7, 0.6, 0.35, 0.1)], "flow")


def test_even_steps_are_adams_bashforth():
    """Points up to the step's start: the textbook's coefficients, oldest first."""
    assert mean_weights((2.0,), 2.0, 1.0) == (1.0,)
    assert mean_weights((3.0, 2.0), 2.0, 1.0) == pytest.approx((-1 / 2, 3 / 2))
    assert mean_weights((4.0, 3.0, 2.0), 2.0, 1.0) == pytest.approx((5 / 12, -16 / 12, 23 / 12))
    expected = (-9 / 24, 37 / 24, -59 / 24, 55 / 24)
    assert mean_weights((5.0, 4.0, 3.0, 2.0), 2.0, 1.0) == pytest.approx(expected)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_polynomials_in_the_samplers_variable_are_integrated_exactly(order):
    """On uneven steps, ahead of the last node; the step after the last one ends at 0."""
    polynomial = Polynomial(np.random.default_rng(order).normal(size=order))
    times = (0.9, 0.7, 0.6, 0.35, 0.1, 0.0)
    nodes = list(range(order)) if order < 4 else [0, 1, 2, 3]
    assert FLOW.times("x") == pytest.approx(times)
    for target in range(nodes[-1] + 1, 5):
        weights = Sampler(order).weights(Query(nodes, target, times=FLOW.times("x")))
        forecast = sum(weight * polynomial(times[node]) for weight, node in zip(weights, nodes, strict=True))
        start, end = times[target], times[target + 1]
        mean = (polynomial.integ()(end) - polynomial.integ()(start)) / (end - start)
        assert forecast == pytest.approx(mean, abs=1e-9)


def test_spans_that_ask_alike_share_the_weights():
    query = Query([0, 1], 2, times=FLOW.times("x"))
    assert Sampler(2).weights(query) is Sampler(2).weights(query)


def test_the_variable_is_the_samplers():
    """σ of a flow; σ/α for predicted noise; the angle for v. A level is log(α²/σ²)."""
    levels = [-3.0, 0.5, 4.0]
    noise = torch.sigmoid(-torch.tensor(levels, dtype=torch.float64))  # σ² where α² + σ² = 1
    ratio = (noise / (1 - noise)).sqrt()
    assert NoiseLevels(levels, "flow").times("x") == pytest.approx([*(ratio / (1 + ratio)).tolist(), 0.0])
    assert NoiseLevels(levels, "epsilon").times("x") == pytest.approx([*ratio.tolist(), 0.0])
    assert NoiseLevels(levels, "v_prediction").times("x") == pytest.approx([*ratio.atan().tolist(), 0.0])
    assert NoiseLevels([-math.inf, 0.0], "flow").times("x") == pytest.approx([1.0, 0.5, 0.0])
    assert NoiseLevels([-math.inf, 0.0], "v_prediction").times("x") == pytest.approx([math.pi / 2, math.pi / 4, 0.0])
    whole = NoiseLevels(levels, "flow")
    assert whole.until(2).times("x") == pytest.approx(whole.times("x")[:3])  # the run ends where the third would begin
    assert whole.until(None) is whole.until(len(levels)) is whole


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        (
            NoiseLevels(),
            "a sampler of form flow or epsilon or v_prediction, which this run does not tell",
        ),
        (NoiseLevels([-1.0, 1.0]), "does not tell"),  # of a form that is not known
        (NoiseLevels([-1.0, -1.0, 1.0], "flow"), "fall from step to step"),
        (NoiseLevels([-math.inf, 1.0], "epsilon"), "finite"),
    ],
)
def test_levels_that_cannot_be_gone_by(levels, message):
    with pytest.raises(ConfigError, match=f"^forecaster 'sampler' .*{message}"):
        levels.times("forecaster 'sampler'", Sampler.timed)


def test_bad_options_and_use_outside_of_a_run():
    for order in (0, 6):
        with pytest.raises(ConfigError, match=r"^sampler: order must be from 1 to 5"):
            Sampler(order)
    with pytest.raises(ConfigError, match="within a run only"):
        Sampler().weights(Query([0], 1))
    assert Sampler(3).history == 3
