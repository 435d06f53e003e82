"""Calls of a denoiser that are made for more than their output."""

from collections.abc import Mapping
from typing import Any


def fills_cache(kwargs: Mapping[str, Any]) -> bool:
    """Whether a call writes keys and values for later calls to read: no block of it may be skipped.

    By the arguments in use: kv_cache_mode (Flux2, QwenImage21, WanAnimate2, SanaWM's refiner), kv_cache_flag
    (AnyFlow), kv_caches (GlmImage).
    """
    mode, flag, caches = (kwargs.get(name) for name in ("kv_cache_mode", "kv_cache_flag", "kv_caches"))
    if isinstance(mode, str) and ("extract" in mode or "capture" in mode):
        return True
    if isinstance(flag, Mapping) and flag.get("is_cache_step"):
        return True
    return caches is not None and getattr(caches[0], "mode", None) == "write"
