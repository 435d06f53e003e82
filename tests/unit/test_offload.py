"""Features that wait on the host: what is read is what was stored, whenever the copies are made."""

import contextlib
import weakref

import pytest
import torch
from late_carrier import LateCarrier

import diffusion_cache as dc
from diffusion_cache import offload, ops, reference
from diffusion_cache.differences import DifferenceHistory
from diffusion_cache.history import History
from diffusion_cache.offload import CudaCarrier, HostCarrier, Offload

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


class FakeStream:
    """Never done with anything: what it was told to wait for is all that is known of the others."""

    made = 0

    def __init__(self, device):
        self.device = device
        self.reached = {self: 0}
        FakeStream.made += 1

    def record_event(self):
        self.reached[self] += 1
        return dict(self.reached)

    def wait_event(self, event):
        for stream, count in event.items():
            self.reached[stream] = max(count, self.reached.get(stream, 0))

    def wait_stream(self, other):
        self.wait_event(other.record_event())

    def synchronize(self):
        pass


class Watched(CudaCarrier):
    """On the CPU with fake streams. early: of what was let go of, how much before it was said to wait for its use.

    here: how many tensors that came back are alive. used: how far the streams were when those let go of were last used.
    """

    def __init__(self):
        super().__init__(torch.device("cpu"))
        self.early = self.here = self.most_here = 0
        self.used = []

    def out(self, tensors):
        host = super().out(tensors)
        copied = self._stream.reached[self._stream]
        for tensor in tensors:
            weakref.finalize(tensor, self._left_for_good, copied)
        return host

    def _left_for_good(self, copied):
        self.early += torch.cuda.current_stream().reached.get(self._stream, 0) < copied

    def back(self, tensors):
        here, event = super().back(tensors)
        self.early += any(event[0].get(stream, 0) < count for stream, count in self.used)
        self.here += len(here)
        self.most_here = max(self.most_here, self.here)
        for tensor in here:
            weakref.finalize(tensor, self._used_for_good)
        return here, event

    def _used_for_good(self):
        self.here -= 1
        current = torch.cuda.current_stream()
        self.used.append((current, current.record_event()[current]))


@pytest.fixture
def fake_cuda(monkeypatch):
    offload._side_stream.cache_clear()
    streams = [FakeStream(torch.device("cpu"))]
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: streams[-1])

    @contextlib.contextmanager
    def on(stream):
        streams.append(stream)
        yield
        streams.pop()

    empty_like = torch.empty_like
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch, "empty_like", lambda like, pin_memory=False, **given: empty_like(like, **given))
    yield streams
    offload._side_stream.cache_clear()


def spans(away, count, steps):
    """Histories of spans that were stored at each of some steps."""
    histories = [History(2) for _ in range(count)]
    for step in range(steps):
        for history in histories:
            away.observe(history, step, [torch.full((2, 3), float(step))], [None])
    return histories


def test_device_memory_stays_within_bounds_however_far_the_host_runs_ahead(fake_cuda, monkeypatch):
    parked = []
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: parked.append(self), raising=False)
    carrier, away = Watched(), Offload()
    away._carriers[torch.device("cpu")] = carrier
    histories = spans(away, 6, 2)
    size = 2 * 3 * 4
    assert carrier.leaving_bytes == 2 * size
    assert away.resident_bytes == 3 * size
    for _ in range(3):
        for place, history in enumerate(histories):
            # a deferred forecast still has these when those of the next span are asked for
            held = away.held(history).slots
            away.fetch(histories[(place + 1) % len(histories)])
    del held
    assert carrier.leaving_bytes == 0
    assert (carrier.early, parked) == (0, [])
    assert len(carrier.used) == 3 * 12
    assert carrier.most_here == 2 * 2  # of two spans
    away.observe(histories[1], 2, [torch.ones(2, 3)], [None])
    away.held(histories[0])
    assert carrier.leaving_bytes == size  # it left after what is held now was asked for
    assert carrier.early == 0
    away.finish()
    assert carrier.leaving_bytes == 0


def test_streams_that_take_turns_are_all_waited_for(fake_cuda):
    carrier, away = Watched(), Offload()
    away._carriers[torch.device("cpu")] = carrier
    (history,) = spans(away, 1, 2)
    for _ in range(3):
        away.held(history)
        fake_cuda[0] = FakeStream(torch.device("cpu"))
    assert len({stream for stream, _ in carrier.used}) == 3
    assert carrier.early == 0


def test_runs_share_one_side_stream(fake_cuda):
    FakeStream.made = 0
    carriers = [CudaCarrier(torch.device("cpu")) for _ in range(3)]
    assert FakeStream.made == len({carrier._stream for carrier in carriers}) == 1
    fake_cuda[0] = FakeStream(torch.device("cpu"))
    assert CudaCarrier(torch.device("cpu"))._stream is not carriers[0]._stream  # of runs that may go on beside those


@pytest.mark.parametrize(("device", "initialized", "times"), [("cpu", True, 1), ("model", True, 0), ("cpu", False, 0)])
def test_pinned_memory_is_given_back_on_disable(device, initialized, times, monkeypatch):
    released = []
    monkeypatch.setattr(torch._C, "_host_emptyCache", lambda: released.append(1), raising=False)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: initialized)
    pipe = reference.load("dit-digits")
    dc.enable(pipe, "interval", every=2, cache_device=device)
    assert not released
    dc.disable(pipe)
    assert len(released) == times
    monkeypatch.delattr(torch._C, "_host_emptyCache")
    with dc.cached(pipe, "interval", every=2, cache_device=device):
        pass  # also where torch has no such function
