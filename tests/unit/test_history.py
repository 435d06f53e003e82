"""The history: a ring of fixed slots, shared by all batch rows until some are observed apart."""

import pytest
import torch
from recorded_graph import RecordedGraph
from torch.utils._python_dispatch import TorchDispatchMode

from diffusion_cache import ops
from diffusion_cache.differences import DifferenceHistory
from diffusion_cache.history import History, finite, is_finite


def feature(value, shape=(2, 3), dtype=torch.float32):
    return torch.full(shape, float(value), dtype=dtype)


def stored(history, row=0, leaf=0):
    """(step, value) of a row's features, oldest first, where a feature holds one value per row."""
    lane = history.lanes[row if len(history.lanes) > 1 else 0]
    return [(node, history.leaf(leaf)[slot][row].flatten()[0].item()) for node, slot in lane]


def test_ring_keeps_the_newest_oldest_first():
    history = History(3)
    assert not history
    assert (history.nodes, history.nbytes, history.feature_bytes) == ([], 0, 0)
    for step in range(5):
        history.observe(step, [feature(10 * step)], [None])
        assert history
        assert len(history.nodes) == len(history.leaf(0)) == min(step + 1, 3)
        assert history.feature_bytes == 24
    assert history.nodes == [2, 3, 4]
    assert stored(history) == stored(history, row=1) == [(2, 20), (3, 30), (4, 40)]


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
    assert stored(history) == ([(2, 3), (3, 4)] if base is None else [(2, 2), (3, 3)])


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
    assert stored(history) == ([(5, 5), (6, 60)] if base is None else [(5, 4), (6, 59)])


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
    assert stored(history) == [(0, 1), (3, 7)]


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
    assert not history
    assert (history.nodes, history.slots, history.nbytes) == ([], [], 0)
    history.observe(9, [feature(1)], [None])
    assert history.nodes == [9]


# rows observed apart


def rows_of(*values):
    """A feature of one row for each value."""
    return torch.tensor([[float(value)] * 2 for value in values])


def test_rows_start_from_what_all_share_and_then_have_their_own():
    history = History(2)
    for step in range(2):
        history.observe(step, [rows_of(10 * step, 10 * step + 1, 10 * step + 2)], [None])
    history.observe(2, [rows_of(21)], [None], rows=[1], batch=3)
    assert stored(history, 0) == [(0, 0), (1, 10)]
    assert stored(history, 1) == [(1, 11), (2, 21)]
    assert stored(history, 2) == [(0, 2), (1, 12)]
    history.observe(3, [rows_of(30, 32)], [None], rows=[0, 2], batch=3)
    assert stored(history, 0) == [(1, 10), (3, 30)]
    assert stored(history, 1) == [(1, 11), (2, 21)]
    assert stored(history, 2) == [(1, 12), (3, 32)]


def test_rows_are_stored_by_the_order_they_are_given_in():
    history = History(1)
    history.observe(0, [rows_of(0, 1, 2, 3)], [None])
    history.observe(1, [rows_of(13, 10)], [None], rows=[3, 0], batch=4)
    assert [stored(history, row) for row in range(4)] == [[(1, 10)], [(0, 1)], [(0, 2)], [(1, 13)]]


@pytest.mark.parametrize("capacity", [1, 2, 3])
def test_a_ring_for_each_row(capacity):
    """Every row keeps its newest features, whichever rows it is observed with."""
    history = History(capacity)
    expected = [[] for _ in range(4)]
    generator = torch.Generator().manual_seed(capacity)
    for step in range(40):
        rows = None if step % 10 == 0 else (torch.rand(4, generator=generator) < 0.5).nonzero().flatten().tolist()[::-1]
        if rows == []:
            continue
        observed = range(4) if rows is None else rows
        values = [100 * step + row for row in observed]
        history.observe(step, [rows_of(*values)], [None], rows, batch=4)
        for row, value in zip(observed, values, strict=True):
            expected[row] = [*expected[row], (step, value)][-capacity:]
        assert [stored(history, row) for row in range(4)] == expected
        assert history.nbytes <= capacity * 4 * 2 * 4


def test_residuals_of_rows_and_every_leaf():
    history = History(2)
    history.observe(0, [rows_of(1, 2), torch.tensor([7, 8])], [rows_of(0, 0), None])
    history.observe(1, [rows_of(5), torch.tensor([9])], [rows_of(2), None], rows=[1], batch=2)
    assert [stored(history, row) for row in (0, 1)] == [[(0, 1)], [(0, 2), (1, 3)]]
    assert [stored(history, row, leaf=1) for row in (0, 1)] == [[(0, 7)], [(0, 8), (1, 9)]]


