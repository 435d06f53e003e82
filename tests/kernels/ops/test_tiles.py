"""How kernels walk through tensors, where a size is nearly more than 32 bits hold."""

import torch
import triton
import triton.language as tl
from diffusion_cache.kernels.tiles import parts_of, place
from kernel_cases import DEVICE

LARGEST = 2**31 - 1
WIDE = 2**20


@triton.jit
def placed(out, rows, columns, AT: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr):
    """Where the program AT is: its entry, first row and first column, and the parts that the columns make."""
    if tl.program_id(0) == AT:
        entry, row, column = place(rows, columns, TILE_ROWS, TILE_COLUMNS)
        tl.store(out, entry)
        tl.store(out + 1, tl.max(row))
        tl.store(out + 2, tl.max(column))
        tl.store(out + 3, parts_of(columns, TILE_COLUMNS))


def placed_at(program, rows, columns, *tile):
    out = torch.zeros(4, dtype=torch.int64, device=DEVICE)
    placed[(program + 1,)](out, rows, columns, program, *tile)
    return out.tolist()


def test_columns():
    parts = 2**31 // WIDE
    assert placed_at(parts - 1, 1, LARGEST, 1, WIDE) == [0, 0, LARGEST, parts]
    assert placed_at(parts, 1, LARGEST, 1, WIDE) == [1, 0, WIDE - 1, parts]


def test_rows():
    parts = 2**31 // WIDE
    assert placed_at(parts - 1, LARGEST - 5, 1, WIDE, 1) == [0, LARGEST, 0, 1]
    assert placed_at(parts, LARGEST - 5, 1, WIDE, 1) == [1, WIDE - 1, 0, 1]
