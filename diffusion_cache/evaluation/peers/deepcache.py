"""DeepCache."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ...errors import ConfigError
from .base import Loop, Peer, at_least, for_every_denoiser, leaving_nothing


@dataclass(frozen=True)
class DeepCacheSettings:
    """interval: one computed step in so many. branch: where the UNet is cut, 0 the outermost; 3 to a level."""

    interval: int = 3
    branch: int = 0

    def __post_init__(self) -> None:
        at_least(1, interval=self.interval)
        at_least(0, branch=self.branch)


class DeepCache(Peer):
    name = "deepcache"
    package, module = "DeepCache", "DeepCache"
    batchable = True
    Settings = DeepCacheSettings

    def why_not(self, pipe: Any) -> str | None:
        unet = getattr(pipe, "unet", None)
        if not all(isinstance(getattr(unet, name, None), nn.Module) for name in ("down_blocks", "mid_block")):
            return "it serves UNets only"
        return for_every_denoiser(
            pipe, lambda denoiser: None if denoiser is unet else "it knows of one UNet in a pipeline"
        )

    def never(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        return {**settings, "interval": 1}

    @contextlib.contextmanager
    def _applied(self, pipe: Any, options: DeepCacheSettings, steps: int) -> Iterator[None]:
        from DeepCache import DeepCacheSDHelper

        levels = len(pipe.unet.down_blocks)
        if options.branch >= 3 * levels:
            raise ConfigError(
                f"rival {self.name!r}: a UNet of {levels} levels has the branches 0 to {3 * levels - 1}, "
                f"not {options.branch}"
            )
        helper = DeepCacheSDHelper(pipe=pipe)
        helper.set_params(cache_interval=options.interval, cache_branch_id=options.branch)

        def reset() -> None:
            # Its own reset also forgets what it has to put back. Without one, features outlive the generation, and so
            # does the first step's index, which another strength or start changes.
            helper.cached_output.clear()
            helper.start_timestep = None

        with leaving_nothing(pipe, [pipe.unet]):
            helper.enable()
            try:
                with Loop(pipe).following(reset):
                    yield
            finally:
                helper.disable()
