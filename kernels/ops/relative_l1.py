"""How far a tensor is from another, per sample, in one read of both: the signals of adaptive policies.

l1: Σ|a − b| / Σ|b| (TeaCache, arXiv 2411.19108, equation 4). l2: √Σ(a − b)² / √Σb². cosine: Σab / (√Σa² · √Σb²).
Over all that a batch row holds; 0 where nothing differs, even from zero, and a cosine is NaN where a norm is 0.

Two stages, which sum in the same order every time: each program writes the sums of its part, and one program for each
sample adds these up. The result stays on the device. Bytes moved: one read of a and of b.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import forecast_residual
from .tiles import CONFIGS, ceil_div, channels_last, parts_of, start

MEASURES = ("l1", "l2", "cosine")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-5, torch.bfloat16: 1e-5}
SHAPES = forecast_residual.SHAPES
PARTS = 4  # tiles that one program sums up


def reference(current: Tensor, previous: Tensor, measure: str = "l1") -> Tensor:
    """The same from sums in float32."""
    a, b = current.float().flatten(1), previous.float().flatten(1)
    if measure == "cosine":
        return (a * b).sum(1) / (a.square().sum(1).sqrt() * b.square().sum(1).sqrt())
    if measure == "l2":
        change, size = (a - b).square().sum(1).sqrt(), b.square().sum(1).sqrt()
    else:
        change, size = (a - b).abs().sum(1), b.abs().sum(1)
    return torch.where(change == 0, torch.zeros_like(change), change / size)


@triton.jit
def kernel(
    partial,
    current,
    previous,
    columns,
    current_stride,
    previous_stride,
    MEASURE: tl.constexpr,
    PARTS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    """partial: [programs, 3], the sums that the measure is made of over PARTS tiles of one sample."""
    across = parts_of(columns, TILE_COLUMNS * PARTS)
    program = tl.program_id(0)
    entry = (program // across).to(tl.int64)
    begin = (program % across).to(tl.int64) * (TILE_COLUMNS * PARTS)
    first = tl.zeros((TILE_COLUMNS,), tl.float32)
    second = tl.zeros((TILE_COLUMNS,), tl.float32)
    third = tl.zeros((TILE_COLUMNS,), tl.float32)
    for part in tl.static_range(PARTS):
        column = begin + part * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
        inside = column < columns
        a = tl.load(current + entry * current_stride + column, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(previous + entry * previous_stride + column, mask=inside, other=0.0).to(tl.float32)
        if MEASURE == "l1":
            first += tl.abs(a - b)
            second += tl.abs(b)
        elif MEASURE == "l2":
            first += (a - b) * (a - b)
            second += b * b
        else:
            first += a * b
            second += b * b
            third += a * a
    tl.store(partial + program * 3, tl.sum(first))
    tl.store(partial + program * 3 + 1, tl.sum(second))
    if MEASURE == "cosine":
        tl.store(partial + program * 3 + 2, tl.sum(third))


@triton.jit
def finish(result, partial, parts, MEASURE: tl.constexpr, WIDTH: tl.constexpr):
    """result: [batch], from partial [batch, parts, 3]."""
    entry = tl.program_id(0).to(tl.int64)
    first = tl.zeros((WIDTH,), tl.float32)
    second = tl.zeros((WIDTH,), tl.float32)
    third = tl.zeros((WIDTH,), tl.float32)
    for begin in range(0, parts, WIDTH):
        part = begin + tl.arange(0, WIDTH)
        place = partial + (entry * parts + part) * 3
        first += tl.load(place, mask=part < parts, other=0.0)
        second += tl.load(place + 1, mask=part < parts, other=0.0)
        if MEASURE == "cosine":
            third += tl.load(place + 2, mask=part < parts, other=0.0)
    a = tl.sum(first)
    b = tl.sum(second)
    if MEASURE == "l1":
        value = tl.where(a == 0, 0.0, tl.div_rn(a, b))
    elif MEASURE == "l2":
        value = tl.where(a == 0, 0.0, tl.div_rn(tl.sqrt_rn(a), tl.sqrt_rn(b)))
    else:
        value = tl.div_rn(a, tl.sqrt_rn(tl.sum(third)) * tl.sqrt_rn(b))
    tl.store(result + entry, value)


def launch(current: Tensor, previous: Tensor, measure: str = "l1", config: tuple[int, int] = CONFIGS[0]) -> Tensor:
    """float32 [batch] from two [batch, ...] of one shape, each float32, float16 or bfloat16."""
    if measure not in MEASURES:
        raise ValueError(f"measure must be one of {', '.join(MEASURES)}, not {measure!r}")
    if current.shape != previous.shape:
        raise ValueError(f"both have one shape, not {list(current.shape)} and {list(previous.shape)}")
    if channels_last(current) and channels_last(previous):
        current, previous = current.movedim(1, -1), previous.movedim(1, -1)
    a = current if current[0].is_contiguous() else current.contiguous()
    b = previous if previous[0].is_contiguous() else previous.contiguous()
    elements, warps = config
    batch, columns = len(a), a[0].numel()
    parts = ceil_div(columns, elements * PARTS)
    partial = torch.empty(batch, parts, 3, device=a.device, dtype=torch.float32)
    result = torch.empty(batch, device=a.device, dtype=torch.float32)
    start(
        kernel,
        batch * parts,
        warps,
        a.device,
        partial,
        a,
        b,
        columns,
        a.stride(0),
        b.stride(0),
        MEASURE=measure,
        PARTS=PARTS,
        TILE_COLUMNS=elements,
    )
    start(finish, batch, 4, a.device, result, partial, parts, MEASURE=measure, WIDTH=1024)
    return result
