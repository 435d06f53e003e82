"""Plans for language models: which refinements of a block are computed, chosen and measured on calls kept apart.

With the profile of `profiling.refinements`, the damage of a refinement t that goes on with what refinement i gave is
how far apart the layers are at the two, and the best schedule is the same path over computed steps as for denoisers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError
from ..language import Planned, enabled
from ..measure import paired
from ..ops import double
from ..plan import Plan, Quality, Speed
from ..profile import Profile
from ..profiling.refinements import Progress
from ..schedule import spaced
from . import surrogate
from .dynamic import best_schedule
from .static import static_plan

METRIC = "same_tokens"  # share of an answer's tokens that are as without a cache
PAIRS = 5
Call = Mapping[str, Any]


def planned(
    pipe: Any,
    profile: Profile,
    computed: Sequence[int],
    tuning: Sequence[Call],
    held_out: Sequence[Call],
    progress: Progress = lambda what, done, of: None,
) -> Profile:
    """The profile with a plan for each number of computed refinements of a block, named "nfe-4" and so on.

    tuning, held_out: arguments of calls of the pipeline that give the same every time (greedy). Which of the
    `candidates` is best is told by the first; what a plan states, the share of tokens that are as without a cache and
    the speed (paired times of the first call: the process's CPU time on the CPU, else wall time), by the others.

    Raises:
        ConfigError: for a profile of another pipeline, and numbers of refinements that cannot be.
    """
    profile.check(pipe, {"model": pipe.model})
    if not tuning or not held_out:
        raise ConfigError("plans are chosen on tuning calls and measured on held_out ones: give at least one of each")
    with enabled(pipe, None):
        chosen, expected = ([pipe(**call).sequences for call in calls] for calls in (tuning, held_out))
        plans = []
        for number, count in enumerate(computed):
            progress("plans", number, len(computed))
            tried = candidates(profile, count)
            scores = [_same(pipe, plan, tuning, chosen).mean().item() for plan in tried]
            best = replace(tried[scores.index(max(scores))], name=f"nfe-{count}")  # the first of equals
            plans.append(_measured(pipe, best, held_out, expected))
    return profile.with_plans(plans)


def candidates(profile: Profile, computed: int) -> list[Plan]:
    """Plans that compute so many refinements: with the least sum of damages, the least worst one, and evenly spaced.

    Raises:
        ConfigError: for a number of refinements that cannot be computed.
    """
    damage, count = damages(profile), range(computed, computed + 1)
    found = {
        "sum": best_schedule(damage, count)[computed].computed,
        "minimax": best_schedule(damage, count, "minimax")[computed].computed,
        "even": spaced(profile.total, computed, 1.0),
    }
    return [
        static_plan(profile, name, [step in steps for step in range(profile.total)], facts={"schedule": name})
        for name, steps in found.items()
    ]


def damages(profile: Profile) -> surrogate.Array:
    """‖F_i − F_t‖ / ‖F_t‖ of what layers add to the tokens that are masked at t, mean over layers: [1, T, T]."""
    grams = surrogate.own_grams(profile)[:, 0]
    alike = np.ones(profile.total)
    return np.mean(
        [surrogate.damages(surrogate.taylor_errors(gram)[:1], alike, gram.diagonal()) for gram in grams], axis=0
    )


def _same(pipe: Any, plan: Plan, calls: Sequence[Call], expected: Sequence[Tensor]) -> Tensor:
    """Of each sample, the share of tokens that are as expected, up to the token that ends its answer."""
    with enabled(pipe, Planned(plan)):
        return torch.cat(
            [
                agreement(pipe(**call).sequences, tokens, call.get("eos_token_id", getattr(pipe, "eos_token_id", None)))
                for call, tokens in zip(calls, expected, strict=True)
            ]
        )


def agreement(found: Tensor, expected: Tensor, end: int | None) -> Tensor:
    """The share of tokens that are alike in each row, of the longer one's: [rows], float64.

    What follows a row's first `end` is no part of it: masks, which are alike whatever was answered.
    """
    lengths = torch.stack([_lengths(tokens, end) for tokens in (found, expected)])
    within = torch.arange(found.shape[1], device=found.device) < lengths.amin(0)[:, None]
    return double((found == expected) & within).sum(1) / lengths.amax(0)


def _lengths(tokens: Tensor, end: int | None) -> Tensor:
    """Of each row, how many tokens there are up to the first `end`."""
    ends = torch.eq(tokens, -1 if end is None else end)
    return torch.where(ends.any(1), ends.int().argmax(1) + 1, tokens.shape[1])


def _measured(pipe: Any, plan: Plan, calls: Sequence[Call], expected: Sequence[Tensor]) -> Plan:
    values = _same(pipe, plan, calls, expected).tolist()

    def with_plan() -> None:
        with enabled(pipe, Planned(plan)):
            pipe(**calls[0])

    timing = paired(lambda: pipe(**calls[0]), with_plan, PAIRS)
    ratios = sorted(timing.cpu_ratios if torch.device(pipe.device).type == "cpu" else timing.wall_ratios)
    speed = Speed(median(ratios), ratios[0], ratios[-1], str(pipe.device), len(expected[0]))
    return replace(plan, quality=Quality.of(METRIC, values, range(len(values))), speed=speed)
