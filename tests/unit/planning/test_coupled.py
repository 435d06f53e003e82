"""Sharing a budget between spans: against every choice there is."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_cache.errors import ConfigError
from diffusion_cache.planning.coupled import allocate, couple, curves
from diffusion_cache.planning.dynamic import best_schedule


def random_curves(seed, spans, steps, convex=False):
    rng = np.random.default_rng(seed)
    drops = rng.random((spans, steps))
    if convex:
        drops = -np.sort(-drops, axis=1)
    damage = np.concatenate([np.cumsum(drops[:, ::-1], axis=1)[:, ::-1], np.zeros((spans, 1))], axis=1)
    damage[:, 0] = np.inf
    return damage


def spent(counts, cost, reused, steps):
    return sum(c * k + r * (steps - k) for k, c, r in zip(counts, cost, reused, strict=True))


def exhaustive(damage, cost, budget, reused):
    spans, columns = damage.shape
    affordable = [
        counts
        for counts in product(range(columns), repeat=spans)
        if spent(counts, cost, reused, columns - 1) <= budget * (1 + 1e-9)
    ]
    return min((sum(damage[s, k] for s, k in enumerate(counts)) for counts in affordable), default=np.inf)


cases = given(
    seed=st.integers(0, 2**32 - 1),
    spans=st.integers(1, 3),
    steps=st.integers(1, 6),
    share=st.floats(0.0, 1.0),
    free=st.booleans(),
    rising=st.booleans(),
)


def make_case(seed, spans, steps, share, free, rising):
    """Curves, costs and a budget between the least and the most that can be spent."""
    rng = np.random.default_rng(seed)
    damage = random_curves(seed, spans, steps)
    if rising:  # more computed steps may do more damage, and some numbers may not be possible
        damage[:, 1:] = rng.permuted(damage[:, 1:], axis=1)
        damage[:, 1:-1][rng.random((spans, steps - 1)) < 0.3] = np.inf
    cost = rng.integers(1, 6, size=spans).astype(float)
    reused = np.zeros(spans) if free else rng.integers(0, 7, size=spans) / 4
    options = np.outer(cost, np.arange(steps + 1)) + np.outer(reused, steps - np.arange(steps + 1))
    least = np.where(np.isfinite(damage), options, np.inf).min(axis=1).sum()
    return damage, cost, reused, least + share * (options.max() * spans - least)


@settings(max_examples=60, deadline=None)
@cases
def test_the_integer_programme_finds_the_best_choice(seed, spans, steps, share, free, rising):
    damage, cost, reused, budget = make_case(seed, spans, steps, share, free, rising)
    found = allocate(damage, cost, budget, reused, exact=True)
    best = exhaustive(damage, cost, budget, reused)
    assert found.total == pytest.approx(best, rel=1e-6, abs=1e-9)
    assert found.total == pytest.approx(sum(damage[s, k] for s, k in enumerate(found.counts)))
    assert found.cost == pytest.approx(spent(found.counts, cost, reused, steps))
    assert found.cost <= budget * (1 + 1e-9)
    assert found.bound <= best * (1 + 1e-6) + 1e-9


@settings(max_examples=200, deadline=None)
@cases
def test_the_relaxation_is_within_its_reported_gap(seed, spans, steps, share, free, rising):
    damage, cost, reused, budget = make_case(seed, spans, steps, share, free, rising)
    found = allocate(damage, cost, budget, reused)
    best = exhaustive(damage, cost, budget, reused)
    assert found.bound - 1e-9 <= best <= found.total + 1e-9
    assert found.gap == pytest.approx((found.total - found.bound) / found.total if found.total else 0.0)
    assert best >= found.total * (1 - found.gap) - 1e-9
    assert found.total == pytest.approx(sum(damage[s, k] for s, k in enumerate(found.counts)))
    assert found.cost == pytest.approx(spent(found.counts, cost, reused, steps))
    assert found.cost <= budget * (1 + 1e-9)


def test_many_spans_leave_a_small_gap():
    damage = random_curves(0, 100, 40, convex=True)
    cost = np.random.default_rng(1).random(100) + 0.5
    found = allocate(damage, cost, 0.4 * cost.sum() * 40)
    assert 0 <= found.gap < 1e-3
    assert found.bound > 0
    assert found.cost <= 0.4 * cost.sum() * 40


def test_what_the_relaxation_leaves_is_spent():
    # the hull of the first span goes from 1 to 4 computed steps at once; what that leaves over buys two of them
    damage = [[np.inf, 10.0, 9.0, 8.0, 0.0], [np.inf, 1.0, 1.0, 1.0, 1.0]]
    assert allocate(damage, [1.0, 1.0], 4.0).counts == (3, 1)
    assert allocate(damage, [1.0, 1.0], 5.0).counts == (4, 1)


def test_cheap_and_harmful_spans_are_computed_most():
    curve = random_curves(3, 1, 20, convex=True)
    found = allocate(np.concatenate([curve, curve, 4 * curve]), [1.0, 3.0, 1.0], 40.0)
    assert found.counts[1] < found.counts[0] < found.counts[2]


def test_a_larger_budget_is_never_worse_exactly():
    damage = random_curves(7, 4, 8)
    cost = [1.0, 2.0, 1.5, 0.5]
    totals = [allocate(damage, cost, budget, exact=True).total for budget in np.arange(5, 41, 5)]
    assert totals == sorted(totals, reverse=True)
    assert totals[-1] == 0.0


def test_reused_steps_cost_too():
    damage = random_curves(2, 2, 10, convex=True)
    plain = allocate(damage, 1.0, 12.0)
    taxed = allocate(damage, 1.0, 12.0, reused=0.25)
    assert sum(plain.counts) == 12
    assert sum(taxed.counts) == 9  # 0.75 k + 0.25 · 20 ≤ 12
    assert taxed.cost == 11.75
    # spans that cost nothing more when computed are computed
    assert allocate(damage, 1.0, 20.0, reused=1.0).counts == (10, 10)


@pytest.mark.parametrize("exact", [False, True])
def test_a_budget_that_is_too_small_names_the_least(exact):
    damage = random_curves(0, 3, 5)
    damage[1, :3] = np.inf
    with pytest.raises(ConfigError, match=r"the cheapest costs 8\.5$"):
        allocate(damage, [1.0, 2.0, 1.5], 8.4, exact=exact)
    assert allocate(damage, [1.0, 2.0, 1.5], 8.5, exact=exact).counts == (1, 3, 1)


def test_a_budget_that_costs_add_up_to_is_enough():
    """Three tenths are more than 0.3 in floating point."""
    assert allocate([[np.inf, 0.0]] * 3, 0.1, 0.3).counts == (1, 1, 1)


@pytest.mark.parametrize(
    ("damage", "options", "message"),
    [
        ([[np.inf, np.nan]], {}, "damages must be"),
        ([[np.inf, -1.0]], {}, "damages must be"),
        ([np.inf, 1.0], {}, "damages must be"),
        ([[np.inf, np.inf]], {}, "no schedule at all"),
        ([[np.inf, 1.0]], {"cost": [1.0, 2.0]}, "cost must be"),
        ([[np.inf, 1.0]], {"cost": [-1.0]}, "cost must be"),
        ([[np.inf, 1.0]], {"reused": [np.inf]}, "reused must be"),
        ([[np.inf, 1.0]], {"budget": np.nan}, "cheapest costs 1"),
    ],
)
def test_what_cannot_be_shared(damage, options, message):
    with pytest.raises(ConfigError, match=message):
        allocate(damage, **{"cost": 1.0, "budget": 5.0, **options})


def test_couple_makes_the_schedules_it_counted():
    rng = np.random.default_rng(0)
    spans = [scale * rng.random((8, 8, 8)) for scale in (1.0, 5.0, 0.1)]
    found = couple(iter(spans), [1.0, 2.0, 1.0], 18.0, exact=True, objective="power", last=1)
    each = [best_schedule(damage, 8, "power", last=1) for damage in spans]
    assert tuple(sum(best.compute) for best in found.schedules) == found.allocation.counts
    assert found.schedules == tuple(each[s][k] for s, k in enumerate(found.allocation.counts))
    assert all(best.compute[-1] for best in found.schedules)
    assert found.allocation == allocate(curves(each, 8), [1.0, 2.0, 1.0], 18.0, exact=True)
    assert found.allocation.total == pytest.approx(sum(best.total for best in found.schedules))


def test_couple_needs_spans_of_one_length():
    with pytest.raises(ConfigError, match="no span"):
        couple([], 1.0, 5.0)
    with pytest.raises(ConfigError, match=r"same number of steps, not \[4, 5\]"):
        couple([np.zeros((4, 4, 4)), np.zeros((5, 5, 5))], 1.0, 5.0)
