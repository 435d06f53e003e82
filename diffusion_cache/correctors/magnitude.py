"""Following how the size of a feature changes from step to step, by the ratios that MagCache decides from."""

import math
from dataclasses import dataclass
from functools import cached_property

from ..context import Blend, Corrector, Query
from ..errors import ConfigError
from ..plain import numbers
from ..plan import positions
from ..registry import correctors


@correctors.register("magnitude")
@dataclass(frozen=True)
class Magnitude(Corrector):
    """ŷ = ĥ·Π γ_s over the steps s since the last computed one, γ_s = ‖F_s‖/‖F_{s−1}‖ as measured beforehand.

    ratios: γ of every step of the run, the first one's unused, for residuals of the span that is cached (MagCache,
    arXiv 2506.09045, measures the one from first to last block); in a run of another length, those of the nearest share
    of the run, as policy magcache takes them. Other forecasters than "reuse" extrapolate the size themselves.
    """

    ratios: tuple[float, ...]

    forecasters = frozenset({"reuse"})

    def __post_init__(self) -> None:
        wanted = "magnitude: ratios must be one number above 0 for each step"
        object.__setattr__(self, "ratios", numbers(wanted, self.ratios, lambda ratio: 0 < ratio < math.inf))

    def blend(self, query: Query) -> Blend:
        """Raises ConfigError past the last ratio of a run whose length is not known."""
        since, target, length = int(query.nodes[-1]), int(query.target), len(self.ratios)
        if query.total is None and target >= length:
            raise ConfigError(f"magnitude: ratios are of {length} steps: pass num_steps to diffusion_cache.run")
        ratios = self._of(query.total or length)
        return Blend(math.prod(ratios[since + 1 : target + 1]), (0.0,) * len(query.nodes))

    def _of(self, total: int) -> tuple[float, ...]:
        if total not in self._by_total:
            places = positions((), (0.0,) * total, len(self.ratios))
            self._by_total[total] = tuple(self.ratios[round(place)] for place in places)
        return self._by_total[total]

    @cached_property
    def _by_total(self) -> dict[int, tuple[float, ...]]:
        """The ratios of runs of other lengths, by these."""
        return {len(self.ratios): self.ratios}
