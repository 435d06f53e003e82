"""Schedules planned from a profile: objectives at equal compute, and whether damages of single cells add up."""

import random
from collections.abc import Iterable
from functools import lru_cache

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor

from ... import api
from ...plan import Plan
from ...planning.static import evaluations, static_plan
from ...profile import Profile
from ...systems import DPCache, Fora, Laptop, LeMiCa, MeanCache, SmoothCache
from .bench import Bench, Ran
from .claims import Outcome, SeedSet, claim

MODEL, SAMPLES = "dit-digits", 8
BUDGETS = (17, 13, 10)  # of 50 steps
FEW_STEPS, FEW = 20, 4  # where many cells are run, steps and samples
CELLS, TOGETHER, JOINT = 24, 6, 12  # single cells, how many of them in a joint run, joint runs
ALPHAS = np.geomspace(0.01, 2.0, 60)

Cell = tuple[int, int]  # step and block


@lru_cache(maxsize=1)
def bench(seeds: SeedSet) -> Bench:
    return Bench(MODEL, seeds, count=SAMPLES)


@lru_cache(maxsize=1)
def small_bench(seeds: SeedSet) -> Bench:
    made = Bench(MODEL, seeds, count=FEW)
    made.subject.steps = FEW_STEPS
    return made


@lru_cache(maxsize=16)
def optimal(seeds: SeedSet, system: type[DPCache | MeanCache | LeMiCa], nfe: int) -> Ran:
    """All with Taylor-1, so that only the objective differs."""
    made = bench(seeds)
    profile = made.profile("stack", sensitivity_samples=2, sensitivity_steps=8)
    return made.run(method=system(nfe, order=1), profile=profile)


def compared(seeds: SeedSet, one: tuple[str, type], other: tuple[str, type]) -> Outcome:
    """Whether the first objective gives better samples than the second, on the mean over the budgets."""
    ours, compute, gains = [], [], []
    figures: dict[str, float] = {}
    for nfe in BUDGETS:
        runs = {name: optimal(seeds, system, nfe) for name, system in (one, other)}
        first, second = runs[one[0]], runs[other[0]]
        ours.append(f"NFE {nfe}: {first.mean:.2f} against {second.mean:.2f} dB")
        compute.append(f"NFE {nfe}: {first.work:.3f} and {second.work:.3f} of the uncached FLOPs")
        figures |= {f"{name}_{nfe}": ran.mean for name, ran in runs.items()}
        figures |= {f"{name}_work_{nfe}": ran.work for name, ran in runs.items()}
        figures |= {f"{name}_worst_{nfe}": min(ran.psnr) for name, ran in runs.items()}
        gains.append(first.mean - second.mean if abs(first.work - second.work) < 1e-6 else -np.inf)
    return Outcome("; ".join(ours), "; ".join(compute), float(np.mean(gains)) > 0, figures)


@claim(
    system="lemica",
    claim="At equal NFE, the schedule of the smallest worst damage gives better samples than that of the smallest sum.",
    published="LPIPS .143 against .203",
)
def minimax_beats_sum(seeds: SeedSet) -> Outcome:
    return compared(seeds, ("minimax", LeMiCa), ("sum", DPCache))


@claim(
    system="meancache",
    claim="At equal NFE, the smallest sum of squared damages gives better samples than the smallest sum.",
)
def power_beats_sum(seeds: SeedSet) -> Outcome:
    return compared(seeds, ("power", MeanCache), ("sum", DPCache))


@claim(
    system="dpcache",
    claim="A schedule by dynamic programming beats evenly spaced steps with the same forecaster.",
)
def planned_beats_even(seeds: SeedSet) -> Outcome:
    made, ours, compute, holds = bench(seeds), [], [], True
    figures: dict[str, float] = {}
    for every in (3, 5):
        even = made.run(policy="interval", every=every, forecaster="taylor", scope="stack")
        planned = optimal(seeds, DPCache, round(even.nfe))
        ours.append(f"NFE {even.nfe:g}: {planned.mean:.2f} against {even.mean:.2f} dB")
        compute.append(f"NFE {even.nfe:g}: {planned.work:.3f} and {even.work:.3f} of the uncached FLOPs")
        figures |= {f"planned_{every}": planned.mean, f"even_{every}": even.mean}
        holds &= planned.mean > even.mean and planned.work <= even.work + 1e-6
    return Outcome("; ".join(ours), "; ".join(compute), holds, figures)


