"""The policy of a plan: its own schedule, resampled where a run is another, and moved by guards."""

import math
import re
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from diffusion_cache.context import PassState, Step
from diffusion_cache.errors import ConfigError, DiffusionCacheWarning
from diffusion_cache.forecasters.fitted import Fitted
from diffusion_cache.plan import Plan
from diffusion_cache.policies import Guarded, Guards, Interval, Planned
from diffusion_cache.schedule import Schedule

MASK = "100100101100"


def levels(total):
    return tuple(np.linspace(-5.0, 5.0, total).tolist())


def plan(mask=MASK, noise_levels=None, schedule=None):
    """Step 4 is forecast with fitted weights, the others by Taylor."""
    steps = len(mask)
    nodes = torch.full((steps, 1, 2), -1, dtype=torch.int32)
    weights = torch.full((steps, 1, 1, 2), math.nan, dtype=torch.float64)
    nodes[4, 0], weights[4, 0, 0] = torch.tensor([0, 3]), torch.tensor([-0.25, 1.25])
    schedule = schedule or Schedule.uniform(entry == "1" for entry in mask)
    noise_levels = levels(steps) if noise_levels is None else noise_levels
    return Plan("a", "stack", None, "auto", schedule, noise_levels, nodes, weights)


def strip(schedule, place=0):
    return "".join("1" if all(schedule.row(step, place)) else "0" for step in range(schedule.total))


@pytest.fixture
def silent():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_a_run_that_starts_late_or_ends_early():
    """Weights of step 4 go by features of steps 0 and 3."""
    first = "12 steps, and this run makes 8 of them: the plan's stated quality"
    late = (
        "makes 9 of them: Taylor forecasts take the place of fitted weights that go by features from before them, and"
    )
    for told, steps, mask in (
        (first, slice(8), MASK[:8]),
        (late, slice(3, None), MASK[3:]),
        (late, slice(2, 11), "1" + MASK[3:11]),
    ):
        part = Planned(plan()).for_run(levels(12)[steps])
        assert strip(part.schedule(len(mask))) == mask
        assert told in part.departure(len(mask))


def test_its_own_run(silent):
    policy = Planned(plan())
    assert policy.for_run(levels(12)) is policy
    assert policy.for_run([level + 5e-4 for level in levels(12)]) is policy
    assert policy.for_run(()) is policy
    assert strip(policy.schedule(12)) == MASK
    assert policy.departure(12) == policy.departure(None) == ""


@pytest.mark.parametrize("total", [6, 12, 24, 50])
def test_another_run_is_told_of_and_keeps_the_share_of_computed_steps(total, silent):
    policy = Planned(plan())
    wanted = [level + 0.5 for level in levels(total)]
    other = policy.for_run(wanted)
    assert other.departure(total).startswith("plan 'a' is for other noise levels")
    assert policy.for_run(list(wanted)) is other
    schedule = other.schedule(total)
    assert schedule.total == total
    assert schedule.nfe == pytest.approx(5 / 12 * total, abs=0.5)
    assert not Fitted.of(policy.plan).for_run(wanted).table
    assert strip(policy.schedule(12)) == MASK  # the plan itself is as it was


def test_each_kind_of_run_is_told_of():
    policy = Planned(plan())
    assert "12 steps; this run has 6" in policy.for_run(levels(6)).departure(6)
    assert "12 steps; this run has 24" in policy.for_run(levels(24)).departure(24)


def test_a_number_of_steps_alone_stretches_it():
    policy = Planned(plan(noise_levels=()))
    stretched = policy.schedule(24)
    assert policy.schedule(24) is stretched
    assert "12 steps, and this run has 24" in policy.departure(24)
    assert "Taylor" in policy.departure(24)  # in place of weights for three features
    assert stretched.nfe == 10
    assert stretched.row(0, 0) == (True,)


