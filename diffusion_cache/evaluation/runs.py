"""An experiment's finished runs, as the report reads them.

What a run's files say is untrusted: its form is checked here, and text is escaped where it is shown.
"""

import json
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from .. import registry
from ..errors import ConfigError, DiffusionCacheWarning
from .contenders import DEFAULT_SCOPE, Call, call_of
from .store import CONFIG, ENVIRONMENT, IMAGES, ROWS, SUMMARY

KINDS = ("baseline", "ours", "rival")
UNCACHED = "uncached"
RATIOS = ("nfe_ratio", "flops_ratio", "blocks_ratio")
SPEEDS = ("speed_ratio", "speed_low", "speed_high", "cpu_ratio")
RESOURCES = ("seconds", "first_run_seconds", "peak_memory", "cache_bytes", "host_syncs")
SAMPLE_METRICS = ("psnr", "ssim", "lpips")  # per sample, for the strip plots
EQUALS = ("nfe", "speed")  # what runs are compared at: work, or time (`Run.speed`)
# parts of a configuration, alike in runs that are compared
COMPARED = ("model", "sampler", "prompts", "steps", "threads")
STATISTICS = ("mean", "p5")  # of a run's PSNR


@dataclass(frozen=True)
class Score:
    """One metric over a run's samples. se: the mean's standard error; p5: its bad tail, reached or bettered by 95% of
    them; worst_seed: of `worst`.
    """

    mean: float | None = None
    se: float | None = None
    p5: float | None = None
    worst: float | None = None
    worst_seed: int | None = None


@dataclass(frozen=True)
class Samples:
    """What was generated, and each sample's metrics (name → one value per sample, None where there is none)."""

    prompts: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    values: Mapping[str, tuple[float | None, ...]] | None = None


@dataclass(frozen=True)
class Run:
    """A finished run, as read.

    costs: the names of RATIOS, SPEEDS and RESOURCES; all but ratios are None where the run is not correct, and speeds
    where it was not timed.
    conditions: what a run shares with those that it can be compared with, of its configuration, by dotted names.
    scores: Score by metric name; none for random weights. pictures: whether there are images of the median and worst.
    heatmap: {"rows": block names, "computed": shares [steps][blocks]}. call: what does the same without a profile, if
    anything does. cpu_seconds: that making the run took, None if not known.
    """

    folder: Path
    model: str
    sampler: str
    scope: str
    kind: str
    method: str
    settings: Mapping[str, Any]
    conditions: Mapping[str, str]
    steps: int
    n: int
    correct: bool
    problem: str | None
    random_weights: bool
    quality_only: bool
    costs: Mapping[str, float | None]
    scores: Mapping[str, Score]
    distribution: Mapping[str, float | None]
    call: Call | None
    cpu_seconds: float | None
    heatmap: Mapping[str, Any] | None
    samples: Samples
    environment: Mapping[str, Any]
    on_gpu: bool
    pictures: bool

    @property
    def subject(self) -> tuple[str, str]:
        return self.model, self.sampler

    @property
    def family(self) -> tuple[str, str]:
        """Runs of one family differ in their settings only."""
        return self.kind, self.method

    @property
    def is_plan(self) -> bool:
        """Whether it followed a plan of a profile."""
        return follows_plan(self.kind, self.settings)

    @property
    def chooses_plans(self) -> bool:
        """Whether it took one of a profile's plans by the prompt."""
        return picks_by_prompt(self.kind, self.method)

    @property
    def is_fewer_steps(self) -> bool:
        """Whether it is the uncached sampler with fewer steps."""
        return self.kind == "baseline" and self.settings.keys() == {"steps"}

    @property
    def speed(self) -> float | None:
        """What runs are compared by: wall time on a GPU; this process's time on a CPU, which others may share."""
        return self.costs["speed_ratio" if self.on_gpu else "cpu_ratio"]

    @property
    def reused(self) -> float:
        """The share of the steps at which the block that was computed least was not; of unknown blocks, of the work."""
        if self.heatmap is None:
            return 1 - (self.costs["nfe_ratio"] or 0.0)
        return 1 - min(
            fmean(share or 0.0 for share in column) for column in zip(*self.heatmap["computed"], strict=True)
        )

    @property
    def note(self) -> str:
        """What a reader of the figures must know, if anything."""
        if not self.correct:
            return f"incorrect: {self.problem or 'no reason given'}"
        if self.random_weights:
            return "random weights: speed only"
        return "quality only, not timed" if self.quality_only and self.method != UNCACHED else ""

    def score(self, metric: str) -> Score:
        return self.scores.get(metric, Score())

    @property
    def rank(self) -> tuple[float, float] | None:
        """What tells the best of several runs: PSNR, or speed with random weights; None for one that cannot be it."""
        if not self.correct:
            return None
        if self.random_weights:
            return None if self.speed is None else (self.speed, 0.0)
        psnr = self.score("psnr")
        return None if psnr.mean is None else (psnr.mean, -math.inf if psnr.p5 is None else psnr.p5)


