"""What breaks other caches, and what users do around one."""

import contextlib
import copy
import gc
import json
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import FrozenInstanceError, dataclass
from functools import cache

import diffusers
import pytest
import small
import torch
from accidents import DIT, FLUX, PIPES, UNET, WAN, Stop, denoiser_of, load, made, untouched, warned
from torch import nn
from torch.utils._pytree import tree_map

import diffusion_cache as dc
from diffusion_cache import reference
from diffusion_cache.engine import intercept
from diffusion_cache.forecasters import Taylor
from diffusion_cache.history import History
from diffusion_cache.policies import FirstBlock, Interval

STEPS = 6

pytestmark = [
    pytest.mark.usefixtures("nothing_left"),
    pytest.mark.filterwarnings("error::diffusion_cache.errors.DiffusionCacheWarning"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # diffusers' own, with NumPy 2
]
each_model = pytest.mark.parametrize("name", reference.MODELS)


def call(name, steps=STEPS, labels=(3,), seeds=(5,), guidance=None, **extra):
    return reference.inputs(name, labels, seeds, steps=steps, guidance=guidance) | extra


def generate(name, pipe, *args, **kwargs):
    return reference.images(name, pipe(**call(name, *args, **kwargs)))


def blocks_of(name, pipe):
    denoiser = denoiser_of(name, pipe)
    if name == UNET:
        return [*denoiser.down_blocks, denoiser.mid_block, *denoiser.up_blocks]
    if name == FLUX:
        return [*denoiser.transformer_blocks, *denoiser.single_transformer_blocks]
    return list(denoiser.blocks if name == WAN else denoiser.transformer_blocks)


@cache
def uncached(name, steps=STEPS):
    return generate(name, load(name), steps)


@cache
def every_two(name, steps=STEPS):
    """What a new pipeline generates under the interval policy."""
    pipe = load(name)
    with dc.cached(pipe, "interval", every=2):
        return generate(name, pipe, steps)


def sharing(name, pipe, scheduler=None):
    """Another pipeline around the same denoiser."""
    other = type(pipe).from_pipe(pipe, vae=pipe.vae, scheduler=scheduler or copy.deepcopy(pipe.scheduler))
    other.set_progress_bar_config(disable=True)
    assert denoiser_of(name, other) is denoiser_of(name, pipe)
    return made(other)


def computed(summary, key=None):
    """One character a call, 1 where it was computed."""
    return "".join(str(int(r.computed)) for r in summary.records if key in (None, r.pass_name))


@contextlib.contextmanager
def replaying(denoiser, records):
    """By hand: calls that were reused return what the last computed call of their pass and denoiser returned."""
    forward, remaining, kept = denoiser.forward, list(records), {}

    def replayed(*args, **kwargs):
        record = remaining.pop(0)
        key = record.denoiser, record.pass_name
        if record.computed:
            kept[key] = forward(*args, **kwargs)
        return copy.deepcopy(kept[key])

    denoiser.forward = replayed
    try:
        yield
        assert not remaining
    finally:
        del denoiser.forward


def stopping(step, error=Stop):
    def callback(pipe, index, timestep, kwargs):
        if index == step:
            raise error("stop")
        return kwargs

    return callback


# several pipelines, enabling again


@pytest.mark.parametrize("name", [DIT, WAN])
def test_two_pipelines_of_a_class_one_disabled(name):
    first, second = load(name), load(name)
    plain_call = vars(type(first))["__call__"]
    dc.enable(first, "interval", every=2)
    dc.enable(second, "interval", every=3)
    three = generate(name, second)
    assert torch.equal(generate(name, first), every_two(name))
    dc.disable(first)
    assert torch.equal(generate(name, first), uncached(name))
    assert torch.equal(generate(name, second), three)
    assert computed(dc.summary(second))[:: len(dc.summary(second).records) // STEPS] == "100100"
    dc.enable(first, "interval", every=2)
    dc.disable(second)
    assert torch.equal(generate(name, second), uncached(name))
    assert torch.equal(generate(name, first), every_two(name))
    dc.disable(first)
    assert vars(type(first))["__call__"] is plain_call


def test_enabling_again_replaces():
    pipe = load(DIT)
    first = dc.enable(pipe, "interval", every=3)
    generate(DIT, pipe)
    second = dc.enable(pipe, "interval", "reuse", every=2, scope="denoiser")
    assert second is not first
    with pytest.raises(dc.ConfigError, match="nothing was generated"):
        dc.summary(pipe)
    generate(DIT, pipe)
    summary = dc.summary(pipe)
    assert (computed(summary), summary.scopes) == ("101010", ("denoiser",))
    assert untouched(pipe.transformer.transformer_blocks)  # the first one's
    dc.enable(pipe, "interval", every=2)
    assert torch.equal(generate(DIT, pipe), every_two(DIT))
    dc.disable(pipe)  # once is enough
    assert untouched(pipe.transformer)
    assert torch.equal(generate(DIT, pipe), uncached(DIT))


def test_what_was_enabled_comes_back_after_a_with_block():
    pipe = load(DIT)
    with dc.cached(pipe, "interval", every=2):
        with dc.cached(pipe, "interval", every=3):
            generate(DIT, pipe)
            assert computed(dc.summary(pipe)) == "100100"
        assert torch.equal(generate(DIT, pipe), every_two(DIT))
        with pytest.raises(RuntimeError, match="mine"), dc.cached(pipe, "interval", every=3):
            raise RuntimeError("mine")
        generate(DIT, pipe)
        assert computed(dc.summary(pipe)) == "101010"
    assert untouched(pipe.transformer)
    assert torch.equal(generate(DIT, pipe), uncached(DIT))


def test_methods_are_never_changed():
    policy, forecaster = FirstBlock(threshold=1e9, front=2), Taylor(order=2)
    for name in (DIT, WAN):
        pipe = load(name)
        with dc.cached(pipe, policy, forecaster, warmup=2):
            generate(name, pipe)
            assert "1" in computed(dc.summary(pipe))
    assert (policy, forecaster) == (FirstBlock(threshold=1e9, front=2), Taylor(order=2))
    assert (hash(policy), hash(forecaster)) == (hash(FirstBlock(1e9, 2)), hash(Taylor(2)))
    with pytest.raises(FrozenInstanceError):
        policy.threshold = 0.1


def test_instances_of_policies_may_be_shared():
    policy = Interval(every=2)
    pipes = [load(FLUX), load(FLUX)]
    for pipe in pipes:
        dc.enable(pipe, policy)
    for pipe in pipes:
        assert torch.equal(generate(FLUX, pipe), every_two(FLUX))


# what came before


@pytest.mark.parametrize("policy", [("interval", dict(every=2)), ("first_block", dict(threshold=1e9))])
@pytest.mark.parametrize("name", [DIT, FLUX])
def test_a_short_run_then_a_longer_one(name, policy):
    pipe = load(name)
    with dc.cached(pipe, policy[0], **policy[1]):
        long = generate(name, pipe, 8)
    with dc.cached(pipe, policy[0], **policy[1]):
        generate(name, pipe, 3)
        assert dc.summary(pipe).total == 3
        assert torch.equal(generate(name, pipe, 8), long)
        assert dc.summary(pipe).total == 8


SIZES = {UNET: dict(height=24, width=16), FLUX: dict(height=24, width=16), WAN: dict(height=16, width=32, num_frames=2)}


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt])
@pytest.mark.parametrize("name", SIZES)
def test_stopped_in_the_middle_then_another_size(name, error):
    pipe = load(name)
    with dc.cached(pipe, "interval", every=2):
        small = generate(name, pipe, **SIZES[name])
    dc.enable(pipe, "interval", every=2)
    with pytest.raises(error):
        generate(name, pipe, callback_on_step_end=stopping(3, error))
    assert torch.equal(generate(name, pipe, **SIZES[name]), small)
    assert small.shape != every_two(name).shape
    assert torch.equal(generate(name, pipe), every_two(name))
    with pytest.raises(error):
        generate(name, pipe, callback_on_step_end=stopping(2, error))
    dc.disable(pipe)
    assert torch.equal(generate(name, pipe), uncached(name))


