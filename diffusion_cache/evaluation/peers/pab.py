"""diffusers' Pyramid Attention Broadcast."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ...errors import ConfigError
from .base import Loop, at_least, for_every_denoiser
from .hooks import DiffusersPeer, attention_names


@dataclass(frozen=True)
class PABSettings:
    """spatial, temporal, cross: of attention of that kind one computed step in so many; None leaves it alone.

    Only at timesteps between low and high. per_pass: a state for each guidance pass; without it, where the pipeline
    calls the denoiser once for each pass, a pass reuses what the other has computed.
    """

    spatial: int | None = 2
    temporal: int | None = None
    cross: int | None = None
    low: int = 100
    high: int = 800
    per_pass: bool = True

    def __post_init__(self) -> None:
        at_least(1, spatial=self.spatial, temporal=self.temporal, cross=self.cross)
        if self.spatial is self.temporal is self.cross is None:
            raise ConfigError("set spatial, temporal or cross to the steps of which one is computed")


class DiffusersPAB(DiffusersPeer):
    name = "diffusers_pab"
    batchable = True
    hook_names = ("pyramid_attention_broadcast",)
    Settings = PABSettings

    def why_not(self, pipe: Any) -> str | None:
        from diffusers.hooks._common import _SPATIAL_TRANSFORMER_BLOCK_IDENTIFIERS as SPATIAL

        def reason(denoiser: nn.Module) -> str | None:
            names = attention_names(denoiser)
            if any(re.search(pattern, name) for pattern in SPATIAL for name in names):
                return None
            return f"{type(denoiser).__name__} has no attention of a class it knows"

        return for_every_denoiser(pipe, reason)

    def never(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        options = self.options(settings)
        ranges = {name: getattr(options, name) for name in ("spatial", "temporal", "cross")}
        return {**settings, **{name: None if value is None else 1 for name, value in ranges.items()}}

    def _install(self, denoiser: nn.Module, options: PABSettings, steps: int, loop: Loop) -> None:
        from diffusers.hooks import PyramidAttentionBroadcastConfig, apply_pyramid_attention_broadcast

        between = (options.low, options.high)
        config = PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=options.spatial,
            temporal_attention_block_skip_range=options.temporal,
            cross_attention_block_skip_range=options.cross,
            spatial_attention_timestep_skip_range=between,
            temporal_attention_timestep_skip_range=between,
            cross_attention_timestep_skip_range=between,
            current_timestep_callback=lambda: loop.timestep,
        )
        apply_pyramid_attention_broadcast(denoiser, config)
