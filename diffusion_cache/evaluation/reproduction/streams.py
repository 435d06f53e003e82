"""Caches of streams, on rolling-digits: a window of frames at noise levels of their own moves over a video."""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ... import api
from ...chunks import Stream
from ...measure import quality
from ...reference import rolling
from ...reference.rolling import LAG, STEPS, WINDOW
from .claims import Outcome, SeedSet, claim

FRAMES = 16  # of each video
EVERY = 2  # calls of which one is computed
CLASSES = 10
METHOD: dict[str, Any] = {"policy": "interval", "every": EVERY, "forecaster": "taylor", "order": 1}


class Rolled(NamedTuple):
    """videos: of all samples. psnr: of their frames against the uncached ones, mean in dB. computed, calls: of the
    denoiser. cache_bytes: of one sample."""

    videos: Tensor
    psnr: float
    computed: int
    calls: int
    cache_bytes: int


@lru_cache(maxsize=1)
def model() -> nn.Module:
    return rolling.load()


def generated(seeds: SeedSet, run: Any = None, streams: bool = False, steps: int = STEPS, lag: int = LAG) -> Tensor:
    labels = [seed % CLASSES for seed in seeds.reporting]
    return rolling.generate(model(), labels, seeds.reporting, run, streams, FRAMES, steps, lag)


@lru_cache(maxsize=1)
def uncached(seeds: SeedSet) -> Tensor:
    return generated(seeds)


@lru_cache(maxsize=4)
def cached(seeds: SeedSet, stream: Stream | None) -> Rolled:
    """stream: None to cache by steps."""
    with api.run(model(), stream=stream, **METHOD) as run:
        videos = generated(seeds, run, stream is not None)
        summary = run.summary()
    psnr = quality(videos, uncached(seeds)).psnr_mean
    size = summary.cache_bytes // len(videos)
    return Rolled(videos, psnr, summary.computed, len(summary.records), size)


def outcome(seeds: SeedSet, other: str, psnr: float, calls: int) -> Outcome:
    """Whether a stream is nearer to the uncached videos than another way, for as many computed calls."""
    ours = cached(seeds, Stream())
    return Outcome(
        f"{ours.psnr:.2f} dB, {other} {psnr:.2f} dB",
        f"{ours.computed} and {calls} of {ours.calls} calls computed",
        ours.psnr > psnr and ours.computed <= calls,
        {"stream": ours.psnr, other: psnr, "stream: calls": ours.computed, f"{other}: calls": calls},
    )


@claim(
    system="streams",
    claim="In a moving window, forecasting each frame from the noise levels that it had beats forecasting by steps "
    f"(Taylor-1, {EVERY - 1} of {EVERY} calls computed).",
)
def levels_beat_steps(seeds: SeedSet) -> Outcome:
    other = cached(seeds, None)
    return outcome(seeds, "by steps", other.psnr, other.computed)


@claim(
    system="streams",
    claim="In a moving window, forecasting each frame from the noise levels that it had beats fewer sampler steps.",
)
def levels_beat_fewer_steps(seeds: SeedSet) -> Outcome:
    steps, lag = STEPS // EVERY, LAG // EVERY
    videos = generated(seeds, steps=steps, lag=lag)
    return outcome(seeds, "fewer steps", quality(videos, uncached(seeds)).psnr_mean, (FRAMES - 1) * lag + steps)


@claim(
    system="streams",
    claim="Features of as many frames as the window holds suffice: the videos are those of a cache that drops nothing.",
)
def dropping_what_has_left_changes_nothing(seeds: SeedSet) -> Outcome:
    bounded, all_kept = cached(seeds, Stream()), cached(seeds, Stream(capacity=FRAMES + WINDOW))
    difference = (bounded.videos - all_kept.videos).abs().max().item()
    sizes = bounded.cache_bytes, all_kept.cache_bytes
    return Outcome(
        f"largest difference {difference:.0e}; {sizes[0] / 2**10:.0f} KiB a video instead of {sizes[1] / 2**10:.0f}",
        f"{bounded.computed} and {all_kept.computed} of {bounded.calls} calls computed",
        torch.equal(bounded.videos, all_kept.videos) and sizes[0] < sizes[1],
        {"largest difference": difference, "bytes": sizes[0], "bytes of all": sizes[1]},
    )
