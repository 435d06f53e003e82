"""Learning which of a profile's plans suits a prompt: scores that are linear in its embedding, by ridge regression."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..context import Condition
from ..engine import Method, Observer
from ..errors import ConfigError
from ..forecasters.fitted import Fitted
from ..models import condition_of, find_denoisers
from ..plan import Plan
from ..policies import Guarded, Planned
from ..policies.select import embedded
from ..profile import Profile
from ..profiling.generation import Teacher, attached
from .build import psnr

ALPHAS = np.logspace(-2, 6, 25)  # strengths of the ridge; the last one leaves nothing of the embedding


def with_selector(profile: Profile, teachers: Sequence[Teacher], names: Sequence[str] = ()) -> Profile:
    """The profile with scores for its plans, for system "select".

    teachers: uncached runs of calibration prompts, apart from those the plans state their quality on; a few for each
    kind of prompt. names: of the plans to choose from, of about equal NFE (or the most expensive one would always be
    best); () for all. The score of a plan is how much better its PSNR is than the mean of the plans' on that prompt.
    The ridge's strength is chosen by leave-one-out error: where prompts tell nothing, the best plan on average is left.

    Raises:
        ConfigError: for fewer than two plans, plans of different scopes, or prompts that all look the same.
    """
    known = {plan.name: plan for plan in profile.plans}
    names = tuple(names) or tuple(known)
    missing = [name for name in names if name not in known]
    if missing or len(set(names)) < 2:
        raise ConfigError(f"select needs the names of two or more of the profile's plans: {', '.join(known)}")
    plans = [known[name] for name in names]
    if len({(plan.scope, plan.depth) for plan in plans}) > 1:
        raise ConfigError("select cannot change the scope from run to run: choose plans of one scope and depth")
    seen = [_seen(teacher, plans) for teacher in teachers]
    counts = [teacher.batch.count for teacher in teachers]
    source, labels, inputs = _inputs([condition for condition, _ in seen], counts)
    values = np.concatenate([values for _, values in seen])  # [n, K]
    weights, bias = scores(inputs.double().numpy(), values - values.mean(1, keepdims=True))
    facts = {
        "plans": list(names),
        "source": source,
        "labels": list(labels),
        "fallback": names[int(values.mean(0).argmax())],
        "samples": len(values),
    }
    arrays = {
        "select_weights": torch.from_numpy(weights).float(),
        "select_bias": torch.from_numpy(bias).float(),
    }
    return replace(profile, arrays={**profile.arrays, **arrays}, facts={**profile.facts, "select": facts})


def scores(inputs: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ridge regression of targets [n, K] on inputs [n, D]: weights [K, D] and bias [K]; one strength for all."""
    from sklearn.linear_model import RidgeCV

    fitted = RidgeCV(ALPHAS).fit(inputs, targets)
    return np.atleast_2d(fitted.coef_), np.atleast_1d(fitted.intercept_)


def _seen(teacher: Teacher, plans: Sequence[Plan]) -> tuple[Condition, np.ndarray]:
    """What the batch's first call is conditioned on, and the PSNR of each sample under each plan, [n, K]."""
    batch, first, values = teacher.batch, [], []

    def note(module: Any, args: Any, kwargs: Any) -> None:
        first.append(condition_of(kwargs))

    for plan in plans:
        method = Method(Guarded(Planned(plan)), Fitted.of(plan), plan.scope, plan.depth, "batch")
        handles = [
            denoiser.register_forward_pre_hook(note, with_kwargs=True)
            for denoiser in find_denoisers(batch.pipe).values()
        ]
        try:
            with attached(batch.pipe, method, Observer()):
                images = batch.images(batch.call()).detach().float()
        finally:
            for handle in handles:
                handle.remove()
        values.append(psnr(images, teacher.images))
    if not first or first[0] is None:
        raise ConfigError(
            f"{type(batch.pipe).__name__}'s denoiser is given no prompt embedding or class label that is known, so "
            "that no plan can be chosen by it"
        )
    return first[0], np.array(values).T


def _inputs(conditions: Sequence[Condition], counts: Sequence[int]) -> tuple[str, tuple[int, ...], Tensor]:
    """The argument's name, the classes (or () for embeddings), and each sample's condition as it is scored, [n, D]."""
    source = conditions[0].name
    # [guidance branches, n, …] each
    by_sample = [item.values.cpu().unflatten(0, (-1, count)) for item, count in zip(conditions, counts, strict=True)]
    if conditions[0].values.ndim > 1:
        rows = torch.cat([values.mean(0) for values in by_sample])
        labels: tuple[int, ...] = ()
    else:
        whole = torch.cat(by_sample, dim=1)
        varying = whole[(whole != whole[:, :1]).any(1)]  # the class that stands for none is the same for all
        labels = tuple(varying.unique().tolist())
        rows = torch.zeros(0, 0)
        if labels:
            parts = [embedded(Condition(source, sample), source, labels, len(labels)) for sample in whole.T]
            rows = torch.stack([part.mean(0) for part in parts if part is not None])
    if not len(rows) or bool((rows == rows[0]).all()):
        raise ConfigError(
            f"the first call's {source} is the same for all calibration prompts (the branch without a prompt may come "
            "first), so that no plan can be chosen by it"
        )
    return source, labels, rows
