"""What every rival is, and what following a pipeline from outside takes."""

import contextlib
import dataclasses
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, ClassVar

from torch import nn

from ...engine.patches import patched
from ...errors import ConfigError, NoSpansError
from ...models import find_denoisers
from ...plain import check_count
from ...registry import check_options, suggest, unknown_name

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

    def lacks(self, settings: Mapping[str, Any]) -> str | None:
        """The setting that has to be measured on each model and sampler, if these hold none."""
        return None

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
        check_count(f"rival {self.name!r}: steps", steps)
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


def settings_of(config: Mapping[str, Any], model: str, sampler: str = "") -> list[dict[str, Any]]:
    """The settings that a rival's configuration asks for on a model, in order.

    config: `settings` (common to all), and either `grid` (lists of values, of which every combination is taken) or
    `points` (a list of settings); without both there is one. `models: {name: {...}}` replaces, for that model, or for
    a model with one of its samplers, "name/sampler", the whole `grid` or `points`, and single entries of `settings`.

    Raises:
        ConfigError: an unknown part, both a grid and points, or a part of the wrong shape.
    """
    models = _part(config, "models", {})
    own = models.get(f"{model}/{sampler}") or models.get(model, {})
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


def at_least(least: float, **values: float | None) -> None:
    for name, value in values.items():
        if value is not None and not value >= least:
            raise ConfigError(f"{name} must be at least {least}, not {value}")


@contextlib.contextmanager
def leaving_nothing(pipe: Any, modules: Iterable[nn.Module]) -> Iterator[None]:
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


class Loop:
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

        with patched(type(pipe), "__call__", call), patched(type(pipe.scheduler), "step", step):
            yield


def denoisers_of(pipe: Any) -> list[nn.Module]:
    return list(find_denoisers(pipe).values())


def for_every_denoiser(pipe: Any, reason: Callable[[nn.Module], str | None]) -> str | None:
    try:
        return next((found for found in map(reason, denoisers_of(pipe)) if found is not None), None)
    except (ConfigError, NoSpansError) as error:
        return str(error)
