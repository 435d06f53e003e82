"""How pipelines expose denoisers, and denoisers their spans."""

from .calls import condition_of, fills_cache, grid_of_call
from .denoisers import DENOISERS, LOOKING_INSIDE, find_denoisers, unwrap
from .spans import Called, Layout, Span, arrange, attentions, default_scope, find_layout, is_unet, merged

__all__ = [
    "DENOISERS",
    "LOOKING_INSIDE",
    "Called",
    "Layout",
    "Span",
    "arrange",
    "attentions",
    "condition_of",
    "default_scope",
    "fills_cache",
    "find_denoisers",
    "find_layout",
    "grid_of_call",
    "is_unet",
    "merged",
    "unwrap",
]
