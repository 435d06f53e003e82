"""y = scale · (x + Σ_j w_j·R_j) + bias, the output of a reused span, in one pass.

x is the span's input, R_j up to eight stored features, w_j the forecaster's weights (`forecasters/`), scale and bias
its correction (`Correction`). Every linear forecaster is this op: reuse (FORA, arXiv 2407.01425) with one weight of 1,
Taylor (TaylorSeer, arXiv 2503.06923) and fitted ones with several. A scale of the sum alone is a scale of the weights.
Bytes moved: one read of x and of each R_j, and one write of y.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .codes import decode_reference
from .sums import corrected, operands, weighted_sum
from .tiles import CONFIGS, layout, place, start, tiling

# of the largest magnitude among the terms of a sum: float32 rounding of it, and one rounding to the result's dtype
TOLERANCE = {torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}

# what is timed: the image streams of FLUX 1024², Wan 480p and DiT-XL/2, and the feature maps of SDXL
SHAPES = {
    "FLUX 1024²": (1, 4608, 3072),
    "Wan 480p": (1, 32760, 1536),
    "SDXL 64²": (2, 640, 64, 64),
    "SDXL 128²": (2, 320, 128, 128),
    "DiT-XL/2": (2, 256, 1152),
}


def reference(
    base: Tensor | None,
    features: Sequence[Tensor],
    scales: Sequence[Tensor],
    weights: Tensor,
    correction: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """The same in float32, term by term."""
    plain = len(features) - len(scales)
    values = [*features[:plain], *map(decode_reference, features[plain:], scales)]
    total = torch.zeros_like(values[0], dtype=torch.float32) if base is None else base.float()
    between = [1] * (total.ndim - 1)
    for j, value in enumerate(values):
        weight = weights[..., j].float()
        total = total + (weight.reshape(-1, *between) if weights.ndim == 2 else weight) * value.float()
    if correction is not None:
        scale, bias = correction.float().unbind(1)
        channel = total.ndim - 1 if total.ndim <= 3 else 1
        shape = [len(scale)] + [scale.shape[1] if axis == channel else 1 for axis in range(1, total.ndim)]
        total = scale.reshape(shape) * total + bias.reshape(shape)
    return total.to(dtype)


@triton.jit
def kernel(
    out,
    base,
    slots,
    scales,
    weights,
    correction,
    rows,
    columns,
    base_stride,
    weight_stride,
    correction_stride,
    channels,
    group,
    CODE: tl.constexpr,
    KIND: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    entry, row, column = place(rows, columns, TILE_ROWS, TILE_COLUMNS)
    inside = (row < rows) & (column < columns)
    offset = row.to(tl.int64) * columns + column
    if base is None:
        total = tl.zeros((TILE_ROWS, TILE_COLUMNS), tl.float32)
    else:
        total = tl.load(base + entry * base_stride + offset, mask=inside).to(tl.float32)
    total = weighted_sum(
        total, slots, scales, weights, entry, row, column, rows, columns, weight_stride, CODE, TILE_COLUMNS
    )
    total = corrected(total, correction, entry, row, column, correction_stride, channels, group, rows, columns, KIND)
    tl.store(out + entry * rows * columns + offset, total.to(out.dtype.element_ty), mask=inside)


def launch(
    base: Tensor | None,
    features: Sequence[Tensor],
    scales: Sequence[Tensor],
    weights: Tensor,
    correction: Tensor | None,
    dtype: torch.dtype,
    out: Tensor | None = None,
    config: tuple[int, int] = CONFIGS[0],
) -> Tensor:
    """y of `dtype` in float32 sums. out: where to, laid out as the features are; `base` for in place.

    base and features are [batch, ...] of one shape; features of float32, float16 or bfloat16, then those in codes, with
    the scales of these. A base may be broadcast over its batch or be a slice of a longer sequence; anything else that
    is not contiguous, nor channels-last throughout, is made so first.
    """
    like = features[-1 if scales else 0]
    laid_out = layout(like)
    moved = not scales and laid_out is not torch.contiguous_format
    given = operands(features, scales, weights, correction, moved)
    form = given.form
    if base is not None and base.shape != like.shape:
        raise ValueError(f"base and features have one shape, not {list(base.shape)} and {list(like.shape)}")
    if out is None:
        out = torch.empty_like(like, dtype=dtype, memory_format=laid_out)
    target = out.movedim(1, -1) if moved else out
    if not target.is_contiguous():
        raise ValueError("out must be contiguous, or channels-last like the features")
    if base is not None:
        base = base.movedim(1, -1) if moved else base
        base = base if base[0].is_contiguous() else base.contiguous()
    tiles = tiling(form.batch, form.rows, form.columns, config)
    start(
        kernel,
        tiles.programs,
        tiles.warps,
        like.device,
        target,
        base,
        given.slots,
        given.scales,
        given.weights,
        given.correction,
        form.rows,
        form.columns,
        0 if base is None else base.stride(0),
        *form.numbers,
        **form.constants,
        **tiles.sizes,
    )
    return out
