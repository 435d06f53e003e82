"""Make the shipped profiles with their plans: `python scripts/make_profiles.py [--only dit-digits-ddim] [--runs 80]`.

All samples come from fitting seeds, in disjoint ranges: those of the profile, of the fit, of tuning, and the held-out
ones that a plan's stated quality is measured on. Nothing that `evaluate` reports uses any of them.
"""

import argparse
import math
from fractions import Fraction
from pathlib import Path

import torch
from rich.console import Console

from diffusion_cache import reference
from diffusion_cache.cli.progress import announcing
from diffusion_cache.evaluation.prompts import FITTING_SEEDS
from diffusion_cache.evaluation.subjects import Shipped, batches_of, quieten_libraries
from diffusion_cache.planning.build import Planner, Progress, Search
from diffusion_cache.profile import JSON_FILE, Profile
from diffusion_cache.profiling.generation import teach
from diffusion_cache.profiling.measure import MakeBatch, Options, measure

HOME = Path(__file__).parents[1] / "profiles"
PROFILED, FITTED, TUNED, HELD_OUT = (FITTING_SEEDS + offset for offset in (0, 10_000, 20_000, 30_000))
SHARES = (Fraction(1, 2), Fraction(1, 3), Fraction(1, 4), Fraction(1, 5))
# where a model's plans may cache; the better one is taken for each number of computed steps
SCOPES = {"unet-digits": ("denoiser",), "flux-digits": ("stack", "denoiser")}
FIRST_SCOPE = {"unet-digits": "denoiser"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", help="a profile's name; repeat for several")
    parser.add_argument("--runs", type=int, default=80, help="cached generations a search may take")
    parser.add_argument("--fitting", type=int, default=32, help="samples that weights and schedules are chosen on")
    parser.add_argument("--rounds", type=int, default=2, help="of Gauss-Newton on a plan's weights, in the last stage")
    parser.add_argument("--computed", type=int, nargs="+", help="numbers of computed steps, in place of the usual ones")
    parser.add_argument("--scope", help="where plans may cache, in place of the model's usual scopes")
    parser.add_argument("--held-out", type=int, default=64, help="samples that the stated quality is measured on")
    parser.add_argument("--out", type=Path, default=HOME)
    options = parser.parse_args()
    torch.set_num_threads(1)
    quieten_libraries()
    for model in reference.MODELS.values():
        for sampler in model.samplers:
            name = f"{model.name}-{sampler}"
            if not options.only or name in options.only:
                make(name, model.name, sampler, options)


def make(name: str, model: str, sampler: str, options: argparse.Namespace) -> None:
    subject = Shipped(model, sampler)
    console = Console()
    batch = batches_of(subject, subject.steps)
    with announcing(console, name) as progress:
        folder = options.out / name
        if (folder / JSON_FILE).is_file():
            profile = Profile.load(folder)
        else:
            scope = Options(scope=FIRST_SCOPE.get(model))
            guidance = reference.spec(model).guidance
            profile = measure(batch, drawn(PROFILED, 16), scope, guidance=guidance, progress=progress)
            profile.save(folder)
        scopes = (options.scope,) if options.scope else SCOPES.get(model, ())
        search = Search(runs=options.runs, scopes=scopes, polished=options.rounds)
        planner = planner_of(profile, batch, search, options, progress)
        # the cheapest first: the next one's search starts from its steps and more
        for computed in sorted(options.computed or usual(planner.steps)):
            label = f"nfe-{computed}"
            if any(plan.name == label and planner.made(plan) for plan in profile.plans):
                continue
            plan = planner.plan(computed)
            profile = profile.with_plan(plan)
            profile.save(folder)
            assert plan.quality is not None
            console.print(f"{name} {plan.name}: {plan.quality.mean:.2f} dB, p5 {plan.quality.p5:.2f}, {plan.scope}")


def usual(steps: int) -> set[int]:
    """Shares of the steps, rounded down, and up as uniform schedules are."""
    return {round_(steps * share) for share in SHARES for round_ in (math.floor, math.ceil)}


def planner_of(
    profile: Profile, batch: MakeBatch, search: Search, options: argparse.Namespace, progress: Progress
) -> Planner:
    held = drawn(HELD_OUT, options.held_out)
    return Planner(
        profile,
        teach(batch(drawn(FITTED, options.fitting))),
        teach(batch(drawn(TUNED, options.fitting))),
        [teach(batch(held[i : i + 16])) for i in range(0, len(held), 16)],
        [seed for _, seed in held],
        search,
        progress,
    )


def drawn(first: int, count: int) -> list[tuple[str, int]]:
    return [(str(i % 10), first + i) for i in range(count)]


if __name__ == "__main__":
    main()
