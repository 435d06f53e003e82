"""diffusers' TaylorSeer cache."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...errors import ConfigError
from ...registry import unknown_name
from .base import Loop, at_least, for_every_denoiser
from .hooks import DiffusersPeer

_SINGLE_STREAM = r"single_transformer_blocks\.\d+\."
# name: (modules whose output is forecast, modules whose output becomes zeros because nothing reads it then)
MODULES: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),  # diffusers' own choice: attention, on some models nothing
    "attention": ((r".*\.attn\d*",), ()),
    # in Flux's single stream blocks proj_out sums up attention and feed-forward
    "branches": (
        (r".*\.attn\d*", r".*\.(ff|ffn|ff_context)", _SINGLE_STREAM + "proj_out", r".*resnets\.\d+"),
        (_SINGLE_STREAM + "(attn|proj_mlp)",),
    ),
    # what diffusers calls "lite", with the names that DiT and UNets need. Patterns start at the root, as a hook inside
    # a module that is skipped would lose count of the steps.
    "denoiser": (
        ("proj_out", "proj_out_2", "conv_out"),
        (
            r"(transformer_blocks|single_transformer_blocks|blocks|layers)\.\d+",
            r"(down_blocks|mid_block|up_blocks)\..*(\.attn\d+|\.ff|(resnets|downsamplers|upsamplers)\.\d+)",
        ),
    ),
}


@dataclass(frozen=True)
class TaylorSeerSettings:
    """interval: one computed step in so many, after `warmup` computed ones; from step `after` on all are computed.

    order: of the Taylor series, kept in `dtype`. modules: what is forecast, a name of `MODULES`; or give regular
    expressions that full module names must match, in `cache` (forecast) and `skip` (zeros).
    """

    interval: int = 4
    warmup: int = 3
    after: int | None = None
    order: int = 1
    dtype: str = "float32"
    modules: str = "branches"
    cache: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        at_least(1, interval=self.interval)
        at_least(0, warmup=self.warmup, after=self.after, order=self.order)
        if self.modules not in MODULES:
            raise unknown_name("modules", self.modules, MODULES)
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise unknown_name("dtype", self.dtype, ("float32", "bfloat16", "float16"))
        for pattern in (*self.cache, *self.skip):
            try:
                re.compile(pattern)
            except (re.error, TypeError) as error:
                raise ConfigError(f"{pattern!r} is no regular expression: {error}") from None

    @property
    def patterns(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return (self.cache, self.skip) if self.cache or self.skip else MODULES[self.modules]


class DiffusersTaylorSeer(DiffusersPeer):
    name = "diffusers_taylorseer"
    batchable = True
    hook_names = ("taylorseer_cache",)
    Settings = TaylorSeerSettings

    def why_not(self, pipe: Any) -> str | None:
        def reason(denoiser: nn.Module) -> str | None:
            names = [name for name, _ in denoiser.named_modules()]
            if any(re.fullmatch(pattern, name) for pattern in MODULES["branches"][0] for name in names):
                return None
            return f"no module of {type(denoiser).__name__} has the name of an attention or feed-forward branch"

        return for_every_denoiser(pipe, reason)

    def never(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        return {**settings, "interval": 1}

    def _install(self, denoiser: nn.Module, options: TaylorSeerSettings, steps: int, loop: Loop) -> None:
        from diffusers.hooks import TaylorSeerCacheConfig, apply_taylorseer_cache

        cache, skip = options.patterns
        config = TaylorSeerCacheConfig(
            cache_interval=options.interval,
            disable_cache_before_step=options.warmup,
            disable_cache_after_step=options.after,
            max_order=options.order,
            taylor_factors_dtype=getattr(torch, options.dtype),
            cache_identifiers=list(cache) or None,
            skip_predict_identifiers=list(skip) or None,
        )
        apply_taylorseer_cache(denoiser, config)

    def _caching(self, hooks: list[Any]) -> list[Any]:
        return [hook for hook in hooks if not hook.state_manager._init_kwargs["is_inactive"]]
