"""The report as one web page that needs neither a server nor the network: plotly.js, data and pictures are inside.

The page's own script draws everything from a block of JSON and writes text with `textContent`. A content security
policy names the two scripts by their hashes, so that nothing else runs and nothing is loaded, whatever a prompt says.
"""

import base64
import hashlib
import io
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from itertools import zip_longest
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError, DiffusionCacheWarning
from .metrics import higher_is_better, metrics
from .report import (
    BUDGET_NOTE,
    BUDGETS,
    CALL,
    CHOICES_NOTE,
    NOTES,
    choices_tables,
    choose,
    csv_row,
    further_columns,
    pareto_runs,
    remarks,
)
from .runs import SAMPLE_METRICS, Experiment, Run, extremes, settings_text
from .store import IMAGES

PAGE_BYTES = 11_500_000  # pictures are embedded, most wanted first, until the page has this size
IMAGE_SIDE, FRAME_SIDE, SHOWN_FRAMES = 256, 128, 8  # larger images and longer videos are shown smaller
GAINS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
DIGITS = {"psnr": 2, "ssim": 4, "lpips": 4}  # of the embedded sample values


def page(experiment: Experiment, environments: Mapping[str, Any]) -> str:
    """The whole page.

    Args:
        environments: of `merged_environments`.

    Raises:
        ConfigError: if plotly is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ConfigError(
            "the report's web page needs plotly: pip install 'diffusion-cache[report]' (the CSV file and the Markdown "
            "tables are written)"
        ) from error
    plotly, script, style = get_plotlyjs(), _asset("report_page.js"), _asset("report_page.css")
    data = page_data(experiment, environments)
    spent = len(plotly.encode()) + len(script) + len(style) + len(embedded_json(data))
    _embed_pictures(data, experiment.runs, PAGE_BYTES - spent)
    policy = (
        "default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; "
        f"script-src {_hash_source(plotly)} {_hash_source(script)}"
    )
    title = escape(experiment.name)
    return (
        "<!doctype html>\n<html lang='en'>\n<head>\n<meta charset='utf-8'>\n"
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        "<meta name='viewport' content='width=device-width, initial-scale=1'>\n"
        f"<title>{title}: quality against speed</title>\n<style>{style}</style>\n</head>\n<body>\n"
        f"{_BODY.format(title=title, notes=escape(NOTES), choices=escape(CHOICES_NOTE))}"
        f"<script type='application/json' id='data'>{embedded_json(data)}</script>\n"
        f"<script>{plotly}</script>\n<script>{script}</script>\n</body>\n</html>\n"
    )


def embedded_json(data: Any) -> str:
    """JSON that may stand inside a script element: it cannot end the element, open a comment or start another."""
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def page_data(experiment: Experiment, environments: Mapping[str, Any]) -> dict[str, Any]:
    """What the page shows, without pictures, as JSON values; infinity is the string "inf".

    Returns:
        {"subjects": [{"model", "sampler", "random", "picks": {budget: [places in runs]}}], "runs": [figures by column
        name, with "subject", "text", "brief", "heatmap", "samples", "values", "pictures"], "samples":
        [{"prompts", "seeds"}], "images": [], "choices": {"call": the column of code, "tables": [{"title", "columns",
        "rows"}]}, "metrics": [{"key": column, "name", "lower": whether lower is better}, for known ones of
        `further_columns`], …}
    """
    pareto = pareto_runs(experiment.runs)
    further = further_columns(experiment.runs)
    place = {run.folder: index for index, run in enumerate(experiment.runs)}
    subjects = experiment.subjects
    sets: dict[tuple[Any, ...], int] = {}  # runs on the same samples share one list of prompts and seeds
    runs = []
    for run in experiment.runs:
        row = {key: _rounded(value) for key, value in csv_row(run, run.folder in pareto, further).items()}
        runs.append(
            row
            | {
                "subject": subjects.index(run.subject),
                "text": settings_text(run),
                "brief": settings_text(run, scope=False),
                "heatmap": _compact_heatmap(run.heatmap),
                "samples": sets.setdefault((run.samples.prompts, run.samples.seeds), len(sets)),
                "values": _sample_values(run),
                "pictures": None,
            }
        )
    described = []
    for model, sampler in subjects:
        members = experiment.of((model, sampler))
        picks = {name: [place[run.folder] for run in choose(members, ratio)] for name, ratio in BUDGETS.items()}
        random = all(run.random_weights for run in members)
        described.append({"model": model, "sampler": sampler, "random": random, "picks": picks})
    return {
        "budgets": BUDGETS,
        "budget_note": BUDGET_NOTE,
        "metrics": [
            {"key": column, "name": f"{name.replace('_', ' ')}, {statistic}", "lower": not higher_is_better(name)}
            for column, (name, statistic) in further.items()
            if name in metrics.names()
        ],
        "subjects": described,
        "runs": runs,
        "samples": [{"prompts": prompts, "seeds": seeds} for prompts, seeds in sets],
        "images": [],
        "choices": {
            "call": CALL,
            "tables": [table._asdict() for table in choices_tables(experiment.runs)],
        },
        "remarks": remarks(experiment),
        "left_out": list(experiment.left_out),
        "environment": environments,
    }


def _rounded(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return "inf" if math.isinf(value) else float(f"{value:.5g}")


def _sample_values(run: Run) -> dict[str, list[Any]]:
    """Metrics that at least one sample has a value of."""
    if run.random_weights or not run.samples.values:
        return {}
    return {
        name: [
            None if value is None else "inf" if math.isinf(value) else round(value, DIGITS[name])
            for value in run.samples.values[name]
        ]
        for name in SAMPLE_METRICS
        if any(value is not None for value in run.samples.values.get(name, ()))
    }


def _compact_heatmap(heatmap: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Shares in percent. Most steps are like others, so each kind of step is stored once: `steps` indexes `kinds`."""
    if heatmap is None:
        return None
    kinds: dict[tuple[int | None, ...], int] = {}
    steps = [
        kinds.setdefault(tuple(None if share is None else round(100 * share) for share in step), len(kinds))
        for step in heatmap["computed"]
    ]
    return {"rows": heatmap["rows"], "kinds": [list(kind) for kind in kinds], "steps": steps}


