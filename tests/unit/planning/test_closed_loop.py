"""The closed-loop search: it finds what there is to find, spends what it may, and keeps to the guards."""

import itertools

import numpy as np
import pytest

from diffusion_cache.errors import ConfigError
from diffusion_cache.planning.closed_loop import TAIL, Tried, refine, score
from diffusion_cache.planning.learned import Guess

STEPS, COUNT = 12, 5
FLAT = np.ones((STEPS, STEPS, STEPS))  # a surrogate that knows nothing


def gains(seed=0):
    return np.random.default_rng(seed).normal(size=STEPS)


def separable(values):
    """A score that is a sum over the computed steps, so that single moves reach the optimum."""
    return lambda computed: float(sum(values[step] for step in computed))


def best_of_all(run, last=0, steps=STEPS, count=COUNT):
    fixed = {0, *range(steps - last, steps)}
    every = [c for c in itertools.combinations(range(steps), count) if fixed <= set(c)]
    return max(every, key=run)


def best(tried):
    return max(tried, key=lambda entry: entry.score)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("last", [0, 1])
def test_the_optimum_of_a_separable_score_is_found(seed, last):
    run = separable(gains(seed))
    start = (*range(COUNT - last), *range(STEPS - last, STEPS))
    tried = refine(run, [start], FLAT, 10_000, last=last, seed=seed)
    expected = best_of_all(run, last)
    assert best(tried) == Tried(expected, run(expected))
    assert tried[0] == Tried(start, run(start))


def test_it_stops_where_no_move_is_left():
    """Every neighbour of the best was run, and nothing twice."""
    run = separable(gains(1))
    found = refine(run, [tuple(range(COUNT))], FLAT, 10_000)
    tried = [entry.computed for entry in found]
    assert len(set(tried)) == len(tried) < 10_000
    optimum = set(best(found).computed)
    for step, to in itertools.product(optimum - {0}, set(range(STEPS)) - optimum):
        assert tuple(sorted(optimum - {step} | {to})) in tried


@pytest.mark.parametrize("runs", [0, 1, 2, 3, 17])
def test_it_runs_as_often_as_it_may(runs):
    starts, asked, told = [(0, 2, 4, 6, 8), (0, 1, 2, 3, 4)], [], []

    def run(computed):
        asked.append(computed)
        return separable(gains())(computed)

    found = refine(run, starts, FLAT, runs, progress=lambda done, of, best: told.append((done, of, best)))
    expected = max(runs, 1)
    assert len(asked) == expected
    assert [(entry.computed, entry.score) for entry in found] == [(c, separable(gains())(c)) for c in asked]
    best_so_far = list(itertools.accumulate((entry.score for entry in found), max))
    assert told == [(i + 1, runs, best) for i, best in enumerate(best_so_far)]
    assert asked[: len(starts)] == starts[:expected]


def test_it_learns_where_steps_are_needed():
    """What comes late harms most here, of which the surrogate knows nothing: few runs find a schedule near the best."""
    steps = 40
    ahead = np.arange(steps)[None, :] - np.arange(steps)[:, None]
    damage = np.broadcast_to(np.maximum(ahead, 0.0) ** 2, (steps, steps, steps))
    harm = damage * np.exp(8.0 * np.arange(steps) / steps)

    def run(computed):
        return -10 * float(np.log10(Guess(harm).errors([computed])[0]))

    optimum = run(Guess(harm).optimum(8, 0))
    found = refine(run, [tuple(range(0, steps, 5))], damage, 20)
    assert found[0].score < optimum - 5
    assert best(found).score > optimum - 0.2


AHEAD = np.arange(16)[None, :] - np.arange(16)[:, None]
DAMAGE = np.broadcast_to(np.maximum(AHEAD, 0.0) ** 2, (16, 16, 16))
HARM = DAMAGE * np.exp(4.0 * np.arange(16) / 16)


def harmed(computed):
    return -10 * float(np.log10(Guess(HARM).errors([computed])[0]))


@pytest.mark.parametrize("seed", range(4))
def test_of_single_moves_those_that_promise_most_are_tried(seed):
    found = refine(harmed, [Guess(HARM).optimum(5, 0)], DAMAGE, 21, seed=seed)
    assert np.median([tried.score for tried in found[6:]]) > found[0].score - 3


