"""Best schedules: against every schedule there is, and what the guards promise."""

from itertools import accumulate, combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_cache.errors import ConfigError
from diffusion_cache.planning.dynamic import best_schedule
from diffusion_cache.planning.surrogate import MOST_STEPS, damages, taylor_errors


def random_damage(seed, steps, levels=None):
    """Random where the schedule reads it, NaN where it must not."""
    rng = np.random.default_rng(seed)
    values = rng.random((steps, steps, steps)) if levels is None else rng.integers(levels, size=(steps,) * 3) / 4
    node, current, step = np.indices(values.shape)
    read = (node <= current) & (current < step) & ((node > 0) | (current == 0))
    return np.where(read, values, np.nan)


def paid(damage, path):
    """The damages of a schedule's reused steps, by its definition."""
    result = []
    for step in range(len(damage)):
        past = [node for node in path if node <= step]
        if past[-1] != step:
            result.append(damage[past[-2] + 1 if len(past) > 1 else 0, past[-1], step])
    return result


def keeps(path, steps, last=0):
    return {0, *range(max(0, steps - last), steps)} <= set(path)


def scored(damage, path, objective):
    values = paid(damage, path)
    total = sum(value**2 for value in values) if objective == "power" else sum(values)
    worst = max(values, default=0.0)
    return (worst, total) if objective == "minimax" else (total,)


def exhaustive(damage, objective, last=0):
    """The best score for each number of computed steps."""
    steps = len(damage)
    best = {}
    for count in range(1, steps + 1):
        for rest in combinations(range(1, steps), count - 1):
            path = (0, *rest)
            if keeps(path, steps, last):
                best[count] = min(best.get(count, (np.inf,)), scored(damage, path, objective))
    return best


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    steps=st.integers(1, 9),
    levels=st.sampled_from([None, 3]),
    objective=st.sampled_from(["sum", "power", "minimax"]),
    last=st.integers(0, 3),
)
def test_equals_the_best_of_all_schedules(seed, steps, levels, objective, last):
    damage = random_damage(seed, steps, levels)
    expected = exhaustive(damage, objective, last)
    found = best_schedule(damage, steps, objective, last)
    assert list(found) == sorted(expected)
    for count, best in found.items():
        assert len(best.computed) == sum(best.compute) == count
        assert len(best.compute) == steps
        assert keeps(best.computed, steps, last)
        score = scored(damage, best.computed, objective)
        assert score == pytest.approx(expected[count], abs=1e-12)
        assert best.total == pytest.approx(score[-1], abs=1e-12)
        assert best.worst == max(paid(damage, best.computed), default=0.0)
        if objective == "minimax":
            assert best.worst == expected[count][0]


@pytest.mark.parametrize("objective", ["sum", "power", "minimax"])
def test_forbidden_reuse_is_never_used(objective):
    damage = random_damage(3, 9)
    damage[:, :, 5] = np.inf
    damage[3, 4, 6:] = np.inf
    found = best_schedule(damage, 9, objective)
    assert min(found) == 2
    for best in found.values():
        assert best.compute[5]
        assert np.isfinite([best.total, best.worst]).all()
        assert scored(damage, best.computed, objective) == pytest.approx(
            exhaustive(damage, objective)[len(best.computed)]
        )


def drifting(steps, seed=0):
    """Damages of features that move smoothly, faster at the start."""
    rng = np.random.default_rng(seed)
    speed = np.exp(-np.arange(steps) / (steps / 3)) + 0.1
    motion = np.cumsum(rng.normal(size=(steps, 64)), axis=0) / np.sqrt(steps)
    features = rng.normal(size=64) * 3 + np.cumsum(speed[:, None] * motion, axis=0)
    gram = features @ features.T
    return damages(taylor_errors(gram), np.ones(steps), gram.diagonal())


