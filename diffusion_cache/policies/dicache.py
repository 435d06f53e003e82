"""Decide by how differently the first blocks and their input have moved: DiCache (arXiv 2508.17356).

With x what enters the first blocks and p what they give, E += |L1r(p_s, p_{s−1}) − L1r(x_s, x_{s−1})|; reuse while
E < threshold, else the call goes on from p.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ..context import Needs, Past
from ..errors import ConfigError
from ..registry import policies
from ..signals import relative_l1
from .accumulate import Accumulate


@policies.register("dicache")
@dataclass(frozen=True)
class DiCache(Accumulate):
    """Compute the first `front` blocks always, the others when the summed changes that they add reach `threshold`.

    What is forecast is what the other blocks add to p; the paper forecasts y − x, the first blocks' share with it. Its
    forecast, besides, is forecaster="reuse" with corrector="alignment".
    """

    threshold: float = 0.02
    front: int = 1

    scopes = frozenset({"stack"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.front < 1:
            raise ConfigError(f"dicache: front must be at least 1 block, not {self.front}")

    @property
    def needs(self) -> Needs:
        return Needs(signals=("probe_input", "input"), previous=1, probe=self.front)

    def measure(self, signals: Mapping[str, Tensor], past: Past) -> Tensor:
        taken, given = (relative_l1(signals[name], past.previous[name]) for name in self.needs.signals)
        return (given - taken).abs()
