"""Forecasters: exactness on uneven steps, degradation with a short history, errors."""

import random
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch

from diffusion_cache import ops, registry
from diffusion_cache.context import NoiseLevels, NonLinear, Query
from diffusion_cache.errors import ConfigError
from diffusion_cache.forecasters import (
    RFC,
    AverageVelocity,
    Chebyshev,
    Frequency,
    Hermite,
    Reuse,
    Sampler,
    Taylor,
    TaylorPaper,
)

TIMES = NoiseLevels([0.3 * step - 4 + 0.02 * step**2 for step in range(24)], "flow").times("x")
LINEAR = [
    Reuse(),
    *(Taylor(order) for order in range(5)),
    *(TaylorPaper(order) for order in range(4)),
    *(Hermite(order) for order in range(4)),
    Chebyshev(anchored=True),
    Chebyshev(blend=0.0),
    *(Sampler(order) for order in (1, 2, 3)),
]
NONLINEAR = [RFC(), RFC(2), Frequency(), Frequency(1, 3, 0.6), Frequency(0, 1, 0.1)]
INEXACT = [Chebyshev(), AverageVelocity()]
UNEVEN = [0.0, 1.0, 4.0, 6.0, 7.0, 12.0, 15.0]


def test_every_forecaster_is_tested_here():
    assert {type(one).name for one in (*LINEAR, *NONLINEAR, *INEXACT)} == set(registry.forecasters.names())
    assert all(forecaster.exact_degree is None for forecaster in INEXACT)


def query_of(nodes, target, total=None):
    return Query(nodes, target, total=total, times=TIMES)


def test_forecasters_whose_spans_are_alike_have_the_same_weights_for_each():
    for forecaster in (*LINEAR, *INEXACT):
        assert forecaster.spans_alike is not forecaster.keeps_inputs
        of_spans = [forecaster.weights(query_of((1.0, 4.0, 6.0), 8.0)._replace(span=span)) for span in (0, 3)]
        assert of_spans[0] == of_spans[1]
    assert not any(forecaster.spans_alike for forecaster in NONLINEAR)


def forecast(forecaster, nodes, values, target):
    """The scalar forecast from the last `history` nodes."""
    nodes, values = nodes[-forecaster.history :], values[-forecaster.history :]
    weights = forecaster.weights(query_of(nodes, target))
    assert len(weights) == len(nodes)
    return sum(weight * value for weight, value in zip(weights, values, strict=True))


@pytest.mark.parametrize("forecaster", LINEAR, ids=str)
@pytest.mark.parametrize("target", [15.5, 16.0, 19.0])
def test_declared_degree_is_exact_on_uneven_steps(forecaster, target):
    rng = np.random.default_rng(0)
    for _ in range(5):
        polynomial = np.polynomial.Polynomial(rng.normal(size=forecaster.exact_degree + 1))
        values = polynomial(np.array(UNEVEN))
        scale = np.abs(values).max() + abs(polynomial(target))
        assert forecast(forecaster, UNEVEN, values, target) == pytest.approx(polynomial(target), abs=1e-10 * scale)


@pytest.mark.parametrize("forecaster", LINEAR, ids=str)
def test_no_higher_degree_is_exact(forecaster):
    """The declared degree is no understatement."""
    degree = forecaster.exact_degree + 1
    values = [node**degree for node in UNEVEN]
    assert abs(forecast(forecaster, UNEVEN, values, 19.0) - 19.0**degree) > 1e-3


def made(forecaster, nodes, features, target):
    """The forecast feature, from as many features as the forecaster keeps."""
    query, features = query_of(nodes[-forecaster.history :], target), features[-forecaster.history :]
    if isinstance(forecaster, NonLinear):
        return forecaster.forecast(query, features)
    return ops.forecast(None, features, forecaster.weights(query))


