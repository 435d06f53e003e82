"""The band of a guard: the signal's mean and spread along the cached path."""

import math

import plans
import pytest
import torch
from plans import STEPS

import diffusion_cache as dc
from diffusion_cache import reference
from diffusion_cache.context import PassState, Step
from diffusion_cache.engine.patches import wrapped_step
from diffusion_cache.errors import ConfigError
from diffusion_cache.plan import Plan
from diffusion_cache.planning.band import _Watched, with_guard
from diffusion_cache.policies import Interval
from diffusion_cache.profiling.generation import state_of
from diffusion_cache.schedule import Schedule

NAME = "flux-digits"


@pytest.fixture(scope="module")
def pipe():
    return reference.load(NAME)


@pytest.fixture
def plan():
    return Plan("a", "denoiser", None, "auto", Schedule.uniform(index % 3 == 0 for index in range(STEPS)), ())


def path(pipe, plan, samples):
    """The denoiser's inputs in a generation by the plan, [steps, samples, elements]; at this scope, the latents."""
    inputs = []

    def make(step):
        def noted(scheduler, output, timestep, sample, *args, **kwargs):
            inputs.append(sample.flatten(1).double())
            result = step(scheduler, output, timestep, sample, *args, **kwargs)
            assert state_of(result).shape == sample.shape
            return result

        return noted

    with dc.cached(pipe, plan=plan), wrapped_step(pipe.scheduler, make):
        plans.batch(pipe, NAME, samples).call()
    return torch.stack(inputs)


def relative(now, before):
    return (now - before).abs().mean(-1) / before.abs().mean(-1)


def test_mean_and_spread_over_samples_of_all_batches(pipe, plan):
    samples = plans.drawn(500, 3)
    states = path(pipe, plan, samples)
    changes = states[1:] - states[:-1]
    expected = {"input_l1": relative(states[1:], states[:-1]), "input_turn": relative(changes[1:], changes[:-1])}
    for signal, values in expected.items():
        parts = [plans.batch(pipe, NAME, part) for part in (samples[:2], samples[2:])]
        band = with_guard(plan, signal, parts).guard
        absent = STEPS - len(values)
        assert (band.signal, band.samples) == (signal, 3)
        assert all(math.isnan(value) for value in (*band.mean[:absent], *band.spread[:absent]))
        assert band.mean[absent:] == pytest.approx(values.mean(1).tolist(), rel=1e-3)
        assert band.spread[absent:] == pytest.approx(values.std(1).tolist(), rel=1e-2, abs=1e-6)


def test_the_band_is_of_the_plans_own_path(pipe, plan):
    """Not of the uncached one: where the plan reuses, the latents go another way."""
    batches = [plans.batch(pipe, NAME, plans.drawn(500, 2))]
    uncached = Plan("b", "denoiser", None, "auto", Schedule.uniform([True] * STEPS), ())
    own, other = (with_guard(p, "input_turn", batches).guard.mean for p in (plan, uncached))
    assert own[2:] != pytest.approx(other[2:], rel=0.01)


def test_what_is_not_finite_is_left_out():
    watched = _Watched(Interval(2))
    for value in (None, math.inf, math.nan, 0.5):
        watched.decide(Step(1, 4, 1, None, "", (slice(None),)), value, PassState())
    assert watched.values == {1: [0.5]}


def test_what_cannot_be_measured(pipe, plan):
    one = plans.batch(pipe, NAME, plans.drawn(500, 1))
    with pytest.raises(ConfigError, match="samples: expected at least 2, not 1"):
        with_guard(plan, "input_turn", [one])
    with pytest.raises(ConfigError, match="Unknown guard signal 'turn'"):
        with_guard(plan, "turn", [one])
    with pytest.raises(ConfigError, match="no signal was seen in a generation; give generations of its own 8 steps"):
        with_guard(plan, "input_turn", [])
    partial = Plan("c", "block", None, "auto", Schedule((((True, True),), *[((False, True),)] * (STEPS - 1))), ())
    with pytest.raises(ConfigError, match="computes all of a step or nothing"):
        with_guard(partial, "input_turn", [one])