@pytest.mark.parametrize("scope", ["denoiser", "stack", "block"])
def test_a_block_that_fails_then_goes_on(scope):
    pipe = load(DIT)
    with dc.cached(pipe, "interval", every=2, scope=scope):
        expected = generate(DIT, pipe)
        calls = []

        def fail(module, args):
            calls.append(module)
            if len(calls) == 2:
                raise Stop

        hook = pipe.transformer.transformer_blocks[4].register_forward_pre_hook(fail)
        with pytest.raises(Stop):
            generate(DIT, pipe)
        hook.remove()
        assert torch.equal(generate(DIT, pipe), expected)
    assert untouched(pipe.transformer)


@each_model
def test_enabling_after_an_uncached_run(name):
    pipe = load(name)
    generate(name, pipe, 4, labels=(1, 2), seeds=(1, 2))
    dc.enable(pipe, "interval", every=2)
    assert torch.equal(generate(name, pipe), every_two(name))


# passes


class Branches:
    """Calls of the bare DiT at given inputs, with several guidance branches at each step."""

    def __init__(self):
        self.denoiser = load(DIT).transformer
        generator = torch.Generator().manual_seed(0)
        noise, drift = torch.randn(2, 1, 1, 16, 16, generator=generator)
        self.samples = [noise + 0.1 * step * drift for step in range(8)]

    @torch.no_grad()
    def __call__(self, labels, **options):
        outputs = {label: [] for label in labels}
        with dc.run(self.denoiser, **options) as run:
            for step, x in enumerate(self.samples):
                run.next_step()
                for label in labels:
                    t, c = torch.tensor([900 - 100 * step]), torch.tensor([label])
                    outputs[label].append(self.denoiser(x, timestep=t, class_labels=c).sample)
            return {label: torch.cat(steps) for label, steps in outputs.items()}, run.summary()


@pytest.mark.parametrize("labels", [(3,), (3, 1000), (3, 1000, 7)])
@pytest.mark.parametrize(
    "options",
    [
        dict(policy="interval", every=3),
        dict(policy="interval", every=3, scope="denoiser", forecaster="reuse"),
        dict(policy="first_block", threshold=1e9, max_consecutive=2),
    ],
    ids=["interval", "denoiser", "first_block"],
)
def test_branches_do_not_mix(labels, options):
    branches = Branches()
    together, summary = branches(labels, **options)
    for label in labels:
        alone, _ = branches((label,), **options)
        assert torch.equal(together[label], alone[label])
    assert [computed(summary, str(i)) for i in range(len(labels))] == ["10010010"] * len(labels)
    if len(labels) > 1:
        assert (together[3] - together[1000]).abs().max() > 1e-3


@torch.no_grad()
def test_calls_of_one_name_do_not_mix():
    """Two prompts in each step, both under the name that diffusers gives to the conditional pass."""
    denoiser = load(WAN).transformer
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(6, 1, 1, 2, 16, 16, generator=generator).cumsum(0)
    prompts = torch.randn(2, 1, 2, denoiser.config.text_dim, generator=generator)

    def outputs(named, prompts):
        given = []
        with dc.run(denoiser, "interval", every=2) as run:
            for step, x in enumerate(samples):
                run.next_step()
                with denoiser.cache_context("cond") if named else contextlib.nullcontext():
                    given.append([denoiser(x, torch.tensor([900 - 100 * step]), prompt).sample for prompt in prompts])
        return torch.stack([torch.cat(step) for step in given]), run.summary().reused

    together, reused = outputs(True, prompts)
    apart, _ = outputs(False, prompts)
    assert torch.equal(together, apart)
    assert reused == 6


@pytest.mark.parametrize("name", [DIT, UNET, WAN])
def test_without_guidance(name):
    pipe = load(name)
    with dc.cached(pipe, "interval", "reuse", every=2, scope="denoiser"):
        cached = generate(name, pipe, guidance=1.0)
        records = dc.summary(pipe).records
    assert [(r.step, r.computed) for r in records] == [(step, step % 2 == 0) for step in range(STEPS)]
    with replaying(denoiser_of(name, pipe), records):
        assert torch.equal(generate(name, pipe, guidance=1.0), cached)
    assert not torch.equal(generate(name, pipe, guidance=1.0), cached)