def test_what_is_best_by_what_was_learned_is_tried_however_far_it_is():
    start = (0, 1, 2, 3, 4)
    found = [refine(harmed, [start], DAMAGE, 2, seed=seed)[1].computed for seed in range(8)]
    assert sum(len({*computed} - {*start}) > 1 for computed in found) > 4


def test_a_start_given_twice_is_run_once():
    found = refine(separable(gains()), [(0, 3), (0, 5), (0, 3)], FLAT, 2)
    assert [entry.computed for entry in found] == [(0, 3), (0, 5)]


def test_the_same_seed_gives_the_same_search():
    searches = [refine(separable(gains()), [(0, 2, 4, 6, 8)], FLAT, 15, seed=seed) for seed in (3, 3, 4)]
    assert searches[0] == searches[1] != searches[2]


@pytest.mark.parametrize("last", [0, 2])
@pytest.mark.parametrize("seed", range(3))
def test_no_guard_is_broken(last, seed):
    """Whatever the score says, even one that would have the guarded steps reused."""
    kept = {0, *range(STEPS - last, STEPS)}
    start = tuple(sorted({*kept, 4, 5, 6}))
    found = refine(lambda computed: -float(len(kept & set(computed))), [start], FLAT, 60, last=last)
    climbing = refine(separable(gains(seed)), [start], FLAT, 60, last=last, seed=seed)
    assert len(climbing) > 5
    for entry in (*found, *climbing):
        assert kept <= set(entry.computed) <= set(range(STEPS))
        assert list(entry.computed) == sorted(set(entry.computed))
        assert len(entry.computed) == len(start)


@pytest.mark.parametrize(
    ("start", "guards"),
    [((0, 1, 2, 3), {}), ((0,), {}), ((0, 3), {"last": 1})],
    ids=["all computed", "one", "both ends"],
)
def test_nothing_to_move(start, guards):
    found = refine(lambda computed: 1.0, [start], FLAT[:4, :4, :4], 50, **guards)
    assert found == (Tried(start, 1.0),)


def test_equal_scores_are_no_reason_to_move():
    found = refine(lambda computed: 1.0, [(0, 4, 8)], FLAT, 100)
    assert best(found) == found[0]
    neighbours = [entry for entry in found if len({0, 4, 8} & set(entry.computed)) == 2]
    assert len(neighbours) == 2 * (STEPS - 3)


@pytest.mark.parametrize(
    ("starts", "options", "message"),
    [
        ([], {}, "at least one"),
        ([(0, 1), (0, 1, 2)], {}, "as many computed"),
        ([(1, 2)], {}, "no schedule"),
        ([(0, 2)], {"last": 1}, "no schedule"),
        ([(0, 12)], {}, "no schedule"),
        ([(0, 2, 1)], {}, "no schedule"),
        ([(0, 2, 2)], {}, "no schedule"),
    ],
)
def test_starts_that_cannot_be(starts, options, message):
    with pytest.raises(ConfigError, match=message):
        refine(lambda computed: 1.0, starts, FLAT, 5, **options)


def test_other_steps_that_stay_computed():
    values = gains()
    values[7] = values.min() - 1.0  # which a search would leave out
    found = refine(separable(values), [(0, 2, 4, 7, 9)], FLAT, 60, also=(0, 7))
    assert len(found) > 20
    assert all({0, 7} <= set(entry.computed) for entry in found)
    with pytest.raises(ConfigError, match=r"with \[0, 7\] computed"):
        refine(separable(values), [(0, 2, 4)], FLAT, 60, also=(7,))


# the score


def test_score_is_midway_to_the_5th_percentile():
    values = np.random.default_rng(2).normal(40, 3, size=9)
    normal_5th = values.mean() - 1.6449 * values.std(ddof=1)
    assert pytest.approx((values.mean() + normal_5th) / 2, abs=1e-3) == score(values.tolist())
    assert score(values.tolist()) == pytest.approx(values.mean() - TAIL * values.std(ddof=1))
    many = np.random.default_rng(3).normal(40, 3, size=200_000)
    assert score(many) == pytest.approx((many.mean() + np.quantile(many, 0.05)) / 2, abs=0.02)


def test_score_of_one_or_of_equal_values():
    assert score([31.5]) == 31.5
    assert score([31.5] * 4) == pytest.approx(31.5)
    assert score([30.0, 33.0]) < 31.5
