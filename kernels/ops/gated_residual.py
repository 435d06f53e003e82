"""y = x + gate · (scale · Σ_j w_j·F_j + bias), where a reused branch joins the block's stream.

F_j are stored outputs of an attention or feed-forward branch, taken before its gate, so that the gate of adaptive layer
norm (DiT, arXiv 2212.09748, section 3.2) is today's and not the one of the step that is reused; the rest is
`forecast_residual`. Bytes moved: one read of x and of each F_j, one write of y, and the gate, which is small unless it
differs from token to token.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import forecast_residual
from .sums import corrected, operands, weighted_sum
from .tiles import CONFIGS, place, start, tiling

TOLERANCE = forecast_residual.TOLERANCE
SHAPES = {name: shape for name, shape in forecast_residual.SHAPES.items() if len(shape) == 3}


def reference(
    base: Tensor,
    gate: Tensor,
    features: Sequence[Tensor],
    scales: Sequence[Tensor],
    weights: Tensor,
    correction: Tensor | None,
) -> Tensor:
    """The same in float32, term by term."""
    branch = forecast_residual.reference(None, features, scales, weights, correction, torch.float32)
    return (base.float() + gate.float() * branch).to(base.dtype)


@triton.jit
def kernel(
    out,
    base,
    gate,
    slots,
    scales,
    weights,
    correction,
    rows,
    columns,
    base_stride,
    gate_stride,
    gate_row_stride,
    weight_stride,
    correction_stride,
    channels,
    group,
    CODE: tl.constexpr,
    KIND: tl.constexpr,
    GATE_ROWS: tl.constexpr,
    GATE_COLUMNS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    entry, row, column = place(rows, columns, TILE_ROWS, TILE_COLUMNS)
    inside = (row < rows) & (column < columns)
    offset = row.to(tl.int64) * columns + column
    branch = weighted_sum(
        tl.zeros((TILE_ROWS, TILE_COLUMNS), tl.float32),
        slots,
        scales,
        weights,
        entry,
        row,
        column,
        rows,
        columns,
        weight_stride,
        CODE,
        TILE_COLUMNS,
    )
    branch = corrected(branch, correction, entry, row, column, correction_stride, channels, group, rows, columns, KIND)
    gates = gate + entry * gate_stride
    if GATE_ROWS and GATE_COLUMNS:
        opened = tl.load(gates + row.to(tl.int64) * gate_row_stride + column, mask=inside)
    elif GATE_ROWS:
        opened = tl.load(gates + row.to(tl.int64) * gate_row_stride, mask=row < rows)
    elif GATE_COLUMNS:
        opened = tl.load(gates + column, mask=column < columns)
    else:
        opened = tl.load(gates)
    total = tl.load(base + entry * base_stride + offset, mask=inside).to(tl.float32) + opened.to(tl.float32) * branch
    tl.store(out + entry * rows * columns + offset, total.to(out.dtype.element_ty), mask=inside)


def launch(
    base: Tensor,
    gate: Tensor,
    features: Sequence[Tensor],
    scales: Sequence[Tensor],
    weights: Tensor,
    correction: Tensor | None,
    out: Tensor | None = None,
    config: tuple[int, int] = CONFIGS[0],
) -> Tensor:
    """y like base. base and features: [batch, tokens, channels]; gate: [batch or 1, tokens or 1, channels or 1].

    Dtypes and `out` are those of `forecast_residual.launch`; the gate may be of any of them.
    """
    given = operands(features, scales, weights, correction, whole_rows=True)
    form = given.form
    shape = features[0].shape
    if base.shape != shape or len(shape) != 3 or gate.ndim != 3:
        raise ValueError(
            f"base, features and gate have 3 axes, not {list(base.shape)}, {list(shape)}, {list(gate.shape)}"
        )
    if any(size not in (1, whole) for size, whole in zip(gate.shape, shape, strict=True)):
        raise ValueError(f"a gate is as long as the features {list(shape)} on each axis or 1, not {list(gate.shape)}")
    base = base if base[0].is_contiguous() else base.contiguous()
    gate = gate if gate.shape[-1] == 1 or gate.stride(-1) == 1 else gate.contiguous()
    if out is None:
        out = torch.empty(base.shape, dtype=base.dtype, device=base.device)
    if not out.is_contiguous():
        raise ValueError("out must be contiguous")
    tiles = tiling(form.batch, form.rows, form.columns, config)
    start(
        kernel,
        tiles.programs,
        tiles.warps,
        base.device,
        out,
        base,
        gate,
        given.slots,
        given.scales,
        given.weights,
        given.correction,
        form.rows,
        form.columns,
        base.stride(0),
        gate.stride(0) if len(gate) > 1 else 0,
        gate.stride(1),
        *form.numbers,
        **form.constants,
        GATE_ROWS=gate.shape[1] > 1,
        GATE_COLUMNS=gate.shape[2] > 1,
        **tiles.sizes,
    )
    return out
