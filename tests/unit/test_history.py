"""The history: a ring of fixed slots."""

import pytest
import torch

from diffusion_cache.history import History


def feature(value, shape=(2, 3), dtype=torch.float32):
    return torch.full(shape, float(value), dtype=dtype)


def test_ring_keeps_the_newest_oldest_first():
    history = History(3)
    assert len(history) == 0
    assert history.nbytes == 0
    for step in range(5):
        history.observe(step, [feature(10 * step)], [None])
        assert len(history) == min(step + 1, 3)
    assert history.nodes == [2, 3, 4]
    assert [tensor[0, 0].item() for tensor in history.leaf(0)] == [20, 30, 40]


def test_residual_and_output_per_leaf():
    out, base, other = feature(5), feature(3), torch.arange(4)
    history = History(1)
    history.observe(0, [out, out, other], [base, None, None])
    assert torch.equal(history.leaf(0)[0], feature(2))
    assert torch.equal(history.leaf(1)[0], feature(5))
    assert torch.equal(history.leaf(2)[0], torch.arange(4))


@pytest.mark.parametrize("base", [None, feature(1)])
def test_features_do_not_alias_what_was_observed(base):
    history = History(2)
    for step in range(4):  # fresh and reused slots
        out = feature(step + 1)
        history.observe(step, [out], [base])
        out.fill_(float("nan"))
    expected = [3, 4] if base is None else [2, 3]
    assert [tensor[1, 2].item() for tensor in history.leaf(0)] == expected


@pytest.mark.parametrize("base", [None, feature(1)])
def test_slots_are_written_in_place(base):
    history = History(2)
    for step in range(2):
        history.observe(step, [feature(step)], [base])
    before = {tensor.data_ptr() for tensor in history.leaf(0)}
    assert len(before) == 2
    for step in range(2, 7):
        history.observe(step, [feature(step)], [base])
        assert {tensor.data_ptr() for tensor in history.leaf(0)} == before
    history.observe(6, [feature(60)], [base])  # a replaced feature keeps its slot, too
    assert {tensor.data_ptr() for tensor in history.leaf(0)} == before


@pytest.mark.parametrize("capacity", [1, 2, 4])
def test_bytes_never_exceed_the_bound(capacity):
    history = History(capacity)
    outputs = [feature(1), feature(1, (5,), torch.bfloat16)]
    one = 2 * 3 * 4 + 5 * 2
    for step in range(6):
        history.observe(step, outputs, [None, feature(0, (5,), torch.bfloat16)])
        storages = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for i in (0, 1) for tensor in history.leaf(i)
        }
        assert history.nbytes == one * min(step + 1, capacity) == sum(s.nbytes() for s in storages.values())
    history.clear()
    assert history.nbytes == 0


def test_broadcast_outputs_take_their_own_bytes_only():
    history = History(1)
    wide = torch.ones(1, 3).expand(100, 3)
    history.observe(0, [wide, torch.ones(1000)[:2]], [None, None])
    assert history.nbytes == 100 * 3 * 4 + 2 * 4
    assert history.leaf(1)[0].untyped_storage().nbytes() == 8


def test_observing_a_step_again_replaces_its_feature():
    history = History(2)
    for step, value in [(0, 1), (3, 2), (3, 7)]:
        history.observe(step, [feature(value)], [None])
    assert history.nodes == [0, 3]
    assert [tensor[0, 0].item() for tensor in history.leaf(0)] == [1, 7]


def test_another_shape_or_dtype_gets_a_new_slot():
    history = History(1)
    history.observe(0, [feature(1)], [None])
    history.observe(1, [feature(2, (4, 4))], [feature(1, (4, 4))])
    assert torch.equal(history.leaf(0)[0], feature(1, (4, 4)))
    history.observe(2, [feature(3, (4, 4), torch.float16)], [None])
    assert history.leaf(0)[0].dtype == torch.float16
    assert history.nbytes == 32


def test_gradients_are_not_kept():
    history = History(2)
    out, base = feature(2).requires_grad_(), feature(1).requires_grad_()
    for step in range(3):
        history.observe(step, [out * 2, out * 3], [base * 2, None])
    assert not any(tensor.requires_grad for i in (0, 1) for tensor in history.leaf(i))


@pytest.mark.parametrize(
    ("outputs", "bases"),
    [
        ([feature(1), feature(1)], [None, feature(1, (7, 7))]),  # the second leaf's shapes do not subtract
        ([feature(1), None], [None, None]),
        ([feature(1), feature(1)], [None]),
    ],
)
@pytest.mark.parametrize("before", [0, 1, 3])
@pytest.mark.parametrize("again", [False, True])
def test_failure_leaves_it_empty(outputs, bases, before, again):
    history = History(2)
    for step in range(before):
        history.observe(step, [feature(step), feature(step)], [None, None])
    with pytest.raises((RuntimeError, ValueError, AttributeError)):
        history.observe(before - again, outputs, bases)  # a new step, or the last one again
    assert (len(history), history.nodes, history.slots, history.nbytes) == (0, [], [], 0)
    history.observe(9, [feature(1)], [None])
    assert history.nodes == [9]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), None])
def test_is_finite_looks_at_every_leaf_of_the_newest(dtype, bad):
    history = History(2)
    out = feature(1, dtype=dtype)
    second = out.clone()
    if bad is not None:
        second[1, 1] = bad
    history.observe(0, [out, second], [None, None])
    assert history.is_finite() == (bad is None)
    history.observe(1, [out, out], [None, None])
    assert history.is_finite()


def test_opposite_infinities_do_not_cancel():
    history = History(1)
    history.observe(0, [torch.tensor([float("inf"), -float("inf")])], [None])
    assert not history.is_finite()


def test_half_precision_sums_do_not_overflow():
    history = History(1)
    history.observe(0, [torch.full((1000,), 60000.0, dtype=torch.float16)], [None])
    assert history.is_finite()
