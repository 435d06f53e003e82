"""Named methods: policies and forecasters are frozen dataclasses found by name.

A method of another package is found through its entry points (`diffusion_cache.policies`,
`diffusion_cache.forecasters`) or by decorating its class: `@registry.policies.register("my_policy")`.
"""

import dataclasses
import difflib
from collections.abc import Callable, Iterable
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

from .errors import ConfigError

T = TypeVar("T")


def suggest(name: str, known: Iterable[str]) -> str:
    """The closing sentence of an error about a name: the nearest known name, or all of them."""
    names = sorted(known)
    close = difflib.get_close_matches(str(name), names, n=1)
    return f"Did you mean {close[0]!r}?" if close else f"Known: {', '.join(names) or 'none'}."


def unknown_name(kind: str, name: str, known: Iterable[str]) -> ConfigError:
    return ConfigError(f"Unknown {kind} {name!r}. {suggest(name, known)}")


class Registry(Generic[T]):
    """Classes of one kind by name; each is a frozen dataclass whose fields are its options."""

    def __init__(self, kind: str, group: str):
        self.kind = kind
        self._group = group
        self._classes: dict[str, type[T]] = {}
        self._entry_points_loaded = False

    def register(self, name: str) -> Callable[[type[T]], type[T]]:
        """Class decorator; sets `cls.name`. ConfigError for a name that is taken, or a class that is no frozen dataclass."""

        def decorate(cls: type[T]) -> type[T]:
            if not dataclasses.is_dataclass(cls) or not cls.__dataclass_params__.frozen:  # type: ignore[attr-defined]
                raise ConfigError(f"{self.kind} {name!r}: {cls.__name__} must be a frozen dataclass")
            if self._classes.get(name, cls) is not cls:
                raise ConfigError(f"{self.kind} {name!r} is already registered by {self._classes[name].__name__}")
            cls.name = name  # type: ignore[attr-defined]
            self._classes[name] = cls
            return cls

        return decorate

    def unregister(self, name: str) -> None:
        self._classes.pop(name, None)

    def names(self) -> list[str]:
        self._load_entry_points()
        return sorted(self._classes)

    def get(self, name: str) -> type[T]:
        """The class of that name; ConfigError with a suggestion when there is none."""
        if name not in self._classes:
            self._load_entry_points()
        if name not in self._classes:
            raise unknown_name(self.kind, name, self._classes)
        return self._classes[name]

    def options(self, name: str) -> dict[str, Any]:
        """Option names and defaults (dataclasses.MISSING where there is none)."""
        return {field.name: field.default for field in dataclasses.fields(self.get(name))}  # type: ignore[arg-type]

    def _load_entry_points(self) -> None:
        if self._entry_points_loaded:
            return
        self._entry_points_loaded = True
        for entry in entry_points(group=self._group):
            self.register(entry.name)(entry.load())


policies: Registry[Any] = Registry("policy", "diffusion_cache.policies")
forecasters: Registry[Any] = Registry("forecaster", "diffusion_cache.forecasters")
