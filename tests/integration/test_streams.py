"""Streams: chunks of one call at noise levels of their own, in a pipeline and in sliding windows."""

import contextvars
import copy

import pytest
import torch
from pipelines_video import WAN_CASES
from torch import nn

import diffusion_cache as dc

WINDOW, LAG = 4, 3  # chunks in a call beside the first one of all, and steps that each is behind the one before
LEVELS = [1000.0 - 70 * step for step in range(WINDOW * LAG)]
EVERY_THIRD = dict(policy="interval", every=3)


class Whole(nn.Module):
    """x + level·x²: in each latent frame linear in its own level."""

    scope = "denoiser"

    def forward(self, hidden_states, timestep):
        return hidden_states + timestep[:, None, :, None, None] / 1000 * hidden_states**2


class Block(nn.Module):
    def __init__(self, streams=1):
        super().__init__()
        self.mix, self.streams = nn.Linear(3, 3, bias=False), streams
        nn.init.eye_(self.mix.weight)

    def forward(self, hidden_states, levels, anchor):
        out = hidden_states + levels / 1000 * self.mix(anchor)
        return out if self.streams == 1 else (out, out.mean(1))


class Stack(nn.Module):
    """The same by two blocks on tokens."""

    scope = "stack"

    def __init__(self, streams=1):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block(streams)])

    def forward(self, hidden_states, timestep):
        tokens = hidden_states.flatten(2).transpose(1, 2)  # [rows, chunks·h·w, dim]
        levels = timestep.repeat_interleave(tokens.shape[1] // timestep.shape[1], dim=1)[..., None]
        anchor = tokens**2 / 2
        for block in self.blocks:
            given = block(tokens, levels, anchor)
            tokens = given if isinstance(given, torch.Tensor) else given[0]
        return tokens.transpose(1, 2).reshape(hidden_states.shape)


def video(chunks=40):
    return torch.randn(2, 3, chunks, 2, 2, generator=torch.Generator().manual_seed(3))


def windows(calls):
    """What each call holds: the first chunk of all, and a window that moves on when its first chunk is clean."""
    first, ages = 1, [LAG * (WINDOW - 1 - place) for place in range(WINDOW)]
    for _ in range(calls):
        yield [0, *range(first, first + WINDOW)], torch.tensor([[0.0, *(LEVELS[age] for age in ages)]] * 2)
        ages = [age + 1 for age in ages]
        if ages[0] >= len(LEVELS):
            first, ages = first + 1, [*ages[1:], 0]


@torch.no_grad()
def follow(model, calls=24, stream=None, **options):
    """What the model gives for each window, with the window, and whether it was reused."""
    sample = video()
    with dc.run(model, stream=stream or dc.Stream(), scope=model.scope, **(EVERY_THIRD | options)) as run:
        for numbers, levels in windows(calls):
            run.chunks(numbers)
            made = model(sample[:, :, numbers], timestep=levels)
            run.next_step()
            yield numbers, levels, made, run.summary()


def outputs(model, **options):
    return torch.stack([made for _, _, made, _ in follow(model, **options)])


@pytest.fixture(scope="module")
def asynchronous():
    case = next(case for case in WAN_CASES if case.variant == "asynchronous")
    pipe = case.build()
    return pipe, lambda: torch.as_tensor(pipe(**case.call()).frames)


@pytest.mark.parametrize("model", [Whole(), Stack()], ids=["whole", "stack"])
def test_what_is_linear_in_a_chunks_level_is_forecast_exactly(model):
    uncached, sample, computed = copy.deepcopy(model), video(), {}
    fitted, unfitted = [], []
    for numbers, levels, made, summary in follow(model):
        error = (made - uncached(sample[:, :, numbers], levels)).abs().amax(dim=(0, 1, 3, 4))
        for number, level, off in zip(numbers, levels[0].tolist(), error.tolist(), strict=True):
            seen = computed.setdefault(number, set())
            if summary.records[-1].computed:
                seen.add(level)
            (fitted if len(seen) > 1 or level in seen else unfitted).append(off)
    assert summary.computed == 8
    assert max(fitted) < 1e-5
    assert min(unfitted) > 1e-2  # a chunk that was computed once is taken for constant


def test_by_steps_a_moving_window_mixes_chunks():
    """What this is for: the same loop filed by steps is wrong."""
    model, sample = Whole(), video()
    with dc.run(model, scope="denoiser", **EVERY_THIRD) as run:
        with pytest.raises(dc.ConfigError, match="told to a stream"):
            run.chunks(range(5))
        for numbers, levels in windows(9):
            made = model(sample[:, :, numbers], timestep=levels)
            run.next_step()
    assert run.summary().reused == 6
    assert (made - Whole()(sample[:, :, numbers], levels)).abs().max() > 1


def test_chunks_that_are_new_are_computed():
    model = Stack()
    records = [*follow(model, policy="interval", every=100)][-1][-1].records
    assert [record.step for record in records if record.computed] == [0, *range(LAG, 24, LAG)]
    assert {record.reason for record in records[LAG::LAG]} == {"new chunks"}


def test_memory_does_not_grow_with_the_stream():
    def taken(calls, **options):
        return [*follow(Stack(), calls, dc.Stream(**options))][-1][-1].cache_bytes

    chunk = 2 * 4 * 3 * 4  # rows · tokens · dim · bytes
    assert taken(6) == taken(60) == (WINDOW + 1) * 2 * chunk  # two features each
    assert taken(6, capacity=9) < taken(60, capacity=9) == 9 * 2 * chunk


def test_chunks_that_come_back_are_known():
    """The window alternates between two places; what is held at least says whether the other one is kept."""
    model, sample = Whole(), video()

    def computed(stream):
        with dc.run(model, policy="interval", every=100, scope="denoiser", stream=stream) as run:
            for call in range(8):
                numbers = [0, 1, 2] if call % 2 else [0, 3, 4]
                run.chunks(numbers)
                model(sample[:, :, numbers], timestep=torch.tensor([[0.0, LEVELS[call], LEVELS[call]]] * 2))
                run.next_step()
            return run.summary().computed

    assert computed(dc.Stream(capacity=5)) == 2
    assert computed(dc.Stream(capacity=4)) == 8
    assert computed(dc.Stream(sinks=5)) == 2


def test_a_stream_starts_clean_and_streams_do_not_mix():
    model = Stack()
    alone = outputs(model)
    assert torch.equal(outputs(model), alone)
    sample = video()

    def disturbed():
        with torch.no_grad(), dc.run(model, stream=dc.Stream(), scope="stack", **EVERY_THIRD) as run:
            for numbers, levels in windows(24):
                run.chunks(numbers)
                model(-2 * sample[:, :, numbers], timestep=levels)
                run.next_step()
                yield

    streams = (follow(model), disturbed())
    places = [contextvars.copy_context() for _ in streams]  # as two tasks or threads have
    made = [[place.run(next, stream) for stream, place in zip(streams, places, strict=True)] for _ in range(24)]
    assert torch.equal(torch.stack([call[0][2] for call in made]), alone)
    for stream, place in zip(streams, places, strict=True):
        place.run(stream.close)


def test_features_may_be_stored_in_codes():
    assert 0 < (outputs(Stack(), cache_dtype="int8") - outputs(Stack())).abs().max() < 0.1


def test_a_span_of_several_streams_is_computed_and_said_so():
    with pytest.warns(dc.DiffusionCacheWarning, match="does not return the 5 chunks of a call side by side"):
        assert [*follow(Stack(streams=2), 6)][-1][-1].reused == 0


def test_a_pipeline_that_always_computes_is_as_without(asynchronous):
    pipe, generate = asynchronous
    uncached = generate()
    before = {name: dict(vars(module)) for name, module in pipe.transformer.named_modules()}
    with dc.cached(pipe, policy="interval", every=1, stream=dc.Stream()):
        assert torch.equal(generate(), uncached)
        summary = dc.summary(pipe)
    assert (summary.reused, summary.cache_bytes, summary.total) == (0, 0, 8)
    assert torch.equal(generate(), uncached)
    assert {name: dict(vars(module)) for name, module in pipe.transformer.named_modules()} == before


def test_a_pipeline_reuses_alike_in_every_generation(asynchronous):
    pipe, generate = asynchronous
    uncached = generate()
    with dc.cached(pipe, policy="interval", every=2, stream=dc.Stream()):
        first = generate()
        assert torch.equal(generate(), first)
        summary = dc.summary(pipe)
    assert [record.step for record in summary.records if record.computed] == [0, 0, 2, 2, 4, 4, 6, 6]
    assert 1e-6 < (first - uncached).abs().mean() / uncached.abs().mean() < 0.1


def test_a_pipeline_without_levels_of_frames_is_refused_and_stays_usable():
    case = WAN_CASES[0]
    pipe = case.build()
    dc.enable(pipe, policy="interval", stream=dc.Stream())
    with pytest.raises(dc.ConfigError, match="is called with"):
        pipe(**case.call())
    dc.disable(pipe)
    pipe(**case.call())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (dict(policy="first_block"), "looks at no signals"),
        (dict(policy="interval", forecaster="hermite"), "by step numbers"),
        (dict(policy="interval", corrector="shrink"), "leave it out of a stream"),
        (dict(policy="interval", max_cache_bytes=10), "limited by its capacity"),
        (dict(policy="interval", stream=True), "takes a diffusion_cache.Stream"),
    ],
)
def test_what_does_not_serve_a_stream_is_refused(options, match):
    with pytest.raises(dc.ConfigError, match=match), dc.run(Stack(), **(dict(stream=dc.Stream()) | options)):
        pass


@pytest.mark.parametrize(
    ("numbers", "stream", "match"),
    [
        (None, dc.Stream(), "run.chunks"),
        (range(4), dc.Stream(), "the call has 5 noise levels"),
        ([0, 1, 2, 3, 3], dc.Stream(), "each of its chunks once"),
        (range(5), dc.Stream(capacity=4), "need a capacity of 5"),
        (range(1, 6), dc.Stream(capacity=5, sinks=1), "need a capacity of 6"),
    ],
)
def test_calls_that_do_not_fit_their_stream_are_refused(numbers, stream, match):
    model = Stack()
    with dc.run(model, stream=stream, **EVERY_THIRD) as run:
        if numbers is not None:
            run.chunks(numbers)
        with pytest.raises(dc.ConfigError, match=match):
            model(video(5), timestep=torch.full((2, 5), 500.0))
    assert torch.equal(model(video(5), timestep=torch.zeros(2, 5)), video(5))
