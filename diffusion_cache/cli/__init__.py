"""The command line. Commands import what they need when they run, so that help is quick."""

import dataclasses
import os
from collections import Counter
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ..errors import ConfigError, DiffusionCacheError

if TYPE_CHECKING:
    from ..registry import Registry

LISTED_WIDTH = 160  # of a table that is not shown in a terminal, which knows its own


class _Commands(typer.core.TyperGroup):
    """Shows this package's own errors as a message, not as a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except DiffusionCacheError as error:
            Console(stderr=True).print(f"[bold red]Error:[/] {escape(str(error))}", soft_wrap=True)
            raise typer.Exit(2) from None


app = typer.Typer(
    name="diffusion-cache",
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class Precision(str, Enum):
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


class Listed(str, Enum):
    policies = "policies"
    forecasters = "forecasters"
    correctors = "correctors"
    systems = "systems"
    languages = "languages"
    routers = "routers"
    guards = "guards"
    models = "models"
    profiles = "profiles"
    published = "published"


def _show_version(wanted: bool) -> None:
    if wanted:
        from .. import __version__

        print(__version__)
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", help="Show this package's version.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    """Faster diffusers pipelines by reusing block features between denoising steps."""


# of commands whose arguments Hydra reads
_HYDRA = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}

# options of several commands
_Model = Annotated[
    str | None, typer.Option(help="A shipped model, a diffusers folder, or a repository id. Default: shipped.")
]
_HeldOut = Annotated[int, typer.Option(help="Samples that the stated quality is measured on.")]
_Column = Annotated[str, typer.Option(help="The column of prompts, where --prompts names a table.")]
_Prompts = Annotated[Path | None, typer.Option(help="Prompts to sample: a text, CSV or Parquet file.")]
_Call = Annotated[list[str] | None, typer.Option(help="An argument of the pipeline's call, NAME=VALUE.")]
_Device = Annotated[str, typer.Option(help="auto, or a device of torch; not for shipped models.")]
_Offload = Annotated[str, typer.Option(help="none, model or sequential; not for shipped models.")]
_Threads = Annotated[int | None, typer.Option(help="CPU threads.")]


@app.command("demo")
def _demo(
    model: Annotated[list[str] | None, typer.Option(help="A shipped model; repeat for several. Default: all.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for pictures, page and figures.")] = Path("demo_output"),
    samples: Annotated[int, typer.Option(help="Samples that every figure is computed from.")] = 10,
    threads: Annotated[int, typer.Option(help="CPU threads; models this small gain nothing from more.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the first sample.")] = 0,
    steps: Annotated[int | None, typer.Option(help="Sampler steps. Default: each model's own.")] = None,
    pairs: Annotated[int, typer.Option(help="Timed pairs of runs per row.")] = 2,
) -> None:
    """Measure speed and quality of caching on the shipped models, and draw what comes out."""
    from .. import reference
    from ..evaluation.subjects import quieten_libraries
    from .demo import Settings, run_demo

    quieten_libraries()
    names = [reference.spec(name).name for name in model or reference.MODELS]
    settings = Settings(samples=samples, seed=seed, steps=steps, pairs=pairs)
    _set_threads(threads)
    run_demo(names, out, settings, Console())


@app.command("evaluate", context_settings=_HYDRA)
def _evaluate(context: typer.Context) -> None:
    """Measure quality and speed of methods and rivals: a Hydra command line (-m sweeps, --cfg job, --help)."""
    from .evaluate import evaluate

    evaluate(context.args)


@app.command("profile", context_settings=_HYDRA)
def _profile(context: typer.Context) -> None:
    """Measure what plans are made from, once for a model and sampler: a Hydra command line (--cfg job, --help)."""
    from .profile import profile

    profile(context.args)


@app.command("fit-signal", context_settings=_HYDRA)
def _fit_signal(context: typer.Context) -> None:
    """Fit the polynomial that TeaCache decides by to a model and sampler: a Hydra command line (--cfg job, --help)."""
    from .fit_signal import fit_signal

    fit_signal(context.args)


@app.command("train-router", context_settings=_HYDRA)
def _train_router(context: typer.Context) -> None:
    """Learn a schedule by gradient descent, and store it as a plan: a Hydra command line (--cfg job, --help)."""
    from .train_router import train_router

    train_router(context.args)


@app.command("plan")
def _plan(
    profile: Annotated[Path, typer.Argument(help="A profile: its folder, or the name of a shipped one.")],
    model: _Model = None,
    speedup: Annotated[
        str | None, typer.Option(help="Plans that are measured to be so many times as fast: 2,3.")
    ] = None,
    nfe: Annotated[str | None, typer.Option(help="Plans of at most so many computed steps: 25,17.")] = None,
    min_psnr: Annotated[float | None, typer.Option(help="Plans down to the cheapest with that PSNR, in dB.")] = None,
    runs: Annotated[
        int, typer.Option(help="Cached generations of the fitting samples that the search for a plan may take.")
    ] = 60,
    fitting: Annotated[int, typer.Option(help="Samples to fit on, generated in one call.")] = 32,
    tuning: Annotated[int, typer.Option(help="Samples to choose strengths on, generated in one call.")] = 16,
    held_out: _HeldOut = 64,
    batch: Annotated[int, typer.Option(help="Held-out samples in one call; speed is measured on so many.")] = 8,
    last: Annotated[int, typer.Option(help="Steps at the end that are always computed.")] = 0,
    scope: Annotated[list[str] | None, typer.Option(help="Where to cache; repeat to try several.")] = None,
    guard: Annotated[
        str | None, typer.Option(help="Carry a band of this signal, for enable(guard=…): input_turn or input_l1.")
    ] = None,
    prompts: _Prompts = None,
    column: _Column = "prompt",
    call: _Call = None,
    device: _Device = "auto",
    offload: _Offload = "none",
    threads: _Threads = None,
    out: Annotated[
        Path | None, typer.Option(help="Where to store profile and plans. Default: PROFILE, if it is a folder.")
    ] = None,
) -> None:
    """Make plans from a profile, to a speed, a number of evaluations or a quality, and store them with it."""
    from .interrupts import kept_interrupts
    from .plan import Settings, Wishes, arguments, make_plans, numbers

    wishes = Wishes(numbers(speedup, "--speedup"), numbers(nfe, "--nfe"), min_psnr)
    settings = Settings(
        runs=runs,
        fitting=fitting,
        tuning=tuning,
        held_out=held_out,
        batch=batch,
        last=last,
        scopes=tuple(scope or ()),
        guard=guard,
        prompts=prompts,
        column=column,
        device=device,
        offload=offload,
        call=arguments(call or ()),
    )
    _set_threads(threads)
    try:
        with kept_interrupts():
            make_plans(profile, model, wishes, settings, out, Console())
    except KeyboardInterrupt:
        Console(stderr=True).print("Stopped. Finished plans are kept; the same command goes on from there.")
        raise typer.Exit(130) from None


@app.command("select")
def _select(
    profile: Annotated[Path, typer.Argument(help="A profile with plans: its folder, or the name of a shipped one.")],
    out: Annotated[Path, typer.Option(help="Where to store the profile with its groups of plans.")],
    nfe: Annotated[str, typer.Option(help="Start from its plans of at most so many computed steps: 25,17.")],
    model: _Model = None,
    keep: Annotated[int, typer.Option(help="Plans to choose among, of each number of evaluations.")] = 4,
    fitting: Annotated[int, typer.Option(help="Samples of each prompt to fit on.")] = 8,
    tuning: Annotated[int, typer.Option(help="Samples of each prompt to learn the choice from.")] = 4,
    held_out: _HeldOut = 64,
    batch: Annotated[int, typer.Option(help="Held-out samples in one call.")] = 8,
    prompts: _Prompts = None,
    column: _Column = "prompt",
    call: _Call = None,
    device: _Device = "auto",
    offload: _Offload = "none",
    threads: _Threads = None,
) -> None:
    """Fit plans to kinds of prompts and learn which suits a prompt, for enable(policy="select")."""
    from .interrupts import kept_interrupts
    from .plan import Settings, arguments, numbers
    from .select import Wish, make_selector

    wish = Wish(numbers(nfe, "--nfe"), keep)
    settings = Settings(
        fitting=fitting,
        tuning=tuning,
        held_out=held_out,
        batch=batch,
        prompts=prompts,
        column=column,
        device=device,
        offload=offload,
        call=arguments(call or ()),
    )
    _set_threads(threads)
    try:
        with kept_interrupts():
            make_selector(profile, model, wish, settings, out, Console())
    except KeyboardInterrupt:
        Console(stderr=True).print("Stopped. Groups of plans that were finished are stored.")
        raise typer.Exit(130) from None


@app.command("show")
def _show(
    profile: Annotated[Path, typer.Argument(help="A profile: its folder, or the name of a shipped one.")],
    out: Annotated[Path | None, typer.Option(help="Folder for the pictures. Default: the profile's own.")] = None,
) -> None:
    """Show a profile and its plans: tables, and pictures of what was measured."""
    from .show import show

    show(profile, out, Console())


@app.command("report")
def _report(
    folder: Annotated[Path, typer.Argument(help="What `evaluate` has written: <out>/<name>.")],
    out: Annotated[Path | None, typer.Option(help="Where to write to. Default: the folder itself.")] = None,
) -> None:
    """Write the tables, the CSV file and the page of an evaluation."""
    from ..evaluation.report import write_report

    paths = write_report(folder, out)
    for path in dataclasses.astuple(paths):
        Console().print(Text(str(path)), soft_wrap=True)


@app.command("list")
def _list(what: Annotated[Listed, typer.Argument(help="What to list.")]) -> None:
    """List methods of a kind, guards, or what comes with the package: models, profiles, published figures."""
    tables = {
        Listed.forecasters: _forecasters,
        Listed.guards: _guards,
        Listed.models: _models,
        Listed.profiles: _profiles,
        Listed.published: _published,
        Listed.systems: _systems,
    }
    if what in tables:
        table = tables[what]()
    else:
        from .. import registry

        table = _methods(getattr(registry, what.value))
    table.columns[0].no_wrap = True  # names are there to be copied
    console = Console()
    (console if console.is_terminal else Console(width=LISTED_WIDTH)).print(table)


def _methods(registry: "Registry[Any]") -> Table:
    """The methods of a registry with their options, and their papers where they name them."""
    methods = {name: registry.get(name) for name in registry.names()}
    papers = any(hasattr(method, "paper") for method in methods.values())
    table = Table(registry.kind, *["paper"] * papers, "options", "what it does")
    for name, method in methods.items():
        told = [getattr(method, "paper", "")] * papers
        table.add_row(name, *map(escape, [*told, _options(registry, name), _about(method)]))
    return table


def _forecasters() -> Table:
    """The forecasters with what they keep and promise; with their usual options, where all have one."""
    from ..context import SCOPES
    from ..registry import forecasters

    table = Table("forecaster", "features", "exact degree", "weights", "scopes", "options", "what it does")
    for name in forecasters.names():
        cls = forecasters.get(name)
        kept = degree = "by its options"
        if dataclasses.MISSING not in forecasters.options(name).values():
            kept, degree = str(cls().history), str(cls().exact_degree)
        kept += " and inputs" * cls.keeps_inputs
        scopes = "all" if cls.scopes == frozenset(SCOPES) else ", ".join(sorted(cls.scopes))
        told = kept, degree, "static" if cls.static else "non-linear", scopes
        table.add_row(name, *told, escape(_options(forecasters, name)), escape(_about(cls)))
    return table


def _systems() -> Table:
    """Published systems with their papers and what they serve."""
    from ..registry import systems

    table = Table("system", "paper", "scopes", "for", "needs a profile", "options", "what it does")
    for name in systems.names():
        system = systems.get(name)
        serves = ", ".join(sorted(system.scopes)), ", ".join(sorted(system.denoisers))
        profile = "yes" if system.needs_profile else "no"
        table.add_row(
            name, escape(system.paper), *serves, profile, escape(_options(systems, name)), escape(_about(system))
        )
    return table


def _models() -> Table:
    from .. import reference

    table = Table("model", "pipeline", "samplers", "steps", "guidance")
    for spec in reference.MODELS.values():
        row = (spec.name, spec.pipeline, ", ".join(spec.samplers), str(spec.steps), f"{spec.guidance:g}")
        table.add_row(*row)
    return table


def _guards() -> Table:
    """Options that go with any policy."""
    from ..policies import Guards

    table = Table("guard", "default", caption=" ".join((Guards.__doc__ or "").split()), expand=True)
    for field in dataclasses.fields(Guards):
        table.add_row(field.name, repr(field.default))
    return table


def _profiles() -> Table:
    """Shipped profiles and their plans, for enable(pipe, profile=…)."""
    from ..profile import Profile, shipped_profiles

    table = Table("profile", "denoisers", "scheduler", "steps", "plans")
    for name, folder in shipped_profiles().items():
        profile = Profile.load(folder)
        facts = profile.fingerprint
        classes = ", ".join(denoiser.class_name for denoiser in facts.denoisers.values())
        table.add_row(
            name, classes, facts.scheduler, str(profile.total), ", ".join(plan.name for plan in profile.plans)
        )
    return table


def _published() -> Table:
    """Published figures of real models: those that are ready-made methods, and how many are figures alone."""
    from .. import published

    table = Table("profile", "model", "denoiser", "source")
    figures: Counter[str] = Counter()
    for name in published.names():
        entry = published.load(name)
        try:
            entry.driven()
        except ConfigError:
            figures[entry.method] += 1
            continue
        table.add_row(f"published/{name}", escape(entry.model), entry.transformer or "", escape(entry.source))
    others = ", ".join(f"{method} ({count})" for method, count in figures.items())
    table.caption = (
        "The above for enable(pipe, profile=…). Of these there are figures only, which no policy takes as they are "
        f"(diffusion_cache.published.load): {others}."
    )
    return table


def _options(registry: "Registry[Any]", name: str) -> str:
    """Options with their defaults; one without a default is shown by its name alone."""
    return ", ".join(
        option if default is dataclasses.MISSING else f"{option}={default!r}"
        for option, default in registry.options(name).items()
    )


def _about(method: type) -> str:
    return next(iter((method.__doc__ or "").strip().splitlines()), "")


@app.command("inspect")
def _inspect(
    model: Annotated[str, typer.Argument(help="A shipped model, a diffusers folder, or a repository id.")],
    dtype: Annotated[Precision, typer.Option(help="Precision to load a pipeline in.")] = Precision.bfloat16,
) -> None:
    """Show what can be cached in a pipeline."""
    from .. import api, reference
    from ..evaluation.subjects import quieten_libraries

    quieten_libraries()

    console = Console()
    if model in reference.MODELS:
        if dtype is not Precision.bfloat16:
            raise ConfigError(f"{model} is a shipped model, which takes no --dtype")
        inputs = reference.inputs(model, labels=[0], seeds=[0], steps=4)
        console.print(api.inspect(reference.load(model), inputs))
        return
    console.print(api.inspect(_pretrained(model, dtype, list(reference.MODELS))))


def _pretrained(model: str, dtype: Precision, shipped: list[str]) -> Any:
    """The pipeline in a folder or repository."""
    if not Path(model).is_dir() and "/" not in model:
        from ..registry import unknown_name

        raise unknown_name("model", model, shipped)
    from ..evaluation.subjects import DTYPES, load_pipeline

    return load_pipeline(model, DTYPES[dtype.value])


@app.command("env")
def _env() -> None:
    """Show versions and hardware, for a bug report."""
    import platform

    from ..evaluation import environment

    table = Table(show_header=False, box=None)
    for name, version in environment.versions().items():
        table.add_row(name, version or "not installed")
    table.add_row("platform", platform.platform())
    table.add_row("CPU", f"{environment.cpu_name()}, {environment.cpu_threads()} threads")
    if "OMP_NUM_THREADS" in os.environ:
        table.add_row("OMP_NUM_THREADS", os.environ["OMP_NUM_THREADS"])
    table.add_row("GPU", ", ".join(environment.gpu_names()) or "none found")
    Console().print(table)


def _set_threads(threads: int | None) -> None:
    """None leaves torch's number of CPU threads as it is."""
    if threads is None:
        return
    if threads < 1:
        raise ConfigError(f"threads must be at least 1, not {threads}")
    import torch

    torch.set_num_threads(threads)


def main() -> None:
    """Entry point of the `diffusion-cache` script."""
    app()
