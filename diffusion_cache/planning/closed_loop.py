"""Refining a schedule by running it: local moves, scored on the final output.

What a surrogate cannot know, it leaves out: errors of neighbouring steps cancel or add up, a computed step corrects
what came before it, fitted weights look further back than two steps. So the schedules that different objectives
propose only start a search here.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from ..errors import ConfigError

Steps = tuple[int, ...]  # the computed steps of a schedule, in order
TAIL = 0.8225  # halfway to the 5th percentile of a normal distribution, in standard deviations


@dataclass(frozen=True)
class Tried:
    """A schedule that was run, and its score (higher is better)."""

    computed: Steps
    score: float


@dataclass(frozen=True)
class Found:
    """best: the highest score of all; tried: in order, each schedule once; start: the best of those given."""

    best: Tried
    start: Tried
    tried: tuple[Tried, ...]


def score(values: Sequence[float]) -> float:
    """Midway between the mean and the 5th percentile of a quality's values, both of which a plan is judged by.

    The percentile is that of a normal distribution with the values' mean and spread, which moves less from one
    sample to the next than the lowest of a few values does.
    """
    array = np.asarray(values, dtype=np.float64)
    return float(array.mean() - TAIL * array.std(ddof=1)) if len(array) > 1 else float(array.mean())


def refine(
    run: Callable[[Steps], float],
    starts: Sequence[Steps],
    steps: int,
    runs: int,
    *,
    warmup: int = 1,
    last: int = 0,
    seed: int = 0,
    progress: Callable[[int, int, float], None] = lambda done, of, best: None,
) -> Found:
    """The best schedule found in at most `runs` runs, with as many computed steps as the starts have.

    run: the score of a schedule, run for real. starts: schedules to begin from, all with one number of computed steps.
    Each is run; then one computed step at a time of the best so far is moved, by one or two places or into a long gap,
    and the move kept where the score rises. warmup, last: steps at the ends that stay computed. The same seed gives the
    same search.

    Raises:
        ConfigError: for no starts, starts of different sizes, or one that a guard forbids.
    """
    fixed = frozenset(range(max(warmup, 1))) | frozenset(range(steps - last, steps))  # nothing to reuse at the first
    if not starts or len({len(start) for start in starts}) > 1:
        raise ConfigError("a search needs at least one schedule to start from, all with as many computed steps")
    for start in starts:
        if sorted(set(start)) != list(start) or not fixed <= set(start) or not set(start) <= set(range(steps)):
            raise ConfigError(f"{start} is no schedule of {steps} steps with {warmup} first and {last} last computed")
    tried: dict[Steps, float] = {}

    def ran(computed: Steps) -> float:
        if computed not in tried:
            tried[computed] = run(computed)
            progress(len(tried), runs, max(tried.values()))
        return tried[computed]

    best = max(dict.fromkeys(tuple(start) for start in starts[: max(runs, 1)]), key=ran)
    begun = Tried(best, tried[best])
    chance = random.Random(seed)
    while len(tried) < runs:
        move = next((moved for moved in _moves(best, steps, fixed, chance) if moved not in tried), None)
        if move is None:
            break  # everything within reach was run
        if ran(move) > tried[best]:
            best = move
    return Found(Tried(best, tried[best]), begun, tuple(Tried(*item) for item in tried.items()))


def _moves(computed: Steps, steps: int, fixed: frozenset[int], chance: random.Random) -> Iterator[Steps]:
    """Schedules with one computed step elsewhere: many at random, then all that are left."""
    movable = [step for step in computed if step not in fixed]
    free = [step for step in range(steps) if step not in computed]
    if not movable or not free:
        return

    def moved(step: int, to: int) -> Steps:
        return tuple(sorted({*computed} - {step} | {to}))

    for _ in range(4 * len(movable)):
        step = chance.choice(movable)
        if chance.random() < 2 / 3:
            to = step + chance.choice((-2, -1, -1, 1, 1, 2))
        else:
            # into the middle of a gap, the longer the likelier
            ends = [*computed, steps]
            gaps = [(b - a - 1, (a + b) // 2) for a, b in pairwise(ends) if b - a > 1]
            to = chance.choices([middle for _, middle in gaps], weights=[size for size, _ in gaps])[0]
        if to in free:
            yield moved(step, to)
    rest = [(step, to) for step in movable for to in free]
    chance.shuffle(rest)
    for step, to in rest:
        yield moved(step, to)
