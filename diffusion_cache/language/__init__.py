"""Caches for diffusion language models: keys and values that a block's refinements need not compute again.

`enable(pipe, method="prefix")` attaches one to diffusers' LLaDA2Pipeline. One method is one file.
"""

from .base import LanguageCache, View, Watcher
from .dkv import DelayedKV
from .elastic import Elastic
from .planned import SCOPE, Planned
from .prefix import Prefix
from .run import LanguageRun, LanguageSummary, Refinement
from .session import LanguageSession, decoding, enabled, serves
from .sub_block import SubBlock

__all__ = [
    "SCOPE",
    "DelayedKV",
    "Elastic",
    "LanguageCache",
    "LanguageRun",
    "LanguageSession",
    "LanguageSummary",
    "Planned",
    "Prefix",
    "Refinement",
    "SubBlock",
    "View",
    "Watcher",
    "decoding",
    "enabled",
    "serves",
]
