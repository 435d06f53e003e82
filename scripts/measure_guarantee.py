"""Does a stated quality hold? `python scripts/measure_guarantee.py [--repetitions 20]`, about 4 hours of one core.

Each repetition starts from nothing: a profile, schedules by dynamic programming, weights fitted to the trajectory, and
the PSNR of every plan on held-out samples, all with seeds that no other repetition uses. For each target it picks the
plan that `min_psnr` would (or is refused, where no plan is shown to reach it), and tests that on fresh seeds, beside
the cheaper plans, to see whether one of them would have done. Finished repetitions are in results/guarantee, where the
next call goes on from; results/guarantee.json is written from all of them.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from diffusion_cache.cli.interrupts import kept_interrupts
from diffusion_cache.cli.progress import announcing
from diffusion_cache.errors import ConfigError
from diffusion_cache.evaluation.environment import cpu_name, versions
from diffusion_cache.evaluation.prompts import FITTING_SEEDS
from diffusion_cache.evaluation.subjects import Shipped, batches_of, quieten_libraries
from diffusion_cache.files import written
from diffusion_cache.plan import Plan, Quality
from diffusion_cache.planning import guarantee, surrogate
from diffusion_cache.planning.build import Planner, Search
from diffusion_cache.planning.choose import choose
from diffusion_cache.planning.dynamic import best_schedule
from diffusion_cache.profiling.generation import Teacher, teach
from diffusion_cache.profiling.measure import Options, measure

HOME = Path(__file__).parents[1]
MODEL = "flux-digits"
TARGETS = (40.0, 45.0, 50.0)  # dB, chosen before anything was measured
LADDER = (24, 21, 19, 17, 15, 14, 13, 12, 11, 10, 9, 8, 7, 6)
PROFILED, FITTED, HELD_OUT, TESTED, BATCH = 8, 24, 768, 512, 32
SHARE = 0.95
FIRST_SEED = FITTING_SEEDS + 200_000  # nothing else uses seeds from here on
SEEDS_EACH = 2_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--first", type=int, default=0, help="leave those before to another process")
    parser.add_argument("--out", type=Path, default=HOME / "results" / "guarantee")
    options = parser.parse_args()
    torch.set_num_threads(1)
    quieten_libraries()
    options.out.mkdir(parents=True, exist_ok=True)
    console = Console()
    with kept_interrupts(), announcing(console, "guarantee", remaining=True) as progress:
        for number in range(options.first, options.repetitions):
            progress("repetition", number, options.repetitions)
            path = options.out / f"{number}.json"
            if not path.is_file():
                with written(path) as draft:
                    draft.write_text(json.dumps(repetition(number), indent=1) + "\n")
    paths = [options.out / f"{number}.json" for number in range(options.repetitions)]
    if not all(path.is_file() for path in paths):
        return
    repetitions = [json.loads(path.read_text()) for path in paths]
    found = {
        "model": MODEL,
        "share": SHARE,
        "confidence": 0.95,
        "samples": {"profiled": PROFILED, "fitted": FITTED, "held_out": HELD_OUT, "tested": TESTED},
        "hardware": cpu_name(),
        "versions": versions(),
        "targets": {str(target): summary(target, repetitions) for target in TARGETS},
    }
    options.out.with_suffix(".json").write_text(json.dumps(found, indent=2) + "\n")
    for target, row in found["targets"].items():
        console.print(f"{target} dB: {row}")


def summary(target: float, repetitions: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """In how many repetitions the picked plan held on the fresh seeds, and what it spent more than was needed."""
    every = [each["targets"][str(target)] for each in repetitions]
    rows = [row for row in every if row is not None]
    return {
        "repetitions": len(every),
        "refused": len(every) - len(rows),
        "held": sum(row["reached"] >= SHARE for row in rows),
        "lowest_reached": min(row["reached"] for row in rows),
        "mean_reached": float(np.mean([row["reached"] for row in rows])),
        "nfe_mean": float(np.mean([row["nfe"] for row in rows])),
        "more_nfe_than_needed": float(np.mean([row["nfe"] / row["needed_nfe"] - 1 for row in rows])),
        "more_nfe_at_worst": max(row["nfe"] / row["needed_nfe"] - 1 for row in rows),
    }


def repetition(number: int) -> dict[str, Any]:
    """One calibration from nothing, and its test."""
    subject = Shipped(MODEL)
    make = batches_of(subject, subject.steps)
    seeds = iter(range(FIRST_SEED + number * SEEDS_EACH, FIRST_SEED + (number + 1) * SEEDS_EACH))

    def drawn(count: int) -> list[tuple[str, int]]:
        return [(str(seed % 10), seed) for seed, _ in zip(seeds, range(count), strict=False)]

    def teachers(samples: list[tuple[str, int]]) -> list[Teacher]:
        return [teach(make(samples[i : i + BATCH])) for i in range(0, len(samples), BATCH)]

    profile = measure(make, drawn(PROFILED), Options(scope="stack", sensitivity_samples=2, sensitivity_steps=8))
    assert profile is not None
    fitting, held, tested = teach(make(drawn(FITTED))), drawn(HELD_OUT), drawn(TESTED)
    search = Search(refined=False, polished=0)
    calibration = Planner(profile, fitting, fitting, teachers(held), [seed for _, seed in held], search)
    test = Planner(profile, fitting, fitting, teachers(tested), [seed for _, seed in tested], search)

    plans: list[Plan] = []
    tests: dict[str, Quality] = {}
    for computed in LADDER:
        plan = calibration.fitted(schedule(calibration, computed), f"nfe-{computed}")
        quality = calibration.quality(plan)
        plans.append(replace(plan, quality=quality))
        if not guarantee.holds(quality.values, min(TARGETS)):
            break  # the choice never goes past the first plan that fails
    targets: dict[str, Any] = {}
    for target in TARGETS:
        try:
            picked = choose(plans, min_psnr=target)
        except ConfigError:  # not even the most expensive plan is shown to reach it
            targets[str(target)] = None
            continue
        needed = picked
        for plan in plans[plans.index(picked) :]:  # from the picked one down, as long as fresh seeds reach the target
            if plan.name not in tests:
                tests[plan.name] = test.quality(plan)
            if share(tests[plan.name], target) < SHARE:
                break
            needed = plan
        targets[str(target)] = {
            "plan": picked.name,
            "nfe": picked.nfe,
            "reached": share(tests[picked.name], target),
            "needed_nfe": needed.nfe,
        }
    return {
        "seeds": [FIRST_SEED + number * SEEDS_EACH, next(seeds) - 1],
        "plans": {plan.name: {"mean": plan.quality.mean, "p5": plan.quality.p5} for plan in plans if plan.quality},
        "targets": targets,
    }


def schedule(planner: Planner, computed: int) -> tuple[int, ...]:
    """The steps that dynamic programming computes: the least sum of squared damages."""
    damage = surrogate.mean_damages(planner.profile) ** 2
    return best_schedule(damage, range(computed, computed + 1))[computed].computed


def share(quality: Quality, target: float) -> float:
    """Of the samples that reach the target."""
    return sum(value >= target for value in quality.values) / quality.n


if __name__ == "__main__":
    main()
