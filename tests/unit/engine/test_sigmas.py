"""Noise levels that a plan moves: against samplers that have them by themselves, and where it cannot be done."""

import math
from dataclasses import replace

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FluxImg2ImgPipeline,
    UniPCMultistepScheduler,
)

import diffusion_cache as dc
from diffusion_cache import reference
from diffusion_cache.engine import session_of
from diffusion_cache.engine.clock import noise_levels
from diffusion_cache.engine.sigmas import move_sigmas
from diffusion_cache.errors import ConfigError
from diffusion_cache.forecasters.fitted import Fitted
from diffusion_cache.plan import Plan
from diffusion_cache.policies import Planned
from diffusion_cache.policies.select import Select
from diffusion_cache.schedule import Schedule

STEPS = 6
SAMPLERS = {
    "flow-euler": lambda shift: FlowMatchEulerDiscreteScheduler(shift=shift),
    "inverted": lambda shift: FlowMatchEulerDiscreteScheduler(shift=shift, invert_sigmas=True),
    "unipc": lambda shift: UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    ),
}


class FluxSampler(FlowMatchEulerDiscreteScheduler):
    """Set as FluxPipeline sets it."""

    def __init__(self, shift=3.0):
        super().__init__(shift=shift)

    def set_timesteps(self, steps):
        super().set_timesteps(sigmas=[1 - i / steps for i in range(steps)])


def plan(scheduler, sigmas, computed="111111", steps=STEPS):
    """One that moves this scheduler's noise levels."""
    scheduler.set_timesteps(steps)
    return Plan(
        name="moved",
        scope="denoiser",
        depth=None,
        feature="auto",
        schedule=Schedule.uniform(step == "1" for step in computed),
        noise_levels=tuple(noise_levels(scheduler)),
        nodes=torch.full((steps, 1, 1), -1, dtype=torch.int32),
        weights=torch.full((steps, 1, 1, 1), math.nan, dtype=torch.float64),
        sigmas=sigmas,
    )


def levels_of(scheduler, steps=STEPS):
    scheduler.set_timesteps(steps)
    return tuple(scheduler.sigmas.tolist()[:-1])


@pytest.fixture(scope="module")
def flux():
    return reference.load("flux-digits")


def images(pipe, name="flux-digits", steps=STEPS):
    return reference.images(name, pipe(**reference.inputs(name, (3, 8), (5, 6), steps=steps)))


def passed(pipe):
    """Timesteps of the calls of the pipeline's transformer, as they come."""
    seen = []
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(float(kwargs["timestep"][0])), with_kwargs=True
    )
    return seen


@pytest.mark.parametrize("name", SAMPLERS)
def test_moved_levels_are_as_if_the_sampler_had_them_by_itself(name):
    scheduler, other = SAMPLERS[name](3.0), SAMPLERS[name](1.5)
    wanted = levels_of(other)
    scheduler.set_timesteps(STEPS)
    move_sigmas(scheduler, wanted)
    assert scheduler.sigmas.tolist() == other.sigmas.tolist()
    torch.testing.assert_close(scheduler.timesteps, other.timesteps, rtol=0, atol=int(name == "unipc") or 1e-4)
    assert scheduler.timesteps.dtype == other.timesteps.dtype
    assert noise_levels(scheduler) == noise_levels(other)
    sample = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    states = [sample, sample]
    for index in range(STEPS):
        for i, one in enumerate((scheduler, other)):
            output = states[i].sin() + index
            states[i] = one.step(output, one.timesteps[index], states[i], return_dict=False)[0]
        torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)


@pytest.mark.parametrize("name", SAMPLERS)
def test_levels_that_are_not_moved_stay_to_the_last_bit(name):
    scheduler, same = SAMPLERS[name](3.0), SAMPLERS[name](3.0)
    own = levels_of(scheduler, 7)
    same.set_timesteps(7)
    move_sigmas(scheduler, own)
    assert torch.equal(scheduler.sigmas, same.sigmas)
    assert torch.equal(scheduler.timesteps, same.timesteps)