def test_observing_a_step_again_replaces_a_rows_feature():
    history = History(2)
    history.observe(0, [rows_of(0, 1)], [None])
    for value in (10, 12):
        history.observe(1, [rows_of(value)], [None], rows=[0], batch=2)
    assert stored(history, 0) == [(0, 0), (1, 12)]
    assert stored(history, 1) == [(0, 1)]
    history.observe(1, [rows_of(13, 14)], [None])  # the step again, with all rows
    assert stored(history, 0) == [(0, 0), (1, 13)]
    assert stored(history, 1) == [(0, 1), (1, 14)]


def test_rows_of_a_history_that_is_empty():
    history = History(2)
    history.observe(4, [rows_of(1)], [None], rows=[2], batch=3)
    assert history
    assert history.lanes == [[], [], [(4, 0)]]
    assert stored(history, 2) == [(4, 1)]


def test_slots_that_a_row_has_not_filled_are_zero():
    """A row weighs them with zero: 0 × NaN would be NaN."""
    history = History(3)
    history.observe(0, [rows_of(5, 6)], [None])
    for step in (1, 2):
        history.observe(step, [rows_of(float("nan"))], [None], rows=[0], batch=2)
    assert [slot[0].isnan().all().item() for slot in history.leaf(0)] == [False, True, True]
    assert [slot[1].tolist() for slot in history.leaf(0)] == [[6, 6], [0, 0], [0, 0]]


def test_rows_do_not_alias_what_was_observed():
    history = History(2)
    history.observe(0, [rows_of(0, 1)], [None])
    for step in (1, 2, 3):  # fresh and reused slots
        out = rows_of(10 * step)
        history.observe(step, [out], [None], rows=[1], batch=2)
        out.fill_(float("nan"))
    assert stored(history, 1) == [(2, 20), (3, 30)]


def test_slots_are_written_in_place_by_rows():
    history = History(2)
    for step in range(2):
        history.observe(step, [rows_of(0, 1)], [None])
    before = [tensor.data_ptr() for tensor in history.leaf(0)]
    for step in range(2, 6):
        history.observe(step, [rows_of(step)], [None], rows=[step % 2], batch=2)
    history.observe(6, [rows_of(60, 61)], [None])
    assert [tensor.data_ptr() for tensor in history.leaf(0)] == before
    assert [stored(history, row) for row in (0, 1)] == [[(4, 4), (6, 60)], [(5, 5), (6, 61)]]


