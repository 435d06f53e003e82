"""diffusers' SeaCache."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ...errors import ConfigError
from .base import Loop, at_least, for_every_denoiser
from .hooks import DiffusersPeer, without_stack


@dataclass(frozen=True)
class SeaSettings:
    """threshold: largest accumulated change of the filtered latents that is still reused.

    order: 0 reuses the residual, 1 extrapolates it. first, last: steps computed at either end. max_consecutive:
    reused steps in a row, 0 for any number. power: of the spectrum that is assumed of clean latents.
    """

    threshold: float = 0.25
    order: int = 1
    first: int = 1
    last: int = 1
    max_consecutive: int = 2
    power: float = 3.0

    def __post_init__(self) -> None:
        at_least(0, threshold=self.threshold, first=self.first, last=self.last, max_consecutive=self.max_consecutive)
        if self.order not in (0, 1):
            raise ConfigError(f"order must be 0 or 1, not {self.order}")


class DiffusersSea(DiffusersPeer):
    name = "diffusers_sea"
    batchable = False  # one decision from the mean over the batch
    hook_names = ("sea_cache_post_norm", "sea_cache_block", "sea_cache_leader_block", "sea_cache_root")
    Settings = SeaSettings

    def why_not(self, pipe: Any) -> str | None:
        # Elsewhere it computes every step with a warning: nobody tells it the latents, nor the step and its sigma.
        from diffusers import WanPipeline

        if isinstance(pipe, WanPipeline):
            return for_every_denoiser(pipe, without_stack)
        return "it knows where the latents and their noise level are in text-to-video Wan only"

    def never(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        return {**settings, "threshold": 0.0}

    def _install(self, denoiser: nn.Module, options: SeaSettings, steps: int, loop: Loop) -> None:
        from diffusers.hooks import SeaCacheConfig, apply_sea_cache

        config = SeaCacheConfig(
            threshold=options.threshold,
            residual_order=options.order,
            retention_steps=options.first,
            cache_end_steps=options.last,
            max_consecutive_cached=options.max_consecutive,
            power_exp=options.power,
        )
        apply_sea_cache(denoiser, config)
