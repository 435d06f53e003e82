"""Decide by how much the output can have changed, to first order: SenCache (formula in its abstract form).

With z the denoiser's input, t its noise as a share σ / (α + σ), c the last computed step, and ‖J_z‖, |J_t| by how
much the output changes with either, reuse while ‖J_z‖·‖z_s − z_c‖ + |J_t|·|t_s − t_c| < threshold.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ..context import Needs, PassState, Past, Policy, Step, Verdict, noise_share
from ..errors import ConfigError
from ..plain import numbers
from ..registry import policies
from .thresholds import check_threshold


@policies.register("sencache")
@dataclass(frozen=True)
class SenCache(Policy):
    """Reuse while the output's foretold change, a root mean square over its elements, stays below `threshold`.

    input_norm, time_norm: ‖J_z‖ and |J_t|, one number or one for each of `levels` (log-SNR), of which a step
    takes the nearest. `profiling.jacobian.norms` measures them; without, threshold means nothing but can be searched.
    """

    threshold: float = 0.1
    input_norm: float | Sequence[float] = 1.0
    time_norm: float | Sequence[float] = 1.0
    levels: Sequence[float] = ()

    scopes = frozenset({"denoiser"})
    tuned = "threshold"

    def __post_init__(self) -> None:
        check_threshold(self.name, self.threshold)
        levels = numbers("sencache: levels must be numbers (log-SNR)", self.levels, lambda x: not math.isnan(x), 0)
        object.__setattr__(self, "levels", levels)
        for name in ("input_norm", "time_norm"):
            wanted = f"sencache: {name} must be a number ≥ 0, or one a noise level"
            norms = numbers(wanted, getattr(self, name), lambda norm: 0 <= norm < math.inf)
            if len(norms) not in (1, len(levels)):
                raise ConfigError(f"sencache: {len(norms)} of {name} for {len(levels)} levels")
            object.__setattr__(self, name, norms)

    @property
    def needs(self) -> Needs:
        return Needs(signals=("input", "noise_level"))

    def measure(self, signals: Mapping[str, Tensor], past: Past) -> Tensor:
        moved = (signals["input"].float() - past.computed["input"].float()).flatten(1)
        time = _share(signals["noise_level"])
        passed = (time - _share(past.computed["noise_level"])).abs()
        known, input_norms, time_norms = _table(self, time.device)
        nearest = (known - time[:, None]).abs().argmin(1)  # [rows]
        by_input, by_time = input_norms[nearest], time_norms[nearest]
        return by_input * moved.square().mean(1).sqrt() + by_time * passed

    def decide(self, step: Step, value: float | None, state: PassState) -> Verdict:
        if value is None:
            return Verdict(True, "nothing to compare with")
        return Verdict(not value < self.threshold, f"change {value:.3g}")


@lru_cache(maxsize=4)
def _table(policy: SenCache, device: torch.device) -> Tensor:
    """[3, levels]: noise shares and both norms there, put on the device once, for a copy at each step would stall."""
    shares = [noise_share(level) for level in policy.levels or (0.0,)]
    columns = [torch.tensor(column) for column in (shares, policy.input_norm, policy.time_norm)]
    return torch.stack([column.expand(len(shares)) for column in columns]).to(device)


def _share(levels: Tensor) -> Tensor:
    """`noise_share` of each."""
    return torch.sigmoid(-levels / 2)
