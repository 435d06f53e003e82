"""Signals by hand."""

import pytest
import torch

from diffusion_cache.signals import relative_l1


def test_each_batch_row_by_hand():
    previous = torch.tensor([[1.0, -3.0], [2.0, 2.0], [4.0, 0.0]])
    current = torch.tensor([[2.0, -3.0], [2.0, -1.0], [4.0, 0.0]])
    assert relative_l1(current, previous).tolist() == [0.25, 0.75, 0]


@pytest.mark.parametrize("shape", [(2, 8), (2, 2, 4), (2, 2, 2, 2)])
def test_means_are_over_all_that_a_row_holds(shape):
    previous = torch.full(shape, 2.0)
    current = previous.clone()
    current[1] += 0.5
    change = relative_l1(current, previous)
    assert change.shape == (2,)
    assert change.tolist() == [0, 0.25]


def test_large_and_small_entries_of_a_row_count_by_their_size():
    previous = torch.tensor([[9.0, 1.0]])
    assert relative_l1(torch.tensor([[9.0, 2.0]]), previous).item() == pytest.approx(0.1)  # not (0 + 1) / 2


def test_is_relative_to_the_previous():
    a, b = torch.full((1, 3), 1.0), torch.full((1, 3), 4.0)
    assert (relative_l1(b, a).item(), relative_l1(a, b).item()) == (3, 0.75)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_is_measured_in_float32(dtype):
    previous = torch.full((1, 100_000), 2.0, dtype=dtype)
    change = relative_l1(previous * 1.5, previous)
    assert change.dtype == torch.float32
    assert change.item() == pytest.approx(0.5)


def test_differences_that_half_precision_cannot_hold():
    previous = torch.full((1, 4), -60000.0, dtype=torch.float16)
    assert relative_l1(-previous, previous).item() == 2


def test_zero_reference():
    zero = torch.zeros(2, 3)
    assert relative_l1(zero, zero).tolist() == [0, 0]
    assert relative_l1(zero + torch.tensor([[0.0], [1.0]]), zero).tolist() == [0, float("inf")]


@pytest.mark.parametrize("where", ["current", "previous"])
def test_nan_shows_only_in_its_row(where):
    current, previous = torch.ones(2, 3), torch.ones(2, 3)
    (current if where == "current" else previous)[1, 0] = float("nan")
    change = relative_l1(current, previous)
    assert change[0] == 0
    assert change[1].isnan()


def test_infinite_residuals_are_not_called_unchanged():
    infinite = torch.full((1, 3), float("inf"))
    assert relative_l1(infinite, infinite).isnan().item()
