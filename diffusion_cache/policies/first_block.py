"""Decide by how much the first blocks' residual has changed: FBCache, and DBCache with more probe and tail blocks.

DBCache's limits on reuse are the guards warmup, max_reused and max_consecutive; its cap on the sum of the changes that
are reused is left out.

Source: the caches of the para-attn and cache-dit projects. With r = probe(x) − x, reuse while L1r(r_s, r_c) ≤
threshold, where c is the last computed step; the rest of the stacks is then forecast from the probe's output.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ..context import Needs, PassState, Past, Policy, Step, Verdict
from ..errors import ConfigError
from ..registry import policies
from ..signals import relative_l1
from .thresholds import check_threshold


@policies.register("first_block")
@dataclass(frozen=True)
class FirstBlock(Policy):
    """Compute the first `front` and last `back` blocks always, the others when the front's residual has changed.

    threshold: largest relative L1 change of the front blocks' residual since the last computed step that is still
    reused. On UNet cuts the probe is the down blocks above the cut (`depth`), and its output is compared as it is.
    Batch rows are judged apart; a sample is computed if any of its guidance branches in the call asks for it.
    """

    threshold: float = 0.08
    front: int = 1
    back: int = 0

    scopes = frozenset({"stack", "cut"})
    tuned = "threshold"

    def __post_init__(self) -> None:
        check_threshold(self.name, self.threshold)
        if self.front < 1 or self.back < 0:
            raise ConfigError(f"first_block: needs front ≥ 1 and back ≥ 0, not front={self.front}, back={self.back}")

    @property
    def needs(self) -> Needs:
        return Needs(signals=("probe_residual",), probe=self.front, tail=self.back)

    def measure(self, signals: Mapping[str, Tensor], past: Past) -> Tensor:
        return relative_l1(signals["probe_residual"], past.computed["probe_residual"])

    def decide(self, step: Step, value: float | None, state: PassState) -> Verdict:
        if value is None:
            return Verdict(True, "nothing to compare with")
        # written so that NaN computes
        return Verdict(not value <= self.threshold, f"change {value:.3g}")
