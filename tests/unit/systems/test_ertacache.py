"""ERTACache: its schedule by replaying stored features, and what its plans do to a shipped model."""

import numpy as np
import plans
import pytest
import torch

import diffusion_cache as dc
from diffusion_cache import reference
from diffusion_cache.engine import Method, Observer
from diffusion_cache.engine.patches import wrapped_step
from diffusion_cache.errors import ConfigError
from diffusion_cache.forecasters import Reuse
from diffusion_cache.planning.timesteps import adjusted, profiled_shares
from diffusion_cache.policies import Guarded, Interval
from diffusion_cache.profiling.generation import attached
from diffusion_cache.systems.ertacache import ERTACache, least_threshold, replay

MODEL = "flux-digits"
STEPS = plans.STEPS


@pytest.fixture(scope="module")
def profile():
    return plans.profile(MODEL, scope="denoiser", feature="residual")


@pytest.fixture(scope="module")
def pipe():
    return reference.load(MODEL)


def images(pipe):
    return reference.images(MODEL, pipe(**reference.inputs(MODEL, (3, 8), (5, 6), steps=STEPS)))


def steps_of(plan):
    return [step[0][0] for step in plan.schedule.compute]


def path(pipe, samples):
    """Inputs and outputs of the denoiser in a full run, each [T, ...]."""
    inputs, outputs = [], []

    def make(step):
        def noted(scheduler, model_output, timestep, sample, **kwargs):
            inputs.append(sample)
            outputs.append(model_output)
            return step(scheduler, model_output, timestep, sample, **kwargs)

        return noted

    method = Method(Guarded(Interval(1)), Reuse(), "denoiser")
    with attached(pipe, method, Observer()), wrapped_step(pipe.scheduler, make):
        plans.batch(pipe, MODEL, samples).call()
    return torch.stack(inputs), torch.stack(outputs)


@pytest.mark.parametrize("feature", ["residual", "output"])
@pytest.mark.parametrize("threshold", [0.03, 0.1, 0.3])
def test_the_schedule_by_replaying_features(pipe, profile, feature, threshold):
    inputs, outputs = path(pipe, plans.drawn(0, 2))  # what the profile was made of
    features = outputs - inputs if feature == "residual" else outputs
    expected, kept = [], None
    for current in features:
        reuse = kept is not None and float((kept - current).norm() / current.norm()) < threshold
        expected.append(not reuse)
        kept = kept if reuse else current
    assert steps_of(ERTACache(threshold, feature=feature).plan(profile)) == expected
    assert 1 < sum(expected) < STEPS or threshold != 0.1


def test_a_threshold_for_a_number_of_steps(profile):
    for most in range(1, STEPS + 1):
        plan = ERTACache(nfe=most).plan(profile)
        assert plan.nfe <= most
        assert plan.facts["threshold"] >= 0
        assert steps_of(ERTACache(plan.facts["threshold"]).plan(profile)) == steps_of(plan)
    assert ERTACache(nfe=STEPS).plan(profile).facts["threshold"] == 0
    # none smaller takes as few
    errors = np.array([[0, 0.1, 0.3, 0.4], [0, 0, 0.1, 0.3], [0, 0, 0, 0.2], [0, 0, 0, 0]])
    assert least_threshold(errors, 3) == np.nextafter(0.1, 1)
    assert least_threshold(errors, 2) == np.nextafter(0.2, 1)
    assert replay(errors, least_threshold(errors, 2)) == [True, False, True, False]
    assert least_threshold(errors, 1) == np.nextafter(0.4, 1)


def test_nothing_is_reused_at_zero(pipe, profile):
    before = images(pipe)
    for adjust in ("none", "A", "B"):
        with dc.cached(pipe, method="ertacache", profile=profile, threshold=0.0, adjust=adjust):
            assert torch.equal(images(pipe), before)
            assert dc.summary(pipe).reused == 0


@pytest.mark.parametrize("feature", ["residual", "output"])
def test_what_is_reused(pipe, profile, feature):
    """v = x + (the last computed v − x), or the last v, in a loop written out."""
    plan = ERTACache(nfe=5, feature=feature).plan(profile)
    with dc.cached(pipe, plan=plan):
        cached = images(pipe)
        assert dc.summary(pipe).unfitted == 0
    computed, kept, index = steps_of(plan), [], [0]
    original = pipe.transformer.forward

    def forward(hidden_states, *args, **kwargs):
        if computed[index[0]]:
            output = original(hidden_states, *args, **kwargs)[0]
            kept[:] = [output - hidden_states if feature == "residual" else output]
        else:
            output = hidden_states + kept[0] if feature == "residual" else kept[0]
        index[0] += 1
        return (output,)

    pipe.transformer.forward = forward
    try:
        expected = images(pipe)
    finally:
        del pipe.transformer.forward
    torch.testing.assert_close(cached, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("adjust", ["A", "B"])
def test_adjusted_levels_are_the_samplers_own(pipe, profile, adjust):
    plan = ERTACache(nfe=5, adjust=adjust).plan(profile)
    phi = profiled_shares(profile, steps_of(plan), "residual", adjust)
    assert plan.sigmas == adjusted(profile.fingerprint.sigmas, phi)
    with dc.cached(pipe, method=ERTACache(nfe=5, adjust=adjust), profile=profile):
        images(pipe)
        assert pipe.scheduler.sigmas.tolist() == [*torch.tensor(plan.sigmas).tolist(), 0.0]


def test_spans_of_the_stack_together(pipe):
    """Flux has two stacks: one decision for both, which are one span."""
    plan = ERTACache(nfe=5).plan(plans.profile(MODEL))
    assert (plan.scope, plan.feature, plan.nfe) == ("stack", "residual", 5)
    with dc.cached(pipe, plan=plan):
        images(pipe)
        records = dc.summary(pipe).records
    assert [record.spans_reused for record in records] == [0 if step else 1 for step in steps_of(plan)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": -0.1}, "at least 0"),
        ({"threshold": float("nan")}, "at least 0"),
        ({"threshold": float("inf")}, "a finite number of at least 0, not inf"),
        ({"threshold": 0.1, "feature": "hidden"}, "one of auto, residual, output"),
        ({"threshold": 0.1, "adjust": "C"}, "'none', 'A' or 'B'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ConfigError, match=message):
        ERTACache(**options)


def test_a_sampler_without_noise_levels():
    profile = plans.profile("dit-digits", scope="denoiser")
    with pytest.raises(ConfigError, match="goes by none: set adjust='none'"):
        ERTACache(nfe=5, adjust="B").plan(profile)
    with pytest.raises(ConfigError, match="nfe must be at least 1"):
        ERTACache(nfe=0).plan(profile)
    assert ERTACache(nfe=5).plan(profile).feature == "output"
    with pytest.raises(ConfigError, match="no residuals of denoiser: profile again"):
        ERTACache(nfe=5, feature="residual").plan(profile)
