"""What each part of a plan is worth: plans of one model, made with one part more at a time, at equal NFE.

Each stage's profile is put where `diffusion-cache evaluate experiment=ablation method=planned` takes it from, see
`make ablation`. Stages share one search, so that a later one differs from an earlier one by its own part alone.

Usage: python scripts/ablate.py [--model flux-digits] [--runs 60] [--out outputs/ablation]
"""

import argparse
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from make_profiles import HOME, SCOPES, SHARES, planner_of
from rich.console import Console

from diffusion_cache.cli.progress import announcing
from diffusion_cache.evaluation.subjects import Shipped, batches_of, quieten_libraries
from diffusion_cache.planning.build import Search
from diffusion_cache.profile import JSON_FILE, Profile

POLISHED = Search().polished


def stages(runs: int, scopes: tuple[str | None, ...]) -> Iterator[tuple[str, Search]]:
    """Each has what the one before has, and one part more."""
    search = Search(runs, scopes, fitted=False, refined=False, regressors=False, polished=0)
    yield "schedule", search
    for name, part in (
        ("fitted", {"fitted": True}),
        ("refined", {"refined": True}),
        ("regressors", {"regressors": True}),
        ("polished", {"polished": POLISHED}),
        ("sigmas", {"sigmas": True}),
    ):
        search = replace(search, **part)
        yield name, search


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="flux-digits", help="a shipped one with a profile")
    parser.add_argument("--sampler", default="flow-euler")
    parser.add_argument("--runs", type=int, default=60, help="cached generations a search may take")
    parser.add_argument("--fitting", type=int, default=32, help="samples that weights and schedules are chosen on")
    parser.add_argument("--computed", type=int, nargs="+", help="numbers of computed steps, in place of the usual ones")
    parser.add_argument("--held-out", type=int, default=32, help="samples that the stated quality is measured on")
    parser.add_argument("--out", type=Path, default=HOME.parent / "outputs" / "ablation")
    options = parser.parse_args()
    torch.set_num_threads(1)
    quieten_libraries()
    name = f"{options.model}-{options.sampler}"
    shipped = Profile.load(HOME / name)
    subject = Shipped(options.model, options.sampler)
    console = Console()
    with announcing(console, name) as progress:
        bare = shipped.with_plans(())
        base = planner_of(bare, batches_of(subject, subject.steps), Search(), options, progress)
        for computed in options.computed or [math.floor(base.steps * share) for share in SHARES]:
            for stage, search in stages(options.runs, SCOPES.get(options.model, ())):
                folder = options.out / stage / name
                profile = Profile.load(folder) if (folder / JSON_FILE).is_file() else bare
                # of its own: what one stage has planned is no start of another's search; their scores they share
                planner = replace(base, search=search)
                label = f"nfe-{computed}"
                if any(plan.name == label and planner.made(plan) for plan in profile.plans):
                    continue
                plan = planner.plan(computed)
                profile.with_plan(plan).save(folder)
                assert plan.quality is not None
                console.print(
                    f"{stage} {plan.name}: {plan.quality.mean:.2f} dB, p5 {plan.quality.p5:.2f}, {plan.scope}"
                )


if __name__ == "__main__":
    main()
