"""Finished runs as a CSV file, Markdown tables and a web page.

What a run's files say is untrusted text: prompts, labels, settings and names are escaped where they are shown.
"""

import csv
import io
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from ..advice import GOOD_NOTE, TOLERANCE, Pick, call_text, loss
from ..errors import ConfigError
from ..files import written
from .choices import picks, picks_text
from .runs import (
    EQUALS,
    KINDS,
    RATIOS,
    RESOURCES,
    SPEEDS,
    STATISTICS,
    UNCACHED,
    Experiment,
    Run,
    psnr_of,
    read_experiment,
    settings_text,
)

BUDGETS = {"1/2": 1 / 2, "1/3": 1 / 3, "1/4": 1 / 4, "1/5": 1 / 5}  # shares of the uncached run's denoiser evaluations
ABSENT = "–"
BUDGET_NOTE = f"a budget may be exceeded by up to {TOLERANCE - 1:.0%}"

NOTES = (
    "NFE: denoiser evaluations, FLOPs: operations that really ran, both as a share of the uncached run; "
    f"{BUDGET_NOTE}. Speed: wall "
    "time of the uncached run over this one's, median of pairs that take turns in one process (smallest to largest "
    "pair). PSNR in dB and SSIM: against the uncached output of the same noise, unquantised; at least 95% of the "
    "samples reach p5, which of 20 samples or fewer is the worst. A sample equal to its reference has infinite PSNR, "
    "and then so has the mean."
)

MARGINS_NOTE = (
    "PSNR in dB, mean / 5th percentile. Others are all that follow no plan, baselines and our own methods as well as "
    "rivals, and of each the best setting, which may be another one for the 5th percentile. At equal NFE all may "
    f"exceed the budget by {TOLERANCE - 1:.0%}, but the plan behind a margin spends no more than the other, or the "
    "least of all plans where each spends more (and need not be the plan shown); at equal speed others are as fast as "
    "the plan shown, less the same share for what timing misses by, whatever their NFE. Speeds are compared by wall "
    "time on a GPU, and by this process's time on a CPU. "
    "Margin: the plan's PSNR less the other's."
)

CHOICES_NOTE = (
    "Baselines and methods of this package that need no profile: of each model the one that is best by the statistic "
    f"named, within a limit of work (NFE) or of time that all may miss by {TOLERANCE - 1:.0%}; settings were "
    "chosen on the samples shown. PSNR in dB, mean / 5th percentile. Where a grid had thresholds, the call names the "
    "share of steps that was reused: `target_reuse` finds the threshold for it on the user's own model, with a few "
    "generations, once. Fewer steps: the best of the sampler without a cache within the limit. Plan: the best of the "
    "model's own profile within it, and by how much the method falls short of that (above it, if negative). For "
    "several models it is, of the settings that were run on all of them, the one whose greatest loss against the best "
    f"of each is least. `diffusion_cache.recommend` goes by the rows for work and p5. {GOOD_NOTE}"
)


@dataclass(frozen=True)
class ReportPaths:
    csv: Path
    markdown: Path
    html: Path
    environment: Path
    margins: Path
    advice: Path


def write_report(folder: Path, out: Path | None = None) -> ReportPaths:
    """Write what is known of an experiment's finished runs: tables as CSV, Markdown and a web page, and the advice.

    Args:
        folder: the experiment's folder, which holds `runs/`.
        out: where to write; made if need be. Default: `folder`.

    A run that cannot be read is left out, with a DiffusionCacheWarning; the report says so too.

    Raises:
        ConfigError: if there is nothing to report, `out` cannot be written to, or plotly is missing (everything but
            the page is written then).
    """
    experiment = read_experiment(folder)
    out = Path(folder if out is None else out)
    names = ("summary.csv", "report.md", "report.html", "environment.json", "margins.csv", "advice.json")
    paths = ReportPaths(*(out / name for name in names))
    environments = merged_environments(experiment.runs)
    try:
        out.mkdir(parents=True, exist_ok=True)
        _write(paths.csv, csv_text(experiment.runs))
        _write(paths.margins, margins_text(margins(experiment.runs)))
        _write(paths.advice, picks_text(picks(experiment.runs)))
        _write(paths.markdown, markdown(experiment))
        _write(paths.environment, json.dumps(environments, indent=2) + "\n")
        from .report_page import page  # after the rest is written: it needs an optional package

        _write(paths.html, page(experiment, environments))
    except OSError as error:
        raise ConfigError(f"cannot write the report to {out}: {error.strerror}; choose another folder") from error
    return paths


