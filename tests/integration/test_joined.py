"""Stacks of which one continues another are cached as one span, until that turns out to be wrong."""

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from torch import nn
from zoo_checks import OneByOne

import diffusion_cache as dc
from diffusion_cache import reference
from diffusion_cache.errors import DiffusionCacheWarning
from diffusion_cache.forecasters.reuse import Reuse
from diffusion_cache.plan import Plan
from diffusion_cache.policies.first_block import FirstBlock
from diffusion_cache.schedule import Schedule

pytestmark = pytest.mark.filterwarnings("error::diffusion_cache.errors.DiffusionCacheWarning")

FLUX = "flux-digits"
WIDTH, STEPS = 16, 8
ONE = ["blocks+more_blocks"]
APART = ["blocks", "more_blocks"]


class ReusedOneByOne(Reuse):
    spans_alike = False


def generate(pipe):
    return reference.images(FLUX, pipe(**reference.inputs(FLUX, (3, 4), (5, 6), steps=STEPS)))


@pytest.mark.parametrize(
    ("policy", "options"),
    [
        ("interval", {"every": 2}),
        ("first_block", {"threshold": 0.1}),
        ("magcache", {"threshold": 0.2, "ratios": (1.0, *(0.97,) * (STEPS - 1))}),
    ],
    ids=lambda it: it if isinstance(it, str) else "",
)
def test_half_the_memory_and_the_same_images(policy, options):
    pipe = reference.load(FLUX)
    with dc.cached(pipe, policy, OneByOne(), **options):
        expected, apart = generate(pipe), dc.summary(pipe)
    with dc.cached(pipe, policy, "taylor", **options):
        images, one = generate(pipe), dc.summary(pipe)
        assert torch.equal(generate(pipe), images)
    assert (apart.spans, one.spans) == (2, 1)
    assert [record.computed for record in one.records] == [record.computed for record in apart.records]
    assert one.hit_rate == apart.hit_rate > 0
    assert 2 * one.cache_bytes == apart.cache_bytes
    torch.testing.assert_close(images, expected, rtol=0, atol=2e-6)
    assert not torch.equal(images, generate(pipe))


def halves():
    """A plan that reuses the second stack alone."""
    schedule = Schedule(tuple(((True, step % 2 == 0),) for step in range(STEPS)))
    return Plan("second", "stack", None, "auto", schedule, ())


@pytest.mark.parametrize(
    ("options", "spans"),
    [
        ({"policy": "interval"}, 1),
        ({"policy": "interval", "corrector": "shrink"}, 2),
        ({"policy": "interval", "forecaster": "taylor_paper"}, 1),
        ({"policy": "interval", "forecaster": "rfc"}, 2),
        ({"policy": "racer", "threshold": 0.1}, 2),
        ({"plan": halves()}, 2),
    ],
)
def test_spans_that_are_not_all_alike_stay_apart(options, spans):
    pipe = reference.load(FLUX)
    with dc.cached(pipe, **options):
        generate(pipe)
        assert dc.summary(pipe).spans == spans


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden_states, temb):
        return hidden_states + self.linear(self.norm(hidden_states) + temb)


class Stacks(nn.Module):
    """Two stacks of three blocks, and what may be in the way of their being one.

    between(x, hint): what the second begins with; skips: what the first gives is used at the end as well; short: at
    steps of even numbers but the first the last block is left out.
    """

    def __init__(self, between=None, skips=False, short=False):
        super().__init__()
        torch.manual_seed(0)
        self.between, self.skips, self.short = between, skips, short
        self.blocks = nn.ModuleList([Block() for _ in range(3)])
        self.more_blocks = nn.ModuleList([Block() for _ in range(3)])

    def forward(self, hidden_states, timestep, hint=None):
        temb, x = torch.sin(timestep).view(-1, 1, 1), hidden_states
        for block in self.blocks:
            x = block(x, temb)
        skipped = x if self.skips else 0
        if hint is not None:
            assert self.between is not None
            x = self.between(x, hint)
        for block in self.more_blocks[: 2 if self.short and timestep[0].item() in (2, 4, 6) else 3]:
            x = block(x, temb)
        return x + skipped


@torch.no_grad()
def steps(model, forecaster="taylor", mode=torch.no_grad, every=2, **extra):
    """What each step gives, of inputs of its own, the spans after it, and the summary."""
    with mode(), dc.run(model, "interval", forecaster, every=every, warmup=2, num_steps=STEPS, scope="stack") as run:
        made, spans = [], []
        for step in range(STEPS):
            x = torch.randn(2, 4, WIDTH, generator=torch.Generator().manual_seed(step))
            made.append(model(x, torch.full((2,), float(step)), **extra).clone())
            spans.append([span.name for span in run._run.layouts["denoiser"].spans])
            run.next_step()
        return made, spans, run.summary()


