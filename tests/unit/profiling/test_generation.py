"""Batches and their uncached runs: what is noted of them, and that nothing is left behind."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

import diffusion_cache as dc
from diffusion_cache import reference
from diffusion_cache.engine import Method, Observer, session_of
from diffusion_cache.errors import ConfigError
from diffusion_cache.forecasters import Reuse
from diffusion_cache.policies import Guarded, Interval
from diffusion_cache.profiling.generation import (
    Batch,
    Loop,
    StepCall,
    attached,
    device_name,
    device_of,
    dtype_of,
    last_state,
    state_of,
    teach,
)
from diffusion_cache.profiling.measure import Options, measure
from diffusion_cache.reference.reacher import Reacher, act

STEPS = 6
LABELS, SEEDS = (3, 8), (5, 6)


def batch_of(name, pipe=None, count=2, **options):
    pipe = pipe or reference.load(name)

    def call():
        given = reference.inputs(name, LABELS[:count], SEEDS[:count], steps=STEPS)
        return pipe(**{**given, **options})

    return Batch(pipe, call, lambda output: reference.images(name, output), count)


@pytest.mark.parametrize(
    ("name", "options", "calls", "rows"),
    [
        ("dit-digits", {}, 1, 2),
        ("dit-digits", {"guidance_scale": 1.0}, 1, 1),
        ("unet-digits", {}, 1, 2),
        ("flux-digits", {}, 1, 1),
        ("wan-moving-digits", {}, 2, 1),
    ],
)
def test_what_is_noted_of_an_uncached_run(name, options, calls, rows):
    batch = batch_of(name, **options)
    kept = []
    with last_state(batch.pipe.scheduler) as found:
        expected = batch.images(batch.call())
        kept += found
    teacher = teach(batch)
    assert (teacher.calls, teacher.rows, teacher.branches, teacher.steps) == (calls, rows, calls * rows, STEPS)
    assert torch.equal(teacher.images, expected)
    assert torch.equal(teacher.states[-1], kept[-1])
    assert len({tuple(state.flatten()[:3].tolist()) for state in teacher.states}) == STEPS
    assert len(teacher.noise_levels) == STEPS
    assert all(a < b for a, b in itertools.pairwise(teacher.noise_levels))


def test_where_a_pipeline_runs():
    """A denoiser in a loop of one's own is where its weights are; a pipeline may keep its elsewhere."""
    assert device_of(Loop(Reacher().to("meta"), None)) == torch.device("meta")
    pipe = reference.load("dit-digits")
    pipe.transformer.to("meta")
    assert device_of(SimpleNamespace(components=pipe.components)) == torch.device("meta")
    assert device_of(SimpleNamespace(components=pipe.components, _execution_device="cpu")) == torch.device("cpu")


def test_a_device_by_its_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    assert [device_name(device) for device in ("cpu", torch.device("meta"), "cuda:1")] == ["cpu", "meta", "GPU 1"]


def test_nothing_is_left_behind():
    name = "dit-digits"
    batch = batch_of(name)
    step, call, attributes = DDIMScheduler.step, type(batch.pipe).__call__, dict(vars(batch.pipe.transformer))
    teach(batch)
    assert DDIMScheduler.step is step
    assert type(batch.pipe).__call__ is call
    assert session_of(batch.pipe) is None
    assert dict(vars(batch.pipe.transformer)) == attributes


def test_what_was_enabled_before_comes_back():
    name = "dit-digits"
    batch = batch_of(name)
    uncached = batch.images(batch.call())
    session = dc.enable(batch.pipe, "interval", "reuse", every=2)
    cached = batch.images(batch.call())
    assert torch.equal(teach(batch).images, uncached)
    assert session_of(batch.pipe) is session
    assert torch.equal(batch.images(batch.call()), cached)
    assert dc.summary(batch.pipe).reused == STEPS // 2
    method = Method(Guarded(Interval(1)), Reuse(), "denoiser")

    def fail():
        with attached(batch.pipe, method, Observer()):
            assert session_of(batch.pipe) is not session
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        fail()
    assert session_of(batch.pipe) is session
    dc.disable(batch.pipe)
    assert torch.equal(batch.images(batch.call()), uncached)


