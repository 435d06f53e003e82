"""Policies: when to compute and when to reuse. One method, one file, one frozen dataclass."""

from .centered import Centered
from .drift import Drift
from .first_block import FirstBlock
from .guards import Guarded, Guards
from .interval import Interval
from .mask import Mask
from .planned import Planned

__all__ = ["Centered", "Drift", "FirstBlock", "Guarded", "Guards", "Interval", "Mask", "Planned"]
