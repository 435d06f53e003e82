"""A pipeline that serves for long: weights that change, copies, searches beside other calls, failures, many sizes."""

import copy
import threading
import warnings

import numpy as np
import pytest
import small
import torch
from diffusers import DiffusionPipeline, FluxImg2ImgPipeline

import diffusion_cache as dc
from diffusion_cache import reference
from diffusion_cache.engine import session_of
from diffusion_cache.engine.span_calls import SpanCalls
from diffusion_cache.engine.structure import Newest
from diffusion_cache.errors import DiffusionCacheWarning
from tests import plans

NAME, STEPS = "flux-digits", 8
CHANGED = "that a plan was enabled for"
CLASS_AND_NONE = torch.tensor([3, 10])


@pytest.fixture
def pipe():
    return reference.load(NAME)


def generate(pipe, steps=STEPS, seeds=(1,), **more):
    return reference.images(NAME, pipe(**reference.inputs(NAME, [s % 10 for s in seeds], list(seeds), steps), **more))


def told(pipe, text, **more):
    """Whether a generation warns with this text."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        generate(pipe, **more)
    return any(text in str(warning.message) for warning in caught)


def test_a_plan_tells_once_that_adapters_came_or_another_denoiser(pipe):
    peft = pytest.importorskip("peft")
    dc.enable(pipe, profile=plans.planned(NAME, computed=(4,)), plan="nfe-4")
    assert not told(pipe, CHANGED)
    pipe.transformer.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"]), adapter_name="one")
    assert told(pipe, f"the LoRA adapters are not those of transformer {CHANGED}")
    assert not told(pipe, CHANGED)
    pipe.transformer.delete_adapters("one")
    assert not told(pipe, CHANGED)
    pipe.transformer = reference.denoiser(NAME)
    assert told(pipe, f"the weights are not those of transformer {CHANGED}")


def test_other_scales_of_an_adapter_and_fusing_it_are_told_of(pipe):
    peft = pytest.importorskip("peft")
    pipe.transformer.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"]), adapter_name="one")
    dc.enable(pipe, profile=plans.planned(NAME, computed=(4,)), plan="nfe-4", ignore=["lora"])
    assert not told(pipe, CHANGED)
    pipe.transformer.fuse_lora(adapter_names=["one"])
    assert told(pipe, CHANGED)


SHARES = "has modules of a FluxPipeline that a cache is enabled on"


def test_a_shallow_copy_says_that_it_runs_without_the_cache(pipe):
    uncached = generate(pipe)
    dc.enable(pipe, "interval", every=2)
    other = copy.copy(pipe)
    with pytest.warns(DiffusionCacheWarning, match=SHARES):
        assert torch.equal(generate(other), uncached)
    assert not told(other, SHARES)  # once
    dc.disable(pipe)
    later = copy.copy(pipe)
    assert not told(other, SHARES)
    dc.enable(pipe, "interval", every=2)
    dc.enable(other, "interval", every=2)
    assert torch.equal(generate(other), generate(pipe))
    assert told(later, SHARES)


def test_a_pipeline_from_another_one_says_that_it_runs_without_the_cache(pipe):
    other = FluxImg2ImgPipeline.from_pipe(pipe, vae=pipe.vae)
    edit = dict(image=torch.linspace(0, 1, 256).reshape(1, 1, 16, 16), strength=0.5)
    assert not told(other, SHARES, **edit)
    dc.enable(pipe, "interval", every=2)
    assert told(other, f"this FluxImg2ImgPipeline {SHARES}", **edit)
    assert not told(pipe, SHARES)
    dc.enable(other, "interval", every=2)
    assert not told(other, SHARES, **edit)


def test_pipelines_inside_a_run_of_any_scheduler_are_a_part_of_it(pipe):
    other = type(pipe).from_pipe(pipe, vae=pipe.vae)
    dc.enable(other, "interval", every=2)
    with dc.run(pipe.transformer, "interval", every=2):
        assert not told(pipe, SHARES)
    assert told(pipe, SHARES)


def test_a_search_leaves_the_session_to_other_calls(pipe, monkeypatch):
    dc.enable(pipe, "teacache", target_reuse=0.5)
    session = session_of(pipe)
    method, seen = session.method, []
    begin = type(session)._begin

    def noted(self, *args):
        run = begin(self, *args)
        seen.append((run.method.guarded.policy.threshold, session.method, session.observer, session.last_run))
        return run

    monkeypatch.setattr(type(session), "_begin", noted)
    generate(pipe)
    assert len({threshold for threshold, *_ in seen}) > 2
    assert all(state == [method, None, None] for _, *state in seen)


def test_one_search_serves_calls_of_two_threads(pipe, capsys):
    dc.enable(pipe, "first_block", target_reuse=0.5)
    session, call = session_of(pipe), reference.inputs(NAME, [1], [1], STEPS)
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(session.tuner.tuned(session, pipe, (), call))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] == found[1]
    assert capsys.readouterr().err.count("first_block: threshold=") == 1


def test_features_are_let_go_of_even_if_looking_at_them_fails(pipe, monkeypatch):
    dc.enable(pipe, "interval", every=2, forecaster="taylor")
    fine = generate(pipe)

    def raises(self):
        raise torch.OutOfMemoryError("no room to look")

    with monkeypatch.context() as patched:
        patched.setattr(SpanCalls, "_not_finite", raises)
        with pytest.raises(torch.OutOfMemoryError):
            generate(pipe)
    run = session_of(pipe).last_run
    assert not run.spans._states
    assert not run.spans._first
    assert torch.equal(generate(pipe), fine)


def test_a_summary_repeats_the_warnings_of_its_own_run(pipe):
    dc.enable(pipe, "interval", every=2)
    generate(pipe)
    assert dc.summary(pipe).warnings == ()
    pipe.transformer.transformer_blocks[0].norm1.linear.bias.data[0] = float("nan")
    with pytest.warns(DiffusionCacheWarning, match="not finite"):
        generate(pipe)
    found = dc.summary(pipe)
    assert any("not finite" in message for message in found.warnings)
    assert "not finite" in " ".join(str(found).split())
    assert session_of(pipe).last_run.messages.keys() == set(found.warnings)


def test_what_is_learned_of_sizes_does_not_grow_without_end():
    learned = Newest(3)
    for key in "abcd":
        learned[key] = key.upper()
    assert learned == {"b": "B", "c": "C", "d": "D"}
    learned["c"] = "again"
    assert learned == {"b": "B", "c": "again", "d": "D"}
    learned.drop(lambda key: key < "c")
    assert list(learned) == ["c", "d"]


class FirstSteps(DiffusionPipeline):
    """Makes the first steps of what the scheduler lists, as SDXL's base model does before its refiner."""

    def __init__(self, transformer, scheduler):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)
        self.set_progress_bar_config(disable=True)

    @torch.no_grad()
    def __call__(self, steps, made):
        self.scheduler.set_timesteps(steps)
        timesteps = self.scheduler.timesteps[:made]
        self._num_timesteps = made
        sample = torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(0))
        with self.progress_bar(total=made) as bar:
            for t in timesteps:
                both = self.transformer(sample.repeat(2, 1, 1, 1), timestep=t.expand(2), class_labels=CLASS_AND_NONE)
                given, none = both.sample[:, :1].chunk(2)
                sample = self.scheduler.step(none + 1.5 * (given - none), t, sample).prev_sample
                bar.update()
        return sample


