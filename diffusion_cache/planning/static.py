"""Plans from a schedule alone: with reuse or Taylor between its computed steps, nothing fitted, nothing measured."""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from ..context import Query
from ..errors import ConfigError
from ..forecasters import Taylor
from ..plan import Plan
from ..profile import Profile
from ..schedule import Schedule

CALLS_SPARED = ("denoiser", "stack")  # scopes at which a reused step counts as no evaluation at all


def static_plan(
    profile: Profile, name: str, computed: ArrayLike, order: int = 0, facts: Mapping[str, Any] | None = None
) -> Plan:
    """A plan for the profiled model and sampler with this schedule.

    computed: bool, [T], or [T, S] where spans are decided on apart. order: of the Taylor forecast, 0 for reuse. facts:
    JSON values on how the schedule was made.

    Raises:
        ConfigError: for a schedule that does not compute step 0, or is not of the profile's steps and spans; for spans
            decided on apart in several denoisers, whose schedules a plan cannot tell apart.
    """
    compute: NDArray[np.bool_] = np.asarray(computed, dtype=bool)
    apart = compute.ndim == 2
    columns = compute if apart else compute[:, None]
    if len(compute) != profile.total or (apart and compute.shape[1] != len(profile.spans)):
        raise ConfigError(
            f"{name}: a schedule {list(compute.shape)} is none of a profile with {profile.total} steps and "
            f"{len(profile.spans)} spans"
        )
    if apart and len({span.denoiser for span in profile.spans}) > 1:
        raise ConfigError(f"{name} decides on spans apart, which works with one denoiser; this profile has several")
    groups = columns.shape[1]
    nodes = torch.full((profile.total, groups, order + 1), -1, dtype=torch.int32)
    weights = torch.full((profile.total, 1, groups, order + 1), math.nan, dtype=torch.float64)
    taylor = Taylor(order)
    for span in range(groups):
        past: list[int] = []
        for step in range(profile.total):
            if columns[step, span]:
                past = [*past, step][-order - 1 :]
            elif past:
                nodes[step, span, -len(past) :] = torch.tensor(past, dtype=torch.int32)
                weights[step, 0, span] = 0.0
                weights[step, 0, span, -len(past) :] = torch.tensor(taylor.weights(Query(past, step))).double()
    return Plan(
        name=name,
        scope=profile.scope,
        depth=profile.depth,
        feature=profile.facts.get("feature", "auto"),
        schedule=Schedule(tuple((tuple(row),) for row in columns.tolist())),
        noise_levels=profile.noise_levels,
        nodes=nodes,
        weights=weights,
        nfe=evaluations(profile, compute),
        facts=facts or {},
    )


def marks(total: int, computed: Sequence[Collection[int]]) -> NDArray[np.bool_]:
    """Each span's computed steps as a schedule [T, S]."""
    return np.array([[step in steps for steps in computed] for step in range(total)])


def spared(profile: Profile) -> float:
    """The share of a denoiser evaluation that a step saves by reusing every span; a mean over denoisers."""
    if profile.scope in CALLS_SPARED:
        return 1.0
    shares: dict[str, float] = {}
    for span in profile.spans:
        shares[span.denoiser] = shares.get(span.denoiser, 0.0) + span.share
    return min(1.0, sum(shares.values()) / len(shares))


def evaluations(profile: Profile, computed: ArrayLike) -> float:
    """Denoiser evaluations that a schedule [T] or [T, S] takes, spans counted by their share."""
    reused = ~np.asarray(computed, dtype=bool)
    if reused.ndim == 1:
        return len(reused) - spared(profile) * float(reused.sum())
    return len(reused) - float((reused * [span.share for span in profile.spans]).sum())
