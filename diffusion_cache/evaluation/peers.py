"""Rival caches, each behind one thin adapter, on the very pipeline that our own methods run on.

A rival is used through its own public functions, with a fresh configuration for every `apply`, from clean state at
every generation, and nothing of it is left on the pipeline afterwards. What that takes beyond the rival's own means
is said at the place. A rival's quality is its own; its accidents (a guidance pass that reads the other's features,
a generation that starts from the last one's state) are kept from happening, so that it is judged at its best.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import itertools
import logging
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from ..errors import ConfigError, NoSpansError
from ..models import find_denoisers
from ..registry import check_options, suggest, unknown_name

__all__ = ["Peer", "peer", "peers", "settings_of"]

PARTS_OF_A_CONFIG = ("kind", "label", "peer", "settings", "grid", "points", "models")
PARTS_OF_A_MODEL = ("settings", "grid", "points")


class Peer(ABC):
    """One rival.

    name: what the configuration calls it. package: the distribution it comes from; module: what that is imported as.
    batchable: False where its decision couples the samples of a batch, which are then generated one by one.
    Settings: a frozen dataclass with the rival's own settings and their defaults.
    """

    name: ClassVar[str]
    package: ClassVar[str]
    module: ClassVar[str]
    batchable: ClassVar[bool]
    Settings: ClassVar[type]

    @abstractmethod
    def why_not(self, pipe: Any) -> str | None:
        """Why this rival cannot run on this pipeline, None if it can."""

    @abstractmethod
    def never(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The same settings, changed so that nothing is ever reused."""

    @abstractmethod
    def _applied(self, pipe: Any, options: Any, steps: int) -> AbstractContextManager[None]:
        """The rival at work; options: an instance of Settings."""

    def apply(self, pipe: Any, settings: Mapping[str, Any], steps: int) -> AbstractContextManager[None]:
        """The rival caches inside the with block; at its end the pipeline is as it was, also after an exception.

        steps: sampler steps of the generations inside the block. Every generation starts from clean state.

        Raises:
            ConfigError: unknown or impossible settings, a pipeline that the rival does not serve, or one on which it
                finds nothing to cache with these settings (that one on entering the block).
        """
        options = self.options(settings)
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
            raise ConfigError(f"rival {self.name!r}: steps must be a whole number of at least 1, not {steps!r}")
        reason = self.why_not(pipe)
        if reason is not None:
            raise ConfigError(f"rival {self.name!r} cannot run on {type(pipe).__name__}: {reason}")
        return self._applied(pipe, options, steps)

    def options(self, settings: Mapping[str, Any]) -> Any:
        """An instance of Settings; ConfigError for an unknown setting or a value that cannot be."""
        known = [field.name for field in dataclasses.fields(self.Settings)]
        for name in settings:
            if name not in known:
                raise ConfigError(f"Unknown setting {name!r} of rival {self.name!r}. {suggest(str(name), known)}")
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
        check_options(f"rival {self.name!r}", self.Settings, values)
        try:
            return self.Settings(**values)
        except ConfigError as error:
            raise ConfigError(f"rival {self.name!r}: {error}") from None


def settings_of(config: Mapping[str, Any], model: str) -> list[dict[str, Any]]:
    """The settings that a rival's configuration asks for on a model, in order.

    config: `settings` (common to all), and either `grid` (lists of values, of which every combination is taken) or
    `points` (a list of settings); without both there is one. `models: {name: {...}}` replaces, for that model, the
    whole `grid` or `points`, and single entries of `settings`.

    Raises:
        ConfigError: an unknown part, both a grid and points, or a part of the wrong shape.
    """
    own = _part(config, "models", {}).get(model, {})
    for given, known in ((config, PARTS_OF_A_CONFIG), (own, PARTS_OF_A_MODEL)):
        for name in given:
            if name not in known:
                raise unknown_name("part of a rival's configuration", str(name), known)
    common = {**_part(config, "settings", {}), **_part(own, "settings", {})}
    source = own if "grid" in own or "points" in own else config
    grid, points = _part(source, "grid", None), source.get("points")
    if grid is not None and points is not None:
        raise ConfigError("a rival's configuration takes a grid or points, not both: leave one out")
    if grid is not None:
        for name, values in grid.items():
            if not isinstance(values, list | tuple) or not values:
                raise ConfigError(f"the grid's {name} must be a list of values, not {values!r}")
        return [{**common, **dict(zip(grid, values, strict=True))} for values in itertools.product(*grid.values())]
    if points is not None:
        if not isinstance(points, list | tuple) or not all(isinstance(point, Mapping) for point in points):
            raise ConfigError(f"points must be a list of settings, not {points!r}")
        return [{**common, **point} for point in points]
    return [common]


