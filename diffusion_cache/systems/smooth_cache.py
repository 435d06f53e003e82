"""SmoothCache: each type of layer is reused for as many steps as its output changes little."""

import math
from dataclasses import dataclass

import numpy as np

from ..context import branch_kind
from ..errors import ConfigError
from ..plan import Plan
from ..planning.static import static_plan
from ..planning.surrogate import TINY, Array, mean_together, own_grams
from ..profile import Profile
from ..registry import systems
from .base import System


def changes(grams: Array) -> Array:
    """‖F_c − F_t‖ / ‖F_c‖ by [c, t], mean over the spans and passes of grams [S, P, T, T] that ran at both steps.

    Infinite where none did.
    """
    energy = grams.diagonal(axis1=2, axis2=3)
    square = energy[..., :, None] + energy[..., None, :] - 2 * grams
    return mean_together(np.sqrt(np.maximum(square, 0) / np.maximum(energy[..., :, None], TINY)), grams, np.inf)


def longest_lags(change: Array, alpha: float, max_lag: int) -> list[int]:
    """Computed steps: after step c, the next is the one past the longest lag k ≤ max_lag with change[c, c + k] ≤ α."""
    steps, found = len(change), [0]
    while True:
        c = found[-1]
        lags = [k for k in range(1, min(max_lag, steps - 1 - c) + 1) if change[c, c + k] <= alpha]
        step = c + max(lags, default=0) + 1
        if step >= steps:
            return found
        found.append(step)


@systems.register("smooth_cache")
@dataclass(frozen=True)
class SmoothCache(System):
    """Per type of layer, reuse for the longest lag at which its output changes by no more than `alpha` on average.

    Types are attention, cross-attention and feed-forward; all blocks of a type share a schedule. max_lag: most steps
    reused in a row. The paper measures changes in L1; profiles hold those for one step only, and all lags in L2, which
    is used here (a ratio of root mean squares over samples).
    """

    alpha: float = 0.15
    max_lag: int = 3

    paper = "SmoothCache (arXiv 2411.10510)"
    scopes = frozenset({"branch"})
    denoisers = frozenset({"transformer"})

    def __post_init__(self) -> None:
        if not 0 <= self.alpha < math.inf or self.max_lag < 0:
            raise ConfigError(
                f"smooth_cache: alpha and max_lag must be finite and at least 0, not {self.alpha} and {self.max_lag}"
            )

    def plan(self, profile: Profile) -> Plan:
        grams = own_grams(profile)
        names = [span.name for span in profile.spans]
        kinds = [branch_kind(name, names) for name in names]
        computed = np.zeros((profile.total, len(kinds)), dtype=bool)
        for kind in dict.fromkeys(kinds):
            places = [place for place, other in enumerate(kinds) if other == kind]
            steps = longest_lags(changes(grams[places]), self.alpha, self.max_lag)
            computed[np.ix_(steps, places)] = True
        return static_plan(profile, f"smooth cache, {self.alpha:g}", computed, facts={"alpha": self.alpha})
