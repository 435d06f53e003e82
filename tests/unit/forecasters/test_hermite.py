"""Hermite polynomials in the place of powers."""

import math

import pytest
from numpy.polynomial.hermite import hermval

from diffusion_cache.context import Query
from diffusion_cache.errors import ConfigError
from diffusion_cache.forecasters import Hermite, TaylorPaper
from diffusion_cache.forecasters.weights import hermite_polynomials


@pytest.mark.parametrize("x", [-1.3, 0.0, 0.5, 2.0])
def test_polynomials_are_the_physicists(x):
    assert hermite_polynomials(x, 6) == pytest.approx([hermval(x, [0] * i + [1]) for i in range(6)])


@pytest.mark.parametrize("sigma", [0.3, 0.5, 1.0])
def test_what_rises_goes_on_rising(sigma):
    """2σ² of a line's slope, upwards; a step counted backwards would fall."""
    nodes, values = [0.0, 2.0, 4.0], [1.0, 2.0, 3.0]
    weights = Hermite(1, sigma).weights(Query(nodes[1:], 7.0))
    forecast = sum(weight * value for weight, value in zip(weights, values[1:], strict=True))
    assert forecast == pytest.approx(3.0 + 2 * sigma**2 * 0.5 * 3)


def test_second_order_by_hand():
    """On 0, 1, 3 at 5: D_1 = (F_3 − F_1)/2, D_2 = (D_1 − (F_1 − F_0))/2, k = 2."""
    sigma, values = 0.6, [0.2, -1.0, 0.7]
    first = (values[2] - values[1]) / 2
    second = (first - (values[1] - values[0])) / 2
    expected = values[2] + first * 2 * sigma**2 * 2 + second / 2 * sigma**2 * (4 * sigma**2 * 4 - 2)
    weights = Hermite(2, sigma).weights(Query([0, 1, 3], 5))
    assert sum(weight * value for weight, value in zip(weights, values, strict=True)) == pytest.approx(expected)


def test_a_scale_of_one_over_root_two_keeps_lines():
    query = Query([4, 9], 11)
    assert Hermite(1, math.sqrt(0.5)).weights(query) == pytest.approx(TaylorPaper(1).weights(query))


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        ({"order": 8}, "order"),
        ({"order": 1.5}, "order"),
        ({"sigma": 0}, "sigma"),
        ({"sigma": 1.1}, "sigma"),
        ({"sigma": math.nan}, "sigma"),
    ],
)
def test_bad_options(options, wrong):
    with pytest.raises(ConfigError, match=f"^hermite: {wrong} must be"):
        Hermite(**options)
