"""A constant scale and bias of every forecast output. (A plan carries its own, fitted step by step.)"""

from dataclasses import dataclass
from functools import cached_property
from typing import cast

from ..context import Correction, Corrector, Query
from ..errors import ConfigError
from ..plain import numbers
from ..registry import correctors

Channels = tuple[float, ...]


@correctors.register("affine")
@dataclass(frozen=True)
class Affine(Corrector):
    """y' = scale·y + bias: one number for all channels of the span's output, or a list with one for each."""

    scale: float | Channels = 1.0
    bias: float | Channels = 0.0

    def __post_init__(self) -> None:
        for name in ("scale", "bias"):
            wanted = f"affine: {name} must be a finite number, or a list of one for each channel"
            object.__setattr__(self, name, numbers(wanted, getattr(self, name)))
        scale, bias = cast(Channels, self.scale), cast(Channels, self.bias)
        if len(scale) != len(bias) and 1 not in (len(scale), len(bias)):
            raise ConfigError(f"affine: scale is of {len(scale)} channels, and bias of {len(bias)}")

    @cached_property
    def _correction(self) -> Correction | None:  # made once, for it is asked for at every reused span
        scale, bias = cast(Channels, self.scale), cast(Channels, self.bias)
        if {*scale} == {1.0} and {*bias} == {0.0}:
            return None
        count = max(len(scale), len(bias))
        return Correction(scale * (count // len(scale)), bias * (count // len(bias)))

    @property
    def corrected_channels(self) -> int:
        return len(self._correction.bias) if self._correction else 0

    def correction(self, query: Query) -> Correction | None:
        return self._correction
