"""Logits, budgets and what a start from a profile is."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import profile

from diffusion_cache.errors import ConfigError
from diffusion_cache.planning.coupled import couple
from diffusion_cache.planning.static import evaluations
from diffusion_cache.planning.surrogate import cell_errors, edge_powers
from diffusion_cache.registry import routers
from diffusion_cache.routers.base import Recipe
from diffusion_cache.routers.router import CERTAIN, LIMIT, Router, above, ranked, starts

STEPS = 5


@pytest.fixture(scope="module")
def measured():
    """A profile of branches with sensitivities, which are made up."""
    found = profile("dit-digits", scope="branch", steps=STEPS)
    groups = [{"name": "all", "spans": None}]
    return replace(
        found,
        arrays={**found.arrays, "sensitivity": torch.linspace(1, 2, STEPS)[None]},
        facts={**found.facts, "sensitivity": {"groups": groups, "unmeasured": []}},
    )


def test_only_visited_steps_move():
    router = Router(torch.zeros(4, 3))
    assert torch.equal(router.logits[0], torch.full((3,), LIMIT))
    optimizers = {step: torch.optim.Adam([row], lr=0.1) for step, row in enumerate(router.rows) if step}
    for step in (1, 2, 2, 3, 3, 3):  # row 1 has had its one update before the others have theirs
        router.rows[step].sum().backward()
        optimizers[step].step()
        router.rows[step].grad = None
        if step == 1:
            first = router.logits[1]
    assert torch.equal(router.logits[1], first)
    assert not router.rows[0].requires_grad
    with torch.no_grad():
        router.rows[1].fill_(9.0)
    router.clamp(1)
    assert float(router.logits[1].max()) == LIMIT


@settings(max_examples=25, deadline=None)
@given(st.floats(0.3, 1.0), st.integers(0, 1000))
def test_the_budget_holds_to_within_one_cell(compute, seed):
    found = profile("dit-digits", scope="branch", steps=STEPS)
    logits = torch.randn(STEPS, len(found.spans), generator=torch.Generator().manual_seed(seed))
    chosen = ranked(logits, found, compute)
    spent = evaluations(found, chosen)
    shares = np.array([span.share for span in found.spans])
    left = compute * STEPS - spent
    missed = np.broadcast_to(shares, chosen.shape)[~chosen]
    assert chosen[0].all()
    assert left >= -1e-6
    assert not len(missed) or left < missed.min() + 1e-6
    assert left <= max(0.01 * STEPS, shares.max())


def test_the_highest_logits_are_chosen():
    found = profile("flux-digits", scope="stack", steps=STEPS)
    shares = [span.share for span in found.spans]
    logits = torch.tensor([[0.0, 0.0], [1.0, -3.0], [0.5, -3.0], [2.0, -3.0], [0.1, -3.0]])
    three = (1 - sum(shares)) + (sum(shares) + 2 * shares[0]) / STEPS
    assert ranked(logits, found, three).tolist() == [[True] * 2, [True, False], [False] * 2, [True, False], [False] * 2]
    assert above(logits, 0.6).tolist()[1:] == [[True, False], [True, False], [True, False], [False, False]]


def test_a_budget_out_of_reach_says_what_is_in_reach(measured):
    share = sum(span.share for span in measured.spans)
    least = 1 - share + share / STEPS
    with pytest.raises(ConfigError, match=f"from {least:.3f}"):
        ranked(torch.zeros(STEPS, 24), measured, least - 0.01)
    assert ranked(torch.zeros(STEPS, 24), measured, least + 1e-6).sum() == 24
    with pytest.raises(ConfigError, match=r"to 1, not 1\.2"):
        ranked(torch.zeros(STEPS, 24), measured, 1.2)
    with pytest.raises(ConfigError, match="3 of 5 steps"):
        ranked(torch.zeros(STEPS, 24), measured, 0.5, always=(0, 2, 4))


@pytest.mark.parametrize("order", [0, 1])
def test_a_start_from_the_profile_is_its_best_schedule(measured, order):
    logits, *others = starts(measured, 0.5, order)
    shares = [span.share for span in measured.spans]
    budget = STEPS * (0.5 - 1 + sum(shares))
    best = couple([edge_powers(damage, 2.0) for damage in cell_errors(measured, order)], shares, budget)
    expected = np.array([schedule.compute for schedule in best.schedules]).T
    assert set(logits.unique().tolist()) == {-CERTAIN, CERTAIN}
    assert (above(logits, 0.5) == expected).all()
    assert (ranked(logits, measured, 0.5) >= expected).all()
    # the others compute the same steps of all spans: half of the budget is for 2.47 of 5
    alike = [above(other, 0.5) for other in others]
    assert all((schedule == schedule[:, :1]).all() and schedule[:, 0].sum() == 3 for schedule in alike)
    assert alike[1][:, 0].tolist() == [True, True, False, True, False]
    with pytest.raises(ConfigError, match="no sensitivity"):
        starts(profile("dit-digits", scope="branch", steps=STEPS), 0.5, order)


def test_the_damage_of_reuse_is_that_of_a_forecast_from_one_step(measured):
    for reused, forecast in zip(cell_errors(measured, 0), cell_errors(measured, 1), strict=True):
        assert np.allclose(reused[0], forecast[0])


def test_every_way_to_train_says_what_it_is():
    assert {"harmonica", "sdt", "l2c", "budgeted"} <= set(routers.names())
    for name in routers.names():
        recipe = routers.get(name)()
        assert isinstance(recipe, Recipe)
        assert recipe.always(4) == ((0, 2) if name == "l2c" else (0,))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"gates": "sofr"}, "Did you mean 'soft'"),
        ({"proxy": "removd"}, "Did you mean 'removed'"),
        ({"start": "zeros"}, "start of a router"),
        ({"lr": 0.0}, "lr must be above 0"),
        ({"beta": -1.0}, "beta at least 0"),
        ({"order": 2}, "order must be 0 or 1"),
        ({"threshold": 1.0}, "threshold between"),
    ],
)
def test_options_that_cannot_be(options, said):
    with pytest.raises(ConfigError, match=said):
        routers.get("harmonica")(**options)


def test_gates_by_their_kind():
    row = torch.tensor([-1.0, 0.5, 3.0], requires_grad=True)
    hard = torch.tensor([True, False, True])
    gates = routers.get("budgeted")().gated(row, hard, 0.0)
    assert gates.mix.tolist() == gates.keep.tolist() == [1.0, 0.0, 1.0]
    assert gates.mix.requires_grad
    soft, cold = routers.get("harmonica")(), routers.get("harmonica")(gates="annealed")
    torch.testing.assert_close(soft.gated(row, hard, 1.0).mix, row.sigmoid())
    torch.testing.assert_close(cold.gated(row, hard, 1.0).mix, (row * 10).sigmoid())
    assert cold.gated(row, hard, 0.0).store == [True, False, True]
    assert cold.gated(row, hard, 0.0).keep is None
