"""What policies go by: SeaCache's signal against simpler ones, and how alike prompts are in MagCache's ratios."""

import math
from functools import lru_cache
from statistics import fmean

import numpy as np
from scipy.stats import pearsonr, spearmanr

from ...policies import MagCache
from ...profile import Profile
from ...profiling.measure import Options, measure
from ..subjects import Shipped, batches_of
from .bench import CLASSES, Bench
from .claims import Outcome, SeedSet, claim

FLOW, VIDEO, SAMPLES = "flux-digits", "wan-moving-digits", 4
ALIKE = 0.9  # Pearson's correlation
THRESHOLDS = np.geomspace(0.005, 2.0, 400)
BUDGET = 16  # computed steps of 40
LOSS = 0.5  # dB


@lru_cache(maxsize=4)
def profiles(model: str, scope: str, seeds: SeedSet) -> tuple[Profile, ...]:
    """Of each sample alone."""
    subject = Shipped(model)
    found = []
    for seed in seeds.reporting[:SAMPLES]:
        options = Options(scope=scope, sensitivity_samples=0)
        profile = measure(batches_of(subject, subject.steps), [(str(seed % CLASSES), seed)], options)
        assert profile is not None
        found.append(profile)
    return tuple(found)


def output_change(profile: Profile) -> np.ndarray:
    """Relative L2 change of the first pass's output from each step to the next: [T − 1]."""
    gram = profile.arrays["gram_output"][0, 0].double().numpy()
    energy = np.diagonal(gram)
    return np.sqrt(energy[1:] + energy[:-1] - 2 * np.diagonal(gram, 1)) / np.sqrt(energy[:-1])


def correlated(model: str, seeds: SeedSet) -> Outcome:
    """Of three signals with the output's change over a run's steps, the mean over samples of Spearman's correlation."""
    found: dict[str, list[float]] = {"filtered input": [], "raw input": [], "lagging residual": []}
    for profile in profiles(model, "denoiser", seeds):
        change = output_change(profile)[1:]  # of the steps from the second on, which have a change before them
        curves = {
            name: profile.arrays[name][0, 0].double().numpy() for name in ("filtered_l1", "input_l1", "residual_l1")
        }
        signals = (curves["filtered_l1"][2:], curves["input_l1"][2:], curves["residual_l1"][1:-1])
        for values, signal in zip(found.values(), signals, strict=True):
            values.append(float(spearmanr(signal, change).statistic))
    means = {name: fmean(values) for name, values in found.items()}
    return Outcome(
        ", ".join(f"{name} {value:.2f}" for name, value in means.items()),
        "no cached run",
        means["filtered input"] > max(means["raw input"], means["lagging residual"]),
        means,
    )


SIGNAL = "correlates with the output's change better (Spearman) than the raw input and the last step's residual do."
FIGURES = ".51, raw input −.36, lagging residual .16 (in one study)"
UNKNOWN = "Why was not found: on these small models the raw input's change goes with the output's closely by itself."


@claim(
    system="seacache",
    claim=f"On a flow model of images, the filtered input {SIGNAL}",
    published=FIGURES,
    reason=UNKNOWN,
)
def filtered_input_tells_the_change(seeds: SeedSet) -> Outcome:
    return correlated(FLOW, seeds)


@claim(
    system="seacache",
    claim=f"On a flow model of videos, the filtered input {SIGNAL}",
    published=FIGURES,
    reason=UNKNOWN,
)
def filtered_input_tells_the_change_of_videos(seeds: SeedSet) -> Outcome:
    return correlated(VIDEO, seeds)


@claim(
    system="magcache",
    claim=f"Ratios of norms are alike over prompts: Pearson's correlation above {ALIKE}, mean over pairs.",
    published="one prompt is enough to measure them",
)
def ratios_are_alike(seeds: SeedSet) -> Outcome:
    curves = {
        model: [profile.arrays["norm_ratio"][0, 0, 1:].double().numpy() for profile in profiles(model, "stack", seeds)]
        for model in (FLOW, VIDEO)
    }
    alike, spread = {}, {}
    for model, found in curves.items():
        pairs = [(a, b) for place, a in enumerate(found) for b in found[:place]]
        alike[model] = fmean(float(pearsonr(a, b).statistic) for a, b in pairs)
        spread[model] = float(np.std(found, axis=0).mean())
    return Outcome(
        ", ".join(f"{model} {value:.2f}, standard deviation {spread[model]:.4f}" for model, value in alike.items()),
        "no cached run",
        min(alike.values()) > ALIKE,
        alike | {f"{model} spread": value for model, value in spread.items()},
    )


@claim(
    system="magcache",
    claim=f"A schedule from the ratios of one prompt is as good, within {LOSS} dB, as from those of {SAMPLES}.",
    published="one prompt is enough to measure them",
    reason="It misses the bound, which was set beforehand, by 0.1 dB on one set of seeds; on another one "
    "prompt's ratios are the better ones.",
)
def one_prompt_is_enough(seeds: SeedSet) -> Outcome:
    made = Bench(FLOW, seeds, count=SAMPLES)
    found = {
        count: by_nfe(Bench(FLOW, seeds, count=count).profile("stack", sensitivity_samples=0)) for count in (1, SAMPLES)
    }
    nfe = max(nfe for nfe in found[1] if nfe in found[SAMPLES] and nfe <= BUDGET)
    runs = {
        count: made.run(policy=policies[nfe], forecaster="reuse", scope="stack") for count, policies in found.items()
    }
    one, several = runs.values()
    return Outcome(
        ", ".join(f"ratios of {count}: {ran.mean:.2f} dB" for count, ran in runs.items()),
        f"NFE {nfe:g}: {one.work:.3f} and {several.work:.3f} of the uncached FLOPs",
        one.mean > several.mean - LOSS and math.isclose(one.work, several.work, rel_tol=1e-6),
        {f"ratios of {count}": ran.mean for count, ran in runs.items()} | {"nfe": nfe},
    )


def by_nfe(profile: Profile) -> dict[float, MagCache]:
    """For each number of computed steps the policy with the smallest threshold."""
    found: dict[float, MagCache] = {}
    for threshold in THRESHOLDS.tolist():
        policy = MagCache.from_profile(profile, threshold=threshold, max_skip=6, retention=0.1)
        found.setdefault(policy.schedule(profile.total).nfe, policy)
    return found
