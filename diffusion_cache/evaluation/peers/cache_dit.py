"""cache-dit: DBCache with its forecasters, and its step masks."""

import contextlib
import logging
import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ...errors import ConfigError
from ...registry import unknown_name
from .base import Peer, at_least, denoisers_of, for_every_denoiser, leaving_nothing


class CacheDiTPeer(Peer):
    """cache-dit, through its own block adapter for the pipeline.

    It replaces `__call__` of the pipeline's class, so only one pipeline of a class can be cached at a time in a
    process; and it resets its state at every call of the pipeline.
    """

    package, module = "cache-dit", "cache_dit"

    @abstractmethod
    def _config(self, options: Any, steps: int) -> tuple[Any, Any]:
        """A new cache configuration and a new calibrator configuration (or None)."""

    def why_not(self, pipe: Any) -> str | None:
        from cache_dit import BlockAdapterRegister

        if not hasattr(pipe, "transformer"):
            return "it serves transformers only"
        if not BlockAdapterRegister.is_supported(pipe):
            return f"it has no block adapter for {type(pipe).__name__}"
        return for_every_denoiser(pipe, lambda denoiser: None)

    @contextlib.contextmanager
    def _applied(self, pipe: Any, options: Any, steps: int) -> Iterator[None]:
        import cache_dit

        with _quiet("cache_dit", "CACHE_DIT"), leaving_nothing(pipe, denoisers_of(pipe)):
            self._check_blocks(pipe, options)
            cache, calibrator = self._config(options, steps)
            try:
                cache_dit.enable_cache(pipe, cache_config=cache, calibrator_config=calibrator)
                if not all(getattr(denoiser, "_is_cached", False) for denoiser in denoisers_of(pipe)):
                    raise ConfigError(f"rival {self.name!r} has cached nothing of {type(pipe).__name__}")
                yield
            finally:
                cache_dit.disable_cache(pipe)

    def _check_blocks(self, pipe: Any, options: Any) -> None:
        """ConfigError where front and back blocks leave nothing to cache: cache-dit would run blocks twice."""
        from cache_dit import BlockAdapter, BlockAdapterRegister

        adapter = BlockAdapterRegister.get_adapter(pipe, skip_post_init=True)
        lists = BlockAdapter.flatten(adapter.blocks if isinstance(adapter.blocks, list) else [adapter.blocks])
        blocks = min(len(blocks) for blocks in lists)
        if options.fn + options.bn >= blocks:
            raise ConfigError(
                f"rival {self.name!r}: fn + bn = {options.fn + options.bn} of {blocks} blocks leave none to reuse"
            )


@contextlib.contextmanager
def _quiet(*prefixes: str) -> Iterator[None]:
    """Only errors from the loggers of these packages (cache-dit reports every call at level info)."""
    loggers = [
        logger
        for name, logger in list(logging.root.manager.loggerDict.items())
        if name.startswith(prefixes) and isinstance(logger, logging.Logger)
    ]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@dataclass(frozen=True)
class CacheDiTSettings:
    """threshold: largest relative change of the first blocks' residual that is still reused; 1 reuses always.

    fn, bn: first and last blocks that are always computed. warmup: steps computed at the start. max_cached: reused
    steps at most, max_continuous: in a row (−1 for any number). separate_cfg: whether the pipeline calls the denoiser
    once for each guidance pass, in turns; None asks cache-dit.
    """

    threshold: float = 0.08
    fn: int = 1
    bn: int = 0
    warmup: int = 4
    max_cached: int = -1
    max_continuous: int = -1
    separate_cfg: bool | None = None

    def __post_init__(self) -> None:
        at_least(1, fn=self.fn)
        at_least(0, bn=self.bn, warmup=self.warmup, threshold=self.threshold)
        at_least(-1, max_cached=self.max_cached, max_continuous=self.max_continuous)


class CacheDiT(CacheDiTPeer):
    name = "cache_dit"
    batchable = False  # one decision from the mean over the batch
    Settings: ClassVar[type] = CacheDiTSettings

    def never(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        return {**settings, "threshold": 0.0}

    def _config(self, options: Any, steps: int) -> tuple[Any, Any]:
        from cache_dit import DBCacheConfig

        config = DBCacheConfig(
            Fn_compute_blocks=options.fn,
            Bn_compute_blocks=options.bn,
            residual_diff_threshold=options.threshold,
            max_warmup_steps=options.warmup,
            max_cached_steps=options.max_cached,
            max_continuous_cached_steps=options.max_continuous,
            enable_separate_cfg=options.separate_cfg,
        )
        return config, self._calibrator(options)

    def _calibrator(self, options: Any) -> Any:
        return None


@dataclass(frozen=True)
class CacheDiTTaylorSeerSettings(CacheDiTSettings):
    """As CacheDiTSettings; order: of the Taylor series."""

    order: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, order=self.order)