def without_guidance_after(step):
    def callback(pipe, index, timestep, kwargs):
        if index == step:
            pipe._guidance_scale = 1.0
            if isinstance(pipe, diffusers.StableDiffusionPipeline):
                kwargs["prompt_embeds"] = kwargs["prompt_embeds"].chunk(2)[1]
        return kwargs

    return dict(callback_on_step_end=callback, callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"])


@pytest.mark.parametrize(
    ("name", "expected"),
    # two passes: the unconditional one just ends; two row groups: what was kept does not fit any more
    [(WAN, [("cond", "10010010"), ("uncond", "10010")]), (UNET, [("0", "10011010")])],
)
def test_guidance_switched_off_in_the_middle(name, expected):
    pipe = load(name)
    with dc.cached(pipe, "interval", "reuse", every=3, scope="denoiser"):
        plain = generate(name, pipe, 8)
        cached = generate(name, pipe, 8, **without_guidance_after(3 if name == UNET else 4))
        summary = dc.summary(pipe)
        assert torch.equal(generate(name, pipe, 8), plain)
    assert [(key, computed(summary, key)) for key, _ in expected] == expected
    with replaying(denoiser_of(name, pipe), summary.records):
        assert torch.equal(generate(name, pipe, 8, **without_guidance_after(3 if name == UNET else 4)), cached)


def test_reuse_goes_on_after_guidance_was_switched_off():
    pipe = load(UNET)
    with dc.cached(pipe, "mask", mask="10000000"):
        generate(UNET, pipe, 8, **without_guidance_after(3))
        assert computed(dc.summary(pipe)) == "10001000"


# spans


@pytest.mark.parametrize(
    ("name", "scope", "spans"),
    [
        (DIT, "stack", 1),
        (DIT, "block", 12),
        (UNET, "cut", 1),
        (UNET, "block", 7),
        (FLUX, "stack", 1),
        (FLUX, "block", 11),
        (WAN, "stack", 1),
        (WAN, "block", 10),
        (WAN, "denoiser", 1),
    ],
)
def test_the_number_of_spans_is_told_and_each_is_skipped(name, scope, spans):
    pipe = load(name)
    calls = {block: 0 for block in blocks_of(name, pipe)}

    def count(module, args):
        calls[module] += 1

    hooks = [block.register_forward_pre_hook(count) for block in calls]
    with dc.cached(pipe, "interval", every=2, scope=scope):
        generate(name, pipe)
        summary = dc.summary(pipe)
    for hook in hooks:
        hook.remove()
    assert summary.spans == spans
    assert summary.hit_rate == 0.5
    half, full = len(summary.records) // 2, len(summary.records)
    outside = 2 if scope == "cut" else 0
    assert sorted(calls.values()) == [half] * (len(calls) - outside) + [full] * outside


class PastItsBlocks(nn.Module):
    """Calls no block as a module, so that none can be skipped."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(3, 3)) for _ in range(2))

    def forward(self, x, timestep):
        for block in self.blocks:
            x = block.forward(x)
        return x


@pytest.mark.parametrize("scope", ["stack", "block"])
def test_a_denoiser_that_never_calls_its_blocks_is_told(scope):
    model, x = PastItsBlocks(), torch.ones(2, 3)
    with warned(1, "nothing was cached"), dc.run(model, "interval", every=2, scope=scope, num_steps=4) as run:
        for step in range(4):
            assert torch.equal(model(x + step, step), model.blocks[1](model.blocks[0](x + step)))
        assert run.summary().hit_rate == 0


class Block(nn.Module):
    def __init__(self, residual):
        super().__init__()
        self.linear, self.residual = nn.Linear(4, 4), residual

    def forward(self, x):
        return torch.tanh(self.linear(x)) + (x if self.residual else 0)


class Chain(nn.Module):
    """Two stacks that run as `order` says: names of stacks with the index of a block. around: a residual round each."""

    def __init__(self, order, hint=0.0, around=False):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.ModuleList(Block(not around) for _ in range(2))
        self.second = nn.ModuleList(Block(not around) for _ in range(2))
        self.order, self.hint, self.around = order, hint, around

    def forward(self, x, timestep):
        for stack, index in self.order(timestep):
            x = getattr(self, stack)[index](x) + self.hint + (x if self.around else 0)
        return x


def chain(*blocks):
    return lambda timestep: blocks


IN_ORDER = chain(("first", 0), ("first", 1), ("second", 0), ("second", 1))


@pytest.mark.parametrize(
    ("scope", "around", "expected_steps", "told"),
    [
        ("stack", False, "1010", 0),
        ("block", False, "1010", 0),
        ("block", True, "1010", 0),
        # x = x + block(x) around the last block would add what the skipped ones passed through: seen, and computed
        ("stack", True, "1111", 1),
    ],
)
def test_what_is_added_between_blocks_is_counted_once(scope, around, expected_steps, told):
    model, x = Chain(IN_ORDER, hint=0.3, around=around), torch.linspace(-1, 1, 8).reshape(2, 4)
    expected = model(x, 0)
    run = dc.run(model, "interval", every=2, num_steps=4, scope=scope)
    with warned(told, "used outside of it"), torch.no_grad(), run as running:
        for step in range(4):
            torch.testing.assert_close(model(x, step), expected, rtol=0, atol=1e-6)
        assert computed(running.summary()) == expected_steps


@pytest.mark.parametrize(
    ("order", "messages", "reused"),
    [
        (
            chain(("first", 0), ("second", 0), ("first", 1), ("second", 1)),
            [],  # both become one span
            [0, 1, 0, 1, 0, 1],
        ),
        (
            chain(("first", 0), ("first", 1), ("first", 0), ("first", 1), ("second", 0), ("second", 1)),
            [],
            [0, 3, 0, 3, 0, 3],
        ),
        (
            # the last block is left out at odd steps: the first of them is rolled back
            lambda step: IN_ORDER(step)[: 4 - step % 2],
            ["second is not called in the same way at every step"],
            [0, 0, 0, 1, 0, 1],
        ),
    ],
    ids=["interleaved", "repeated", "left out"],
)
def test_stacks_that_are_no_plain_chain(order, messages, reused):
    samples = [torch.linspace(-1, 1, 8).reshape(2, 4) * (1 + step) for step in range(6)]
    model = Chain(order)
    with torch.no_grad():
        expected = [model(x, step) for step, x in enumerate(samples)]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with dc.run(model, "interval", "reuse", every=2, num_steps=6) as run:
                found = [model(x, step) for step, x in enumerate(samples)]
    told = [str(w.message) for w in caught if w.category is dc.DiffusionCacheWarning]
    assert len(told) == len(messages)
    assert all(message in text and "try scope 'block'" in text for message, text in zip(messages, told, strict=True))
    assert [r.spans_reused for r in run.summary().records] == reused
    assert [not torch.equal(a, b) for a, b in zip(found, expected, strict=True)] == [bool(count) for count in reused]


@pytest.mark.parametrize(("front", "back"), [(1, 0), (1, 1), (4, 3), (11, 0), (1, 10)])
def test_front_and_back_blocks_run_once(front, back):
    pipe = load(DIT)
    calls = [0] * 12

    def counting(index):
        def count(module, args):
            calls[index] += 1

        return count

    for index, block in enumerate(pipe.transformer.transformer_blocks):
        block.register_forward_pre_hook(counting(index))
    with dc.cached(pipe, "first_block", granularity="batch", threshold=0.0, front=front, back=back):
        assert torch.equal(generate(DIT, pipe), uncached(DIT))
    assert calls == [STEPS] * 12
    calls[:] = [0] * 12
    with dc.cached(pipe, "first_block", granularity="batch", threshold=1e9, front=front, back=back):
        generate(DIT, pipe)
    skipped = 12 - front - back
    assert calls == [STEPS] * front + [1] * skipped + [STEPS] * back


@pytest.mark.parametrize(("front", "back"), [(6, 6), (12, 0), (1, 11), (13, 0), (30, 30)])
def test_more_front_and_back_blocks_than_there_are(front, back):
    pipe = load(DIT)
    with pytest.raises(dc.ConfigError, match=f"front={front} and back={back}.*transformer_blocks: 12"):
        dc.enable(pipe, "first_block", front=front, back=back)
    assert torch.equal(generate(DIT, pipe), uncached(DIT))


# step counts

RESCALED = {
    1: "1",
    2: "10",
    3: "110",
    5: "11000",
    7: "1101000",
    8: "11001000",
    16: "1111000011000000",
}


@pytest.mark.parametrize("steps", RESCALED)
def test_a_mask_is_rescaled(steps):
    pipe = load(FLUX)
    with dc.cached(pipe, "mask", mask="11001000"):
        generate(FLUX, pipe, steps)
        assert computed(dc.summary(pipe)) == RESCALED[steps]


def test_a_mask_that_starts_with_reuse_computes_first():
    pipe = load(FLUX)
    with warned(1, "first step is computed"):
        dc.enable(pipe, "mask", mask="001000")
        first = generate(FLUX, pipe)
        generate(FLUX, pipe)
    assert computed(dc.summary(pipe)) == "101000"
    dc.enable(pipe, "mask", mask="101000")
    assert torch.equal(generate(FLUX, pipe), first)


@pytest.mark.parametrize("policy", [("mask", dict(mask="1100" * 7)), ("interval", dict(every=3, warmup=2, last=1))])
def test_each_request_has_its_own_step_count(policy):
    requests = [8, 4, 8, 1, 12, 4]
    alone = {}
    for steps in set(requests):
        pipe = load(FLUX)
        dc.enable(pipe, policy[0], **policy[1])
        alone[steps] = generate(FLUX, pipe, steps), dc.summary(pipe).records
    pipe = load(FLUX)
    dc.enable(pipe, policy[0], **policy[1])
    for steps in requests:
        output, records = generate(FLUX, pipe, steps), dc.summary(pipe).records
        assert torch.equal(output, alone[steps][0])
        assert records == alone[steps][1]
        assert len(records) == dc.summary(pipe).total == steps
    assert computed(dc.summary(pipe)) == ("1100" if policy[0] == "mask" else "1101")


# options and uneven gaps


@pytest.mark.parametrize("option", ["evry", "warm_up", "max_consecutiv", "order_", "thresold"])
def test_a_misspelled_option_is_an_error(option):
    pipe = load(DIT)
    with pytest.raises(dc.ConfigError, match=f"Unknown option '{option}'"):
        dc.enable(pipe, "interval", "taylor", **{option: 2})
    assert untouched(pipe.transformer)


class Polynomial(nn.Module):
    """A denoiser whose output is a polynomial of the step, and nothing else."""

    def __init__(self, *coefficients):
        super().__init__()
        self.coefficients = coefficients
        self.calls = 0

    def forward(self, x, timestep):
        self.calls += 1
        return (x * 0 + sum(c * timestep**i for i, c in enumerate(self.coefficients)),)


def values(model, steps, **options):
    with dc.run(model, num_steps=steps, **options) as run:
        found = []
        for step in range(steps):
            run.next_step()
            found.append(model(torch.ones(2, 3, dtype=torch.float64), step)[0])
    assert all((value == value[0, 0]).all() for value in found)
    return [value[0, 0].item() for value in found]


def test_forecasts_know_the_gap():
    """y = t computed every four steps: 5, 6, 7 follow from 0 and 4; ignoring the gap they were 8, 12, 16."""
    model = Polynomial(0.0, 1.0)
    assert values(model, 24, policy="interval", every=4)[4:] == pytest.approx(range(4, 24))
    assert model.calls == 6


@pytest.mark.parametrize("mask", ["110100001000", "111000000000", "110000010010"])
def test_uneven_gaps(mask):
    square = [3 - 2 * t + 0.5 * t**2 for t in range(12)]
    found = values(Polynomial(3.0, -2.0, 0.5), 12, policy="mask", mask=mask, forecaster="taylor", order=2)
    third = [step for step in range(12) if mask[step] == "1"][2]
    assert found[third:] == pytest.approx(square[third:])
    nodes = [0, 1]
    between = [step for step in range(2, third)]
    assert [found[step] for step in between] == pytest.approx(
        [square[nodes[0]] + (square[nodes[1]] - square[nodes[0]]) * step for step in between]
    )


# threads


def in_threads(*works):
    with ThreadPoolExecutor(len(works)) as pool:
        return [future.result(timeout=60) for future in [pool.submit(work) for work in works]]


@pytest.mark.parametrize("name", [FLUX, UNET])
@pytest.mark.parametrize("second_enabled", [True, False])
def test_two_threads_share_a_denoiser(name, second_enabled):
    first = load(name)
    second = sharing(name, first)
    dc.enable(first, "interval", every=2)
    if second_enabled:
        dc.enable(second, "mask", mask="110100")
    shares = pytest.warns(dc.DiffusionCacheWarning, match="has modules of")
    with contextlib.nullcontext() if second_enabled else shares:
        alone = [generate(name, first), generate(name, second, labels=(8,), seeds=(9,))]
    barrier = threading.Barrier(2)

    def in_turns(pipe, index, timestep, kwargs):
        barrier.wait(timeout=60)
        return kwargs

    def work(pipe, labels, seeds):
        return [generate(name, pipe, labels=labels, seeds=seeds, callback_on_step_end=in_turns) for _ in range(2)]

    together = in_threads(lambda: work(first, (3,), (5,)), lambda: work(second, (8,), (9,)))
    for outputs, expected in zip(together, alone, strict=True):
        assert all(torch.equal(output, expected) for output in outputs)
    assert not torch.equal(*alone)
    assert computed(dc.summary(first)) == "101010"
    if second_enabled:
        assert computed(dc.summary(second)) == "110100"


def test_runs_in_threads_started_inside_a_run_are_apart():
    """Another thread's calls of the same denoiser belong to no run of this one."""
    denoiser = Polynomial(0.0, 1.0)

    def outside():
        return [denoiser(torch.ones(1), step)[0].item() for step in range(4)]

    with dc.run(denoiser, "interval", every=4, num_steps=4) as run:
        inside = []
        for step in range(4):
            run.next_step()
            inside.append(denoiser(torch.ones(1), step)[0].item())
            assert in_threads(outside) == [[0, 1, 2, 3]]
    assert inside == [0, 0, 0, 0]


def test_a_pipeline_called_from_anothers_callback():
    outer = load(WAN)
    inner = sharing(WAN, outer)
    dc.enable(outer, "interval", every=2)
    dc.enable(inner, "interval", every=3)
    expected, inner_expected = generate(WAN, outer), generate(WAN, inner, 4, labels=(1,))
    inside = []

    def preview(pipe, index, timestep, kwargs):
        if index in (2, 3):
            inside.append(generate(WAN, inner, 4, labels=(1,)))
        return kwargs

    assert torch.equal(generate(WAN, outer, callback_on_step_end=preview), expected)
    assert [torch.equal(output, inner_expected) for output in inside] == [True, True]


def test_an_uncached_pipeline_called_from_a_cached_ones_callback():
    outer = load(WAN)
    inner = sharing(WAN, outer)
    dc.enable(outer, "interval", every=2)
    with pytest.warns(dc.DiffusionCacheWarning, match="has modules of"):
        inner_expected = generate(WAN, inner, 4, labels=(1,))
    inside = []

    def preview(pipe, index, timestep, kwargs):
        if index == 2:
            inside.append(generate(WAN, inner, 4, labels=(1,)))
        return kwargs

    generate(WAN, outer, callback_on_step_end=preview)
    assert torch.equal(inside[0], inner_expected)


class OtherWan(diffusers.WanPipeline):
    """Stands for a pipeline of another class: its `__call__` is its own."""

    __call__ = diffusers.WanPipeline.__call__


def test_an_uncached_pipeline_of_another_class_called_from_a_callback():
    outer = load(WAN)
    inner = OtherWan(**outer.components | {"scheduler": copy.deepcopy(outer.scheduler)})
    inner.set_progress_bar_config(disable=True)
    inner_expected = generate(WAN, inner, 4, labels=(1,))
    dc.enable(outer, "interval", every=2)
    inside = []

    def preview(pipe, index, timestep, kwargs):
        if index == 2:
            inside.append(generate(WAN, inner, 4, labels=(1,)))
        return kwargs

    with pytest.warns(dc.DiffusionCacheWarning, match="has modules of"):
        output = generate(WAN, outer, callback_on_step_end=preview)
    assert torch.equal(output, every_two(WAN))
    assert torch.equal(inside[0], inner_expected)


def test_the_denoiser_called_from_a_callback():
    """A user's own look ahead is a pass of its own."""
    pipe = load(FLUX)
    calls = []
    hook = pipe.transformer.register_forward_pre_hook(lambda m, a, k: calls.append(k), with_kwargs=True)
    generate(FLUX, pipe)
    hook.remove()
    with torch.no_grad():
        expected = pipe.transformer(**calls[0])[0]
    inside = []

    def look(pipe, index, timestep, kwargs):
        inside.append(pipe.transformer(**calls[0])[0])
        return kwargs

    dc.enable(pipe, "interval", every=2)
    assert torch.equal(generate(FLUX, pipe, callback_on_step_end=look), every_two(FLUX))
    assert len(inside) == STEPS
    assert all((output - expected).abs().max() < 1e-5 for output in inside)


def test_a_pipeline_disabled_while_another_with_its_scheduler_runs():
    pipe = load(WAN)
    other = sharing(WAN, pipe, scheduler=pipe.scheduler)
    dc.enable(pipe, "interval", every=2)
    dc.enable(other, "interval", every=2)
    generate(WAN, other)

    def disable(pipe, index, timestep, kwargs):
        if index == 2:
            dc.disable(other)
        return kwargs

    assert torch.equal(generate(WAN, pipe, callback_on_step_end=disable), every_two(WAN))


# batches


@pytest.mark.parametrize("changed", [None, 0, 1])
def test_a_call_is_computed_if_any_guidance_branch_asks(changed):
    """Two row groups in one call; the class of one changes at the second step."""
    denoiser = load(DIT).transformer
    x, t = torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(0)).repeat(2, 1, 1, 1), torch.tensor([500])
    labels = torch.tensor([[3, 1000], [3, 1000]])
    if changed is not None:
        labels[1, changed] = 8

    residuals = []

    def note(module, args, output):
        residuals.append(output - args[0])

    def run(threshold):
        with torch.no_grad(), dc.run(denoiser, "first_block", threshold=threshold) as run:
            for step in range(2):
                run.next_step()
                denoiser(x, timestep=t.expand(2), class_labels=labels[step])
            return computed(run.summary())

    with denoiser.transformer_blocks[0].register_forward_hook(note):
        run(0.0)
    before, after = residuals
    change = ((after - before).abs().mean((1, 2)) / before.abs().mean((1, 2))).tolist()
    whole = ((after - before).abs().mean() / before.abs().mean()).item()
    if changed is None:
        assert change == [0, 0]
        assert run(0.0) == "10"
        return
    assert change[1 - changed] == 0
    assert change[changed] > whole > 0
    assert run((change[changed] + whole) / 2) == "11"  # the mean over the batch would have reused
    assert run(change[changed] * 1.01) == "10"
    assert run(change[changed] * 0.99) == "11"


