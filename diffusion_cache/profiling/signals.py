"""How far each step of one span is from the step before it: the curves that published policies look at."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..errors import ConfigError
from ..profile import SIGNALS
from ..signals import filtered_l1
from .moments import Leaves, Sums, as_leaves


class Last(NamedTuple):
    """One step of a pass: residuals and inputs of its leaves, the norms of the main leaf's tokens [B, N]."""

    step: int
    residuals: list[Tensor]
    inputs: list[Tensor]
    norms: Tensor


class SignalCurves(Sums):
    """Means over samples of four distances between one span's step t and its step t − 1 in the same run and pass.

    residual_l1   L1r of the residuals, or of the outputs where there is none (methods' notation: mean|a−b| / mean|b|)
    input_l1      L1r of the span's inputs
    norm_ratio    mean over tokens of ‖R_t‖ / ‖R_{t−1}‖, of the largest leaf (MagCache)
    filtered_l1   L1r of the inputs filtered by noise level (see `signals.filtered_l1`), of the leaf with a layout

    A sample whose step t − 1 was not seen, or is all zeros, counts for nothing; a step with no sample is NaN.

    Only one step of each pass is kept, where it was computed; hold: a device to keep it on instead ("cpu" for models
    that fill theirs). noise_levels: log-SNR of each step; without them filtered_l1 is not measured. grid: (frames,
    height, width) of the tokens, frames 1 for images; latents [B, C, H, W] and [B, C, F, H, W] tell it themselves,
    and an input of neither form is not filtered.
    """

    def __init__(
        self,
        name: str,
        steps: int,
        passes: int = 1,
        *,
        noise_levels: Sequence[float] | None = None,
        grid: tuple[int, int, int] | None = None,
        hold: torch.device | str | None = None,
    ):
        super().__init__(name)
        if noise_levels is not None and len(noise_levels) != steps:
            raise ConfigError(f"{name}: {len(noise_levels)} noise levels for {steps} steps; give one for each")
        self.steps, self.passes = steps, passes
        self.noise_levels, self.grid = noise_levels, grid
        self.hold = hold
        for key in SIGNALS:
            for kind in ("sum", "count"):
                self.sums[f"{key}.{kind}"] = torch.zeros(passes, steps, dtype=torch.float64)
        self._last: dict[int, Last] = {}

    def observe(self, step: int, pass_index: int, outputs: Leaves, inputs: Leaves | None = None) -> None:
        """Take in what the span received and computed at a step; steps in order, `end_run` between runs.

        outputs, inputs: as for `SpanMoments.observe`; an input of another shape than its output still has its curves.

        Raises:
            ConfigError: for a step out of range, or tensors of another size than the step before had.
        """
        if not (0 <= step < self.steps and 0 <= pass_index < self.passes):
            raise ConfigError(
                f"{self.name}: step {step}, pass {pass_index} is outside the profile's {self.steps} steps and "
                f"{self.passes} passes"
            )
        now = self._take(step, outputs, inputs)
        last = self._last.pop(pass_index, None)
        if last is not None and last.step == step - 1:
            self._compare(pass_index, now, last)
        # a residual is a tensor of our own, an input may be overwritten before the next step
        residuals = [leaf if self.hold is None else leaf.to(self.hold) for leaf in now.residuals]
        inputs_kept = [leaf.to(self.hold or leaf.device, copy=True) for leaf in now.inputs]
        self._last[pass_index] = Last(step, residuals, inputs_kept, now.norms)

    def _compare(self, pass_index: int, now: Last, last: Last) -> None:
        if [t.shape for t in (*now.residuals, *now.inputs)] != [t.shape for t in (*last.residuals, *last.inputs)]:
            raise ConfigError(
                f"{self.name}: its tensors changed their sizes at step {now.step}; end runs with end_run()"
            )
        values = {
            "residual_l1": leaves_l1(now.residuals, last.residuals),
            "norm_ratio": norm_ratio(now.norms, last.norms),
        }
        if now.inputs:
            values["input_l1"] = leaves_l1(now.inputs, last.inputs)
        filtered = self._filtered_l1(now, last)
        if filtered is not None:
            values["filtered_l1"] = filtered
        # one transfer for all of them
        for key, rows in zip(values, torch.stack([*values.values()]).cpu().double(), strict=True):
            known = rows[rows.isfinite()]
            self.sums[f"{key}.sum"][pass_index, now.step] += known.sum()
            self.sums[f"{key}.count"][pass_index, now.step] += len(known)

    def end_run(self) -> None:
        """Forget the last step: the next one begins another run."""
        self._last.clear()

    @property
    def nbytes(self) -> int:
        """Bytes held: the sums, and the last step of each pass."""
        kept = (tensor for last in self._last.values() for tensor in (*last.residuals, *last.inputs, last.norms))
        return super().nbytes + sum(tensor.nbytes for tensor in kept)

    def result(self) -> dict[str, Tensor]:
        """residual_l1, input_l1, filtered_l1, norm_ratio: [P, T] float32; NaN at step 0 and where nothing was seen."""
        return {key: (self.sums[f"{key}.sum"] / self.sums[f"{key}.count"]).float() for key in SIGNALS}

    def _take(self, step: int, outputs: Leaves, inputs: Leaves | None) -> Last:
        outs = as_leaves(outputs, 1)
        bases = as_leaves(inputs, len(outs))
        residuals = [
            out.detach().clone() if base is None or base.shape != out.shape else out.detach() - base.detach()
            for out, base in zip(outs, bases, strict=True)
            if out is not None
        ]
        main = max(residuals, key=lambda leaf: leaf[0].numel())
        norms = torch.linalg.vector_norm(main, dim=ops.channel_axis(main), dtype=ops.at_least_float32(main.dtype))
        return Last(step, residuals, [base.detach() for base in bases if base is not None], norms.flatten(1).float())

    def _filtered_l1(self, now: Last, last: Last) -> Tensor | None:
        if self.noise_levels is None:
            return None
        for leaf, before in zip(now.inputs, last.inputs, strict=True):
            keep = ops.channel_axis(leaf) % leaf.ndim
            layout = self._layout(leaf, keep)
            if layout is not None:
                new, old = (x.to(leaf.device).movedim(keep, 1).reshape(len(x), -1, *layout) for x in (leaf, before))
                return filtered_l1(new, old, self.noise_levels[now.step], self.noise_levels[last.step])
        return None

    def _layout(self, leaf: Tensor, keep: int) -> tuple[int, ...] | None:
        """(frames, height, width) or (height, width) of a leaf's positions, if known."""
        sizes = tuple(size for dim, size in enumerate(leaf.shape) if dim not in (0, keep))
        if leaf.ndim == 3 and self.grid is not None and sizes == (math.prod(self.grid),):
            sizes = self.grid
        if len(sizes) == 3 and sizes[0] == 1:
            sizes = sizes[1:]
        return sizes if len(sizes) in (2, 3) else None


def leaves_l1(now: Sequence[Tensor], before: Sequence[Tensor]) -> Tensor:
    """mean|now − before| / mean|before| over all elements of all leaves, of each sample: [B] float32.

    0/0 is NaN and x/0 infinite. Differences are taken in the tensors' own precision, sums in float32.
    """
    difference = scale = torch.zeros(len(now[0]), device=now[0].device)
    for leaf, old in zip(now, before, strict=True):
        old = old.to(leaf.device)
        difference = difference + _sum_abs(leaf - old)
        scale = scale + _sum_abs(old)
    return difference / scale


def norm_ratio(now: Tensor, before: Tensor) -> Tensor:
    """Mean over tokens of now / before, their norms [B, N], of each sample: [B]. Tokens that were 0 are left out."""
    ratio = torch.where(before > 0, now / before, torch.nan)
    return ratio.nanmean(1)


def _sum_abs(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x.flatten(1), ord=1, dim=1, dtype=ops.at_least_float32(x.dtype)).float()
