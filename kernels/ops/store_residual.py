"""R = y − x, written as the feature of a computed span: in its own dtype, or as one-byte codes with a scale per row.

The formula of the codes is in `codes.py`. On the way, and at no further read of y and x, the sums ΣR, ΣR², Σ|R| and,
with the feature P stored before it, Σ|R − P| and Σ|P|: a step's norm, moments and drift (the relative change of
residuals by which DiCache, arXiv 2508.17356, and others decide). Bytes moved: one read of y and of x, one write of R.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import forecast_residual
from .codes import FLOOR, TOP, code_of, decode, decode_reference, encode, encode_reference, largest_magnitude, raw
from .tiles import start

# of the sums; what is stored is exact, but for one rounding to the feature's dtype
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-5, torch.bfloat16: 1e-5}
SHAPES = forecast_residual.SHAPES
WIDEST_ROW = 16384  # columns: a program holds a row at once, to find its largest number before it is encoded
SUMS = 5
TILE = 2048  # numbers that a program takes at least, in rows


def reference(current: Tensor, base: Tensor | None, code: str) -> tuple[Tensor, Tensor | None]:
    """The feature and the scales of its rows, [..., 1 less axis]; None without a code."""
    residual = current.float() if base is None else current.float() - base.float()
    return encode_reference(residual, code) if code else (residual.to(current.dtype), None)


def sums_reference(current: Tensor, base: Tensor | None, previous: Tensor | None, scales: Tensor | None) -> Tensor:
    """[batch, 5]: ΣR, ΣR², Σ|R|, Σ|R − P|, Σ|P|; the last two 0 without a P."""
    residual = current.float() if base is None else current.float() - base.float()
    parts = [residual, residual.square(), residual.abs()]
    if previous is None:
        parts += [torch.zeros_like(residual)] * 2
    else:
        before = previous.float() if scales is None else decode_reference(previous, scales)
        parts += [(residual - before).abs(), before.abs()]
    return torch.stack([part.flatten(1).sum(1) for part in parts], 1)


@triton.jit
def kernel(
    feature,
    scales,
    sums,
    current,
    base,
    previous,
    previous_scales,
    rows,
    columns,
    current_stride,
    base_stride,
    CODE: tl.constexpr,
    TOP: tl.constexpr,
    FLOOR: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    """One program does TILE_ROWS whole rows. sums: [batch · rows, 5], or None; previous: as feature, or None."""
    program = tl.program_id(0)
    down = tl.cdiv(rows, TILE_ROWS)
    entry = (program // down).to(tl.int64)
    row = (program % down) * TILE_ROWS + tl.arange(0, TILE_ROWS)[:, None]
    column = tl.arange(0, TILE_COLUMNS)[None, :]
    inside = (row < rows) & (column < columns)
    offset = row.to(tl.int64) * columns + column
    line = entry * rows + row
    stored = line * columns + column
    residual = tl.load(current + entry * current_stride + offset, mask=inside, other=0.0).to(tl.float32)
    if base is not None:
        residual -= tl.load(base + entry * base_stride + offset, mask=inside, other=0.0).to(tl.float32)
    if CODE == "":
        tl.store(feature + stored, residual.to(feature.dtype.element_ty), mask=inside)
    else:
        largest = largest_magnitude(residual)[:, None]
        largest = tl.where(largest < FLOOR, FLOOR, largest)
        # the numerator as a tensor: a division of constants is not rounded as div_rn rounds
        top = tl.full((TILE_ROWS, 1), TOP, tl.float32)
        tl.store(feature + stored, encode(residual * tl.div_rn(top, largest), CODE), mask=inside)
        tl.store(scales + line, tl.div_rn(largest, top), mask=row < rows)
    if sums is not None:
        place = sums + line * 5
        is_row = row < rows
        tl.store(place, tl.sum(residual, axis=1)[:, None], mask=is_row)
        tl.store(place + 1, tl.sum(residual * residual, axis=1)[:, None], mask=is_row)
        tl.store(place + 2, tl.sum(tl.abs(residual), axis=1)[:, None], mask=is_row)
        if previous is not None:
            before = decode(tl.load(previous + stored, mask=inside, other=0), CODE)
            if CODE != "":
                before *= tl.load(previous_scales + line, mask=is_row, other=0.0)
            tl.store(place + 3, tl.sum(tl.abs(residual - before), axis=1)[:, None], mask=is_row)
            tl.store(place + 4, tl.sum(tl.abs(before), axis=1)[:, None], mask=is_row)


def launch(
    feature: Tensor,
    scales: Tensor | None,
    current: Tensor,
    base: Tensor | None,
    previous: Tensor | None = None,
    previous_scales: Tensor | None = None,
    with_sums: bool = False,
) -> Tensor | None:
    """Writes `feature` and, where it holds codes, `scales`, both contiguous. The sums [batch, 5] if asked for.

    current, base: [batch, ..., up to WIDEST_ROW]; previous: as feature, with its scales, or None.
    """
    columns = current.shape[-1]
    if columns > WIDEST_ROW:
        raise ValueError(f"rows are up to {WIDEST_ROW} wide, not {columns}")
    alike = [tensor for tensor in (feature, base, previous) if tensor is not None]
    rows_alike = [tensor for tensor in (scales, previous_scales) if tensor is not None]
    if any(tensor.shape != current.shape for tensor in alike) or any(
        tensor.shape != current.shape[:-1] for tensor in rows_alike
    ):
        raise ValueError("features and inputs have one shape, and scales the same without the last axis")
    if not all(tensor is None or tensor.is_contiguous() for tensor in (feature, scales, previous, previous_scales)):
        raise ValueError("features and scales must be contiguous")
    code = code_of(feature.dtype)
    current = current if current[0].is_contiguous() else current.contiguous()
    if base is not None:
        base = base if base[0].is_contiguous() else base.contiguous()
    batch, rows = len(current), current[0].numel() // columns
    sums = torch.zeros(batch, rows, SUMS, device=current.device) if with_sums else None
    width = triton.next_power_of_2(columns)
    tile_rows = max(1, min(TILE // width, triton.next_power_of_2(rows)))
    start(
        kernel,
        batch * triton.cdiv(rows, tile_rows),
        min(16, max(4, width // 512)),
        current.device,
        raw(feature),
        scales,
        sums,
        current,
        base,
        None if previous is None else raw(previous),
        previous_scales,
        rows,
        columns,
        current.stride(0),
        0 if base is None else base.stride(0),
        CODE=code,
        TOP=TOP.get(code, 0.0),
        FLOOR=FLOOR,
        TILE_ROWS=tile_rows,
        TILE_COLUMNS=width,
    )
    return None if sums is None else sums.sum(1)