# pictures


def _embed_pictures(data: dict[str, Any], runs: Sequence[Run], limit: int) -> None:
    """Put the pictures of Pareto-optimal runs and baselines into `data`: for every model in turn, tables' runs first.

    From the first run on whose pictures do not fit into `limit` bytes, runs get {"omitted": true} instead.
    """
    queues = []
    for number, subject in enumerate(data["subjects"]):
        chosen = [index for picks in subject["picks"].values() for index in picks]
        own = ((i, row) for i, row in enumerate(data["runs"]) if row["subject"] == number)
        queues.append(dict.fromkeys(chosen + [i for i, row in own if row["pareto"] or row["kind"] == "baseline"]))
    wanted = [index for turn in zip_longest(*queues) for index in turn if index is not None]
    known: dict[str, int] = {}  # the uncached picture of a sample is the same in many runs
    full = False
    for index in wanted:
        if not runs[index].pictures:
            continue
        if full:
            data["runs"][index]["pictures"] = {"omitted": True}
            continue
        try:
            pictures = triplets(runs[index])
        except ValueError as error:
            warnings.warn(f"{runs[index].folder / IMAGES}: {error}; not shown", DiffusionCacheWarning, stacklevel=4)
            continue
        sources = dict.fromkeys(source for triplet in pictures for source in triplet["sources"])
        new = [source for source in sources if source not in known]
        size = sum(len(source) + 8 for source in new)
        full = size > limit
        if full:
            data["runs"][index]["pictures"] = {"omitted": True}
            continue
        limit -= size
        known |= {source: len(known) + offset for offset, source in enumerate(new)}
        data["runs"][index]["pictures"] = [
            {**triplet, "sources": [known[source] for source in triplet["sources"]]} for triplet in pictures
        ]
    data["images"] = list(known)


def triplets(run: Run) -> list[dict[str, Any]]:
    """Uncached, cached and |difference| of the median and the worst sample by PSNR; without one, of any two.

    Returns:
        for each {"place": "median", "worst" or, without PSNR, "shown", "sample": its row, "gain": how many times
        stronger the difference is shown, "identical", "frames": those shown, "total": how many there are, "sources":
        three PNGs in base64}. The frames of a video stand side by side.

    Raises:
        ValueError: if an image holds values that are not finite.
    """
    from safetensors.numpy import load_file

    tensors = load_file(run.folder / IMAGES)
    psnr = (run.samples.values or {}).get("psnr") or (None,) * len(run.samples.seeds)
    rows = extremes(psnr) if psnr else {}
    ranked = any(value is not None for value in psnr)
    found = []
    for place in ("median", "worst"):
        reference, candidate = (
            np.asarray(tensors[f"{place}.{side}"], dtype=np.float32) for side in ("reference", "candidate")
        )
        if not (np.isfinite(reference).all() and np.isfinite(candidate).all()):
            raise ValueError(f"the images of the {place} sample hold values that are not finite")
        count = len(reference)
        frames = np.unique(np.linspace(0, count - 1, min(count, SHOWN_FRAMES)).round().astype(int))
        difference = np.abs(candidate - reference)
        largest = float(difference.max())
        gain = max((gain for gain in GAINS if gain * largest <= 1), default=1) if largest else 1
        found.append(
            {
                "place": place if ranked else "shown",
                "sample": rows.get(place),
                "gain": gain,
                "identical": largest == 0,
                "frames": frames.tolist(),
                "total": count,
                "sources": [_png(images[frames]) for images in (reference, candidate, difference * gain)],
            }
        )
    return found