@pytest.mark.parametrize("objective", ["sum", "power", "minimax"])
def test_more_budget_is_never_worse(objective):
    steps = 40
    found = best_schedule(drifting(steps), steps, objective)
    assert list(found) == list(range(1, steps + 1))
    assert [sum(best.compute) for best in found.values()] == list(found)
    # more computed steps can be worse, as they forecast from other pairs; the best within a budget cannot
    totals = list(accumulate((best.total for best in found.values()), min))
    assert totals[-1] == 0.0
    assert totals[9] < 0.5 * totals[4]


def test_minimax_is_less_bad_at_its_worst_and_sum_in_sum():
    damage = drifting(40)
    sums, worsts = best_schedule(damage, range(6, 20)), best_schedule(damage, range(6, 20), "minimax")
    assert all(worsts[count].worst <= sums[count].worst and sums[count].total <= worsts[count].total for count in sums)
    assert any(worsts[count].worst < 0.9 * sums[count].worst for count in sums)


def test_computed_steps_go_where_features_move():
    best = best_schedule(drifting(40), 10)[10]
    assert sum(best.compute[:20]) > sum(best.compute[20:])


def test_one_previous_node_stands_for_all():
    reuse = random_damage(1, 8)[:1]
    reuse[:, np.triu_indices(8, 1)[0], np.triu_indices(8, 1)[1]] = np.random.default_rng(2).random(28)
    found = best_schedule(reuse, 8)
    assert {count: best.total for count, best in found.items()} == pytest.approx(
        {count: score[0] for count, score in exhaustive(np.repeat(reuse, 8, 0), "sum").items()}
    )


def test_ties_are_broken_the_same_way_each_time():
    damage = np.zeros((8, 8, 8))
    assert best_schedule(damage, 4)[4].computed == (0, 1, 2, 3)
    assert best_schedule(damage, 4, "minimax")[4].computed == (0, 1, 2, 3)
    assert best_schedule(random_damage(5, 9, 2), 9, "minimax") == best_schedule(random_damage(5, 9, 2), 9, "minimax")


def test_a_range_asks_for_these_only():
    damage = random_damage(0, 9)
    every = best_schedule(damage, 9)
    assert best_schedule(damage, range(3, 8, 2)) == {count: every[count] for count in (3, 5, 7)}
    assert best_schedule(damage, np.int64(4)) == {count: every[count] for count in (1, 2, 3, 4)}


@pytest.mark.parametrize(
    ("computed", "last", "nearest"),
    [(4, 5, 6), (range(1, 9), 9, 9), (3, 12, 9)],
)
def test_a_number_that_cannot_be_had_names_the_nearest(computed, last, nearest):
    with pytest.raises(ConfigError, match=f"nearest number that can is {nearest}$"):
        best_schedule(random_damage(0, 9), computed, last=last)
    assert min(best_schedule(random_damage(0, 9), 9, last=last)) == nearest


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"computed": 0}, "1 to 6 can be computed"),
        ({"computed": 7}, "1 to 6 can be computed"),
        ({"computed": range(3, 3)}, "1 to 6 can be computed"),
        ({"objective": "mean"}, "sum, power, minimax"),
        ({"last": -1}, "last"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ConfigError, match=message):
        best_schedule(random_damage(0, 6), **{"computed": 3, **options})


def test_damages_that_are_none():
    for bad in (-1.0, np.nan):
        damage = random_damage(0, 6)
        damage[2, 3, 4] = bad
        with pytest.raises(ConfigError, match="reuse of step 3"):
            best_schedule(damage, 3)
    for shape in [(6, 6), (6, 6, 5), (2, 6, 6), (0, 0, 0)]:
        with pytest.raises(ConfigError, match="damages must be"):
            best_schedule(np.zeros(shape), 1)
    with pytest.raises(ConfigError, match=f"limited to {MOST_STEPS} steps"):
        best_schedule(np.broadcast_to(0.0, (1, MOST_STEPS + 1, MOST_STEPS + 1)), 3)


def test_a_number_that_cannot_be_is_named():
    with pytest.raises(ConfigError, match=r"of 6 steps, 1 to 6 can be computed, not 7$"):
        best_schedule(random_damage(0, 6), range(7, 8))
