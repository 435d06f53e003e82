"""Signals by hand."""

import pytest
import torch

from diffusion_cache.signals import relative_l1

WHOLE = (slice(None),)


def test_by_hand():
    previous = torch.tensor([[1.0, -3.0], [2.0, 2.0]])
    current = torch.tensor([[2.0, -3.0], [2.0, -1.0]])
    assert relative_l1(current, previous, WHOLE).tolist() == [0.5]  # (1 + 3) / (4 + 4)
    groups = (slice(0, 1), slice(1, 2))
    assert relative_l1(current, previous, groups).tolist() == [0.25, 0.75]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_is_measured_in_float32(dtype):
    previous = torch.full((1, 100_000), 2.0, dtype=dtype)
    change = relative_l1(previous * 1.5, previous, WHOLE)
    assert change.dtype == torch.float32
    assert change.item() == pytest.approx(0.5)


def test_zero_reference():
    zero = torch.zeros(2, 3)
    assert relative_l1(zero, zero, WHOLE).item() == 0
    assert relative_l1(zero + 1, zero, WHOLE).item() == float("inf")


@pytest.mark.parametrize("where", ["current", "previous"])
def test_nan_shows_only_in_its_group(where):
    current, previous = torch.ones(2, 3), torch.ones(2, 3)
    (current if where == "current" else previous)[1, 0] = float("nan")
    change = relative_l1(current, previous, (slice(0, 1), slice(1, 2)))
    assert change[0] == 0
    assert change[1].isnan()


def test_infinite_residuals_are_not_called_unchanged():
    infinite = torch.full((1, 3), float("inf"))
    assert relative_l1(infinite, infinite, WHOLE).isnan().item()