def _part(config: Mapping[str, Any], name: str, default: Any) -> Any:
    value = config.get(name)
    if value is None:
        return default
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name} in a rival's configuration must map names to values, not {value!r}")
    return value


def _at_least(least: float, **values: float | None) -> None:
    for name, value in values.items():
        if value is not None and not value >= least:
            raise ConfigError(f"{name} must be at least {least}, not {value}")


@contextlib.contextmanager
def _leaving_nothing(pipe: Any, modules: Iterable[nn.Module]) -> Iterator[None]:
    """Undo at the end whatever has been set on the modules and on the pipeline's class.

    Rivals leave more than they take off: diffusers' hooks a registry and a bound `forward` on every module they
    touched; DeepCache a bound `forward` on every block; cache-dit's patch functors the replaced `forward`, a mark and
    on DiT a second registration of the time embedding (new keys in the state dict), and each of its forwards moves
    the block list to the end of the order in which the denoiser's children are found.
    """
    every = {id(part): part for module in modules for part in module.modules()}.values()
    attributes = [(part, dict(vars(part)), dict(part._modules)) for part in every]
    cls = type(pipe)
    of_class = dict(vars(cls))
    try:
        yield
    finally:
        for part, before, children in attributes:
            now = vars(part)
            for name in [name for name in now if name not in before]:
                del now[name]
            now.update(before)
            if list(part._modules.items()) != list(children.items()):
                part._modules.clear()
                part._modules.update(children)
        for name in [name for name in vars(cls) if name not in of_class]:
            delattr(cls, name)
        for name, value in of_class.items():
            if vars(cls)[name] is not value:
                setattr(cls, name, value)


@contextlib.contextmanager
def _patched(cls: type, name: str, make: Callable[[Callable], Callable]) -> Iterator[None]:
    """Replace a method of a class: an instance's own `__call__` is never reached, its own `step` fails checks."""
    own, original = name in vars(cls), getattr(cls, name)
    setattr(cls, name, functools.wraps(original)(make(original)))
    try:
        yield
    finally:
        if own:
            setattr(cls, name, original)
        else:
            delattr(cls, name)


class _Loop:
    """Where in a generation the pipeline is. step: sampler step; passes: denoiser calls made in it so far."""

    def __init__(self, pipe: Any):
        self._pipe = pipe
        self._timesteps: Any = None
        self.step = self.passes = 0

    @property
    def timestep(self) -> Any:
        """The current step's, a float in the scheduler's unit; read from the device once a generation."""
        if self._timesteps is None:
            self._timesteps = self._pipe.scheduler.timesteps.tolist()
        return self._timesteps[min(self.step, len(self._timesteps) - 1)]

    @contextlib.contextmanager
    def following(self, on_start: Callable[[], None]) -> Iterator[None]:
        """Follow the pipeline's generations; on_start is called before each."""
        pipe = self._pipe

        def call(original: Callable) -> Callable:
            def followed(this: Any, *args: Any, **kwargs: Any) -> Any:
                if this is pipe:
                    self._timesteps, self.step, self.passes = None, 0, 0
                    on_start()
                return original(this, *args, **kwargs)

            return followed

        def step(original: Callable) -> Callable:
            def followed(this: Any, *args: Any, **kwargs: Any) -> Any:
                if this is pipe.scheduler:
                    self.step, self.passes = self.step + 1, 0
                return original(this, *args, **kwargs)

            return followed

        with _patched(type(pipe), "__call__", call), _patched(type(pipe.scheduler), "step", step):
            yield


def _denoisers(pipe: Any) -> list[nn.Module]:
    return list(find_denoisers(pipe).values())


