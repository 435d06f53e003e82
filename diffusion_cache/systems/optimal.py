"""What the systems that look for an optimal schedule share: the profile's damages, and a budget of evaluations."""

import math
from abc import abstractmethod
from dataclasses import dataclass

from ..context import SCOPES
from ..errors import ConfigError
from ..plan import Plan
from ..planning.dynamic import Best
from ..planning.static import spared, static_plan
from ..planning.surrogate import Array, mean_damages
from ..profile import Profile
from .base import System


@dataclass(frozen=True)
class Optimal(System):
    """The schedule with the least damage of all that take so many denoiser evaluations.

    nfe: evaluations, of which a reused step of a UNet's cut still takes a part. order: of the Taylor forecast, 1, or 0
    for reuse. Damage is the sensitivity of the final output times the relative error of the forecast, of all spans and
    passes together: the profile's estimate of what the papers measure. Without sensitivities all steps count alike.
    """

    nfe: float
    order: int = 1

    scopes = frozenset(SCOPES)
    sensitivity = True

    def __post_init__(self) -> None:
        if not math.isfinite(self.nfe):
            raise ConfigError(f"{self.name}: nfe must be a finite number, not {self.nfe!r}")
        if self.order not in (0, 1):
            raise ConfigError(f"{self.name}: order must be 0 (reuse) or 1 (Taylor), not {self.order}")

    @abstractmethod
    def best(self, damage: Array, count: int) -> Best:
        """The best schedule with so many computed steps; damage: of single steps, as `mean_damages` gives it."""

    def plan(self, profile: Profile) -> Plan:
        total, share = profile.total, spared(profile)
        if not share > 0:
            raise ConfigError(
                f"{self.name}: the profile's spans take no share of the denoiser's work, so that no schedule spares any"
            )
        count = math.floor(total - (total - self.nfe) / share + 1e-9)
        if not 1 <= count <= total:
            least = total - (total - 1) * share
            raise ConfigError(f"{self.name}: nfe must be from {least:.4g} to {total}, not {self.nfe:g}")
        found = self.best(mean_damages(profile, self.order), count)
        return static_plan(profile, f"{self.name}, {self.nfe:g}", found.compute, self.order)
