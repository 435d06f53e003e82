"""Signals: cheap measurements from which adaptive policies decide."""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["relative_l1"]


def relative_l1(current: Tensor, previous: Tensor, rows: Sequence[slice]) -> Tensor:
    """mean|current − previous| / mean|previous| in float32 for each group of batch rows: [len(rows)].

    Both tensors are [batch, ...]. A zero reference gives infinity unless nothing changed.
    """
    current, previous = current.float(), previous.float()
    changes = []
    for group in rows:
        reference = previous[group]
        difference = (current[group] - reference).abs().mean()
        scale = reference.abs().mean()
        changes.append(torch.where(difference == 0, torch.zeros_like(difference), difference / scale))
    return torch.stack(changes)
