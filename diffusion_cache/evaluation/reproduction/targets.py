"""Thresholds that are searched for a share of steps to reuse, on flux-digits."""

from statistics import fmean

import torch

from ... import api
from .bench import Bench
from .claims import Outcome, SeedSet, claim

MODEL, SAMPLES = "flux-digits", 4
REUSE, OFF = 0.5, 1.0  # share of the steps, and how many steps a mean may be off it
POLICIES = ("first_block", "teacache")


@claim(
    system="target_reuse",
    claim=f"A threshold searched for a share of steps reuses as many with other seeds, the mean within {OFF:g} step.",
)
def search_hits_its_target(seeds: SeedSet) -> Outcome:
    made = Bench(MODEL, seeds, count=SAMPLES)
    subject = made.subject
    wanted = REUSE * subject.steps
    found = {}
    for policy in POLICIES:
        inputs = subject.inputs(made.fitting, subject.steps)
        threshold = api.tune(subject.pipe, inputs, policy, "reuse", target_reuse=REUSE).value
        counts = []
        with torch.no_grad(), api.cached(subject.pipe, policy, "reuse", threshold=threshold):
            for sample in made.reporting:  # each by itself, as a call of several is one record
                subject.generate([sample])
                counts.append(api.summary(subject.pipe).reused)
        found[policy] = counts
    means = {policy: fmean(counts) for policy, counts in found.items()}
    return Outcome(
        ", ".join(f"{policy} {means[policy]:.2f} ({min(counts)} to {max(counts)})" for policy, counts in found.items())
        + f" of {subject.steps} steps reused, {wanted:g} wanted",
        "thresholds were searched with seeds of their own",
        all(abs(mean - wanted) <= OFF for mean in means.values()),
        means,
    )
