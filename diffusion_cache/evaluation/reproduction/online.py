"""Policies that decide by what they see, on flux-digits, at equal work; and how samples are decided on."""

import math
from functools import lru_cache
from typing import Any

import torch

from ... import api
from ...planning.build import psnr
from .bench import Bench, Ran
from .claims import Outcome, SeedSet, claim

MODEL, SAMPLES = "flux-digits", 4
WORK = 0.4  # of the uncached FLOPs
NEAR, TRIES = 0.02, 8  # how near to the work a threshold must come, relative to it, and in how many tries
SLOPE = -1.5  # how the work's logarithm moves that of the threshold, as long as nothing is known of it
SEEN, UNSEEN = 60.0, 90.0  # dB below which an image has changed, and above which only rounding has
COST = 0.5  # dB

MIXED = f"The sets of seeds, of {SAMPLES} samples each, do not agree. What decides was not looked into."

# each as its paper has it, TeaCache without a polynomial, and the threshold that is tried first
POLICIES: dict[str, tuple[dict[str, Any], float]] = {
    "first_block": ({"scope": "stack"}, 0.08),
    "teacache": ({"scope": "stack", "last": 1}, 0.07),
    "seacache": ({"scope": "stack"}, 0.1),
    "easycache": ({"scope": "denoiser"}, 0.03),
    "dicache": ({"scope": "stack", "corrector": "alignment"}, 0.01),
}


@lru_cache(maxsize=1)
def bench(seeds: SeedSet) -> Bench:
    return Bench(MODEL, seeds, count=SAMPLES)


@lru_cache(maxsize=16)
def adaptive(seeds: SeedSet, policy: str, sync: str = "immediate") -> Ran:
    """With the threshold that spends WORK, which is all that the reported samples decide of it."""
    options, threshold = POLICIES[policy]
    tried: list[tuple[float, Ran]] = []
    slope = SLOPE
    for _ in range(TRIES):
        ran = bench(seeds).run(policy=policy, forecaster="reuse", threshold=threshold, sync=sync, **options)
        if tried and tried[-1][1].work != ran.work:
            before, other = tried[-1]
            slope = min(math.log(threshold / before) / math.log(ran.work / other.work), SLOPE / 3)
        tried.append((threshold, ran))
        if abs(ran.work / WORK - 1) <= NEAR:
            break
        threshold *= (WORK / ran.work) ** slope
    return min((ran for _, ran in tried), key=lambda ran: abs(ran.work / WORK - 1))


def is_equal(a: Ran, b: Ran) -> bool:
    """Whether two runs have spent as much, as nearly as thresholds let them."""
    return abs(a.work - b.work) <= 2 * NEAR * WORK


def told(runs: dict[str, Ran]) -> str:
    return ", ".join(f"{name} {ran.mean:.2f} dB" for name, ran in runs.items())


def spent(runs: dict[str, Ran]) -> str:
    return ", ".join(f"{name} {ran.work:.3f}" for name, ran in runs.items()) + " of the uncached FLOPs"


def figures(runs: dict[str, Ran]) -> dict[str, float]:
    return {name: ran.mean for name, ran in runs.items()} | {f"{name} work": ran.work for name, ran in runs.items()}


def against(one: str, other: str, seeds: SeedSet) -> Outcome:
    """Whether the first has better samples, having spent as much."""
    runs = {name: adaptive(seeds, name) for name in (one, other)}
    a, b = runs.values()
    return Outcome(told(runs), spent(runs), a.mean > b.mean and is_equal(a, b), figures(runs))


@claim(
    system="easycache",
    claim="EasyCache beats TeaCache (without a polynomial) at equal work.",
    published="PSNR up to 36% above the best method before it (videos)",
    reason=MIXED,
)
def easycache_beats_teacache(seeds: SeedSet) -> Outcome:
    return against("easycache", "teacache", seeds)


@claim(
    system="dicache",
    claim="DiCache, with its alignment, beats FBCache, whose probe is as large, at equal work.",
    published="faster, and nearer to the uncached output, than the methods before it",
)
def dicache_beats_first_block(seeds: SeedSet) -> Outcome:
    return against("dicache", "first_block", seeds)


@claim(
    system="seacache",
    claim="SeaCache beats TeaCache (without a polynomial) at equal work.",
    published="a better trade-off of latency and quality",
    reason=MIXED,
)
def seacache_beats_teacache(seeds: SeedSet) -> Outcome:
    return against("seacache", "teacache", seeds)


@claim(
    system="first_block",
    claim="FBCache, whose signal costs a block at every step, beats TeaCache (without a polynomial), whose does not.",
    reason="A probe of one block of eleven leaves fewer computed steps at equal work. Whether that is all of "
    "it was not looked into.",
)
def first_block_beats_teacache(seeds: SeedSet) -> Outcome:
    return against("first_block", "teacache", seeds)


@claim(
    system="teacache",
    claim="Each online policy, with reuse, beats evenly spaced steps at equal work.",
    reason="SeaCache does on every set. Policies that run a block as a probe have fewer computed steps to "
    "spend; for the others, what decides was not looked into.",
)
def online_policies_beat_even_steps(seeds: SeedSet) -> Outcome:
    made = bench(seeds)
    even = made.run(policy="spaced", share=WORK, forecaster="reuse", scope="stack")
    runs = {name: adaptive(seeds, name) for name in POLICIES}
    every = {"even": even, **runs}
    holds = all(ran.mean > even.mean and is_equal(ran, even) for ran in runs.values())
    return Outcome(told(every), spent(every), holds, figures(every))


@claim(
    system="teacache",
    claim=f"Deciding by the signal of the step before (lagged) costs at most {COST} dB at equal work.",
    reason="A decision that comes a step late computes after the change that asks for it. FBCache, which does not add "
    "changes up, loses most.",
)
def lagged_decisions_cost_little(seeds: SeedSet) -> Outcome:
    pairs = {name: (adaptive(seeds, name, "lagged"), adaptive(seeds, name)) for name in ("first_block", "teacache")}
    runs: dict[str, Ran] = {}
    for name, (lagged, immediate) in pairs.items():
        runs |= {f"{name} lagged": lagged, name: immediate}
    holds = all(b.mean - a.mean <= COST and is_equal(a, b) for a, b in pairs.values())
    return Outcome(told(runs), spent(runs), holds, figures(runs))


@claim(
    system="first_block",
    claim="Decisions for whole batches let neighbours change an image; those for single samples never do.",
    reason=f"Images did change on every set, on one of them by less than the {SEEN:g} dB set beforehand as the "
    "bound; with decisions for single samples all were the same to the bit.",
)
def neighbours_change_an_image_under_batch_decisions(seeds: SeedSet) -> Outcome:
    made = bench(seeds)
    options, threshold = POLICIES["first_block"]
    common = {"policy": "first_block", "forecaster": "reuse", "threshold": threshold, **options}
    with torch.no_grad(), api.cached(made.subject.pipe, **common):
        alone = torch.cat([made.subject.generate([sample]).images for sample in made.reporting])
    runs = {how: made.run(granularity=how, **common) for how in ("sample", "batch")}
    same = {how: min(psnr(ran.images, alone)) for how, ran in runs.items()}
    return Outcome(
        "least PSNR of an image to the same one generated alone: "
        + ", ".join(f"{how} {value:.1f} dB" for how, value in same.items()),
        spent(runs),
        same["sample"] > UNSEEN and same["batch"] < SEEN,
        figures(runs) | {f"{how} alone": value for how, value in same.items()},
    )
