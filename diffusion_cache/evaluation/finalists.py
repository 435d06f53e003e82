"""Finalists: of a finished comparison, the settings that were near the best, to be run again on more samples."""

import csv
import json
from collections.abc import Iterable, Mapping
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
    """One correct run of a summary. speeds: by wall and by CPU time, as far as it was timed."""

    key: Key
    is_plan: bool
    nfe: float
    speeds: Mapping[str, float]
    psnr: Mapping[str, float]


def finalists(summary: Path, model: str, sampler: str, within: float) -> frozenset[Key]:
    """What to run again of all that follows no plan, on one model and sampler.

    At each of the report's budgets, of the runs that spend no more or are as fast as the best plan there, those whose
    mean or 5th percentile of PSNR is at most `within` dB below the best; and of those that spend no more, the best of
    each baseline and of the rivals.

    Args:
        summary: a report's `summary.csv`, or the folder that it is in.

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
        affordable = [row for row in others if row.nfe <= budget * TOLERANCE]
        plans = [row for row in rows if row.is_plan and row.nfe <= budget * TOLERANCE]
        plan = max(plans, key=lambda row: row.psnr["mean"], default=None)
        as_fast = [row for row in others if plan is not None and _as_fast(row, plan)]
        for pool in (affordable, as_fast):
            for statistic in STATISTICS:
                best = max((row.psnr[statistic] for row in pool), default=0.0)
                kept |= {row.key for row in pool if row.psnr[statistic] >= best - within}
        kept |= _best_of_each(affordable)
    return frozenset(kept)


def keeps(found: frozenset[Key], what: Contender) -> bool:
    """Whether a contender is among them; the uncached run and plans always are, but for plans of coded features."""
    if isinstance(what, Uncached):
        return True
    if "plan" in what.settings:
        return "cache_dtype" not in what.settings
    return (what.kind, what.method, what.scope or DEFAULT_SCOPE, _text(what.settings)) in found


def _best_of_each(rows: Iterable[_Row]) -> set[Key]:
    """Of each baseline, and of all rivals together, the best by mean."""
    best: dict[tuple[str, str], _Row] = {}
    for row in rows:
        kind, method, *_ = row.key
        if kind == "ours":
            continue
        group = (kind, method if kind == "baseline" else "")
        if group not in best or row.psnr["mean"] > best[group].psnr["mean"]:
            best[group] = row
    return {row.key for row in best.values()}


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
                if not picks_by_prompt(line["kind"], line["method"])
            ]
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise ConfigError(f"cannot read {path}, which finalists.of names: {error}") from error


def _row(line: Mapping[str, str]) -> _Row:
    settings = json.loads(line["settings"])
    return _Row(
        (line["kind"], line["method"], line["scope"], _text(settings)),
        follows_plan(line["kind"], settings),
        float(line["nfe_ratio"]),
        {clock: float(line[clock]) for clock in ("speed_ratio", "cpu_ratio") if line[clock]},
        {name: float(line[column]) for name, column in zip(STATISTICS, COLUMNS, strict=True) if line[column]},
    )


def _text(settings: Mapping[str, Any]) -> str:
    return json.dumps(settings, sort_keys=True)