def _write(path: Path, text: str) -> None:
    with written(path) as draft:
        draft.write_text(text, encoding="utf-8", newline="\n")


# choosing


def pareto_front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """For each (cost, quality), whether no other point costs no more, is no worse, and is better in one of the two."""
    return [
        not any(c <= cost and q >= quality and (c, q) != (cost, quality) for c, q in points) for cost, quality in points
    ]


def pareto_runs(runs: Sequence[Run]) -> set[Path]:
    """Folders of the runs on their model's, sampler's and method's Pareto front of mean PSNR against NFE."""
    groups: dict[tuple[Any, ...], list[tuple[Run, tuple[float, float]]]] = {}
    for run in runs:
        nfe, psnr = run.costs["nfe_ratio"], run.score("psnr").mean
        if run.correct and nfe is not None and psnr is not None:
            groups.setdefault((run.subject, run.family), []).append((run, (nfe, psnr)))
    found = set()
    for members in groups.values():
        front = pareto_front([point for _, point in members])
        found |= {run.folder for (run, _), on_front in zip(members, front, strict=True) if on_front}
    return found


def choose(runs: Sequence[Run], ratio: float) -> list[Run]:
    """Of each method, the best run that spends at most `ratio` (times TOLERANCE) of the uncached run's evaluations.

    Best is the highest mean PSNR; of random weights, where the cheapest would always win, it is the run nearest to the
    budget. A method without any correct run is shown by its first. Order: baselines, then the others, best first.

    Args:
        runs: of one model and sampler.
        ratio: the budget, as an NFE ratio.
    """
    families: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        if run.method != UNCACHED:
            families.setdefault(run.family, []).append(run)
    chosen = []
    for members in families.values():
        nfes = [(run, run.costs["nfe_ratio"]) for run in members if run.rank is not None]
        affordable = [run for run, nfe in nfes if nfe is not None and nfe <= ratio * TOLERANCE]
        if affordable:
            chosen.append(max(affordable, key=_worth))
        elif not any(run.correct for run in members):
            chosen.append(members[0])
    worst = (-math.inf, -math.inf)
    score = {run.folder: run.rank or worst for run in chosen}
    return sorted(chosen, key=lambda run: (run.kind != "baseline", *(-value for value in score[run.folder])))


def _worth(run: Run) -> tuple[float, ...]:
    rank = run.rank or (-math.inf, -math.inf)
    return (run.costs["nfe_ratio"] or 0.0, *rank) if run.random_weights else rank


def best_of(chosen: Sequence[Run]) -> Run | None:
    """The best of the runs that were chosen for a budget."""
    ranked = [run for run in chosen if run.rank is not None]
    return max(ranked, key=lambda run: run.rank or (0.0, 0.0), default=None)


@dataclass(frozen=True)
class Margin:
    """The best plan within a budget against the best other runs.

    budget: its name. plan: the best within the budget times TOLERANCE. others, plans: by (what is equal, statistic of
    PSNR), the best other and the plan that is compared with it. At equal "nfe" others spend at most the budget times
    TOLERANCE, and the plan at most what the other does (or as little as any); at equal "speed" others were measured to
    be at least as fast as `plan`, or slower by no more than TOLERANCE. None where there is no such run.
    """

    subject: tuple[str, str]
    budget: str
    plan: Run | None
    others: Mapping[tuple[str, str], Run | None]
    plans: Mapping[tuple[str, str], Run | None]

    def decibels(self, equal: str, statistic: str) -> float | None:
        """By how much the plan's PSNR is above the other's; None where either is missing."""
        plan, other = (psnr_of(runs[equal, statistic], statistic) for runs in (self.plans, self.others))
        if plan is None or other is None:
            return None
        return 0.0 if plan == other else plan - other  # infinite ones may be equal, too


