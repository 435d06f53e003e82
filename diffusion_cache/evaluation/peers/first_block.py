"""diffusers' FirstBlockCache."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from .base import Loop, for_every_denoiser
from .hooks import DiffusersPeer, without_stack


@dataclass(frozen=True)
class FirstBlockSettings:
    """threshold: largest relative change of the first block's residual that is still reused."""

    threshold: float = 0.05


class DiffusersFirstBlock(DiffusersPeer):
    name = "diffusers_first_block"
    batchable = False  # one decision from the mean over the batch
    hook_names = ("fbc_leader_block_hook", "fbc_block_hook")
    Settings = FirstBlockSettings

    def why_not(self, pipe: Any) -> str | None:
        return for_every_denoiser(pipe, without_stack)

    def never(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        return {**settings, "threshold": -1.0}

    def _install(self, denoiser: nn.Module, options: FirstBlockSettings, steps: int, loop: Loop) -> None:
        from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache

        apply_first_block_cache(denoiser, FirstBlockCacheConfig(threshold=options.threshold))
