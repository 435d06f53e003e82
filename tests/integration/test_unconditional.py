"""unconditional_every: the unconditional pass is reused in between, with every policy."""

import pytest
import torch

import diffusion_cache as dc
from diffusion_cache import reference
from diffusion_cache.context import PassState, Step
from diffusion_cache.engine.span_calls import SpanCalls
from diffusion_cache.errors import ConfigError, DiffusionCacheWarning
from diffusion_cache.policies import Accumulate, Guarded, Guards, Interval, MagCache

NAME, STEPS = "wan-moving-digits", 6


@pytest.fixture(scope="module")
def pipe():
    return reference.load(NAME)


def generate(pipe, **given):
    return reference.images(NAME, pipe(**reference.inputs(NAME, (3,), (5,), STEPS, **given)))


def generate_two(pipe):
    return reference.images("dit-digits", pipe(**reference.inputs("dit-digits", (3, 4), (5, 6), 3)))


def computed(pipe):
    """The computed steps of each pass."""
    found = {}
    for record in dc.summary(pipe).records:
        found.setdefault(record.pass_name, [])
        if record.computed:
            found[record.pass_name].append(record.step)
    return found


@pytest.mark.parametrize("scope", ["denoiser", "stack"])
def test_it_is_forecast_by_its_difference_from_the_other_pass(pipe, scope):
    """The uncached generation with, at every second step, the first pass's output and the last difference."""
    calls, last = [], {}
    spans = {"denoiser": pipe.transformer, "stack": pipe.transformer.blocks[-1]}

    def related(module, args, output):
        given = output[0] if isinstance(output, tuple) else output
        step, position = divmod(len(calls), 2)
        calls.append(position)
        if position == 0:
            last["first"] = given.clone()
        elif step % 2 == 0:
            last["difference"] = given - last["first"]
        else:
            made = last["first"] + last["difference"]
            return (made, *output[1:]) if isinstance(output, tuple) else made
        return None

    hook = spans[scope].register_forward_hook(related)
    expected = generate(pipe)
    hook.remove()
    assert len(calls) == 2 * STEPS
    uncached = generate(pipe)
    with dc.cached(pipe, "interval", "reuse", every=1, scope=scope, unconditional_every=2):
        found = generate(pipe)
        assert computed(pipe) == {"cond": [0, 1, 2, 3, 4, 5], "uncond": [0, 2, 4]}
    assert (found - expected).norm() < 1e-4 * (uncached - expected).norm()


def test_it_beats_a_forecast_from_its_own_past(pipe, monkeypatch):
    uncached, errors = generate(pipe), []
    for _ in range(2):
        with dc.cached(pipe, "interval", "taylor", every=1, scope="denoiser", unconditional_every=2):
            errors.append((generate(pipe) - uncached).norm().item())
            assert computed(pipe)["uncond"] == [0, 2, 4]
        monkeypatch.setattr(SpanCalls, "_first_pass", lambda *_: {})
    assert 0 < errors[0] < 0.5 * errors[1]


class Linear(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = torch.nn.ModuleList([torch.nn.Sequential(torch.nn.Linear(4, 4)) for _ in range(2)])

    def forward(self, hidden_states, timestep):
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return hidden_states


@pytest.mark.parametrize("reused", [True, False])
@torch.no_grad()
def test_what_is_forecast_is_corrected_once(reused):
    """The second pass by its difference from the first one's forecast as it was before that was corrected.

    reused: whether the first pass is, too.
    """
    model, corrected = Linear(), lambda x: 1.25 * x + 0.5
    first, second, later = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(1))
    options = dict(scope="denoiser", forecaster="reuse", corrector="affine", scale=1.25, bias=0.5, num_steps=2)
    with dc.run(model, "interval", every=1 + reused, unconditional_every=2, **options) as run:
        for x in (first, second):
            model(x, torch.ones(1))
        run.next_step()
        found = [model(later, torch.zeros(1)), model(second, torch.zeros(1))]
    if reused:
        expected = [corrected(model(first, None)), corrected(model(second, None))]
    else:
        expected = [model(later, None), corrected(model(later, None) + model(second, None) - model(first, None))]
    for each, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(each, wanted)


