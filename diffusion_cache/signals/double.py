"""Sums in float64, on every device."""

import torch
from torch import Tensor

WITHOUT_FLOAT64 = frozenset({"mps"})  # devices


def double(tensor: Tensor) -> Tensor:
    """The tensor in float64: on its device, or on the CPU where that has none."""
    return (tensor.cpu() if tensor.device.type in WITHOUT_FLOAT64 else tensor).to(torch.float64)