def _for_every_denoiser(pipe: Any, reason: Callable[[nn.Module], str | None]) -> str | None:
    try:
        return next((found for found in map(reason, _denoisers(pipe)) if found is not None), None)
    except (ConfigError, NoSpansError) as error:
        return str(error)


class _DiffusersPeer(Peer):
    """A cache among diffusers' own hooks, put on by its `apply_*` function (some denoisers have no `enable_cache`).

    hook_names: what its hooks are registered as.
    """

    package, module = "diffusers", "diffusers"
    hook_names: ClassVar[tuple[str, ...]]

    @abstractmethod
    def _install(self, denoiser: nn.Module, options: Any, steps: int, loop: _Loop) -> None:
        """Hook one denoiser."""

    def _caching(self, hooks: list[Any]) -> list[Any]:
        """Those of its hooks that save work; there must be one."""
        return hooks

    @contextlib.contextmanager
    def _applied(self, pipe: Any, options: Any, steps: int) -> Iterator[None]:
        from diffusers.hooks import HookRegistry

        denoisers, loop = _denoisers(pipe), _Loop(pipe)
        registries: list[Any] = []
        states: list[dict[tuple[int, int], Any]] = []
        with _leaving_nothing(pipe, denoisers), contextlib.ExitStack() as stack:
            for denoiser in denoisers:
                registry = HookRegistry.check_if_exists_or_initialize(denoiser)
                registries.append(registry)
                stack.callback(self._remove, registry)
                self._install(denoiser, options, steps, loop)
                registry.invalidate_child_registries_cache()
                hooks = self._hooks(denoiser)
                if not self._caching(hooks):
                    raise ConfigError(
                        f"rival {self.name!r} finds nothing to cache in {type(denoiser).__name__} with {options}: "
                        "other modules may have to be named"
                    )
                states.append(self._give_contexts(denoiser, loop, hooks, getattr(options, "per_pass", False)))

            def reset() -> None:
                # Pipelines reset hooks at their end, so not after an exception; and not on classes without CacheMixin.
                for registry in registries:
                    registry.reset_stateful_hooks(recurse=True)
                for kept in states:
                    kept.clear()

            stack.enter_context(loop.following(reset))
            yield

    def _remove(self, registry: Any) -> None:
        for name in self.hook_names:
            registry.remove_hook(name, recurse=True)
        registry.invalidate_child_registries_cache()

    def _hooks(self, denoiser: nn.Module) -> list[Any]:
        registries: list[Any] = [getattr(part, "_diffusers_hook", None) for part in denoiser.modules()]
        return [
            hook
            for registry in registries
            if registry
            for name, hook in registry.hooks.items()
            if name in self.hook_names
        ]

    @staticmethod
    def _give_contexts(
        denoiser: nn.Module, loop: _Loop, hooks: list[Any], per_pass: bool
    ) -> dict[tuple[int, int], Any]:
        """Enter a cache context around every call of the denoiser where the pipeline has not entered its own.

        The n-th call of a step gets the n-th context. With per_pass, hooks that keep one state whatever the context
        get one for each of a step's calls; these are what is returned, by hook and call.
        """
        from diffusers.hooks.hooks import CacheContext, StateManager, _set_cache_context

        managers = [value for hook in hooks for value in vars(hook).values() if isinstance(value, StateManager)]
        stateful = [hook for hook in hooks if hasattr(hook, "state")] if per_pass else []
        states: dict[tuple[int, int], Any] = {}
        forward = denoiser.forward

        @functools.wraps(forward)
        def with_context(*args: Any, **kwargs: Any) -> Any:
            position = loop.passes
            loop.passes += 1
            if stateful:
                for index, hook in enumerate(stateful):
                    hook.state = states.setdefault((index, position), type(hook.state)())
            if not managers or managers[0]._context is not None:
                return forward(*args, **kwargs)
            _set_cache_context(denoiser, CacheContext(f"pass {position}"))
            try:
                return forward(*args, **kwargs)
            finally:
                _set_cache_context(denoiser, None)

        denoiser.forward = with_context
        return states