def test_forecasters_that_keep_inputs_are_refused(pipe):
    """Each branch goes by the path of all, and only what guidance makes of them is right."""
    with pytest.raises(ConfigError, match=r"'average_velocity' goes by the path .* leave unconditional_every out"):
        dc.enable(pipe, "interval", "average_velocity", scope="denoiser", unconditional_every=2)


@pytest.mark.parametrize(
    ("options", "cond", "uncond"),
    [
        ({"policy": "interval", "every": 2, "unconditional_every": 4}, [0, 2, 4], [0, 4]),
        ({"policy": "interval", "every": 1, "unconditional_every": 3, "last": 2}, [0, 1, 2, 3, 4, 5], [0, 3, 4, 5]),
        ({"policy": "first_block", "threshold": 0.0, "unconditional_every": 2}, [0, 1, 2, 3, 4, 5], [0, 2, 4]),
        ({"policy": "first_block", "threshold": 1e9, "unconditional_every": 2}, [0], [0]),
        ({"policy": "pab", "scope": "branch", "unconditional_every": 2}, [0, 1, 2, 3, 4, 5], [0, 2, 4]),
    ],
)
def test_beside_planned_and_adaptive_policies(pipe, options, cond, uncond):
    with dc.cached(pipe, **options):
        generate(pipe)
        assert computed(pipe) == {"cond": cond, "uncond": uncond}


def test_schedules_have_a_row_for_each_pass():
    guarded = Guarded(Interval(2), Guards(unconditional_every=4))
    assert [guarded.schedule(6).row(step, 0) for step in range(6)] == [(True,), (False,)] * 3
    assert [guarded.schedule(6).row(step, 1) for step in range(6)] == [(step % 4 == 0,) for step in range(6)]
    assert len(Guarded(Interval(2)).schedule(6).compute[0]) == 1
    streams = Guarded(MagCache(((1.0,) * 4, (1.0,) * 4), max_skip=0), Guards(unconditional_every=2))
    assert streams.schedule(4).compute == (((True,), (True,)), ((True,), (False,))) * 2


def test_sums_go_on_over_passes_that_are_spared():
    class Sum(Accumulate):
        pass

    guarded = Guarded(Sum(threshold=1.0), Guards(unconditional_every=3))
    state = PassState(last_computed=1, accumulated=0.8)
    spared = guarded.decide(Step(2, 9, 2, None, "1", (slice(None),), 1), 0.5, state)
    assert (spared.compute, spared.reason, spared.accumulated) == (False, "unconditional", pytest.approx(1.3))
    assert guarded.decide(Step(2, 9, 2, None, "0", (slice(None),), 0), 0.5, state).compute
    assert guarded.decide(Step(4, 9, 4, None, "1", (slice(None),), 1), 0.5, state).compute


def test_where_it_cannot_be_done_it_says_so(pipe):
    stacked = reference.load("dit-digits")
    uncached = generate_two(stacked)
    dc.enable(stacked, "interval", every=1, unconditional_every=2)
    with pytest.raises(ConfigError, match="this pipeline stacks 2 in the rows of one call"):
        generate_two(stacked)
    dc.disable(stacked)
    assert torch.equal(generate_two(stacked), uncached)
    dc.enable(pipe, "interval", every=1, unconditional_every=2)
    with pytest.warns(DiffusionCacheWarning, match="there is one guidance branch in this run"):
        generate(pipe, guidance=1.0)
    dc.disable(pipe)
    with pytest.raises(ConfigError, match="unconditional_every must be at least 1"):
        dc.enable(pipe, "interval", unconditional_every=0)


def test_an_order_of_passes_that_says_otherwise_is_refused(pipe):
    denoiser = pipe.transformer
    with (
        dc.run(denoiser, "interval", every=1, unconditional_every=2, num_steps=2),
        pytest.raises(ConfigError, match="begins with 'uncond'"),
        denoiser.cache_context("uncond"),
    ):
        denoiser(torch.zeros(1, 1, 2, 8, 8), torch.tensor([1]), torch.zeros(1, 1, 1))


def test_the_same_sample_twice_is_no_stack_of_guidance_branches(pipe):
    inputs = reference.inputs(NAME, (3, 3), (5, 5), 3)
    with dc.cached(pipe, policy="interval", every=1, unconditional_every=2):
        pipe(**inputs)
        assert list(computed(pipe).values()) == [[0, 1, 2], [0, 2]]