def test_a_plan_with_the_samplers_own_levels_changes_nothing(flux):
    before = images(flux)
    own = levels_of(FluxSampler())
    given = plan(FluxSampler(), own)
    for _ in range(2):
        with dc.cached(flux, plan=given):
            assert torch.equal(images(flux), before)
    reusing = plan(FluxSampler(), own, "110101")
    with dc.cached(flux, plan=reusing):
        moved = images(flux)
    with dc.cached(flux, plan=replace(reusing, sigmas=None)):
        assert torch.equal(images(flux), moved)


@pytest.fixture
def other_flux():
    """The same model on another shift."""
    pipe = reference.load("flux-digits")
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.5)
    return pipe


def test_a_pipeline_goes_through_the_moved_levels(flux, other_flux):
    """As with another shift, to the last bit; and as before once the plan is gone."""
    before, wanted = images(flux), images(other_flux)
    given = plan(FluxSampler(3.0), levels_of(FluxSampler(1.5)))
    dc.enable(flux, plan=given)
    seen = passed(flux)
    assert torch.equal(images(flux), wanted)
    run = session_of(flux).last_run
    assert seen == [pytest.approx(sigma, abs=1e-6) for sigma in given.sigmas]
    shifted = FluxSampler(1.5)
    shifted.set_timesteps(STEPS)
    assert list(run.noise_levels) == noise_levels(shifted)
    # a run with other steps is not the plan's
    with pytest.warns(dc.errors.DiffusionCacheWarning, match="other noise levels"):
        few = images(flux, steps=5)
    dc.disable(flux)
    assert torch.equal(images(flux), before)
    assert torch.equal(images(flux, steps=5), few)


def test_weights_go_with_the_steps_whatever_the_levels_are(flux, other_flux):
    """A plan's nodes and weights are found by the sampler's own levels."""
    given = plan(FluxSampler(3.0), levels_of(FluxSampler(1.5)), "110101")
    nodes, weights = given.nodes.clone(), given.weights.clone()
    nodes[2], weights[2] = 1, 0.9
    fitted = replace(given, nodes=nodes, weights=weights)
    there = replace(fitted, sigmas=None, noise_levels=())
    with dc.cached(other_flux, plan=there):
        wanted = images(other_flux)
    with dc.cached(flux, plan=fitted):
        assert torch.equal(images(flux), wanted)
        assert dc.summary(flux).unfitted == 1
    with dc.cached(flux, plan=given):
        assert not torch.equal(images(flux), wanted)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (DDIMScheduler, "DDIMScheduler cannot do"),
        (DPMSolverMultistepScheduler, "cannot do"),
        (EulerDiscreteScheduler, "cannot do"),
        (FlowMatchHeunDiscreteScheduler, "cannot do"),
        (lambda: UniPCMultistepScheduler(), "cannot do"),
    ],
)
def test_other_samplers_are_refused_and_left_alone(make, why):
    scheduler, same = make(), make()
    for one in (scheduler, same):
        one.set_timesteps(STEPS)
    with pytest.raises(ConfigError, match=why):
        move_sigmas(scheduler, (1.0, 0.9, 0.7, 0.5, 0.3, 0.1))
    assert torch.equal(scheduler.timesteps, same.timesteps)
    assert torch.equal(getattr(scheduler, "sigmas", torch.ones(1)), getattr(same, "sigmas", torch.ones(1)))


@pytest.mark.parametrize(
    ("sigmas", "why"),
    [
        ((1.0, 0.8, 0.5), "3 steps, and this run has 4"),
        ((1.0, 0.8, 0.8, 0.5), "step by step towards 0"),
        ((1.0, 0.8, 0.9, 0.5), "step by step towards 0"),
        ((0.9, 0.8, 0.5, 0.2), "from 1,"),
        ((0.999, 0.8, 0.5, 0.2), "from 1,"),
        ((1.0, 0.8, 0.5, 0.0), "step by step towards 0"),
        ((1.0, 0.8, 0.5, -0.2), "step by step towards 0"),
    ],
)
def test_levels_that_a_sampler_cannot_go_through(sigmas, why):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    own = levels_of(scheduler, 4)
    with pytest.raises(ConfigError, match=why):
        move_sigmas(scheduler, sigmas)
    assert tuple(scheduler.sigmas.tolist()[:-1]) == own


