"""Published systems: where their papers cache, when they compute, with what they forecast. One file each."""

from .bac import BAC
from .base import DENOISER_KINDS, Parts, System
from .deepcache import DeepCache
from .dpcache import DPCache
from .ertacache import ERTACache
from .fora import Fora
from .laptop import Laptop
from .lemica import LeMiCa
from .meancache import MeanCache
from .profiling_dit import ProfilingDiT
from .select import Selection
from .smooth_cache import SmoothCache
from .step_rehash import StepRehash

__all__ = [
    "BAC",
    "DENOISER_KINDS",
    "DPCache",
    "DeepCache",
    "ERTACache",
    "Fora",
    "Laptop",
    "LeMiCa",
    "MeanCache",
    "Parts",
    "ProfilingDiT",
    "Selection",
    "SmoothCache",
    "StepRehash",
    "System",
]
