"""Compare routers with other schedules: `compare_routers.py [--only dit-digits-20-0.5-0] [--method sdt l2c]`.

Each row of the table is kept in outputs/routers when it is finished, and a training's checkpoints with it, so that a
run that was stopped goes on; results/routers/summary.csv is written anew from all rows that are there, its means over
trainings into table.md beside it, and what they say of the papers' claims into docs/reproduction.md.
"""

import argparse
import csv
import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor

from diffusion_cache.cli.interrupts import kept_interrupts
from diffusion_cache.cli.progress import announcing
from diffusion_cache.cli.train_router import clean_latents, training_samples
from diffusion_cache.evaluation.accounting import Accountant
from diffusion_cache.evaluation.prompts import FITTING_SEEDS, Sample
from diffusion_cache.evaluation.reproduction.publish import publish
from diffusion_cache.evaluation.reproduction.routers import checked
from diffusion_cache.evaluation.subjects import Shipped, batches_of, quieten_libraries
from diffusion_cache.files import written
from diffusion_cache.measure import psnr
from diffusion_cache.plan import Plan
from diffusion_cache.planning.build import Planner, Search
from diffusion_cache.planning.select import see, with_selector
from diffusion_cache.planning.static import static_plan
from diffusion_cache.policies.select import Select
from diffusion_cache.profile import Profile
from diffusion_cache.profiling.generation import attached, plan_method, teach
from diffusion_cache.profiling.measure import Options, measure
from diffusion_cache.registry import routers
from diffusion_cache.routers.router import budget_of, random_logits, ranked, starts
from diffusion_cache.routers.training import Settings, last_error, train
from diffusion_cache.schedule import spaced
from diffusion_cache.systems import Selection

HOME = Path(__file__).parents[1]
# what lies outside branches is half of flux-digits, whose single blocks have none
SCOPES = {"unet-digits": "block", "flux-digits": "block"}  # branch elsewhere
GIVEN_PROMPTS = {"kind": "classes", "n": None, "n_video": None, "first_seed": 0}
PROFILED, FITTED, TUNED, CHOSEN = (FITTING_SEEDS + offset for offset in (50_000, 60_000, 70_000, 80_000))
REPORTED = 32  # samples, of the seeds from 0 on
CHOOSING = 40  # samples that the choice between routers is learned from
SEEDS = 3  # of trainings
TRAJECTORIES = {"budgeted": 16}  # 40 elsewhere; a trajectory of hard gates costs twice that of soft ones
EVERY = {"budgeted": 2}  # trajectories between looks
COLUMNS = (
    *("model", "steps", "compute_asked", "seed", "method", "compute", "error", "psnr"),
    *("cpu_seconds", "peak_bytes"),
)
FEWER = ("harmonica", "budgeted", "planned")
OURS = ("reusing", "fitted", "random_start", "single", "chosen")  # ours less a part of it, or with one more


class Setting(NamedTuple):
    """What rows are compared within."""

    model: str
    steps: int
    compute: float
    seed: int

    def __str__(self) -> str:
        return f"{self.model}-{self.steps}-{self.compute:g}-{self.seed}"


def settings() -> dict[Setting, tuple[str, ...]]:
    """The methods of every setting, the most important first."""
    every = (
        "interval",
        "interval_taylor",
        "random",
        "knapsack",
        "harmonica",
        "budgeted",
        "sdt",
        "planned",
        "annealed",
    )
    found: dict[Setting, tuple[str, ...]] = {}
    for seed in range(SEEDS):
        found[Setting("dit-digits", 20, 0.5, seed)] = (*every, *OURS)
    for seed in range(SEEDS):
        found[Setting("dit-digits", 20, 0.75, seed)] = ("l2c", *every)  # l2c caches half at most
    for model, steps in (("dit-digits", 10), ("dit-digits", 50), ("unet-digits", 20), ("flux-digits", 20)):
        found[Setting(model, steps, 0.5, 0)] = FEWER
    return found