def test_a_run_that_ends_early_gets_its_part_of_a_plan():
    made = reference.load("dit-digits")
    pipe = FirstSteps(made.transformer, made.scheduler)
    profile = dc.Profile.from_pretrained("dit-digits-ddim")
    computed = next(plan for plan in profile.plans if plan.name == "nfe-12").schedule.computed
    dc.enable(pipe, profile=profile, plan="nfe-12", ignore=["pipeline"])
    with pytest.warns(DiffusionCacheWarning, match="50 steps, and this run makes 40 of them"):
        pipe(50, 40)
    with warnings.catch_warnings():
        warnings.simplefilter("error", DiffusionCacheWarning)  # it was told
        pipe(50, 40)
    summary = dc.summary(pipe)
    assert [record.step for record in summary.records if record.computed] == [s for s in computed if s < 40]
    assert summary.unfitted == 2  # of its first steps, with one feature to go by
    assert any("this run makes 40" in warning for warning in summary.warnings)


def test_what_a_plan_was_not_made_for_is_in_every_runs_summary(pipe):
    dc.enable(pipe, profile=plans.planned(NAME, computed=(4,)), plan="nfe-4")
    pipe.transformer = reference.denoiser(NAME)
    assert told(pipe, CHANGED)
    assert not told(pipe, CHANGED)
    assert any(CHANGED in warning for warning in dc.summary(pipe).warnings)


def classes(pipe):
    return pipe([1, 2], num_inference_steps=4, generator=torch.Generator().manual_seed(0), output_type="np").images


def test_a_method_that_is_not_for_compiled_denoisers_runs_uncached_from_then_on():
    pipe = small.load("dit-digits")
    uncached = classes(pipe)
    dc.enable(pipe, "interval", every=2, scope="stack", cache_dtype="int8")
    assert (classes(pipe) != uncached).any()
    pipe.transformer.compile(backend="eager")
    with pytest.warns(DiffusionCacheWarning, match="running without the cache in transformer.*compiled as a whole"):
        assert np.allclose(classes(pipe), uncached, atol=1e-5)


def test_a_denoiser_that_is_wrapped_since_runs_uncached():
    """What is told is what is done."""

    class DataParallel(torch.nn.DataParallel):
        config = property(lambda self: self.module.config)
        dtype = property(lambda self: self.module.dtype)
        device = property(lambda self: self.module.device)

    pipe = small.load("dit-digits")
    inner, uncached = pipe.transformer, classes(pipe)
    dc.enable(pipe, "interval", every=2)
    cached = classes(pipe)
    assert (cached != uncached).any()
    pipe.transformer = DataParallel(inner)
    with pytest.warns(DiffusionCacheWarning, match="running without the cache"):
        assert (classes(pipe) == uncached).all()
    pipe.transformer = inner
    assert (classes(pipe) == cached).all()
