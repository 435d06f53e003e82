"""enable(policy=…, target_reuse=…) and speedup=…: found at the first call, kept, and met from other noise."""

from dataclasses import dataclass

import pytest
import torch

import diffusion_cache as dc
from diffusion_cache import reference
from diffusion_cache.context import Verdict
from diffusion_cache.engine import session_of
from diffusion_cache.errors import ConfigError, DiffusionCacheWarning
from diffusion_cache.measure import count_blocks, timing
from diffusion_cache.planning import kept
from diffusion_cache.planning.target import Counted
from diffusion_cache.policies import FirstBlock

NAME, STEPS = "flux-digits", 12


@pytest.fixture(scope="module")
def pipe():
    return reference.load(NAME)


@pytest.fixture(autouse=True)
def uncached_afterwards(pipe):
    yield
    dc.disable(pipe)


def call(seeds=(1, 2), steps=STEPS):
    return reference.inputs(NAME, [seed % 10 for seed in seeds], seeds, steps)


def generate(pipe, **given):
    return reference.images(NAME, pipe(**call(**given)))


def steps_reused(pipe, seeds):
    """Mean over samples of the steps that are reused."""
    session = session_of(pipe)
    session.observer = count = Counted()
    generate(pipe, seeds=seeds)
    session.observer = None
    return count.share * count.steps


@pytest.mark.parametrize("policy", ["teacache", "first_block"])
def test_the_target_is_met_from_noise_that_was_not_used(pipe, policy, capsys):
    dc.enable(pipe, policy, target_reuse=0.5)
    generate(pipe)
    assert abs(steps_reused(pipe, range(40, 48)) - 0.5 * STEPS) <= 1
    value = session_of(pipe).last_run.method.guarded.policy.threshold
    assert f"{policy}: threshold={value:.4g} reuses" in capsys.readouterr().err


def test_nothing_of_the_search_is_left(pipe, monkeypatch):
    """The same image as with the threshold given, generators where they would be, callbacks told of one call."""
    inputs, told = call(), []
    inputs["callback_on_step_end"] = lambda pipe, step, timestep, tensors: told.append(step) or tensors
    torch.manual_seed(3)
    before = torch.get_rng_state()
    config = dict(vars(pipe)["_progress_bar_config"])
    dc.enable(pipe, "teacache", target_reuse=0.4)
    session = session_of(pipe)
    searched = reference.images(NAME, pipe(**inputs))
    assert told == list(range(STEPS))
    assert torch.equal(torch.get_rng_state(), before)
    assert vars(pipe)["_progress_bar_config"] == config
    assert session.observer is None
    again = generate(pipe)
    assert torch.equal(again, searched)
    threshold = session.last_run.method.guarded.policy.threshold
    dc.enable(pipe, "teacache", threshold=threshold)
    plain = call()
    # but for rounding: with nothing to search for, stacks in a row are one span
    torch.testing.assert_close(reference.images(NAME, pipe(**plain)), searched, rtol=0, atol=2e-6)
    states = [generator.get_state() for generator in plain["generator"]]
    assert all(torch.equal(g.get_state(), s) for g, s in zip(inputs["generator"], states, strict=True))


