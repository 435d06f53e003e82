"""Choosing a plan by the prompt, against the one plan that is best on average."""

from statistics import fmean

import torch

from ...context import Condition
from ...planning.select import see, with_selector
from ...planning.static import static_plan
from ...policies.select import Select
from ...profiling.generation import teach
from ...schedule import spaced
from ...systems import Selection
from ..prompts import Sample
from .bench import CLASSES, Bench
from .claims import Outcome, SeedSet, claim

MODEL, COMPUTED = "dit-digits", 7
EXPONENTS = (0.6, 1.0, 1.5)  # how the computed steps of each plan are spaced
EQUAL = 1e-6  # dB that rounding makes
CALLS = 3  # calibration batches: every class with so many seeds


@claim(
    system="select",
    claim="Choosing among plans of equal NFE by the class gives a higher mean PSNR than the single best plan",
    published="",
    reason="One spacing of the steps suits nearly every class: leave-one-out keeps nothing of the class but the mean, "
    "so that the best plan on average is always taken. Chosen with hindsight for each sample, the plans would gain 0.2 "
    "to 1.7 dB.",
)
def selected_against_best_single(seeds: SeedSet) -> Outcome:
    bench = Bench(MODEL, seeds)
    profile = bench.profile("stack", sensitivity_samples=0)
    plans = [
        static_plan(profile, f"spaced-{exponent:g}", _marked(profile.total, exponent), order=1)
        for exponent in EXPONENTS
    ]
    teachers = [teach(bench.batch(_of_each_class(seeds, call))) for call in range(CALLS)]
    learned = with_selector(profile.with_plans(plans), see(teachers, plans))
    policy = Selection().parts(learned).policy
    assert isinstance(policy, Select)
    runs = [bench.run(profile=learned, plan=plan.name) for plan in plans]
    # a run has one plan, so each sample is a run of its own; its images are those of the plan it chooses
    chosen = [policy.plans.index(policy.choose(_condition(sample), None)[0]) for sample in bench.reporting]
    values = list(zip(*(ran.psnr for ran in runs), strict=True))
    selected = fmean(row[choice] for row, choice in zip(values, chosen, strict=True))
    single = runs[policy.fallback].mean
    work = [ran.work for ran in runs]
    return Outcome(
        ours=f"{selected:.2f} dB chosen by the class, {single:.2f} dB with {plans[policy.fallback].name}",
        equal_compute=f"{min(work):.3f} to {max(work):.3f} of the uncached FLOPs, NFE {runs[0].nfe:g} each",
        holds=selected > single + EQUAL and max(work) - min(work) < 0.01,
        figures={
            "selected": selected,
            "single": single,
            "oracle": fmean(map(max, values)),
            "kinds_chosen": len(set(chosen)),
            **{f"psnr_{plan.name}": ran.mean for plan, ran in zip(plans, runs, strict=True)},
        },
    )


def _marked(total: int, exponent: float) -> list[bool]:
    computed = spaced(total, COMPUTED, exponent)
    return [step in computed for step in range(total)]


def _of_each_class(seeds: SeedSet, call: int) -> list[Sample]:
    first = call * CLASSES
    return [Sample(label, label, seeds.fitting[(first + label) % len(seeds.fitting)]) for label in range(CLASSES)]


def _condition(sample: Sample) -> Condition:
    return Condition("class_labels", torch.tensor([sample.prompt]))