@dataclass(frozen=True)
class Experiment:
    """runs: in the order of the tables. left_out: one sentence for each run that could not be read. unfinished: how
    many there are.
    """

    name: str
    runs: tuple[Run, ...]
    left_out: tuple[str, ...] = ()
    unfinished: int = 0

    @property
    def subjects(self) -> list[tuple[str, str]]:
        """(model, sampler) of the runs, those with trained weights first."""
        found = sorted({(run.random_weights, run.subject) for run in self.runs})
        return list(dict.fromkeys(subject for _, subject in found))

    def of(self, subject: tuple[str, str]) -> list[Run]:
        return [run for run in self.runs if run.subject == subject]


def follows_plan(kind: str, settings: Mapping[str, Any]) -> bool:
    """Whether a run with these settings followed a plan of a profile."""
    return kind == "ours" and "plan" in settings


def picks_by_prompt(kind: str, method: str) -> bool:
    """Whether a run took one of a profile's plans by the prompt."""
    systems = registry.systems
    return kind == "ours" and method in systems.names() and systems.get(method).by_prompt


def extremes(psnr: Sequence[float | None]) -> dict[str, int]:
    """Which of the samples pictures are kept of: the worst and the (lower) median one; None counts as the best."""
    order = sorted(range(len(psnr)), key=lambda i: math.inf if (value := psnr[i]) is None else value)
    return {"worst": order[0], "median": order[(len(order) - 1) // 2]}


def psnr_of(run: Run | None, statistic: str) -> float | None:
    """statistic: mean or p5."""
    return None if run is None else getattr(run.score("psnr"), statistic)


def settings_text(run: Run, scope: bool = True) -> str:
    """Settings in few words, the scope among them if asked for; a mask of 0 and 1 as the number of its ones."""

    def short(value: Any) -> str:
        text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
        if len(text) > 8 and set(text) <= {"0", "1"}:
            return f"{text.count('1')} of {len(text)} steps"
        return text if len(text) <= 60 else f"{text[:59]}…"

    parts = [f"{key}={short(value)}" for key, value in run.settings.items()]
    told = scope and run.scope not in ("", DEFAULT_SCOPE) and run.kind != "baseline"
    return ", ".join([f"scope={run.scope}"] * told + parts)


class DamagedError(Exception):
    """A file of a run that is not as it should be; the message names it."""


def read_experiment(folder: Path) -> Experiment:
    """The finished runs of an experiment's folder; unfinished ones (`*.partial`) are passed over.

    Raises:
        ConfigError: if it is no such folder, or holds no finished run that can be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder: give one that `diffusion-cache evaluate` wrote")
    home = folder / "runs"
    places = sorted(path for path in home.iterdir() if path.is_dir()) if home.is_dir() else []
    finished = [path for path in places if path.suffix != ".partial"]
    unfinished, places = len(places) - len(finished), finished
    if not places:
        raise ConfigError(
            f"{folder} holds no finished runs (folders in {home}): run `diffusion-cache evaluate` first, or give "
            "the folder that holds `runs`"
        )
    runs, left_out = [], []
    for place in places:
        try:
            runs.append(read_run(place))
        except DamagedError as error:
            left_out.append(f"{error}; delete the folder {place} and run the same sweep again to redo it")
            warnings.warn(f"a run is left out of the report: {left_out[-1]}", DiffusionCacheWarning, stacklevel=3)
    if not runs:
        raise ConfigError(f"none of the {len(places)} runs in {home} can be read. The first: {left_out[0]}")
    ordered = tuple(sorted(_told_apart(runs), key=_order))
    return Experiment(folder.resolve().name, ordered, tuple(left_out), unfinished)


def _told_apart(runs: Sequence[Run]) -> list[Run]:
    """The runs, the names of models extended by the conditions that not all of a subject's runs share."""
    found: dict[tuple[str, str], dict[str, set[str]]] = {}
    for run in runs:
        values = found.setdefault(run.subject, {})
        for name, value in run.conditions.items():
            values.setdefault(name, set()).add(value)
    named = []
    for run in runs:
        varying = [name for name, values in found[run.subject].items() if len(values) > 1 and name in run.conditions]
        named.append(replace(run, model=" ".join([run.model, *(f"{name}={run.conditions[name]}" for name in varying)])))
    return named


def _conditions(config: Mapping[str, Any]) -> dict[str, str]:
    found: dict[str, Any] = {}
    for name in COMPARED:
        part = config.get(name)
        found |= {f"{name}.{key}": value for key, value in part.items()} if isinstance(part, Mapping) else {name: part}
    metrics = config.get("metrics")
    settings = metrics.get("settings") if isinstance(metrics, Mapping) else None
    found["metrics.settings"] = json.dumps(settings or {}, sort_keys=True)
    return {  # options are compared as a whole: not all runs name the same ones
        name: value if isinstance(value, str) else json.dumps(None if value == {} else value, sort_keys=True)
        for name, value in found.items()
    }


def _order(run: Run) -> tuple[Any, ...]:
    """Models with trained weights first; of each baselines (uncached leading), ours, rivals; of each the most work."""
    nfe = run.costs["nfe_ratio"]
    return (
        run.random_weights,
        run.subject,
        KINDS.index(run.kind),
        run.method != UNCACHED,
        run.method,
        run.scope,
        math.inf if nfe is None else -nfe,
        json.dumps(run.settings, sort_keys=True),
        run.folder.name,
    )


def read_run(folder: Path) -> Run:
    """One finished run. Raises DamagedError, naming the file, for one that is missing, cut off or incomplete."""
    summary = _json_object(folder / SUMMARY)
    try:
        kind = summary["kind"]
        if kind not in KINDS:
            raise ValueError(f"kind is {kind!r}, not one of {', '.join(KINDS)}")
        correct, random_weights = bool(summary["correct"]), bool(summary["random_weights"])
        device = str(summary["device"])
        metrics = {} if random_weights else summary["metrics"]
        run = Run(
            folder=folder,
            kind=kind,
            **{key: str(summary[key]) for key in ("model", "sampler", "scope", "method")},
            settings=dict(summary["settings"]),
            conditions={**_conditions(_json_object(folder / CONFIG)), "device": device},
            steps=int(summary["steps"]),
            n=int(summary["n"]),
            correct=correct,
            problem=None if summary["problem"] is None else str(summary["problem"]),
            random_weights=random_weights,
            quality_only=bool(summary["quality_only"]),
            costs={
                **{key: _number(summary[key]) for key in RATIOS},
                **{key: _number(summary.get(key)) if correct else None for key in (*SPEEDS, *RESOURCES)},
            },
            scores={name: _score(name, facts) for name, facts in metrics.items()},
            distribution={key: _number(value) for key, value in (summary.get("distribution") or {}).items()},
            call=_call(folder / CONFIG, int(summary["steps"])),
            cpu_seconds=_number(summary.get("cpu_seconds")),
            heatmap=_heatmap(summary.get("heatmap")),
            samples=_samples(folder / ROWS),
            environment=_json_object(folder / ENVIRONMENT),
            on_gpu=device != "cpu",
            pictures=not random_weights and _pictures(folder / IMAGES),
        )
    except KeyError as error:
        raise DamagedError(f"{folder / SUMMARY} lacks {error.args[0]!r}") from None
    except (TypeError, ValueError, AttributeError) as error:
        raise DamagedError(f"{folder / SUMMARY} is damaged: {error}") from None
    return run


def _json_object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DamagedError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise DamagedError(f"{path} is damaged: {error}") from None
    if not isinstance(found, dict):
        raise DamagedError(f"{path} is damaged: it holds no JSON object")
    return found


def _call(path: Path, steps: int) -> Call | None:
    config = _json_object(path)
    try:
        return call_of(config["contender"], steps)
    except KeyError as error:
        raise DamagedError(f"{path} lacks {error.args[0]!r}") from None
    except (TypeError, ValueError, AttributeError) as error:
        raise DamagedError(f"{path} is damaged: {error}") from None


def _number(value: Any) -> float | None:
    """A finite number, or None for null and for what JSON cannot hold."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{value!r} is not a number")
    return float(value) if math.isfinite(value) else None


def _score(name: str, facts: Mapping[str, Any]) -> Score:
    """A missing PSNR where samples equal their reference is an infinite one, which JSON cannot hold."""
    infinite = name.startswith("psnr") and bool(facts.get("identical"))
    found = {key: _number(facts.get(key)) for key in ("mean", "p5", "worst")}
    se = _number(facts.get("se"))
    if infinite:
        found = {key: math.inf if value is None else value for key, value in found.items()}
    seed = facts.get("worst_seed")
    return Score(**found, se=se, worst_seed=None if seed is None else int(seed))


def _heatmap(facts: Any) -> dict[str, Any] | None:
    if facts is None or not facts["computed"]:
        return None
    rows = [str(row) for row in facts["rows"]]
    computed = [[_number(share) for share in step] for step in facts["computed"]]
    if any(len(step) != len(rows) for step in computed):
        raise ValueError("heatmap has not one value for each block")
    return {"rows": rows, "computed": computed}


def _samples(path: Path) -> Samples:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise DamagedError(f"{path} is damaged or missing: {str(error).splitlines()[0]}") from None
    if not table.num_rows:
        return Samples()
    columns = set(table.column_names)
    missing = [name for name in ("prompt", "seed") if name not in columns]
    if missing:
        raise DamagedError(f"{path} lacks the column {missing[0]!r}")
    try:
        values = {name: _floats(table.column(name).to_pylist()) for name in SAMPLE_METRICS if name in columns}
        seeds = tuple(int(seed) for seed in table.column("seed").to_pylist())
    except (TypeError, ValueError) as error:
        raise DamagedError(f"{path} is damaged: {error}") from None
    return Samples(tuple(str(prompt) for prompt in table.column("prompt").to_pylist()), seeds, values)


def _floats(values: Iterable[Any]) -> tuple[float | None, ...]:
    """Unlike JSON, parquet holds infinity; NaN is no value."""
    return tuple(None if value is None or math.isnan(value) else float(value) for value in values)


def _pictures(path: Path) -> bool:
    """Whether there are pictures; the file's header is checked, the pixels are read when they are drawn."""
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        return False
    try:
        with safe_open(path, "np") as file:
            shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise DamagedError(f"{path} is damaged: {error}") from None
    for place in ("median", "worst"):
        shape = shapes.get(f"{place}.reference")
        if shape is None or shape != shapes.get(f"{place}.candidate") or len(shape) != 4 or shape[1] not in (1, 3):
            raise DamagedError(f"{path} is damaged: the images of the {place} sample are missing or of no known shape")
    return True
