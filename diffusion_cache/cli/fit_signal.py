"""`diffusion-cache fit-signal`: Hydra's command line over fitting TeaCache's polynomial."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from hydra import main as hydra_main
from omegaconf import DictConfig
from rich.console import Console
from rich.text import Text

from ..errors import ConfigError
from ..plain import check_count
from . import hydra_app
from .hydra_app import CONFIGS, resolved
from .profile import FOLDER, file_name, fitting_samples
from .writing import check_writable, write

if TYPE_CHECKING:
    from ..profiling.fit_signal import Change
    from ..profiling.measure import Given, MakeBatch

GROUPS = ("launcher",)
OTHER_FILE = "file with out=…"
COUNTED_BY = "num_samples and held_out"


def run_configured(cfg: DictConfig) -> None:
    """One job of a sweep."""
    import torch

    from ..evaluation.prompts import samples
    from ..evaluation.subjects import batches_of, quieten_libraries, subject
    from ..profiling.fit_signal import fit

    quieten_libraries()
    config = resolved(cfg)
    for name in ("num_samples", "held_out", "batch", "degree", "threads"):
        check_count(name, config[name])
    if config["steps"] is not None:
        check_count("steps", config["steps"])
    torch.set_num_threads(config["threads"])
    what = subject(config["model"], config["sampler"])
    steps = config["steps"] or what.steps
    name = file_name(f"{what.name}-{what.sampler}")
    path = Path(config["out"]) if config["out"] else FOLDER / f"{name}.teacache.json"
    if path.is_dir():
        raise ConfigError(f"out names the file to write, and {path} is a folder: give out={path / name}.json")
    check_writable(path.parent, OTHER_FILE)
    make = batches_of(what, steps)
    others = samples({**config["prompts"], "n": config["held_out"], "n_video": None}, what.classes, what.video)
    fitting = fitting_samples(config["prompts"], config["num_samples"], what)
    found = fit(
        _changes(make, fitting, config["batch"]),
        _changes(make, [(str(sample.prompt), sample.seed) for sample in others], config["batch"]),
        config["degree"],
    )
    facts = {**asdict(found), "model": config["model"], "sampler": config["sampler"], "steps": steps}
    options = {"coefficients": facts.pop("coefficients")}
    write(path, json.dumps({"policy": "teacache", "options": options, "fit": facts}, indent=1) + "\n", OTHER_FILE)
    told = (
        f"{what.name}, {what.sampler}, {steps} steps: R² {found.r2:.3f} on {found.changes} changes, "
        f"{found.held_out_r2:.3f} on {found.held_out_changes} held out; error {found.held_out_error:.1%} of the mean "
        f"change there, {found.held_out_unfitted:.1%} with a multiple of the signal alone\n"
        f'enable(pipe, policy="teacache", **json.load(open("{path}"))["options"])'
    )
    Console().print(Text(told), soft_wrap=True)


def _changes(make: "MakeBatch", given: Sequence["Given"], size: int) -> "list[Change]":
    from ..profiling.fit_signal import changes

    return [change for i in range(0, len(given), size) for change in changes(make(given[i : i + size]))]


@hydra_main(version_base="1.3", config_path=f"pkg://{CONFIGS}", config_name="fit_signal")
def _run(cfg: DictConfig) -> None:
    hydra_app.reported(run_configured, cfg)


def fit_signal(arguments: Iterable[str]) -> None:
    """Run with Hydra's arguments: overrides, -m for a sweep, --cfg job to show the configuration."""
    hydra_app.launch("fit_signal", _run, arguments, GROUPS, COUNTED_BY)
