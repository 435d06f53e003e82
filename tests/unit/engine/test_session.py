"""Attaching where another cache is on already, or is switched on later."""

import copy
import warnings

import pytest
import torch
from diffusers import FirstBlockCacheConfig
from diffusers.hooks import HookRegistry, apply_first_block_cache

import diffusion_cache as dc
from diffusion_cache import reference

NAME = "flux-digits"
CONFIG = FirstBlockCacheConfig(threshold=0.3)


def generate(pipe):
    return reference.images(NAME, pipe(**reference.inputs(NAME, (3,), (5,), steps=4)))


def theirs(pipe):
    pipe.transformer.enable_cache(CONFIG)
    return (
        pipe.transformer.disable_cache,
        r"of diffusers is on for transformer: call pipe.transformer.disable_cache\(\)",
    )


def applied(pipe):
    """diffusers' cache put on by its function, of which the model itself knows nothing."""
    apply_first_block_cache(pipe.transformer, CONFIG)

    def off():
        registry = HookRegistry.check_if_exists_or_initialize(pipe.transformer)
        for name in ("fbc_leader_block_hook", "fbc_block_hook"):
            registry.remove_hook(name, recurse=True)

    return off, r"of diffusers is on for transformer: remove its hooks first.*'fbc_leader_block_hook', 'fbc_block_hook'"


def cache_dits(pipe):
    """What cache-dit leaves in a transformer that it caches."""
    marks = dict(_is_cached=True, _context_manager=object())
    vars(pipe.transformer).update(marks)

    def off():
        for name in marks:
            delattr(pipe.transformer, name)

    return off, r"of cache-dit is on for transformer: call cache_dit.disable_cache\(pipe\) first"


@pytest.mark.parametrize("switch_on", [theirs, applied, cache_dits])
def test_another_cache_is_refused(switch_on):
    pipe = reference.load(NAME)
    off, told = switch_on(pipe)
    before = dict(vars(pipe.transformer))
    with pytest.raises(dc.ConfigError, match=told):
        dc.enable(pipe, "interval", every=2)
    with pytest.raises(dc.ConfigError, match="is on for model: "), dc.run(pipe.transformer, "interval", every=2):
        pass
    assert dict(vars(pipe.transformer)) == before
    assert not [name for name in vars(pipe) if "diffusion_cache" in name]
    off()
    with dc.cached(pipe, "interval", every=2):
        generate(pipe)
        assert dc.summary(pipe).reused == 2


@pytest.mark.parametrize("switch_on", [theirs, cache_dits])  # what diffusers applies must be on before the first call
def test_another_cache_that_is_switched_on_later_is_left_alone(switch_on):
    twin, pipe = reference.load(NAME), reference.load(NAME)
    switch_on(twin)
    expected = generate(twin)
    with dc.cached(pipe, "interval", every=2):
        ours = generate(pipe)
        off, told = switch_on(pipe)
        with pytest.warns(dc.DiffusionCacheWarning, match=f"running without the cache.*{told}"):
            found = generate(pipe)
        assert torch.equal(found, expected)
        assert dc.summary(pipe).reused == 0
        off()
        with warnings.catch_warnings():
            warnings.simplefilter("error", dc.DiffusionCacheWarning)
            assert torch.equal(generate(pipe), ours)


def test_the_marks_of_cache_dit_are_those_that_it_leaves():
    cache_dit = pytest.importorskip("cache_dit")
    pipe = reference.load(NAME)
    cache_dit.enable_cache(pipe, cache_config=cache_dit.DBCacheConfig(Fn_compute_blocks=1))
    try:
        with pytest.raises(dc.ConfigError, match="of cache-dit is on for transformer"):
            dc.enable(pipe, "interval", every=2)
    finally:
        cache_dit.disable_cache(pipe)
    dc.enable(pipe, "interval", every=2)
    dc.disable(pipe)


def test_the_helper_of_deepcache_is_seen():
    helper = pytest.importorskip("DeepCache").DeepCacheSDHelper(pipe=reference.load("unet-digits"))
    helper.set_params(cache_interval=2, cache_branch_id=0)
    helper.enable()
    with pytest.raises(dc.ConfigError, match=r"of DeepCache is on for unet: call disable\(\) of its helper first"):
        dc.enable(helper.pipe, "interval", every=2)
    helper.disable()
    dc.enable(helper.pipe, "interval", every=2)
    dc.disable(helper.pipe)


def test_latents_that_a_copy_of_the_scheduler_steps_are_of_no_planned_size():
    """LTX2 steps its audio so, beside the video."""
    pipe = reference.load(NAME)
    stepped = []

    def step_audio(pipe, index, timestep, kwargs):
        if index == 1:
            stepped.append(copy.deepcopy(pipe.scheduler).step(torch.zeros(1, 9), timestep, torch.zeros(1, 9)))
        return kwargs

    dc.enable(pipe, profile="flux-digits-flow-euler", nfe=20)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dc.DiffusionCacheWarning)  # of few steps
        warnings.filterwarnings("error", "the plan was made for latents of", dc.DiffusionCacheWarning)
        pipe(**reference.inputs(NAME, (3,), (5,), steps=4), callback_on_step_end=step_audio)
    assert len(stepped) == 1
    assert dc.summary(pipe).total == 4
