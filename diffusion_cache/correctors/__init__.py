"""Correctors: how a forecast is mended. One method, one file, one frozen dataclass."""

from .affine import Affine
from .alignment import Alignment
from .magnitude import Magnitude
from .shrink import Shrink

__all__ = ["Affine", "Alignment", "Magnitude", "Shrink"]