class Bench:
    """One model and number of steps: its profile, and what plans do to the reported samples."""

    def __init__(self, model: str, steps: int, folder: Path, progress: Callable[[str, int, int], None]):
        self.subject, self.steps, self.progress = Shipped(model), steps, progress
        self.make_batch = batches_of(self.subject, steps)
        options = Options(SCOPES.get(model, "branch"), sensitivity_samples=4, sensitivity_steps=8)
        made = measure(self.make_batch, self.drawn(PROFILED, 8), options, folder=folder, progress=progress)
        assert made is not None
        self.profile: Profile = made
        self.reported = teach(self.make_batch(self.drawn(0, REPORTED)))
        self.flops = self._flops()

    @staticmethod
    def drawn(first: int, count: int) -> list[tuple[str, int]]:
        return [(str(i % 10), first + i) for i in range(count)]

    def _flops(self) -> int:
        accountant = Accountant(self.subject.denoisers, self.subject.blocks, self.subject.pipe.scheduler)
        with accountant.observed(flops=True) as observed:
            self.subject.generate([Sample(0, 0, 0)], self.steps)
        return observed.flops

    def figures(self, plans: Sequence[Plan], places: Sequence[int] | None = None) -> dict[str, float]:
        """Of the reported samples. error: relative L2 distance of the last states, mean; compute: executed FLOPs.

        places: the plan that each sample is generated by; None for the first.
        """
        outcomes = torch.stack([self._outcome(plan) for plan in plans])  # [K, 3, n]
        chosen = outcomes[torch.tensor(places or [0] * REPORTED), :, torch.arange(REPORTED)].mean(0).tolist()
        return dict(zip(("error", "psnr", "compute"), chosen, strict=True))

    def _outcome(self, plan: Plan) -> Tensor:
        """Error, PSNR and share of the uncached FLOPs of each reported sample, [3, n]."""
        batch = self.reported.batch
        error = last_error(self.reported, plan)
        with torch.no_grad(), attached(batch.pipe, plan_method(plan)):
            images = batch.images(batch.call()).float()
            work = self._flops() / self.flops
        decibels = psnr(images.clamp(0, 1), self.reported.images.clamp(0, 1)).clamp(max=120.0)
        return torch.stack([error.double(), decibels.double(), torch.full((REPORTED,), work, dtype=torch.double)])

    def suited(self, plans: Sequence[Plan]) -> tuple[list[int], int]:
        """The plan that is chosen for each reported sample by its class, and the one that is best on average."""
        seen = see([teach(self.make_batch(self.drawn(CHOSEN, CHOOSING)))], plans)
        policy = Selection().parts(with_selector(self.profile.with_plans(plans), seen)).policy
        assert isinstance(policy, Select)
        reported = see([self.reported], plans[:1]).conditions
        return [policy.plans.index(policy.choose(condition, None)[0]) for condition in reported], policy.fallback

    def made(self, setting: Setting, method: str, folder: Path) -> tuple[Plan, Mapping[str, Any]]:
        """A method's plan, and what its training cost."""
        profile, compute = self.profile, setting.compute
        if method in ("interval", "interval_taylor"):
            shares = sum(span.share for span in profile.spans)
            count = max(1, round(budget_of(profile, compute) / shares))
            steps = spaced(self.steps, count, 1.0)
            computed = [step in steps for step in range(self.steps)]
            return static_plan(profile, method, computed, order=int(method == "interval_taylor")), {}
        if method == "random":
            return static_plan(profile, method, ranked(random_logits(profile, setting.seed), profile, compute)), {}
        if method == "knapsack":
            untrained = starts(profile, compute, 1)[0]  # the profile's best schedule, which ours starts from
            return static_plan(profile, method, ranked(untrained, profile, compute), order=1), {}
        if method == "planned":
            return self._planned(setting), {}
        recipes = {
            "fitted": ("budgeted", {"fitted": True}),
            "annealed": ("budgeted", {"gates": "annealed"}),
            "reusing": ("budgeted", {"order": 0}),
            "random_start": ("budgeted", {"start": "random"}),
        }
        name, options = recipes.get(method, (method, {}))
        samples = training_samples(GIVEN_PROMPTS, self.subject, setting.seed)
        result = train(
            self.make_batch,
            samples,
            profile,
            routers.get(name)(**options),
            Settings(
                compute=compute,
                seed=setting.seed,
                trajectories=TRAJECTORIES.get(name, 40),
                evaluate_every=EVERY.get(name, 8),
            ),
            folder=folder,
            clean=clean_latents({"kind": "shipped", "name": setting.model}, samples),
            progress=self.progress,
        )
        last = result.log[-1]
        return result.plan, {"cpu_seconds": last["seconds"], "peak_bytes": last["peak_bytes"]}

    def _planned(self, setting: Setting) -> Plan:
        """Whole steps at the same scope, searched for and fitted."""
        fitting, tuning = (teach(self.make_batch(self.drawn(first, 8))) for first in (FITTED, TUNED))
        search = Search(runs=20, polished=0, regressors=False, seed=setting.seed)
        planner = Planner(self.profile, fitting, tuning, [tuning], range(8), search, self.progress)
        count = max(1, round(budget_of(self.profile, setting.compute) / sum(span.share for span in self.profile.spans)))
        return planner.plan(count)


