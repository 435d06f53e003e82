"""Decide by what can be seen to change of a noisy input: SeaCache (arXiv 2602.18993).

Inputs are filtered for their noise level, so that what noise hides counts for nothing (`signals.filtered_l1`);
A += L1r(filtered x_s, filtered x_{s−1}) at every step, and reuse while A < threshold.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ..context import Needs, Past
from ..registry import policies
from ..signals import filtered_l1
from .accumulate import Accumulate


@policies.register("seacache")
@dataclass(frozen=True)
class SeaCache(Accumulate):
    """Reuse while the summed changes of the filtered input stay below `threshold`.

    The paper takes 0.3 to 0.6 for FLUX and 0.2 to 0.35 for Wan. Needs the sampler's noise levels, and at scope stack
    (where the input is that of the first block) to be told where tokens lie in the image.
    """

    threshold: float = 0.3

    scopes = frozenset({"denoiser", "stack"})

    @property
    def needs(self) -> Needs:
        return Needs(signals=("input_map", "noise_level"), previous=1)

    def measure(self, signals: Mapping[str, Tensor], past: Past) -> Tensor:
        maps = signals["input_map"], past.previous["input_map"]
        return filtered_l1(*maps, signals["noise_level"], past.previous["noise_level"])
