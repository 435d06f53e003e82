"""R = y − x, written as the feature of a computed span in one-byte codes with a scale per row.

The formula of the codes is in `codes.py`. Bytes moved: one read of y and of x, one write of R.
"""

import triton
import triton.language as tl
from torch import Tensor

from . import forecast_residual
from .codes import FLOOR, TOP, code_of, encode, encode_reference, largest_magnitude, raw
from .tiles import ceil_div, parts_of, power_of_2, start

SHAPES = forecast_residual.SHAPES
WIDEST_ROW = 16384  # columns: a program holds a row at once, to find its largest number before it is encoded
TILE = 2048  # numbers that a program takes at least, in rows


def config_for(rows: int, columns: int) -> tuple[int, int]:
    """Elements of a tile, which is of whole rows, and warps."""
    width = power_of_2(columns)
    return width * max(1, min(TILE // width, power_of_2(rows))), min(16, max(4, width // 512))


def reference(current: Tensor, base: Tensor | None, code: str) -> tuple[Tensor, Tensor]:
    """The codes and the scales of their rows, [..., 1 less axis]."""
    return encode_reference(current.float() if base is None else current.float() - base.float(), code)


@triton.jit
def kernel(
    feature,
    scales,
    current,
    base,
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
    """One program does TILE_ROWS whole rows."""
    program = tl.program_id(0)
    down = parts_of(rows, TILE_ROWS)
    entry = (program // down).to(tl.int64)
    row = (program % down) * TILE_ROWS + tl.arange(0, TILE_ROWS)[:, None]
    column = tl.arange(0, TILE_COLUMNS)[None, :]
    inside = (row < rows) & (column < columns)
    offset = row.to(tl.int64) * columns + column
    line = entry * rows + row
    residual = tl.load(current + entry * current_stride + offset, mask=inside, other=0.0).to(tl.float32)
    if base is not None:
        residual -= tl.load(base + entry * base_stride + offset, mask=inside, other=0.0).to(tl.float32)
    largest = largest_magnitude(residual)[:, None]
    largest = tl.where(largest < FLOOR, FLOOR, largest)
    # the numerator as a tensor: a division of constants is not rounded as div_rn rounds
    top = tl.full((TILE_ROWS, 1), TOP, tl.float32)
    tl.store(feature + line * columns + column, encode(residual * tl.div_rn(top, largest), CODE), mask=inside)
    tl.store(scales + line, tl.div_rn(largest, top), mask=row < rows)


def launch(feature: Tensor, scales: Tensor, current: Tensor, base: Tensor | None) -> None:
    """Writes the codes `feature`, like current, and their `scales`, both contiguous.

    current, base: [batch, ..., up to WIDEST_ROW].
    """
    columns = current.shape[-1]
    if columns > WIDEST_ROW:
        raise ValueError(f"rows are up to {WIDEST_ROW} wide, not {columns}")
    alike = [tensor.shape for tensor in (feature, base) if tensor is not None]
    if any(shape != current.shape for shape in alike) or scales.shape != current.shape[:-1]:
        raise ValueError("features and inputs have one shape, and scales the same without the last axis")
    if not feature.is_contiguous() or not scales.is_contiguous():
        raise ValueError("features and scales must be contiguous")
    code = code_of(feature.dtype)
    current = current if current[0].is_contiguous() else current.contiguous()
    if base is not None:
        base = base if base[0].is_contiguous() else base.contiguous()
    batch, rows, width = len(current), current[0].numel() // columns, power_of_2(columns)
    elements, warps = config_for(rows, columns)
    tile_rows = elements // width
    start(
        kernel,
        batch * ceil_div(rows, tile_rows),
        warps,
        current.device,
        raw(feature),
        scales,
        current,
        base,
        rows,
        columns,
        current.stride(0),
        0 if base is None else base.stride(0),
        CODE=code,
        TOP=TOP[code],
        FLOOR=FLOOR,
        TILE_ROWS=tile_rows,
        TILE_COLUMNS=width,
    )
