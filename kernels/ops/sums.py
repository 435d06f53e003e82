"""What the ops that forecast share: Σ_j w_j·R_j over up to eight slots, scale·y + bias, and how their operands lie."""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .codes import code_of, decode, raw

SLOTS = 8


class Form(NamedTuple):
    """What of a launch follows from shapes and dtypes alone; a tensor is [batch, rows, columns]."""

    weight_stride: int
    correction_stride: int
    channels: int
    group: int  # rows that share a channel, where channels run along the rows
    batch: int
    rows: int
    columns: int
    code: str
    kind: str  # of the correction: "" for none, "all" for a number, by "column" or by "row" for channels

    @property
    def numbers(self) -> tuple[int, int, int, int]:
        """What kernels take last, in their order."""
        return self.weight_stride, self.correction_stride, self.channels, self.group

    @property
    def constants(self) -> dict[str, str]:
        return {"CODE": self.code, "KIND": self.kind}


class Operands(NamedTuple):
    """Features and what they are combined with, as kernels take them."""

    slots: tuple[Tensor, ...]
    scales: tuple[Tensor, ...]
    weights: Tensor
    correction: Tensor | None
    form: Form


def check(
    features: Sequence[tuple[torch.Size, torch.dtype]],
    scales: Sequence[torch.Size],
    weights: torch.Size,
    correction: torch.Size | None,
) -> None:
    """Nothing may be read that is not there.

    Raises:
        ValueError: for numbers or shapes that do not belong together.
    """
    if not 1 <= len(features) <= SLOTS:
        raise ValueError(f"a launch takes 1 to {SLOTS} features, not {len(features)}")
    if weights[-1] != len(features):
        raise ValueError(f"{weights[-1]} weights for {len(features)} features")
    shape = features[0][0]
    batch, channels = shape[0], shape[-1 if len(shape) <= 3 else 1]
    if any(other != shape for other, _ in features) or any(scale != shape[:-1] for scale in scales):
        raise ValueError("features have one shape, and their scales the same without the last axis")
    found = [code_of(dtype) for _, dtype in features]
    plain = len(features) - len(scales)
    if any(found[:plain]) or "" in found[plain:] or len(set(found[plain:])) > 1:
        raise ValueError(f"features in one code come last, each with its scales: {found} with {len(scales)}")
    if len(weights) == 2 and weights[0] != batch:
        raise ValueError(f"weights for {weights[0]} rows, of which there are {batch}")
    if correction is not None and (correction[0] not in (1, batch) or correction[1:] not in ((2, 1), (2, channels))):
        raise ValueError(f"a correction is [1 or {batch}, 2, 1 or {channels}], not {list(correction)}")


def operands(
    features: Sequence[Tensor],
    scales: Sequence[Tensor],
    weights: Tensor,
    correction: Tensor | None,
    moved: bool = False,
    whole_rows: bool = False,
) -> Operands:
    """The operands of one launch. features: plain numbers, and then those in codes; scales: of these. weights,
    correction: as `ops.forecast` takes them.

    moved: whether the kernel walks through images and videos with their channels last. whole_rows: keep the last axis
    apart even where nothing differs along it.
    """
    form = _form(
        tuple((feature.shape, feature.dtype) for feature in features),
        tuple(scale.shape for scale in scales),
        weights.shape,
        None if correction is None else correction.shape,
        moved,
        whole_rows,
    )
    if moved:
        features = [feature.movedim(1, -1) for feature in features]
    return Operands(
        tuple(raw(feature).contiguous() for feature in features),
        tuple(scale.contiguous() for scale in scales),
        weights.to(torch.float32).contiguous(),
        None if correction is None else correction.to(torch.float32).contiguous(),
        form,
    )


@lru_cache(maxsize=1024)
def _form(
    features: tuple[tuple[torch.Size, torch.dtype], ...],
    scales: tuple[torch.Size, ...],
    weights: torch.Size,
    correction: torch.Size | None,
    moved: bool,
    whole_rows: bool,
) -> Form:
    """Found once for each way of calling, as a step makes tens of launches alike."""
    check(features, scales, weights, correction)
    shape, code = features[0][0], code_of(features[-1][1])
    inner = moved or len(shape) <= 3
    if moved:
        shape = torch.Size([shape[0], *shape[2:], shape[1]])
    channels = 1 if correction is None else correction[-1]
    if code or whole_rows or (channels > 1 and inner):
        rows, columns = math.prod(shape[1:-1]), shape[-1]
    elif channels > 1:
        rows, columns = shape[1], math.prod(shape[2:])
    else:
        rows, columns = 1, math.prod(shape[1:])
    kind = "" if correction is None else "all" if channels == 1 else "column" if inner else "row"
    return Form(
        len(features) if len(weights) == 2 else 0,
        2 * channels if correction is not None and correction[0] > 1 else 0,
        channels,
        rows // channels if kind == "row" else 1,
        shape[0],
        rows,
        columns,
        code,
        kind,
    )


@triton.jit
def weighted_sum(
    total,
    slots,
    scales,
    weights,
    entry,
    row,
    column,
    rows,
    columns,
    weight_stride,
    CODE: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    """total + Σ_j weights[entry, j] · slots[j][entry, row, column], in float32: [TILE_ROWS, TILE_COLUMNS].

    The last slots, as many as there are scales, hold codes.
    """
    inside = (row < rows) & (column < columns)
    line = entry * rows + row
    offset = line * columns + column
    if CODE != "":
        # a thread takes as many codes as numbers of 16 bits fill its vector, so that nothing moves between threads
        offset = tl.max_contiguous(offset, [1, min(8, TILE_COLUMNS)])
    for j in tl.static_range(len(slots)):
        weight = tl.load(weights + entry * weight_stride + j)
        value = tl.load(slots[j] + offset, mask=inside)
        if j < len(slots) - len(scales):
            total += weight * value.to(tl.float32)
        else:
            scale = tl.load(scales[j - (len(slots) - len(scales))] + line, mask=row < rows, other=0.0)
            total += weight * scale * decode(value, CODE)
    return total


@triton.jit
def corrected(value, correction, entry, row, column, stride, channels, group, rows, columns, KIND: tl.constexpr):
    """scale · value + bias with the numbers of each value's channel; correction: [batch or 1, 2, channels]."""
    if KIND == "":
        result = value
    else:
        start = correction + entry * stride
        if KIND == "all":
            scale = tl.load(start)
            bias = tl.load(start + 1)
        elif KIND == "column":
            scale = tl.load(start + column, mask=column < columns)
            bias = tl.load(start + channels + column, mask=column < columns)
        else:
            scale = tl.load(start + row // group, mask=row < rows)
            bias = tl.load(start + channels + row // group, mask=row < rows)
        result = scale * value + bias
    return result
