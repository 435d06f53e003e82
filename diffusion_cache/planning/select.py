"""Plans for kinds of prompts, and learning which of them suits a prompt: scores by ridge regression."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..context import Condition
from ..engine import Observer
from ..errors import ConfigError
from ..forecasters.fitted import Fitted
from ..models import condition_of, find_denoisers
from ..plan import HELD_OUT_PROMPTS, REFITTED, Plan, Quality
from ..policies import Planned
from ..policies.select import Select, embedded
from ..profile import Profile
from ..profiling import trajectory
from ..profiling.generation import Teacher, attached, plan_method
from .build import psnr
from .selector import ARRAYS, STORED

SHARE = 0.5  # of the way to weights that were fitted to few samples
MOST_FOLDS = 20
ALPHAS = np.logspace(-2, 6, 25)  # strengths of the ridge; the last one leaves nothing of the embedding


class Seen(NamedTuple):
    """What plans make of samples. conditions: of each sample, a row per guidance branch. values: PSNR in dB, [n, K]."""

    plans: tuple[Plan, ...]
    conditions: tuple[Condition, ...]
    values: NDArray[np.float64]

    def only(self, places: Sequence[int]) -> "Seen":
        """The same of some of the plans."""
        return Seen(tuple(self.plans[place] for place in places), self.conditions, self.values[:, list(places)])


def see(teachers: Sequence[Teacher], plans: Sequence[Plan]) -> Seen:
    """Run each plan on each teacher's batch.

    Raises:
        ConfigError: for a denoiser that is given no prompt embedding or class label that is known.
    """
    conditions: list[Condition] = []
    values: list[NDArray[np.float64]] = []
    for teacher in teachers:
        first, by_plan = None, []
        for plan in plans:
            first, of_plan = _run(teacher, plan)
            by_plan.append(of_plan)
        conditions += _by_sample(first, teacher)
        values.append(np.array(by_plan).T)
    return Seen(tuple(plans), tuple(conditions), np.concatenate(values))


def refitted(plan: Plan, teacher: Teacher, name: str) -> Plan:
    """The plan with weights fitted to a teacher's samples, of one kind of prompt.

    Its schedule stays, and its settings of the fit where it was fitted. Its own weights are moved SHARE of the way to
    those of the samples, as these are few, or stay where those are for features of other steps; a plan without any gets
    those. What was measured of it is left out.
    """
    regressors = plan.facts.get("regressors") or ()
    settings = trajectory.Settings(
        scope=plan.scope,
        depth=plan.depth,
        history=plan.facts.get("history", trajectory.Settings.history),
        ridge=plan.facts.get("ridge", trajectory.Settings.ridge),
        feature=plan.feature,  # type: ignore[arg-type]  # one of FEATURES
        groups=tuple(range(plan.spans)) if plan.spans > 1 else (),
        scale="scale" in regressors,
        bias="bias" in regressors,
        robust=bool(plan.facts.get("robust")),
    )
    bare = Plan(
        name,
        plan.scope,
        plan.depth,
        plan.feature,
        plan.schedule,
        plan.noise_levels,
        row_passes=plan.row_passes,
        sigmas=plan.sigmas,
        nfe=plan.nfe,
    )
    result = trajectory.fit(teacher, Planned(bare), settings)
    nodes, weights, correction = result.forecaster.as_tensors(plan.total, teacher.branches)
    facts = {**plan.facts, REFITTED: teacher.batch.count}
    facts.pop(HELD_OUT_PROMPTS, None)
    if weights.shape == plan.weights.shape and bool(plan.weights.isfinite().any()):
        alike = (nodes == plan.nodes).all(dim=2)[:, None, :, None]
        weights = _moved(plan.weights, weights.where(alike, torch.nan))
        nodes, correction = plan.nodes, plan.correction
    else:
        facts["left_to_taylor"] = {str(step): why for step, why in sorted(result.notes.items())}
    return replace(bare, nodes=nodes, weights=weights, correction=correction, facts=facts)


def _moved(own: Tensor, found: Tensor) -> Tensor:
    """SHARE of the way from a plan's own weights to those found, where there are both; else its own."""
    return torch.where(found.isfinite(), torch.lerp(own, found, SHARE), own)


