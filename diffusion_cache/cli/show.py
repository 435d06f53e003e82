"""A profile in tables and pictures."""

import math
import os
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .. import profiles
from ..errors import ConfigError
from ..fingerprint import Fingerprint
from ..plan import Plan
from ..planning.selector import STORED, Choice, Selector
from ..profile import Profile, folder_of
from ..profiling.trajectory import ONE_FEATURE

_MANY = 40  # spans listed
_DRAWN = 24  # plans drawn
_SHADES = "·░▒▓█"  # share of the spans and passes that a step computes: none, …, all
_HEAT_MAPS = 6
_ABSENT = "–"
_DRIFT = "‖Fₜ − Fₜ₋₁‖ / ‖Fₜ₋₁‖"
_COMPUTED = ListedColormap(["#e8e8ee", "#27518f"])

Array = np.ndarray[Any, Any]


def show(folder: Path, out: Path | None, console: Console) -> list[Path]:
    """Print a profile's tables and write its pictures; returns the pictures' paths.

    out: where to write; by default the profile's own folder, or one of its name in `profile-pictures/` here for a
    profile that belongs to an installed package or lies where nothing may be written.

    Raises:
        ConfigError: if there is no sound profile, or the pictures cannot be written.
    """
    folder = folder_of(folder)
    profile = Profile.load(folder)
    console.print(_fingerprint_table(profile))
    console.print(_span_table(profile))
    print_plans(profile.plans, console)
    print_choices(profile, console)
    if out is None:
        out = _default_out(folder)
    paths = write_pictures(profile, out)
    for path in paths:
        console.print(Text(str(path)), soft_wrap=True)
    return paths


def print_plans(plans: Sequence[Plan], console: Console) -> None:
    """The table of plans, and which steps each computes."""
    if plans:
        console.print(_plan_table(plans))
        _print_strips(plans, console)
        for plan in plans:
            left = _left_to_taylor(plan)
            if left:
                console.print(Text(left), soft_wrap=True)
    else:
        console.print("No plans yet.")


def _left_to_taylor(plan: Plan) -> str:
    """How many reused steps keep Taylor's weights that could have had others, and why; nothing where none do."""
    left = plan.facts.get("left_to_taylor")
    whys = left.values() if isinstance(left, Mapping) else ()
    reasons = Counter(str(why) for why in whys if why != ONE_FEATURE)
    if not reasons:
        return ""
    reused = plan.total - int(plan.computed().flatten(1).all(dim=1).sum())
    told = "; ".join(f"{_clean(why)} ({count})" for why, count in reasons.most_common())
    return f"{_clean(plan.name)}: {reasons.total()} of {reused} reused steps keep Taylor's weights: {told}"


def print_choices(profile: Profile, console: Console) -> None:
    """What choosing among plans by the prompt reaches, for a profile that has learned to."""
    if STORED in profile.facts:
        for choice in Selector.of(profile).choices:
            console.print(Text(told_choice(choice)), soft_wrap=True)


def told_choice(choice: Choice) -> str:
    """A group of plans to choose among, and what was measured of the choice."""
    alone = choice.plans[choice.fallback]
    told = f"By the prompt, one of {len(choice.plans)} plans of {choice.nfe:.4g} evaluations"
    if choice.held_out is None or alone.quality is None:
        return told
    reached = choice.held_out
    return (
        f"{told}: {reached.mean:.1f} dB on {reached.n} held-out samples, {reached.p5:.1f} dB or more for 95% of them; "
        f"{_clean(alone.name)} alone {alone.quality.mean:.1f} and {alone.quality.p5:.1f} dB"
    )


def write_pictures(profile: Profile, out: Path) -> list[Path]:
    """Draw what the profile holds: gram.png, drift.png, sensitivity.png, plans.png.

    Raises:
        ConfigError: if they cannot be written.
    """
    figures = {"gram": _gram_figure(profile), "drift": _drift_figure(profile)}
    if "sensitivity" in profile.arrays:
        figures["sensitivity"] = _sensitivity_figure(profile)
    if profile.plans:
        figures["plans"] = _plans_figure(profile.plans)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing")  # names may be in any script
            for name, figure in figures.items():
                figure.savefig(out / f"{name}.png", dpi=150)
    except OSError as error:
        raise ConfigError(f"cannot write pictures to {out}: {error.strerror}; choose another with --out") from error
    return [out / f"{name}.png" for name in figures]


