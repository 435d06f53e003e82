"""The best schedule of one span for every number of computed steps, by dynamic programming.

Taylor-1 forecasts from the last two computed steps, so with additive damages the pair (previous, current) is the
exact state, and a schedule is a path over such pairs: from (h, i) to (i, j) it costs the damage of reusing the steps
between i and j. Sums of damages are DPCache's objective, sums of powers MeanCache's, the smallest worst damage
LeMiCa's; here its ties are broken by the sum. Exact for the damages given, which are a surrogate of the final output's
error: plans are to be checked in closed loop.
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import ConfigError
from .surrogate import MOST_STEPS, Array

Objective = Literal["sum", "power", "minimax"]
Steps = tuple[int, ...]  # the computed steps of a schedule, in order

POWER = 2.0  # of damages, where the objective is the sum of powers
CHUNK = 1 << 17  # sums held at a time: they should stay in the processor's cache


class NoScheduleError(ConfigError):
    """No schedule computes any of the numbers of steps that were asked for."""


@dataclass(frozen=True)
class Best:
    """compute: one decision a step. total: sum of the damages (of their powers, where that was the objective).
    worst: the largest damage of one step; 0 where nothing is reused."""

    compute: tuple[bool, ...]
    total: float
    worst: float

    @property
    def computed(self) -> Steps:
        """The computed steps."""
        return tuple(step for step, value in enumerate(self.compute) if value)


def best_schedule(
    damage: ArrayLike,
    computed: int | range,
    objective: Objective = "sum",
    last: int = 0,
) -> dict[int, Best]:
    """The best schedule for each number of computed steps, keyed by that number (exactly so many are computed).

    damage: [h + 1, i, t], [T, T, T]: of forecasting step t from computed steps h < i < t; h = −1 where i is the only
    one, which is step 0. [1, T, T] where h does not matter. At least 0; infinite where it must not be. Not read where
    not h < i < t.
    computed: the numbers asked for; a whole number n means all from 1 to n. Those that are not possible are
    left out.
    objective: "sum" of damages, sum of their second "power", or "minimax": the smallest worst damage, then the smallest
    sum.
    last: steps computed at the end.

    Ties go to the schedule whose last computed step is earlier, then the one before it, and so on.

    Raises:
        ConfigError: for values out of range.
        NoScheduleError: where no number asked for is possible; names the nearest that is.
    """
    damage = _checked_shape(damage)
    steps = len(damage)
    wanted = computed if isinstance(computed, range) else range(1, operator.index(computed) + 1)
    if not wanted or min(wanted) < 1 or max(wanted) > steps:
        asked = wanted.start if len(wanted) == 1 else computed
        raise ConfigError(f"of {steps} steps, 1 to {steps} can be computed, not {asked}")
    if objective not in get_args(Objective):
        raise ConfigError(f"objective must be one of {', '.join(get_args(Objective))}, not {objective!r}")
    if last < 0:
        raise ConfigError(f"last must be at least 0, not {last}")
    cost = _edge_damages(damage, last)
    worst = np.maximum.accumulate(cost, axis=1) if objective == "minimax" else None
    if objective == "power":
        cost **= POWER
    np.cumsum(cost, axis=1, out=cost)

    limit = max(wanted)
    if worst is None:
        paths = _Paths(cost, limit)
        found = {count: (paths.totals[count], paths.steps(count)) for count in wanted if paths.reaches(count)}
    else:
        found = _minimax(cost, worst, limit, wanted)
    if not found:
        every = _Paths(cost, steps)
        possible = [count for count in range(1, steps + 1) if every.reaches(count)]
        nearest = min(possible, key=lambda count: min(abs(count - other) for other in wanted))
        raise NoScheduleError(
            f"no schedule of {steps} steps with {computed} computed can have last={last}; the nearest number that can "
            f"is {nearest}"
        )
    return {count: _best(damage, path, float(total)) for count, (total, path) in found.items()}


def _checked_shape(damage: ArrayLike) -> Array:
    damage = np.asarray(damage, dtype=np.float64)
    steps = damage.shape[-1] if damage.ndim == 3 else 0
    if damage.shape not in ((steps, steps, steps), (1, steps, steps)) or not steps:
        raise ConfigError(f"damages must be [steps, steps, steps] or [1, steps, steps], not {list(damage.shape)}")
    if steps > MOST_STEPS:
        raise ConfigError(
            f"planning is limited to {MOST_STEPS} steps (memory), not {steps}: plan for fewer and resample"
        )
    return np.broadcast_to(damage, (steps, steps, steps))


def _edge_damages(damage: Array, last: int) -> Array:
    """The damages as [i, t + 1, h + 1], infinite where step t is one of the last, which are computed, 0 where t ≤ i.

    Summed over its middle axis up to j, it is the cost of the edge from (h, i) to (i, j). h runs innermost because
    that is what every state is minimised over.
    """
    steps = len(damage)
    edges = np.zeros((steps, steps + 1, steps))
    for i in range(steps):
        previous = slice(min(i, 1), i + 1)  # h + 1
        reachable = damage[previous, i, i + 1 :].T
        if not (reachable >= 0).all():
            raise ConfigError(f"damages must be numbers of at least 0: not so for reuse of step {i}")
        edges[i, i + 2 :, previous] = reachable
        edges[i, max(i + 1, steps - last) + 1 :] = np.inf
    return edges


def _minimax(cost: Array, worst: Array, limit: int, wanted: range) -> dict[int, tuple[float, list[int]]]:
    bounds = _Paths(worst, limit, combine=np.maximum).totals
    counts: dict[float, list[int]] = {}
    for count in wanted:
        if np.isfinite(bounds[count]):
            counts.setdefault(float(bounds[count]), []).append(count)
    # the nearest a step can be reused in any way, which spares the edges beyond it
    nearest = np.stack([worst[i, :, min(i, 1) : i + 1].min(axis=1) for i in range(len(worst))])
    found = {}
    for bound, group in counts.items():
        paths = _Paths(cost, max(group), worst=worst, nearest=nearest, bound=bound)
        found.update({count: (paths.totals[count], paths.steps(count)) for count in group})
    return dict(sorted(found.items()))


class _Paths:
    """Cheapest paths with each number of computed steps up to `limit`.

    cost: [i, j, h + 1] of the edge from (h, i) to (i, j); j = T ends the path. combine: how costs add up along a path
    (np.add or np.maximum). worst, nearest, bound: use only edges with worst[i, j, h + 1] ≤ bound, where nearest[i, j]
    is the least of them over h; both grow with j.
    """

    def __init__(
        self,
        cost: Array,
        limit: int,
        combine: Callable[..., Array] = np.add,
        worst: Array | None = None,
        nearest: Array | None = None,
        bound: float = np.inf,
    ):
        steps = len(cost)
        far = np.full(steps, steps - 1)  # the last j that i has an edge to
        if nearest is not None:
            far = np.array([int(np.searchsorted(nearest[i], bound, side="right")) - 1 for i in range(steps)])
            far = np.minimum(far, steps - 1)
        self._low = low = np.zeros(steps, dtype=int)  # the first h + 1 that has an edge to i
        for h in reversed(range(steps)):
            low[h + 1 : far[h] + 1] = h + 1
        self.totals = np.full(limit + 1, np.inf)
        self._ends = [(0, 0)] * (limit + 1)
        # values[i][count, h + 1 - low[i]]: the least cost of reaching (h, i) with so many steps computed
        shapes = [(min(limit, i + 1) + 1, i + 1 - low[i]) for i in range(steps)]
        values = [np.full(shape, np.inf) for shape in shapes]
        self._before: list[NDArray[np.int16]] = [np.zeros(shape, dtype=np.int16) for shape in shapes]
        values[0][1, 0] = 0.0
        for i in range(steps):
            reached = np.flatnonzero(np.isfinite(values[i].min(axis=1)))
            if not len(reached):
                continue
            counts = slice(reached[0], reached[-1] + 1)
            edges = cost[i, i + 1 :, low[i] : i + 1]  # [j, h]
            if worst is not None:
                allowed = np.append(np.arange(far[i] - i), -1)  # rows of `edges`: up to far, and the end
                edges = np.where(worst[i, i + 1 :, low[i] : i + 1][allowed] <= bound, edges[allowed], np.inf)
            self._finish(i, counts.start, combine(values[i][counts], edges[-1]))
            self._extend(i, counts.start, values, edges[:-1], limit, combine)

    def _finish(self, i: int, first: int, totals: Array) -> None:
        """End paths at step i. totals: [count, h]."""
        for count, row in enumerate(totals, first):
            column = int(row.argmin())
            if row[column] < self.totals[count]:
                self.totals[count] = row[column]
                self._ends[count] = (i, column)

    def _extend(
        self, i: int, first: int, values: list[Array], edges: Array, limit: int, combine: Callable[..., Array]
    ) -> None:
        """Go on from step i to each later one. edges: [j, h]."""
        if not edges.size:
            return
        sources = values[i][first:limit]
        size = max(1, CHUNK // edges.size)
        for start in range(0, len(sources), size):
            sums = combine(sources[start : start + size, None, :], edges)  # [count, j, h]
            column = sums.argmin(axis=-1)
            least = np.take_along_axis(sums, column[..., None], -1)[..., 0]
            rows = slice(first + start + 1, first + start + 1 + len(least))
            for offset in range(edges.shape[0]):
                j = i + 1 + offset
                values[j][rows, i + 1 - self._low[j]] = least[:, offset]
                self._before[j][rows, i + 1 - self._low[j]] = column[:, offset]

    def reaches(self, count: int) -> bool:
        return bool(np.isfinite(self.totals[count]))

    def steps(self, count: int) -> list[int]:
        """The computed steps of the cheapest path with so many."""
        i, column = self._ends[count]
        path = [i]
        while i > 0:
            h = int(column + self._low[i]) - 1
            column = int(self._before[i][count, column])
            i, count = h, count - 1
            path.append(i)
        return path[::-1]


def _best(damage: Array, path: list[int], total: float) -> Best:
    compute = np.zeros(len(damage), dtype=bool)
    compute[path] = True
    edges = zip([-1, *path[:-1]], path, [*path[1:], len(damage)], strict=True)
    reused = [damage[h + 1, i, i + 1 : j] for h, i, j in edges]
    return Best(tuple(compute.tolist()), total, max((float(part.max()) for part in reused if part.size), default=0.0))
