"""`diffusion-cache evaluate`: Hydra's command line over evaluation jobs."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import main as hydra_main
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .. import registry
from ..errors import ConfigError
from ..policies import Guards
from . import hydra_app
from .hydra_app import CONFIGS, resolved

GROUPS = ("peer", "launcher", "experiment")


def register_methods() -> None:
    """Offer all that is registered as options of the groups `method`, `forecaster` and `corrector`."""
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
    for name in registry.systems.names():
        options = _defaults(registry.systems.options(name))
        node = {"kind": "ours", "label": None, "system": {"name": name, **options}, "guards": guards}
        node |= {"profile": None, "profile_scope": None, "grid": None, "points": None}
        store.store(group="method", name=name, node=OmegaConf.create(node))
    for group, known in (("forecaster", registry.forecasters), ("corrector", registry.correctors)):
        for name in known.names():
            store.store(group=group, name=name, node={"name": name, **_defaults(known.options(name))})


def _defaults(options: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: "???" if default is dataclasses.MISSING else list(default) if isinstance(default, tuple) else default
        for name, default in options.items()
    }


def check_used(method: Mapping[str, Any], choices: Mapping[str, Any], overrides: Sequence[str]) -> None:
    """That everything given has an effect. choices: of each group; overrides: as they were given.

    Raises:
        ConfigError: for a rival beside another method, and a forecaster or corrector that the method would not use.
    """
    chosen, peer = choices["method"], choices["peer"]
    if peer != "none" and chosen != f"peer/{peer}":
        raise ConfigError(
            f"peer={peer} and method={chosen} both say what to evaluate: give one of them, or -m with "
            f"method={chosen},peer/{peer} for one after the other"
        )
    if "steps_ratio" in method:
        return  # no cache at all, as other methods are compared with
    for override in overrides:
        group = override.split("=")[0].split(".")[0]
        if group not in ("forecaster", "corrector") or override == "corrector=none":
            continue
        if "policy" not in method:
            raise ConfigError(f"{override} goes with a policy, and method={chosen} has none: leave it out")
        if method.get(group):
            raise ConfigError(
                f"{override} would do nothing: method={chosen} brings a {group} of its own. Write method.{group}.…=… "
                f"for options of that, or add method.{group}=null to have another"
            )


def run_configured(cfg: DictConfig) -> None:
    """One job of a sweep."""
    from ..evaluation.jobs import Team, run_job
    from ..evaluation.runner import Job
    from ..evaluation.subjects import quieten_libraries
    from .progress import announcing

    quieten_libraries()

    config = resolved(cfg)
    given = HydraConfig.get()
    check_used(config["method"], given.runtime.choices, given.overrides.task)
    team = Team()
    job = Job(config, Path(config["out"]) / config["name"], team.ranks)
    console = Console(stderr=True, quiet=not team.leads)
    method = config["method"]
    named = method.get("policy") or method.get("system") or {}
    name = method.get("peer") or method.get("label") or named.get("name") or given.runtime.choices["method"]
    title = f"{config['model']['name']}, {name}"
    with announcing(console, title) as progress:
        folders = run_job(job, progress, team)
    if team.leads:
        console.print(Text(f"{title}: {len(folders)} run(s) in {job.folder}"), soft_wrap=True)
        if folders:
            Console().print(figures(title, folders))


def figures(title: str, folders: Sequence[Path]) -> Table:
    """The main figures of finished runs: their settings, what they spent, how fast and how good they were."""
    from ..evaluation.contenders import DEFAULT_SCOPE
    from ..evaluation.runs import DamagedError, read_run, settings_text
    from .tables import decibels

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column(Text(title))
    for header in ("NFE", "speed", "PSNR", "5th pct.", "worst"):
        table.add_column(header, justify="right", no_wrap=True)
    for folder in folders:
        try:
            run = read_run(folder)
        except DamagedError as error:
            table.add_row(Text(f"{error}; delete the folder {folder} to have it made again"), *["–"] * 5)
            continue
        psnr, nfe = run.score("psnr"), run.costs["nfe_ratio"]
        speed = "–" if run.speed is None else f"{run.speed:.2f}×"
        quality = ["–" if value is None else decibels(value) for value in (psnr.mean, psnr.p5, psnr.worst)]
        scope = "" if run.scope in ("", DEFAULT_SCOPE) else f"scope={run.scope}"
        name = Text(", ".join(part for part in (run.method, scope, settings_text(run, scope=False)) if part))
        if run.note:
            name.append(f" ({run.note})", style="dim")
        spent = "–" if nfe is None else f"{nfe:.0%}"
        table.add_row(name, spent, speed, *quality)
    return table


@hydra_main(version_base="1.3", config_path=f"pkg://{CONFIGS}", config_name="evaluate")
def _run(cfg: DictConfig) -> None:
    hydra_app.reported(run_configured, cfg)


def evaluate(arguments: Iterable[str]) -> None:
    """Run with Hydra's arguments: overrides, -m for a sweep, --cfg job to show the configuration."""
    register_methods()
    hydra_app.launch("evaluate", _run, arguments, GROUPS)
