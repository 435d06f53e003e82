"""Steps that crowd around one point of the run."""

from itertools import pairwise

import pytest

from diffusion_cache.context import PassState, Step
from diffusion_cache.errors import ConfigError
from diffusion_cache.policies import Centered, Guarded, Interval
from diffusion_cache.schedule import distinct


@pytest.mark.parametrize(("total", "every"), [(50, 5), (48, 3), (50, 3), (12, 12), (7, 1), (7, 9)])
def test_power_one_is_the_interval(total, every):
    assert Guarded(Centered(every, power=1.0)).schedule(total) == Guarded(Interval(every)).schedule(total)


def test_quadratic_by_hand():
    """c = 8 of 32 steps, 6 of them computed, as if of 36: u = −√8 + j·(√8 + √28)/6 gives 8 + u·|u|, rounded down."""
    assert Centered(6, center=0.25, power=2.0).computed(32) == [0, 5, 7, 9, 14, 23]


@pytest.mark.parametrize("center", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("power", [1.0, 1.4, 3.0])
def test_as_many_steps_as_the_interval_and_densest_at_the_center(center, power):
    for total in range(1, 60):
        for every in (1, 2, 3, 7, 70):
            steps = Centered(every, center, power).computed(total)
            assert len(set(steps)) == len(steps) == -(-total // every)
            assert steps == sorted(steps)
            assert steps[0] == 0
            assert steps[-1] < total
    steps = [*Centered(5, center, power).computed(1000), 1000]
    gaps = [gap for _, gap in sorted((abs((a + b) / 2 - 1000 * center), b - a) for a, b in pairwise(steps))]
    assert all(after >= before - 3 for before, after in pairwise(gaps))  # rounding moves a gap's two ends
    assert power == 1.0 or gaps[-1] > 2 * gaps[0]


def test_distinct_moves_no_more_than_it_must():
    assert distinct([0, 0.5, 0.9, 5.0], 6) == [0, 1, 2, 5]
    assert distinct([0.2, 4.4, 4.6, 4.8], 6) == [0, 3, 4, 5]
    assert distinct([0.9, 1.999999999999], 3) == [0, 2]


@pytest.mark.parametrize("options", [dict(every=0), dict(center=-0.1), dict(center=1.1), dict(power=0.9)])
def test_bad_options(options):
    with pytest.raises(ConfigError, match="centered: "):
        Centered(**options)


def test_the_number_of_steps_must_be_known():
    unknown = Step(3, None, 3, None, "0", (slice(None),))
    with pytest.raises(ConfigError, match="num_steps"):
        Centered().decide(unknown, None, PassState())