def test_a_plan_that_only_reuses_is_told_of_no_taylor_forecasts():
    nodes = torch.full((12, 1, 1), -1, dtype=torch.int32)
    weights = torch.full((12, 1, 1, 1), math.nan, dtype=torch.float64)
    policy = Planned(replace(plan(noise_levels=()), nodes=nodes, weights=weights))
    assert "levels are computed, and the plan's stated quality does not hold" in policy.departure(24)


@pytest.mark.parametrize(
    ("guards", "expected"),
    [
        (Guards(), MASK),
        (Guards(warmup=3), "111100101100"),
        (Guards(last=2), "100100101111"),
        (Guards(max_consecutive=1), "101101101101"),
        (Guards(max_reused=3), "100101111111"),
        (Guards(max_reused=0), "111111111111"),
        (Guards(start=0.5), "111111101100"),
        (Guards(end=0.5), "100100111111"),
    ],
)
def test_guards_move_the_runs_schedule_and_not_the_plan(guards, expected, silent):
    policy = Planned(plan())
    assert strip(Guarded(policy, guards).schedule(12)) == expected
    assert strip(policy.plan.schedule) == MASK


def test_only_the_plans_own_features_are_stored():
    """Others are no nodes of its weights; a plan without weights takes what there is."""
    guarded = Guarded(Planned(plan()), Guards(warmup=3))
    schedule, own = guarded.schedule(12), plan().schedule
    assert [schedule.stores(step, 0, 2) for step in range(12)] == [own.stores(step, 0, 2) for step in range(12)]
    assert schedule.stores(1, 0, 2) == (False,)
    assert re.search("2 more steps computed than the plan does.*quality does not hold", guarded.departure(12))
    assert Guarded(Planned(plan())).departure(12) == ""
    bare = plan()
    bare.weights[:] = math.nan
    unfitted = Guarded(Planned(replace(bare, nodes=torch.full_like(bare.nodes, -1))), Guards(warmup=3))
    assert unfitted.schedule(12).stores(2, 0, 2) == (True,)
    assert unfitted.departure(12) == ""


@pytest.mark.parametrize("guards", [Guards(max_consecutive=0), Guards(sigma_min=0.9, sigma_max=0.9)])
def test_guards_that_leave_nothing_to_reuse_are_told(guards):
    with pytest.warns(DiffusionCacheWarning, match="nothing is reused in a run of 12 steps"):
        Guarded(Interval(2), guards, noise_levels=levels(12)).schedule(12)


def test_guards_hold_for_a_resampled_run():
    guarded = Guarded(Planned(plan()), Guards(last=2))
    other = guarded.for_run(levels(24))
    assert other.guards is guarded.guards
    assert strip(other.schedule(24)).endswith("11")


def test_passes_and_spans_keep_schedules_of_their_own(silent):
    compute = [[[True, True], [True, True]], [[False, True], [True, True]], [[False, False], [False, True]]] * 4
    schedule = Schedule(tuple(tuple(map(tuple, step)) for step in compute))
    nodes = torch.full((12, 1, 2), -1, dtype=torch.int32)
    weights = torch.full((12, 1, 1, 2), math.nan, dtype=torch.float64)
    policy = Planned(replace(plan(), schedule=schedule, nodes=nodes, weights=weights))
    found = Guarded(policy, Guards(last=1)).schedule(12)
    for step in range(1, 11):
        assert found.row(step, 0) == tuple(compute[step][0])
        assert found.row(step, 1) == tuple(compute[step][1])
    assert all(found.row(11, 0))
    assert all(found.row(11, 1))


def test_without_a_number_of_steps_there_is_no_schedule():
    step = Step(1, None, 1, None, "0", (slice(None),))
    with pytest.raises(ConfigError, match="num_steps"):
        Planned(plan()).decide(step, None, PassState())


def test_spans_are_alike_where_a_plan_decides_for_all_at_once():
    assert Planned(plan()).spans_alike
    apart = Schedule(tuple(((computed == "1",) * 2,) for computed in MASK))
    assert not Planned(plan(schedule=apart)).spans_alike
