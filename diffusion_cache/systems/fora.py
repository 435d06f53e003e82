"""FORA: attention and feed-forward outputs are computed every N steps and reused in between."""

from dataclasses import dataclass

from ..forecasters import Reuse
from ..policies import Interval
from ..profile import Profile
from ..registry import systems
from .base import Parts, System


@systems.register("fora")
@dataclass(frozen=True)
class Fora(System):
    """Compute every branch at one step in `every`, and reuse its output, taken before its gate, at the others."""

    every: int = 3

    paper = "FORA (arXiv 2407.01425)"
    scopes = frozenset({"branch"})
    denoisers = frozenset({"transformer"})
    needs_profile = False

    def parts(self, profile: Profile | None) -> Parts:
        return Parts(Interval(self.every), Reuse(), "branch", None)
