"""Signals: cheap measurements from which adaptive policies decide."""

from torch import Tensor

from .. import ops
from .filtered import axis_filter, filtered_l1
from .grids import Grid, grid_of

__all__ = ["Grid", "axis_filter", "filtered_l1", "grid_of", "relative_l1"]


def relative_l1(current: Tensor, previous: Tensor) -> Tensor:
    """mean|current − previous| / mean|previous| of each batch row, in float32: [batch] from two [batch, ...].

    A zero reference gives infinity unless nothing changed.
    """
    return ops.relative_change(current, previous)
