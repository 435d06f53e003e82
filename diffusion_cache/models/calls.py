"""What the arguments of a denoiser call tell: what it is conditioned on, and if it is made for more than its output."""

import inspect
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ..context import Condition

UNCONDITIONAL = re.compile(r"uncond|neg", re.IGNORECASE)  # in the names that pipelines give to passes
_CACHE_ARGUMENTS = ("kv_cache_mode", "kv_cache_flag", "kv_caches")
TEXT, LABELS, POOLED = ("encoder_hidden_states", "prompt_embeds"), ("class_labels",), ("pooled_projections",)


def fills_cache(kwargs: Mapping[str, Any]) -> bool:
    """Whether a call writes keys and values for later calls to read: no block of it may be skipped.

    By the arguments in use: kv_cache_mode (Flux2, QwenImage21, WanAnimate2, SanaWM's refiner), kv_cache_flag
    (AnyFlow), kv_caches (GlmImage).
    """
    if kwargs.keys().isdisjoint(_CACHE_ARGUMENTS):
        return False
    mode, flag, caches = (kwargs.get(name) for name in _CACHE_ARGUMENTS)
    if isinstance(mode, str) and ("extract" in mode or "capture" in mode):
        return True
    if isinstance(flag, Mapping) and flag.get("is_cache_step"):
        return True
    return caches is not None and getattr(caches[0], "mode", None) == "write"


def guidance_of(call: Callable, args: tuple, kwargs: Mapping[str, Any]) -> tuple[float, ...]:
    """The guidance scales that a pipeline is called with, or has by default; that of classifier-free guidance first.

    By the arguments in use: true_cfg_scale, of pipelines whose guidance_scale is an input of the denoiser (the FLUX
    family, QwenImage), then guidance_scale. Empty if neither is known.
    """
    try:
        bound = inspect.signature(call).bind_partial(*args, **kwargs)
    except (TypeError, ValueError):
        return ()  # the call itself will tell what is wrong with its arguments
    bound.apply_defaults()
    given = (bound.arguments.get(name) for name in ("true_cfg_scale", "guidance_scale"))
    return tuple(float(scale) for scale in given if isinstance(scale, (int, float)))


def unconditional_last(kwargs: Mapping[str, Any]) -> bool:
    """Which of two guidance branches stacked in a call is the unconditional one.

    diffusers' pipelines put it first, all but the one that has class labels and no text (DiT).
    """
    given = {name for name in (*TEXT, *LABELS) if kwargs.get(name) is not None}
    return bool(given) and given <= {*LABELS}


def is_unconditional(pass_name: str) -> bool:
    """Whether a call of its own is of the unconditional branch: by its name, or as the second where it has none."""
    return pass_name == "1" or bool(UNCONDITIONAL.search(pass_name))


def grid_of_call(kwargs: Mapping[str, Any], tokens: int) -> tuple[int, int, int] | None:
    """(frames, height, width) of a packed sample's tokens, if an argument tells that is of so many; else None.

    By the arguments in use: img_ids (the FLUX family: a row of coordinates for each token, read back), img_shapes
    (QwenImage), num_frames with height and width (LTX).
    """
    ids, shapes = kwargs.get("img_ids"), kwargs.get("img_shapes")
    grid: tuple[int, ...] = ()
    if isinstance(ids, Tensor) and ids.ndim in (2, 3):
        one = ids if ids.ndim == 2 else ids[0]
        grid = tuple(len(column.unique()) for column in one.T[:3])
    elif isinstance(shapes, (list, tuple)) and shapes:
        first = shapes[0][0] if isinstance(shapes[0], list) else shapes[0]
        grid = tuple(first)
    elif all(isinstance(kwargs.get(name), int) for name in ("num_frames", "height", "width")):
        grid = kwargs["num_frames"], kwargs["height"], kwargs["width"]
    return (grid[0], grid[1], grid[2]) if len(grid) == 3 and math.prod(grid) == tokens else None


def condition_of(kwargs: Mapping[str, Any]) -> Condition | None:
    """The prompt or class of each batch row: embeddings (float32, mean over tokens, padding and all) or class labels.

    None where none of the arguments in use is there as one tensor.
    """
    for name in (*TEXT, *LABELS, *POOLED):
        value = kwargs.get(name)
        if not isinstance(value, Tensor) or not value.ndim:
            continue
        if value.is_floating_point() and value.ndim > 1:
            return Condition(name, value.detach().flatten(1, -2).float().mean(1) if value.ndim > 2 else value.float())
        if name in LABELS and value.ndim == 1:
            return Condition(name, value.detach())
    return None