def test_what_was_found_is_kept_by_model_sampler_steps_and_policy(pipe, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(kept.VARIABLE, str(tmp_path))
    wish = dict(policy="first_block", target_reuse=0.5)
    found = dc.tune(pipe, call(steps=4), **wish)
    (path,) = tmp_path.iterdir()
    assert session_of(pipe) is None
    assert str(path) in capsys.readouterr().err
    assert dc.tune(reference.load(NAME), call((8, 9), 4), **wish) == found  # other noise, not another kind of call
    assert capsys.readouterr().err == ""
    other = reference.load(NAME)
    with torch.no_grad():
        next(other.transformer.parameters()).mul_(1.1)
    for changed, inputs, options in [
        (pipe, call(steps=5), {}),
        (pipe, call(steps=4), {"warmup": 2}),
        (pipe, call(steps=4), {"target_reuse": 0.6}),
        (other, call(steps=4), {}),
    ]:
        files = len(list(tmp_path.iterdir()))
        dc.tune(changed, inputs, **{**wish, **options})
        assert len(list(tmp_path.iterdir())) == files + 1


def test_a_schedule_tells_what_it_reuses_after_one_generation(pipe, monkeypatch):
    """Of a planned policy: from its schedule at the run's own noise levels, which the generation then goes by."""
    calls, original = [], type(pipe).encode_prompt
    monkeypatch.setattr(type(pipe), "encode_prompt", lambda *args, **kw: calls.append(1) or original(*args, **kw))
    ratios = [1.0, *(1 + 0.01 * step for step in range(1, STEPS))]
    levels = [-5.0 + step for step in range(STEPS)]
    options = dict(ratios=ratios, levels=levels, max_skip=STEPS, retention=0.0, warmup=2)
    found = dc.tune(pipe, call(), "magcache", target_reuse=0.5, **options)
    assert len(calls) == 1
    assert found.tried > 1
    assert abs(found.reuse - 0.5) <= 1 / STEPS
    with dc.cached(pipe, "magcache", threshold=found.value, **options):
        generate(pipe)
        assert dc.summary(pipe).reused == round(found.reuse * STEPS)


def test_one_search_for_each_kind_of_call(pipe, capsys):
    dc.enable(pipe, "first_block", target_reuse=0.5)
    generate(pipe, steps=4)
    generate(pipe, seeds=(5,), steps=4)
    assert capsys.readouterr().err.count("reuses") == 1
    generate(pipe, steps=5)
    assert capsys.readouterr().err.count("of 5 steps") == 1


def test_a_speedup_is_turned_into_a_share(pipe, monkeypatch):
    """With executed blocks for seconds: the fastest of five steps, which computes one, is five times as fast."""
    blocks = [*pipe.transformer.transformer_blocks[1:], *pipe.transformer.single_transformer_blocks]

    def counted(run, before=None):
        if before is not None:
            before()
        with count_blocks(blocks) as count:
            run()
        return count.total, count.total

    monkeypatch.setattr(timing, "elapsed", counted)
    found = dc.tune(pipe, call((1,), steps=5), "first_block", speedup=1.3)
    assert found.reuse == dc.tune(pipe, call((1,), steps=5), "first_block", target_reuse=1 - 1 / 1.3).reuse
    with pytest.raises(ConfigError, match=r"at most 4 of 5 steps .* ask for speedup=\d\.\d\d at most"):
        dc.tune(pipe, call((1,), steps=5), "first_block", speedup=50)


@dataclass(frozen=True)
class AllOrNothing(FirstBlock):
    def decide(self, step, value, state):
        return Verdict(self.threshold < 1, "all or nothing")


def test_the_nearest_is_taken_where_a_policy_reuses_more_than_the_target_or_far_less(pipe):
    with pytest.warns(DiffusionCacheWarning, match=r"cannot meet target_reuse=0.4 .* is 0.75, which is taken"):
        assert dc.tune(pipe, call(steps=4), AllOrNothing(), target_reuse=0.4).value >= 1


def test_a_target_beyond_the_guards_is_refused_with_the_nearest(pipe):
    with pytest.raises(ConfigError, match=r"at most 4 of 8 steps .* ask for target_reuse=0.5 at most"):
        dc.tune(pipe, call(steps=8), "first_block", target_reuse=0.9, warmup=4)
    found = dc.tune(pipe, call(steps=8), "first_block", target_reuse=0.55, warmup=4)  # half a step more: near enough
    assert (found.reuse, found.tried) == (0.5, 1)
    with pytest.raises(ConfigError, match="reuses nothing of this call"):
        dc.tune(pipe, call(steps=4), "first_block", target_reuse=0.5, warmup=4)


def test_an_interrupted_search_leaves_the_pipeline_as_it_was(pipe, monkeypatch):
    uncached = generate(pipe)
    dc.enable(pipe, "first_block", target_reuse=0.5)
    session = session_of(pipe)
    method, calls = session.method, []
    step = type(pipe.scheduler).step

    def interrupted(self, *args, **kwargs):
        calls.append(1)
        if len(calls) > STEPS + 3:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(type(pipe.scheduler), "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            generate(pipe)
    assert (session.method, session.observer, session.last_run) == (method, None, None)
    assert session.tuner is not None
    assert vars(pipe)["_progress_bar_config"] == {"disable": True}
    dc.disable(pipe)
    assert torch.equal(generate(pipe), uncached)


@pytest.mark.parametrize(
    ("wish", "match"),
    [
        ({"policy": "interval", "target_reuse": 0.5}, "has nothing that could be searched"),
        ({"policy": "teacache", "target_reuse": 0.5, "threshold": 0.1}, "threshold is what a target is met with"),
        ({"policy": "teacache", "target_reuse": 0.5, "speedup": 2}, "one of them"),
        ({"method": "fora", "target_reuse": 0.5}, "target_reuse comes from the method"),
        ({"profile": "flux-digits-flow_euler", "target_reuse": 0.5}, "target_reuse comes from the profile"),
    ],
)
def test_wishes_that_cannot_be_met_are_refused_at_once(pipe, wish, match):
    with pytest.raises(ConfigError, match=match):
        dc.enable(pipe, **wish)
    assert session_of(pipe) is None