# two denoisers


def two_transformers():
    first = load(WAN)
    second = copy.deepcopy(first.transformer)
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.mul_(1.1)
    parts = dict(vae=first.vae, scheduler=first.scheduler, text_encoder=None, tokenizer=None)
    pipe = diffusers.WanPipeline(transformer=first.transformer, transformer_2=second, boundary_ratio=0.8, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_each_denoiser_has_its_own_history():
    pipe = two_transformers()
    plain = generate(WAN, pipe, 8, guidance=1.0)
    with dc.cached(pipe, "first_block", "reuse", threshold=1e9, max_consecutive=2):
        cached = generate(WAN, pipe, 8, guidance=1.0)
        summary = dc.summary(pipe)
    assert summary.spans == 2
    names = [r.denoiser for r in summary.records]
    switch = names.index("transformer_2")
    assert names == ["transformer"] * switch + ["transformer_2"] * (8 - switch)
    assert 2 < switch < 6
    # each computes its own first step and then two of three are reused
    assert computed(summary) == "10010010"[:switch] + "10010010"[: 8 - switch]
    assert not torch.equal(plain, cached)
    assert untouched(pipe.transformer)
    assert untouched(pipe.transformer_2)


def test_a_planned_policy_caches_the_second_denoiser():
    pipe = two_transformers()
    with dc.cached(pipe, "mask", mask="10000000"):
        generate(WAN, pipe, 8, guidance=1.0)
        summary = dc.summary(pipe)
    switch = [r.denoiser for r in summary.records].index("transformer_2")
    assert computed(summary) == "".join("1" if step in (0, switch) else "0" for step in range(8))


@pytest.mark.parametrize(
    ("policy", "computed"),
    [
        (dict(policy="first_block", threshold=1e9), ([0, 1, 2], [5, 6, 7])),
        (dict(policy="interval", every=4), ([0, 1, 2], [5, 6, 7, 10])),
        (dict(policy="interval", every=4, warmup=1), ([0, 4], [5, 8])),
    ],
)
def test_every_denoiser_is_warmed_up(policy, computed):
    pipe = two_transformers()
    with dc.cached(pipe, **{"warmup": 3, **policy}):
        generate(WAN, pipe, steps=12)
        records = dc.summary(pipe).records
    for name, steps in zip(("transformer", "transformer_2"), computed, strict=True):
        assert list(dict.fromkeys(r.step for r in records if r.denoiser == name and r.computed)) == steps


@pytest.mark.parametrize("policy", [dict(policy="mask", mask="100000"), dict(policy="first_block", threshold=1e9)])
def test_refresh_in_a_callback(policy):
    """As where the prompt is changed there."""
    pipe = reference.load("flux-digits")

    def change(pipe, index, timestep, kwargs):
        if index == 2:
            dc.refresh(pipe)
        return kwargs

    with dc.cached(pipe, **policy):
        pipe(**reference.inputs("flux-digits", [3], [5], 6), callback_on_step_end=change)
        assert [record.step for record in dc.summary(pipe).records if record.computed] == [0, 3]
        with pytest.raises(dc.ConfigError, match="not in a call: refresh is for its callbacks"):
            dc.refresh(pipe)
    with pytest.raises(dc.ConfigError, match="FluxPipeline is not enabled"):
        dc.refresh(pipe)


def test_another_cache_on_one_denoiser_leaves_the_other_cached():
    pipe = two_transformers()
    dc.enable(pipe, "interval", every=2)
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1))
    with warned(1, "running without the cache in transformer, which"):
        generate(WAN, pipe, 8, guidance=1.0)
    summary = dc.summary(pipe)
    assert {r.denoiser for r in summary.records} == {"transformer_2"}
    assert summary.reused == len(summary.records) // 2 > 0
    pipe.transformer.disable_cache()
    dc.disable(pipe)


