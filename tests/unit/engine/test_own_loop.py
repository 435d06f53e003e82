"""Runs of a user's own loop beside each other, in generators, and left in any order."""

import contextvars

import pytest
import torch
from torch import nn

import diffusion_cache as dc
from diffusion_cache import DiffusionCacheWarning
from diffusion_cache.engine.patches import ACTIVE

pytestmark = pytest.mark.filterwarnings("error::diffusion_cache.errors.DiffusionCacheWarning")

STEPS = 6
EVERY_SECOND = [True, False] * (STEPS // 2)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, hidden_states):
        return hidden_states + self.linear(hidden_states)


class Denoiser(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, hidden_states, timestep):
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return hidden_states


@pytest.fixture(autouse=True)
def nothing_left():
    with torch.no_grad():
        yield
    assert ACTIVE.get() is None


def called(model, step):
    return model(torch.full((1, 8), float(step)), torch.tensor([1 - step / STEPS]))


def computed(run):
    return [record.computed for record in run.summary().records]


def stream(model, found):
    """A generator that makes a step each time, as a server streams them."""
    with dc.run(model, "interval", every=2, num_steps=STEPS) as run:
        for step in range(STEPS):
            yield called(model, step)
        found.append(computed(run))


def test_a_loop_with_several_denoisers():
    models = Denoiser(), Denoiser(), Denoiser()
    with (
        dc.run(models[0], "interval", every=2, num_steps=STEPS) as first,
        dc.run(models[1], "interval", every=3, num_steps=STEPS) as second,
        dc.run(models[2], "interval", every=2, num_steps=STEPS // 2) as third,
    ):
        for step in range(STEPS):
            called(models[0], step)
            called(models[1], step)
            if step >= STEPS // 2:  # as of Wan 2.2, each for a range of noise levels
                called(models[2], step)
    assert computed(first) == EVERY_SECOND
    assert computed(second) == [True, False, False] * 2
    assert computed(third) == [True, False, True]


def test_a_run_within_another_of_the_same_denoiser():
    """A helper that runs the denoiser for itself, in the middle of a step."""
    model = Denoiser()
    with dc.run(model, "interval", every=2, num_steps=STEPS) as outer:
        for step in range(STEPS):
            called(model, step)
            if step == 2:
                with dc.run(model, "interval", every=3, num_steps=STEPS) as inner:
                    for own in range(STEPS):
                        called(model, own)
    assert computed(outer) == EVERY_SECOND
    assert computed(inner) == [True, False, False] * 2


def test_generators_of_two_denoisers_take_turns():
    found = []
    for _ in zip(stream(Denoiser(), found), stream(Denoiser(), found), strict=True):
        pass
    assert found[0] == EVERY_SECOND


def test_generators_of_one_denoiser_that_take_turns_are_told():
    model = Denoiser()
    turns = zip(stream(model, []), stream(model, []), strict=True)
    with pytest.warns(DiffusionCacheWarning, match="two runs of one denoiser took turns in one thread"):
        list(turns)


def test_a_generator_whose_steps_are_made_in_contexts_of_their_own_is_told():
    """All outputs are made; nothing is raised at the end."""
    model, found = Denoiser(), []
    generator = stream(model, found)
    outputs = [contextvars.Context().run(next, generator) for _ in range(STEPS)]
    with pytest.warns(DiffusionCacheWarning, match="left in another thread or task than it was entered in"):
        assert contextvars.Context().run(next, generator, None) is None
    for step, output in enumerate(outputs):
        assert torch.equal(output, called(model, step))
    assert found == [[True]]


@pytest.mark.parametrize("policy", [dict(policy="interval", every=6), dict(policy="first_block", threshold=1e9)])
def test_a_refreshed_run_computes_its_next_step(policy):
    model = Denoiser()
    with dc.run(model, num_steps=STEPS, last=0, forecaster="reuse", **policy) as run:
        for step in range(STEPS):
            if step == 3:
                run.refresh()
            called(model, step)
    assert computed(run) == [True, False, False, True, False, False]


def test_a_run_without_a_call_is_told():
    model = Denoiser()
    with (
        pytest.warns(DiffusionCacheWarning, match="the denoiser was not called in this run"),
        dc.run(model, "interval", every=2, num_steps=STEPS) as run,
    ):
        contextvars.Context().run(called, model, 0)
    assert any("was not called" in message for message in run.summary().warnings)
    # nothing is added to what went wrong
    with pytest.raises(KeyError), dc.run(model, "interval", every=2, num_steps=STEPS):
        raise KeyError
