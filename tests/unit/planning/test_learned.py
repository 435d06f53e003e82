"""The model of what schedules score: it finds out where a surrogate is wrong, and proposes what is best by it."""

import itertools

import numpy as np
import pytest

from diffusion_cache.planning.dynamic import best_schedule
from diffusion_cache.planning.learned import DECIBEL, Guess, Learned

STEPS, COUNT = 14, 5


def surrogate():
    """Damages that grow with the distance from the last computed step, as Taylor's do."""
    steps = np.arange(STEPS)
    distance = np.maximum(steps[None, :] - steps[:, None], 0).astype(float)
    return np.broadcast_to(distance**2, (STEPS, STEPS, STEPS)).copy()


def truth(place=4.0, distance=-0.5):
    """What really happens: late steps harm more, and long distances less than the surrogate says."""
    steps = np.arange(STEPS)
    ahead = np.maximum(steps[None, :] - steps[:, None], 1)
    return surrogate() * np.exp(place * steps / STEPS) * ahead**distance


def total(damage, computed):
    """Damage of a schedule, added up step by step."""
    found = 0.0
    for place, i in enumerate(computed):
        h = computed[place - 1] if place else -1
        end = computed[place + 1] if place + 1 < len(computed) else STEPS
        found += sum(damage[h + 1, i, t] for t in range(i + 1, end))
    return found


def decibels(damage, computed):
    return -10 * np.log10(total(damage, computed))


def some_schedules(count, seed=0):
    every = [(0, *rest) for rest in itertools.combinations(range(1, STEPS), COUNT - 1)]
    return [every[i] for i in np.random.default_rng(seed).choice(len(every), count, replace=False)]


def test_the_errors_of_a_guess_are_sums_over_reused_steps():
    damage = np.random.default_rng(0).uniform(1, 2, (STEPS, STEPS, STEPS))
    schedules = [*some_schedules(20), (0, 1, 2, 3, 4), (0, 10, 11, 12, 13)]
    expected = [total(damage, computed) for computed in schedules]
    assert Guess(damage).errors(schedules) == pytest.approx(expected, rel=1e-12)


def test_the_optimum_of_a_guess_is_its_best_schedule():
    damage = np.random.default_rng(1).uniform(1, 2, (STEPS, STEPS, STEPS))
    every = [(0, *rest, STEPS - 1) for rest in itertools.combinations(range(1, STEPS - 1), COUNT - 2)]
    assert Guess(damage).optimum(COUNT, 1) == min(every, key=lambda computed: total(damage, computed))


@pytest.mark.parametrize("unit", [1.0, 1e-9, 1e6])
def test_it_learns_what_the_surrogate_has_wrong(unit):
    """From forty schedules it knows what others score to within a decibel; the surrogate itself is off by more."""
    real = truth()
    learned = Learned(surrogate() * unit)
    learned.learn({computed: decibels(real, computed) for computed in some_schedules(40)})
    others = some_schedules(60, seed=1)
    expected = np.array([decibels(real, computed) for computed in others])

    def spread(guess):
        missed = expected + np.log(guess.errors(others)) / DECIBEL
        return float((missed - missed.mean()).std())

    guess = learned.drawn(np.random.default_rng(0))
    assert spread(guess) < 0.3
    assert spread(Guess(surrogate())) > 2.0
    best = best_schedule(real, range(COUNT, COUNT + 1))[COUNT].computed
    assert decibels(real, guess.optimum(COUNT, 0)) > decibels(real, best) - 0.3


def test_the_surrogates_unit_means_nothing_from_the_first_schedules_on():
    real, means = truth(), []
    for unit in (1.0, 1e9):
        learned = Learned(surrogate() * unit)
        learned.learn({computed: decibels(real, computed) for computed in some_schedules(2)})
        means.append(learned._mean)
    assert means[1][1:] == pytest.approx(means[0][1:], abs=1e-6)
    assert means[1][0] + np.log(1e9) == pytest.approx(means[0][0], abs=1e-6)


def test_little_that_is_known_leaves_much_to_try():
    """Before anything is learned of how damages change, draws differ; with many runs they agree."""
    real = truth()
    spreads = []
    for count in (2, 60):
        learned = Learned(surrogate())
        learned.learn({computed: decibels(real, computed) for computed in some_schedules(count)})
        generator = np.random.default_rng(0)
        draws = [learned.drawn(generator).optimum(COUNT, 0) for _ in range(20)]
        spreads.append(len(set(draws)))
    assert spreads[0] > 2 * spreads[1]


def test_equal_scores_teach_nothing_that_is_not_finite():
    learned = Learned(np.zeros((STEPS, STEPS, STEPS)))
    learned.learn(dict.fromkeys(some_schedules(5), 120.0))
    assert np.isfinite(learned.drawn(np.random.default_rng(0)).damage).all()
