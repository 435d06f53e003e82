"""The demo's figures as tables: in the terminal, in Markdown, and cell by cell for the page."""

import math
from collections.abc import Callable, Sequence
from typing import Literal

from rich import box
from rich.table import Table

from ..measure import Quality
from .results import ModelResult, Row

_ABSENT = "–"


def decibels(value: float) -> str:
    return "∞" if math.isinf(value) else f"{value:.1f}"


def _quality(name: str, show: Callable[[float], str]) -> Callable[[Row], str]:
    return lambda row: _ABSENT if row.quality is None else show(getattr(row.quality, name))


def _speed(name: str) -> Callable[[Row], str]:
    return lambda row: _ABSENT if row.timing is None else f"{getattr(row.timing, name):.2f}×"


COLUMNS: dict[str, Callable[[Row], str]] = {
    "budget": lambda row: f"1 in {row.every}",
    "method": lambda row: row.label,
    "NFE": lambda row: f"{row.nfe:.1f}",
    "blocks": lambda row: f"{row.blocks:.0%}",
    "FLOPs": lambda row: f"{row.flops:.0%}",
    "wall": _speed("wall_ratio"),
    "CPU": _speed("cpu_ratio"),
    "PSNR mean": _quality("psnr_mean", decibels),
    "PSNR p5": _quality("psnr_p5", decibels),
    "PSNR worst": _quality("psnr_worst", decibels),
    "SSIM mean": _quality("ssim_mean", "{:.3f}".format),
    "SSIM worst": _quality("ssim_worst", "{:.3f}".format),
}

NOTES = (
    "NFE: denoiser evaluations whose cached part was computed, mean per sample. Blocks, FLOPs: what really ran, as a "
    "share of the uncached run. Wall, CPU: uncached time over this row's time, median over paired runs that take "
    "turns in one process. PSNR (dB) and SSIM: against the uncached output of the same seed, unquantised; p5 is the "
    "5th percentile. Fewer steps: a shorter sampler run without a cache, at the same FLOPs as the rows below them. "
    "First block (with Taylor, too) pays for its probe at every step. Plan: the best one of the model's shipped "
    "profile that computes no more steps, fitted on other seeds."
)


def scored(rows: Sequence[Row]) -> list[tuple[Row, Quality]]:
    """The rows that have a quality, with it."""
    return [(row, row.quality) for row in rows if row.quality is not None]


def best_rows(rows: Sequence[Row]) -> list[Row]:
    """The row with the highest mean PSNR of each budget."""
    best: dict[int, tuple[Row, Quality]] = {}
    for row, quality in scored(rows):
        if row.every not in best or quality.psnr_mean > best[row.every][1].psnr_mean:
            best[row.every] = row, quality
    return [row for row, _ in best.values()]


def problems(result: ModelResult) -> list[str]:
    """One sentence for each row whose speed is withheld."""
    flawed = (row for row in result.rows if row.problem)
    return [f"{row.label}, 1 in {row.every}: {row.problem}; no speed is reported." for row in flawed]


def rich_table(result: ModelResult) -> Table:
    """The rows of one model; the best mean PSNR of each budget stands out."""
    # tight enough for 80 columns
    table = Table(
        title=f"{result.title}, n = {len(result.reporting_seeds)}",
        caption="\n".join(problems(result)) or None,
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=0,
        show_edge=False,
    )
    for header in COLUMNS:
        justify: Literal["left", "right"] = "left" if header in ("budget", "method") else "right"
        table.add_column(header.replace(" ", "\n"), justify=justify, no_wrap=True)
    best = best_rows(result.rows)
    for row, following in zip(result.rows, (*result.rows[1:], None), strict=True):
        style = "bold green" if any(row is b for b in best) else None
        ends = following is not None and following.every != row.every
        table.add_row(*(cell(row) for cell in COLUMNS.values()), style=style, end_section=ends)
    return table


def overview_markdown(results: Sequence[ModelResult], labels: Sequence[str]) -> str:
    """One row per model and budget: PSNR mean / worst in dB and speed of these methods, the best mean in bold."""
    names = ("model (pipeline, sampler)", "budget", *labels)
    lines = ["| " + " | ".join(names) + " |", "| --- | --- " + "| ---: " * len(labels) + "|"]
    for result in results:
        for every in dict.fromkeys(row.every for row in result.rows):
            rows = {row.label: row for row in result.rows if row.every == every and row.label in labels}
            best = best_rows(list(rows.values()))
            cells = [f"{result.name} ({result.pipeline}, {result.sampler})", f"1 in {every}"]
            cells += [_overview(rows.get(label), best) for label in labels]
            lines.append("| " + " | ".join(cells) + " |")
    count = len(results[0].reporting_seeds)
    return "\n".join([*lines, "", f"PSNR mean / worst in dB over {count} seeds, and how many times as fast.", ""])


def _overview(row: Row | None, best: Sequence[Row]) -> str:
    if row is None or row.quality is None:
        return _ABSENT
    psnr = f"{decibels(row.quality.psnr_mean)} / {decibels(row.quality.psnr_worst)}"
    shown = f"**{psnr}**" if any(row is other for other in best) else psnr
    return f"{shown}, {COLUMNS['wall'](row)}"


def markdown_table(results: Sequence[ModelResult]) -> str:
    """A section with one table per model, to paste into a README."""
    parts = []
    for result in results:
        parts += [f"**{result.title}** (n = {len(result.reporting_seeds)})", ""]
        parts.append("| " + " | ".join(COLUMNS) + " |")
        parts.append("| " + " | ".join("---" if name in ("budget", "method") else "---:" for name in COLUMNS) + " |")
        best = best_rows(result.rows)
        for row in result.rows:
            cells = [cell(row) for cell in COLUMNS.values()]
            if any(row is b for b in best):
                cells = [f"**{cell}**" for cell in cells]
            parts.append("| " + " | ".join(cells) + " |")
        parts += ["", *(f"{problem}\n" for problem in problems(result))]
    return "\n".join([*parts, NOTES, ""])
