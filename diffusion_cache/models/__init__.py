"""How pipelines expose denoisers, and denoisers their spans."""

from .denoisers import find_denoisers, unwrap
from .spans import Layout, Span, default_scope, find_layout

__all__ = ["Layout", "Span", "default_scope", "find_denoisers", "find_layout", "unwrap"]
