"""Several spans that share a compute budget: how many steps each of them computes.

Each span has a curve, the least damage for each number of computed steps (from `dynamic`), and a cost per step. With
damages that add up over spans, one number per span is to be picked: the multiple-choice knapsack problem. Its
Lagrangian relaxation is solved on the curves' convex hulls and repaired greedily, which also bounds how far the answer
can be from the best one.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..errors import ConfigError
from .dynamic import Best, best_schedule
from .surrogate import Array

ROUNDING = 1e-9  # relative; costs that add up to the budget must not miss it by rounding


@dataclass(frozen=True)
class Allocation:
    """counts: computed steps of each span. total: their damage. cost: what they take of the budget. bound: no choice
    within the budget does less damage. gap: (total − bound) / total, what may be left to gain, from 0 to 1."""

    counts: tuple[int, ...]
    total: float
    cost: float
    bound: float
    gap: float


@dataclass(frozen=True)
class Coupled:
    """schedules: one per span. allocation: how the budget was shared."""

    schedules: tuple[Best, ...]
    allocation: Allocation


def allocate(
    damage: ArrayLike,
    cost: ArrayLike,
    budget: float,
    reused: ArrayLike = 0.0,
    exact: bool = False,
    time_limit: float = 60.0,
) -> Allocation:
    """The number of computed steps k_s of each span s with the least Σ_s damage[s, k_s] and costs within the budget.

    damage: [S, T + 1], of the best schedule with so many computed steps; infinite where there is none (k = 0).
    cost: [S], of a computed step of the span, in the budget's unit (milliseconds, or a share of FLOPs); a single
    number for all. reused: [S], or one for all, of a reused step. budget: for Σ_s cost_s·k_s + reused_s·(T − k_s).
    exact: solve the integer programme, for few spans; time_limit: for that, in seconds. When it runs out, the best
    answer found counts, with its gap.

    Raises:
        ConfigError: for values out of range, and for a budget that no choice keeps; names the least that one does.
    """
    damage = np.asarray(damage, dtype=np.float64)
    if damage.ndim != 2 or not damage.size or np.isnan(damage).any() or (damage < 0).any():
        raise ConfigError("damages must be [spans, steps + 1] numbers of at least 0")
    spans, steps = damage.shape[0], damage.shape[1] - 1
    if not np.isfinite(damage).any(axis=1).all():
        raise ConfigError("a span has no schedule at all: its damages are all infinite")
    prices = []
    for name, values in (("cost", cost), ("reused", reused)):
        values = np.asarray(values, dtype=np.float64)
        if values.shape not in ((), (spans,)) or not (np.isfinite(values) & (values >= 0)).all():
            raise ConfigError(f"{name} must be one finite number of at least 0 for each of {spans} spans, or for all")
        prices.append(np.broadcast_to(values, (spans,)))
    counts = np.arange(steps + 1)
    costs = np.outer(prices[0], counts) + np.outer(prices[1], steps - counts)
    costs[~np.isfinite(damage)] = np.inf
    least = costs.min(axis=1).sum()
    allowed = budget * (1 + ROUNDING)
    if not least <= allowed:
        raise ConfigError(f"no choice costs at most {budget:g}; the cheapest costs {least:g}")

    chosen, bound = _lagrangian(damage, costs, allowed)
    if exact:
        answer, dual = _programme(damage, costs, allowed, time_limit)
        bound = max(bound, dual)
        if answer is not None and _sum(costs, answer) <= allowed and _sum(damage, answer) < _sum(damage, chosen):
            chosen = answer
    total = _sum(damage, chosen)
    bound = min(bound, total)
    gap = (total - bound) / total if total > 0 else 0.0
    return Allocation(tuple(chosen.tolist()), total, _sum(costs, chosen), bound, gap)


def couple(
    damages: Iterable[ArrayLike],
    cost: ArrayLike,
    budget: float,
    reused: ArrayLike = 0.0,
    exact: bool = False,
    time_limit: float = 60.0,
    **options: Any,
) -> Coupled:
    """Each span's schedule, for a budget that they share.

    damages: for each span [T, T, T], as `best_schedule` takes them; may be made one at a time, and must be comparable
    between spans. options: of `best_schedule` (objective, last). The rest as in `allocate`.

    Raises:
        ConfigError: as `best_schedule` and `allocate`.
    """
    found = [best_schedule(damage, np.shape(damage)[-1], **options) for damage in damages]
    if not found:
        raise ConfigError("there is no span to plan for")
    lengths = {len(best.compute) for schedules in found for best in schedules.values()}
    if len(lengths) > 1:
        raise ConfigError(f"all spans need the same number of steps, not {sorted(lengths)}")
    allocation = allocate(curves(found, lengths.pop()), cost, budget, reused, exact, time_limit)
    return Coupled(tuple(span[count] for span, count in zip(found, allocation.counts, strict=True)), allocation)


def curves(found: Sequence[Mapping[int, Best]], steps: int) -> Array:
    """Each span's damage by number of computed steps: [S, steps + 1], infinite where there is no schedule."""
    damage = np.full((len(found), steps + 1), np.inf)
    for row, schedules in zip(damage, found, strict=True):
        for count, best in schedules.items():
            row[count] = best.total
    return damage