@claim(
    system="smooth_cache",
    claim="Lags that follow the layers' changes beat FORA's fixed interval at no more compute.",
)
def smooth_lags_beat_an_interval(seeds: SeedSet) -> Outcome:
    made, ours, compute, holds = bench(seeds), [], [], True
    figures: dict[str, float] = {}
    profile = made.profile("branch", sensitivity_samples=0)
    for every in (2, 3):
        fixed = made.run(method=Fora(every))
        budget = evaluations(profile, np.arange(profile.total) % every == 0)
        fitting = [
            system
            for system in (SmoothCache(alpha, max_lag=2 * every) for alpha in ALPHAS)
            if system.plan(profile).nfe <= budget + 1e-9
        ]
        smooth = made.run(method=fitting[0], profile=profile)
        ours.append(f"N = {every}: {smooth.mean:.2f} (α {fitting[0].alpha:.2g}) against {fixed.mean:.2f} dB")
        compute.append(f"N = {every}: {smooth.work:.3f} and {fixed.work:.3f} of the uncached FLOPs")
        figures |= {f"smooth_{every}": smooth.mean, f"fora_{every}": fixed.mean}
        figures |= {f"smooth_work_{every}": smooth.work, f"fora_work_{every}": fixed.work}
        holds &= smooth.mean > fixed.mean and smooth.work <= fixed.work + 1e-6
    return Outcome("; ".join(ours), "; ".join(compute), holds, figures)


def reusing(profile: Profile, cells: Iterable[Cell]) -> Plan:
    """Everything computed but these cells."""
    computed = np.ones((profile.total, len(profile.spans)), dtype=bool)
    computed[tuple(np.array(sorted(cells)).T)] = False
    return static_plan(profile, "cells", computed)


def final_error(made: Bench, plan: Plan, latents: Tensor) -> float:
    """Root mean square over samples of the relative error of the last latents."""
    with torch.no_grad(), api.cached(made.subject.pipe, plan=plan):
        found = made.subject.generate(made.fitting).latents
    relative = (found - latents).flatten(1).norm(dim=1) / latents.flatten(1).norm(dim=1)
    return float(relative.square().mean().sqrt())


@claim(
    system="laptop",
    claim="The squared final errors of single reused cells (step, block) predict that of reusing them together.",
)
def damages_add_up(seeds: SeedSet) -> Outcome:
    made, draw = small_bench(seeds), random.Random(seeds.index)
    profile = made.profile("block", sensitivity_samples=2, sensitivity_steps=4)
    latents = made.subject.generate(made.fitting).latents
    blocks = len(profile.spans)
    # every other step, so that each cell reuses together what it reused alone
    cells = draw.sample([(step, block) for step in range(1, profile.total, 2) for block in range(blocks)], CELLS)
    alone = {cell: final_error(made, reusing(profile, [cell]), latents) ** 2 for cell in cells}
    sums, joints = [], []
    for _ in range(JOINT):
        chosen = draw.sample(cells, TOGETHER)
        sums.append(sum(alone[cell] for cell in chosen))
        joints.append(final_error(made, reusing(profile, chosen), latents) ** 2)
    correlation = float(np.corrcoef(np.sqrt(sums), np.sqrt(joints))[0, 1])
    ratio = float(np.mean(np.array(joints) / np.array(sums)))
    return Outcome(
        f"correlation {correlation:.3f}, joint {ratio:.2f} times the sum",
        f"{TOGETHER} of {blocks * profile.total} cells reused in each of {JOINT} joint runs",
        correlation >= 0.9 and 0.5 <= ratio <= 2,
        {"correlation": correlation, "rank": float(spearmanr(sums, joints)[0]), "ratio": ratio},
    )


@claim(
    system="laptop",
    claim="Cells (step, block) chosen by knapsack beat as many random ones of each block.",
)
def knapsack_beats_random_cells(seeds: SeedSet) -> Outcome:
    made, draw = small_bench(seeds), random.Random(seeds.index)
    profile = made.profile("block", sensitivity_samples=2, sensitivity_steps=4)
    plan = Laptop(keep=0.5).plan(profile)
    counts = plan.computed()[:, 0].sum(dim=0).tolist()
    picked = np.zeros((profile.total, len(counts)), dtype=bool)
    for block, count in enumerate(counts):
        picked[[0, *draw.sample(range(1, profile.total), int(count) - 1)], block] = True
    runs = {
        "knapsack": made.run(plan=plan),
        "random": made.run(plan=static_plan(profile, "random", picked)),
        "whole steps": made.run(method=DPCache(plan.nfe, order=0), profile=profile),
    }
    return Outcome(
        ", ".join(f"{name} {ran.mean:.2f} dB" for name, ran in runs.items()),
        ", ".join(f"{name} {ran.work:.3f}" for name, ran in runs.items()) + " of the uncached FLOPs",
        runs["knapsack"].mean > runs["random"].mean and abs(runs["random"].work - runs["knapsack"].work) < 1e-3,
        {key: ran.mean for key, ran in runs.items()} | {f"{key} work": ran.work for key, ran in runs.items()},
    )
