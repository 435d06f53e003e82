"""`diffusion-cache train-router`: Hydra's command line over the training of a router."""

import math
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra import main as hydra_main
from hydra.core.config_store import ConfigStore
from matplotlib.figure import Figure
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.text import Text

from .. import registry
from ..errors import ConfigError, DiffusionCacheWarning
from ..plain import check_count
from ..processes import accelerator
from . import hydra_app
from .hydra_app import CONFIGS, resolved

if TYPE_CHECKING:
    from torch import Tensor

    from ..evaluation.subjects import Subject
    from ..plan import Plan
    from ..profile import Profile
    from ..profiling.measure import Given, MakeBatch, Progress
    from ..routers import Recipe
    from ..routers.training import Clean, Samples

GROUPS = ("launcher",)
COUNTED_BY = "profile.num_samples, training.trajectories, training.held_out and held_out"
FOLDER = Path("routers-local")
PRECISIONS = ("no", "fp16", "bf16")
# fitting seeds of routers: those of a profile come first, each seed of a training has a million of its own
ROUTER_SEEDS = 1_000_000
HELD_OUT = 900_000  # of them, those that a plan's quality is measured on


def register_routers() -> None:
    """Offer all registered ways to train a router as options of the group `router`."""
    store = ConfigStore.instance()
    for name in registry.routers.names():
        node = OmegaConf.create({"name": name, **registry.routers.options(name)})
        store.store(group="router", name=name, node=node)


def run_configured(cfg: DictConfig) -> None:
    """One job of a sweep."""
    import torch

    from ..evaluation.jobs import Team
    from ..evaluation.subjects import batches_of, quieten_libraries, subject
    from ..profile import Profile
    from ..profiling.measure import Options
    from ..routers.training import MOST_HELD_OUT, Settings, train
    from .profile import file_name, fitting_samples, measured
    from .progress import announcing

    quieten_libraries()
    config = resolved(cfg)
    _check_numbers(config)
    recipe, settings = recipe_of(config["router"]), Settings(compute=config["compute"], **config["training"])
    torch.set_num_threads(config["threads"])
    launched = accelerator(config["mixed_precision"])
    team = Team()
    what = subject(config["model"], config["sampler"])
    title = f"{what.name}, {what.sampler}, {config['steps']} steps, {recipe.name}"
    name = file_name(f"{what.name}-{what.sampler}-{config['steps']}-{config['scope']}")
    folder = Path(config["out"]) if config["out"] else FOLDER / name
    given = config["profile"]
    options = Options(
        config["scope"],
        config["depth"],
        batch=given["batch"],
        sensitivity_samples=given["sensitivity"]["samples"],
        sensitivity_steps=given["sensitivity"]["steps"],
    )
    console = Console(stderr=True, quiet=not team.leads)
    learned_from = settings.trajectories * settings.batch
    counts = learned_from, settings.held_out, config["held_out"]
    with announcing(console, title) as progress:
        fitting = fitting_samples(config["prompts"], given["num_samples"], what)
        profile = measured(config, what, config["steps"], fitting, options, folder, team, progress)
        result = train(
            batches_of(what, config["steps"]),
            samples := training_samples(config["prompts"], what, settings.seed, counts),
            profile or Profile.load(folder),
            recipe,
            settings,
            folder=(work := folder / _run_name(recipe, settings)),
            clean=clean_latents(config["model"], samples),
            accelerator=launched,
            progress=progress,
        )
        if profile is not None:
            given = samples(range(HELD_OUT, HELD_OUT + config["held_out"]))
            # the samples that weights are fitted on come after those of the trajectories
            numbers = [*range(settings.held_out), *range(MOST_HELD_OUT, MOST_HELD_OUT + sum(counts[:2]))]
            learned = None if what.classes else {prompt for prompt, _ in samples(numbers)}
            plan = stated(result.plan, profile, batches_of(what, config["steps"]), given, learned, progress)
    if profile is not None:
        profile.with_plan(plan).save(folder)
        picture = work / "curves.png"
        figure(plan, result.log, [span.name for span in profile.spans]).savefig(picture)
        assert plan.quality is not None
        told = (
            f"{title}: error {result.error:.4f}, {plan.quality.mean:.1f} dB on average and {plan.quality.p5:.1f} dB or "
            f"more for 95% of {plan.quality.n} held-out samples, at {plan.nfe / plan.total:.1%} of the compute.\n"
            f"Plan {plan.name!r} in {folder}, curves in {picture}"
        )
        console.print(Text(told), soft_wrap=True)


def stated(
    plan: "Plan",
    profile: "Profile",
    make_batch: "MakeBatch",
    given: "Sequence[Given]",
    learned: Collection[str] | None,
    progress: "Progress",
) -> "Plan":
    """The plan with its quality and speed on samples that nothing was learned from.

    learned: texts that the router was trained on or chosen by, which are no prompts held out, nor are the profile's;
    None for samples of classes.
    """
    from ..planning.build import Planner
    from ..profiling.generation import teach
    from ..routers.training import parts

    teachers = [teach(make_batch(part)) for part in parts(given, profile)]
    seeds = [seed for _, seed in given]
    seen = {prompt for prompt, _ in profile.samples}.union(learned or ())
    texts = None if learned is None else len({prompt for prompt, _ in given} - seen)
    return Planner(profile, teachers[0], teachers[0], teachers, seeds, progress=progress, prompts=texts).measured(plan)