# failures inside the cache


def emit_nan(block, when):
    def poison(module, args, output):
        return output * float("nan") if when() else output

    return block.register_forward_hook(poison)


class Fixed:
    """The DiT called with the same input again and again, one of its blocks emitting NaN at some steps."""

    def __init__(self, bad):
        self.denoiser = load(DIT).transformer
        self.x = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
        self.step = -1
        self.expected = self()
        emit_nan(self.denoiser.transformer_blocks[5], lambda: self.step in bad)

    @torch.no_grad()
    def __call__(self):
        return self.denoiser(self.x, timestep=torch.tensor([500, 500]), class_labels=torch.tensor([3, 4])).sample

    def right(self, steps, **options):
        """For each step, 1 if the output is right."""
        found = ""
        with dc.run(self.denoiser, num_steps=steps, **options) as run:
            for self.step in range(steps):
                run.next_step()
                found += str(int((self() - self.expected).abs().max().nan_to_num(1.0).item() < 1e-4))
            self.summary = run.summary()
        return found


@pytest.mark.parametrize("scope", ["denoiser", "stack"])
@pytest.mark.parametrize("forecaster", ["reuse", "taylor"])
def test_nan_in_a_feature_is_not_reused(scope, forecaster):
    model = Fixed(bad=[3])
    with warned(1, "not finite"):
        assert model.right(9, policy="interval", every=3, scope=scope, forecaster=forecaster) == "111011111"
    assert computed(model.summary) == "100110100"
    assert model.summary.records[4].reason == "not finite"
    model = Fixed(bad=[])
    with warned(0, ""):
        assert model.right(9, policy="interval", every=3, scope=scope, forecaster=forecaster) == "1" * 9
    assert computed(model.summary) == "100100100"


