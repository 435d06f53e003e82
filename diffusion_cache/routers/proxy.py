"""HarmoniCa's image-error proxy: what the cache at one step does to the final sample.

λ_t weighs step t's loss. Both of its forms compare generations that begin alike: their common steps are run once, and
what they gave is given again. For that the features of every step are held.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops import double
from ..profiling.generation import Batch
from .mixing import Following, Gates, Histories, Mixture, Run

REMOVED, CUMULATIVE = "removed", "cumulative"
VARIANTS = (REMOVED, CUMULATIVE)


def image_errors(mixture: Mixture, batch: Batch, gates: Sequence[Gates], variant: str) -> Tensor:
    """λ_t ≥ 0 of each step, [T] float64, λ_0 = 0; the mean over samples of squared distances between last states.

    gates: of each step. "removed" (the paper): λ_t = ‖x − x^(t)‖², with x the sample where all steps go by their
    gates and x^(t) where all but step t do. "cumulative" (the official code): λ_t = e_t − e_{t−1}, at least 0, with
    e_t = ‖x^(0) − x^(≤t)‖², where steps up to t go by their gates and the later ones compute all.
    """
    steps, spans = len(gates), len(gates[0].store)
    recorded = _Recorded(mixture, lambda step: gates[step])
    last = mixture.generate(batch, recorded)
    everything = Gates.computing(spans)
    if variant == REMOVED:
        return torch.stack(
            [torch.zeros((), dtype=torch.float64)]
            + [
                _distance(last, mixture.generate(batch, _Resumed(recorded, t, {t: everything}, gates)))
                for t in range(1, steps)
            ]
        )
    computed = dict.fromkeys(range(steps), everything)
    ends = [mixture.generate(batch, _Resumed(recorded, t + 1, computed, gates)) for t in range(steps - 1)]
    errors = torch.stack([_distance(ends[0], end) for end in [*ends, last]])
    return torch.cat([errors[:1], errors.diff().clamp_min(0)])


def _distance(a: Tensor, b: Tensor) -> Tensor:
    return (double(a) - double(b)).square().flatten(1).sum(dim=1).mean().cpu()


class _Recorded(Following):
    """Notes what each call gave, and the histories that each step began with."""

    def __init__(self, mixture: Mixture, gates: Callable[[int], Gates]):
        super().__init__(gates)
        self.mixture = mixture
        self.outputs: dict[tuple[int, int], Any] = {}
        self.histories: dict[int, Histories] = {}

    def call(self, step: int, position: int, run: Run) -> Any:
        self.histories.setdefault(step, dict(self.mixture.histories))
        output = self.outputs[step, position] = super().call(step, position, run)
        return output


class _Resumed(Following):
    """A recorded generation up to a step, and from there on by other gates where there are any."""

    def __init__(self, recorded: _Recorded, begin: int, other: dict[int, Gates], gates: Sequence[Gates]):
        super().__init__(lambda step: other.get(step, gates[step]))
        self.recorded, self.begin = recorded, begin

    def call(self, step: int, position: int, run: Run) -> Any:
        if step < self.begin:
            return self.recorded.outputs[step, position]
        if step == self.begin and position == 0:
            self.recorded.mixture.histories = dict(self.recorded.histories[step])
        return super().call(step, position, run)
