"""Forecasters: with what a reused step goes on. One method, one file, one frozen dataclass."""

from .average_velocity import AverageVelocity
from .chebyshev import Chebyshev
from .frequency import Frequency
from .hermite import Hermite
from .reuse import Reuse
from .rfc import RFC
from .sampler import Sampler
from .taylor import Taylor
from .taylor_paper import TaylorPaper

__all__ = [
    "RFC",
    "AverageVelocity",
    "Chebyshev",
    "Frequency",
    "Hermite",
    "Reuse",
    "Sampler",
    "Taylor",
    "TaylorPaper",
]
