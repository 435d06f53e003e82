"""A constant scale and bias of every forecast output. (A plan carries its own, fitted step by step.)"""

from dataclasses import dataclass

from ..context import Correction, Corrector, Query
from ..errors import ConfigError
from ..plain import numbers
from ..registry import correctors


@correctors.register("affine")
@dataclass(frozen=True)
class Affine(Corrector):
    """y' = scale·y + bias: one number for all channels of the span's output, or a list with one for each."""

    scale: float | tuple[float, ...] = 1.0
    bias: float | tuple[float, ...] = 0.0

    def __post_init__(self) -> None:
        scale, bias = _numbers("scale", self.scale), _numbers("bias", self.bias)
        if len(scale) != len(bias) and 1 not in (len(scale), len(bias)):
            raise ConfigError(f"affine: scale is of {len(scale)} channels, and bias of {len(bias)}")

    @property
    def corrected_channels(self) -> int:
        scale, bias = _numbers("scale", self.scale), _numbers("bias", self.bias)
        return 0 if {*scale} == {1.0} and {*bias} == {0.0} else max(len(scale), len(bias))

    def correction(self, query: Query) -> Correction | None:
        count = self.corrected_channels
        scale, bias = _numbers("scale", self.scale), _numbers("bias", self.bias)
        return Correction(scale * (count // len(scale)), bias * (count // len(bias))) if count else None


def _numbers(name: str, given: float | tuple[float, ...]) -> tuple[float, ...]:
    return numbers(f"affine: {name} must be a finite number, or a list of one for each channel", given)
