"""What the demo measured, as plain data."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from ..measure import PairedTiming, Quality


@dataclass(frozen=True)
class Row:
    """One method at one budget.

    every: the budget, one computed step in `every`.
    nfe: denoiser evaluations whose cached spans were computed, mean per sample.
    blocks, flops: executed blocks and floating point operations, as shares of the uncached run's.
    quality: against the uncached outputs; None where the output is not finite.
    timing: a is uncached, b is this method; None where `problem` says why a speed would mean nothing.
    """

    label: str
    every: int
    options: Mapping[str, Any]
    nfe: float
    blocks: float
    flops: float
    quality: Quality | None
    timing: PairedTiming | None
    problem: str | None

    def to_json(self) -> dict[str, Any]:
        timing = self.timing and {
            "wall_ratio": self.timing.wall_ratio,
            "cpu_ratio": self.timing.cpu_ratio,
            "uncached_seconds": self.timing.a_seconds,
            "seconds": self.timing.b_seconds,
            **asdict(self.timing),
        }
        return {**vars(self), "quality": self.quality and self.quality.to_json(), "timing": timing}


@dataclass(frozen=True)
class Panel:
    """Images of one method, float [n, 1, h, w] in [0, 1] (of a video, its middle frame)."""

    label: str
    images: Tensor


@dataclass(frozen=True)
class ModelResult:
    """All rows of one model and the pictures to show.

    fitted: what was chosen on the fitting seeds. focus: the row that the pictures are about.
    panels: uncached, the method in focus, and fewer sampler steps at the same budget.
    """

    name: str
    pipeline: str
    sampler: str
    steps: int
    guidance: float
    labels: tuple[int, ...]
    reporting_seeds: tuple[int, ...]
    fitting_seeds: tuple[int, ...]
    fitted: Mapping[str, float]
    rows: tuple[Row, ...]
    focus: Row
    panels: tuple[Panel, ...]

    @property
    def title(self) -> str:
        guidance = "no guidance" if self.guidance == 1 else f"guidance {self.guidance:g}"
        return f"{self.name}: {self.pipeline}, {self.sampler}, {self.steps} steps, {guidance}"

    def to_json(self) -> dict[str, Any]:
        """Everything but the pictures."""
        data = {key: value for key, value in vars(self).items() if key != "panels"}
        focus = {"label": self.focus.label, "every": self.focus.every}
        return {**data, "rows": [row.to_json() for row in self.rows], "focus": focus}
