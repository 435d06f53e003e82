"""How kernels walk through tensors: as [batch, rows, columns], in tiles of rows × columns."""

from contextlib import nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# (elements of a tile, warps): a launch takes the first, which `make bench-kernels` compares with the others
CONFIGS = ((2048, 4), (1024, 4), (4096, 8), (8192, 8))
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


class Tiling(NamedTuple):
    """Sizes of a tensor [batch, rows, columns] and of its tiles."""

    batch: int
    rows: int
    columns: int
    tile_rows: int
    tile_columns: int
    warps: int

    @property
    def sizes(self) -> dict[str, int]:
        """The constants that a kernel takes."""
        return {"TILE_ROWS": self.tile_rows, "TILE_COLUMNS": self.tile_columns}

    @property
    def programs(self) -> int:
        return self.batch * ceil_div(self.rows, self.tile_rows) * ceil_div(self.columns, self.tile_columns)


def ceil_div(count: int, size: int) -> int:
    """How many parts of a size hold so many; `triton.cdiv` takes tens of microseconds on the host."""
    return -(-count // size)


def power_of_2(least: int) -> int:
    """The smallest that is no less."""
    return 1 << (least - 1).bit_length()


@lru_cache(maxsize=1024)
def tiling(batch: int, rows: int, columns: int, config: tuple[int, int] = CONFIGS[0]) -> Tiling:
    """Tiles of `config`'s size whose width wastes least of the last one in a row."""
    elements, warps = config
    whole = min(power_of_2(columns), elements)
    widths = [whole >> shift for shift in range(4) if whole >> shift >= min(whole, 128)]
    width = min(widths, key=lambda width: (ceil_div(columns, width) * width, -width))
    if rows == 1:
        width = whole
    return Tiling(batch, rows, columns, max(1, min(elements // width, power_of_2(rows))), width, warps)


def channels_last(tensor: Tensor) -> bool:
    """Whether an image or video [rows, channels, ...] is stored with its channels innermost."""
    return layout(tensor) is not torch.contiguous_format


def layout(tensor: Tensor) -> torch.memory_format:
    """The memory format of what a launch makes like this tensor."""
    form = CHANNELS_LAST.get(tensor.ndim)
    if form is None or tensor.is_contiguous() or not tensor.is_contiguous(memory_format=form):
        return torch.contiguous_format
    return form


def start(kernel: Any, programs: int, warps: int, device: torch.device, *arguments: Any, **constants: Any) -> None:
    """Launch a kernel on a one-dimensional grid."""
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else nullcontext():
        kernel[(programs,)](*arguments, num_warps=warps, enable_fp_fusion=True, **constants)


@triton.jit
def parts_of(count, SIZE: tl.constexpr):
    """`ceil_div` of a count of 1 and more, which may be more with the size added than 32 bits hold."""
    return (count - 1) // SIZE + 1


@triton.jit
def place(rows, columns, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr):
    """This program's batch entry, and the row and column indices of its tile: b, [TILE_ROWS, 1], [1, TILE_COLUMNS]."""
    across = parts_of(columns, TILE_COLUMNS)
    down = parts_of(rows, TILE_ROWS)
    program = tl.program_id(0)
    entry = program // (across * down)
    row = (program // across % down) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    column = (program % across).to(tl.int64) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    return entry.to(tl.int64), row[:, None], column[None, :]
