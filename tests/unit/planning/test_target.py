"""Searching the value that meets a target, apart from any pipeline."""

import math
from types import SimpleNamespace

import pytest
import torch
from diffusers.guiders import SkipLayerGuidance
from diffusers.hooks import LayerSkipConfig

from diffusion_cache.engine import Method
from diffusion_cache.errors import ConfigError
from diffusion_cache.evaluation.prompts import FITTING_SEEDS
from diffusion_cache.forecasters import Taylor
from diffusion_cache.planning import target
from diffusion_cache.planning.kept import Tuned
from diffusion_cache.planning.target import (
    FIRST_SEED,
    MOST_TRIED,
    Counted,
    Target,
    Tuner,
    _sampler_of,
    arguments_of,
    from_other_noise,
    kind_of,
    nearest,
    reuse_for,
)
from diffusion_cache.policies import FirstBlock, Guarded, Interval


def test_seeds_are_those_for_fitting():
    assert FIRST_SEED >= FITTING_SEEDS


@pytest.mark.parametrize("start", [1e-3, 0.3, 40.0])
@pytest.mark.parametrize("target", [0.1, 0.5, 0.85])
def test_the_value_is_found_from_wherever_one_starts(start, target):
    def share(value):  # in steps of 1/20, half of what can be at 0.05
        return round(20 * value / (value + 0.05)) / 20

    tried = nearest(share, target, start, 0.025)
    assert abs(list(tried.values())[-1] - target) <= 0.025 + 1e-9
    assert len(tried) <= MOST_TRIED
    assert all(share(value) == found for value, found in tried.items())


def test_a_share_that_jumps_over_the_target_ends_the_search():
    tried = nearest(lambda value: 0.2 if value < 1 else 0.8, 0.5, 0.3, 0.01)
    assert set(tried.values()) == {0.2, 0.8}
    assert len(tried) <= MOST_TRIED
    below, above = max(v for v, s in tried.items() if s == 0.2), min(v for v, s in tried.items() if s == 0.8)
    assert below < 1 <= above < 1.1 * below


def test_the_kind_of_a_call_is_told_by_lists_too():
    """But not by prompts, labels and generators, however many and long."""
    call = {
        "prompt": ["a cat", "a dog"],
        "class_labels": [3, 5],
        "generator": [torch.Generator()],
        "latents": torch.zeros(2, 4, 8),
        "num_inference_steps": 20,
        "guidance_scale": [1.5, 2.0],
        "size": (512, 768),
        "image": [SimpleNamespace(size=(64, 32))],
        "kwargs": {"scale": 0.5, "name": "x"},
        "none": None,
        "prompt_embeds": torch.zeros(2, 77, 8),
        "num_images_per_prompt": 2,
        "max_sequence_length": 512,
        "return_dict": True,
    }
    kind = kind_of(call)
    assert kind == {
        "latents": [4, 8],
        "num_inference_steps": 20,
        "guidance_scale": [1.5, 2.0],
        "size": [512, 768],
        "image": [[64, 32]],
        "kwargs": {"scale": 0.5},
    }
    other = {"prompt": ["a cat"], "class_labels": [4], "generator": torch.Generator(), "latents": torch.ones(1, 4, 8)}
    other |= {"prompt_embeds": torch.zeros(1, 12, 8), "num_images_per_prompt": 1, "none": "a fog", "return_dict": False}
    assert kind_of({**call, **other}) == kind
    for changed in ({"guidance_scale": [1.5, 2.5]}, {"size": (512, 512)}, {"kwargs": {"scale": 0.6}}, {"eta": 1.0}):
        assert kind_of({**call, **changed}) != kind


def test_whether_there_is_a_negative_prompt_tells_of_guidance():
    call = {"prompt": "a cat", "negative_prompt": None, "true_cfg_scale": 4.0}
    plain, guided = kind_of(call), kind_of({**call, "negative_prompt": "blurred"})
    assert plain != guided
    assert kind_of({**call, "negative_prompt": ""}) == guided
    assert kind_of({**call, "negative_prompt_embeds": torch.zeros(1, 7, 8)}) != plain


def test_guiders_are_told_by_their_scales_and_by_the_layers_that_they_skip():
    def guider(**options):
        return SkipLayerGuidance(skip_layer_config=[LayerSkipConfig([1, 2], dropout=1.0, **options)])

    def kind(guider):
        return _sampler_of(SimpleNamespace(components={"guider": guider}))

    used, stronger = guider(), guider()
    used.config.skip_layer_config[0].fqn = "transformer_blocks"  # as its first use finds out
    stronger.guidance_scale = 2.0
    assert kind(used) == kind(guider())
    assert kind(stronger) != kind(guider())
    assert kind(guider(skip_ff=False)) != kind(guider())