def recipe_of(config: Mapping[str, Any]) -> "Recipe":
    """The router that a `router` configuration describes.

    Raises:
        ConfigError: for options that cannot be.
    """
    options = {name: value for name, value in config.items() if name != "name"}
    cls = registry.routers.get(config["name"])
    registry.check_options(config["name"], cls, options)
    return cls(**options)


def training_samples(
    prompts: Mapping[str, Any], subject: "Subject", seed: int, counts: Sequence[int] = (1, 1, 1)
) -> "Samples":
    """Prompts of a configuration in turn, with fitting seeds that no other part of this package uses.

    counts: of samples that the router is trained on, chosen by, and held out of both, by which texts are shared out
    among the three; each has those of all, with a warning, where there are fewer than three.
    """
    from ..routers.training import MOST_HELD_OUT
    from .plan import shared_out
    from .profile import fitting_samples

    known = [prompt for prompt, _ in fitting_samples({**prompts, "n": None}, None, subject)]
    few = len(set(known)) < len(counts)
    if few and not subject.classes:
        warnings.warn(
            f"{len(set(known))} prompts are too few to train on some and hold others out: what the plan states is of "
            f"other seeds of these. Give at least {len(counts)}, with prompts=file prompts.path=…",
            DiffusionCacheWarning,
            stacklevel=2,
        )
    shared = few or bool(subject.classes)
    trained, chosen, held_out = [known] * 3 if shared else shared_out([*dict.fromkeys(known)], counts)

    def samples(numbers: Sequence[int]) -> "Sequence[Given]":
        first, found = ROUTER_SEEDS * (2 + seed), []
        for number in numbers:
            own = chosen if number < MOST_HELD_OUT else trained if number < HELD_OUT else held_out
            found.append((own[number % len(own)], first + number))
        return found

    return samples


def clean_latents(model: Mapping[str, Any], samples: "Samples") -> "Clean | None":
    """Training images of the samples' classes; None for models that none are at hand for."""
    from .. import reference
    from ..reference.data import digits_of

    if model["kind"] != "shipped" or reference.spec(model["name"]).objective != "v":
        return None

    def clean(numbers: Sequence[int]) -> "Tensor":
        given = samples(numbers)
        return digits_of([int(label) for label, _ in given], [seed for _, seed in given])

    return clean


def _run_name(recipe: "Recipe", settings: Any) -> str:
    compute = "free" if settings.compute is None else f"{settings.compute:g}"
    return f"{recipe.name}-{compute}-seed{settings.seed}"


def _check_numbers(config: Mapping[str, Any]) -> None:
    for name in ("threads", "steps", "held_out"):
        check_count(name, config[name])
    compute = config["compute"]
    if compute is not None and (isinstance(compute, bool) or not isinstance(compute, (int, float))):
        raise ConfigError(f"compute must be a number or null, not {compute!r}")
    if config["mixed_precision"] not in PRECISIONS:
        raise registry.unknown_name("mixed_precision", config["mixed_precision"], PRECISIONS)


def figure(plan: "Plan", log: Sequence[Mapping[str, Any]], spans: Sequence[str]) -> Figure:
    """The training's curves, and the schedule as a map of step × span."""
    drawn = Figure(figsize=(12, 3.6), layout="constrained", dpi=120)
    axes = drawn.subplots(1, 4, width_ratios=(1, 1, 1, 1.6))
    for axis, (key, label) in zip(
        axes, (("loss", "loss"), ("error", "error of the hard schedule"), ("compute", "compute kept")), strict=False
    ):
        points = [(row["trajectory"], row[key]) for row in log if row.get(key) is not None]
        axis.plot(*zip(*points, strict=True), marker="." if len(points) < 30 else None)
        axis.set(xlabel="trajectory", title=label)
        if key != "compute":
            axis.set_yscale("log")
    computed = plan.computed()[:, 0].T
    axes[3].imshow(computed.expand(len(spans), -1).numpy(), aspect="auto", cmap="Greys", vmin=0, vmax=1)
    every = math.ceil(len(spans) / 12)
    axes[3].set_yticks(range(0, len(spans), every), list(spans[::every]), fontsize=6)
    axes[3].set(xlabel="step", title=f"computed (black), {plan.name}")
    return drawn


@hydra_main(version_base="1.3", config_path=f"pkg://{CONFIGS}", config_name="train_router")
def _run(cfg: DictConfig) -> None:
    hydra_app.reported(run_configured, cfg)


def train_router(arguments: Iterable[str]) -> None:
    """Run with Hydra's arguments: overrides, -m for a sweep, --cfg job to show the configuration."""
    register_routers()
    hydra_app.launch("train_router", _run, arguments, GROUPS, COUNTED_BY)
