"""Named methods: policies, forecasters, correctors, published systems and ways to train routers, by name.

A method of another package is found through its entry points (`diffusion_cache.policies`,
`diffusion_cache.forecasters`, `diffusion_cache.correctors`, `diffusion_cache.systems`, `diffusion_cache.language`,
`diffusion_cache.routers`) or by decorating its class: `@registry.policies.register("my_policy")`.
"""

import dataclasses
import difflib
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from importlib.metadata import entry_points
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Generic, TypeVar, Union, get_args, get_origin, get_type_hints

from .errors import ConfigError, DiffusionCacheWarning

T = TypeVar("T")


def suggest(name: str, known: Iterable[str]) -> str:
    """The closing sentence of an error about a name: the nearest known name, or all of them."""
    names = sorted(known)
    alike = [one for one in names if _plain(one) == _plain(name)]
    close = alike or difflib.get_close_matches(str(name), names, n=1)
    return f"Did you mean {close[0]!r}?" if close else f"Known: {', '.join(names) or 'none'}."


def _plain(name: Any) -> str:
    """A name's letters and digits, in lower case."""
    return re.sub(r"[\W_]", "", str(name).lower())


def unknown_name(kind: str, name: str, known: Iterable[str]) -> ConfigError:
    return ConfigError(f"Unknown {kind} {name!r}. {suggest(name, known)}")


def check_options(what: str, cls: type, options: Mapping[str, Any]) -> None:
    """ConfigError for an option that cannot be of the type its field declares."""
    try:
        hints = get_type_hints(cls)
    except NameError:
        return  # annotations that only a type checker can resolve
    for name, value in options.items():
        if not _fits(value, hints[name]):
            raise ConfigError(f"{what}: {name} must be {_described(hints[name])}, not {value!r}")


def _fits(value: Any, hint: Any) -> bool:
    if get_origin(hint) in (Union, UnionType):
        return any(_fits(value, option) for option in get_args(hint))
    if hint in (int, float):
        return isinstance(value, Integral if hint is int else Real) and not isinstance(value, bool)
    return not isinstance(hint, type) or isinstance(value, hint)  # what is no plain type, the method checks itself


def _described(hint: Any) -> str:
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(map(_described, get_args(hint)))
    names = {int: "a whole number", float: "a number", NoneType: "None", str: "a string"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))


class Registry(Generic[T]):
    """Classes of one kind by name; each is a frozen dataclass whose fields are its options."""

    def __init__(self, kind: str, home: str):
        self.kind = kind
        self._home = home  # the package of the built-in ones, and the entry point group of the others
        self._classes: dict[str, type[T]] = {}
        self._loaded = False

    def register(self, name: str) -> Callable[[type[T]], type[T]]:
        """Class decorator; sets `cls.name`.

        Raises:
            ConfigError: for a name that is taken, or a class that is no frozen dataclass.
        """

        def decorate(cls: type[T]) -> type[T]:
            if not dataclasses.is_dataclass(cls) or not cls.__dataclass_params__.frozen:  # type: ignore[attr-defined]
                raise ConfigError(f"{self.kind} {name!r}: {cls.__name__} must be a frozen dataclass")
            if self._classes.get(name, cls) is not cls:
                raise ConfigError(f"{self.kind} {name!r} is already registered by {self._classes[name].__name__}")
            if cls not in self._classes.values():  # a second name does not rename it
                cls.name = name  # type: ignore[attr-defined]
            self._classes[name] = cls
            return cls

        return decorate

    def unregister(self, name: str) -> None:
        self._classes.pop(name, None)

    def names(self) -> list[str]:
        self._load()
        return sorted(self._classes)

    def get(self, name: str) -> type[T]:
        """The class of that name; ConfigError with a suggestion when there is none."""
        if name not in self._classes:
            self._load()
        if name not in self._classes:
            other = _elsewhere(name, self.kind)
            if other:
                raise ConfigError(f"Unknown {self.kind} {name!r}. {other}")
            raise unknown_name(self.kind, name, self._classes)
        return self._classes[name]

    def options(self, name: str) -> dict[str, Any]:
        """Option names and defaults (dataclasses.MISSING where there is none)."""
        return {field.name: field.default for field in dataclasses.fields(self.get(name))}  # type: ignore[arg-type]

    def _load(self) -> None:
        if self._loaded:
            return
        self._loaded = True
        import_module(self._home)
        failures = []
        for entry in entry_points(group=self._home):
            try:
                self.register(entry.name)(entry.load())
            except Exception as error:
                failures.append(f"{entry.name!r} ({type(error).__name__}: {error})")
        if failures:
            message = f"{self.kind} of another package cannot be loaded: {', '.join(failures)}"
            warnings.warn(message, DiffusionCacheWarning, stacklevel=3)


policies: Registry[Any] = Registry("policy", "diffusion_cache.policies")
forecasters: Registry[Any] = Registry("forecaster", "diffusion_cache.forecasters")
correctors: Registry[Any] = Registry("corrector", "diffusion_cache.correctors")
systems: Registry[Any] = Registry("system", "diffusion_cache.systems")
languages: Registry[Any] = Registry("language cache", "diffusion_cache.language")
routers: Registry[Any] = Registry("router", "diffusion_cache.routers")