def _without_stack(denoiser: nn.Module) -> str | None:
    """Why the hooks that step over a whole stack of blocks cannot work on this denoiser."""
    from diffusers.hooks._common import _ALL_TRANSFORMER_BLOCK_IDENTIFIERS
    from diffusers.hooks._helpers import TransformerBlockRegistry

    children = [
        child
        for name, child in denoiser.named_children()
        if name in _ALL_TRANSFORMER_BLOCK_IDENTIFIERS and isinstance(child, nn.ModuleList)
    ]
    blocks = [block for child in children for block in child]
    if len(blocks) < 2:
        return f"{type(denoiser).__name__} has no list of transformer blocks under a name it knows"
    for block in blocks:
        try:
            TransformerBlockRegistry.get(type(block))
        except ValueError:
            return f"blocks of class {type(block).__name__} are not in its registry"
    return None


def _attention_names(denoiser: nn.Module) -> list[str]:
    from diffusers.hooks._common import _ATTENTION_CLASSES

    return [name for name, part in denoiser.named_modules() if isinstance(part, _ATTENTION_CLASSES)]


@dataclass(frozen=True)
class FirstBlockSettings:
    """threshold: largest relative change of the first block's residual that is still reused."""

    threshold: float = 0.05


class DiffusersFirstBlock(_DiffusersPeer):
    name = "diffusers_first_block"
    batchable = False  # one decision from the mean over the batch
    hook_names = ("fbc_leader_block_hook", "fbc_block_hook")
    Settings = FirstBlockSettings

    def why_not(self, pipe: Any) -> str | None:
        return _for_every_denoiser(pipe, _without_stack)

    def never(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        return {**settings, "threshold": -1.0}

    def _install(self, denoiser: nn.Module, options: FirstBlockSettings, steps: int, loop: _Loop) -> None:
        from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache

        apply_first_block_cache(denoiser, FirstBlockCacheConfig(threshold=options.threshold))


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
        _at_least(1, interval=self.interval)
        _at_least(0, warmup=self.warmup, after=self.after, order=self.order)
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


class DiffusersTaylorSeer(_DiffusersPeer):
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

        return _for_every_denoiser(pipe, reason)

    def never(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        return {**settings, "interval": 1}

    def _install(self, denoiser: nn.Module, options: TaylorSeerSettings, steps: int, loop: _Loop) -> None:
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


@dataclass(frozen=True)
class MagSettings:
    """threshold: largest accumulated error that is still reused. max_skip: reused steps in a row, at most.

    retention: share of the steps at the start that are computed. ratios: how a step's residual compares in size with
    the step before, for every step (`DiffusersMag.calibrate`); taken at other step counts too.
    """

    threshold: float = 0.06
    max_skip: int = 3
    retention: float = 0.2
    ratios: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        _at_least(0, max_skip=self.max_skip, retention=self.retention)
        if not all(isinstance(ratio, int | float) and math.isfinite(ratio) for ratio in self.ratios):
            raise ConfigError("ratios must be finite numbers")


class DiffusersMag(_DiffusersPeer):
    name = "diffusers_mag"
    batchable = True  # decides by the ratios alone
    hook_names = ("mag_cache_leader_block_hook", "mag_cache_block_hook")
    Settings = MagSettings

    def why_not(self, pipe: Any) -> str | None:
        return _for_every_denoiser(pipe, _without_stack)

    def never(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        return {**settings, "max_skip": 0}

    def calibrate(self, pipe: Any, generate: Callable[[], object], steps: int) -> tuple[float, ...]:
        """Measure `ratios` in diffusers' calibration mode: one a step, the mean over guidance passes and samples.

        generate: calls the pipeline with `steps` sampler steps, on seeds that nothing is reported on.
        """
        reason = self.why_not(pipe)
        if reason is not None:
            raise ConfigError(f"rival {self.name!r} cannot run on {type(pipe).__name__}: {reason}")
        kept: dict[int, Any] = {}
        with _Calibration(kept)._applied(pipe, None, steps):
            generate()
        lists = [ratios for ratios in kept.values() if len(ratios) >= steps]
        if not lists:
            raise ConfigError(f"calibration needs a generation of {steps} steps: generate() made none")
        return tuple(sum(values) / len(values) for values in zip(*(ratios[:steps] for ratios in lists), strict=True))

    def _install(self, denoiser: nn.Module, options: MagSettings, steps: int, loop: _Loop) -> None:
        from diffusers.hooks import MagCacheConfig, apply_mag_cache

        if not options.ratios:
            raise ConfigError(
                f"rival {self.name!r} needs the ratios of the model it runs on: measure them with "
                "evaluation.peers.peer('diffusers_mag').calibrate(pipe, generate, steps) and set ratios=[...]"
            )
        config = MagCacheConfig(
            threshold=options.threshold,
            max_skip_steps=options.max_skip,
            retention_ratio=options.retention,
            num_inference_steps=steps,
            mag_ratios=list(options.ratios),
        )
        apply_mag_cache(denoiser, config)


class _Calibration(DiffusersMag):
    """MagCache measuring instead of skipping; kept: by state, the ratios of each generation and pass."""

    def __init__(self, kept: dict[int, Any]):
        self._kept = kept
        self._states: list[Any] = []  # held, so that no two states share an id

    def _install(self, denoiser: nn.Module, options: Any, steps: int, loop: _Loop) -> None:
        from diffusers.hooks import MagCacheConfig, apply_mag_cache

        # One step more than there will be, as it prints and forgets the ratios at the last one.
        apply_mag_cache(denoiser, MagCacheConfig(calibrate=True, num_inference_steps=steps + 1))
        for hook in self._hooks(denoiser):
            if getattr(hook, "is_tail", False):
                hook._perform_calibration_step = functools.partial(self._record, hook._perform_calibration_step)

    def _record(self, perform: Callable, state: Any, residual: torch.Tensor) -> None:
        perform(state, residual)
        self._states.append(state)
        self._kept[id(state)] = state.calibration_ratios  # a reset replaces the list, so that this one stays


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
        _at_least(0, threshold=self.threshold, first=self.first, last=self.last, max_consecutive=self.max_consecutive)
        if self.order not in (0, 1):
            raise ConfigError(f"order must be 0 or 1, not {self.order}")


class DiffusersSea(_DiffusersPeer):
    name = "diffusers_sea"
    batchable = False  # one decision from the mean over the batch
    hook_names = ("sea_cache_post_norm", "sea_cache_block", "sea_cache_leader_block", "sea_cache_root")
    Settings = SeaSettings

    def why_not(self, pipe: Any) -> str | None:
        # Elsewhere it computes every step with a warning: nobody tells it the latents, nor the step and its sigma.
        from diffusers import WanPipeline

        if isinstance(pipe, WanPipeline):
            return _for_every_denoiser(pipe, _without_stack)
        return "it knows where the latents and their noise level are in text-to-video Wan only"

    def never(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        return {**settings, "threshold": 0.0}

    def _install(self, denoiser: nn.Module, options: SeaSettings, steps: int, loop: _Loop) -> None:
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
        _at_least(1, spatial=self.spatial, temporal=self.temporal, cross=self.cross)
        if self.spatial is self.temporal is self.cross is None:
            raise ConfigError("set spatial, temporal or cross to the steps of which one is computed")


class DiffusersPAB(_DiffusersPeer):
    name = "diffusers_pab"
    batchable = True
    hook_names = ("pyramid_attention_broadcast",)
    Settings = PABSettings

    def why_not(self, pipe: Any) -> str | None:
        from diffusers.hooks._common import _SPATIAL_TRANSFORMER_BLOCK_IDENTIFIERS as SPATIAL

        def reason(denoiser: nn.Module) -> str | None:
            names = _attention_names(denoiser)
            if any(re.search(pattern, name) for pattern in SPATIAL for name in names):
                return None
            return f"{type(denoiser).__name__} has no attention of a class it knows"

        return _for_every_denoiser(pipe, reason)

    def never(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        options = self.options(settings)
        ranges = {name: getattr(options, name) for name in ("spatial", "temporal", "cross")}
        return {**settings, **{name: None if value is None else 1 for name, value in ranges.items()}}

    def _install(self, denoiser: nn.Module, options: PABSettings, steps: int, loop: _Loop) -> None:
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
        _at_least(1, spatial=self.spatial, temporal=self.temporal, unconditional=self.unconditional)
        if self.layout not in ("BCFHW", "BFCHW", "BCHW"):
            raise unknown_name("layout", self.layout, ("BCFHW", "BFCHW", "BCHW"))


class DiffusersFasterCache(_DiffusersPeer):
    name = "diffusers_fastercache"
    batchable = True
    hook_names = ("faster_cache_denoiser", "faster_cache_block")
    Settings = FasterSettings

    def why_not(self, pipe: Any) -> str | None:
        from diffusers.hooks.faster_cache import _TRANSFORMER_BLOCK_IDENTIFIERS as KNOWN

        def reason(denoiser: nn.Module) -> str | None:
            names = _attention_names(denoiser)
            if any(re.search(pattern, name) for pattern in KNOWN for name in names):
                return None
            return f"it looks for attention in lists of transformer blocks, and {type(denoiser).__name__} has none"

        return _for_every_denoiser(pipe, reason)

    def never(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        low = self.options(settings).low
        return {**settings, "high": low, "unconditional_high": low}

    def _install(self, denoiser: nn.Module, options: FasterSettings, steps: int, loop: _Loop) -> None:
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


class _CacheDiTPeer(Peer):
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
        return _for_every_denoiser(pipe, lambda denoiser: None)

    @contextlib.contextmanager
    def _applied(self, pipe: Any, options: Any, steps: int) -> Iterator[None]:
        import cache_dit

        with _quiet("cache_dit", "CACHE_DIT"), _leaving_nothing(pipe, _denoisers(pipe)):
            self._check_blocks(pipe, options)
            cache, calibrator = self._config(options, steps)
            try:
                cache_dit.enable_cache(pipe, cache_config=cache, calibrator_config=calibrator)
                if not all(getattr(denoiser, "_is_cached", False) for denoiser in _denoisers(pipe)):
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
        _at_least(1, fn=self.fn)
        _at_least(0, bn=self.bn, warmup=self.warmup, threshold=self.threshold)
        _at_least(-1, max_cached=self.max_cached, max_continuous=self.max_continuous)


class CacheDiT(_CacheDiTPeer):
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
        _at_least(1, order=self.order)


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
        _at_least(4, history=self.history)


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
        _at_least(1, every=self.every, warmup=self.warmup, order=self.order, fn=self.fn)
        _at_least(0, bn=self.bn)
        if self.every is None and self.policy is None:
            raise ConfigError("set policy or every")
        if self.policy is not None and self.policy not in POLICIES:
            raise unknown_name("policy", self.policy, POLICIES)
        if self.forecaster not in FORECASTERS:
            raise unknown_name("forecaster", self.forecaster, FORECASTERS)


class CacheDiTMask(_CacheDiTPeer):
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


@dataclass(frozen=True)
class DeepCacheSettings:
    """interval: one computed step in so many. branch: where the UNet is cut, 0 the outermost; 3 to a level."""

    interval: int = 3
    branch: int = 0

    def __post_init__(self) -> None:
        _at_least(1, interval=self.interval)
        _at_least(0, branch=self.branch)


class DeepCache(Peer):
    name = "deepcache"
    package, module = "DeepCache", "DeepCache"
    batchable = True
    Settings = DeepCacheSettings

    def why_not(self, pipe: Any) -> str | None:
        unet = getattr(pipe, "unet", None)
        if not all(isinstance(getattr(unet, name, None), nn.Module) for name in ("down_blocks", "mid_block")):
            return "it serves UNets only"
        return _for_every_denoiser(
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

        with _leaving_nothing(pipe, [pipe.unet]):
            helper.enable()
            try:
                with _Loop(pipe).following(reset):
                    yield
            finally:
                helper.disable()


peers: dict[str, Peer] = {
    rival.name: rival
    for rival in (
        CacheDiT(),
        CacheDiTTaylorSeer(),
        CacheDiTDMD(),
        CacheDiTMask(),
        DiffusersFirstBlock(),
        DiffusersTaylorSeer(),
        DiffusersMag(),
        DiffusersPAB(),
        DiffusersFasterCache(),
        DiffusersSea(),
        DeepCache(),
    )
}


def peer(name: str) -> Peer:
    """The rival of that name.

    Raises:
        ConfigError: an unknown name, or a package that is not installed.
    """
    if name not in peers:
        raise unknown_name("rival", name, peers)
    found = peers[name]
    if importlib.util.find_spec(found.module) is None:
        raise ConfigError(
            f"rival {name!r} needs the package {found.package}: pip install 'diffusion-cache[peers]', "
            "or leave this rival out"
        )
    return found