def test_nan_in_an_older_feature_is_not_reused():
    model = Fixed(bad=[0])
    with warned(1, "not finite"):
        assert model.right(6, policy="interval", every=3, warmup=2, forecaster="taylor") == "011111"
    assert computed(model.summary) == "111010"


@pytest.mark.parametrize("policy", [("interval", dict(every=2)), ("first_block", dict(threshold=1e9))])
@each_model
def test_nan_in_one_run_does_not_touch_the_next(name, policy):
    pipe = load(name)
    with dc.cached(pipe, policy[0], **policy[1]):
        expected = generate(name, pipe)
    calls = []
    block = blocks_of(name, pipe)[2]

    def poison(module, args, output):
        calls.append(module)
        return tree_map(lambda x: x * float("nan"), output) if len(calls) == 1 else output

    dc.enable(pipe, policy[0], **policy[1])
    # a policy that looks at the probe sees NaN there and never comes to reuse
    with block.register_forward_hook(poison), warned(int(policy[0] == "interval"), "not finite"):
        assert not generate(name, pipe).isfinite().any()
    first_pass = dc.summary(pipe).records[0].pass_name
    assert computed(dc.summary(pipe), first_pass) == "1" * STEPS
    assert torch.equal(generate(name, pipe), expected)
    assert expected.isfinite().all()


@dataclass(frozen=True)
class Broken(Taylor):
    """Fails at some steps."""

    name = "broken"
    steps: tuple = tuple(range(STEPS))
    how: str = "raise"

    def weights(self, query):
        if query.target not in self.steps:
            return super().weights(query)
        if self.how == "raise":
            raise ZeroDivisionError("float division by zero")
        return (1.0,) * 5


@pytest.mark.parametrize(
    ("name", "scope", "how"),
    [
        (DIT, "stack", "raise"),
        (DIT, "denoiser", "raise"),
        (DIT, "stack", "too many weights"),
        (UNET, "cut", "raise"),
        (WAN, "stack", "raise"),
        (WAN, "denoiser", "too many weights"),
    ],
)
def test_a_forecaster_that_fails_is_computed_instead(name, scope, how):
    pipe = load(name)
    dc.enable(pipe, "interval", Broken(how=how), every=2, scope=scope)
    with warned(1, "forecasting"):
        assert torch.equal(generate(name, pipe), uncached(name))
    assert dc.summary(pipe).hit_rate == 0
    dc.enable(pipe, "interval", Broken(steps=()), every=2)
    with warned(0, ""):
        assert torch.equal(generate(name, pipe), every_two(name))


def test_a_forecaster_that_fails_once():
    pipe = load(FLUX)
    dc.enable(pipe, "interval", Broken(order=0, steps=(1,)), every=2, scope="denoiser")
    with warned(1, "ZeroDivisionError"):
        cached = generate(FLUX, pipe)
    records = dc.summary(pipe).records
    assert [r.computed for r in records] == [True, True, True, False, True, False]
    assert records[1].reason == "failure"
    dc.disable(pipe)
    with replaying(pipe.transformer, records):
        assert torch.equal(generate(FLUX, pipe), cached)


@pytest.mark.parametrize("error", [MemoryError, RuntimeError])
@each_model
def test_a_history_that_cannot_store_is_computed_instead(name, error, monkeypatch):
    pipe = load(name)
    dc.enable(pipe, "interval", every=2)
    observe = History.observe

    def fail(self, *args):
        raise error("no room")

    monkeypatch.setattr(History, "observe", fail)
    with warned(1, "storing a feature"):
        assert torch.equal(generate(name, pipe), uncached(name))
    assert dc.summary(pipe).hit_rate == dc.summary(pipe).cache_bytes == 0
    monkeypatch.setattr(History, "observe", observe)
    assert torch.equal(generate(name, pipe), every_two(name))


def test_a_history_that_cannot_store_once(monkeypatch):
    pipe = load(FLUX)
    dc.enable(pipe, "interval", "reuse", every=2, scope="denoiser")
    observe, calls = History.observe, []

    def fail_second(self, *args):
        calls.append(args)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("no room")
        observe(self, *args)

    monkeypatch.setattr(History, "observe", fail_second)
    with warned(1, "OutOfMemoryError: no room"):
        cached = generate(FLUX, pipe)
    records = dc.summary(pipe).records
    assert [r.computed for r in records] == [True, False, True, True, True, False]
    dc.disable(pipe)
    with replaying(pipe.transformer, records):
        assert torch.equal(generate(FLUX, pipe), cached)


def test_a_method_that_fails_at_every_block_is_told_once():
    pipe = load(DIT)
    dc.enable(pipe, "interval", Broken(), every=2, scope="block")
    with warned(1, "forecasting"):
        assert torch.equal(generate(DIT, pipe), uncached(DIT))


