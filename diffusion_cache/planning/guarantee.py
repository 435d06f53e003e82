"""What held-out samples allow to be promised: a quality that holds for a share of all prompts, with a confidence.

The samples are taken as drawn independently from what the plan will be used on, and as used for nothing else (fitting,
choosing a schedule) before.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from ..errors import ConfigError
from ..plain import rounded_down
from .surrogate import Array

ROUNDING = 1e-12  # a share that is reached exactly must not be missed by rounding


def lower_bound(successes: int, n: int, confidence: float = 0.95) -> float:
    """The true share of successes is at least this with the given confidence (one-sided Clopper–Pearson, exact).

    Raises:
        ConfigError: where successes are not 0 to n, or the confidence is not between 0 and 1.
    """
    _check_probability("confidence", confidence)
    if not 0 <= successes <= n or n < 1:
        raise ConfigError(f"successes must be from 0 to n ≥ 1, not {successes} of {n}")
    return float(_bounds(successes, n, confidence)) if successes else 0.0


def needed(share: float = 0.95, confidence: float = 0.95) -> int:
    """The fewest samples that can show a share of successes: with all of them successful. 59 for 95% at 95%.

    Raises:
        ConfigError: where one of the two is not between 0 and 1.
    """
    _check_probability("share", share)
    _check_probability("confidence", confidence)
    return math.ceil(math.log(1 - confidence) / math.log(share) - ROUNDING)


def holds(values: ArrayLike, target: float, share: float = 0.95, confidence: float = 0.95) -> bool:
    """Whether the samples show that at least `share` of all outcomes reach the target. NaN does not reach it.

    values: one per held-out sample, higher is better.

    Raises:
        ConfigError: for too few samples to show that at all; says how many more it takes.
    """
    values = _samples(values, share, confidence)
    return int((values >= target).sum()) >= _enough(len(values), share, confidence)


def best_target(values: ArrayLike, share: float = 0.95, confidence: float = 0.95) -> float:
    """The highest target that `holds`: an order statistic (a lower tolerance bound); −inf where NaNs prevent any.

    Raises:
        ConfigError: for too few samples.
    """
    values = _samples(values, share, confidence)
    ranked = np.sort(np.where(np.isnan(values), -np.inf, values))
    return float(ranked[len(values) - _enough(len(values), share, confidence)])


def pick(values: Sequence[ArrayLike], target: float, share: float = 0.95, confidence: float = 0.95) -> int:
    """The cheapest plan for which the target holds, with the confidence for the choice as a whole.

    Plans are tested in order and the first that fails ends the search, so that choosing among many spends no
    confidence (fixed-sequence testing); a plan beyond it is not looked at even if it would pass. The target must have
    been chosen without looking at the values.

    values: of each plan's held-out samples, from the most expensive plan to the cheapest.

    Returns: the position of the last plan that passed.

    Raises:
        ConfigError: where the most expensive plan fails already, naming the best target that it holds; for too few
            samples.
    """
    if not len(values):
        raise ConfigError("there is no plan to pick from")
    samples = [_samples(row, share, confidence) for row in values]
    passed = -1
    for row in samples:
        if not holds(row, target, share, confidence):
            break
        passed += 1
    if passed < 0:
        best = rounded_down(best_target(samples[0], share, confidence))
        raise ConfigError(
            f"no plan is shown to reach {target:g} for {_percent(share)} of outcomes at {_percent(confidence)} "
            f"confidence: ask for at most {best:g}, which the most expensive plan reaches, or add a plan that computes "
            "more"
        )
    return passed


def _enough(n: int, share: float, confidence: float) -> int:
    """The fewest successes of n whose `lower_bound` is the share; n + 1 where not even all are enough."""
    counts = np.arange(1, n + 1)
    return 1 + int(np.searchsorted(_bounds(counts, n, confidence), share - ROUNDING))


def _bounds(successes: ArrayLike, n: int, confidence: float) -> Array:
    """Clopper–Pearson's lower bounds for these numbers of successes, each at least 1."""
    from scipy.special import betaincinv  # takes a third of the time that importing the package does

    counts = np.asarray(successes)
    return betaincinv(counts, n - counts + 1, 1 - confidence)


def _samples(values: ArrayLike, share: float, confidence: float) -> Array:
    values = np.asarray(values, dtype=np.float64).ravel()
    missing = needed(share, confidence) - len(values)
    if missing > 0:
        raise ConfigError(
            f"{len(values)} held-out samples cannot show what holds for {_percent(share)} of outcomes at "
            f"{_percent(confidence)} confidence: measure {missing} more (`diffusion-cache plan --held-out`)"
        )
    return values


def _percent(value: float) -> str:
    return f"{100 * value:g}%"


def _check_probability(name: str, value: float) -> None:
    if not 0 < value < 1:
        raise ConfigError(f"{name} must be between 0 and 1, not {value}")