def _default_out(folder: Path) -> Path:
    packaged = [Path(path).resolve() for path in profiles.__path__]
    owned = any(folder.resolve().is_relative_to(path) for path in packaged)
    return Path("profile-pictures") / folder.resolve().name if owned or not os.access(folder, os.W_OK) else folder


def _clean(name: str) -> str:
    """A name from a file, which anyone may have made: without control characters, and not too long."""
    shown = "".join(letter if letter.isprintable() else "�" for letter in name)
    return shown if len(shown) <= 60 else f"{shown[:28]}…{shown[-28:]}"


def _row(table: Table, *cells: str) -> None:
    table.add_row(*[Text(_clean(cell)) for cell in cells])


def _fingerprint_table(profile: Profile) -> Table:
    table = Table(title="Profile", box=box.SIMPLE_HEAD, show_header=False, title_justify="left")
    facts: Fingerprint = profile.fingerprint
    for name, denoiser in facts.denoisers.items():
        weights = f"weights {denoiser.weights[:12]}" if denoiser.weights else "weights unknown"
        _row(table, name, f"{denoiser.class_name}, {denoiser.dtype}, {weights}")
        if denoiser.lora:
            _row(table, f"{name} LoRA", ", ".join(denoiser.lora))
    _row(table, "pipeline", facts.pipeline or _ABSENT)
    _row(table, "sampler", f"{facts.scheduler or _ABSENT}, {profile.total} step{'s' if profile.total > 1 else ''}")
    if facts.noise_levels:
        _row(table, "log-SNR", f"{facts.noise_levels[0]:.2f} to {facts.noise_levels[-1]:.2f}")
    _row(table, "guidance", _ABSENT if facts.guidance is None else f"{facts.guidance:g}")
    _row(table, "passes", f"{', '.join(profile.passes)}; {profile.row_passes} in the rows of one call")
    if facts.sample_shape:
        _row(table, "latents", " × ".join(map(str, facts.sample_shape)))
    _row(table, "calibrated on", f"{len(profile.samples)} samples")
    _row(table, "scope", profile.scope if profile.depth is None else f"{profile.scope}, depth {profile.depth}")
    _row(table, "made with", ", ".join(f"{name} {number}" for name, number in facts.versions.items()))
    return table


def _columns(title: str, columns: dict[str, list[str]], numbers: Sequence[str]) -> Table:
    """A table by columns; one after the first that says the same in each row is told in the title instead.

    numbers: names of the columns that stay, are aligned to the right and never cut.
    """
    told = []
    for name, cells in list(columns.items())[1:]:
        values = set(cells) - {_ABSENT}
        if not values or (len(values) == 1 and name not in numbers):
            del columns[name]
            told += [f"{name} {_clean(value)}" for value in values]
    heading = f"{title} ({', '.join(told)})" if told else title
    table = Table(title=Text(heading), box=box.SIMPLE_HEAD, title_justify="left", padding=(0, 1, 0, 0))
    for name in columns:
        if name in numbers:
            table.add_column(name, justify="right", no_wrap=True)
        else:
            table.add_column(name, overflow="fold")
    for row in zip(*columns.values(), strict=True):
        _row(table, *row)
    return table


def _span_table(profile: Profile) -> Table:
    count = len(profile.spans)
    shown = profile.spans[:_MANY]
    drift = _drift(profile)[: len(shown), 1:]
    known = [row[np.isfinite(row)] for row in drift]
    share = "parameters" if profile.facts.get("shares") == "parameters" else "FLOPs"
    columns = {
        "span": [span.name for span in shown],
        "of": [span.denoiser for span in shown],
        "kind": [span.kind for span in shown],
        "feature": [span.feature for span in shown],
        "elements": [f"{span.elements:,}" for span in shown],
        share: [f"{span.share:.1%}" for span in shown],
        "mean drift": [f"{row.mean():.3f}" if len(row) else _ABSENT for row in known],
        "largest": [f"{row.max():.3f}" if len(row) else _ABSENT for row in known],
        "at step": [str(1 + int(np.nanargmax(row))) if np.isfinite(row).any() else _ABSENT for row in drift],
    }
    title = f"{count} span{'s' if count > 1 else ''}" + (f", the first {_MANY}" if count > _MANY else "")
    return _columns(title, columns, (share, "mean drift", "largest", "at step"))


