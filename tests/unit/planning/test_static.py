"""Plans from schedules alone."""

import grams
import pytest
import torch

from diffusion_cache.errors import ConfigError
from diffusion_cache.forecasters.fitted import Fit, Fitted
from diffusion_cache.planning.static import evaluations, spared, static_plan

STEPS = 6


def profile(kind="stack", spans=2, **fields):
    return grams.profile_of(torch.ones(spans, STEPS, 3), kind, **fields)


def test_reuse_of_the_last_computed_step():
    plan = static_plan(profile(), "made", [1, 0, 0, 1, 0, 1], facts={"note": 3})
    assert (plan.name, plan.scope, plan.facts, plan.history) == ("made", "stack", {"note": 3}, 1)
    assert [row[0][0] for row in plan.schedule.compute] == [True, False, False, True, False, True]
    assert plan.nodes[:, 0, 0].tolist() == [-1, 0, 0, -1, 3, -1]
    assert Fitted.of(plan).table == {(step, 0, -1): Fit((node,), (1.0,)) for step, node in ((1, 0), (2, 0), (4, 3))}


def test_taylor_through_the_last_two():
    table = Fitted.of(static_plan(profile(), "made", [1, 0, 1, 0, 0, 0], order=1)).table
    assert table[1, 0, -1] == Fit((0,), (1.0,))
    assert table[3, 0, -1] == Fit((0, 2), (-0.5, 1.5))
    assert table[5, 0, -1] == Fit((0, 2), (-1.5, 2.5))


def test_spans_apart():
    computed = [[1, 1], [0, 1], [1, 0], [0, 0], [1, 1], [0, 1]]
    plan = static_plan(profile("branch"), "made", computed)
    assert [list(map(int, row[0])) for row in plan.schedule.compute] == computed
    assert plan.nodes[:, :, 0].tolist() == [[-1, -1], [0, -1], [-1, 1], [2, 1], [-1, -1], [4, -1]]
    assert torch.equal(plan.weights[..., 0].isnan(), torch.tensor(computed, dtype=torch.bool)[:, None])


@pytest.mark.parametrize(
    ("kind", "shares", "computed", "nfe"),
    [
        ("stack", [0.3, 0.6], [1, 0, 0, 1, 0, 1], 3.0),  # what is outside the stacks is not counted
        ("denoiser", [1.0], [1, 0, 0, 0, 0, 0], 1.0),
        ("cut", [0.75], [1, 0, 0, 1, 0, 1], 3 + 3 * 0.25),
        ("branch", [0.25, 0.5], [[1, 1], [0, 1], [1, 0], [0, 0], [1, 1], [0, 1]], 6 - 3 * 0.25 - 2 * 0.5),
    ],
)
def test_evaluations_count_what_a_reused_step_still_runs(kind, shares, computed, nfe):
    found = profile(kind, len(shares), shares=shares, depth=1 if kind == "cut" else None)
    assert evaluations(found, computed) == pytest.approx(nfe)
    assert static_plan(found, "made", computed).nfe == pytest.approx(nfe)
    assert spared(found) == (1.0 if kind in ("stack", "denoiser") else pytest.approx(sum(shares)))


def test_shares_that_are_rounded_spare_no_more_than_all():
    assert spared(profile("block", 3, shares=(0.5, 0.25, 0.25 + 1e-9))) == 1.0


@pytest.mark.parametrize(
    ("computed", "message"),
    [
        ([1, 0, 1], "is none of a profile"),
        ([[1, 1, 1]] * STEPS, "is none of a profile"),
        ([0, 1, 1, 1, 1, 1], "must compute its first step"),
    ],
)
def test_schedules_that_cannot_be(computed, message):
    with pytest.raises(ConfigError, match=message):
        static_plan(profile(), "made", computed)


def test_what_is_stored_comes_back():
    plan = static_plan(profile(), "made", [1, 0, 0, 1, 0, 1], order=2)
    again = type(plan).from_json(plan.to_json(), plan.tensors())
    assert again.schedule == plan.schedule
    assert torch.equal(again.nodes, plan.nodes)
    assert torch.equal(again.weights.nan_to_num(-9), plan.weights.nan_to_num(-9))
