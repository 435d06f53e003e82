"""On a GPU: the same contracts, and no host sync on the planned path."""

import pytest
import torch

import diffusion_cache as dc
from diffusion_cache import reference

pytestmark = pytest.mark.gpu

STEPS = 6
OPTIONS = dict(policy="interval", every=2, forecaster="taylor", order=1)


def generate(pipe, name):
    call = reference.inputs(name, (3, 8), (5, 6), steps=STEPS)
    return reference.images(name, pipe(**{key: _moved(value) for key, value in call.items()}))


def _moved(value):
    return value.to("cuda") if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("name", sorted(reference.MODELS))
def test_always_computing_is_bit_identical_and_disable_restores(name):
    pipe = reference.load(name).to("cuda")
    uncached = generate(pipe, name)
    with dc.cached(pipe, policy="interval", every=1):
        assert torch.equal(generate(pipe, name), uncached)
        assert dc.summary(pipe).cache_bytes == 0
    assert torch.equal(generate(pipe, name), uncached)


@pytest.mark.parametrize("name", sorted(reference.MODELS))
def test_cached_on_the_gpu_is_what_it_is_on_the_cpu(name):
    on_cpu = reference.load(name)
    with dc.cached(on_cpu, **OPTIONS):
        expected = generate_on_cpu(on_cpu, name)
    pipe = reference.load(name).to("cuda")
    with dc.cached(pipe, **OPTIONS):
        cached = generate(pipe, name)
        assert dc.summary(pipe).reused > 0
    assert (cached.cpu() - expected).abs().max() < 1e-2


KEPT = (
    dict(scope="branch"),
    dict(cache_dtype="int8-delta"),
    dict(scope="block", cache_device="cpu"),
    dict(scope="branch", cache_device="cpu", cache_dtype="int8-delta"),
)


@pytest.mark.parametrize("kept", KEPT, ids=str)
def test_features_are_the_same_however_they_are_kept(kept):
    """Branches whose gate is part of the forecast, differences in codes, and features that wait on the host."""
    name = "flux-digits"
    on_cpu = reference.load(name)
    with dc.cached(on_cpu, **OPTIONS, **kept):
        expected = generate_on_cpu(on_cpu, name)
    pipe = reference.load(name).to("cuda")
    with dc.cached(pipe, **OPTIONS, **kept):
        cached = generate(pipe, name)
        summary = dc.summary(pipe)
    assert summary.reused > 0
    assert (cached.cpu() - expected).abs().max() < 1e-2
    if "cache_device" in kept:
        assert summary.resident_bytes < summary.cache_bytes / 2
        with dc.cached(pipe, **OPTIONS, **{**kept, "cache_device": "model"}):
            assert torch.equal(generate(pipe, name), cached)


def generate_on_cpu(pipe, name):
    return reference.images(name, pipe(**reference.inputs(name, (3, 8), (5, 6), steps=STEPS)))


@pytest.mark.parametrize("name", sorted(reference.MODELS))
def test_planned_steps_after_the_first_do_not_wait_for_the_device(name):
    denoiser = reference.denoiser(name).to("cuda")
    calls = []
    pipe = reference.load(name).to("cuda")
    hook = getattr(pipe, reference.spec(name).denoiser).register_forward_pre_hook(
        lambda module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    generate(pipe, name)
    hook.remove()
    args, kwargs = calls[2]
    with torch.no_grad(), dc.run(denoiser, num_steps=STEPS, **OPTIONS) as run:
        denoiser(*args, **kwargs)  # the first call may read its sample back once
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(STEPS - 1):
                run.next_step()
                denoiser(*args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert run.summary().reused == STEPS // 2


@pytest.mark.parametrize("sync", ["immediate", "lagged"])
def test_adaptive_runs_repeat(sync):
    pipe = reference.load("flux-digits").to("cuda")
    with dc.cached(pipe, "teacache", threshold=1.0, sync=sync):
        first = generate(pipe, "flux-digits")
        assert dc.summary(pipe).reused > 0
        assert torch.equal(generate(pipe, "flux-digits"), first)
