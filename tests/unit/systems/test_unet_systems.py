"""DeepCache and step rehash: their schedules by hand, and on UNets of images and videos."""

from dataclasses import replace

import grams
import numpy as np
import pipelines_unet
import plans
import pytest
import torch

import diffusion_cache as dc
from diffusion_cache import reference
from diffusion_cache.errors import ConfigError
from diffusion_cache.forecasters import Reuse
from diffusion_cache.forecasters.fitted import Fit, Fitted
from diffusion_cache.policies import Centered, Interval
from diffusion_cache.profiling.generation import Batch
from diffusion_cache.profiling.measure import Options, measure
from diffusion_cache.systems import DeepCache, StepRehash
from diffusion_cache.systems.step_rehash import key_steps, similarities

NAME, STEPS = "unet-digits", 8


@pytest.fixture(scope="module")
def pipe():
    return reference.load(NAME)


def generate(pipe, steps=STEPS):
    return pipe(**reference.inputs(NAME, [3], [5], steps)).images


def computed(pipe):
    return "".join(str(int(record.computed)) for record in dc.summary(pipe).records)


def block_calls(pipe):
    """How often each block of the UNet runs in a generation."""
    unet, counts = pipe.unet, {}
    handles = []
    for part in ("down_blocks", "up_blocks"):
        for i, block in enumerate(getattr(unet, part)):
            name = f"{part}.{i}"
            counts[name] = 0

            def hook(module, args, output, name=name):
                counts[name] += 1

            handles.append(block.register_forward_hook(hook))
    generate(pipe)
    for handle in handles:
        handle.remove()
    return counts


def test_deepcache_is_an_interval_or_crowds_around_a_point():
    assert DeepCache(4, depth=2).parts(None) == (Interval(4), Reuse(), "cut", 2)
    crowded = DeepCache(4, spacing="centered", center=0.5, power=2.0)
    assert crowded.parts(None) == (Centered(4, 0.5, 2.0), Reuse(), "cut", 1)
    with pytest.raises(ConfigError, match="spacing must be one of uniform, centered"):
        DeepCache(spacing="random")
    with pytest.raises(ConfigError, match="power shape the centered spacing"):
        DeepCache(power=2.0)


@pytest.mark.parametrize("depth", [1, 2])
def test_deepcache_runs_only_what_lies_above_the_cut(pipe, depth):
    generate(pipe)
    with dc.cached(pipe, method="deepcache", every=4, depth=depth):
        generate(pipe)  # the first generation learns the blocks' order
        counts = block_calls(pipe)
        assert computed(pipe) == "10001000"
    outside = {f"down_blocks.{i}" for i in range(depth)} | {f"up_blocks.{2 - i}" for i in range(depth)}
    assert counts == {name: STEPS if name in outside else 2 for name in counts}


def test_deepcache_computing_every_step_changes_nothing(pipe):
    before = generate(pipe)
    with dc.cached(pipe, method="deepcache", every=1):
        assert torch.equal(generate(pipe), before)


def test_keys_by_hand():
    """Steps at angles 0, 10, 30, 35, 80, 90, 95 degrees; as similar as their cosines."""
    angles = np.radians([0, 10, 30, 35, 80, 90, 95])
    features = torch.tensor(np.stack([np.cos(angles), np.sin(angles)], axis=1))
    similarity = similarities(grams.profile_of(features[None], "cut", depth=1))
    assert similarity == pytest.approx(np.cos(angles[:, None] - angles), abs=1e-12)
    assert key_steps(similarity, np.cos(np.radians(24.9))) == [0, 2, 4, 6]  # 30 is past 25 from 0, 80 past it from 30
    assert key_steps(similarity, np.cos(np.radians(30.1))) == [0, 3, 4, 6]
    assert key_steps(similarity, -1.0) == [0, 6]
    assert key_steps(similarity, 2.0) == list(range(7))
    assert key_steps(np.ones((1, 1)), 0.5) == [0]


def test_similarity_weighs_passes_alike_whatever_their_size():
    near, far = [[1.0, 0], [1, 0]], [[1.0, 0], [0, 1]]
    profile = grams.profile_of(torch.tensor([[near, far]]) * torch.tensor([[[[1.0]], [[100.0]]]]), "cut", depth=1)
    assert similarities(profile)[0, 1] == pytest.approx(0.5)