def margins(runs: Sequence[Run], budgets: Mapping[str, float] = BUDGETS) -> list[Margin]:
    """One for each budget of each model and sampler that has plans, those with random weights left out.

    Others are all correct runs that follow no plan, whatever their kind; the best by mean need not be that by p5.
    """
    found = []
    for subject in dict.fromkeys(run.subject for run in runs if run.is_plan and not run.random_weights):
        ranked = [run for run in runs if run.subject == subject and run.rank is not None and not run.random_weights]
        others = [run for run in ranked if not (run.is_plan or run.chooses_plans)]
        for name, ratio in budgets.items():
            made = [run for run in ranked if run.is_plan and _spends_at_most(ratio * TOLERANCE, run)]
            plan = best_of(made)
            speed = None if plan is None else plan.speed
            pools = {
                "nfe": [run for run in others if _spends_at_most(ratio * TOLERANCE, run)],
                "speed": [run for run in others if speed is not None and (run.speed or 0.0) * TOLERANCE >= speed],
            }
            best = {(equal, by): _best_by(by, pools[equal]) for equal in EQUALS for by in STATISTICS}
            plans = {key: plan if key[0] == "speed" else _matching(made, other) for key, other in best.items()}
            found.append(Margin(subject, name, plan, best, plans))
    return found


def _matching(plans: Sequence[Run], other: Run | None) -> Run | None:
    """The best plan that spends no more than the other run; where each spends more, the one that spends least."""
    if other is None:
        return best_of(plans)
    within = [run for run in plans if _spends_at_most((other.costs["nfe_ratio"] or 0.0) * (1 + 1e-6), run)]
    return best_of(within) or min(plans, key=lambda run: run.costs["nfe_ratio"] or 0.0, default=None)


def _best_by(statistic: str, runs: Sequence[Run]) -> Run | None:
    scored = [(value, run) for run in runs if (value := psnr_of(run, statistic)) is not None]
    return max(scored, key=lambda pair: pair[0])[1] if scored else None


def _spends_at_most(most: float, run: Run) -> bool:
    nfe = run.costs["nfe_ratio"]
    return nfe is not None and nfe <= most


# values of a table

OWN_COLUMNS = ("psnr", "ssim", "latent_error", "lpips", "class_correct")  # the last one's mean is `class_accuracy`


def further_columns(runs: Iterable[Run]) -> dict[str, tuple[str, str]]:
    """The (metric, statistic) of columns that only some experiments have: of LPIPS the bad tail, of metrics that
    `csv_row` has no column for the mean.
    """
    found = sorted({name for run in runs for name in run.scores})
    columns = {f"{name}_mean": (name, "mean") for name in found if name not in OWN_COLUMNS}
    tail = {f"lpips_{statistic}": ("lpips", statistic) for statistic in ("p5", "worst")}
    return columns | (tail if "lpips" in found else {})


