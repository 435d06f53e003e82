"""Decide by what the denoiser takes and gives, a black box: EasyCache (arXiv 2507.02860).

With x its input, y its output and c, c′ the last two computed steps, κ = mean|y_c − y_c′| / mean|x_c − x_c′| says by
how much the output moves with the input. E += κ·mean|x_s − x_{s−1}| / mean|y_c|; reuse while E < threshold.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..context import Needs, Past
from ..registry import policies
from ..signals import mean_abs
from .accumulate import Accumulate


@policies.register("easycache")
@dataclass(frozen=True)
class EasyCache(Accumulate):
    """Reuse the denoiser's output while the summed changes that its input foretells stay below `threshold`.

    The authors add the last y − x to the input, which is forecaster="reuse" with feature="residual".
    """

    threshold: float = 0.05

    scopes = frozenset({"denoiser"})

    @property
    def needs(self) -> Needs:
        return Needs(signals=("input", "output"), previous=1)

    def measure(self, signals: Mapping[str, Tensor], past: Past) -> Tensor | None:
        if "kappa" not in past.memory:
            return None
        moved = mean_abs(signals["input"] - past.previous["input"])
        return past.memory["kappa"] * moved / mean_abs(past.computed["output"])

    def remember(self, signals: Mapping[str, Tensor], past: Past) -> dict[str, Tensor]:
        if "output" not in past.computed:
            return {}
        given = mean_abs(signals["output"] - past.computed["output"])
        taken = mean_abs(signals["input"] - past.computed["input"])
        return {"kappa": torch.where(given == 0, torch.zeros_like(given), given / taken)}
