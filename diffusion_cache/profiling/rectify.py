"""What ERTACache (arXiv 2508.21091) calibrates on runs of a pipeline along the cached path."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..engine import Method, Observer
from ..engine.frame import Frame
from ..engine.observer import Again
from ..engine.structure import flatten
from ..forecasters.fitted import Fitted
from ..plan import Plan
from ..policies import Guarded, Planned
from .generation import Teacher, attached

Array = NDArray[np.float64]


def reuse_errors(teacher: Teacher, plan: Plan) -> tuple[Array, Array, Array]:
    """What a plan's reused model outputs ṽ are off by, and how large and how different the true ones v are.

    v is computed where the cached run has come to. Norms are L1, over all samples and guidance branches.

    Returns: ‖ṽ_t − v_t‖ (0 at computed steps), ‖v_t‖ and ‖v_t − v_{t−1}‖ (0 at the first), each [T].
    """
    watching = _Watching(teacher.steps)
    batch = teacher.batch
    method = Method(Guarded(Planned(plan)), Fitted.of(plan), plan.scope, plan.depth, "batch")
    with attached(batch.pipe, method, watching):
        batch.call()
    return watching.errors, watching.sizes, watching.changes


class _Watching(Observer):
    def __init__(self, steps: int):
        self.errors, self.sizes, self.changes = np.zeros((3, steps))
        self._before: dict[tuple, Tensor] = {}  # by denoiser and pass

    def denoiser_called(self, frame: Frame, output: Any, again: Again) -> None:
        step = frame.step.index
        given = true = model_output(output)
        if frame.reused:
            true = model_output(again(compute=True))
        before = self._before.get(frame.key, true)
        self._before[frame.key] = true.clone()
        self.errors[step] += _l1(given - true)
        self.sizes[step] += _l1(true)
        self.changes[step] += _l1(true - before)


def model_output(output: Any) -> Tensor:
    """The first tensor of what a denoiser returns."""
    return next(leaf for leaf in flatten(output)[0] if isinstance(leaf, Tensor)).detach()


def _l1(tensor: Tensor) -> float:
    return float(tensor.double().abs().sum())
