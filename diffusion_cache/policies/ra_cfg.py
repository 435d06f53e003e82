"""Decide by the risk to the guided output, which the two guidance branches share: RA-CFG.

With guidance scale g the output is (1 − g)·u + g·c of the unconditional and the conditional branch. If reusing them is
off by r_u and r_c, with correlation ρ, it is off by r² = (1 − g)²·r_u² + g²·r_c² + 2g(1 − g)·ρ·r_u·r_c. At step k of
T, E += (λ·((T − k)/T)^α + β)·r; reuse while E < threshold.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..context import Needs, PassState, Past, Step, Verdict
from ..errors import ConfigError
from ..registry import policies
from ..signals import relative_l1
from .accumulate import Accumulate


@policies.register("ra_cfg")
@dataclass(frozen=True)
class RaCfg(Accumulate):
    """Reuse while the weighted risks to the guided output add up to less than `threshold`.

    guidance: g of (1 − g)·u + g·c, one more than the scale of pipelines that give c + scale·(c − u) (Z-Image, Krea 2,
    Cosmos); None for what the pipeline's call says, as g (`Step.guidance`). correlation: ρ; with 0, nothing is taken to
    cancel. weight, power, floor: λ, α, β. Their defaults are ours, and so is what r_u and r_c are: the relative changes
    of the first block's residual since the step before. Branches that are calls of their own are decided on one after
    the other, with what the other one measured last; without guidance, r is that of the one branch.
    """

    threshold: float = 0.3
    guidance: float | None = None
    correlation: float = 0.0
    weight: float = 1.0
    power: float = 1.0
    floor: float = 0.5

    scopes = frozenset({"stack", "cut"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not -1 <= self.correlation <= 1:
            raise ConfigError(f"ra_cfg: correlation must be from -1 to 1, not {self.correlation}")
        if self.guidance is not None and not math.isfinite(self.guidance):
            raise ConfigError(f"ra_cfg: guidance must be a number or None, not {self.guidance}")
        for name in ("weight", "power", "floor"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"ra_cfg: {name} must be a number ≥ 0, not {getattr(self, name)}")

    @property
    def needs(self) -> Needs:
        return Needs(signals=("probe_residual",), previous=1, probe=1, guided=True)

    def measure(self, signals: Mapping[str, Tensor], past: Past) -> Tensor:
        return relative_l1(signals["probe_residual"], past.previous["probe_residual"])

    def combine(self, values: Sequence[float], step: Step) -> float:
        if len(values) == 1:
            return values[0]
        g = step.guidance if self.guidance is None else self.guidance
        if g is None or len(values) > 2:
            raise ConfigError(
                f"ra_cfg goes by one guidance scale for two branches, and this pipeline has {len(values)} branches and "
                f"tells {'no scale: give guidance=…' if g is None else 'one scale: use another policy'}"
            )
        u, c = (1 - g) * values[0], g * values[1]
        square = u * u + c * c + 2 * self.correlation * u * c
        return 0.0 if square < 0 else math.sqrt(square)  # below 0 by rounding alone

    def decide(self, step: Step, value: float | None, state: PassState) -> Verdict:
        if step.total is None:
            raise ConfigError("ra_cfg needs the run's number of steps: pass num_steps to diffusion_cache.run")
        share = self.weight * (1 - step.index / step.total) ** self.power + self.floor
        return super().decide(step, None if value is None else share * value, state)
