"""The demo's web page: one file with its pictures inside, readable in light and dark."""

import base64
import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from .results import ModelResult, Row
from .tables import COLUMNS, NOTES, best_rows, decibels, problems, scored

_STYLE = """
:root { color-scheme: light dark; --text: #1c1e21; --faint: #6a7078; --page: #fafaf8; --card: #fff; --line: #e3e3df;
  --best: #0a7d47; --c0: #2a6fdb; --c1: #d1603d; }
@media (prefers-color-scheme: dark) { :root { --text: #e6e6e3; --faint: #9aa0a8; --page: #15171a; --card: #1d2024;
  --line: #34383e; --best: #5ad69a; --c0: #77a8ff; --c1: #f08a68; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 70rem; background: var(--page); color: var(--text);
  font: 16px/1.55 system-ui, sans-serif; }
h1 { font-size: 1.7rem; margin: 0 0 .3rem; } h2 { font-size: 1.15rem; margin: 0 0 .2rem; }
p { margin: .4rem 0; max-width: 62rem; } .faint { color: var(--faint); font-size: .87rem; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 1.2rem;
  margin-top: 1.5rem; }
.wide { overflow-x: auto; } .pair { display: flex; flex-wrap: wrap; gap: 1.2rem; align-items: flex-start; }
.pair > * { flex: 1 1 22rem; min-width: 0; }
img { display: block; max-width: 100%; height: auto; margin: .8rem auto 0; border-radius: 6px; background: #fff; }
table { border-collapse: collapse; width: 100%; font-size: .87rem; margin-top: .8rem;
  font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .3rem .55rem; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { color: var(--faint); font-weight: 600; } th:nth-child(-n+2), td:nth-child(-n+2) { text-align: left; }
tr.best td { color: var(--best); font-weight: 600; } tr.budget td { border-top: 2px solid var(--line); }
svg { width: 100%; height: auto; margin-top: .8rem; } svg text { fill: var(--faint); font-size: 11px; }
svg .axis { stroke: var(--line); } svg .range { stroke-width: 2; opacity: .5; }
"""


def html_page(
    results: Sequence[ModelResult], facts: Mapping[str, Any], overview: bytes, pictures: Mapping[str, bytes]
) -> str:
    """The page as one string.

    Args:
        facts: `versions` (name → version or None) and `hardware`.
        overview: PNG of all models.
        pictures: a PNG per model name.
    """
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items() if version)
    body = [
        "<h1>diffusion_cache: the same pictures for less work</h1>",
        "<p>Each model generates the same seeds without a cache and with each method. Whatever had to be chosen was "
        "chosen on other seeds than those reported here.</p>",
        f"<p class='faint'>{escape(facts['hardware'])} · {escape(versions)}</p>",
    ]
    if len(results) > 1:
        picture = _image(overview, "All models: uncached, cached, difference")
        body.append(f"<section><h2>All models</h2>{picture}</section>")
    body += [_model(result, pictures[result.name]) for result in results]
    body.append(f"<p class='faint'>{escape(NOTES)}</p>")
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'><title>diffusion_cache demo</title>"
        f"<style>{_STYLE}</style></head><body>{''.join(body)}</body></html>\n"
    )


def _model(result: ModelResult, picture: bytes) -> str:
    fitted = ", ".join(f"{name}: {value:.3g}" for name, value in result.fitted.items())
    seeds = f"{len(result.reporting_seeds)} reported, {len(result.fitting_seeds)} others for fitting"
    return (
        f"<section><h2>{escape(result.title)}</h2><p class='faint'>Seeds: {seeds}. Fitted: {escape(fitted)}.</p>"
        f"<div class='wide'>{_table(result)}</div>"
        + "".join(f"<p class='faint'>{escape(problem)}</p>" for problem in problems(result))
        + f"<div class='pair'>{_image(picture, f'{result.name}: uncached, cached, fewer steps')}{_plot(result)}</div>"
        + "</section>"
    )


def _image(png: bytes, text: str) -> str:
    data = base64.b64encode(png).decode("ascii")
    return f"<div><img alt='{escape(text, quote=True)}' src='data:image/png;base64,{data}'></div>"


def _table(result: ModelResult) -> str:
    best = best_rows(result.rows)
    lines = ["<table><thead><tr>", *(f"<th>{escape(header)}</th>" for header in COLUMNS), "</tr></thead><tbody>"]
    previous: Row | None = None
    for row in result.rows:
        classes = ["best"] * any(row is b for b in best)
        classes += ["budget"] * (previous is not None and previous.every != row.every)
        cells = "".join(f"<td>{escape(cell(row))}</td>" for cell in COLUMNS.values())
        lines.append(f"<tr class='{' '.join(classes)}'>{cells}</tr>")
        previous = row
    return "".join([*lines, "</tbody></table>"])


def _plot(result: ModelResult) -> str:
    """PSNR of each method at each budget: the mean (dot), and down to the worst sample (line)."""
    finite = [(row, quality) for row, quality in scored(result.rows) if quality.identical == 0]
    if not finite:
        return ""
    labels = list(dict.fromkeys(row.label for row, _ in finite))
    budgets = list(dict.fromkeys(row.every for row, _ in finite))
    band, gap, left, right, top = 40, 14, 108, 16, 10
    width, bottom = 460, top + band * len(labels)
    low = math.floor(min(quality.psnr_worst for _, quality in finite) / 5) * 5
    high = math.ceil(max(quality.psnr_mean for _, quality in finite) / 5) * 5

    def x(psnr: float) -> float:
        return left + (width - left - right) * (psnr - low) / (high - low)

    parts = [f"<svg viewBox='0 0 {width} {bottom + 40}' role='img' aria-label='PSNR of each method'>"]
    for tick in range(low, high + 1, 5 if high - low <= 30 else 10):
        parts.append(f"<line class='axis' x1='{x(tick):.1f}' x2='{x(tick):.1f}' y1='{top}' y2='{bottom}'/>")
        parts.append(f"<text x='{x(tick):.1f}' y='{bottom + 16}' text-anchor='middle'>{tick}</text>")
    parts.append(f"<text x='{(left + width - right) / 2}' y='{bottom + 34}' text-anchor='middle'>PSNR, dB</text>")
    for index, label in enumerate(labels):
        middle = top + band * (index + 0.5)
        parts.append(f"<text x='{left - 12}' y='{middle + 4}' text-anchor='end'>{escape(label)}</text>")
    for row, quality in finite:
        budget = budgets.index(row.every)
        y = top + band * (labels.index(row.label) + 0.5) + gap * (budget - (len(budgets) - 1) / 2)
        color = f"var(--c{budget})"
        parts.append(
            f"<line class='range' x1='{x(quality.psnr_worst):.1f}' x2='{x(quality.psnr_mean):.1f}' y1='{y}' y2='{y}' "
            f"style='stroke:{color}'/><circle cx='{x(quality.psnr_mean):.1f}' cy='{y}' r='4.5' style='fill:{color}'>"
            f"<title>{escape(row.label)}, 1 in {row.every}: mean {decibels(quality.psnr_mean)} dB, "
            f"worst {decibels(quality.psnr_worst)} dB</title></circle>"
        )
    parts.append("</svg>")
    legend = " &nbsp; ".join(
        f"<span style='color:var(--c{index})'>●</span> 1 in {every} steps" for index, every in enumerate(budgets)
    )
    return f"<div>{''.join(parts)}<p class='faint'>{legend}. Dot: mean; the line ends at the worst sample.</p></div>"
