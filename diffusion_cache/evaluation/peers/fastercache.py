"""diffusers' FasterCache."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ...registry import unknown_name
from .base import Loop, at_least, for_every_denoiser
from .hooks import DiffusersPeer, attention_names


@dataclass(frozen=True)
class FasterSettings:
    """spatial, temporal: of attention of that kind one computed step in so many, at timesteps between low and high.

    weight: of the last difference in the extrapolation. per_pass: as for PAB. distilled: leave the guidance passes
    alone; False also skips the unconditional one, which needs a pipeline that stacks [unconditional, conditional] in
    one call: of those it computes one in `unconditional` at timesteps between low and unconditional_high, for latents
    laid out as layout says.
    """

    spatial: int = 2
    temporal: int | None = None
    low: int = -1
    high: int = 681
    weight: float = 0.5
    per_pass: bool = True
    distilled: bool = True
    unconditional: int = 5
    unconditional_high: int = 641
    layout: str = "BCFHW"

    def __post_init__(self) -> None:
        at_least(1, spatial=self.spatial, temporal=self.temporal, unconditional=self.unconditional)
        if self.layout not in ("BCFHW", "BFCHW", "BCHW"):
            raise unknown_name("layout", self.layout, ("BCFHW", "BFCHW", "BCHW"))


class DiffusersFasterCache(DiffusersPeer):
    name = "diffusers_fastercache"
    batchable = True
    hook_names = ("faster_cache_denoiser", "faster_cache_block")
    Settings = FasterSettings

    def why_not(self, pipe: Any) -> str | None:
        from diffusers.hooks.faster_cache import _TRANSFORMER_BLOCK_IDENTIFIERS as KNOWN

        def reason(denoiser: nn.Module) -> str | None:
            names = attention_names(denoiser)
            if any(re.search(pattern, name) for pattern in KNOWN for name in names):
                return None
            return f"it looks for attention in lists of transformer blocks, and {type(denoiser).__name__} has none"

        return for_every_denoiser(pipe, reason)

    def never(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        low = self.options(settings).low
        return {**settings, "high": low, "unconditional_high": low}

    def _install(self, denoiser: nn.Module, options: FasterSettings, steps: int, loop: Loop) -> None:
        from diffusers.hooks import FasterCacheConfig, apply_faster_cache

        def timestep() -> Any:
            # at a run's first step it would reuse what is not there yet, and fail
            return math.inf if loop.step == 0 else loop.timestep

        between = (options.low, options.high)
        config = FasterCacheConfig(
            spatial_attention_block_skip_range=options.spatial,
            temporal_attention_block_skip_range=options.temporal,
            spatial_attention_timestep_skip_range=between,
            temporal_attention_timestep_skip_range=between,
            unconditional_batch_skip_range=options.unconditional,
            unconditional_batch_timestep_skip_range=(options.low, options.unconditional_high),
            attention_weight_callback=lambda _: options.weight,
            tensor_format=options.layout,
            is_guidance_distilled=options.distilled,
            current_timestep_callback=timestep,
        )
        apply_faster_cache(denoiser, config)

    def _caching(self, hooks: list[Any]) -> list[Any]:
        return [hook for hook in hooks if hasattr(hook, "block_skip_range")]
