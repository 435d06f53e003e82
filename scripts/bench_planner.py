"""How long planning takes on one core: the errors of all forecasts, the best schedules, and sharing a budget.

One span: Taylor-1 errors from a Gram matrix, then the best schedule for every number of computed steps, by each
objective. Coupled: the same for all branches of a large denoiser (57 blocks of 3), then a shared budget. Features are
synthetic: random walks that move fast at first. Times are process CPU time, the median of the repetitions; the peak
memory is the process's own so far.

Usage: python scripts/bench_planner.py [--repeat 3] [--out results/planner.json]
"""

import argparse
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")  # before numpy is imported

import numpy as np
import scipy

from diffusion_cache.evaluation.environment import cpu_name, git_commit, versions
from diffusion_cache.planning.coupled import allocate, curves
from diffusion_cache.planning.dynamic import Objective, best_schedule
from diffusion_cache.planning.surrogate import damages, taylor_errors

LIMITS = {"50 steps": 1.0, "250 steps": 10.0, "coupled": 60.0}  # seconds
BLOCKS, BRANCHES, COUPLED_STEPS, SHARE = 57, 3, 50, 0.4


def gram_matrix(steps: int, seed: int) -> np.ndarray:
    """Of features that drift, faster at the start and at a speed of the span's own."""
    rng = np.random.default_rng(seed)
    speed = rng.uniform(0.2, 2) * np.exp(-np.arange(steps) / (steps * rng.uniform(0.1, 0.6))) + 0.05
    direction = np.cumsum(rng.normal(size=(steps, 128)), axis=0) / np.sqrt(steps)
    features = 3 * rng.normal(size=128) + np.cumsum(speed[:, None] * direction, axis=0) * 50 / steps
    return features @ features.T


def span_damages(gram: np.ndarray) -> np.ndarray:
    return damages(taylor_errors(gram), np.linspace(1.5, 0.5, len(gram)), gram.diagonal())


def timed(call: Callable[[], Any], repeat: int) -> float:
    seconds = []
    for _ in range(repeat):
        start = time.process_time()
        call()
        seconds.append(time.process_time() - start)
    return statistics.median(seconds)


def peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def one_span(steps: int, repeat: int) -> list[dict[str, Any]]:
    gram = gram_matrix(steps, 0)
    errors = timed(lambda: span_damages(gram), repeat)
    damage = span_damages(gram)
    return [
        {
            "steps": steps,
            "objective": objective,
            "errors_seconds": errors,
            "schedules_seconds": timed(lambda objective=objective: best_schedule(damage, steps, objective), repeat),
            "peak_bytes": peak_bytes(),
        }
        for objective in get_args(Objective)
    ]


def coupled(objective: Objective, repeat: int) -> dict[str, Any]:
    spans = BLOCKS * BRANCHES
    grams = [gram_matrix(COUPLED_STEPS, seed) for seed in range(spans)]
    cost = np.random.default_rng(0).uniform(0.5, 2, size=spans)
    budget = SHARE * COUPLED_STEPS * cost.sum()

    def schedules() -> np.ndarray:
        found = [best_schedule(span_damages(gram), COUPLED_STEPS, objective) for gram in grams]
        return curves(found, COUPLED_STEPS)

    damage = schedules()
    allocation = allocate(damage, cost, budget)
    return {
        "steps": COUPLED_STEPS,
        "spans": spans,
        "objective": objective,
        "budget_share": SHARE,
        "schedules_seconds": timed(schedules, repeat),
        "allocation_seconds": timed(lambda: allocate(damage, cost, budget), repeat),
        "gap": allocation.gap,
        "spent_share": allocation.cost / (COUPLED_STEPS * cost.sum()),
        "peak_bytes": peak_bytes(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("results/planner.json"))
    options = parser.parse_args()
    shared = [coupled(objective, options.repeat) for objective in get_args(Objective)]
    single = [row for steps in (20, 50, 100, 250) for row in one_span(steps, options.repeat)]
    report = {
        "clock": "process CPU time, one thread",
        "repeat": options.repeat,
        "cpu": cpu_name(),
        "versions": {**versions(), "numpy": np.__version__, "scipy": scipy.__version__},
        "git": git_commit(),
        "limits_seconds": LIMITS,
        "one_span": single,
        "coupled": shared,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=2) + "\n")
    print(
        f"{'steps':>5} {'spans':>5} {'objective':>9} {'errors s':>9} {'schedules s':>12} {'sharing s':>10} {'gap':>9}"
    )
    for row in single:
        print(
            f"{row['steps']:>5} {1:>5} {row['objective']:>9} {row['errors_seconds']:>9.3f} "
            f"{row['schedules_seconds']:>12.3f}"
        )
    for row in shared:
        print(
            f"{row['steps']:>5} {row['spans']:>5} {row['objective']:>9} {'':>9} {row['schedules_seconds']:>12.3f} "
            f"{row['allocation_seconds']:>10.3f} {row['gap']:>9.2e}"
        )


if __name__ == "__main__":
    main()
