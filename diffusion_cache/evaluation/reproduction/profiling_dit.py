"""ProfilingDiT's claims on wan-moving-digits, whose foreground (the digit) is known."""

import random
from collections.abc import Iterable
from functools import lru_cache
from statistics import fmean

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor

from ...forecasters import Reuse
from ...policies import Mask
from ...profile import Profile
from ...profiling.foreground import latent_motion
from ...systems import ProfilingDiT
from .bench import Bench, Ran
from .claims import Outcome, SeedSet, claim

MODEL, SAMPLES = "wan-moving-digits", 6
DRAWS = 2  # of random blocks
GRID = (7, 4, 4)  # frames, height and width of the tokens
BRIGHT, COVERED = 0.45, 0.25  # no background is as bright; share of a token's pixels that makes it foreground
SAME_WORK = 0.01


@lru_cache(maxsize=1)
def _bench(seeds: SeedSet) -> Bench:
    return Bench(MODEL, seeds, count=SAMPLES)


def _profile(bench: Bench) -> Profile:
    return bench.profile("block", foreground="motion", sensitivity_samples=0)


def _ran(bench: Bench, blocks: Iterable[int], system: ProfilingDiT) -> Ran:
    """The blocks reused between the system's refreshed steps."""
    profile = _profile(bench)
    refreshed = system.refreshed(profile.total)
    mask = "".join(str(int(step in refreshed)) for step in range(profile.total))
    policy = Mask(mask, [profile.spans[block].name for block in sorted(blocks)])
    return bench.run(policy=policy, forecaster=Reuse(), scope="block")


def _work(runs: Iterable[Ran]) -> tuple[str, bool]:
    """What runs have spent, in words, and whether it is the same."""
    work = [ran.work for ran in runs]
    text = f"{min(work):.3f} to {max(work):.3f} of the uncached FLOPs"
    return text, max(work) - min(work) < SAME_WORK


def _ranks(a: np.ndarray, b: np.ndarray) -> float:
    return float(spearmanr(a, b).statistic)


@claim(
    system="profiling_dit",
    claim="At equal FLOPs, caching background blocks harms less than random ones, those less than foreground blocks",
    published="LPIPS background .1203, foreground .1449 (HunyuanVideo)",
    reason="R does not say here how much harm a block's reuse does. The smallest R have the first and the last blocks, "
    "and the first ones harm most: reused alone, blocks 0, 1 and 2 give 35.2, 37.0 and 38.5 dB. How far a block's Δ "
    "moves between refreshes hardly goes with R (rank correlation 0.2; all on seeds 0).",
)
def background_random_foreground(seeds: SeedSet) -> Outcome:
    bench = _bench(seeds)
    profile = _profile(bench)
    shares = profile.arrays["foreground_share"].mean(1)
    system, count = ProfilingDiT(background=0.5), len(shares) // 2
    ranked = shares.argsort().tolist()
    draws = random.Random(seeds.index)
    background, foreground = (_ran(bench, blocks, system) for blocks in (ranked[:count], ranked[-count:]))
    drawn = [_ran(bench, draws.sample(ranked, count), system) for _ in range(DRAWS)]
    errors = [fmean(background.error), fmean(fmean(ran.error) for ran in drawn), fmean(foreground.error)]
    spent, equal = _work([background, foreground, *drawn])
    drift = _drift(profile, system)
    return Outcome(
        ours="relative error of the latents: "
        + ", ".join(
            f"{name} {error:.4f}" for name, error in zip(("background", "random", "foreground"), errors, strict=True)
        ),
        equal_compute=spent,
        holds=equal and errors[0] < errors[1] < errors[2],
        figures={
            **dict(zip(("error_background", "error_random", "error_foreground"), errors, strict=True)),
            "psnr_background": background.mean,
            "psnr_foreground": foreground.mean,
            "rank_of_share_with_drift": _ranks(shares.numpy(), drift),
        },
    )


def _drift(profile: Profile, system: ProfilingDiT) -> np.ndarray:
    """How much each block's Δ differs at reused steps from the one that is reused, ‖R_s − R_c‖² summed, [S]."""
    gram = profile.arrays["gram_residual"].double().sum(1)
    refreshed = system.refreshed(profile.total)
    total = torch.zeros(len(gram), dtype=torch.float64)
    for step in range(profile.total):
        last = max(at for at in refreshed if at <= step)
        total += gram[:, step, step] + gram[:, last, last] - 2 * gram[:, step, last]
    return total.numpy()


