"""Forecasters: with what a reused step goes on. One method, one file, one frozen dataclass."""

from .reuse import Reuse
from .taylor import Taylor
from .taylor_paper import TaylorPaper

__all__ = ["Reuse", "Taylor", "TaylorPaper"]
