"""Ridge regression on Chebyshev polynomials, against numpy's least squares."""

import numpy as np
import pytest
from numpy.polynomial.chebyshev import chebval

from diffusion_cache.context import Query
from diffusion_cache.errors import ConfigError
from diffusion_cache.forecasters import Chebyshev, Taylor

NODES, TARGET, TOTAL = [0, 1, 4, 5, 9, 12], 15, 20
VALUES = np.array([0.3, -1.0, 2.0, 0.5, 1.5, -0.2])


def forecast(forecaster, values=VALUES, nodes=NODES, total=TOTAL):
    return float(np.array(forecaster.weights(Query(nodes, TARGET, total=total))) @ values)


def by_least_squares(values, degree, ridge, total=TOTAL):
    """The ridge as ordinary least squares with rows for it, on polynomials made one by one."""
    times = 2 * np.array(NODES) / (total - 1) - 1
    design = np.stack([chebval(times, [0] * i + [1]) for i in range(degree + 1)], axis=1)
    rows = np.concatenate([design, np.sqrt(ridge) * np.eye(degree + 1)])
    found = np.linalg.lstsq(rows, np.concatenate([values, np.zeros(degree + 1)]), rcond=None)[0]
    return chebval(2 * TARGET / (total - 1) - 1, found)


@pytest.mark.parametrize("degree", [0, 1, 4, 7])
@pytest.mark.parametrize("ridge", [1e-3, 0.1, 2.0])
def test_is_the_ridge_regression(degree, ridge):
    expected = by_least_squares(VALUES, degree, ridge)
    assert forecast(Chebyshev(degree, ridge, blend=1.0, keep=6)) == pytest.approx(expected, abs=1e-9)
    anchored = VALUES[-1] + by_least_squares(VALUES - VALUES[-1], degree, ridge)
    assert forecast(Chebyshev(degree, ridge, 1.0, True, 6)) == pytest.approx(anchored, abs=1e-9)


def test_blends_with_the_line_through_the_last_two():
    line = float(np.array(Taylor(1).weights(Query(NODES[-2:], TARGET))) @ VALUES[-2:])
    spectral = by_least_squares(VALUES, 4, 0.1)
    assert forecast(Chebyshev(blend=0.3, keep=6)) == pytest.approx(0.7 * line + 0.3 * spectral)


def test_the_ridge_shrinks_constants_unless_anchored():
    assert forecast(Chebyshev(blend=1.0, keep=6), np.ones(6)) < 0.99
    assert forecast(Chebyshev(blend=1.0, keep=6, anchored=True), np.ones(6)) == pytest.approx(1.0)


def test_an_unknown_length_is_what_is_there():
    assert forecast(Chebyshev(), total=None) == pytest.approx(forecast(Chebyshev(), total=TARGET + 1))
    assert forecast(Chebyshev(), total=None) != pytest.approx(forecast(Chebyshev(), total=50))


def test_keeps_as_many_features_as_it_says():
    assert [Chebyshev(keep=keep).history for keep in (2, 5, 9)] == [2, 5, 9]
    assert [Chebyshev().exact_degree, Chebyshev(anchored=True).exact_degree, Chebyshev(blend=0.0).exact_degree] == [
        None,
        0,
        1,
    ]


@pytest.mark.parametrize(
    "options",
    [{"degree": -1}, {"ridge": 0.0}, {"ridge": float("nan")}, {"ridge": float("inf")}, {"blend": 1.5}, {"keep": 1}],
)
def test_bad_options(options):
    with pytest.raises(ConfigError, match=f"^chebyshev: {next(iter(options))} must be"):
        Chebyshev(**options)