def test_guidance_that_ends_before_the_run_does():
    """Rows are counted where guidance is."""

    def stop(pipe, step, timestep, given):
        if step == 2:
            pipe._guidance_scale = 0.0
            given["prompt_embeds"] = given["prompt_embeds"][len(given["prompt_embeds"]) // 2 :]
        return given

    options = dict(callback_on_step_end=stop, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    teacher = teach(batch_of("unet-digits", **options))
    assert (teacher.calls, teacher.rows, teacher.steps) == (1, 2, STEPS)
    assert teacher.begun == (0, 3)  # with other rows than before


def test_the_precision_of_a_pipeline():
    pipe = reference.load("dit-digits")
    assert dtype_of(pipe) == torch.float32
    pipe.transformer.to(torch.bfloat16).pos_embed.to(torch.float32)
    assert dtype_of(pipe) == torch.bfloat16


def test_a_generation_that_does_not_step():
    batch = batch_of("dit-digits")
    output = batch.call()
    with pytest.raises(ConfigError, match="no denoiser call or no scheduler step"):
        teach(Batch(batch.pipe, lambda: output, batch.images, 2))


def test_another_number_of_samples():
    batch = batch_of("dit-digits")
    with pytest.raises(ConfigError, match="gave 2 samples where 3"):
        teach(Batch(batch.pipe, batch.call, batch.images, 3))


def test_a_batch_of_two_calls_has_no_one_path():
    batch = batch_of("dit-digits", count=1)
    whole = Batch(batch.pipe, lambda: [batch.call() for _ in range(2)], lambda outputs: _joined(batch, outputs), 2)
    with pytest.raises(ConfigError, match=f"{2 * STEPS} scheduler steps.*called in {STEPS}.*one call"):
        teach(whole)


def _joined(batch, outputs):
    return torch.cat([batch.images(output) for output in outputs])


def test_values_that_are_not_finite():
    batch = batch_of("dit-digits")
    spoilt = iter([1.0] * 3 + [float("nan")] * STEPS)
    hook = batch.pipe.transformer.register_forward_hook(
        lambda module, args, output: type(output)(sample=output.sample * next(spoilt))
    )
    try:
        with pytest.raises(ConfigError, match="not finite from step 3 on"):
            teach(batch)
    finally:
        hook.remove()


# one step's arguments


@pytest.fixture
def scheduler():
    scheduler = DDPMScheduler(clip_sample=False)
    scheduler.set_timesteps(10)
    return scheduler


@pytest.mark.parametrize("by_name", [False, True])
def test_a_step_asked_again(scheduler, by_name):
    torch.manual_seed(0)
    output, other, sample, another = torch.randn(4, 2, 1, 3, 3)
    time, generator = scheduler.timesteps[4], torch.Generator().manual_seed(1)
    options = {"generator": generator, "return_dict": False}
    if by_name:
        args, kwargs = (), {"sample": sample, "timestep": time, "model_output": output, **options}
    else:
        args, kwargs = (output, time, sample), options
    given = StepCall(DDPMScheduler.step, scheduler, args, kwargs)
    assert given.model_output is output
    assert given.sample is sample
    assert given.generators == [generator]

    def stepped(cls, output, sample):
        return cls.step(output, time, sample, generator=torch.Generator().manual_seed(1), return_dict=False)[0]

    def asked(*changed, **named):
        generator.manual_seed(1)
        return state_of(given.result(*changed, **named))

    assert torch.equal(asked(other), stepped(scheduler, other, sample))
    assert torch.equal(asked(other, sample=another), stepped(scheduler, other, another))
    coarse = DDPMScheduler(clip_sample=False, beta_end=0.05)
    coarse.set_timesteps(10)
    assert torch.equal(asked(other, coarse), stepped(coarse, other, sample))
    assert not torch.equal(asked(other, coarse), asked(other))
    assert torch.equal(asked(output), stepped(scheduler, output, sample))  # what was given has not changed


def test_generators_of_a_step(scheduler):
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    sample = torch.zeros(2, 1, 3, 3)

    def found(generator):
        given = StepCall(DDPMScheduler.step, scheduler, (sample, scheduler.timesteps[0], sample, generator), {})
        return given.generators

    assert found(generators) == generators
    assert found(None) == []
    without = StepCall(DDPMScheduler.step, scheduler, (sample, scheduler.timesteps[0], sample), {})
    assert without.generators == []


def test_the_state_in_what_a_step_returns(scheduler):
    sample, time = torch.ones(2, 1, 3, 3), scheduler.timesteps[-1]
    for return_dict in (True, False):
        torch.manual_seed(0)
        state = state_of(scheduler.step(sample, time, sample, return_dict=return_dict))
        assert state.shape == sample.shape
        torch.manual_seed(0)
        assert torch.equal(state, scheduler.step(sample, time, sample).prev_sample)


def test_a_bare_denoiser_in_a_loop_of_ones_own_is_profiled():
    torch.manual_seed(0)
    loop = Loop(Reacher().eval(), DDPMScheduler(100))
    model, observation = loop.components["denoiser"], torch.randn(2, 5, 2)

    def make(samples):
        def actions():
            generators = [torch.Generator().manual_seed(seed) for _, seed in samples]
            return act(model, observation[: len(samples)], generators, STEPS, loop.scheduler)

        return loop.batch(actions, len(samples))

    found = []
    handle = model.blocks[1].ff.register_forward_hook(lambda module, args, output: found.append(output))
    expected = make([("", 3), ("", 4)]).call()
    handle.remove()
    options = Options("branch", batch=2, sensitivity_samples=2, sensitivity_steps=2)
    profile = measure(make, [("", 3), ("", 4)], options)
    names = [span.name for span in profile.spans]
    assert names[:3] == ["blocks.0.attn1", "blocks.0.attn2", "blocks.0.ff"]
    assert (len(names), profile.total, profile.passes) == (18, STEPS, ("0",))
    assert len(profile.noise_levels) == STEPS
    outputs = torch.stack(found).double().flatten(2)  # steps, samples
    gram = torch.einsum("tni,uni->tu", outputs, outputs) / 2
    torch.testing.assert_close(profile.arrays["gram_output"][names.index("blocks.1.ff"), 0], gram, rtol=1e-5, atol=1e-6)
    assert torch.equal(teach(make([("", 3), ("", 4)])).images, expected)
