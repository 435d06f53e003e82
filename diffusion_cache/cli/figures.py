"""The demo's pictures, drawn with matplotlib and returned as PNG bytes."""

import io
from collections.abc import Sequence

from matplotlib.figure import Figure, SubFigure
from torch import Tensor

from .results import ModelResult, Panel, Row
from .tables import decibels

_CELL, _TOP, _MARGIN = 0.75, 0.84, 0.12  # inches
_GAINS = (1, 2, 5, 10, 20, 50, 100)


def model_figure(result: ModelResult) -> bytes:
    """One model: uncached, then each other panel with its difference; a row per sample."""
    return _render([result], others=len(result.panels) - 1)


def overview_figure(results: Sequence[ModelResult]) -> bytes:
    """All models side by side: uncached, cached, difference."""
    return _render(results, others=1)


def _render(results: Sequence[ModelResult], others: int) -> bytes:
    rows = max(len(result.panels[0].images) for result in results)
    width = (1 + 2 * others) * _CELL + 2 * _MARGIN
    width = max(width, 2.55)  # room for the title lines
    height = rows * _CELL + _TOP + _MARGIN
    figure = Figure(figsize=(width * len(results), height), facecolor="white", dpi=150)
    parts = figure.subfigures(1, len(results), squeeze=False)[0]
    for part, result in zip(parts, results, strict=True):
        _draw(part, result, rows, others, width, height)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _draw(part: SubFigure, result: ModelResult, rows: int, others: int, width: float, height: float) -> None:
    uncached = result.panels[0]
    compared = result.panels[1 : 1 + others]
    gain = _gain([_difference(panel, uncached) for panel in compared])
    columns: list[tuple[str, Tensor, float]] = [("uncached", uncached.images, 1.0)]
    for panel in compared:
        columns.append((panel.label.replace(", ", "\n"), panel.images, 1.0))
        columns.append((f"difference\n× {gain}", _difference(panel, uncached), 1 / gain))

    side = (width - len(columns) * _CELL) / 2
    axes = part.subplots(rows, len(columns), squeeze=False)
    part.subplots_adjust(
        left=side / width,
        right=1 - side / width,
        top=1 - _TOP / height,
        bottom=_MARGIN / height,
        wspace=0.06,
        hspace=0.06,
    )
    part.text(0.5, 1 - 0.12 / height, result.name, ha="center", va="top", fontsize=9, fontweight="bold")
    part.text(0.5, 1 - 0.30 / height, _headline(result.focus, result.steps), ha="center", va="top", fontsize=6.5)
    for column, (title, images, brightest) in enumerate(columns):
        axes[0][column].set_title(title, fontsize=6, pad=3)
        for row in range(rows):
            axis = axes[row][column]
            axis.set_axis_off()
            if row < len(images):
                axis.imshow(images[row, 0].numpy(), cmap="gray" if brightest == 1 else "magma", vmin=0, vmax=brightest)


def _headline(row: Row, steps: int) -> str:
    speed = "" if row.timing is None else f"{row.timing.wall_ratio:.2f}× faster, "
    score = "not finite" if row.quality is None else f"PSNR {decibels(row.quality.psnr_mean)} dB"
    return f"{row.label}, {row.nfe:.0f} of {steps} steps\n{speed}{score}"


def _difference(panel: Panel, uncached: Panel) -> Tensor:
    return (panel.images - uncached.images).abs()


def _gain(differences: Sequence[Tensor]) -> int:
    """The largest round factor that keeps nearly every pixel's difference below 1."""
    typical = max(float(difference.flatten().quantile(0.995)) for difference in differences)
    return max((gain for gain in _GAINS if gain * typical <= 1), default=1)
