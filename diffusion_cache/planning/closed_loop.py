"""Refining a schedule by running it, scored on the final output.

What a surrogate cannot know, it leaves out: errors of neighbouring steps cancel or add up, a computed step corrects
what came before it, fitted weights look further back than two steps. So the schedules that different objectives
propose only start a search here, which learns from every run what the surrogate has wrong (`learned`).
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from ..errors import ConfigError
from .dynamic import Steps
from .learned import Learned

TAIL = 0.8225  # halfway to the 5th percentile of a normal distribution, in standard deviations


@dataclass(frozen=True)
class Tried:
    """A schedule that was run, and its score (higher is better)."""

    computed: Steps
    score: float


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
    damage: ArrayLike,
    runs: int,
    *,
    last: int = 0,
    also: Collection[int] = (),
    seed: int = 0,
    progress: Callable[[int, int, float], None] = lambda done, of, best: None,
) -> tuple[Tried, ...]:
    """The schedules of a search for the best, at most `runs` (or one), with as many computed steps as the starts have.

    run: the score in dB of a schedule, run for real. starts: schedules to begin from, all with one number of computed
    steps. damage: [h + 1, i, t], [T, T, T], what a surrogate says of forecasts (see `dynamic.best_schedule`), finite
    but at steps that stay computed: the first, the last ones, and those of `also`. Each start is run; then, in turns,
    the schedule that is best by what has been learned, and the most promising of those that differ from the best so
    far in one computed step, until all of these were run. The same seed gives the same search.

    Returns:
        What was run, each schedule once, in order.

    Raises:
        ConfigError: for no starts, starts of different sizes, or one that a guard forbids.
    """
    damage = np.array(damage, dtype=np.float64)
    damage[..., list(also)] = np.inf
    learned = Learned(damage)
    steps = len(learned.damage)
    fixed = frozenset({0, *range(steps - last, steps), *also})  # nothing to reuse at the first
    if not starts or len({len(start) for start in starts}) > 1:
        raise ConfigError("a search needs at least one schedule to start from, all with as many computed steps")
    for start in starts:
        if sorted(set(start)) != list(start) or not fixed <= set(start) or not set(start) <= set(range(steps)):
            raise ConfigError(f"{start} is no schedule of {steps} steps with {sorted(fixed)} computed")
    tried: dict[Steps, float] = {}

    def ran(computed: Steps) -> float:
        if computed not in tried:
            tried[computed] = run(computed)
            progress(len(tried), runs, max(tried.values()))
        return tried[computed]

    best = max(dict.fromkeys(tuple(start) for start in starts[: max(runs, 1)]), key=ran)
    chance = np.random.default_rng(seed)
    while len(tried) < runs:
        moves = [moved for moved in _moves(best, steps, fixed) if moved not in tried]
        if not moves:
            break  # everything within reach was run
        learned.learn(tried)
        guess = learned.drawn(chance)
        chosen = moves[int(guess.errors(moves).argmin())]
        if len(tried) % 2:
            optimum = guess.optimum(len(best), last)
            chosen = chosen if optimum in tried else optimum
        if ran(chosen) > tried[best]:
            best = chosen
    return tuple(Tried(*item) for item in tried.items())


def _moves(computed: Steps, steps: int, fixed: frozenset[int]) -> list[Steps]:
    """All schedules with one computed step elsewhere."""
    movable = [step for step in computed if step not in fixed]
    free = [step for step in range(steps) if step not in computed]
    return [tuple(sorted({*computed} - {step} | {to})) for step in movable for to in free]
