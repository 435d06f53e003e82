"""Policies: when to compute and when to reuse. One method, one file, one frozen dataclass."""

from .accumulate import Accumulate
from .centered import Centered
from .dicache import DiCache
from .drift import Drift
from .easycache import EasyCache
from .first_block import FirstBlock
from .growing_window import GrowingWindow
from .guards import Guarded, Guards
from .interval import Interval
from .magcache import MagCache
from .mask import Mask
from .pab import PAB
from .planned import Planned
from .ra_cfg import RaCfg
from .racer import Racer
from .seacache import SeaCache
from .sencache import SenCache
from .spaced import Spaced
from .speca import SpeCa
from .teacache import TeaCache

__all__ = [
    "PAB",
    "Accumulate",
    "Centered",
    "DiCache",
    "Drift",
    "EasyCache",
    "FirstBlock",
    "GrowingWindow",
    "Guarded",
    "Guards",
    "Interval",
    "MagCache",
    "Mask",
    "Planned",
    "RaCfg",
    "Racer",
    "SeaCache",
    "SenCache",
    "Spaced",
    "SpeCa",
    "TeaCache",
]