def best_together(values: NDArray[np.float64], count: int) -> list[int]:
    """Of plans with PSNRs [kinds of prompts, K], the first and those that gain most beside it, one after another.

    What counts is the mean over the kinds of the best of the chosen plans. Ends early where no plan gains anything.
    """
    chosen = [0]
    best = values[:, 0]
    while len(chosen) < count:
        gains = np.maximum(values - best[:, None], 0).mean(0)
        place = int(gains.argmax())
        if gains[place] <= 0:
            break
        chosen.append(place)
        best = np.maximum(best, values[:, place])
    return chosen


def with_selector(profile: Profile, seen: Seen, held_out: Seen | None = None, seeds: Sequence[int] = ()) -> Profile:
    """The profile with scores for a group of its plans, for system "select", beside the groups that it has.

    seen: plans to choose among, of about equal NFE (or the most expensive one would always be best), on calibration
    prompts, a few samples for each kind of prompt, apart from those that the plans state their quality on. held_out:
    the same plans on samples that nothing was fitted to or chosen by, with their seeds, to state what the choice
    reaches there. The score of a plan is how much better its PSNR is than the mean of its group on that prompt. The
    ridge's strength is chosen by the error on samples left out, of prompts with all of theirs, as another prompt is to
    be expected: where prompts tell nothing, the best plan on average is left.

    Raises:
        ConfigError: for fewer than two plans, plans that the profile does not have, or of different scopes; for prompts
            that all look the same, or are of other classes than those of the groups that there are.
    """
    names, known = [plan.name for plan in seen.plans], [plan.name for plan in profile.plans]
    if len(set(names)) < 2 or not set(names) <= set(known):
        raise ConfigError(
            f"select needs two or more of the profile's plans to choose among, not {', '.join(names) or 'none'}: "
            f"it has {', '.join(known) or 'none'}"
        )
    if len({(plan.scope, plan.depth) for plan in seen.plans}) > 1:
        raise ConfigError("select cannot change the scope from run to run: choose plans of one scope and depth")
    policy, samples = _learned(seen), len(seen.values)
    group: dict[str, Any] = {"plans": names, "fallback": names[policy.fallback], "samples": samples}
    if held_out is not None:
        group["held_out"] = Quality.of("psnr", reached(policy, held_out), seeds).to_json()
    arrays = dict(zip(ARRAYS, (policy.weights, policy.bias), strict=True))
    told = {"source": policy.source, "labels": list(policy.labels), "choices": [group]}
    before = profile.facts.get(STORED)
    if before is not None:
        if any(before[name] != told[name] for name in ("source", "labels")):
            raise ConfigError("the profile's groups of plans were learned for other prompts: learn all of them again")
        arrays = {name: torch.cat([profile.arrays[name], array]) for name, array in arrays.items()}
        told["choices"] = [*before["choices"], group]
    return replace(profile, arrays={**profile.arrays, **arrays}, facts={**profile.facts, STORED: told})


def without_selector(profile: Profile) -> Profile:
    """The profile without such groups; its plans stay."""
    arrays = {name: array for name, array in profile.arrays.items() if name not in ARRAYS}
    return replace(profile, arrays=arrays, facts={name: fact for name, fact in profile.facts.items() if name != STORED})


def reached(policy: Select, seen: Seen) -> list[float]:
    """The PSNR of each sample under the plan that the policy chooses for it alone, in dB."""
    names = [plan.name for plan in seen.plans]
    chosen = [policy.choose(condition, None)[0].plan.name for condition in seen.conditions]
    return [float(row[names.index(name)]) for row, name in zip(seen.values, chosen, strict=True)]