def _sum(table: Array, chosen: Array) -> float:
    return float(table[np.arange(len(table)), chosen].sum())


def _hull(costs: Array, damage: Array) -> list[int]:
    """The options on the lower convex hull, from the cheapest one on; each does less damage than the one before."""
    hull: list[int] = []
    for option in np.lexsort((damage, costs)):
        if not np.isfinite(damage[option]) or (hull and damage[option] >= damage[hull[-1]]):
            continue
        while len(hull) > 1:
            (x0, x1, x2), (y0, y1, y2) = costs[[*hull[-2:], option]], damage[[*hull[-2:], option]]
            if (y0 - y1) * (x2 - x1) > (y1 - y2) * (x1 - x0):
                break
            hull.pop()
        hull.append(int(option))
    return hull


def _lagrangian(damage: Array, costs: Array, budget: float) -> tuple[Array, float]:
    """A choice within the budget and a lower bound.

    The relaxation, with shares of options allowed, is solved by taking the hulls' edges in the order of what they gain
    per cost. The first that does not fit would be taken in part: that gives the bound (Sinha and Zoltners 1979).
    """
    hulls = [_hull(*rows) for rows in zip(costs, damage, strict=True)]
    edges = []
    for span, hull in enumerate(hulls):
        for before, after in pairwise(hull):
            gain, price = damage[span, before] - damage[span, after], costs[span, after] - costs[span, before]
            edges.append((-gain / price, span, after, gain, price))
    edges.sort()
    chosen = np.array([hull[0] for hull in hulls])
    slack = budget - _sum(costs, chosen)
    bound = _sum(damage, chosen)
    for rate, span, after, gain, price in edges:
        if price > slack:
            bound += rate * slack
            break
        chosen[span] = after
        slack -= price
        bound -= gain
    _repair(damage, costs, budget, chosen)
    return chosen, max(bound, 0.0)


def _repair(damage: Array, costs: Array, budget: float, chosen: Array) -> None:
    """Spend what is left: change one span at a time, whichever gains most, hull or not."""
    spans = np.arange(len(chosen))
    while True:
        slack = budget - _sum(costs, chosen)
        gain = damage[spans, chosen][:, None] - damage
        gain[costs - costs[spans, chosen][:, None] > slack] = 0.0
        span, option = np.unravel_index(int(gain.argmax()), gain.shape)
        if gain[span, option] <= 0:
            return
        chosen[span] = option


def _programme(damage: Array, costs: Array, budget: float, time_limit: float) -> tuple[Array | None, float]:
    """The integer programme's answer, if it found one in time, and its lower bound."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    span, option = np.nonzero(np.isfinite(damage))
    variables = np.arange(len(span))
    objective, spent = damage[span, option], costs[span, option]
    scale, unit = objective.max() or 1.0, spent.max() or 1.0  # the solver's tolerances are absolute
    one_each = csr_array((np.ones(len(span)), (span, variables)))
    constraints = [LinearConstraint(one_each, 1, 1), LinearConstraint(spent[None] / unit, ub=budget / unit)]
    result = milp(
        objective / scale,
        integrality=np.ones(len(span)),
        bounds=Bounds(0, 1),
        constraints=constraints,
        options={"time_limit": time_limit, "mip_rel_gap": 0.0},
    )
    bound = -np.inf if result.mip_dual_bound is None else float(result.mip_dual_bound) * scale
    if result.x is None:
        return None, bound
    picked = result.x > 0.5
    answer = np.zeros(len(damage), dtype=int)
    answer[span[picked]] = option[picked]
    return answer, bound