def row_path(out: Path, setting: Setting, method: str) -> Path:
    return out / f"{setting}-{method}.json"


def chosen_figures(bench: Bench, setting: Setting, method: str, out: Path) -> Mapping[str, float]:
    """Of two routers, of this training's seed and the next: the one for each class, or the better one for all."""
    plans = []
    for seed in (setting.seed, (setting.seed + 1) % SEEDS):
        own = setting._replace(seed=seed)
        plan, _ = bench.made(own, "budgeted", out / f"{own}-budgeted")
        plans.append(replace(plan, name=f"{plan.name}-{seed}"))
    places, fallback = bench.suited(plans)
    return bench.figures(plans, places if method == "chosen" else [fallback] * REPORTED)


def make_row(out: Path, setting: Setting, method: str) -> None:
    """Train, export and measure; in a process of its own, so that its memory is its own."""
    console = Console(stderr=True)
    with kept_interrupts(), announcing(console, f"{setting}, {method}") as progress:
        bench = Bench(setting.model, setting.steps, out / f"{setting.model}-{setting.steps}", progress)
        cost: Mapping[str, Any] = {}
        if method in ("chosen", "single"):
            figures = chosen_figures(bench, setting, method, out)
        else:
            plan, cost = bench.made(setting, method, out / f"{setting}-{method}")
            figures = bench.figures([plan])
    row = {**setting._asdict(), "method": method, "compute_asked": setting.compute, **figures, **cost}
    path = row_path(out, setting, method)
    with written(path) as draft:  # a row that is there is finished
        draft.write_text(json.dumps(row) + "\n")
    console.print(f"{setting}, {method}: error {figures['error']:.4f} at {figures['compute']:.3f} of the FLOPs")


def write_table(out: Path, results: Path) -> list[dict[str, Any]]:
    """All rows that are there."""
    rows = [
        json.loads(path.read_text())
        for setting, methods in settings().items()
        for path in (row_path(out, setting, method) for method in methods)
        if path.is_file()
    ]
    results.mkdir(parents=True, exist_ok=True)
    with (results / "summary.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS, restval="", extrasaction="ignore", lineterminator="\n")
        table.writeheader()
        table.writerows({key: _short(value) for key, value in row.items()} for row in rows)
    (results / "table.md").write_text(mean_table(rows))
    return rows


def mean_table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Markdown: the error of each method, a mean over its trainings, best first, for each model, steps and compute."""
    settings = defaultdict(lambda: defaultdict(list))
    for row in rows:
        settings[row["model"], row["steps"], row["compute_asked"]][row["method"]].append(row)
    lines = [
        "# Routers and schedules",
        "",
        "Written by `make routers`. Error: relative L2 distance of the last latents to the uncached run's, a mean",
        f"over {REPORTED} reported samples and over trainings.",
        "",
    ]
    lines += ["| model | steps | compute asked | method | trainings | compute | error | CPU s of training |"]
    lines += ["| --- | ---: | ---: | --- | ---: | ---: | ---: | ---: |"]
    for (model, steps, compute), methods in settings.items():
        means = {
            method: [fmean(row[key] for row in trained) for key in ("compute", "error")]
            for method, trained in methods.items()
        }
        for method, (work, error) in sorted(means.items(), key=lambda item: item[1][1]):
            trained = methods[method]
            seconds = [row["cpu_seconds"] for row in trained if row.get("cpu_seconds")]
            cost = f"{fmean(seconds):.0f}" if seconds else ""
            cells = model, steps, f"{compute:g}", f"`{method}`", len(trained), f"{work:.3f}", f"{error:.4f}", cost
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def _short(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="a setting: model-steps-compute-seed")
    parser.add_argument("--method", nargs="+", help="some of its methods")
    parser.add_argument("--out", type=Path, default=HOME / "outputs" / "routers", help="where rows are kept")
    parser.add_argument("--here", action="store_true", help="make the row in this process (what the others are told)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    quieten_libraries()
    for setting, methods in settings().items():
        for method in methods:
            wanted = options.only in (None, str(setting)) and (not options.method or method in options.method)
            if not wanted or row_path(options.out, setting, method).is_file():
                continue
            if options.here:
                make_row(options.out, setting, method)
                continue
            told = ["--only", str(setting), "--method", method, "--out", str(options.out), "--here"]
            if subprocess.run([sys.executable, __file__, *told]).returncode:
                raise SystemExit(1)
    if not options.here:
        rows = write_table(options.out, HOME / "results" / "routers")
        print(f"{len(rows)} rows in results/routers/summary.csv")
        publish(HOME, checked(rows))  # what they say of the claims, beside what is published of the others


if __name__ == "__main__":
    main()