def test_samples_begin_at_the_level_that_their_noise_was_drawn_at():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    levels_of(scheduler, 4)
    move_sigmas(scheduler, (1.0 - 5e-6, 0.8, 0.5, 0.2))
    assert float(scheduler.sigmas[0]) == 1.0


def test_timesteps_of_their_own_are_refused():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(timesteps=[900.0, 500.0, 100.0])
    with pytest.raises(ConfigError, match="cannot be told"):
        move_sigmas(scheduler, (1.0, 0.5, 0.1))


def test_a_pipeline_whose_sampler_cannot_do_it_says_so_and_goes_on():
    pipe = reference.load("dit-digits")
    before = images(pipe, "dit-digits")
    dc.enable(pipe, plan=plan(pipe.scheduler, (1.0, 0.9, 0.7, 0.5, 0.3, 0.1)))
    for _ in range(2):
        with pytest.raises(ConfigError, match="DDIMScheduler cannot do"):
            images(pipe, "dit-digits")
    dc.disable(pipe)
    assert torch.equal(images(pipe, "dit-digits"), before)


def test_a_run_of_the_last_steps_alone_says_so(flux):
    pipe = FluxImg2ImgPipeline(**flux.components)
    pipe.set_progress_bar_config(disable=True)
    given = reference.inputs("flux-digits", (3, 8), (5, 6), steps=STEPS)
    image = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))

    def generate():
        generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
        return pipe(**{**given, "generator": generators}, image=image, strength=0.5).images

    before = generate()
    dc.enable(pipe, plan=plan(FluxSampler(3.0), levels_of(FluxSampler(1.5))))
    with pytest.raises(ConfigError, match="makes only 3 of them"):
        generate()
    dc.disable(pipe)
    assert torch.equal(generate(), before)


def test_a_plan_that_is_chosen_too_late(flux):
    given = plan(FluxSampler(3.0), levels_of(FluxSampler(1.5)))
    select = Select((Planned(given),), (Fitted.of(given),), torch.zeros(1, 1), torch.zeros(1), "nothing")
    with (
        dc.cached(flux, policy=select, forecaster=Fitted.of(given), scope="denoiser"),
        pytest.warns(dc.errors.DiffusionCacheWarning, match="cannot be chosen by the prompt"),
        pytest.raises(ConfigError, match="chosen by the prompt comes too late"),
    ):
        images(flux)


def test_a_bare_denoiser_in_a_loop():
    """Timesteps that are set inside the run are moved; set before it, they cannot be."""
    given = plan(FlowMatchEulerDiscreteScheduler(shift=3.0), levels_of(FlowMatchEulerDiscreteScheduler(shift=1.5)))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)

    class Denoiser(torch.nn.Linear):
        def forward(self, sample, timestep):
            return super().forward(sample) * timestep / 1000

    model = Denoiser(4, 4)

    def generate(scheduler):
        sample = torch.ones(2, 4)
        for timestep in scheduler.timesteps:
            sample = scheduler.step(model(sample, timestep), timestep, sample, return_dict=False)[0]
        return sample

    other = FlowMatchEulerDiscreteScheduler(shift=1.5)
    other.set_timesteps(STEPS)
    with torch.no_grad():
        wanted = generate(other)
        with dc.run(model, Planned(given), scope="denoiser", num_steps=STEPS):
            scheduler.set_timesteps(STEPS)
            assert torch.equal(generate(scheduler), wanted)
        scheduler.set_timesteps(STEPS)
        with (
            dc.run(model, Planned(given), scope="denoiser", num_steps=STEPS),
            pytest.raises(ConfigError, match="set_timesteps inside"),
        ):
            generate(scheduler)
