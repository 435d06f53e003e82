"""Measuring SenCache's norms, and deciding by them."""

from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import diffusion_cache as dc
from diffusion_cache import reference
from diffusion_cache.context import Past, Step, noise_share
from diffusion_cache.engine.structure import sample_of, with_sample
from diffusion_cache.errors import ConfigError
from diffusion_cache.policies import SenCache
from diffusion_cache.profiling.generation import Batch
from diffusion_cache.profiling.jacobian import _Norms, norms

NAME, STEPS = "flux-digits", 4


class Linear(nn.Module):
    """Its output moves 3 times as much as the sample, and by 5 over the whole range of time (flow: 1000)."""

    def forward(self, hidden_states, timestep, **others):
        return (3 * hidden_states + 5 * timestep.reshape(-1, 1, 1),)


@pytest.fixture(scope="module")
def pipe():
    return reference.load(NAME)


def batch(pipe, seeds=(5, 6), steps=STEPS):
    def call():
        return pipe(**reference.inputs(NAME, [seed % 10 for seed in seeds], seeds, steps))

    return Batch(pipe, call, lambda output: reference.images(NAME, output), len(seeds))


def test_norms_of_a_denoiser_whose_norms_are_known(pipe, monkeypatch):
    whole = pipe.transformer
    linear = Linear()
    monkeypatch.setattr(type(whole), "forward", lambda self, *args, **kwargs: linear(*args[:2], **_two(kwargs)))
    found = norms([batch(pipe), batch(pipe, (7,))])
    assert found.input_norm == pytest.approx((3.0,) * STEPS, rel=1e-4)
    assert found.time_norm == pytest.approx((5.0,) * STEPS, rel=1e-4)
    assert len(found.levels) == STEPS
    assert list(found.levels) == sorted(found.levels)


def _two(kwargs):
    return {name: kwargs[name] for name in ("hidden_states", "timestep") if name in kwargs}


def test_looking_changes_nothing_and_the_norms_bound_each_step(pipe):
    """|v_s − v_{s−1}| ≤ ‖J_z‖·|z_s − z_{s−1}| + |J_t|·|t_s − t_{s−1}|, of one sample; its policy says when."""
    calls = []
    hook = pipe.transformer.register_forward_hook(
        lambda module, args, kwargs, output: calls.append((sample_of(args, kwargs).clone(), output[0].clone())),
        with_kwargs=True,
    )
    one = batch(pipe, (5,))
    uncached = one.images(one.call())
    hook.remove()
    images = []
    found = norms([Batch(pipe, lambda: images.append(one.images(one.call())), lambda output: output, 1)])
    assert torch.equal(images[0], uncached)
    share = [noise_share(level) for level in found.levels]
    for step in range(1, STEPS):
        moved, changed = ((calls[step][i] - calls[step - 1][i]).square().mean().sqrt().item() for i in range(2))
        bound = found.input_norm[step] * moved
        bound += found.time_norm[step] * abs(share[step] - share[step - 1])
        assert changed <= bound * 1.001
    with dc.cached(pipe, policy="sencache", scope="denoiser", **asdict(found), threshold=1e9):
        one.call()
        assert dc.summary(pipe).reused == STEPS - 1


def test_a_pass_is_not_compared_across_steps_that_it_was_left_out_of():
    watching = _Norms()
    for index in (0, 2, 3):
        sample = torch.full((1, 4), 1.0 + index)
        step = Step(index, 4, index, 1.0 - index, "0", (slice(None),))
        frame = SimpleNamespace(called=((sample, None), {}), step=step, key=("transformer", "0"))
        watching.denoiser_called(frame, sample, lambda compute, given, sample=sample: sample)
    assert [step for step, found in watching.by_step.items() if found] == [3]


def signals(value, level):
    return {"input": torch.full((2, 3), value), "noise_level": torch.full((2,), level)}


def test_the_foretold_change_is_that_of_the_nearest_noise_level():
    policy = SenCache(input_norm=(1.0, 2.0), time_norm=(10.0, 20.0), levels=(-2.0, 2.0))
    past = Past(computed=signals(0.0, -3.0))
    for level, (by_input, by_time) in {-1.0: (1, 10), 1.0: (2, 20), float("inf"): (2, 20)}.items():
        passed = abs(noise_share(level) - noise_share(-3.0))
        expected = by_input * 0.5 + by_time * passed
        assert policy.measure(signals(0.5, level), past).tolist() == pytest.approx([expected] * 2)
    assert SenCache(input_norm=4.0, time_norm=0.0).measure(signals(0.5, 0.0), past).tolist() == [2.0, 2.0]


def test_it_computes_where_the_change_is_not_below_the_threshold():
    policy = SenCache(threshold=0.2)
    assert [policy.decide(None, value, None).compute for value in (None, 0.1, 0.2, float("nan"))] == [
        True,
        False,
        True,
        True,
    ]


@pytest.mark.parametrize(
    "options",
    [
        {"threshold": -1.0},
        {"input_norm": -1.0},
        {"input_norm": (1.0, 2.0)},
        {"time_norm": (1.0, 2.0, 3.0), "levels": (0.0, 1.0)},
        {"time_norm": float("nan")},
        {"input_norm": True},
        {"input_norm": ()},
        {"levels": "x"},
        {"levels": (float("nan"),)},
    ],
)
def test_options_that_cannot_be(options):
    with pytest.raises(ConfigError, match="sencache"):
        SenCache(**options)


def test_another_sample_takes_the_place_of_the_first():
    assert with_sample((1, 2), {"a": 3}, 9) == ((9, 2), {"a": 3})
    assert with_sample((1, 2), {"hidden_states": 3}, 9) == ((1, 2), {"hidden_states": 9})
    assert with_sample((), {"a": 3, "b": 4}, 9) == ((), {"a": 9, "b": 4})
