"""How kernels walk through tensors: as [batch, rows, columns], in tiles of rows × columns."""

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# (elements of a tile, warps): a launch takes the first, which `make bench-kernels` compares with the others
CONFIGS = ((2048, 4), (1024, 4), (4096, 8), (8192, 8))


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
        return self.batch * triton.cdiv(self.rows, self.tile_rows) * triton.cdiv(self.columns, self.tile_columns)


def tiling(batch: int, rows: int, columns: int, config: tuple[int, int] = CONFIGS[0]) -> Tiling:
    """Tiles of `config`'s size whose width wastes least of the last one in a row."""
    elements, warps = config
    whole = min(triton.next_power_of_2(columns), elements)
    widths = [whole >> shift for shift in range(4) if whole >> shift >= min(whole, 128)]
    width = min(widths, key=lambda width: (triton.cdiv(columns, width) * width, -width))
    if rows == 1:
        width = whole
    return Tiling(batch, rows, columns, max(1, min(elements // width, triton.next_power_of_2(rows))), width, warps)


def channels_last(tensor: Tensor) -> bool:
    """Whether an image or video [rows, channels, ...] is stored with its channels innermost."""
    return layout(tensor) is not torch.contiguous_format


def layout(tensor: Tensor) -> torch.memory_format:
    """The memory format of what a launch makes like this tensor."""
    form = {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensor.ndim)
    if form is None or tensor.is_contiguous() or not tensor.is_contiguous(memory_format=form):
        return torch.contiguous_format
    return form


def start(kernel: Any, programs: int, warps: int, device: torch.device, *arguments: Any, **constants: Any) -> None:
    """Launch a kernel on a one-dimensional grid."""
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[(programs,)](*arguments, num_warps=warps, enable_fp_fusion=True, **constants)


@triton.jit
def place(rows, columns, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr):
    """This program's batch entry, and the row and column indices of its tile: b, [TILE_ROWS, 1], [1, TILE_COLUMNS]."""
    across = tl.cdiv(columns, TILE_COLUMNS)
    down = tl.cdiv(rows, TILE_ROWS)
    program = tl.program_id(0)
    entry = program // (across * down)
    row = (program // across % down) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    column = (program % across).to(tl.int64) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    return entry.to(tl.int64), row[:, None], column[None, :]
