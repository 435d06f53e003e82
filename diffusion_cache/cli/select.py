"""`diffusion-cache select`: plans for kinds of prompts, and scores that choose among them by the prompt."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from ..errors import ConfigError
from ..evaluation.prompts import Sample
from ..evaluation.subjects import quieten_libraries
from ..models import find_denoisers
from ..plan import Plan, Quality
from ..planning.choose import choose
from ..planning.select import Seen, best_together, refitted, see, with_selector, without_selector
from ..planning.selector import STORED, Selector
from ..profile import Profile, folder_of
from ..profiling.generation import Teacher, teach
from .plan import FITTED, HELD_OUT, MOST_SAMPLES, TUNED, Progress, Settings, Source, source_of, stored_in, texts_beside
from .progress import announcing
from .show import print_choices, print_plans, told_choice


@dataclass(frozen=True)
class Wish:
    """Groups of `keep` plans, one for each of the profile's plans of at most so many evaluations."""

    nfes: tuple[float, ...]
    keep: int = 4

    def __post_init__(self) -> None:
        if not self.nfes:
            raise ConfigError("say of how many evaluations the plans to choose among shall be: --nfe 25,17")
        if self.keep < 2:
            raise ConfigError(f"--keep must be at least 2, or there is nothing to choose, not {self.keep}")


def make_selector(
    folder: Path, model: str | None, wish: Wish, settings: Settings, out: Path, console: Console
) -> Profile:
    """Refit plans to each prompt, keep those that do best together, learn to choose, and store each group in `out`.

    settings: `fitting` and `tuning` are samples of each prompt.

    Raises:
        ConfigError: for a profile that is not of this model or has no such plan, an `out` with plans that were not
            made here, too many samples, prompts that all look the same, and plans that are best for every prompt as
            they are.
    """
    quieten_libraries()
    folder = folder_of(folder)
    profile = Profile.load(folder)
    if out.resolve() == folder.resolve():
        raise ConfigError(f"{out} is the profile's own folder, whose other plans would be lost: give --out another one")
    stored = stored_in(out, profile)
    if stored is not None and stored.plans and STORED not in stored.facts:
        raise ConfigError(f"{out} holds plans that were made otherwise, and would be lost: give --out another folder")
    starts = list(dict.fromkeys(choose(profile.plans, nfe=nfe) for nfe in wish.nfes))
    source = source_of(profile, model, settings)
    profile.check(source.pipe, find_denoisers(source.pipe))
    prompts, others = source.profiled_first(profile).parts((3, 1))
    taken = {seed for _, seed in profile.samples}
    fitting = _drawn(_each(prompts, settings.fitting), FITTED, taken)
    tuned = _drawn(_each(prompts, settings.tuning), TUNED, taken)
    held_out = _drawn([others[i % len(others)] for i in range(settings.held_out)], HELD_OUT, taken)
    seeds = [sample.seed for sample in held_out]
    texts = None if source.classes else texts_beside(profile, held_out)
    made, alone = without_selector(profile).with_plans(()), []
    with announcing(console, "select") as progress:
        fitted = _taught(source, fitting, settings.fitting, progress)
        tuning = _taught(source, tuned, settings.tuning, progress)
        apart = _taught(source, held_out, settings.batch, progress)
        for start in starts:
            seen = _kept(_candidates(start, fitted, progress), tuning, wish.keep, progress)
            if len(seen.plans) < 2:
                alone.append(start.name)
                continue
            reported = _measured(seen.plans, apart, progress)
            stated = _stated(reported, seeds, texts)
            if not source.classes:
                stated = [plan.fitted_to(map(str, prompts)) for plan in stated]
            plans = sorted([*made.plans, *stated], key=lambda plan: -plan.nfe)
            made = with_selector(made.with_plans(plans), seen, reported, seeds)
            made.save(out)
            progress(told_choice(Selector.of(made).choices[-1]), 0, 0)
    told = (
        f"{', '.join(alone)}: best for each of the prompts as it is, so that there is nothing to choose. Fit to more "
        "samples with --fitting, or use the plan as it is"
    )
    if len(alone) == len(starts):
        raise ConfigError(told)
    print_plans(made.plans, console)
    print_choices(made, console)
    if alone:
        console.print(escape(told), soft_wrap=True)
    return made


def _drawn(prompts: Sequence[str | int], first: int, taken: Collection[int]) -> list[Sample]:
    """A sample of each of the prompts, with seeds from `first` on that are not taken."""
    if len(prompts) > MOST_SAMPLES:
        raise ConfigError(
            f"{len(prompts)} samples are more than the {MOST_SAMPLES} that there are seeds for: give fewer prompts, "
            "or a lower --fitting, --tuning or --held-out"
        )
    seeds = (seed for seed in range(first, first + 2 * MOST_SAMPLES) if seed not in taken)
    return [Sample(index, prompt, seed) for index, (prompt, seed) in enumerate(zip(prompts, seeds, strict=False))]


def _each(prompts: Sequence[str | int], count: int) -> list[str | int]:
    """Every prompt so many times, one prompt after another."""
    return [prompt for prompt in prompts for _ in range(count)]


def _taught(source: Source, samples: Sequence[Sample], together: int, progress: Progress) -> list[Teacher]:
    """Uncached runs of the samples, so many in a batch."""
    teachers = []
    for start in range(0, len(samples), together):
        progress("uncached runs", start, len(samples))
        teachers.append(teach(source.make(samples[start : start + together])))
    return teachers


def _candidates(start: Plan, teachers: Sequence[Teacher], progress: Progress) -> list[Plan]:
    """A plan, followed by what becomes of it when it is fitted to each prompt."""
    found = [start]
    for number, teacher in enumerate(teachers):
        progress(f"{start.name}: fitting to each prompt", number, len(teachers))
        found.append(refitted(start, teacher, f"{start.name}-for-{number}"))
    return found


def _kept(plans: Sequence[Plan], tuning: Sequence[Teacher], count: int, progress: Progress) -> Seen:
    """The plans of a group that do best together on samples of each prompt."""
    seen = _measured(plans, tuning, progress)
    by_prompt = seen.values.reshape(len(tuning), -1, len(plans)).mean(1)
    return seen.only(best_together(by_prompt, count))


def _measured(plans: Sequence[Plan], teachers: Sequence[Teacher], progress: Progress) -> Seen:
    progress(f"{plans[0].name}: measuring {len(plans)} plans", 0, 0)
    return see(teachers, plans)


def _stated(seen: Seen, seeds: Sequence[int], texts: int | None) -> list[Plan]:
    """The plans with their quality on held-out samples, of so many different texts, None for classes."""
    return [
        plan.stating(Quality.of("psnr", values, seeds), texts)
        for plan, values in zip(seen.plans, seen.values.T.tolist(), strict=True)
    ]