def test_disabling_inside_a_run_computes_the_rest():
    pipe = load(FLUX)

    def disable(pipe, index, timestep, kwargs):
        if index == 3:
            dc.disable(pipe)
        return kwargs

    dc.enable(pipe, "interval", "reuse", every=2, scope="denoiser")
    output = generate(FLUX, pipe, callback_on_step_end=disable)
    dc.enable(pipe, "interval", "reuse", every=2, last=2, scope="denoiser")
    assert torch.equal(generate(FLUX, pipe), output)
    assert computed(dc.summary(pipe)) == "101011"
    dc.disable(pipe)
    assert untouched(pipe.transformer)


# copies and files


@each_model
def test_a_deep_copy_is_uncached(name):
    pipe = load(name)
    dc.enable(pipe, "interval", every=2)
    generate(name, pipe)
    other = made(copy.deepcopy(pipe))
    assert untouched(denoiser_of(name, other))
    assert torch.equal(generate(name, other), uncached(name))
    with pytest.raises(dc.ConfigError, match="not enabled"):
        dc.summary(other)
    assert torch.equal(generate(name, pipe), every_two(name))
    dc.enable(other, "interval", every=2)
    dc.disable(pipe)
    assert torch.equal(generate(name, other), every_two(name))
    assert torch.equal(generate(name, pipe), uncached(name))


def test_disabling_a_shallow_copy_leaves_the_original_alone():
    pipe = load(DIT)
    dc.enable(pipe, "interval", every=2)
    dc.disable(copy.copy(pipe))
    assert torch.equal(generate(DIT, pipe), every_two(DIT))


def test_a_pipeline_dropped_without_disable_leaves_nothing_on_a_shared_denoiser():
    pipe = load(DIT)
    plain_call = vars(type(pipe))["__call__"]
    other = sharing(DIT, pipe)
    session = dc.enable(other, "interval", every=2)
    generate(DIT, other, 2)
    PIPES.remove(other)
    del other
    gc.collect()
    try:
        assert untouched(pipe.transformer)
        assert vars(type(pipe))["__call__"] is plain_call
    finally:
        session.detach_model()


@each_model
def test_a_saved_denoiser_reloads_equal(name, tmp_path):
    pipe = load(name)
    denoiser = denoiser_of(name, pipe)
    keys = list(denoiser.state_dict())
    dc.enable(pipe, "interval", every=2)
    generate(name, pipe)
    assert list(denoiser.state_dict()) == keys
    denoiser.save_pretrained(tmp_path)
    other = type(denoiser).from_pretrained(tmp_path)
    assert untouched(other)
    stored, own = (json.loads(module.to_json_string()) for module in (other, denoiser))
    assert {k: v for k, v in stored.items() if k[0] != "_"} == {k: v for k, v in own.items() if k[0] != "_"}
    for key, value in denoiser.state_dict().items():
        assert torch.equal(value, other.state_dict()[key])
    plain = load(name)
    setattr(plain, reference.spec(name).denoiser, other)
    # equal weights read from a file lie elsewhere in memory, which alone changes how sums are rounded
    torch.testing.assert_close(generate(name, plain), uncached(name), rtol=0, atol=1e-5)


# hooks