def _plan_table(plans: Sequence[Plan]) -> Table:
    qualities, speeds = [plan.quality for plan in plans], [plan.speed for plan in plans]

    def of_quality(name: str) -> list[str]:
        return [_ABSENT if quality is None else _figure(getattr(quality, name)) for quality in qualities]

    unguarded = "none" if any(plan.guard is not None for plan in plans) else _ABSENT
    columns = {
        "plan": [plan.name for plan in plans],
        "scope": [plan.scope for plan in plans],
        "steps": [str(plan.total) for plan in plans],
        "metric": [_ABSENT if quality is None else quality.metric for quality in qualities],
        "samples": [_ABSENT if quality is None else str(quality.n) for quality in qualities],
        "prompts": [_ABSENT if (n := plan.held_out_prompts) is None else str(n) for plan in plans],
        "on": [_ABSENT if speed is None else f"{speed.device}, batch {speed.batch}" for speed in speeds],
        "guard": [unguarded if plan.guard is None else plan.guard.signal for plan in plans],
        "NFE": [f"{plan.nfe:.4g}" for plan in plans],
        "of full": [f"{plan.nfe / plan.total:.0%}" for plan in plans],
        "mean": of_quality("mean"),
        "p5": of_quality("p5"),
        "worst": of_quality("worst"),
        "speed": [_ABSENT if speed is None else f"{speed.ratio:.2f}×" for speed in speeds],
        "spread": [_ABSENT if speed is None else f"{speed.low:.2f}–{speed.high:.2f}" for speed in speeds],
    }
    return _columns("Plans", columns, ("NFE", "of full", "mean", "p5", "worst", "speed", "spread"))


def _figure(value: float) -> str:
    return "∞" if math.isinf(value) else f"{value:.4g}"


def _print_strips(plans: Sequence[Plan], console: Console) -> None:
    """A line a plan, a character a step."""
    width = max(len(_clean(plan.name)) for plan in plans) + 2
    several = any(plan.computed()[0].numel() > 1 for plan in plans)
    legend = "share of spans computed, from none · to all █" if several else "█ computed, · reused"
    console.print(Text(f"Steps ({legend})"))
    for plan in plans:
        line = strip(plan)
        room = max(20, console.width - width)
        for start in range(0, len(line), room):
            label = _clean(plan.name) if start == 0 else ""
            console.print(Text(f"{label:<{width}}{line[start : start + room]}"), soft_wrap=True)


def strip(plan: Plan) -> str:
    """A character a step: █ where everything is computed, · where nothing is, shades between."""
    shares = plan.computed().double().mean(dim=(1, 2)).tolist()
    inner = len(_SHADES) - 2
    return "".join(
        _SHADES[0] if share == 0 else _SHADES[-1] if share == 1 else _SHADES[1 + min(inner - 1, int(share * inner))]
        for share in shares
    )


def _grams(profile: Profile) -> Array:
    """Of each span's own feature, summed over passes: [S, T, T], float64."""
    both = {name: profile.arrays[f"gram_{name}"].double().sum(dim=1).numpy() for name in ("residual", "output")}
    return np.stack([both[span.feature][index] for index, span in enumerate(profile.spans)])


def _drift(profile: Profile) -> Array:
    """‖F_t − F_{t−1}‖ / ‖F_{t−1}‖ of each span's own feature: [S, T], NaN at step 0 and where the feature is zero."""
    grams = _grams(profile)
    energy = np.diagonal(grams, axis1=1, axis2=2)
    drift = np.full(energy.shape, np.nan)
    between = np.diagonal(grams, offset=1, axis1=1, axis2=2)
    with np.errstate(divide="ignore", invalid="ignore"):
        squared = (energy[:, 1:] + energy[:, :-1] - 2 * between).clip(min=0) / energy[:, :-1]
    drift[:, 1:] = np.sqrt(np.where(np.isfinite(squared), squared, np.nan))
    return drift


