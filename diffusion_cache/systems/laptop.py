"""LAPTOP-Diff's idea for caching: damages of single cells (step, block) add up, so cells are chosen by knapsack."""

import warnings
from dataclasses import dataclass

import numpy as np

from ..errors import ConfigError, DiffusionCacheWarning
from ..plain import Fields, number
from ..plan import Plan
from ..planning.coupled import couple
from ..planning.static import static_plan
from ..planning.surrogate import cell_errors, edge_powers
from ..profile import Profile
from ..registry import systems
from .base import System

ADDITIVE = (0.5, 2.0)  # squared joint error over the sum of squares; what is measured beyond that is told


@systems.register("laptop")
@dataclass(frozen=True)
class Laptop(System):
    """The cells (step, block) to compute that keep the sum of damages of all others least within a share of compute.

    A cell's damage is the squared error of the final output by reusing that block at that step alone, from the profile:
    the sensitivity measured for its third of the blocks, shared out by the blocks' own errors. Errors of cells that
    reuse one feature point the same way, so within such a gap they are added before they are squared. Each block's gaps
    are chosen by dynamic programming, and blocks are weighed by knapsack. Warns where the profile's check says that
    damages do not add up.

    keep: share of the blocks' arithmetic that is spent.
    """

    keep: float = 0.5

    paper = "LAPTOP-Diff (arXiv 2404.11098)"
    scopes = frozenset({"block"})
    sensitivity = True

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise ConfigError(f"laptop: keep is a share of the blocks' compute, above 0 and up to 1, not {self.keep}")

    def plan(self, profile: Profile) -> Plan:
        self.require(profile, "sensitivity")
        ratio = self._additivity(profile)
        shares = [span.share for span in profile.spans]
        if self.keep * profile.total < 1:
            raise ConfigError(f"laptop: keep must be at least 1/{profile.total}, for the first step is computed")
        budget = self.keep * sum(shares) * profile.total
        found = couple((edge_powers(damage, 2.0) for damage in cell_errors(profile)), shares, budget)
        computed = np.array([best.compute for best in found.schedules]).T
        facts = {"damage": found.allocation.total, "gap": float(found.allocation.gap), "additivity": ratio}
        return static_plan(profile, f"laptop, {self.keep:g}", computed, facts=facts)

    def _additivity(self, profile: Profile) -> float:
        facts = Fields(profile.facts.get("sensitivity"), "profile: facts.sensitivity")
        checked = facts.maybe("additivity", Fields)
        if checked is None:
            raise ConfigError("laptop: this profile did not check whether damages add up: profile more than 3 steps")
        ratio = checked("mean", number)
        if not ADDITIVE[0] <= ratio <= ADDITIVE[1]:
            warnings.warn(
                f"Damages of this model do not add up (jointly {ratio:.2g} times their sum): the cells that laptop "
                "chooses may be far from the best. dpcache plans whole steps",
                DiffusionCacheWarning,
                stacklevel=2,
            )
        return ratio
