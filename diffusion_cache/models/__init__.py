"""How pipelines expose denoisers, and denoisers their spans."""

from .calls import (
    GUIDER_INPUTS,
    condition_of,
    fills_cache,
    grid_of_call,
    guidance_of,
    guidance_weights,
    guider_scales,
    guiders,
    is_unconditional,
    unconditional_last,
)
from .denoisers import DENOISERS, LOOKING_INSIDE, find_denoisers, unwrap
from .spans import Called, Layout, Span, arrange, attentions, default_scope, find_layout, is_unet, joined, merged

__all__ = [
    "DENOISERS",
    "GUIDER_INPUTS",
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
    "guidance_of",
    "guidance_weights",
    "guider_scales",
    "guiders",
    "is_unconditional",
    "is_unet",
    "joined",
    "merged",
    "unconditional_last",
    "unwrap",
]
