"""The weights of stored features in a forecast: of polynomials through them, expansions, means and regressions."""

from collections.abc import Sequence
from functools import lru_cache
from numbers import Integral
from typing import Any

import numpy as np
from numpy.polynomial import Polynomial
from numpy.polynomial.chebyshev import chebvander

from ..errors import ConfigError


def check_degree(what: str, degree: Any) -> None:
    """ConfigError unless a polynomial's degree is a whole number from 0 to 7."""
    if not isinstance(degree, Integral) or not 0 <= int(degree) <= 7:
        raise ConfigError(f"{what} must be a whole number from 0 to 7, not {degree!r}")


def polynomial_weights(nodes: Sequence[float], target: float, order: int) -> tuple[float, ...]:
    """One per node: the polynomial of at most that degree through the last order + 1 nodes, read at the target."""
    used = nodes[-order - 1 :]
    weights = [0.0] * (len(nodes) - len(used))
    # Lagrange's form of the same polynomial gives the weights directly
    for a, node in enumerate(used):
        weight = 1.0
        for b, other in enumerate(used):
            if b != a:
                weight *= (target - other) / (node - other)
        weights.append(weight)
    return tuple(weights)


@lru_cache(maxsize=1024)  # spans and guidance branches ask alike
def mean_weights(points: tuple[float, ...], start: float, end: float) -> tuple[float, ...]:
    """Of each point's value in the mean, from start to end, of the polynomial through all of them."""
    weights = []
    for a, point in enumerate(points):
        basis = Polynomial([1.0])
        for b, other in enumerate(points):
            if b != a:
                basis *= Polynomial([start - other, 1.0]) / (point - other)  # in u − start, which keeps digits
        weights.append(float(basis.integ()(end - start)) / (end - start))
    return tuple(weights)


def expansion_weights(nodes: Sequence[float], terms: Sequence[float]) -> tuple[float, ...]:
    """One per node: of each node's feature in Σ_i terms[i]·D_i, for as many terms as there are nodes.

    D_i are the differences of the newest node as `taylor_paper` takes them: D_0 = F, D_{i+1} = (D_i − D_i of the node
    before) / gap.
    """
    count = len(nodes)
    # derivatives[i][j]: weight of feature j in D_i, kept for the newest node handled so far
    derivatives: list[list[float]] = []
    for newest in range(count):
        previous = derivatives
        derivatives = [[float(j == newest) for j in range(count)]]
        for older in previous:
            gap = nodes[newest] - nodes[newest - 1]
            derivatives.append([(a - b) / gap for a, b in zip(derivatives[-1], older, strict=True)])
    return tuple(
        sum(term * derivative[j] for term, derivative in zip(terms, derivatives, strict=True)) for j in range(count)
    )


def hermite_polynomials(x: float, count: int) -> list[float]:
    """H_0(x), H_1(x), … of the physicists' kind: H_{i+1} = 2x·H_i − 2i·H_{i−1}."""
    values = [1.0, 2.0 * x]
    for i in range(1, count):
        values.append(2.0 * x * values[i] - 2.0 * i * values[i - 1])
    return values[:count]


@lru_cache(maxsize=1024)  # spans and guidance branches ask alike
def ridge_weights(nodes: tuple[float, ...], target: float, total: int, degree: int, ridge: float) -> tuple[float, ...]:
    """Of each node's feature in the regression's value at the target."""
    design = chebvander(2 * np.array([*nodes, target]) / max(total - 1, 1) - 1, degree)
    known = design[:-1]
    return tuple((design[-1] @ np.linalg.solve(known.T @ known + ridge * np.eye(degree + 1), known.T)).tolist())
