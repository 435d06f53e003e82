"""Streams: chunks of one call at noise levels of their own, in a pipeline and in sliding windows."""

import contextvars

import pytest
import torch
from diffusers import SkyReelsV2Transformer3DModel
from pipelines_video import WAN_CASES
from torch import nn

import diffusion_cache as dc
from diffusion_cache.errors import ConfigError

WINDOW, LAG = 4, 3  # chunks of a call, and the steps that each is behind the one before
LEVELS = [1000.0, 960.0, 910.0, 850.0, 780.0, 700.0, 600.0, 480.0, 340.0, 180.0, 80.0, 20.0]


def case(name, variant=""):
    return next(case for case in WAN_CASES if case.pipeline == name and case.variant == variant)


@pytest.fixture(scope="module")
def asynchronous():
    found = case("SkyReelsV2DiffusionForcingPipeline", "asynchronous")
    pipe = found.build()

    def generate():
        return torch.as_tensor(found.generate(pipe))

    return pipe, generate


class Linear(nn.Module):
    """x + level·x², for each latent frame by its own level: in a chunk, linear in the level and nothing else."""

    def forward(self, hidden_states, timestep):
        return hidden_states + timestep[:, None, :, None, None] / 1000 * hidden_states**2


def video(chunks=40):
    return torch.randn(2, 1, chunks, 2, 2, generator=torch.Generator().manual_seed(3))


def windows(calls):
    """What each call holds: the first chunk always, and a window that moves on whenever its first chunk is clean."""
    ages = [LAG * (WINDOW - 1 - place) for place in range(WINDOW)]
    first = 1
    for _ in range(calls):
        numbers = [0, *range(first, first + WINDOW)]
        yield numbers, torch.tensor([[0.0, *(LEVELS[age] for age in ages)]] * 2)
        ages = [age + 1 for age in ages]
        if ages[0] == len(LEVELS):
            ages, first = [*ages[1:], 0], first + 1


def stream(model, calls=30, **options):
    """Each call's numbers, whether it was reused, and its chunks' largest relative errors."""
    sample, found = video(), []
    with dc.run(model, scope="denoiser", stream=dc.Stream(sinks=1), **options) as run:
        for numbers, levels in windows(calls):
            run.chunks(numbers)
            made = model(sample[:, :, numbers], timestep=levels)
            run.next_step()
            error = (made - Linear()(sample[:, :, numbers], levels)).abs().amax(dim=(0, 1, 3, 4))
            found.append((numbers, not run.summary().records[-1].computed, error))
        return found, run.summary()


def test_always_computing_changes_and_stores_nothing(asynchronous):
    pipe, generate = asynchronous
    uncached = generate()
    with dc.cached(pipe, policy="interval", every=1, stream=dc.Stream()):
        assert torch.equal(generate(), uncached)
        assert dc.summary(pipe).reused == 0
        assert dc.summary(pipe).cache_bytes == 0
    assert torch.equal(generate(), uncached)
