"""Named methods: policies, forecasters, correctors, published systems and ways to train routers, by name.

A method of another package is found through its entry points (`diffusion_cache.policies`,
`diffusion_cache.forecasters`, `diffusion_cache.correctors`, `diffusion_cache.systems`, `diffusion_cache.language`,
`diffusion_cache.routers`) or by decorating its class: `@registry.policies.register("my_policy")`.
"""

import dataclasses
import difflib
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
    close = difflib.get_close_matches(str(name), names, n=1)
    return f"Did you mean {close[0]!r}?" if close else f"Known: {', '.join(names) or 'none'}."


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
            other = _elsewhere(name)
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

# what methods are called elsewhere
ALIASES = {
    "dbcache": "policy='first_block' with front=… and back=…",
    "fbcache": "policy='first_block'",
    "first_block_cache": "policy='first_block'",
    "taylorseer": "forecaster='taylor'",
}


def _elsewhere(name: str) -> str | None:
    """The closing sentence of an error about a name that is of another kind, or another project's."""
    kinds = {"policy": policies, "forecaster": forecasters, "corrector": correctors}
    for keyword, registry in kinds.items():
        if name in registry.names():
            return f"Give {keyword}={name!r} instead."
    if name in systems.names():
        return f"It is a published system, which are for pipelines: enable(pipe, method={name!r})."
    alias = ALIASES.get(name.lower())
    return None if alias is None else f"Give {alias} instead."
