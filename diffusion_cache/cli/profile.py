"""`diffusion-cache profile`: Hydra's command line over a profiling run."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hydra import main as hydra_main
from omegaconf import DictConfig
from rich.console import Console
from rich.text import Text

from ..errors import ConfigError
from ..plain import check_count
from . import hydra_app
from .hydra_app import CONFIGS, resolved

if TYPE_CHECKING:
    from torch import Tensor

    from ..evaluation.jobs import Team
    from ..evaluation.subjects import Subject
    from ..profile import Profile
    from ..profiling.measure import Given, Options, Progress

GROUPS = ("launcher",)
COUNTED_BY = "num_samples"
FOLDER = Path("profiles-local")


def run_configured(cfg: DictConfig) -> None:
    """One job of a sweep."""
    import torch

    from ..evaluation.jobs import Team
    from ..evaluation.subjects import quieten_libraries, subject
    from .progress import announcing

    quieten_libraries()
    config = resolved(cfg)
    options = options_of(config)
    for name in ("num_samples", "threads"):
        check_count(name, config[name])
    if config["steps"] is not None:
        check_count("steps", config["steps"])
    torch.set_num_threads(config["threads"])
    team = Team()
    what = subject(config["model"], config["sampler"])
    steps = config["steps"] or what.steps
    folder = Path(config["out"]) if config["out"] else FOLDER / file_name(f"{what.name}-{what.sampler}")
    console = Console(stderr=True, quiet=not team.leads)
    title = f"{what.name}, {what.sampler}, {steps} steps"
    with announcing(console, title, remaining=True) as progress:
        given = fitting_samples(config["prompts"], config["num_samples"], what)
        foreground = foreground_of(config["foreground"])
        profile = measured(config, what, steps, given, options, folder, team, progress, foreground)
    if profile is not None:
        count = len(profile.spans)
        told = f"{title}: profile of {count} span{'s' * (count > 1)} at scope {profile.scope} in {folder}"
        console.print(Text(told), soft_wrap=True)


def measured(
    config: Mapping[str, Any],
    what: "Subject",
    steps: int,
    given: "Sequence[Given]",
    options: "Options",
    folder: Path,
    team: "Team",
    progress: "Progress",
    foreground: "Tensor | Literal['motion'] | None" = None,
) -> "Profile | None":
    """The profile of the model of a configuration, made by a team and saved in a folder; None on all but its leader."""
    from ..evaluation.subjects import batches_of
    from ..profiling.measure import measure

    profile = measure(
        batches_of(what, steps),
        given,
        options,
        foreground=foreground,
        guidance=guidance_of(config["model"]),
        settings={"model": config["model"], "sampler": config["sampler"]},
        folder=folder,
        overwrite=False,
        rank=team.ranks.index,
        world=team.ranks.count,
        meet=team.meet,
        progress=progress,
    )
    team.meet()
    return profile


def options_of(config: Mapping[str, Any]) -> "Options":
    """What is to be measured.

    Raises:
        ConfigError: for numbers that cannot be.
    """
    from ..profiling.measure import Options

    memory = config["memory"]
    if isinstance(memory, bool) or not isinstance(memory, (int, float)) or not memory > 0:
        raise ConfigError(f"memory must be a number of GiB above 0, not {memory!r}")
    sensitivity = config["sensitivity"]
    if not isinstance(sensitivity, Mapping):
        raise ConfigError(
            f"sensitivity is a group with samples and steps, not {sensitivity!r}: see sensitivity.samples"
        )
    return Options(
        scope=config["scope"],
        depth=config["depth"],
        feature=config["feature"],
        batch=config["batch"],
        sensitivity_samples=sensitivity["samples"],
        sensitivity_steps=sensitivity["steps"],
        attention=bool(config["attention"]),
        attention_offset=config["attention_offset"],
        attention_top=config["attention_top"],
        memory=int(memory * 2**30),
    )


def fitting_samples(prompts: Mapping[str, Any], count: int | None, subject: "Subject") -> list["Given"]:
    """`count` prompts of a `prompts` configuration in turn, with seeds that nothing is evaluated on; None: each once.

    Raises:
        ConfigError: for prompts that do not suit the subject, or cannot be had.
    """
    from ..evaluation.prompts import FITTING_SEEDS, samples

    chosen = samples({**prompts, "n": count, "n_video": None}, subject.classes, subject.video)
    return [(str(sample.prompt), FITTING_SEEDS + sample.seed) for sample in chosen]


def guidance_of(model: Mapping[str, Any]) -> float | None:
    """The guidance scale that a model is called with, where its configuration determines it."""
    if model["kind"] == "shipped":
        from .. import reference

        return reference.spec(model["name"]).guidance
    given = (model.get("call") or {}).get("guidance_scale")
    if given is not None and (isinstance(given, bool) or not isinstance(given, (int, float))):
        raise ConfigError(f"model.call.guidance_scale must be a number, not {given!r}")
    return None if given is None else float(given)


def foreground_of(given: Any) -> "Tensor | Literal['motion'] | None":
    """The foreground that attention is compared with: none, "motion", or the masks in an .npy file of bool values.

    Raises:
        ConfigError: for a file that cannot be read.
    """
    if given is None or given == "motion":
        return given
    import numpy as np
    import torch

    if not isinstance(given, str) or not given.endswith(".npy"):
        raise ConfigError(f"foreground must be null, motion or an .npy file of bool values, not {given!r}")
    try:
        return torch.from_numpy(np.load(given, allow_pickle=False))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"foreground: {given} cannot be read: {error}") from error


def file_name(name: str) -> str:
    return re.sub(r"[^\w.+-]+", "-", name).strip("-.")


@hydra_main(version_base="1.3", config_path=f"pkg://{CONFIGS}", config_name="profile")
def _run(cfg: DictConfig) -> None:
    hydra_app.reported(run_configured, cfg)


def profile(arguments: Iterable[str]) -> None:
    """Run with Hydra's arguments: overrides, -m for a sweep, --cfg job to show the configuration."""
    hydra_app.launch("profile", _run, arguments, GROUPS, COUNTED_BY)
