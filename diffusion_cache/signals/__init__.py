"""Signals: cheap measurements from which adaptive policies decide."""

from torch import Tensor

from .. import ops
from .filtered import filtered_l1
from .grids import Grid, channels_first, grid_of

__all__ = ["Grid", "channels_first", "filtered_l1", "grid_of", "mean_abs", "relative_l1"]


def relative_l1(current: Tensor, previous: Tensor) -> Tensor:
    """mean|current − previous| / mean|previous| of each batch row, in float32: [batch] from two [batch, ...].

    A zero reference gives infinity unless nothing changed.
    """
    return ops.relative_change(current, previous)


def mean_abs(tensor: Tensor) -> Tensor:
    """mean|tensor| of each batch row, in float32: [batch] from [batch, ...]."""
    return tensor.float().abs().flatten(1).mean(1)