class CacheDiTTaylorSeer(CacheDiT):
    name = "cache_dit_taylorseer"
    Settings = CacheDiTTaylorSeerSettings

    def _calibrator(self, options: Any) -> Any:
        return _forecaster("taylorseer", options.order, 0)


@dataclass(frozen=True)
class CacheDiTDMDSettings(CacheDiTSettings):
    """As CacheDiTSettings; history: computed steps that the dynamic mode decomposition is fitted to, at least 4."""

    history: int = 6

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(4, history=self.history)


class CacheDiTDMD(CacheDiT):
    name = "cache_dit_dmd"
    Settings = CacheDiTDMDSettings

    def why_not(self, pipe: Any) -> str | None:
        import cache_dit

        if not hasattr(cache_dit, "DMDCalibratorConfig"):
            return "the installed cache-dit has no DMD calibrator: it needs 1.5 or later"
        return super().why_not(pipe)

    def _calibrator(self, options: Any) -> Any:
        return _forecaster("dmd", 1, options.history)


def _forecaster(name: str, order: int, history: int) -> Any:
    import cache_dit

    if name == "taylorseer":
        return cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=order)
    if name == "dmd":
        return cache_dit.DMDCalibratorConfig(dmd_history=history)
    return None


POLICIES = ("slow", "medium", "fast", "ultra")
FORECASTERS = ("reuse", "taylorseer", "dmd")


@dataclass(frozen=True)
class CacheDiTMaskSettings:
    """policy: one of cache-dit's masks, made for the run's steps; or `every`: one computed step in so many, after
    `warmup` computed ones. forecaster: what stands in for what is skipped; order, history: of taylorseer and dmd.

    fn, bn, separate_cfg: as in CacheDiTSettings.
    """

    policy: str | None = "medium"
    every: int | None = None
    warmup: int = 4
    forecaster: str = "reuse"
    order: int = 1
    history: int = 6
    fn: int = 1
    bn: int = 0
    separate_cfg: bool | None = None

    def __post_init__(self) -> None:
        at_least(1, every=self.every, warmup=self.warmup, order=self.order, fn=self.fn)
        at_least(0, bn=self.bn)
        if self.every is None and self.policy is None:
            raise ConfigError("set policy or every")
        if self.policy is not None and self.policy not in POLICIES:
            raise unknown_name("policy", self.policy, POLICIES)
        if self.forecaster not in FORECASTERS:
            raise unknown_name("forecaster", self.forecaster, FORECASTERS)


class CacheDiTMask(CacheDiTPeer):
    name = "cache_dit_mask"
    batchable = True
    Settings = CacheDiTMaskSettings

    def never(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        return {**settings, "every": 1}

    def _config(self, options: CacheDiTMaskSettings, steps: int) -> tuple[Any, Any]:
        from cache_dit import DBCacheConfig

        config = DBCacheConfig(
            Fn_compute_blocks=options.fn,
            Bn_compute_blocks=options.bn,
            max_warmup_steps=0,  # the mask says it all
            enable_separate_cfg=options.separate_cfg,
            num_inference_steps=steps,
            steps_computation_mask=self.mask(options, steps),
            steps_computation_policy="static",
        )
        return config, _forecaster(options.forecaster, options.order, options.history)

    def mask(self, options: CacheDiTMaskSettings, steps: int) -> list[int]:
        """1 for computed, 0 for reused, one for each step."""
        from cache_dit import steps_mask

        if options.every is not None:
            periods = math.ceil(steps / options.every)
            compute, cache = [options.warmup] + [1] * periods, [options.every - 1] * (periods + 1)
            return steps_mask(compute_bins=compute, cache_bins=cache, total_steps=steps)
        try:
            return steps_mask(mask_policy=options.policy, total_steps=steps)
        except AssertionError as error:
            raise ConfigError(
                f"rival {self.name!r} has no {options.policy!r} mask of {steps} steps ({error}): set every instead"
            ) from None