def polynomial(degree, shape=(2, 6, 4)):
    """A random one in the step, whose values are features."""
    coefficients = torch.randn(degree + 1, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return lambda t: sum(c * t**i for i, c in enumerate(coefficients))


@pytest.mark.parametrize("forecaster", [*LINEAR, *NONLINEAR], ids=str)
@pytest.mark.parametrize("shape", [(2, 6, 4), (2, 9, 4), (2, 3, 4, 5), (2, 7)], ids=str)
def test_exact_on_tensors(forecaster, shape):
    at, nodes = polynomial(forecaster.exact_degree, shape), [2.0, 3.0, 7.0, 9.0, 10.0]
    result = made(forecaster, nodes, [at(t) for t in nodes], 12.0)
    torch.testing.assert_close(result, at(12.0), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("forecaster", NONLINEAR, ids=str)
def test_no_higher_degree_is_exact_on_tensors(forecaster):
    at, nodes = polynomial(forecaster.exact_degree + 1), [2.0, 3.0, 7.0, 9.0, 10.0]
    assert (made(forecaster, nodes, [at(t) for t in nodes], 12.0) - at(12.0)).abs().max() > 1e-2


@pytest.mark.parametrize("forecaster", NONLINEAR, ids=str)
def test_rows_do_not_depend_on_each_other(forecaster):
    at, nodes = polynomial(3), [2.0, 3.0, 7.0, 9.0, 10.0]
    features = [at(t) for t in nodes]
    together = made(forecaster, nodes, features, 12.0)
    for row in range(2):
        alone = made(forecaster, nodes, [feature[row : row + 1] for feature in features], 12.0)
        torch.testing.assert_close(alone[0], together[row], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("forecaster", NONLINEAR, ids=str)
def test_one_feature_is_reused_as_it_is_by_non_linear_ones(forecaster):
    feature = torch.randn(2, 6, 4, dtype=torch.float64)
    torch.testing.assert_close(made(forecaster, [3.0], [feature], 9.0), feature, rtol=1e-12, atol=1e-12)
    with pytest.raises(TypeError, match="no weighted sum"):
        forecaster.weights(query_of([3.0], 9.0))


@pytest.mark.parametrize("forecaster", LINEAR, ids=str)
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_weights_sum_to_one(forecaster, count):
    nodes = UNEVEN[-min(count, forecaster.history) :]
    weights = forecaster.weights(query_of(nodes, 18.0))
    assert len(weights) == len(nodes)
    assert sum(weights) == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("forecaster", LINEAR, ids=str)
def test_one_feature_is_reused_as_it_is(forecaster):
    assert forecaster.weights(query_of([3.0], 9.0)) == pytest.approx((1.0,), abs=1e-15)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_fewer_features_lower_the_degree(order):
    """With k + 1 features any order above k is order k."""
    for count in range(1, order + 1):
        query = Query(UNEVEN[:count], 9.0)
        for cls in (Taylor, TaylorPaper):
            assert cls(order).weights(query) == pytest.approx(cls(count - 1).weights(query))


def test_square_on_0_1_2_at_4():
    assert forecast(TaylorPaper(2), [0, 1, 2], [0, 1, 4], 4) == 14
    assert forecast(Taylor(2), [0, 1, 2], [0, 1, 4], 4) == pytest.approx(16)


def test_known_weights():
    assert Taylor(1).weights(Query([2, 4], 5)) == pytest.approx((-0.5, 1.5))
    assert TaylorPaper(1).weights(Query([2, 4], 5)) == pytest.approx((-0.5, 1.5))
    assert Taylor(2).weights(Query([0, 1, 2], 3)) == pytest.approx((1, -3, 3))
    assert Reuse().weights(Query([0, 1, 2], 3)) == (0, 0, 1)


def newton(nodes, values, target):
    """Newton's divided differences in exact arithmetic."""
    nodes, table = [Fraction(node) for node in nodes], [Fraction(value) for value in values]
    coefficients = []
    for gap in range(len(nodes)):
        coefficients.append(table[0])
        table = [(b - a) / (nodes[i + gap + 1] - nodes[i]) for i, (a, b) in enumerate(pairwise(table))]
    result, product = Fraction(0), Fraction(1)
    for node, coefficient in zip(nodes, coefficients, strict=True):
        result += coefficient * product
        product *= Fraction(target) - node
    return float(result)


def paper(nodes, values, target, order):
    """TaylorSeer's cache as its code keeps it: each computed step is differenced against the last."""
    cache = []
    for i, value in enumerate(values):
        updated = [value]
        for j in range(min(order, len(cache))):
            updated.append((updated[j] - cache[j]) / (nodes[i] - nodes[i - 1]))
        cache = updated
    result, term = 0.0, 1.0
    for i, derivative in enumerate(cache):
        result += derivative * term
        term *= (target - nodes[-1]) / (i + 1)
    return result


@pytest.mark.parametrize("order", [0, 1, 2, 3, 4])
def test_equals_independent_formulas_on_random_nodes(order):
    rng = random.Random(order)
    for _ in range(20):
        nodes = sorted(rng.sample(range(50), 7))
        values = [rng.gauss(0, 1) for _ in nodes]
        target = nodes[-1] + rng.randint(1, 4)
        used = order + 1
        expected = newton(nodes[-used:], values[-used:], target)
        assert forecast(Taylor(order), nodes, values, target) == pytest.approx(expected, rel=1e-9, abs=1e-9)
        expected = paper(nodes, values, target, order)  # sees every step; the forecaster only the last order + 1
        assert forecast(TaylorPaper(order), nodes, values, target) == pytest.approx(expected, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("cls", [Taylor, TaylorPaper])
@pytest.mark.parametrize("order", [-1, 8, float("nan"), 1.5, "2"])
def test_invalid_orders(cls, order):
    with pytest.raises(ConfigError, match=f"^{cls.name}: order must be a whole number from 0 to 7, not {order!r}$"):
        cls(order)


@pytest.mark.parametrize("cls", [Reuse, Taylor, TaylorPaper])
def test_unknown_feature_is_an_error(cls):
    message = f"^{cls.name}: feature must be one of auto, residual, output, not 'residuals'$"
    with pytest.raises(ConfigError, match=message):
        cls(feature="residuals")


@pytest.mark.parametrize("order", [0, 1, 4])
def test_history_is_one_more_than_the_order(order):
    assert Taylor(order).history == TaylorPaper(order).history == order + 1
    assert (Reuse().history, Reuse().exact_degree) == (1, 0)
    assert Frequency(low=order, high=0).history == Frequency(low=0, high=order).history == order + 1
    assert (Taylor(order).exact_degree, TaylorPaper(order).exact_degree) == (order, min(order, 1))


@pytest.mark.parametrize("forecaster", [*LINEAR, *INEXACT], ids=str)
def test_scale_free_weights_do_not_change_with_the_scale_of_steps(forecaster):
    def weights(scale):
        nodes = [scale * node + scale for node in (0.0, 1.0, 3.0, 4.0)[-forecaster.history :]]
        return forecaster.weights(query_of(nodes, scale * 6.0 + scale, total=10))

    scaled = [weights(scale) for scale in (1.0, 2.0, -3.0)]
    same = all(other == pytest.approx(scaled[0]) for other in scaled[1:])
    assert same or not forecaster.scale_free
    assert forecaster.scale_free == (type(forecaster).name in ("reuse", "taylor", "taylor_paper"))
