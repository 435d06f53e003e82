"""`diffusion-cache evaluate`: Hydra's command line over evaluation jobs."""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hydra import main as hydra_main
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from .. import registry
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
    named = method.get("policy") or method.get("system") or {}
    title = f"{config['model']['name']}, {method.get('peer') or method.get('label') or named['name']}"
    with announcing(console, title) as progress:
        folders = run_job(job, progress, team)
    if team.leads:
        console.print(f"{title}: {len(folders)} run(s) in {job.folder}", soft_wrap=True)


@hydra_main(version_base="1.3", config_path=f"pkg://{CONFIGS}", config_name="evaluate")
def _run(cfg: DictConfig) -> None:
    hydra_app.reported(run_configured, cfg)


def evaluate(arguments: Iterable[str]) -> None:
    """Run with Hydra's arguments: overrides, -m for a sweep, --cfg job to show the configuration."""
    register_methods()
    hydra_app.launch("evaluate", _run, arguments, GROUPS)