def csv_row(run: Run, pareto: bool, further: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
    """One run's figures by column name; None where there is none. further: `further_columns`, which come last."""
    psnr, ssim = run.score("psnr"), run.score("ssim")
    return {
        "model": run.model,
        "sampler": run.sampler,
        "scope": run.scope,
        "kind": run.kind,
        "method": run.method,
        "settings": json.dumps(run.settings, sort_keys=True),
        "steps": run.steps,
        **{key: run.costs[key] for key in (*RATIOS, *SPEEDS, *RESOURCES)},
        "psnr_mean": psnr.mean,
        "psnr_se": psnr.se,
        "psnr_p5": psnr.p5,
        "psnr_min": psnr.worst,
        "psnr_worst_seed": psnr.worst_seed,
        "ssim_mean": ssim.mean,
        "ssim_p5": ssim.p5,
        "latent_error": run.score("latent_error").mean,
        "lpips_mean": run.score("lpips").mean,
        **{key: run.distribution.get(key) for key in ("fid", "kid", "class_accuracy")},
        "n": run.n,
        "correct": run.correct,
        "problem": run.problem,
        "random_weights": run.random_weights,
        "note": run.note,
        "git": run.environment.get("git"),
        "pareto": pareto,
        "run": run.folder.name,
        **{column: getattr(run.score(metric), statistic) for column, (metric, statistic) in further.items()},
    }


def csv_text(runs: Sequence[Run]) -> str:
    """The runs as CSV, floats with six significant digits, infinity as inf."""
    pareto = pareto_runs(runs)
    further = further_columns(runs)
    rows = [csv_row(run, run.folder in pareto, further) for run in runs]
    return _csv(list(rows[0]), [list(row.values()) for row in rows])


def margins_text(found: Sequence[Margin]) -> str:
    """Margins as CSV, a row for each of the four others."""
    sides = ("kind", "method", "settings", "nfe_ratio", "speed", "psnr", "run")
    names = ["model", "sampler", "budget", "equal", "statistic", "margin"]
    names += [f"{side}_{name}" for side in ("plan", "other") for name in sides]
    rows = []
    for margin in found:
        for (equal, statistic), other in margin.others.items():
            row = [*margin.subject, margin.budget, equal, statistic, margin.decibels(equal, statistic)]
            rows.append(row + _side(margin.plans[equal, statistic], statistic) + _side(other, statistic))
    return _csv(names, rows)


def _side(run: Run | None, statistic: str) -> list[Any]:
    if run is None:
        return [None] * 7
    told = [run.kind, run.method, json.dumps(run.settings, sort_keys=True)]
    return [*told, run.costs["nfe_ratio"], run.speed, psnr_of(run, statistic), run.folder.name]


def _csv(names: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(names)
    writer.writerows([_csv_cell(value) for value in row] for row in rows)
    return buffer.getvalue()


def _csv_cell(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.6g}"
    return "" if value is None else str(value)


def _decibels(value: float | None, sign: str = "") -> str:
    """sign: "+" for one before positive values, too."""
    if value is None:
        return ABSENT
    return f"{value:{sign}.1f}".replace("inf", "∞")


def _speed(run: Run) -> str:
    median, low, high = (run.costs[key] for key in ("speed_ratio", "speed_low", "speed_high"))
    if median is None:
        return ABSENT
    return f"{median:.2f}×" + ("" if low is None or high is None else f" ({low:.2f}–{high:.2f})")


def _times(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.2f}×"


def _share(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.0%}"


# Markdown


def markdown(experiment: Experiment) -> str:
    """Compact tables over all models, of the plans' margins and of what to take without one, then each model's own."""
    parts = [f"# {markdown_text(experiment.name)}", ""]
    for remark in remarks(experiment):
        parts += [markdown_text(remark), ""]
    table = overview_table(experiment.runs)
    if table:
        caption = "PSNR in dB, mean / 5th percentile, of each method's best setting within the NFE budget"
        parts += [table, f"{caption}; {BUDGET_NOTE}.", ""]
    table = margins_table(margins(experiment.runs))
    if table:
        parts += ["## Plans against the best other", "", table, MARGINS_NOTE, ""]
    parts += choices_section(experiment.runs)
    for subject in experiment.subjects:
        parts += [model_table(experiment.of(subject)), ""]
    parts += [NOTES, ""]
    if experiment.left_out:
        parts += [f"Left out, {len(experiment.left_out)} run(s) that cannot be read:", ""]
        parts += [f"- {markdown_text(reason)}" for reason in experiment.left_out] + [""]
    return "\n".join(parts)


def remarks(experiment: Experiment) -> list[str]:
    """What is missing in an experiment, and what its runs do not have in common."""
    found = []
    if experiment.unfinished:
        found.append(f"{experiment.unfinished} run(s) are unfinished: the same command goes on with them.")
    trained = [run for run in experiment.runs if not run.random_weights]
    families = [family for family in dict.fromkeys(run.family for run in trained) if family[1] != UNCACHED]
    for subject in dict.fromkeys(run.subject for run in trained):
        there = {run.family for run in trained if run.subject == subject}
        absent = [
            f"{method} (rival)" if kind == "rival" else method
            for kind, method in families
            if (kind, method) not in there
        ]
        if absent:
            names = ", ".join(absent)
            found.append(f"{', '.join(subject)}: nothing of {names}, which do not serve the model or were not run.")
    for name, values in merged_environments(experiment.runs)["varies"].items():
        told = ", ".join(f"{one['runs']} with {one['value']}" for one in values[:4])
        found.append(f"Not all runs were made with the same {name}: {told}{', …' if len(values) > 4 else ''}.")
    return found


def overview_table(runs: Sequence[Run], budgets: Mapping[str, float] = BUDGETS) -> str:
    """Methods × (models × budgets): mean PSNR / p5 in dB; the best mean of each column stands out.

    Models with random weights, whose images mean nothing, are left out; "" if there are no others.
    """
    trained = [run for run in runs if not run.random_weights]
    subjects = list(dict.fromkeys(run.subject for run in trained))
    if not subjects:
        return ""
    several = {model for model, count in Counter(model for model, _ in subjects).items() if count > 1}
    cells: dict[tuple[str, str], dict[int, str]] = {}
    headers: list[str] = []
    for model, sampler in subjects:
        of_subject = [run for run in trained if run.subject == (model, sampler)]
        for name, ratio in budgets.items():
            column = len(headers)
            headers.append(f"{model}{f' {sampler}' if model in several else ''}, {name}")
            chosen = choose(of_subject, ratio)
            best = best_of(chosen)
            for run in chosen:
                psnr = run.score("psnr")
                text = f"{_decibels(psnr.mean)} / {_decibels(psnr.p5)}" if run.correct else "incorrect"
                cells.setdefault(run.family, {})[column] = f"**{text}**" if run is best else text
    order = sorted(cells, key=lambda family: (KINDS.index(family[0]), family[1]))
    lines = ["| method | kind | " + " | ".join(map(markdown_text, headers)) + " |"]
    lines.append("| --- | --- |" + " ---: |" * len(headers))
    for kind, method in order:
        values = [cells[kind, method].get(column, ABSENT) for column in range(len(headers))]
        lines.append("| " + " | ".join([markdown_text(method), kind, *values]) + " |")
    return "\n".join([*lines, ""])


def margins_table(found: Sequence[Margin]) -> str:
    """Of each model, sampler and budget, the plan and the best others by mean and p5; "" if there are no plans."""
    if not found:
        return ""
    names = ["model", "budget", "plan", "NFE", "speed", "PSNR"]
    names += ["best other at equal NFE", "margin", "best other at equal speed", "margin"]
    lines = ["| " + " | ".join(names) + " |", "| --- | --- | --- | ---: | ---: | ---: | --- | ---: | --- | ---: |"]
    for margin in found:
        plan = margin.plan
        cells = [markdown_text(", ".join(margin.subject)), margin.budget]
        if plan is None:
            cells += [ABSENT] * 4
        else:
            cells += [markdown_text(str(plan.settings["plan"])), _share(plan.costs["nfe_ratio"]), _times(plan.speed)]
            cells.append(_both(psnr_of(plan, statistic) for statistic in STATISTICS))
        for equal in EQUALS:
            cells.append(_others(margin, equal))
            cells.append(_both((margin.decibels(equal, statistic) for statistic in STATISTICS), "+"))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def _both(values: Iterable[float | None], sign: str = "") -> str:
    return " / ".join(_decibels(value, sign) for value in values)


def _others(margin: Margin, equal: str) -> str:
    """The best by mean, and that by p5 if it is another, each with what it spends or how fast it is."""
    found = {statistic: margin.others[equal, statistic] for statistic in STATISTICS}
    told = []
    for run in found.values():
        if run is not None:
            cost = _share(run.costs["nfe_ratio"]) if equal == "nfe" else _times(run.speed)
            told.append(f"{markdown_text(run.method)} {cost}")
    psnr = _both(psnr_of(run, statistic) for statistic, run in found.items())
    return f"{psnr}: {'; '.join(dict.fromkeys(told))}" if told else ABSENT


class ChoicesTable(NamedTuple):
    """Plain text. The column `CALL` holds code."""

    title: str
    columns: tuple[str, ...]
    rows: list[list[str]]


def choices_tables(runs: Sequence[Run]) -> list[ChoicesTable]:
    """What to take for each model and for several at once, at equal work and at equal time; none that is empty."""
    found, tables = picks(runs), []
    for equal, limit in (("nfe", "so much less work"), ("speed", "so much less time")):
        at_equal = sorted((pick for pick in found if pick.equal == equal), key=_choices_order)
        each = [pick for pick in at_equal if pick.kind is not None and len(pick.measured) == 1]
        shared = [pick for pick in at_equal if pick not in each]
        tables.append(ChoicesTable(f"Each model, {limit}", EACH, [_choice_for_one(pick) for pick in each]))
        tables.append(ChoicesTable(f"Several models, {limit}", SHARED, [_choice_for_all(pick) for pick in shared]))
    return [table for table in tables if table.rows]


CALL = "call"
_CHOICE = ("speedup", "best by", "method", CALL)
EACH = ("model", *_CHOICE, "NFE", "speed", "PSNR", "fewer steps", "plan", "short of the plan")
SHARED = ("model is", *_CHOICE, "greatest loss", "PSNR on each model (and loss)")


def _choices_order(pick: Pick) -> tuple[Any, ...]:
    return pick.kind is None, [(one.model, one.sampler) for one in pick.measured], pick.speedup, pick.by


def _choice(pick: Pick) -> list[str]:
    named = ", ".join(filter(None, (pick.method, pick.settings)))
    return [f"{pick.speedup:g}×", pick.by, named if pick.good else f"none is good; {named}", call_text(pick.call)]


def _choice_for_one(pick: Pick) -> list[str]:
    (one,) = pick.measured
    chosen, plan = one.chosen, one.plan
    speed = _times(chosen.speed)
    psnr = [_both((run.mean, run.p5)) if run else ABSENT for run in (chosen, one.fewer_steps, plan)]
    short = ABSENT if plan is None else _decibels(loss(plan, chosen, pick.by))
    return [f"{one.model}, {one.sampler}", *_choice(pick), _share(chosen.work), speed, *psnr, short]


def _choice_for_all(pick: Pick) -> list[str]:
    figures = [
        f"{one.model}, {one.sampler} {_both((one.chosen.mean, one.chosen.p5))} "
        f"({_decibels(loss(one.best, one.chosen, pick.by))})"
        for one in pick.measured
    ]
    return [pick.kind or "like none of these", *_choice(pick), _decibels(pick.loss), "; ".join(figures)]


def choices_section(runs: Sequence[Run]) -> list[str]:
    """The lines of the section on what to take without a profile; none if there is nothing."""
    lines = []
    for title, columns, rows in choices_tables(runs):
        lines += [f"### {title}", "", "| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
        call = columns.index(CALL)
        for row in rows:
            cells = [_code(cell) if place == call else markdown_text(cell) for place, cell in enumerate(row)]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return ["## What to take without a profile", "", CHOICES_NOTE, "", *lines] if lines else []


def _code(text: str) -> str:
    """As code, where nothing in it could end that."""
    return markdown_text(text) if set(text) & set("`|\n") else f"`{text}`"


def model_table(runs: Sequence[Run], budgets: Mapping[str, float] = BUDGETS) -> str:
    """A section with one model's and sampler's table: at each NFE budget the best run of every method."""
    first = runs[0]
    random = all(run.random_weights for run in runs)
    said = "random weights: speed only" if random else f"n = {max(run.n for run in runs)}"
    steps = max(run.steps for run in runs)
    names = ["budget", "method", "kind", "settings", "NFE", "FLOPs", "speed (wall)"]
    names += ["PSNR mean", "PSNR p5", "PSNR worst", "SSIM"]
    lines = [f"## {markdown_text(first.model)}, {markdown_text(first.sampler)}, {steps} steps", "", f"{said}.", ""]
    lines.append("| " + " | ".join(names) + " |")
    lines.append("| " + " | ".join("---" if name in names[:4] else "---:" for name in names) + " |")
    lines += [_table_row("1", run) for run in runs if run.method == UNCACHED]
    for name, ratio in budgets.items():
        chosen = choose(runs, ratio)
        best = best_of(chosen)
        lines += [_table_row(name, run, bold=run is best) for run in chosen]
    flawed = Counter((run.method, run.note) for run in runs if not run.correct)
    notes = [
        f"- {markdown_text(method)}, {count} run{'s' if count > 1 else ''}: {markdown_text(note)}"
        for (method, note), count in flawed.items()
    ]
    return "\n".join([*lines, *([""] * bool(notes)), *notes])


def _table_row(budget: str, run: Run, bold: bool = False) -> str:
    psnr, ssim = run.score("psnr"), run.score("ssim").mean
    cells = [
        budget,
        markdown_text(run.method),
        run.kind,
        markdown_text(settings_text(run)) or ABSENT,
        _share(run.costs["nfe_ratio"]),
        _share(run.costs["flops_ratio"]),
        _speed(run) if run.correct else "incorrect",
        *(_decibels(value) for value in (psnr.mean, psnr.p5, psnr.worst)),
        ABSENT if ssim is None else f"{ssim:.3f}",
    ]
    if bold:
        cells = [f"**{cell}**" if cell != ABSENT else cell for cell in cells]
    return "| " + " | ".join(cells) + " |"


def markdown_text(text: str) -> str:
    """Untrusted text for a Markdown table's cell: shown as it is, on one line, never as markup."""
    text = escape(" ".join(text.split()), quote=False)
    text = re.sub(r"([\\`*\[\]|~$])", r"\\\1", text)
    return re.sub(r"(?<!\w)_|_(?!\w)", r"\_", text)


# environment


def _flat(facts: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by the names that lead to them."""
    found: dict[str, Any] = {}
    for key, value in facts.items():
        if isinstance(value, Mapping) and value:
            found |= _flat(value, f"{prefix}{key}{_SEPARATOR}")
        else:
            found[f"{prefix}{key}"] = value
    return found


def merged_environments(runs: Sequence[Run]) -> dict[str, Any]:
    """What the runs were made with.

    Returns:
        {"runs": how many, "cpu_minutes": that making them took where all of them say, "environment": what all of them
        share, "varies": {dotted key: [{"value", "runs"}, …]}}, the value that most runs have first.
    """
    facts_of = [_flat(run.environment) for run in runs]
    keys = list(dict.fromkeys(key for facts in facts_of for key in facts))
    common: dict[str, Any] = {}
    varies: dict[str, list[dict[str, Any]]] = {}
    for key in keys:
        counted = Counter(json.dumps(facts[key], sort_keys=True) for facts in facts_of if key in facts)
        values = [{"value": json.loads(text), "runs": count} for text, count in counted.most_common()]
        if len(values) > 1 or values[0]["runs"] < len(facts_of):
            varies[key] = values
            continue
        place = common
        *path, last = key.split(_SEPARATOR)
        for name in path:
            place = place.setdefault(name, {})
        place[last] = values[0]["value"]
    took = [run.cpu_seconds for run in runs]
    return {
        "runs": len(facts_of),
        "cpu_minutes": None if None in took else round(sum(seconds or 0.0 for seconds in took) / 60, 1),
        "environment": common,
        "varies": {key.replace(_SEPARATOR, "."): v for key, v in varies.items()},
    }


_SEPARATOR = "\0"  # joins nested keys, which may themselves hold dots
