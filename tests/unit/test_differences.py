"""A history of the newest feature and of differences: what a plain history holds, up to the rounding of codes."""

from itertools import pairwise

import pytest
import torch

from diffusion_cache import ops
from diffusion_cache.differences import DifferenceHistory
from diffusion_cache.history import History, is_finite

COLUMNS = 32


def drifting(rows, step):
    """Large features that change little from step to step."""
    generator = torch.Generator().manual_seed(step)
    whole = 100 * torch.randn(6, 3, COLUMNS, generator=torch.Generator().manual_seed(99))
    return whole[rows] + torch.randn(6, 3, COLUMNS, generator=generator)[rows]


def features(history, row=0):
    """(step, feature) of one batch row, oldest first."""
    lane = history.lanes[row if len(history.lanes) > 1 else 0]
    leaf = [ops.decoded(held) for held in history.leaf(0)]
    return [
        (node, value[row]) for (node, _), value in zip(lane, history.restored([leaf[s] for _, s in lane]), strict=True)
    ]


def rounding(history, row=0):
    """What a lane's oldest feature may be off by, float32 rounding included."""
    values = [value for _, value in features(history, row)]
    steps = [(a - b).abs().amax().item() for a, b in pairwise(values)]
    return sum(steps) / 127 / 2 * 1.01 + 1e-4


@pytest.mark.parametrize("capacity", [1, 2, 4])
def test_it_holds_what_a_plain_history_holds(capacity):
    plain, history = History(capacity), DifferenceHistory(capacity, "int8")
    for step in range(7):
        out, base = drifting(range(6), step), drifting(range(6), -1)
        for each in (plain, history):
            each.observe(step, [out], [base])
        expected, found = features(plain), features(history)
        assert [node for node, _ in found] == [node for node, _ in expected]
        assert torch.equal(found[-1][1], expected[-1][1])  # the newest, as it is
        for (_, value), (_, exact) in zip(found, expected, strict=True):
            assert (value - exact).abs().max() <= rounding(history)


@pytest.mark.parametrize("capacity", [1, 2, 3])
def test_rows_that_are_observed_apart(capacity):
    """Rings of each row, steps that are observed again, and rows that come together again."""
    plain, history = History(capacity), DifferenceHistory(capacity, "int8")
    generator = torch.Generator().manual_seed(capacity)
    for turn in range(30):
        rows = (torch.rand(6, generator=generator) < 0.5).nonzero().flatten().tolist()[::-1]
        rows = None if turn % 7 == 0 or not rows else rows
        again = turn % 3 == 2  # the step before, with other values
        out = drifting(range(6) if rows is None else rows, turn)
        for each in (plain, history):
            each.observe(turn - again, [out], [None], rows, batch=6)
        for row in range(6):
            expected, found = features(plain, row), features(history, row)
            assert [node for node, _ in found] == [node for node, _ in expected]
            for (_, value), (_, exact) in zip(found, expected, strict=True):
                # a difference that is made anew, its newer feature replaced, is rounded twice
                assert (value - exact).abs().max() <= 3 * rounding(history, row)
    assert len(history.lanes) == len(plain.lanes)


def test_a_sum_over_features_is_one_over_what_is_held():
    history = DifferenceHistory(3, "int8")
    for step in range(3):
        history.observe(step, [drifting(range(6), step)], [None])
    weights, (lane,) = (0.5, -2.0, 3.0), history.lanes
    leaf, held = history.leaf(0), history.combined(weights)
    assert held == (0.5, -1.5, 1.5)
    plain = [ops.decoded(leaf[slot]) for _, slot in lane]
    expected = sum(weight * value for weight, value in zip(weights, history.restored(plain), strict=True))
    assert torch.allclose(ops.forecast(None, [leaf[slot] for _, slot in lane], held), expected, atol=1e-3)


def test_bytes_are_those_of_one_feature_and_of_codes():
    out, small = torch.randn(2, 5, COLUMNS), torch.randn(2, 3)[:, :1]  # rows of one number are not worth a scale
    history = DifferenceHistory(3, "fp8")
    codes = 2 * 5 * (COLUMNS + 4) + 2 * 4
    for step in range(5):
        history.observe(step, [out, small], [None, None])
        assert history.nbytes == out.nbytes + 2 * 4 + min(step, 2) * codes
        assert history.bytes_of([out, small]) == history.full_bytes == out.nbytes + 2 * 4 + 2 * codes
    assert history.feature_bytes == out.nbytes + 2 * 4
    assert [tensor.shape for tensor in history.numbers()] == [out.shape, small.shape]


def test_whole_numbers_are_exact():
    history = DifferenceHistory(2, "int8")
    for step in (3, 8):
        history.observe(step, [torch.arange(4) * step], [None])
    newest, difference = history.leaf(0)
    assert torch.equal(newest, torch.arange(4) * 8)
    assert torch.equal(newest + difference, torch.arange(4) * 3)


def test_other_shapes_begin_anew_and_a_failure_leaves_it_empty():
    history = DifferenceHistory(2, "int8")
    for step in range(2):
        history.observe(step, [drifting(range(6), step)], [None])
    history.observe(2, [drifting(range(2), 2)], [None])
    assert history.nodes == [2]
    with pytest.raises((RuntimeError, AttributeError)):
        history.observe(3, [drifting(range(2), 3)], [torch.ones(7, 7)])
    assert not history
    assert (history.slots, history.full_bytes) == ([], 0)


def test_what_is_not_finite_is_noticed():
    history = DifferenceHistory(2, "int8")
    history.observe(0, [torch.full((2, COLUMNS), float("inf"))], [None])
    history.observe(1, [torch.ones(2, COLUMNS)], [None])
    assert not is_finite(history.tensors())