# what methods, and configurations of them, are called elsewhere; by letters and digits alone, without "config"
ALIASES = {
    "dbcache": "policy='first_block' with front=… and back=…",
    "fbcache": "policy='first_block'",
    "firstblockcache": "policy='first_block' with forecaster='reuse'",
    "magcache": "profile='published/magcache/…', or policy='magcache' with ratios=… and forecaster='reuse',",
    "pyramidattentionbroadcast": "policy='pab' with scope='branch' and forecaster='reuse'",
    "scm": "policy='mask' with mask=…",
    "sea": "policy='seacache'",
    "seacache": "policy='seacache' with threshold=…, last=… and max_consecutive=…",
    "stepsmask": "policy='mask' with mask=…",
    "taylorseer": "forecaster='taylor'",
    "taylorseercache": "policy='interval' with every=…, warmup=… and scope='branch'",
    "taylorseercalibrator": "forecaster='taylor' with order=…",
    "wavespeed": "policy='first_block'",
}
# the nearest to methods that are not here
NEAREST = {
    "adacache": "policy='first_block'",
    "dbprune": "policy='first_block'",
    "fastercache": "policy='pab' with scope='branch', and unconditional_every=… for its guidance part",
    "foca": "forecaster='taylor'",
}

# what options are called in cache-dit, diffusers' configurations, TeaCache and DeepCache
OPTION_ALIASES = {
    "Bn_compute_blocks": "back",
    "Fn_compute_blocks": "front",
    "cache_end_steps": "last",
    "cache_interval": "every",
    "cross_attention_block_skip_range": "cross",
    "disable_cache_before_step": "warmup",
    "mag_ratios": "ratios",
    "max_cached_steps": "max_reused",
    "max_consecutive_cached": "max_consecutive",
    "max_continuous_cached_steps": "max_consecutive",
    "max_order": "order",
    "max_skip_steps": "max_skip",
    "max_warmup_steps": "warmup",
    "n_derivatives": "order",
    "rel_l1_thresh": "threshold",
    "residual_diff_threshold": "threshold",
    "residual_order": "order",
    "retention_ratio": "retention",
    "retention_steps": "warmup",
    "skip_interval": "every",
    "skip_interval_steps": "every",
    "spatial_attention_block_skip_range": "spatial",
    "steps_computation_mask": "mask",
    "taylorseer_order": "order",
    "temporal_attention_block_skip_range": "temporal",
    "unconditional_batch_skip_range": "unconditional_every",
    "warmup_steps": "warmup",
}
_NOISE = "Here that is sigma_min=… and sigma_max=…, shares of noise from 0 to 1."
# closing sentences about options of theirs that are none here, or not one
OPTION_NOTES = {
    "cache_branch_id": "Here that is depth=…, which counts whole blocks: cache_branch_id // 3 + 1.",
    "cache_config": "Give what it says as options: enable(pipe, policy='first_block', threshold=…).",
    "calibrator_config": "Give forecaster='taylor' and order=… instead.",
    "cross_attention_timestep_skip_range": _NOISE,
    "disable_cache_after_step": "Here that is last=…, a number of steps, or end=…, a share of the run.",
    "enable_separate_cfg": "Guidance passes are told apart without it: leave it out.",
    "force_refresh_step_hint": "Call diffusion_cache.refresh(pipe) in a callback of that step instead.",
    "max_accumulated_residual_diff_threshold": "There is no such limit here: leave it out.",
    "num_inference_steps": "The pipeline's call takes it; for a loop of your own it is run(model, num_steps=…).",
    "spatial_attention_timestep_skip_range": _NOISE,
    "temporal_attention_timestep_skip_range": _NOISE,
}


def named_elsewhere(name: str) -> str | None:
    """The closing sentence of an error about another project's name of a method, or of its configuration."""
    plain = _plain(name).removesuffix("config")
    if plain in ALIASES:
        return f"Give {ALIASES[plain]} instead."
    return f"It is not here; the nearest is {NEAREST[plain]}." if plain in NEAREST else None


def suggest_option(name: str, known: Iterable[str]) -> str:
    """The closing sentence of an error about an option, which may be another project's."""
    own, names = OPTION_ALIASES.get(name), set(known)
    if own is None:
        return OPTION_NOTES.get(name) or suggest(name, names)
    if own in names:
        return f"Here that is {own!r}."
    kinds = {"policy": policies, "forecaster": forecasters, "corrector": correctors, "method": systems}
    homes = [f"{kind}={one!r}" for kind, of in kinds.items() for one in of.names() if own in of.options(one)]
    return f"Here that is {own!r}, of {', '.join(homes)}." if homes else suggest(name, names)


def _elsewhere(name: str, kind: str) -> str | None:
    """The closing sentence of an error about a name that is of another kind, or another project's."""
    alike = {
        found.kind: one
        for found in (policies, forecasters, correctors, systems)
        for one in found.names()
        if _plain(one) == _plain(name)
    }
    if kind in alike:
        return None  # misspelled, as `suggest` says
    for keyword in (policies.kind, forecasters.kind, correctors.kind):
        if keyword in alike:
            return f"Give {keyword}={alike[keyword]!r} instead."
    if systems.kind in alike:
        return f"It is a published system, which are for pipelines: enable(pipe, method={alike[systems.kind]!r})."
    return named_elsewhere(name)
