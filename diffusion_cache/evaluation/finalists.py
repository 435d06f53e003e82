"""Finalists: of a finished comparison, the settings that were near the best, to be run again on more samples."""

import csv
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..advice import TOLERANCE
from ..errors import ConfigError
from .contenders import DEFAULT_SCOPE, Contender, Uncached
from .report import BUDGETS
from .runs import STATISTICS, UNCACHED, follows_plan, picks_by_prompt

SUMMARY = "summary.csv"
NEEDED = ("model", "sampler", "kind", "method", "scope", "settings", "nfe_ratio", "speed_ratio", "cpu_ratio", "correct")
COLUMNS = tuple(f"psnr_{statistic}" for statistic in STATISTICS)
Key = tuple[str, str, str, str]  # kind, method, scope, settings


@dataclass(frozen=True)
class _Row:
    """One correct run of a summary. is_plan: of the model's own, or one of them by the prompt. speeds: by wall and by
    CPU time, as far as it was timed.
    """

    key: Key
    is_plan: bool
    nfe: float
    speeds: Mapping[str, float]
    psnr: Mapping[str, float]


def finalists(summary: Path, model: str, sampler: str, within: float, each: bool = False) -> frozenset[Key]:
    """What to run again of all that follows no plan, on one model and sampler.

    At each of the report's budgets, of the runs that spend no more or are as fast as the best plan there, those whose
    mean or 5th percentile of PSNR is at most `within` dB below the best; and of those that spend no more, the best of
    each baseline and of the rivals.

    Args:
        summary: a report's `summary.csv`, or the folder that it is in.
        each: the best of each method as well, of each rival and of plans of coded features too.

    Raises:
        ConfigError: for a file that is none, or that has no such runs.
    """
    path = summary / SUMMARY if summary.is_dir() else summary
    rows = [row for row in _rows(path, model, sampler) if len(row.psnr) == len(COLUMNS)]
    others = [row for row in rows if not row.is_plan]
    if not others:
        raise ConfigError(
            f"{path} has no correct runs of {model} with {sampler}, apart from plans: evaluate all methods on it "
            "first, or leave finalists.of out"
        )
    kept: set[Key] = set()
    for budget in BUDGETS.values():
        affordable = [row for row in rows if row.nfe <= budget * TOLERANCE]
        plan = max((row for row in affordable if row.is_plan), key=_mean, default=None)
        as_fast = [row for row in others if plan is not None and _as_fast(row, plan)]
        for pool in ([row for row in affordable if not row.is_plan], as_fast):
            for statistic in STATISTICS:
                best = max((row.psnr[statistic] for row in pool), default=0.0)
                kept |= {row.key for row in pool if row.psnr[statistic] >= best - within}
        groups: dict[tuple[str, ...], list[_Row]] = {}
        for row in affordable:
            kind, method, *_ = row.key
            if each or kind == "baseline":
                groups.setdefault((kind, method), []).append(row)
            if kind == "rival":
                groups.setdefault((kind,), []).append(row)
        kept |= {max(group, key=_mean).key for group in groups.values()}
    return frozenset(kept)


def keeps(found: frozenset[Key], what: Contender) -> bool:
    """Whether a contender is among them; the uncached run and plans always are, but for plans of coded features."""
    if isinstance(what, Uncached):
        return True
    if "plan" in what.settings and "cache_dtype" not in what.settings:
        return True
    return (what.kind, what.method, what.scope or DEFAULT_SCOPE, _text(what.settings)) in found


def _mean(row: _Row) -> float:
    return row.psnr["mean"]


def _as_fast(row: _Row, plan: _Row) -> bool:
    return any(row.speeds[clock] * TOLERANCE >= plan.speeds[clock] for clock in row.speeds.keys() & plan.speeds.keys())


def _rows(path: Path, model: str, sampler: str) -> list[_Row]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            missing = [name for name in (*NEEDED, *COLUMNS) if name not in (reader.fieldnames or ())]
            if missing:
                raise ConfigError(
                    f"{path} has no column {missing[0]!r}: finalists.of takes the summary.csv of a report"
                )
            return [
                _row(line)
                for line in reader
                if (line["model"], line["sampler"]) == (model, sampler) and line["correct"] == "true"
                if line["nfe_ratio"] and line["method"] != UNCACHED
            ]
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise ConfigError(f"cannot read {path}, which finalists.of names: {error}") from error


def _row(line: Mapping[str, str]) -> _Row:
    settings = json.loads(line["settings"])
    return _Row(
        (line["kind"], line["method"], line["scope"], _text(settings)),
        follows_plan(line["kind"], settings) or picks_by_prompt(line["kind"], line["method"]),
        float(line["nfe_ratio"]),
        {clock: float(line[clock]) for clock in ("speed_ratio", "cpu_ratio") if line[clock]},
        {name: float(line[column]) for name, column in zip(STATISTICS, COLUMNS, strict=True) if line[column]},
    )


def _text(settings: Mapping[str, Any]) -> str:
    return json.dumps(settings, sort_keys=True)