def _png(images: NDArray[np.float32]) -> str:
    """Images [frames, c, h, w] in [0, 1] side by side, as a PNG in base64; large ones are made smaller."""
    from PIL import Image

    side = IMAGE_SIDE if len(images) == 1 else FRAME_SIDE
    pixels = (np.clip(images, 0, 1) * 255).round().astype(np.uint8).transpose(0, 2, 3, 1)
    parts = []
    for frame in pixels:
        part = Image.fromarray(frame[..., 0] if frame.shape[-1] == 1 else frame)
        if max(part.size) > side:
            part.thumbnail((side, side), Image.Resampling.BOX)
        parts.append(part)
    gap = 1 if len(parts) > 1 else 0
    width, height = parts[0].size
    strip = Image.new(parts[0].mode, (len(parts) * (width + gap) - gap, height), 128 if gap else 0)
    if strip.mode == "RGB" and gap:
        strip.paste((128, 128, 128), (0, 0, *strip.size))
    for index, part in enumerate(parts):
        strip.paste(part, (index * (width + gap), 0))
    buffer = io.BytesIO()
    strip.save(buffer, format="png", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _asset(name: str) -> str:
    return (resources.files(__package__) / name).read_text(encoding="utf-8")


def _hash_source(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


_BODY = """
<header>
<h1>{title}</h1>
<p id='lead'></p>
<ul id='problems' class='faint'></ul>
</header>
<nav class='bar' aria-label='What is shown'>
<label>Model and sampler <select id='subject'></select></label>
<span class='links'><a href='#quality'>Quality and cost</a> <a href='#detail'>One run</a>
<a href='#spread'>Samples</a> <a href='#choices'>Without a profile</a>
<a href='#all'>All runs</a> <a href='#environment'>Environment</a></span>
</nav>
<main>
<section id='quality' aria-labelledby='quality-title'>
<h2 id='quality-title'>Quality against cost</h2>
<div class='controls'>
<label>Quality <select id='metric'></select></label>
<label>Cost <select id='cost'></select></label>
<label><input type='checkbox' id='front-only'> only settings on their method's front</label>
</div>
<div class='split'>
<div><div id='front' class='plot' role='group' aria-label='Quality against cost, one point per run'></div>
<p class='faint' id='front-note'></p></div>
<fieldset id='legend'><legend>Methods</legend>
<div class='row'><button type='button' id='all-methods'>All</button>
<button type='button' id='no-methods'>None</button></div>
<div id='methods'></div>
</fieldset>
</div>
</section>
<section id='detail' aria-labelledby='detail-title'>
<h2 id='detail-title'>One run</h2>
<div class='controls'><label class='grow'>Run <select id='run'></select></label></div>
<dl id='facts'></dl>
<div id='heat' class='plot' role='group' aria-label='Share of each block computed at each step'></div>
<p class='faint' id='heat-note'></p>
<div id='pictures'></div>
</section>
<section id='spread' aria-labelledby='spread-title'>
<h2 id='spread-title'>Every sample</h2>
<div class='controls'>
<label>NFE budget <select id='budget'></select></label>
<label>Quality <select id='sample-metric'></select></label>
<label>Rows <select id='by'><option value='method'>one per method</option>
<option value='prompt'>one per prompt</option></select></label>
</div>
<div id='strip' class='plot' role='group' aria-label='Quality of every sample'></div>
<p class='faint' id='strip-note'></p>
</section>
<section id='choices' aria-labelledby='choices-title'>
<h2 id='choices-title'>What to take without a profile</h2>
<div id='choices-tables'></div>
<p class='faint'>{choices}</p>
</section>
<section id='all' aria-labelledby='all-title'>
<h2 id='all-title'>All runs</h2>
<div class='controls'>
<label class='grow'>Filter <input type='search' id='filter' placeholder='words that a row must hold'></label>
<label>Model <select id='table-subject'><option value='all'>all</option><option value='one'>the one above</option>
</select></label>
<label><input type='checkbox' id='table-front'> only on a front</label>
</div>
<p class='faint' id='count' aria-live='polite'></p>
<div class='wide'><table id='runs'><thead><tr></tr></thead><tbody></tbody></table></div>
<button type='button' id='more' hidden>Show all</button>
</section>
<section id='environment' aria-labelledby='environment-title'>
<h2 id='environment-title'>Environment</h2>
<div class='wide'><table id='facts-table'><tbody></tbody></table></div>
</section>
<p class='faint'>{notes}</p>
</main>
<dialog id='large' aria-labelledby='large-title'>
<form method='dialog'><h2 id='large-title'></h2><button aria-label='Close'>×</button></form>
<div id='large-body'></div>
</dialog>
<noscript><p>This page draws its plots with JavaScript; report.md and summary.csv hold the same figures.</p></noscript>
"""
