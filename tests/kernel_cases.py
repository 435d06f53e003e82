"""Inputs for the kernels' tests, and how their results are compared with references."""

import os

import pytest
import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
FULL = pytest.mark.full
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CODES = ["", "e4m3", "int8"]
SHAPES = [(2, 1), (1, 63), (3, 1000), (1, 4097), (2, 5, 63), (2, 1, 1000), (2, 3, 5, 8), (1, 2, 3, 5, 7)]
# what most changes the way through a kernel is in the subset
QUICK = {
    ((3, 1000), torch.float32),
    ((1, 4097), torch.bfloat16),
    ((2, 5, 63), torch.float16),
    ((2, 3, 5, 8), torch.float32),
}


def cases() -> list:
    """Shapes and dtypes, most of them only in the full run."""
    return [
        pytest.param(
            shape,
            dtype,
            marks=() if (shape, dtype) in QUICK else FULL,
            id=f"{'x'.join(map(str, shape))}-{str(dtype)[6:]}",
        )
        for shape in SHAPES
        for dtype in DTYPES
    ]


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Fresh numbers at every call."""
    return torch.randn(shape, dtype=torch.float32).to(dtype).to(DEVICE)


def poisoned(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Memory in which whatever is not written shows."""
    result = torch.empty_like(like, dtype=dtype or like.dtype)
    return result.fill_(float("nan")) if result.dtype.is_floating_point else result.fill_(0x55)


def assert_close(result: Tensor, expected: Tensor, tolerance: float, magnitude: float) -> None:
    """Within `tolerance` of the largest magnitude that was summed. The interpreter truncates bfloat16: one ulp more."""
    assert result.dtype == expected.dtype
    assert result.shape == expected.shape
    if INTERPRETED and result.dtype == torch.bfloat16:
        tolerance *= 2
    assert (result.double() - expected.double()).abs().max() <= tolerance * magnitude


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))
