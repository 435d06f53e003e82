"""What the arguments of a denoiser call tell: what it is conditioned on, and if it is made for more than its output."""

import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..context import Condition
from .denoisers import unwrap

UNCONDITIONAL = re.compile(r"uncond|neg", re.IGNORECASE)  # in the names that pipelines give to passes
CONDITIONAL = re.compile(r"cond|pos", re.IGNORECASE)
# whose pipelines stack the prompt before the negative one
PROMPT_FIRST = (
    "AceStepTransformer1DModel",
    "LuminaNextDiT2DModel",
    "OmniGenTransformer2DModel",
    "StableCascadeUNet",
    "WuerstchenPrior",
    "ZImageTransformer2DModel",
)
# pipelines whose guided output is c + scale·(c − u)
BESIDE_THE_PROMPT = re.compile(r"^(ZImage|Krea2|Kandinsky3|Cosmos(2|TextToWorld|VideoToWorld))")
GUIDER_INPUTS = ("prepare_inputs", "prepare_inputs_from_block_state")
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


def guiders(pipe: Any) -> list[Any]:
    """A modular pipeline's guiders, which name the batches of each step and combine what the denoiser gives of them."""
    needed = ("prepare_models", *GUIDER_INPUTS)
    return [component for component in pipe.components.values() if all(hasattr(component, name) for name in needed)]


def guider_scales(pipe: Any) -> tuple[float, ...]:
    """The scales of a modular pipeline's guiders that have one; its calls tell of none."""
    return tuple(scale for _, scale in _scaled(pipe))


def _scaled(pipe: Any) -> list[tuple[Any, float]]:
    """Guiders that have a scale, each with it."""
    scales = [(guider, getattr(guider, "guidance_scale", None)) for guider in guiders(pipe)]
    return [(guider, float(scale)) for guider, scale in scales if isinstance(scale, (int, float))]


def guidance_of(call: Callable, args: tuple, kwargs: Mapping[str, Any]) -> tuple[float, ...]:
    """The guidance scales that a pipeline is called with, or has by default; that of classifier-free guidance first.

    By the arguments in use: true_cfg_scale, of pipelines whose guidance_scale is an input of the denoiser (the FLUX
    family, QwenImage), then guidance_scale. Empty if neither is known.
    """
    return _scales(call, args, kwargs, ("true_cfg_scale", "guidance_scale"))


def _scales(call: Callable, args: tuple, kwargs: Mapping[str, Any], names: Sequence[str]) -> tuple[float, ...]:
    """Those of a call's arguments of these names that are numbers."""
    try:
        bound = inspect.signature(call).bind_partial(*args, **kwargs)
    except (TypeError, ValueError):
        return ()  # the call itself will tell what is wrong with its arguments
    bound.apply_defaults()
    given = (bound.arguments.get(name) for name in names)
    return tuple(float(scale) for scale in given if isinstance(scale, (int, float)))


def guidance_weights(pipe: Any, args: tuple, kwargs: Mapping[str, Any], denoisers: Iterable[str]) -> dict[str, float]:
    """g of the guided output (1 − g)·u + g·c by each denoiser, as far as a pipeline's call tells.

    By the scale of classifier-free guidance (`guidance_of`, or a guider's), and for a second denoiser by
    guidance_scale_2 (Wan2.2).
    """
    call = type(pipe).__call__
    more = 1.0 if any(BESIDE_THE_PROMPT.search(cls.__name__) for cls in type(pipe).__mro__) else 0.0
    scales = guidance_of(call, (pipe, *args), kwargs)
    if not scales:  # a guider may give c + scale·(c − u) too
        scales = tuple(scale + bool(getattr(one, "use_original_formulation", False)) for one, scale in _scaled(pipe))
    seconds = _scales(call, (pipe, *args), kwargs, ("guidance_scale_2",))
    by_denoiser = {name: seconds if name.endswith("_2") and seconds else scales for name in denoisers}
    return {name: found[0] + more for name, found in by_denoiser.items() if found}


def unconditional_last(denoiser: nn.Module | None, kwargs: Mapping[str, Any]) -> bool:
    """Which of two guidance branches stacked in a call is the unconditional one.

    diffusers' pipelines put it first, all but some that are known by their denoiser, and the one that has class labels
    and no text (DiT).
    """
    if denoiser is not None and type(unwrap(denoiser)).__name__ in PROMPT_FIRST:
        return True
    given = {name for name in (*TEXT, *LABELS) if kwargs.get(name) is not None}
    return bool(given) and given <= {*LABELS}


def is_unconditional(pass_name: str) -> bool:
    """Whether a call of its own is of the unconditional branch: by its name, or as the second where it has none.

    Not one that is named after both (cond_uncond: CogVideoX, LTX, Mochi), which stacks them.
    """
    rest, parts = UNCONDITIONAL.subn("", pass_name)
    return pass_name == "1" or (parts > 0 and not CONDITIONAL.search(rest))


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