def test_similarity_of_a_pass_that_ends_is_that_of_the_other():
    path = torch.randn(1, 1, 6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole, path = similarities(grams.profile_of(path, "cut", depth=1)), path.repeat(1, 2, 1, 1)
    path[:, 1, 3:] = 0
    assert similarities(grams.profile_of(path, "cut", depth=1)) == pytest.approx(whole)


def test_step_rehash_goes_by_the_feature_that_is_reused():
    """A profile may be of residuals, however alike the outputs are."""
    angles = np.radians([0, 10, 60, 65, 90])
    profile = grams.profile_of(np.stack([np.cos(angles), np.sin(angles)], axis=1)[None], "cut", feature="residual")
    profile = replace(profile, arrays={**profile.arrays, "gram_output": torch.ones(1, 1, 5, 5)})
    keys = StepRehash(gamma=0.9).plan(profile).schedule.computed
    assert keys == (0, 2, 4)


def test_step_rehash_by_number_of_full_steps():
    angles = np.radians([0, 1, 3, 7, 15, 31, 60, 90])
    profile = grams.profile_of(np.stack([np.cos(angles), np.sin(angles)], axis=1)[None], "cut", depth=1)
    for count in range(2, 9):
        plan = StepRehash(computed=count).plan(profile)
        keys = [step for step, row in enumerate(plan.schedule.compute) if row[0][0]]
        assert len(keys) <= count
        assert keys == key_steps(similarities(profile), plan.facts["gamma"])
        if count < 8:  # the largest gamma that needs no more
            larger = [value for value in np.unique(similarities(profile)) if value > plan.facts["gamma"]]
            assert all(len(key_steps(similarities(profile), gamma)) > count for gamma in larger)
    with pytest.raises(ConfigError, match="so 1 is too few"):
        StepRehash(computed=1).plan(profile)
    with pytest.raises(ConfigError, match="gamma is a cosine"):
        StepRehash(gamma=1.5)


def test_step_rehash_may_forecast_the_deep_feature():
    profile = grams.profile_of(torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(0)), "cut", depth=2)
    plan = StepRehash(gamma=-1.0).plan(profile)
    assert (plan.scope, plan.depth) == ("cut", 2)
    assert Fitted.of(plan).table[3, 0, -1] == Fit((0,), (1.0,))
    keys = StepRehash(computed=4, order=1).plan(profile)
    assert keys.history == 2
    assert keys.schedule == StepRehash(computed=4).plan(profile).schedule


def test_step_rehash_on_a_shipped_model(pipe):
    profile = plans.profile(NAME, scope="cut")
    similarity = similarities(profile)
    with dc.cached(pipe, method="step_rehash", profile=profile, computed=4):
        generate(pipe)
        found = [step for step, mark in enumerate(computed(pipe)) if mark == "1"]
        assert dc.summary(pipe).spans == 1
    assert found[0] == 0
    assert found[-1] == STEPS - 1
    assert len(found) <= 4
    assert found == key_steps(similarity, StepRehash(computed=4).plan(profile).facts["gamma"])


def test_other_denoisers_scopes_and_missing_profiles_are_told(pipe):
    dit = reference.load("dit-digits")
    for method in ("deepcache", "step_rehash"):
        with pytest.raises(ConfigError, match=f"{method} is for a unet"):
            dc.enable(dit, method=method)
    with pytest.raises(ConfigError, match="step_rehash plans from measurements"):
        dc.enable(pipe, method="step_rehash")
    with pytest.raises(ConfigError, match="deepcache needs no profile"):
        dc.enable(pipe, method="deepcache", profile=plans.profile(NAME, scope="cut"))


def animate():
    """A tiny AnimateDiff pipeline, whose UNet has temporal layers, and a way to generate samples with it."""
    case = next(case for case in pipelines_unet.CASES if case.id == "AnimateDiffPipeline")
    pipe = case.build()

    def call(seed=0, steps=6):
        given = case.call() | {"generator": torch.Generator().manual_seed(seed), "num_inference_steps": steps}
        return pipe(**given)

    return pipe, call


def test_on_a_temporal_unet():
    pipe, call = animate()
    before = call().frames

    def batch(samples):
        return Batch(pipe, lambda: call(samples[0][1]), lambda output: output.frames, 1)

    profile = measure(batch, [("", 1), ("", 2)], Options(scope="cut", batch=1, sensitivity_samples=0))
    assert profile.total == 6
    assert profile.spans[0].kind == "cut"
    assert profile.spans[0].share > 0.3
    with dc.cached(pipe, method="step_rehash", profile=profile, computed=3):
        call()
        keys = [step for step, mark in enumerate(computed(pipe)) if mark == "1"]
    assert keys == key_steps(similarities(profile), StepRehash(computed=3).plan(profile).facts["gamma"])
    assert keys[0] == 0
    assert keys[-1] == 5
    assert len(keys) <= 3
    with dc.cached(pipe, method="step_rehash", profile=profile, gamma=1.0, warmup=6):
        assert torch.equal(call().frames, before)
    with dc.cached(pipe, method="deepcache", every=3, depth=2):
        call()
        assert computed(pipe) == "100100"
    assert torch.equal(call().frames, before)
