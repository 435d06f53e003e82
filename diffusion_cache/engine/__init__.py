"""The engine: tracks where a generation stands, and computes or reuses spans accordingly."""

from .attached import session_of
from .cache_run import CacheRun, StepRecord
from .observer import Observer
from .session import Method, Session

__all__ = ["CacheRun", "Method", "Observer", "Session", "StepRecord", "session_of"]
