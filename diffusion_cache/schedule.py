"""A schedule: which spans are computed at which steps."""

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from .errors import ConfigError


@dataclass(frozen=True)
class Schedule:
    """compute[step][pass][span], bool. An axis of length one stands for all passes or all spans.

    The first step is always computed: there is nothing to reuse yet. kept: the schedule whose features alone are
    stored, where this one computes more; None for itself.
    """

    compute: tuple[tuple[tuple[bool, ...], ...], ...]
    kept: "Schedule | None" = None

    def __post_init__(self) -> None:
        if not self.compute:
            raise ConfigError("a schedule needs at least one step")
        if not all(span for row in self.compute[0] for span in row):
            raise ConfigError("a schedule must compute its first step: there is nothing to reuse yet")

    @classmethod
    def uniform(cls, computed: Iterable[bool]) -> "Schedule":
        """One decision a step, for all passes and spans."""
        return cls(tuple(((bool(value),),) for value in computed))

    @property
    def total(self) -> int:
        return len(self.compute)

    @property
    def computed(self) -> tuple[int, ...] | None:
        """The computed steps, where passes and spans all take the same ones; else None."""
        cells = [{span for row in step for span in row} for step in self.compute]
        if any(len(found) > 1 for found in cells):
            return None
        return tuple(step for step, found in enumerate(cells) if True in found)

    def row(self, step: int, pass_index: int) -> tuple[bool, ...]:
        """The decisions for the spans at a step, or (True,) past the schedule's end."""
        if step >= self.total:
            return (True,)
        passes = self.compute[step]
        return passes[min(pass_index, len(passes) - 1)]

    @property
    def reuses(self) -> bool:
        """Whether any span is reused at any step."""
        return not all(span for step in self.compute for row in step for span in row)

    @cached_property
    def nfe(self) -> float:
        """Computed steps, averaged over passes and spans."""
        return sum(sum(sum(row) / len(row) for row in step) / len(step) for step in self.compute)

    def stores(self, step: int, pass_index: int, history: int) -> tuple[bool, ...]:
        """Which spans' features of this step serve a later reuse, with the last `history` features of each kept.

        One entry for each span of a row, or one for all; (False,) past the schedule's end.
        """
        return (self.kept or self)._useful(pass_index, history)[step] if step < self.total else (False,)

    def _useful(self, pass_index: int, history: int) -> list[tuple[bool, ...]]:
        key = (pass_index, history)
        if key not in self._useful_cache:
            rows = [self.row(step, pass_index) for step in range(self.total)]
            width = max(map(len, rows))
            columns = zip(*(row if len(row) == width else row * width for row in rows), strict=True)
            self._useful_cache[key] = list(zip(*(_read(column, history) for column in columns), strict=True))
        return self._useful_cache[key]

    @cached_property
    def _useful_cache(self) -> dict[tuple[int, int], list[tuple[bool, ...]]]:
        return {}


def _read(computed: Sequence[bool], history: int) -> list[bool]:
    """The steps of a span whose feature is among its last `history` at a reused step."""
    read = [False] * len(computed)
    recent: list[int] = []
    for step, computes in enumerate(computed):
        if computes:
            recent = [*recent, step][-history:]
        else:
            for kept in recent:
                read[kept] = True
    return read


def spaced(steps: int, computed: int, exponent: float, last: int = 0, length: int | None = None) -> tuple[int, ...]:
    """Computed steps spaced by a power law: length · (j / computed)^exponent for exponents ≥ 1, mirrored below 1.

    Exponents above 1 crowd the start, those below 1 the end; places that collide or run out are moved. last: steps at
    the end that are computed too, as part of the number. length: what is divided, default the steps before those;
    the next multiple of the number makes exponent 1 every n-th step.

    Raises:
        ConfigError: unless 1 + last ≤ computed ≤ steps and the exponent is above 0.
    """
    if not 1 + last <= computed <= steps:
        raise ConfigError(f"no schedule computes {computed} of {steps} steps with the last {last} among them")
    if not exponent > 0:
        raise ConfigError(f"the exponent of a spacing must be above 0, not {exponent}")
    inner, end = computed - last, steps - last
    shares = [j / inner for j in range(inner)]
    bent = [u**exponent if exponent >= 1 else 1 - (1 - u) ** (1 / exponent) for u in shares]
    return (*distinct([(length or end) * u for u in bent], end), *range(end, steps))


def distinct(places: Sequence[float], total: int) -> list[int]:
    """The steps below ascending places, in order and each only once, moved as little as it takes; 0 comes first.

    places: at most `total` of them, from 0 on.
    """
    steps: list[int] = []
    for place in places:
        below = math.floor(place + 1e-9)  # a whole number may come out a hair below itself
        steps.append(max(below, steps[-1] + 1) if steps else 0)
    return [min(step, total - len(steps) + j) for j, step in enumerate(steps)]


def accumulated_ratios(
    ratios: Sequence[float], kept: Collection[int], threshold: float, max_skip: int, max_deviation: float = math.inf
) -> list[bool]:
    """Which steps MagCache computes (arXiv 2506.09045), from each step's ratio to the one before.

    Since the last computed step, ρ is the product of the ratios and E = Σ|1 − ρ|; a step is reused while E ≤ threshold
    and at most `max_skip` in a row. Steps in `kept` are computed, and those whose ratio is further than `max_deviation`
    from 1.
    """
    computed, product, error, skipped = [], 1.0, 0.0, 0
    for step, ratio in enumerate(ratios):
        product *= ratio
        error += abs(1 - product)
        skipped += 1
        forced = step in kept or abs(1 - ratio) > max_deviation
        computed.append(forced or error > threshold or skipped > max_skip)
        if computed[-1]:
            product, error, skipped = 1.0, 0.0, 0
    return computed