@pytest.mark.parametrize("capacity", [1, 2, 4])
def test_bytes_of_rows_never_exceed_the_bound(capacity):
    history = History(capacity)
    one = 3 * 2 * 4 + 3 * 2
    for step in range(9):
        rows = [step % 3]
        history.observe(step, [rows_of(step), torch.ones(1, dtype=torch.bfloat16)], [None, None], rows=rows, batch=3)
        assert history.feature_bytes == one
        # the third observation of every row comes after two rounds of three
        assert history.nbytes == one * min(step // 3 + 1, capacity)
        assert history.nbytes == sum(tensor.untyped_storage().nbytes() for tensor in history.tensors())


def test_rows_rejoin_once_their_features_are_of_the_same_steps():
    history = History(1)
    history.observe(0, [rows_of(0, 1)], [None])
    history.observe(1, [rows_of(10)], [None], rows=[0], batch=2)
    assert len(history.lanes) == 2
    with pytest.raises(ValueError):
        history.nodes  # noqa: B018
    history.observe(2, [rows_of(20, 21)], [None])
    history.observe(3, [rows_of(30, 31)], [None])
    assert len(history.lanes) == 1
    assert history.nodes == [3]
    assert [stored(history, row) for row in (0, 1)] == [[(3, 30)], [(3, 31)]]


def test_rows_of_different_steps_do_not_rejoin():
    history = History(3)
    history.observe(0, [rows_of(0, 1)], [None])
    history.observe(1, [rows_of(10)], [None], rows=[0], batch=2)
    for step in (2, 3):
        history.observe(step, [rows_of(10 * step, 10 * step + 1)], [None])
    assert stored(history, 0) == [(1, 10), (2, 20), (3, 30)]
    assert stored(history, 1) == [(0, 1), (2, 21), (3, 31)]


def test_rows_that_are_cleared_are_shared_again():
    history = History(2)
    history.observe(0, [rows_of(0)], [None], rows=[1], batch=2)
    history.clear()
    assert not history
    assert (history.nodes, history.slots, history.nbytes, history.feature_bytes) == ([], [], 0, 0)
    history.observe(1, [rows_of(1, 2, 3)], [None])
    assert history.nodes == [1]


@pytest.mark.parametrize(
    ("outputs", "bases", "rows"),
    [
        ([rows_of(1), rows_of(1)], [None, feature(1, (7, 7))], [0]),
        ([rows_of(1), None], [None, None], [0]),
        ([rows_of(1), rows_of(1)], [None], [0]),
        ([rows_of(1)], [None], [0]),
        ([rows_of(1), rows_of(1)], [None, None], [2]),
        ([rows_of(1), rows_of(1)], [None, None], [0, 1]),  # of two rows only one is there
        ([rows_of(1), rows_of(1).half()], [None, None], [0]),
    ],
    ids=["base", "no tensor", "bases", "leaves", "no such row", "rows", "dtype"],
)
@pytest.mark.parametrize("apart", [False, True])
def test_failure_to_store_rows_leaves_it_empty(outputs, bases, rows, apart):
    history = History(1)
    history.observe(0, [rows_of(0, 1), rows_of(0, 1)], [None, None])
    if apart:
        history.observe(1, [rows_of(2), rows_of(2)], [None, None], rows=[1], batch=2)
    with pytest.raises((RuntimeError, ValueError, AttributeError, IndexError)):
        history.observe(3, outputs, bases, rows, batch=2)
    assert not history
    assert (history.nodes, history.slots, history.nbytes) == ([], [], 0)
    history.observe(9, [rows_of(1)], [None])
    assert history.nodes == [9]


def test_another_batch_while_rows_are_apart_leaves_it_empty():
    history = History(1)
    history.observe(0, [rows_of(1)], [None], rows=[1], batch=2)
    with pytest.raises(IndexError):
        history.observe(1, [rows_of(1)], [None])
    assert not history
    assert history.slots == []


def test_gradients_of_rows_are_not_kept():
    history = History(2)
    out = rows_of(0, 1).requires_grad_()
    history.observe(0, [out * 2], [out])
    for step in (1, 2):
        history.observe(step, [out[:1] * 3], [out[:1]], rows=[1], batch=2)
    assert not any(tensor.requires_grad for tensor in history.tensors())


def test_on_host():
    history = History(1)
    history.observe(0, [feature(1)], [None])
    assert history.on_host
    history.clear()
    history.observe(0, [torch.empty(2, device="meta")], [None])
    assert not history.on_host


@pytest.mark.parametrize("made", [lambda: History(2), lambda: History(2, "int8"), lambda: DifferenceHistory(2, "int8")])
def test_numbers_of_rows_are_brought_to_the_device_once(made):
    """Later ones wait for nothing, also where rows come together again."""

    def observed():
        history = made()
        for step, rows in enumerate(([2], [1, 0, 2], [0, 1, 2])):
            history.observe(step, [feature(step, (len(rows), 4, 16))], [None], rows, 3)
            history.taken([2, 0])
        history.observe(3, [feature(3, (3, 4, 16))], [None])
        return history

    expected = observed()
    with RecordedGraph([]):  # refuses what would wait
        found = observed()
    assert found.lanes == expected.lanes
    assert all(map(torch.equal, found.tensors(), expected.tensors()))


# what is finite


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_is_finite_looks_at_every_tensor(dtype, bad, place):
    tensors = [feature(1, dtype=dtype) for _ in range(3)]
    assert is_finite(tensors)
    tensors[place][1, 1] = bad
    assert not is_finite(tensors)


def test_nothing_and_integers_are_finite():
    assert is_finite([])
    assert is_finite([torch.arange(4), torch.tensor([True, False])])


class Operations(TorchDispatchMode):
    """The names of those that are run, and the dtypes of what each is first given."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        dtype = args[0].dtype if args and isinstance(args[0], torch.Tensor) else None
        self.seen.append((operator.overloadpacket.__name__, dtype))
        return operator(*args, **(kwargs or {}))


def test_codes_are_not_summed_up_and_nothing_is_read_before_it_is_asked_for():
    history = History(3, "int8")
    for step in range(3):
        history.observe(step, [feature(step, (4, 8, 32))], [None])
    with Operations() as operations:
        assert is_finite(history.tensors())
    assert [name for name, _ in operations.seen] == ["sum", "_local_scalar_dense"] * 3  # the scales
    assert {dtype for name, dtype in operations.seen if name == "sum"} == {torch.float32}
    with Operations() as operations:
        finite(history.tensors())
    assert "_local_scalar_dense" not in [name for name, _ in operations.seen]


def test_opposite_infinities_do_not_cancel():
    assert not is_finite([torch.tensor([float("inf"), -float("inf")])])


def test_half_precision_sums_do_not_overflow():
    assert is_finite([torch.full((1000,), 60000.0, dtype=torch.float16)])


@pytest.mark.parametrize("dtype", ["fp8", "int8"])
def test_features_in_codes(dtype):
    """Rows observed apart and together, in codes: values to their precision, and the bytes that are stated."""
    history = History(2, dtype)
    numbers, whole = torch.randn(3, 4, 32, dtype=torch.bfloat16), torch.arange(3)[:, None]
    given = [numbers, numbers[..., :2], whole]  # rows of two numbers are not worth a scale
    history.observe(0.0, given, [None, None, None])
    assert history.bytes_of(given) == 2 * history.nbytes == 2 * (3 * 4 * (32 + 4) + 3 * 4 * 2 * 2 + 3 * 8)
    assert [tensor.shape for tensor in history.numbers()] == [numbers.shape, given[1].shape]
    history.observe(1.0, [numbers[1:2] * 2, numbers[1:2, :, :2], whole[1:2]], [None, None, None], rows=[1], batch=3)
    assert history.nbytes == history.bytes_of(given)
    (coded,), (plain,), (integers,) = (history.leaf(i)[:1] for i in range(3))
    assert coded.dtype == torch.bfloat16
    assert (ops.decoded(coded) - numbers).abs().max() <= numbers.abs().max() / 16
    assert torch.equal(plain, given[1])
    assert torch.equal(integers, whole)
    newer = ops.decoded(history.leaf(0)[1])
    assert (newer[1] - 2 * numbers[1]).abs().max() <= 2 * numbers.abs().max() / 16
    assert torch.equal(newer[[0, 2]], torch.zeros_like(newer[[0, 2]]))


def test_codes_are_written_where_they_were():
    history = History(1, "int8")
    history.observe(0.0, [torch.randn(2, 3, 16)], [torch.randn(2, 3, 16)])
    places = [tensor.data_ptr() for tensor in history.tensors()]
    out, base = torch.randn(2, 3, 16), torch.randn(2, 3, 16)
    history.observe(1.0, [out], [base])
    assert [tensor.data_ptr() for tensor in history.tensors()] == places
    expected = ops.encode_residual(out, base, "int8")
    assert torch.equal(history.leaf(0)[0].codes, expected.codes)
    assert torch.equal(history.leaf(0)[0].scales, expected.scales)


def test_codes_of_what_is_not_finite_are_noticed():
    for value in (float("nan"), float("inf")):
        history = History(1, "fp8")
        history.observe(0.0, [torch.full((2, 16), value)], [None])
        assert not is_finite(history.tensors())


def test_what_is_held_of_a_step():
    history = History(2)
    assert history.at(0) is None
    for step in (0, 1, 2):
        history.observe(step, [torch.full((2, 1), float(step))], [None])
    assert history.at(0) is None
    assert history.at(2)[0].tolist() == [[2.0], [2.0]]
    history.observe(5, [torch.tensor([[5.0]])], [None], rows=[1], batch=2)
    assert history.at(5)[0].tolist() == [[0.0], [5.0]]  # the first row does not hold it
    assert history.at(1)[0].tolist() == [[1.0], [0.0]]
    assert history.at(2)[0].tolist() == [[2.0], [2.0]]


@pytest.mark.parametrize("dtype", ["model", "fp8", "int8"])
def test_slots_that_are_lent_stay_where_they_are(dtype):
    lent, own = History(2, dtype), History(2, dtype)
    outputs = [[torch.randn(2, 4, 16), torch.arange(4)] for _ in range(3)]
    bases = [torch.randn(2, 4, 16), None]
    parts, coded = lent.encoded(outputs[0], bases)
    slots = [[torch.full_like(part, 7) for part in parts] for _ in range(2)]
    lent.lend(slots, coded)
    assert not lent
    assert all((tensor.view(torch.uint8) == 0).all() for tensor in lent.tensors())
    for step, given in enumerate(outputs):
        parts, again = lent.encoded(given, bases)
        assert again == coded
        for into, part in zip(lent.claim(step), parts, strict=True):
            into.copy_(part)
        own.observe(step, given, bases)
    assert lent.nodes == own.nodes == [1, 2]
    assert lent.lanes == own.lanes
    assert all(torch.equal(a, b) for a, b in zip(lent.tensors(), own.tensors(), strict=True))
    held = [tensor for slot in slots for tensor in slot]
    assert all(a is b for a, b in zip(lent.tensors(), held, strict=True))
    lent.clear()
    assert [len(slot) for slot in slots] == [len(parts)] * 2