@pytest.mark.parametrize("name", [DIT, FLUX])
@pytest.mark.parametrize("hooked_first", [True, False])
@pytest.mark.parametrize("unhooked_first", [True, False])
def test_accelerates_hooks_in_any_order(name, hooked_first, unhooked_first):
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    pipe = load(name)
    modules = [denoiser_of(name, pipe), *blocks_of(name, pipe)]
    calls = dict.fromkeys(modules, 0)

    class Counting(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            calls[module] += 1
            return args, kwargs

    def hook():
        for module in modules:
            add_hook_to_module(module, Counting())

    def unhook():
        for module in modules:
            remove_hook_from_module(module)

    def enable():
        dc.enable(pipe, "interval", every=2)

    for act in (hook, enable) if hooked_first else (enable, hook):
        act()
    assert torch.equal(generate(name, pipe), every_two(name))
    assert list(calls.values()) == [STEPS] + [STEPS // 2] * (len(modules) - 1)
    if unhooked_first:
        unhook()
        assert torch.equal(generate(name, pipe), every_two(name))
        dc.disable(pipe)
    else:
        dc.disable(pipe)
        calls.update(dict.fromkeys(modules, 0))
        assert torch.equal(generate(name, pipe), uncached(name))
        assert list(calls.values()) == [STEPS] * len(modules)
        unhook()
    calls.update(dict.fromkeys(modules, 0))
    assert torch.equal(generate(name, pipe), uncached(name))
    assert set(calls.values()) == {0}
    assert untouched(modules[0])


@pytest.mark.parametrize(("scope", "root", "block"), [("denoiser", 3, 3), ("stack", 6, 3), ("block", 6, 3)])
@pytest.mark.parametrize("hooked_first", [True, False])
def test_forward_hooks_fire_for_what_is_executed(scope, root, block, hooked_first):
    pipe = load(DIT)
    before, after = [], []

    def register():
        for module in (pipe.transformer, *pipe.transformer.transformer_blocks):
            module.register_forward_pre_hook(lambda module, args: before.append(module))
            module.register_forward_hook(lambda module, args, output: after.append(module))

    if hooked_first:
        register()
    dc.enable(pipe, "interval", every=2, scope=scope)
    if not hooked_first:
        register()
    generate(DIT, pipe)
    for fired in (before, after):
        assert fired.count(pipe.transformer) == root
        assert [fired.count(module) for module in pipe.transformer.transformer_blocks] == [block] * 12


def test_what_a_forward_hook_returns_is_cached():
    pipe = load(WAN)
    for block in pipe.transformer.blocks:
        block.register_forward_hook(lambda module, args, output: output * 0.9)
    plain = generate(WAN, pipe)
    dc.enable(pipe, "interval", "reuse", every=2, scope="denoiser")
    cached = generate(WAN, pipe)
    records = dc.summary(pipe).records
    dc.disable(pipe)
    assert torch.equal(generate(WAN, pipe), plain)
    assert not torch.equal(plain, uncached(WAN))
    with replaying(pipe.transformer, records):
        assert torch.equal(generate(WAN, pipe), cached)


# modes of torch


@each_model
def test_inference_mode(name):
    pipe = load(name)
    dc.enable(pipe, "interval", every=2)
    with torch.inference_mode():
        assert torch.equal(generate(name, pipe), every_two(name))
    assert torch.equal(generate(name, pipe), every_two(name))
    with torch.inference_mode():
        assert torch.equal(generate(name, pipe), every_two(name))


def test_inference_mode_in_the_middle_of_a_run():
    model = Fixed(bad=[])

    def mode():
        return torch.inference_mode() if model.step % 2 else contextlib.nullcontext()

    with dc.run(model.denoiser, "interval", "taylor", every=3, num_steps=12) as run:
        for model.step in range(12):
            run.next_step()
            with mode():
                assert (model() - model.expected).abs().max() < 1e-4
        assert run.summary().reused >= 4


class Differentiated:
    """The gradients of a sum over two calls of the DiT, with respect to its input and a weight of each block."""

    def __init__(self):
        self.denoiser = load(DIT).transformer.train()
        for block in self.denoiser.transformer_blocks:
            block.norm1.train(False)
        self.x = torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)
        self.weights = [block.ff.net[2].weight for block in self.denoiser.transformer_blocks]

    def call(self):
        return self.denoiser(self.x, timestep=torch.tensor([500]), class_labels=torch.tensor([1000])).sample

    def gradients(self, output):
        target = torch.linspace(-1, 1, output.numel()).reshape(output.shape)
        return torch.autograd.grad((output * target).sum(), [self.x, *self.weights], allow_unused=True)


@pytest.mark.parametrize("scope", ["denoiser", "stack", "block"])
def test_gradients_flow_through_computed_steps(scope):
    model = Differentiated()
    expected = model.gradients(model.call())
    assert all(g.abs().max() > 0 for g in expected)
    # of five steps: after the last one no features would be left
    with dc.run(model.denoiser, "interval", "reuse", every=2, scope=scope, num_steps=5) as run:
        outputs = []
        for _ in range(4):
            run.next_step()
            outputs.append(model.call())
        for step in (2, 0):
            assert all(torch.equal(a, b) for a, b in zip(model.gradients(outputs[step]), expected, strict=True))
        # reused: the value is right; what was not computed has no gradient
        torch.testing.assert_close(outputs[3], outputs[2], rtol=0, atol=1e-5)
        if scope == "denoiser":
            assert not outputs[3].requires_grad
        else:
            found = model.gradients(outputs[3])
            assert found[0].abs().max() > 0
            assert [g for g in found[1:]] == [None] * 12
        features = [t for state in run._run.spans._states.values() for slot in state.history.slots for t in slot]
        assert features
        assert not [t for t in features if t.requires_grad]


@pytest.mark.parametrize("scope", ["denoiser", "stack", "block"])
@pytest.mark.parametrize("inside", [True, False])
def test_gradient_checkpointing(scope, inside):
    model = Differentiated()
    with dc.run(model.denoiser, "interval", "reuse", every=2, scope=scope, num_steps=2) as run:
        run.next_step()
        model.call()
        run.next_step()
        reused = model.gradients(model.call()) if scope != "denoiser" else None
    expected = model.gradients(model.call())
    model.denoiser.enable_gradient_checkpointing()
    calls = []
    model.denoiser.transformer_blocks[3].register_forward_pre_hook(lambda module, args: calls.append(1))
    found = []
    with dc.run(model.denoiser, "interval", "reuse", every=2, scope=scope, num_steps=2) as run:
        run.next_step()
        first = model.call()
        run.next_step()
        second = model.call()
        assert computed(run.summary()) == "10"
        if inside:
            found = [model.gradients(first), None if scope == "denoiser" else model.gradients(second)]
    if not inside:
        found = [model.gradients(first), None if scope == "denoiser" else model.gradients(second)]
    assert len(calls) == 2  # once forward and once again on the way back: it did checkpoint
    assert all(torch.equal(a, b) for a, b in zip(found[0], expected, strict=True))
    if reused is not None:
        assert torch.equal(found[1][0], reused[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", [DIT, FLUX])
def test_dtype_changed_between_calls(name, dtype):
    fresh = load(name, dtype=dtype)
    embeddings = {
        key: value.to(dtype)
        for key, value in call(name).items()
        if isinstance(value, torch.Tensor) and value.is_floating_point()
    }
    plain = generate(name, fresh, **embeddings)
    dc.enable(fresh, "interval", every=2)
    expected = generate(name, fresh, **embeddings)

    pipe = load(name)
    dc.enable(pipe, "interval", every=2)
    assert torch.equal(generate(name, pipe), every_two(name))
    pipe.to(dtype)
    assert torch.equal(generate(name, pipe, **embeddings), expected)
    assert dc.summary(pipe).hit_rate == 0.5
    assert denoiser_of(name, pipe).dtype == dtype
    pipe.to(torch.float32)  # the shipped weights have 16 bits: nothing was lost but in bfloat16
    if dtype == torch.float64:
        assert torch.equal(generate(name, pipe), every_two(name))
    dc.disable(pipe)
    pipe.to(dtype)
    assert torch.equal(generate(name, pipe, **embeddings), plain)
    assert not torch.equal(plain, expected)


# torch.compile


@pytest.mark.parametrize("compiled_first", [True, False])
@pytest.mark.parametrize(("name", "how"), [(DIT, "each"), (FLUX, "repeated")])
def test_compiled_blocks(name, how, compiled_first):
    """In either order blocks run compiled and are skipped; after disable they are compiled still."""
    torch._dynamo.reset()
    traced = []

    def backend(graph, inputs):
        traced.append(graph)
        return graph.forward

    pipe = load(name)
    blocks = blocks_of(name, pipe)

    def compile_blocks():
        if how == "repeated":
            denoiser_of(name, pipe).compile_repeated_blocks(backend=backend)
        else:
            for block in blocks:
                block.compile(backend=backend)

    if compiled_first:
        compile_blocks()
        assert torch.equal(generate(name, pipe, 2), uncached(name, 2))
        graphs = len(traced)
        dc.enable(pipe, "interval", every=2)
    else:
        dc.enable(pipe, "interval", every=2)
        assert torch.equal(generate(name, pipe), every_two(name))
        compile_blocks()
        graphs = 0
        assert not traced
    assert torch.equal(generate(name, pipe), every_two(name))
    assert dc.summary(pipe).hit_rate == 0.5
    assert len(traced) > 0
    if compiled_first:
        assert len(traced) == graphs  # nothing was compiled anew
    graphs = len(traced)
    dc.disable(pipe)
    compiled = [vars(block).get(intercept.ATTRIBUTE) for block in blocks]
    assert all(c is not None and not isinstance(c, intercept.Interceptor) for c in compiled)
    assert torch.equal(generate(name, pipe), uncached(name))
    assert len(traced) == graphs


@pytest.mark.parametrize("how", ["in place", "wrapped"])
def test_a_denoiser_compiled_as_a_whole_is_cached_as_a_whole(how):
    torch._dynamo.reset()
    traced = []

    def backend(graph, inputs):
        traced.append(graph)
        return graph.forward

    pipe = made(small.load(DIT))
    plain = generate(DIT, pipe)
    with dc.cached(pipe, "interval", every=2, scope="denoiser"):
        expected = generate(DIT, pipe)
    assert not torch.equal(expected, plain)
    own = pipe.transformer
    if how == "wrapped":
        pipe.transformer = torch.compile(own, backend=backend)
    else:
        own.compile(backend=backend)
    dc.enable(pipe, "interval", every=2, scope="denoiser")
    assert torch.equal(generate(DIT, pipe), expected)
    assert len(traced) == 1
    dc.disable(pipe)
    assert torch.equal(generate(DIT, pipe), plain)
    assert len(traced) == 1
    assert untouched(own) or how == "in place"
