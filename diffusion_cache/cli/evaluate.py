"""`diffusion-cache evaluate`: Hydra's command line over evaluation jobs."""

import dataclasses
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module
from hydra import main as hydra_main
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import CompactHydraException, HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from .. import registry
from ..errors import ConfigError, DiffusionCacheError
from ..policies import Guards

CONFIGS = "diffusion_cache.configs"
OPEN = (("model", "call"), ("sampler", "options"), ("metrics", "settings"))


def register_methods() -> None:
    """Offer every registered policy and forecaster as an option of the groups `method` and `forecaster`."""
    store = ConfigStore.instance()
    guards = {field.name: None for field in dataclasses.fields(Guards)}
    for name in registry.policies.names():
        node: dict[str, Any] = {
            "kind": "ours",
            "label": None,
            "policy": {"name": name, **_defaults(registry.policies.options(name))},
            "forecaster": None,
            "guards": guards,
            "scope": None,
            "depth": None,
            "grid": None,
            "points": None,
        }
        store.store(group="method", name=name, node=OmegaConf.create(node))
    for name in registry.forecasters.names():
        store.store(group="forecaster", name=name, node={"name": name, **_defaults(registry.forecasters.options(name))})


def _defaults(options: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: "???" if default is dataclasses.MISSING else list(default) if isinstance(default, tuple) else default
        for name, default in options.items()
    }


def check(arguments: Sequence[str]) -> None:
    """Compose the configuration for every value that is given, before anything runs.

    Raises:
        ConfigError: for a group, option or key that does not exist, with the nearest that does.
    """
    given = [argument for argument in arguments if not argument.startswith("-") and "=" in argument]
    try:
        overrides = OverridesParser.create().parse_overrides(given)
    except HydraException as error:
        raise ConfigError(_first_line(error)) from error
    first = [_choices(override)[0] for override in overrides]
    with initialize_config_module(CONFIGS, version_base="1.3"):
        _compose(first)
        for place, override in enumerate(overrides):
            for choice in _choices(override)[1:]:
                _compose([*first[:place], choice, *first[place + 1 :]])


def _choices(override: Override) -> list[str]:
    if not override.is_sweep_override():
        return [override.input_line or ""]
    key = override.get_key_element()
    return [f"{key}={value}" for value in override.sweep_string_iterator()]


def _compose(overrides: Sequence[str]) -> DictConfig:
    try:
        return compose("evaluate", [override for override in overrides if not override.startswith("hydra")])
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_first_line(error) + _suggestion(error, overrides)) from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0]


def _suggestion(error: BaseException, overrides: Sequence[str]) -> str:
    """What may have been meant, where the error is about one of the overrides."""
    text = str(error)
    if "hydra/launcher/" in text:
        return ". Launchers come with pip install 'diffusion-cache[sweep]'"
    for override in overrides:
        key, _, value = override.lstrip("+~").partition("=")
        if f"'{key}/{value}'" in text:
            return f". {registry.suggest(value, _options(key))}"
        if f"'{key}'" in text or f"Key '{key.split('.')[-1]}'" in text or key in text:
            return f". {registry.suggest(key, _keys(overrides, override))}"
    return ""


def _options(group: str) -> list[str]:
    from hydra.core.global_hydra import GlobalHydra

    return GlobalHydra.instance().config_loader().get_group_options(group)


def _keys(overrides: Sequence[str], wrong: str) -> list[str]:
    """All keys of the configuration without one of the overrides."""
    try:
        config = compose("evaluate", [override for override in overrides if override != wrong])
    except (HydraException, OmegaConfBaseException):
        config = compose("evaluate", [])
    found = ["peer", "launcher", "experiment"]

    def walk(node: Any, prefix: str) -> None:
        for key, value in node.items() if isinstance(node, Mapping) else ():
            found.append(prefix + str(key))
            walk(value, f"{prefix}{key}.")

    walk(OmegaConf.to_container(config, resolve=False), "")
    return found


def resolved(cfg: DictConfig) -> dict[str, Any]:
    """The configuration as plain values; ConfigError where a required one is not given."""
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise ConfigError(f"{missing[0]} must be given: {missing[0]}=…")
    config = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(config, dict)
    for group, key in OPEN:  # null in the files, so that they can be given with any keys
        if key in config[group] and config[group][key] is None:
            config[group][key] = {}
    return {str(key): value for key, value in config.items()}


def run_configured(cfg: DictConfig) -> None:
    """One job of a sweep."""
    from ..evaluation.jobs import Team, run_job
    from ..evaluation.runner import Job
    from ..evaluation.subjects import quieten_libraries
    from .progress import announcing

    quieten_libraries()

    config = resolved(cfg)
    team = Team()
    job = Job(config, Path(config["out"]) / config["name"], team.ranks)
    console = Console(stderr=True, quiet=not team.leads)
    method = config["method"]
    title = f"{config['model']['name']}, {method.get('peer') or method.get('label') or method['policy']['name']}"
    with announcing(console, title) as progress:
        folders = run_job(job, progress, team)
    if team.leads:
        console.print(f"{title}: {len(folders)} run(s) in {job.folder}", soft_wrap=True)


@hydra_main(version_base="1.3", config_path=f"pkg://{CONFIGS}", config_name="evaluate")
def _run(cfg: DictConfig) -> None:
    from rich.markup import escape

    try:
        run_configured(cfg)
    except DiffusionCacheError as error:
        # in a sweep, Hydra goes on with the other jobs and ends by raising what the first one to fail has raised
        Console(stderr=True).print(f"[bold red]Error:[/] {escape(str(error))}", soft_wrap=True)
        raise CompactHydraException("This job has failed; what is finished is kept.") from None


def evaluate(arguments: Iterable[str]) -> None:
    """Run with Hydra's arguments: overrides, -m for a sweep, --cfg job to show the configuration."""
    # the parser that Hydra uses wants all overrides in a row
    arguments = sorted(arguments, key=lambda argument: "=" in argument and not argument.startswith("-"))
    register_methods()
    check(arguments)
    sys.argv = ["diffusion-cache evaluate", *arguments]
    try:
        _run()
    except KeyboardInterrupt:
        Console(stderr=True).print("Stopped. What is finished is kept; the same command goes on from there.")
        raise SystemExit(130) from None
