"""The demo: the shipped models with and without caching, measured side by side.

Every choice (mask spacing, thresholds) is made on fitting seeds; every figure comes from other, reporting seeds. All
methods start from the same noise per seed, and each budget also shows the plain alternative: fewer sampler steps for
the same arithmetic.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text
from torch import Tensor

import diffusion_cache as dc

from .. import reference
from ..errors import ConfigError
from ..evaluation import environment
from ..evaluation.prompts import FITTING_SEEDS, check_reported
from ..evaluation.subjects import Shipped
from ..measure import count_blocks, executed_flops, paired, psnr, quality
from ..planning.choose import choose
from ..profile import Profile, shipped_profiles
from .figures import model_figure, overview_figure
from .page import html_page
from .results import ModelResult, Panel, Row
from .tables import markdown_table, overview_markdown, rich_table
from .writing import check_writable, write

INTERVALS = (2, 3)  # the budgets: one computed step in 2, in 3
FITTING_SAMPLES, THRESHOLD_SAMPLES, CONTROL_SAMPLES, SHOWN_SAMPLES = 2, 2, 1, 10
# how the computed steps of a mask crowd: above 1 towards the start of the run, below 1 towards its end
SPACINGS = (0.5, 1.0, 1.6)
THRESHOLDS = (1e-3, 4.0)  # from nearly always computing to nearly never
BISECTIONS = 4
REUSE, TAYLOR = {"forecaster": "reuse"}, {"forecaster": "taylor", "order": 1}
FEWER_STEPS, UNIFORM_REUSE, UNIFORM_TAYLOR = "fewer steps", "uniform, reuse", "uniform, Taylor"
SPACED_TAYLOR, FIRST_BLOCK, PLAN = "spaced, Taylor", "first block", "plan"
FOCUS = (PLAN, SPACED_TAYLOR)  # the method whose images are shown, at the smallest budget: the first that there is
OTHER_FOLDER = "folder with --out"
STAGES = 3 + 6 * len(INTERVALS)


@dataclass(frozen=True)
class Settings:
    """What to measure. steps: sampler steps (None: each model's own); pairs: timed pairs of runs of timed_samples."""

    samples: int = 10
    seed: int = 0
    steps: int | None = None
    pairs: int = 2
    timed_samples: int = 1

    def __post_init__(self) -> None:
        for name, least in (("samples", 1), ("seed", 0), ("steps", 4), ("pairs", 1), ("timed_samples", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name} must be at least {least}, not {value}")
        check_reported(self.seed, self.samples)


@dataclass(frozen=True)
class Method:
    """Options of `dc.enable`, and the same with every step computed.

    adaptive: decides from the features, so samples run one by one and cannot sway one another's decisions.
    """

    label: str
    options: Mapping[str, Any]
    control: Mapping[str, Any]
    adaptive: bool = False


@dataclass(frozen=True)
class Samples:
    labels: tuple[int, ...]
    seeds: tuple[int, ...]

    @classmethod
    def numbered(cls, count: int, first_seed: int) -> "Samples":
        """`count` samples with consecutive seeds, going round the ten classes."""
        return cls(tuple(index % 10 for index in range(count)), tuple(range(first_seed, first_seed + count)))

    def first(self, count: int) -> "Samples":
        return Samples(self.labels[:count], self.seeds[:count])

    def singles(self) -> "list[Samples]":
        return [Samples((label,), (seed,)) for label, seed in zip(self.labels, self.seeds, strict=True)]


@dataclass(frozen=True)
class Generation:
    """Images [n, frames, 1, h, w] in [0, 1] and the work they took.

    nfe: steps whose cached spans were computed; blocks: executed blocks; both are means over pipeline calls.
    flops: executed operations, in total.
    """

    images: Tensor
    nfe: float
    blocks: float
    flops: float


class Subject:
    """A shipped model's pipeline, run for `steps` sampler steps."""

    def __init__(self, name: str, steps: int | None = None):
        self.spec = reference.spec(name)
        self.steps = steps or self.spec.steps
        shipped = Shipped(name)
        self.pipe, self.blocks = shipped.pipe, list(shipped.blocks.values())

    def call(self, samples: Samples, steps: int | None = None) -> Tensor:
        """Images [n, frames, 1, h, w] of the pipeline as it stands."""
        inputs = reference.inputs(self.spec.name, samples.labels, samples.seeds, steps or self.steps)
        return reference.images(self.spec.name, self.pipe(**inputs))

    def cached_call(self, options: Mapping[str, Any], samples: Samples) -> Tensor:
        with dc.cached(self.pipe, **options):
            return self.call(samples)

    def generate(self, samples: Samples, steps: int | None = None) -> Generation:
        """Generate without a cache and count the work."""
        with count_blocks(self.blocks) as count:
            images, flops = _with_flops(lambda: self.call(samples, steps))
        return Generation(images, float(steps or self.steps), count.total, flops)

    def generate_cached(self, samples: Samples, options: Mapping[str, Any]) -> Generation:
        """Generate with a cache and count the work."""
        with dc.cached(self.pipe, **options), count_blocks(self.blocks) as count:
            images, flops = _with_flops(lambda: self.call(samples))
            return Generation(images, self._nfe(), count.total, flops)

    def generate_one_by_one(self, samples: Samples, options: Mapping[str, Any], costs: "StepCosts") -> Generation:
        """Generate with a cache, each sample in a call of its own, so that none can sway another's decisions."""
        images, nfe = [], 0.0
        with dc.cached(self.pipe, **options), count_blocks(self.blocks) as count:
            for sample in samples.singles():
                images.append(self.call(sample))
                nfe += self._nfe()
        flops = costs.computed * nfe + costs.reused * (self.steps * len(images) - nfe)
        return Generation(torch.cat(images), nfe / len(images), count.total / len(images), flops)

    def _nfe(self) -> float:
        summary = dc.summary(self.pipe)
        return self.steps * summary.computed / (summary.computed + summary.reused)


def _with_flops(fn: Callable[[], Tensor]) -> tuple[Tensor, int]:
    results: list[Tensor] = []
    flops = executed_flops(lambda: results.append(fn()))
    return results[0], flops


@dataclass(frozen=True)
class StepCosts:
    """Operations of one sample in a step that first-block computes and in one that it reuses, both with its probe.

    There is no third kind of step, so these two and the count of computed steps give the work of any run. Counting
    every run instead would take several times as long as the runs.
    """

    computed: float
    reused: float

    @classmethod
    def of(cls, subject: Subject, sample: Samples) -> "StepCosts":
        computed = subject.generate(sample).flops / subject.steps
        never = subject.generate_cached(sample, {"policy": "first_block", "threshold": math.inf, **TAYLOR})
        return cls(computed, (never.flops - never.nfe * computed) / (subject.steps - never.nfe))


def fit_spacing(subject: Subject, fitting: Samples, uncached: Tensor, computed: int) -> float:
    """The exponent of SPACINGS whose mask, with Taylor-1, comes closest to the uncached images (mean PSNR)."""

    def score(exponent: float) -> float:
        options = {"policy": "spaced", "share": computed / subject.steps, "exponent": exponent}
        images = subject.cached_call({**options, **TAYLOR}, fitting)
        return psnr(images, uncached).mean().item() if torch.isfinite(images).all() else -math.inf

    return max(SPACINGS, key=score)


def fit_thresholds(subject: Subject, fitting: Samples, costs: StepCosts, shares: Sequence[float]) -> list[float]:
    """For each share, the first-block threshold whose operations come closest to that share of the uncached run's.

    Bisection on the logarithm: a higher threshold reuses more. What was tried for one share serves the others too.
    """
    tried: dict[float, float] = {}
    full = costs.computed * subject.steps * len(fitting.seeds)

    def work(threshold: float) -> float:
        if threshold not in tried:
            options = {"policy": "first_block", "threshold": threshold, **TAYLOR}
            tried[threshold] = subject.generate_one_by_one(fitting, options, costs).flops / full
        return tried[threshold]

    for share in shares:
        low, high = THRESHOLDS
        for _ in range(BISECTIONS):
            middle = math.sqrt(low * high)
            low, high = (middle, high) if work(middle) > share else (low, middle)
    return [min(tried, key=lambda threshold: abs(tried[threshold] - share)) for share in shares]


def budget_methods(subject: Subject, every: int, spacing: float, threshold: float) -> tuple[Method, ...]:
    """The cached rows of one budget."""
    steps, computed = subject.steps, math.ceil(subject.steps / every)
    always = {"policy": "interval", "every": 1}
    uniform = {"policy": "interval", "every": every}
    spaced = {"policy": "spaced", "share": computed / steps, "exponent": spacing, **TAYLOR}
    first_block = {"policy": "first_block", "threshold": threshold, **TAYLOR}
    return (
        Method(UNIFORM_REUSE, {**uniform, **REUSE}, {**always, **REUSE}),
        Method(UNIFORM_TAYLOR, {**uniform, **TAYLOR}, {**always, **TAYLOR}),
        Method(SPACED_TAYLOR, spaced, {**spaced, "share": 1.0}),
        Method(FIRST_BLOCK, first_block, {**first_block, "threshold": 0.0}, adaptive=True),
        *planned_method(subject, computed),
    )


def planned_method(subject: Subject, computed: int) -> tuple[Method, ...]:
    """The best plan of so many evaluations, where the model has a shipped profile of so many steps."""
    name = f"{subject.spec.name}-{subject.spec.samplers[0]}"
    folder = shipped_profiles().get(name)
    if folder is None or (profile := Profile.load(folder)).total != subject.steps:
        return ()
    options = {"profile": name, "plan": choose(profile.plans, nfe=computed).name}
    return (Method(PLAN, options, {**options, "max_reused": 0}),)


@dataclass(frozen=True)
class Budget:
    """One budget of one model. share: the share of the uncached operations that every row may spend."""

    every: int
    share: float
    spacing: float
    threshold: float


def fit_budgets(subject: Subject, fitting: Samples, costs: StepCosts, progress: Callable[[str], None]) -> list[Budget]:
    """Choose what has to be chosen, on fitting samples. A budget's share is what uniform reuse spends."""
    progress("fitting the spacing")
    uncached = subject.call(fitting)
    spacings = [fit_spacing(subject, fitting, uncached, math.ceil(subject.steps / every)) for every in INTERVALS]

    progress("fitting the thresholds")
    full = costs.computed * subject.steps
    uniform = [{"policy": "interval", "every": every, **REUSE} for every in INTERVALS]
    shares = [subject.generate_cached(fitting.first(1), options).flops / full for options in uniform]
    thresholds = fit_thresholds(subject, fitting.first(THRESHOLD_SAMPLES), costs, shares)
    return [Budget(*fitted) for fitted in zip(INTERVALS, shares, spacings, thresholds, strict=True)]


def altering_methods(subject: Subject, samples: Samples, methods: Sequence[Method]) -> set[str]:
    """Labels of the methods that change the output although they compute every step."""
    uncached = subject.call(samples)
    return {m.label for m in methods if not torch.equal(subject.cached_call(m.control, samples), uncached)}


def measure_model(settings: Settings, name: str, progress: Callable[[str], None]) -> ModelResult:
    """All rows of one model; `progress` is told what comes next, STAGES times."""
    progress("uncached")
    subject = Subject(name, settings.steps)
    reporting = Samples.numbered(settings.samples, settings.seed)
    fitting = Samples.numbered(FITTING_SAMPLES, settings.seed + FITTING_SEEDS)
    timed = reporting.first(settings.timed_samples)
    uncached = subject.generate(reporting)
    costs = StepCosts.of(subject, fitting.first(1))
    budgets = fit_budgets(subject, fitting, costs, progress)
    rows: list[Row] = []
    images: dict[tuple[str, int], Tensor] = {}

    def add(
        label: str,
        every: int,
        options: Mapping[str, Any],
        run: Generation,
        timed_call: Callable[[], object],
        problem: str | None = None,
    ) -> None:
        finite = bool(torch.isfinite(run.images).all())
        problem = problem if finite else "the output contains NaN or infinite values"
        # all of this has run before; what is left to warm up, the median forgives
        timing = None if problem else paired(partial(subject.call, timed), timed_call, settings.pairs, warmup=0)
        images[label, every] = run.images
        rows.append(
            Row(
                label=label,
                every=every,
                options=options,
                nfe=run.nfe,
                blocks=run.blocks / uncached.blocks,
                flops=run.flops / uncached.flops,
                quality=quality(run.images, uncached.images) if finite else None,
                timing=timing,
                problem=problem,
            )
        )

    altering: set[str] | None = None
    for budget in budgets:
        progress(f"{FEWER_STEPS}, 1 in {budget.every}")
        steps = max(1, round(subject.steps * budget.share))
        run = subject.generate(reporting, steps)
        add(FEWER_STEPS, budget.every, {"num_inference_steps": steps}, run, partial(subject.call, timed, steps))
        methods = budget_methods(subject, budget.every, budget.spacing, budget.threshold)
        if altering is None:  # a method's control is the same at every budget
            altering = altering_methods(subject, fitting.first(CONTROL_SAMPLES), methods)
        for method in methods:
            progress(f"{method.label}, 1 in {budget.every}")
            if method.adaptive:
                run = subject.generate_one_by_one(reporting, method.options, costs)
            else:
                run = subject.generate_cached(reporting, method.options)
            problem = "with every step computed, the output differs from the uncached one"
            add(
                method.label,
                budget.every,
                method.options,
                run,
                partial(subject.cached_call, method.options, timed),
                problem if method.label in altering else None,
            )

    focus = next(row for label in FOCUS for row in reversed(rows) if row.label == label)
    return ModelResult(
        name=name,
        pipeline=subject.spec.pipeline,
        sampler=subject.spec.samplers[0],
        steps=subject.steps,
        guidance=subject.spec.guidance,
        labels=reporting.labels,
        reporting_seeds=reporting.seeds,
        fitting_seeds=fitting.seeds,
        fitted={
            f"{what}, 1 in {budget.every}": value
            for budget in budgets
            for what, value in (("spacing exponent", budget.spacing), ("first-block threshold", budget.threshold))
        },
        rows=tuple(rows),
        focus=focus,
        panels=tuple(
            Panel(label, _shown(shown))
            for label, shown in (
                ("uncached", uncached.images),
                (focus.label, images[focus.label, focus.every]),
                (FEWER_STEPS, images[FEWER_STEPS, focus.every]),
            )
        ),
    )


def _shown(images: Tensor) -> Tensor:
    """The middle frame of the first samples, [n, 1, h, w]."""
    return images[:SHOWN_SAMPLES, images.shape[1] // 2]


def run_demo(models: Sequence[str], out: Path, settings: Settings, console: Console) -> list[ModelResult]:
    """Measure the models, write pictures, page and figures under `out`, and print a table per model.

    Raises:
        ConfigError: for settings that cannot work, or a folder that cannot be written to.
    """
    check_writable(out, OTHER_FOLDER)
    bars = (TextColumn("{task.fields[model]}"), BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    results = []
    with Progress(*bars, console=console) as progress:
        tasks = [progress.add_task("waiting", model=name, total=STAGES, start=False) for name in models]
        for name, task in zip(models, tasks, strict=True):
            progress.start_task(task)
            # the first message begins stage 0, so nothing is finished then
            progress.update(task, completed=-1)

            def announce(stage: str, task: TaskID = task) -> None:
                progress.update(task, advance=1, description=stage)

            results.append(measure_model(settings, name, announce))
            progress.update(task, completed=STAGES, description="done")

    facts = {
        "versions": environment.versions(),
        "hardware": f"{environment.cpu_name()}, PyTorch threads: {torch.get_num_threads()}",
        "settings": {"samples": settings.samples, "pairs": settings.pairs, "timed_samples": settings.timed_samples},
    }
    for result in results:
        console.print(rich_table(result))
    pictures = {result.name: model_figure(result) for result in results}
    overview = overview_figure(results)
    summary = {**facts, "models": [result.to_json() for result in results]}
    overall = overview_markdown(results, (FEWER_STEPS, UNIFORM_REUSE, UNIFORM_TAYLOR, PLAN))
    made: dict[str, bytes | str] = {
        "summary.json": json.dumps(summary, indent=2, allow_nan=False) + "\n",
        "table.md": f"{overall}\n{markdown_table(results)}",
        **{f"{name}.png": png for name, png in pictures.items()},
        "demo.png": overview,
        "index.html": html_page(results, facts, overview, pictures),
    }
    for name, data in made.items():
        write(out / name, data, OTHER_FOLDER)
    console.print(Text(f"Picture: {out / 'demo.png'}\nPage:    {out / 'index.html'}"), soft_wrap=True)
    return results
