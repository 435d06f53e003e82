"""On a GPU: the same contracts, no host sync on the planned path, and CUDA graphs."""

import contextlib
import gc

import pytest
import torch
from evaluation_profile import plan

import diffusion_cache as dc
from diffusion_cache import reference
from diffusion_cache.forecasters.fitted import Fitted
from diffusion_cache.history import History
from diffusion_cache.offload import Offload
from diffusion_cache.policies import Planned

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


def test_features_on_the_host_take_no_more_of_the_device_however_far_the_host_runs_ahead():
    size, away, histories = 2**24, Offload(), [History(2) for _ in range(8)]
    for step in range(2):
        for place, history in enumerate(histories):
            value = 10.0 * step + place
            away.observe(history, step, [torch.full((size // 4,), value, device="cuda")], [None])
    away.finish()
    torch.cuda.synchronize()
    before, found = torch.cuda.memory_reserved(), []
    torch.cuda._sleep(10**9)  # the device is behind until all is enqueued
    for _ in range(3):
        for place, history in enumerate(histories):
            slots = away.held(history).slots
            found += [torch.stack([slot[0].amin(), slot[0].amax()]) for slot in slots]
            away.fetch(histories[(place + 1) % len(histories)])
    taken = torch.cuda.memory_reserved() - before
    assert taken <= 3 * 2 * size  # two spans, and room for what is not features
    expected = [[10.0 * step + place] * 2 for place in range(len(histories)) for step in range(2)]
    assert torch.stack(found).tolist() == 3 * expected
    away.finish()


def generate_on_cpu(pipe, name):
    return reference.images(name, pipe(**reference.inputs(name, (3, 8), (5, 6), steps=STEPS)))


def third_call(name):
    """The arguments of a pipeline's third call of its denoiser."""
    calls = []
    pipe = reference.load(name).to("cuda")
    hook = getattr(pipe, reference.spec(name).denoiser).register_forward_pre_hook(
        lambda module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    generate(pipe, name)
    hook.remove()
    return calls[2]


PLAN = plan("half", STEPS, (0, 2, 4))
PLANNED = {
    "interval": OPTIONS,
    "mask": dict(policy="mask", mask="101010", forecaster="taylor"),
    "magcache": dict(policy="magcache", ratios=(1.0,) * STEPS, max_skip=1),
    "plan": dict(policy=Planned(PLAN), forecaster=Fitted.of(PLAN)),
}


@pytest.mark.parametrize("name", sorted(reference.MODELS))
@pytest.mark.parametrize("options", PLANNED.values(), ids=PLANNED)
def test_planned_steps_after_the_first_do_not_wait_for_the_device(name, options):
    denoiser = reference.denoiser(name).to("cuda")
    args, kwargs = third_call(name)
    with torch.no_grad(), dc.run(denoiser, num_steps=STEPS, **options) as run:
        for step in range(STEPS):
            # the first call may read its sample back, and the first one with reused spans its output
            with waits_refused(step >= 2):
                denoiser(*args, **kwargs)
                run.next_step()
        assert run.summary().reused == STEPS // 2


@contextlib.contextmanager
def waits_refused(refused=True):
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error" if refused else "default")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("sync", ["immediate", "lagged"])
def test_adaptive_runs_repeat(sync):
    pipe = reference.load("flux-digits").to("cuda")
    with dc.cached(pipe, "teacache", threshold=1.0, sync=sync):
        first = generate(pipe, "flux-digits")
        assert dc.summary(pipe).reused > 0
        assert torch.equal(generate(pipe, "flux-digits"), first)


CAPTURED = (
    dict(),
    dict(scope="block"),
    dict(scope="branch"),
    dict(scope="denoiser"),
    dict(scope="block", cache_dtype="fp8"),
    dict(scope="block", cache_dtype="int8"),
)


@pytest.mark.parametrize("name", sorted(reference.MODELS))
@pytest.mark.parametrize("where", CAPTURED, ids=str)
def test_cuda_graphs_give_the_same_images(name, where):
    pipe = reference.load(name).to("cuda")
    with dc.cached(pipe, **OPTIONS, **where):
        expected, records = generate(pipe, name), dc.summary(pipe).records
    with dc.cached(pipe, **OPTIONS, **where, cuda_graphs=True):
        for _ in range(3):
            assert (generate(pipe, name) - expected).abs().max() < 1e-2
            found = dc.summary(pipe)
            assert [record.computed for record in found.records] == [record.computed for record in records]
        assert found.replayed == len(found.records)


@pytest.mark.parametrize("name", sorted(reference.MODELS))
def test_replays_do_not_wait_for_the_device(name):
    denoiser = reference.denoiser(name).to("cuda")
    args, kwargs = third_call(name)
    with torch.no_grad(), dc.run(denoiser, num_steps=2 * STEPS, **OPTIONS, cuda_graphs=True) as run:
        outputs = []
        for step in range(2 * STEPS):
            with waits_refused(step >= STEPS):
                outputs.append(denoiser(*args, **kwargs)[0])
                run.next_step()
        replays = run.summary().records[STEPS:]
        assert all(record.replayed for record in replays)
        assert {record.computed for record in replays} == {True, False}
    assert all((output - outputs[0]).abs().max() < 1e-3 * outputs[0].abs().max() for output in outputs)


def test_graphs_take_no_more_memory_from_run_to_run_and_none_once_disabled():
    name = "flux-digits"
    pipe = reference.load(name).to("cuda")
    disabled = []
    for _ in range(3):
        taken = []
        dc.enable(pipe, **OPTIONS, cuda_graphs=True)
        for _ in range(4):
            generate(pipe, name)
            taken.append(held_bytes())
        assert dc.summary(pipe).replayed == STEPS
        assert taken[1] == taken[2] == taken[3]
        dc.disable(pipe)
        disabled.append(held_bytes())
        assert disabled[-1] < taken[-1]
    assert disabled[1] == disabled[2]  # libraries keep workspaces from the first capture on


def held_bytes():
    torch.cuda.synchronize()
    gc.collect()
    return torch.cuda.memory_allocated()


def test_what_cannot_be_captured_runs_as_usual():
    name = "dit-digits"
    pipe = reference.load(name).to("cuda")
    hook = pipe.transformer.transformer_blocks[0].register_forward_hook(
        lambda module, args, output: output * (1.0 + 0.01 * float(output.mean()))
    )
    with dc.cached(pipe, **OPTIONS):
        expected = generate(pipe, name)
    with dc.cached(pipe, **OPTIONS, cuda_graphs=True):
        with pytest.warns(dc.DiffusionCacheWarning, match="could not be captured"):
            found = [generate(pipe, name), generate(pipe, name)]
        assert all((image - expected).abs().max() < 1e-2 for image in found)
        assert [record.replayed for record in dc.summary(pipe).records] == [False, True] * (STEPS // 2)
        hook.remove()
        # what a failed capture could leave behind: its stream, an allocator and a generator that are still captured
        assert torch.cuda.current_stream() == torch.cuda.default_stream()
        torch.cuda.empty_cache()
        torch.randn(4, device="cuda")
        with pytest.warns(dc.DiffusionCacheWarning, match="have changed"):
            generate(pipe, name)
        generate(pipe, name)
        assert dc.summary(pipe).replayed == STEPS