def test_what_was_found_is_not_taken_for_another_model_at_the_address_of_the_first(monkeypatch):
    class Pipe:
        def __init__(self):
            self.components = {"transformer": torch.nn.Identity()}

        def __call__(self, steps=4):
            pass

    searched = []

    def search(self, session, pipe, call):
        searched.append(pipe)
        return Tuned(0.1 * len(searched), 0.5, 4, 1)

    monkeypatch.setattr(target, "find_denoisers", lambda pipe: pipe.components)
    monkeypatch.setattr(target, "id", lambda model: 1, raising=False)
    monkeypatch.setattr(Tuner, "_key", lambda self, pipe, call: None)
    monkeypatch.setattr(Tuner, "_search", search)
    tuner = Tuner(Method(Guarded(FirstBlock()), Taylor()), Target(reuse=0.5))
    first, other = Pipe(), Pipe()
    values = [tuner.tuned(None, pipe, (), {}).value for pipe in (first, first, other, other)]
    assert values == [0.1, 0.1, 0.2, 0.2]
    assert searched == [first, other]


def test_time_falls_in_proportion_to_what_is_reused():
    # 90% reused makes it 4 times as fast: 3/4 of the time saved, or 1/2 with 60%
    assert reuse_for(2.0, 4.0, 0.9) == pytest.approx(0.6)
    assert reuse_for(4.0, 4.0, 0.9) == pytest.approx(0.9)
    assert reuse_for(2.0, 0.9, 0.9) == math.inf  # the cache only costs time


@pytest.mark.parametrize(
    ("wish", "match"),
    [
        ({}, "give target_reuse or speedup"),
        ({"reuse": 0.5, "speedup": 2.0}, "give target_reuse or speedup"),
        ({"reuse": 1.0}, "between 0 and 1"),
        ({"reuse": math.nan}, "between 0 and 1"),
        ({"speedup": 1.0}, "above 1"),
        ({"speedup": math.inf}, "above 1"),
    ],
)
def test_targets_that_make_no_sense(wish, match):
    with pytest.raises(ConfigError, match=match):
        Target(**wish)


def test_a_policy_without_a_threshold_has_nothing_to_search():
    with pytest.raises(ConfigError, match="'interval' has nothing that could be searched"):
        Tuner(Method(Guarded(Interval(2)), Taylor()), Target(0.5))


def visit(rows=None):
    return SimpleNamespace(rows=rows)


def frame(index, computed, reused=(), asking=()):
    step = SimpleNamespace(index=index)
    return SimpleNamespace(step=step, computed=computed, reused=list(reused), asking=list(asking))


def test_what_is_reused_is_counted_by_samples():
    count = Counted()
    count.denoiser_called(frame(0, 2), None, None)  # two spans computed
    count.denoiser_called(frame(1, 0, [visit(), visit()]), None, None)  # both reused
    count.denoiser_called(frame(2, 2, [visit([0]), visit([0])], [True, False, False, False]), None, None)
    assert count.steps == 3
    assert count.share == pytest.approx((0 + 2 + 2 * 0.75) / 6)
    assert count.again().share == 0


class Pipe:
    def __call__(self, prompt, steps=10, generator=None, latents=None, callback_on_step_end=None, **more):
        pass


def test_the_arguments_of_a_call_by_name_without_callbacks():
    call = arguments_of(Pipe(), ("a cat", 5), {"callback_on_step_end": print, "size": 3})
    assert call == {"prompt": "a cat", "steps": 5, "generator": None, "latents": None, "size": 3}
    with pytest.raises(ConfigError, match="Pipe cannot be called like that"):
        arguments_of(Pipe(), (), {})


def test_noise_is_drawn_anew_and_the_users_is_left_alone():
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    states = [generator.get_state() for generator in generators]
    latents = 3 * torch.randn(2, 4, 64, 64, generator=torch.Generator().manual_seed(0)) + 1
    kept = latents.clone()
    call = {"prompt": "a cat", "generator": generators, "latents": latents, "negative_prompt": []}
    changed = from_other_noise(call, 7)
    again = from_other_noise(call, 7)
    assert torch.equal(changed["latents"], again["latents"])
    assert not torch.equal(changed["latents"], from_other_noise(call, 8)["latents"])
    assert changed["latents"].std().item() == pytest.approx(3, rel=0.02)
    assert changed["latents"].mean().item() == pytest.approx(1, abs=0.1)
    assert [generator.initial_seed() for generator in changed["generator"]] == [7, 8]
    assert all(torch.equal(g.get_state(), state) for g, state in zip(generators, states, strict=True))
    assert torch.equal(latents, kept)
    assert (changed["prompt"], changed["negative_prompt"]) == ("a cat", [])
