"""What the commands with Hydra's command line share: checking what is given, plain values, errors as messages."""

import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import CompactHydraException, HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException
from rich.console import Console
from rich.markup import escape

from .. import registry
from ..errors import ConfigError, DiffusionCacheError
from .interrupts import kept_interrupts

CONFIGS = "diffusion_cache.configs"
COUNTS = ("prompts.n", "prompts.n_video")
OPEN = (("model", "call"), ("sampler", "options"), ("metrics", "settings"))


def check(command: str, arguments: Sequence[str], groups: Sequence[str] = (), counted_by: str = "") -> None:
    """Compose the configuration for every value that is given, before anything runs.

    groups: of configurations that leave no key of their own. counted_by: the options that say how many samples there
    are, for a command that does not go by those of its prompts.

    Raises:
        ConfigError: for a group, option or key that does not exist, with the nearest that does, a sweep over nothing,
            and a number of prompts that would do nothing.
    """
    given = [argument for argument in arguments if not argument.startswith("-") and "=" in argument]
    with initialize_config_module(CONFIGS, version_base="1.3"):
        try:
            overrides = OverridesParser.create(GlobalHydra.instance().config_loader()).parse_overrides(given)
            choices = [_choices(override) for override in overrides]
        except HydraException as error:
            raise ConfigError(_first_line(error)) from error
        for override in overrides:
            if counted_by and override.key_or_group in COUNTS:
                raise ConfigError(
                    f"{override.key_or_group} does nothing here: how many samples there are is for {counted_by} to say"
                )
        first = [found[0] for found in choices]
        _compose(command, first, groups)
        for place, found in enumerate(choices):
            for choice in found[1:]:
                _compose(command, [*first[:place], choice, *first[place + 1 :]], groups)


def _choices(override: Override) -> list[str]:
    """The values of an override one by one; globs, which go by names, need the parser's config loader."""
    if not override.is_sweep_override():
        return [override.input_line or ""]
    key = override.get_key_element()
    found = [f"{key}={value}" for value in override.sweep_string_iterator()]
    if not found:
        names = _options(override.key_or_group)
        told = f". Its options are {', '.join(names)}" if names else ""
        raise ConfigError(f"{override.input_line} is a sweep over nothing{told}")
    return found


def _compose(command: str, overrides: Sequence[str], groups: Sequence[str]) -> DictConfig:
    try:
        return compose(command, [override for override in overrides if not override.startswith("hydra")])
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_first_line(error) + _suggestion(command, error, overrides, groups)) from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0].rstrip(".")


def _suggestion(command: str, error: BaseException, overrides: Sequence[str], groups: Sequence[str]) -> str:
    """What may have been meant, where the error is about one of the overrides."""
    text = str(error)
    if "hydra/launcher/" in text:
        return ". Launchers come with pip install 'diffusion-cache[sweep]'"
    # the longest key first: 'method' is a part of all keys in it
    for override in sorted(overrides, key=lambda one: -len(one.partition("=")[0])):
        key, _, value = override.lstrip("+~").partition("=")
        if f"'{key}/{value}'" in text:
            return f". {registry.suggest(value, _options(key))}"
        if f"'{key}'" in text or f"Key '{key.split('.')[-1]}'" in text or key in text:
            return f". {registry.suggest(key, _keys(command, overrides, override, groups))}"
    return ""


def _options(group: str) -> list[str]:
    return GlobalHydra.instance().config_loader().get_group_options(group)


def _keys(command: str, overrides: Sequence[str], wrong: str, groups: Sequence[str]) -> list[str]:
    """All keys of the configuration without one of the overrides."""
    try:
        config = compose(command, [override for override in overrides if override != wrong])
    except (HydraException, OmegaConfBaseException):
        config = compose(command, [])
    found = list(groups)

    def walk(node: Any, prefix: str) -> None:
        for key, value in node.items() if isinstance(node, Mapping) else ():
            found.append(prefix + str(key))
            walk(value, f"{prefix}{key}.")

    walk(OmegaConf.to_container(config, resolve=False), "")
    return found


def resolved(cfg: DictConfig) -> dict[str, Any]:
    """The configuration as plain values; ConfigError where a required one is not given."""
    try:
        missing = sorted(OmegaConf.missing_keys(cfg))
    except InterpolationToMissingValueError as error:
        found = re.search(r"Missing mandatory value: (\S+)", str(error))
        missing = [found[1] if found else str(error.full_key)]
    if missing:
        raise ConfigError(f"{missing[0]} must be given: {missing[0]}=…")
    config = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(config, dict)
    for group, key in OPEN:  # null in the files, so that they can be given with any keys
        if key in config.get(group, ()) and config[group][key] is None:
            config[group][key] = {}
    # `sampler=default` has taken it: runs of one sampler are one, however it was chosen
    config.get("model", {}).pop("sampler", None)
    return {str(key): value for key, value in config.items()}


def reported(job: Callable[[DictConfig], None], cfg: DictConfig) -> None:
    """Run one job of a sweep; this package's own errors are shown as a message."""
    try:
        job(cfg)
    except DiffusionCacheError as error:
        # in a sweep, Hydra goes on with the other jobs and ends by raising what the first one to fail has raised
        Console(stderr=True).print(f"[bold red]Error:[/] {escape(str(error))}", soft_wrap=True)
        raise CompactHydraException("This job has failed; what is finished is kept.") from None


def launch(
    command: str,
    main: Callable[[], None],
    arguments: Iterable[str],
    groups: Sequence[str] = (),
    counted_by: str = "",
) -> None:
    """Run a Hydra main function with these arguments: overrides, -m for a sweep, --cfg job for the configuration.

    groups, counted_by: see `check`.
    """
    # the parser that Hydra uses wants all overrides in a row
    arguments = sorted(arguments, key=lambda argument: "=" in argument and not argument.startswith("-"))
    check(command, arguments, groups, counted_by)
    sys.argv = [f"diffusion-cache {command}", *arguments]
    try:
        with kept_interrupts():
            main()
    except KeyboardInterrupt:
        Console(stderr=True).print("Stopped. What is finished is kept; the same command goes on from there.")
        raise SystemExit(130) from None
