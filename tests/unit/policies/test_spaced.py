"""A share of the steps, spaced by a power law."""

import math

import pytest

from diffusion_cache.context import PassState, Step
from diffusion_cache.errors import ConfigError
from diffusion_cache.policies import Guarded, Interval, Spaced


@pytest.mark.parametrize(("total", "every"), [(50, 2), (50, 3), (40, 3), (12, 12), (7, 1), (7, 9)])
def test_exponent_one_is_the_interval(total, every):
    even = Spaced(math.ceil(total / every) / total)
    assert Guarded(even).schedule(total) == Guarded(Interval(every)).schedule(total)


@pytest.mark.parametrize("exponent", [0.3, 0.6, 1.0, 1.3, 4.0])
def test_as_many_steps_as_the_share_is_rounded_up(exponent):
    for total in range(1, 60):
        for count in range(1, total + 1):
            steps = Spaced(count / total, exponent).computed(total)
            assert len(set(steps)) == len(steps) == count
            assert list(steps) == sorted(steps)
            assert steps[0] == 0
            assert steps[-1] < total
    assert len(Spaced(1 / 3, exponent).computed(50)) == 17
    assert Spaced(0.001, exponent).computed(50) == (0,)
    assert Spaced(1.0, exponent).computed(9) == tuple(range(9))


def test_exponents_crowd_the_start_or_the_end():
    assert Spaced(0.25, 1.0).computed(16) == (0, 4, 8, 12)
    assert Spaced(0.25, 2.0).computed(16) == (0, 1, 4, 9)  # 16 · (j / 4)²
    assert Spaced(0.25, 0.5).computed(16) == (0, 7, 12, 15)  # 16 − 16 · (1 − j / 4)²


@pytest.mark.parametrize(
    "options", [dict(share=0.0), dict(share=1.1), dict(exponent=0.0), dict(exponent=math.inf), dict(share=math.nan)]
)
def test_bad_options(options):
    with pytest.raises(ConfigError, match="spaced: share must be above 0"):
        Spaced(**options)


def test_the_number_of_steps_must_be_known():
    unknown = Step(3, None, 3, None, "0", (slice(None),))
    with pytest.raises(ConfigError, match="num_steps"):
        Spaced().decide(unknown, None, PassState())
