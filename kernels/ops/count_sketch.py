"""A count-sketch of features [batch, elements]: each element is added, with a random sign, to one of `width` sums.

sums[b, j] += Σ_r s(b, r, j) · x[b, r · width + π_r(j)] over runs r of `width` elements, π_r a permutation and s a sign,
both hashes of indices (`diffusion_cache/count_sketch.py`; Charikar, Chen and Farach-Colton 2002).

Each program makes some of one sample's sums over a part of the runs, hashing in registers what PyTorch writes to memory
as indices and signs. The parts are added up in one order, so that the same sums come out every time. Bytes
moved: one read of x, whose elements are gathered within a run, which L2 holds.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import parts_of, start

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-5, torch.bfloat16: 1e-5}  # of the largest sum
SHAPES = {"FLUX 1024²": (1, 4608, 3072), "Wan 480p": (1, 32760, 1536), "DiT-XL/2": (2, 256, 1152)}
WIDTH = 2**15  # that it is timed at
CONFIGS = ((1024, 4), (512, 4), (2048, 8))
PARTS = 16  # of the runs
LARGEST = tl.constexpr(0x7FFFFFFF)  # hashes are of 31 bits, which 32-bit arithmetic keeps though it wraps around
SIGNS_PER_HASH = 24


def reference(sums: Tensor, flat: Tensor, run: int, first: int, stages: list[int], signs: list[int]) -> Tensor:
    """The sums afterwards, in float64: each element is added to the one that its run's permutation takes it to."""
    (batch, elements), width = flat.shape, sums.shape[1]
    found = sums.double()
    for number, begin in enumerate(range(0, elements, width), start=run):
        at = torch.arange(width, device=flat.device)
        for multiplier, offset in zip(stages[::2], stages[1::2], strict=True):
            at = (at * ((_mixed(number, multiplier) & (width - 1)) | 1) + _mixed(number, offset)) & (width - 1)
            at = at ^ (at >> (width.bit_length() // 2))
        bucket = torch.argsort(at)[: elements - begin]  # of each element of the run
        for row in range(batch):
            sample = first + row
            key = signs[sample // SIGNS_PER_HASH - first // SIGNS_PER_HASH]
            bits = _mixed(number * width + bucket, key) >> (sample % SIGNS_PER_HASH)
            found[row].index_add_(0, bucket, flat[row, begin : begin + width].double() * (1 - 2 * (bits & 1)))
    return found


def _mixed(value, key: int):
    value = (value + key) % 2**31
    value = (value ^ (value >> 16)) * 0x2C1B3C6D % 2**31
    value = (value ^ (value >> 12) ^ key ^ 0x5BD1E995) * 0x297A2D39 % 2**31
    return value ^ (value >> 15)


@triton.jit
def mixed(value, key):
    value = (value + key) & LARGEST
    value = ((value ^ (value >> 16)) * 0x2C1B3C6D) & LARGEST
    value = ((value ^ (value >> 12) ^ key ^ 0x5BD1E995) * 0x297A2D39) & LARGEST
    return value ^ (value >> 15)


@triton.jit
def kernel(
    partial,
    flat,
    numbers,
    batch,
    elements,
    stride,
    WIDTH: tl.constexpr,
    HALF: tl.constexpr,
    PARTS: tl.constexpr,
    SIGNS_PER_HASH: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    """partial: [PARTS, batch, WIDTH]. numbers, int32: run, first, six keys of stages, those of the groups' signs."""
    across: tl.constexpr = WIDTH // TILE_COLUMNS
    program = tl.program_id(0)
    column = (program % across) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    entry = (program // across) % batch
    part = program // (across * batch)
    opening = tl.load(numbers)
    first = tl.load(numbers + 1)
    key = tl.load(numbers + 8 + (first + entry) // SIGNS_PER_HASH - first // SIGNS_PER_HASH)
    shift = (first + entry) % SIGNS_PER_HASH
    total = tl.zeros((TILE_COLUMNS,), tl.float32)
    row = flat + entry.to(tl.int64) * stride
    begin = part.to(tl.int64) * WIDTH
    for place in range(part, parts_of(elements, WIDTH), PARTS):
        run = opening + place
        at = column
        for stage in tl.static_range(3):
            multiplier = mixed(run, tl.load(numbers + 2 + 2 * stage))
            offset = mixed(run, tl.load(numbers + 3 + 2 * stage))
            at = (at * ((multiplier & (WIDTH - 1)) | 1) + offset) & (WIDTH - 1)
            at = at ^ (at >> HALF)
        element = begin + at
        value = tl.load(row + element, mask=element < elements, other=0.0).to(tl.float32)
        begin += PARTS * WIDTH
        negative = (mixed(run * WIDTH + column, key) >> shift) & 1
        total += tl.where(negative == 1, -value, value)
    tl.store(partial + (part.to(tl.int64) * batch + entry) * WIDTH + column, total)


def launch(
    sums: Tensor,
    flat: Tensor,
    run: int,
    first: int,
    stages: list[int],
    signs: list[int],
    config: tuple[int, int] = CONFIGS[0],
) -> None:
    """Add flat [batch, elements] (float32, float16 or bfloat16) to the float32 sums [batch, width], width a power of 2.

    run: of the runs of the whole feature, the one that flat begins with. first: number of the first sample. stages,
    signs: keys of the hashes, `diffusion_cache.count_sketch.Keys`.
    """
    batch, width = sums.shape
    if len(flat) != batch or flat.ndim != 2:
        raise ValueError(f"sums {list(sums.shape)} are of as many samples as the features, not {list(flat.shape)}")
    flat = flat if flat.stride(1) == 1 else flat.contiguous()
    elements, warps = config
    tile = min(elements, width)
    numbers = torch.tensor([run, first, *stages, *signs], dtype=torch.int32, device="cpu")
    numbers = numbers.pin_memory() if flat.is_cuda else numbers  # or the host would wait for the copy
    numbers = numbers.to(flat.device, non_blocking=True)
    partial = torch.empty(PARTS, batch, width, device=flat.device, dtype=torch.float32)
    start(
        kernel,
        PARTS * batch * (width // tile),
        warps,
        flat.device,
        partial,
        flat,
        numbers,
        batch,
        flat.shape[1],
        flat.stride(0),
        WIDTH=width,
        HALF=width.bit_length() // 2,
        PARTS=PARTS,
        SIGNS_PER_HASH=SIGNS_PER_HASH,
        TILE_COLUMNS=tile,
    )
    sums += partial.sum(0)
