"""Promises made from held-out samples: exact bounds, and how often they are kept in simulation."""

import numpy as np
import pytest
from scipy.stats import binom, norm

from diffusion_cache.errors import ConfigError
from diffusion_cache.planning.guarantee import best_target, holds, lower_bound, needed, pick

REPETITIONS = 3000


@pytest.mark.parametrize(
    ("share", "confidence", "expected"),
    [(0.95, 0.95, 59), (0.9, 0.95, 29), (0.95, 0.99, 90), (0.99, 0.95, 299), (0.5, 0.75, 2)],
)
def test_needed_is_the_first_number_whose_bound_is_the_share(share, confidence, expected):
    assert needed(share, confidence) == expected
    assert lower_bound(expected, expected, confidence) >= share - 1e-12
    assert lower_bound(expected - 1, expected - 1, confidence) < share
    assert holds(np.ones(expected), 1.0, share, confidence)


@pytest.mark.parametrize("n", [1, 20, 59, 300])
def test_lower_bound_inverts_the_binomial_tail(n):
    assert lower_bound(0, n) == 0.0
    for successes in range(1, n + 1, 7):
        # at the bound, so many successes or more have probability 5%
        assert binom.sf(successes - 1, n, lower_bound(successes, n)) == pytest.approx(0.05)
        assert binom.sf(successes - 1, n, lower_bound(successes, n, 0.99)) == pytest.approx(0.01)


def test_lower_bound_of_all_successes():
    assert lower_bound(59, 59) == pytest.approx(0.05 ** (1 / 59))


def test_holds_counts_misses_and_nans_against_the_target():
    assert holds(np.full(59, 30.0), 30.0)
    assert not holds([29.9] + [31.0] * 58, 30.0)
    assert not holds([np.nan] + [31.0] * 58, 30.0)
    assert holds([29.9] + [np.inf] * 92, 30.0)  # 93 samples allow one miss
    assert not holds([29.9] + [np.inf] * 91, 30.0)


@pytest.mark.parametrize("n", [59, 60, 92, 93, 124, 200])
def test_best_target_is_the_highest_that_holds(n):
    values = np.random.default_rng(n).normal(size=n)
    target = best_target(values)
    assert target in values
    assert holds(values, target)
    assert not holds(values, np.nextafter(target, np.inf))
    assert best_target([*values, np.nan]) <= target


def test_best_target_of_sample_sizes():
    for n, rank in [(59, 0), (92, 0), (93, 1), (123, 1), (124, 2)]:
        assert best_target(np.arange(n)) == rank


def test_pick_goes_down_to_the_first_plan_that_fails():
    good, bad = np.full(60, 31.0), np.full(60, 29.0)
    assert pick([good, good, bad], 30.0) == 1
    assert pick([good, bad, good], 30.0) == 0  # what lies beyond a failure is not looked at
    assert pick([good, good, good], 30.0) == 2


def test_pick_names_the_best_target_there_is():
    values = [np.linspace(20, 40, 60), np.linspace(10, 30, 60)]
    with pytest.raises(ConfigError, match="ask for at most 20, which"):
        pick(values, 25.0)
    assert pick(values, 20.0) == 0
    with pytest.raises(ConfigError, match="no plan to pick"):
        pick([], 25.0)


def test_too_few_samples_say_how_many_more():
    for call in (lambda: holds(np.ones(47), 0.5), lambda: best_target(np.ones(47)), lambda: pick([np.ones(47)], 0.5)):
        with pytest.raises(ConfigError, match=r"47 held-out samples .* 95% of outcomes at 95% .* measure 12 more"):
            call()
    with pytest.raises(ConfigError, match="measure 1 more"):
        holds(np.ones(58), 0.5)
    with pytest.raises(ConfigError, match=r"99\.5% of outcomes at 95% confidence: measure 539 more"):
        holds(np.ones(59), 0.5, share=0.995)


@pytest.mark.parametrize(
    "call",
    [
        lambda: lower_bound(3, 2),
        lambda: lower_bound(0, 0),
        lambda: lower_bound(1, 2, 1.0),
        lambda: needed(share=1.0),
        lambda: needed(confidence=0.0),
    ],
)
def test_values_out_of_range(call):
    with pytest.raises(ConfigError, match=r"must be (from|between) 0"):
        call()


def simulated(coverages, n, correlation, choose):
    """How often `choose` takes a plan whose true coverage of the target 0 is below 95%, and what it takes.

    A plan's values are normal around the mean that gives it its coverage; plans share their samples' luck.
    """
    rng = np.random.default_rng(0)
    means = norm.ppf(coverages)
    shared = rng.normal(size=(REPETITIONS, 1, n))
    own = rng.normal(size=(REPETITIONS, len(coverages), n))
    values = means[:, None] + np.sqrt(correlation) * shared + np.sqrt(1 - correlation) * own
    taken = []
    for sample in values:
        try:
            taken.append(choose(sample))
        except ConfigError:
            taken.append(-1)
    taken = np.array(taken)
    broken = (taken >= 0) & (np.asarray(coverages)[taken] < 0.95)
    return broken.mean(), np.bincount(taken + 1, minlength=len(coverages) + 1) / REPETITIONS


@pytest.mark.parametrize("correlation", [0.0, 0.9])
@pytest.mark.parametrize("n", [59, 100])
@pytest.mark.parametrize(
    "coverages",
    [
        [0.949, 0.94, 0.93],  # none is good enough
        [0.9999, 0.9999, 0.949, 0.949, 0.949, 0.9],  # just missed, several times
        [0.9999, 0.94, 0.9999, 0.94, 0.9999],  # not in order
    ],
)
def test_a_promise_is_broken_in_at_most_5_percent_of_repetitions(coverages, n, correlation):
    broken, _ = simulated(coverages, n, correlation, lambda sample: pick(sample, 0.0))
    # the bound is 5%; three standard errors of a simulated 5% are 1.2%
    assert broken <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / REPETITIONS)


def test_the_simulation_tells_a_careless_choice():
    def careless(sample):
        """The cheapest plan that passes, wherever it stands."""
        return max((plan for plan, row in enumerate(sample) if holds(row, 0.0)), default=-1)

    coverages = [0.9999] + [0.94] * 20
    assert simulated(coverages, 59, 0.0, careless)[0] > 0.2
    assert simulated(coverages, 59, 0.0, lambda sample: pick(sample, 0.0))[0] < 0.05


def test_plans_that_are_good_enough_are_mostly_taken():
    broken, taken = simulated([0.9999, 0.9995, 0.999, 0.8], 100, 0.5, lambda sample: pick(sample, 0.0))
    assert broken < 0.001
    assert taken[3] > 0.9  # the cheapest of the good ones
