"""Features that wait on the host: what is read is what was stored, whenever the copies are made."""

import pytest
import torch
from late_carrier import LateCarrier

from diffusion_cache import offload, ops
from diffusion_cache.differences import DifferenceHistory
from diffusion_cache.history import History
from diffusion_cache.offload import HostCarrier, Offload

KINDS = {
    "model": lambda: History(3),
    "int8": lambda: History(3, "int8"),
    "int8-delta": lambda: DifferenceHistory(3, "int8"),
}


def observed(history, store, turn):
    """A further feature, of some rows or of all."""
    generator = torch.Generator().manual_seed(turn)
    rows = None if turn % 3 else [2, 0]
    out = torch.randn(4 if rows is None else 2, 5, 16, generator=generator)
    store(turn, [out], [torch.ones_like(out)], rows, 4)


def values(history):
    leaf = [ops.decoded(held) for held in history.leaf(0)]
    return [[leaf[slot][row] for _, slot in history.lanes[row if len(history.lanes) > 1 else 0]] for row in range(4)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [LateCarrier, HostCarrier])
def test_what_comes_back_is_what_was_stored(kind, make, monkeypatch):
    monkeypatch.setattr(offload, "carrier", lambda device: make())
    plain, history, away = KINDS[kind](), KINDS[kind](), Offload()
    for turn in range(1, 9):
        observed(plain, plain.observe, turn)
        observed(history, lambda *given: away.observe(history, *given), turn)
        if turn % 2:
            away.fetch(history)  # also where the next feature is stored before it is used
        if turn > 3:
            held = away.held(history)
            assert held.lanes == plain.lanes
            for found, expected in zip(values(held), values(plain), strict=True):
                assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert history.nbytes == plain.nbytes
    assert 0 < away.resident_bytes <= 2 * plain.nbytes
    away.finish()
    assert all(tensor.isfinite().all() for tensor in history.tensors())


def test_the_stand_in_notices_what_is_read_too_early(monkeypatch):
    monkeypatch.setattr(offload, "carrier", lambda device: LateCarrier())
    history, away = History(1), Offload()
    away.observe(history, 0, [torch.ones(2, 3)], [None])
    assert history.slots[0][0].isnan().all()  # on its way to the host
    away.fetch(history)
    (arrival,) = away._arrivals.values()
    assert arrival.tensors[0].isnan().all()  # on its way back
    assert torch.equal(away.held(history).slots[0][0], torch.ones(2, 3))


def test_what_is_stored_goes_out_alone():
    carrier = LateCarrier()
    history, away = History(3), Offload()
    away._carriers[torch.device("cpu")] = carrier
    for step in range(5):
        away.observe(history, step, [torch.full((2, 3), float(step))], [None])
    assert carrier.asked == 5  # one tensor for each feature; none came back to be stored beside
    away.fetch(history)
    away.fetch(history)
    assert carrier.asked == 8


def test_what_is_stored_is_checked_on_its_way_out():
    carrier = LateCarrier()
    history, other, away = History(1), History(1), Offload()
    away._carriers[torch.device("cpu")] = carrier
    for step, value in enumerate((1.0, float("nan"), 2.0)):
        away.observe(history, step, [torch.full((2, 3), value)], [None])
        away.observe(other, step, [torch.ones(2, 3)], [None])
    assert carrier.made == 0
    assert [bool(away.finite[each]) for each in (history, other)] == [False, True]


def test_a_failure_leaves_nothing():
    history, away = History(2), Offload()
    away.observe(history, 0, [torch.ones(2, 3)], [None])
    away.fetch(history)
    with pytest.raises(RuntimeError):
        away.observe(history, 1, [torch.ones(2, 3)], [torch.ones(7, 7)])
    assert (history.slots, history.lanes, away._arrivals) == ([], [[]], {})
    away.fetch(history)
    assert not away._arrivals
