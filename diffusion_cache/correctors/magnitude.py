"""Following how the size of a feature changes from step to step, by the ratios that MagCache decides from."""

import math
from dataclasses import dataclass

from ..context import Blend, Corrector, Query
from ..errors import ConfigError
from ..plain import numbers
from ..registry import correctors


@correctors.register("magnitude")
@dataclass(frozen=True)
class Magnitude(Corrector):
    """ŷ = ĥ·Π γ_s over the steps s since the last computed one, γ_s = ‖F_s‖/‖F_{s−1}‖ as measured beforehand.

    ratios: γ of every step of the run, the first one's unused, for residuals of the span that is cached (MagCache,
    arXiv 2506.09045, measures the one from first to last block). Other forecasters than "reuse" extrapolate the size
    themselves.
    """

    ratios: tuple[float, ...]

    forecasters = frozenset({"reuse"})

    def __post_init__(self) -> None:
        wanted = "magnitude: ratios must be one number above 0 for each step"
        object.__setattr__(self, "ratios", numbers(wanted, self.ratios, lambda ratio: 0 < ratio < math.inf))

    def blend(self, query: Query) -> Blend:
        """Raises ConfigError in a run of another length than the ratios are for."""
        since, target = int(query.nodes[-1]), int(query.target)
        if query.total not in (None, len(self.ratios)) or target >= len(self.ratios):
            raise ConfigError(
                f"magnitude: its ratios are of {len(self.ratios)} steps, and this run has {query.total or 'more'}"
            )
        return Blend(math.prod(self.ratios[since + 1 : target + 1]), (0.0,) * len(query.nodes))
