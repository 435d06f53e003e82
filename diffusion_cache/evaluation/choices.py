"""Which method to take with no profile: the best of those that `enable` switches on with nothing measured."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import product
from typing import Any

from .. import reference
from ..advice import SPEEDUPS, TOLERANCE, Figures, Measured, Pick, kind_of, loss
from ..engine.clock import is_flow
from ..reference.models import scheduler as scheduler_of
from .runs import EQUALS, STATISTICS, Run, psnr_of, settings_text

Subject = tuple[str, str]  # model, sampler
Place = tuple[str | None, str | None]  # kind, scheduler
Setting = tuple[str, str, str]  # method, scope and settings


def picks(runs: Sequence[Run]) -> list[Pick]:
    """What to take for each subject, for several of a kind and for any, at each speedup.

    Models with random weights are left out. There is none where no setting of all the subjects is fast enough.
    """
    runs = [run for run in runs if run.correct and not run.random_weights and None not in _psnr(run)]
    places = _places(list(dict.fromkeys(run.subject for run in runs)))
    found = []
    for equal, speedup, (place, subjects), by in product(EQUALS, SPEEDUPS, places.items(), STATISTICS):
        pools = {
            subject: [run for run in runs if run.subject == subject and _saves(run, equal, speedup)]
            for subject in subjects
        }
        chosen = best_for_all(pools, by)
        if chosen:
            measured = tuple(_measured(chosen[subject], pools[subject], by) for subject in subjects)
            longest = max(chosen.values(), key=lambda run: run.steps)  # its mask, where there is one, has most detail
            assert longest.call is not None
            call = longest.call.reusing(min(run.reused for run in chosen.values()))
            told = settings_text(replace(longest, settings=_untuned(longest)), scope=False)
            found.append(Pick(*place, speedup, equal, by, longest.method, told, call, measured))
    return found


def picks_text(found: Sequence[Pick]) -> str:
    """Picks as the JSON file that `diffusion_cache.advice` reads, one a line."""
    return "[\n" + ",\n".join(json.dumps(asdict(pick)) for pick in found) + "\n]\n"


def _places(subjects: Sequence[Subject]) -> dict[Place, list[Subject]]:
    """Whom there are picks for: each subject, all of a kind where it has several, and any."""
    kinds: dict[str, list[tuple[str, Subject]]] = {}
    for subject in subjects:
        kind, scheduler = _kind(subject)
        kinds.setdefault(kind, []).append((scheduler, subject))
    places: dict[Place, list[Subject]] = {}
    for kind, members in kinds.items():
        for scheduler, subject in members:
            places.setdefault((kind, scheduler if len(members) > 1 else None), []).append(subject)
        places[kind, None] = [subject for _, subject in members]
    return places | ({(None, None): list(subjects)} if subjects else {})


def _kind(subject: Subject) -> tuple[str, str]:
    """Kind and scheduler of a shipped model's pipeline; its own names for another's, which stands for no kind."""
    model, sampler = subject
    spec = reference.MODELS.get(model)
    if spec is None or sampler not in spec.samplers:
        return subject
    scheduler = scheduler_of(spec, sampler)
    video = len(spec.sample_shape) == 4
    return kind_of(spec.denoiser == "unet", is_flow(scheduler), video), type(scheduler).__name__


def _saves(run: Run, equal: str, speedup: float) -> bool:
    nfe, speed = run.costs["nfe_ratio"], run.speed
    saved = speed if equal == "speed" else 1 / nfe if nfe else None
    return saved is not None and saved * TOLERANCE >= speedup


def best_for_all(pools: Mapping[Subject, Sequence[Run]], by: str) -> dict[Subject, Run]:
    """The runs of one setting, one of each subject, whose greatest loss against the best of its subject is least.

    Of runs that differ in what `enable` tunes, the subject's best is taken. If equal, the next greatest loss decides,
    then work. Empty where no setting that needs no profile has a run of every subject.

    Args:
        by: the statistic of PSNR.
    """
    groups = {subject: _by_setting(pool, by) for subject, pool in pools.items()}
    common = set.intersection(*map(set, groups.values()))
    if not common:
        return {}

    def rank(setting: Setting) -> tuple[list[float], float, Setting]:
        runs = {subject: group[setting] for subject, group in groups.items()}
        measured = [_measured(run, pools[subject], by) for subject, run in runs.items()]
        losses = sorted((loss(one.best, one.chosen, by) for one in measured), reverse=True)
        return losses, sum(one.chosen.work for one in measured), setting

    best = min(common, key=rank)
    return {subject: group[best] for subject, group in groups.items()}


def _by_setting(runs: Sequence[Run], by: str) -> dict[Setting, Run]:
    """The best run of each setting that needs no profile."""
    ordered = sorted((run for run in runs if run.call is not None), key=lambda run: getattr(_figures(run), by))
    return {(run.method, run.scope, json.dumps(_untuned(run), sort_keys=True)): run for run in ordered}


def _untuned(run: Run) -> dict[str, Any]:
    """The settings without what `enable` tunes."""
    return {name: value for name, value in run.settings.items() if run.call is None or name != run.call.tuned}


def _measured(chosen: Run, pool: Sequence[Run], by: str) -> Measured:
    best = _best([run for run in pool if run.call is not None], by)
    assert best is not None
    return Measured(
        chosen.model,
        chosen.sampler,
        chosen.steps,
        _figures(chosen),
        best,
        fewer_steps=_best([run for run in pool if run.is_fewer_steps], by),
        plan=_best([run for run in pool if run.is_plan], by),
    )


def _best(runs: Sequence[Run], by: str) -> Figures | None:
    return max(map(_figures, runs), key=lambda figures: getattr(figures, by), default=None)


def _figures(run: Run) -> Figures:
    mean, p5 = _psnr(run)
    return Figures(mean, p5, run.costs["nfe_ratio"], run.speed)  # type: ignore[arg-type]


def _psnr(run: Run) -> list[float | None]:
    return [psnr_of(run, statistic) for statistic in STATISTICS]