def reused(summary):
    return [record.spans_reused for record in summary.records]


def check(found, expected):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-6)


def added(x, hint):
    return x + hint


def added_in_place(x, hint):
    return x.add_(hint)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_stacks_in_a_row(mode):
    model = Stacks()
    made, spans, summary = steps(model, mode=mode)
    expected, _, apart = steps(model, OneByOne(), mode=mode)
    assert spans == [ONE] * STEPS
    check(made, expected)
    assert (summary.reused, apart.reused) == (3, 3)
    assert 2 * summary.cache_bytes == apart.cache_bytes


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("between", [added, added_in_place])
def test_what_is_added_between_takes_them_apart(between, mode):
    """At the first step already, so that all that is stored is of the stacks as they are."""
    model = Stacks(between)
    hint = torch.ones(WIDTH)
    made, spans, summary = steps(model, mode=mode, hint=hint)
    expected, _, apart = steps(model, OneByOne(), mode=mode, hint=hint)
    assert spans == [APART] * STEPS
    assert all(map(torch.equal, made, expected))
    assert summary.cache_bytes == apart.cache_bytes


class Loop(DiffusionPipeline):
    def __init__(self, transformer, scheduler):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)
        self.set_progress_bar_config(disable=True)

    @torch.no_grad()
    def __call__(self, num_inference_steps=STEPS, **extra):
        self.scheduler.set_timesteps(num_inference_steps)
        sample = torch.randn(1, 4, WIDTH, generator=torch.Generator().manual_seed(0))
        for t in self.scheduler.timesteps:
            sample = self.scheduler.step(self.transformer(sample, t.view(1), **extra), t, sample).prev_sample
        return sample


def test_an_argument_that_the_first_run_did_not_have():
    """A ControlNet's outputs are added between stacks: a run that has them is looked at as the first one was."""
    pipe, hint = Loop(Stacks(added), FlowMatchEulerDiscreteScheduler()), torch.ones(WIDTH)
    with dc.cached(pipe, "interval", OneByOne(), scope="stack"):
        expected = pipe(), pipe(hint=hint)
        both = dc.summary(pipe).cache_bytes
    with dc.cached(pipe, "interval", "taylor", scope="stack"):
        found, sizes = [], []
        for extra in ({}, {"hint": hint}, {}, {"hint": hint}):
            found.append(pipe(**extra))
            sizes.append((dc.summary(pipe).spans, dc.summary(pipe).cache_bytes, dc.summary(pipe).reused))
    check(found[::2], [expected[0]] * 2)
    check(found[1::2], [expected[1]] * 2)
    assert not torch.allclose(*expected, atol=1e-2)
    assert sizes == [(1, both // 2, 4), (2, both, 4), (2, both, 4), (2, both, 4)]


def test_what_the_first_stack_gives_is_used_at_the_end():
    """Its first reused step shows that, and is computed; the stacks are taken apart, without a word."""
    model = Stacks(skips=True)
    made, spans, summary = steps(model, "reuse")
    expected, _, apart = steps(model, ReusedOneByOne())
    assert spans == [ONE] * 2 + [APART] * 6
    assert reused(apart) == [0, 0, 2, 0, 2, 0, 2, 0]
    assert reused(summary) == [0, 0, 0, 0, 2, 0, 2, 0]
    check(made[3:], expected[3:])
    check(made[2:3], steps(model, "reuse", every=1)[0][2:3])


def test_a_block_that_is_left_out_at_some_steps():
    """The other stack can be cached all the same."""
    model, told = Stacks(short=True), "more_blocks is not called in the same way at every step"
    with pytest.warns(DiffusionCacheWarning, match=told):
        made, spans, summary = steps(model, "reuse")
    with pytest.warns(DiffusionCacheWarning, match=told):
        expected, _, apart = steps(model, ReusedOneByOne())
    assert spans == [ONE] * 2 + [APART] * 6
    assert reused(apart) == [0, 0, 0, 0, 1, 0, 1, 0]
    assert reused(summary) == [0, 0, 0, 0, 0, 0, 1, 0]
    check(made[5:], expected[5:])


def test_one_is_told_by_inspect():
    pipe = reference.load(FLUX)
    given = reference.inputs(FLUX, (3,), (5,), steps=2)
    one = dc.inspect(pipe, given)
    two = dc.inspect(pipe, given, forecaster=OneByOne())
    probed = dc.inspect(pipe, given, policy=FirstBlock(0.1))
    assert [len(found.spans) for found in (one, two, probed)] == [1, 2, 1]
    assert one.spans[0].modules == sum(span.modules for span in two.spans) == probed.spans[0].modules + 1
    assert 2 * one.cache_bytes == two.cache_bytes