@claim(
    system="profiling_dit",
    claim="A refresh interval that shrinks does less harm than a fixed one, and that less than one that grows",
    published="LPIPS .1203, .1571, .2529 (HunyuanVideo)",
    reason="The first interval of 12 steps, right after the full ones, is what loses: from 9 to 3 steps the error is "
    ".0912 and from 7 to 5 .0895, below the fixed interval's .0981 (seeds 0; seeds 1 alike). That growing intervals "
    "are the worst holds.",
)
def interval_shapes(seeds: SeedSet) -> Outcome:
    bench = _bench(seeds)
    # as many refreshes each
    shapes = {
        "decreasing": ProfilingDiT(interval_from=12, interval_to=2),
        "fixed": ProfilingDiT(interval_from=6, interval_to=6),
        "increasing": ProfilingDiT(interval_from=3, interval_to=12),
    }
    blocks = shapes["fixed"].background_blocks(_profile(bench))
    runs = {name: _ran(bench, blocks, system) for name, system in shapes.items()}
    errors = {name: fmean(ran.error) for name, ran in runs.items()}
    spent, equal = _work(runs.values())
    return Outcome(
        ours="relative error of the latents: " + ", ".join(f"{name} {error:.4f}" for name, error in errors.items()),
        equal_compute=spent,
        holds=equal and errors["decreasing"] < errors["fixed"] < errors["increasing"],
        figures={f"error_{name}": error for name, error in errors.items()},
    )


@claim(
    system="profiling_dit",
    claim="The order of blocks by R is the same at all steps: Spearman's rank correlation above 0.8, mean over pairs",
    published="R is stable across steps",
    reason="The order is kept from step to step (0.98) and through the first half of the run (0.98), and drifts in the "
    "second, where little noise is left. The mask is not why: with the true digits it is 0.58, as with motion; "
    "nor alone the top fraction: with half of the tokens as the most attended ones it is 0.73 (seeds 0).",
)
def order_is_stable(seeds: SeedSet) -> Outcome:
    shares = _profile(_bench(seeds)).arrays["foreground_share"].numpy()
    between = spearmanr(shares).statistic
    steps = shares.shape[1]
    pairs = between[np.triu_indices(steps, 1)]
    neighbours = float(np.diagonal(between, 1).mean())
    mean = float(pairs.mean())
    early = float(between[: steps // 2, : steps // 2][np.triu_indices(steps // 2, 1)].mean())
    return Outcome(
        ours=f"{mean:.2f} over all pairs of steps, {early:.2f} within the first half, {neighbours:.2f} of neighbours",
        equal_compute="no cached run",
        holds=mean > 0.8,
        figures={"pairs": mean, "first_half": early, "neighbours": neighbours, "least": float(pairs.min())},
    )


@claim(
    system="profiling_dit",
    claim="The latent-motion foreground sorts blocks as the true one does: Spearman above 0.8, and 9 of 10 classes",
    published="(ours: the paper segments the finished video)",
    reason="",
)
def motion_stands_for_the_foreground(seeds: SeedSet) -> Outcome:
    bench = _bench(seeds)
    output = bench.subject.generate(bench.fitting)
    found, truth = latent_motion(output.latents, GRID), digits(output.images)
    by_motion = _profile(bench).arrays["foreground_share"].mean(1)
    by_truth = bench.profile("block", foreground=truth, sensitivity_samples=0).arrays["foreground_share"].mean(1)
    system = ProfilingDiT()
    same = {*system.classified(by_motion)} ^ {*system.classified(by_truth)}
    ranks = _ranks(by_motion.numpy(), by_truth.numpy())
    agreeing = 1 - len(same) / len(by_truth)
    tokens = float((found == truth).float().mean())
    return Outcome(
        ours=f"Spearman {ranks:.2f}, {agreeing:.0%} of the classes, {tokens:.0%} of the tokens",
        equal_compute="no cached run",
        holds=ranks > 0.8 and agreeing >= 0.9,
        figures={"ranks": ranks, "classes": agreeing, "tokens": tokens},
    )


def digits(images: Tensor) -> Tensor:
    """The tokens of generated videos that show the digit: bool [n, N]; images: [n, frames, 1, h, w] in [0, 1]."""
    bright = (images.movedim(2, 1) > BRIGHT).float()
    return F.adaptive_avg_pool3d(bright, GRID).flatten(1) > COVERED