def _representatives(profile: Profile) -> list[int]:
    """Spans spread evenly over the profile's, the one that costs most among them."""
    count = len(profile.spans)
    chosen = {round(place) for place in np.linspace(0, count - 1, min(count, _HEAT_MAPS))}
    heaviest = max(range(count), key=lambda index: profile.spans[index].share)
    if heaviest not in chosen:
        nearest = min(chosen, key=lambda index: (abs(index - heaviest), index))
        chosen = chosen - {nearest} | {heaviest}
    return sorted(chosen)


def _short(name: str) -> str:
    """A label that fits beside a picture; its end tells spans apart."""
    shown = _clean(name)
    return shown if len(shown) <= 30 else f"…{shown[-29:]}"


def _gram_figure(profile: Profile) -> Figure:
    chosen = _representatives(profile)
    grams = _grams(profile)[chosen]
    norms = np.sqrt(np.diagonal(grams, axis1=1, axis2=2).clip(min=0))
    with np.errstate(divide="ignore", invalid="ignore"):
        cosines = np.clip(grams / (norms[:, :, None] * norms[:, None, :]), -1, 1)
    columns = min(3, len(chosen))
    rows = -(-len(chosen) // columns)
    figure = Figure(figsize=(2.9 * columns + 1.1, 3.0 * rows + 0.5), layout="constrained", facecolor="white")
    axes = figure.subplots(rows, columns, squeeze=False)
    finite = cosines[np.isfinite(cosines)]
    low = float(finite.min()) if len(finite) else 0.0
    for axis in axes.flat[len(chosen) :]:
        axis.set_axis_off()
    image = None
    for axis, index, cosine in zip(axes.flat, chosen, cosines, strict=False):
        image = axis.imshow(cosine, vmin=min(low, 0.999), vmax=1, cmap="viridis", interpolation="nearest")
        span = profile.spans[index]
        axis.set_title(_short(span.name), fontsize=9, parse_math=False)
        axis.set_xlabel("step", fontsize=8)
        axis.set_ylabel("step", fontsize=8)
        axis.tick_params(labelsize=7)
    if image is not None:
        bar = figure.colorbar(image, ax=axes, shrink=0.8)
        bar.set_label("cosine of the features at two steps", fontsize=8)
        bar.ax.tick_params(labelsize=7)
    figure.suptitle("How alike a span's features are at two steps", fontsize=10)
    return figure


def _drift_figure(profile: Profile) -> Figure:
    drift = _drift(profile)
    count = len(profile.spans)
    if count == 1:
        figure, axis = _curve_figure("Change of the span's feature from step to step", _DRIFT)
        axis.plot(np.arange(1, profile.total), drift[0, 1:], marker=".", markersize=4, linewidth=1)
        _log_if_positive(axis, drift[0, 1:])
        return figure
    figure = Figure(figsize=(8, min(9.0, max(2.6, 1.4 + 0.2 * count))), layout="constrained", facecolor="white")
    axis = figure.subplots()
    positive = drift[np.isfinite(drift) & (drift > 0)]
    norm = None
    if len(positive):
        low, high = np.percentile(positive, (1, 100))
        norm = LogNorm(low, max(high, low * 1.01))
    colours = _with_bad("magma")
    image = axis.imshow(drift, aspect="auto", cmap=colours, norm=norm, interpolation="nearest")
    _label_spans(axis, [span.name for span in profile.spans])
    axis.set_xlabel("step (the first has none before it)", fontsize=8)
    axis.tick_params(labelsize=7)
    bar = figure.colorbar(image, ax=axis)
    _plain_ticks(bar.ax)
    bar.set_label(_DRIFT, fontsize=8)
    bar.ax.tick_params(labelsize=7, which="both")
    axis.set_title("Change of each span's feature from step to step", fontsize=10)
    return figure


def _with_bad(name: str) -> Any:
    """A colour map that shows what is not there in grey."""
    import matplotlib

    return matplotlib.colormaps[name].with_extremes(bad="#d9d9d9")


def _label_spans(axis: Axes, names: Sequence[str]) -> None:
    """As many labels as can be read."""
    every = -(-len(names) // 36)
    places = range(0, len(names), every)
    axis.set_yticks(list(places), [_short(names[place]) for place in places], parse_math=False)


def _curve_figure(title: str, label: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7, 3.6), layout="constrained", facecolor="white")
    axis = figure.subplots()
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("step", fontsize=8)
    axis.set_ylabel(label, fontsize=8)
    axis.tick_params(labelsize=7, which="both")
    axis.grid(alpha=0.25, which="both", linewidth=0.5)
    return figure, axis


def _log_if_positive(axis: Axes, values: Array) -> None:
    """A logarithmic scale where values are positive and differ much."""
    finite = values[np.isfinite(values)]
    if len(finite) and finite.min() > 0 and finite.max() > 5 * finite.min():
        axis.set_yscale("log")
        _plain_ticks(axis)


def _plain_ticks(axis: Axes) -> None:
    """1, 2 and 5 of each decade, as plain numbers."""
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter(NullFormatter())


def _sensitivity_figure(profile: Profile) -> Figure:
    values = profile.arrays["sensitivity"].double().numpy()
    sampled = profile.arrays.get("sensitivity_sampled")
    measured = np.zeros(values.shape, dtype=bool) if sampled is None else sampled.numpy().astype(bool)
    figure, axis = _curve_figure(
        "What an error at one step does to the final latents", "relative error of the latents\nper relative error"
    )
    groups = len(values)
    colours = _with_bad("viridis")(np.linspace(0, 0.9, groups))
    for group in range(groups):
        label = f"group {group}" if groups > 1 else None
        axis.plot(values[group], linewidth=1.2, color=colours[group], label=label)
        steps = np.flatnonzero(measured[group])
        axis.plot(steps, values[group, steps], "o", markersize=3.5, color=colours[group])
    _log_if_positive(axis, values)
    if measured.any():
        axis.plot([], [], "o", markersize=3.5, color="black", label="measured")
        axis.plot([], [], linewidth=1.2, color="black", label="interpolated")
    if 1 < groups <= 12 or measured.any():
        axis.legend(fontsize=7, frameon=False, ncols=1 + groups // 7, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _plans_figure(plans: Sequence[Plan]) -> Figure:
    shown = plans[:_DRAWN]
    heights = [0.36 if plan.computed()[0].numel() == 1 else min(2.4, 0.3 + 0.06 * plan.spans) for plan in shown]
    figure = Figure(figsize=(9, sum(heights) + 0.18 * len(shown) + 0.9), layout="constrained", facecolor="white")
    axes = figure.subplots(len(shown), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for axis, plan in zip(axes, shown, strict=True):
        computed = plan.computed().numpy()
        steps, passes, spans = computed.shape
        lanes = computed.transpose(1, 2, 0).reshape(passes * spans, steps)
        axis.imshow(lanes, aspect="auto", cmap=_COMPUTED, vmin=0, vmax=1, interpolation="nearest")
        if len(lanes) == 1 and steps <= 120:
            axis.vlines(np.arange(1, steps) - 0.5, -0.5, 0.5, color="white", linewidth=1)
        for border in range(1, passes):
            axis.axhline(border * spans - 0.5, color="black", linewidth=0.8)
        axis.set_yticks([])
        axis.set_ylabel(_short(plan.name), rotation=0, ha="right", va="center", fontsize=8, parse_math=False)
        note = f"NFE {plan.nfe:.4g} of {plan.total}"
        if plan.quality is not None:
            note += f"\n{_clean(plan.quality.metric)} {_figure(plan.quality.mean)}, p5 {_figure(plan.quality.p5)}"
        axis.text(1.01, 0.5, note, transform=axis.transAxes, va="center", fontsize=7, parse_math=False)
        axis.tick_params(labelsize=7)
        axis.spines[:].set_visible(False)
    for axis in axes[:-1]:
        if len({plan.total for plan in shown}) == 1:
            axis.set_xticks([])
    axes[-1].set_xlabel("step", fontsize=8)
    title = "Computed steps (dark) of each plan"
    figure.suptitle(title if len(shown) == len(plans) else f"{title}, the first {_DRAWN}", fontsize=10)
    return figure
