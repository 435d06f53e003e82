"""DeepCache: between full steps, a UNet runs only what lies above a cut and reuses the deep up-feature."""

from dataclasses import dataclass

from ..errors import ConfigError
from ..forecasters import Reuse
from ..policies import Centered, Interval
from ..profile import Profile
from ..registry import systems
from .base import Parts, System

SPACINGS = ("uniform", "centered")


@systems.register("deepcache")
@dataclass(frozen=True)
class DeepCache(System):
    """One full step in `every`, evenly spaced or crowded around one point of the run.

    depth: down and up blocks that run at every step; 1 skips most. spacing: "uniform" (1:N), or "centered" for the
    paper's non-uniform 1:N with as many full steps, densest at `center` (a share of the run) and rarer by a power law.
    """

    every: int = 3
    depth: int = 1
    spacing: str = "uniform"
    center: float = 0.3
    power: float = 1.4

    paper = "DeepCache (arXiv 2312.00858)"
    scopes = frozenset({"cut"})
    denoisers = frozenset({"unet"})
    needs_profile = False

    def __post_init__(self) -> None:
        if self.spacing not in SPACINGS:
            raise ConfigError(f"deepcache: spacing must be one of {', '.join(SPACINGS)}, not {self.spacing!r}")
        shaped = [name for name in ("center", "power") if getattr(self, name) != getattr(type(self), name)]
        if self.spacing == "uniform" and shaped:
            raise ConfigError(f"deepcache: {' and '.join(shaped)} shape the centered spacing: add spacing='centered'")

    def parts(self, profile: Profile | None) -> Parts:
        spaced = self.spacing == "centered"
        policy = Centered(self.every, self.center, self.power) if spaced else Interval(self.every)
        return Parts(policy, Reuse(), "cut", self.depth)