def scores(inputs: NDArray[np.float64], targets: NDArray[np.float64], together: bool = False) -> tuple[Tensor, Tensor]:
    """Ridge regression of targets [n, K] on inputs [n, D]: weights [K, D] and bias [K]; one strength for all.

    together: samples of the same inputs are left out together where the strength is chosen, for inputs to come are
    others; else one by one.
    """
    from sklearn.linear_model import Ridge, RidgeCV
    from sklearn.model_selection import GridSearchCV, GroupKFold

    _, groups = np.unique(inputs, axis=0, return_inverse=True)
    folds = min(int(groups.max()) + 1, MOST_FOLDS)
    if together and folds > 1:
        searched = GridSearchCV(Ridge(), {"alpha": ALPHAS}, cv=GroupKFold(folds), scoring="neg_mean_squared_error")
        fitted = searched.fit(inputs, targets, groups=groups.ravel()).best_estimator_
    else:
        fitted = RidgeCV(ALPHAS).fit(inputs, targets)
    weights, bias = np.atleast_2d(fitted.coef_), np.atleast_1d(fitted.intercept_)
    return torch.from_numpy(weights).float(), torch.from_numpy(bias).float()


def _learned(seen: Seen) -> Select:
    """The policy that chooses among the plans."""
    source, labels, inputs = _inputs(seen.conditions)
    gains = seen.values - seen.values.mean(1, keepdims=True)
    weights, bias = scores(inputs.double().numpy(), gains, together=not labels)
    fallback = int(seen.values.mean(0).argmax())
    forecasters = tuple(map(Fitted.of, seen.plans))
    return Select(tuple(map(Planned, seen.plans)), forecasters, weights, bias, source, labels, fallback)


def _run(teacher: Teacher, plan: Plan) -> tuple[Condition | None, list[float]]:
    """What the plan's run of a batch is conditioned on at its first call, and each sample's PSNR."""
    batch = teacher.batch
    first: list[Condition | None] = []

    def note(module: Any, args: Any, kwargs: Any) -> None:
        first.append(condition_of(kwargs))

    handles = [
        denoiser.register_forward_pre_hook(note, with_kwargs=True) for denoiser in find_denoisers(batch.pipe).values()
    ]
    try:
        with attached(batch.pipe, plan_method(plan), Observer()):
            images = batch.images(batch.call()).detach().float()
    finally:
        for handle in handles:
            handle.remove()
    return first[0] if first else None, psnr(images, teacher.images)


def _by_sample(condition: Condition | None, teacher: Teacher) -> list[Condition]:
    """The condition of each sample of a batch: its rows, one for each guidance branch."""
    batch = teacher.batch
    if condition is None:
        raise ConfigError(
            f"{type(batch.pipe).__name__}'s denoiser is given no prompt embedding or class label that is known, so "
            "that no plan can be chosen by it"
        )
    rows = condition.values.cpu().unflatten(0, (-1, batch.count))
    return [Condition(condition.name, rows[:, sample]) for sample in range(batch.count)]


def _inputs(conditions: Sequence[Condition]) -> tuple[str, tuple[int, ...], Tensor]:
    """The argument's name, the classes (or () for embeddings), and each sample's condition as it is scored, [n, D]."""
    source = conditions[0].name
    labels: tuple[int, ...] = ()
    width = conditions[0].values.shape[-1]
    if conditions[0].values.ndim == 1:
        whole = torch.stack([condition.values for condition in conditions], dim=1)  # [guidance branches, n]
        varying = whole[(whole != whole[:, :1]).any(1)]  # the class that stands for none is the same for all
        labels = tuple(varying.unique().tolist())
        width = len(labels)
    found = [embedded(condition, source, labels, width) for condition in conditions] if width else []
    rows = torch.stack([values.mean(0) for values in found if values is not None]) if found else torch.zeros(0, 0)
    if not len(rows) or bool((rows == rows[0]).all()):
        raise ConfigError(
            f"the first call's {source} is the same for all calibration prompts (the branch without a prompt may come "
            "first), so that no plan can be chosen by it"
        )
    return source, labels, rows
