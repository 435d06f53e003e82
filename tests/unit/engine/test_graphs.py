"""What graphs take for given, and the stand-in for them: strict enough that what would be wrong on a GPU is wrong."""

import contextlib
import threading
from types import SimpleNamespace

import pytest
import torch
from recorded_graph import RecordingCapturer
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

import diffusion_cache as dc
from diffusion_cache.engine import graphs
from diffusion_cache.errors import ConfigError, DiffusionCacheWarning


def captured(body):
    return RecordingCapturer().capture(body, None)


def test_a_replay_reads_what_is_there_by_then():
    given, weight = torch.ones(2, 3), nn.Parameter(torch.full((2, 3), 2.0))
    with torch.no_grad():
        graph, made = captured(lambda: (given * weight).relu().sum(1))
        assert made.tolist() == [6, 6]
        given.copy_(torch.tensor([[1.0], [-1.0]]))
        weight.mul_(2)
        graph.replay()
    assert made.tolist() == [12, 0]


def test_a_replay_does_not_see_numbers_of_python_nor_tensors_that_came_later():
    held = {"number": 1.0, "tensor": torch.ones(2)}
    weight = nn.Parameter(torch.ones(2))
    with torch.no_grad():
        graph, (scaled, added, weighed) = captured(
            lambda: (torch.ones(2) * held["number"], held["tensor"] + 0, weight * 1)
        )
        held.update(number=5.0, tensor=torch.full((2,), 5.0))
        weight.data = torch.full((2,), 5.0)
        graph.replay()
    assert [tensor.tolist() for tensor in (scaled, added, weighed)] == [[1, 1]] * 3


def test_views_and_writes_in_place():
    given = torch.arange(6.0).view(2, 3)

    def body():
        whole = given.clone()
        column = whole[:, 1]
        column += 10
        torch.sub(whole, 1, out=whole)
        return whole.t().contiguous(), column

    graph, (turned, column) = captured(body)
    for _ in range(2):
        given.copy_(torch.ones(2, 3))
        graph.replay()
        assert turned.tolist() == [[0, 0], [10, 10], [0, 0]]
        assert column.tolist() == [10, 10]


def test_no_python_runs_at_a_replay():
    calls = []

    def body():
        calls.append(1)
        return torch.ones(2) + 1

    graph, made = captured(body)
    graph.replay()
    assert len(calls) == 1
    assert made.tolist() == [2, 2]


def test_what_another_graph_of_the_pool_has_made_is_lost():
    capturer, given = RecordingCapturer(), torch.ones(2)
    first, one = capturer.capture(lambda: given + 1, None)
    second, two = capturer.capture(lambda: given + 2, first)
    first.replay()
    assert one.tolist() == [2, 2]
    assert two.isnan().all()
    second.replay()
    assert one.isnan().all()
    assert two.tolist() == [3, 3]


@pytest.mark.parametrize(
    "body",
    [
        lambda given: given.sum().item(),
        lambda given: bool(given.any()),
        lambda given: given[given > 0],
        lambda given: torch.tensor([1.0, 2.0]) * given,
        lambda given: given.nonzero(),
    ],
    ids=["item", "bool", "mask", "from the host", "nonzero"],
)
def test_what_waits_for_the_device_fails(body):
    given = torch.ones(2)
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        captured(lambda: body(given))
    assert (given + 1).tolist() == [2, 2]


def test_devices():
    with pytest.raises(ConfigError, match=r"stays on a CUDA device, and this one is on cpu: .* leave cuda_graphs out"):
        graphs.capturer(torch.device("cpu"))
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    with pytest.raises(ConfigError, match="on one CUDA device, and this one is on cpu, meta"):
        graphs.device_of(model)
    assert graphs.device_of(model[0]) == torch.device("cpu")
    assert graphs.device_of(nn.Identity()) == torch.device("cpu")


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.scales = {"default": 1.0}
        self.table = torch.ones(2)
        self.processor = type("Processor", (), {})()
        self.processor.scale = [0.5]
        self.register_buffer("shift", torch.zeros(2))
        self.packed = packed()


def packed():
    """A weight of several tensors, as quantised ones are: it has no address of its own."""
    return nn.Parameter(TwoTensor(torch.ones(2), torch.ones(2)))


def replaced(model):
    model.linear.weight = nn.Parameter(torch.ones(2, 2))


CHANGES = {
    "a weight's memory": lambda model: setattr(model.linear.weight, "data", torch.ones(2, 2)),
    "a weight": replaced,
    "a quantised weight": lambda model: setattr(model, "packed", packed()),
    "a buffer": lambda model: setattr(model, "shift", torch.zeros(2)),
    "a module": lambda model: setattr(model, "linear", nn.Linear(2, 2)),
    "a number in a dict": lambda model: model.scales.update(default=0.5),
    "a tensor that is no weight": lambda model: setattr(model, "table", torch.zeros(2)),
    "a number of a processor": lambda model: model.processor.scale.__setitem__(0, 1.0),
    "a processor": lambda model: setattr(model, "processor", object()),
    "a hook": lambda model: model.linear.register_forward_hook(lambda *_: None),
    "a mode": lambda model: model.linear.eval(),
    "a forward": lambda model: setattr(model.linear, "forward", lambda x: x),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_has_changed_of_a_denoiser(change):
    model = Scaled()
    before = graphs._condition(model)
    kept = [*model.modules(), model.linear.weight.data, model.shift, model.packed, model.processor]
    with torch.no_grad():
        model.linear.weight.add_(1)  # graphs read it where it is
        model.linear(torch.ones(2))
    assert graphs._condition(model) == before
    CHANGES[change](model)
    assert graphs._condition(model) != before
    del kept  # alive until now, or its memory may have become that of what replaced it


class FakeStream:
    def __init__(self, *_):
        self.waited_for = []

    def wait_stream(self, other):
        self.waited_for.append(other)


@pytest.fixture
def cuda(monkeypatch):
    """What `Capturer` uses of torch.cuda, with `torch.cuda.graph` itself. failing: where a capture goes wrong."""
    own = FakeStream()
    state = type("Cuda", (), dict(own=own, stream=own, failing="", undone=[]))()

    class FakeGraph:
        def capture_begin(self, pool, **_):
            self.begun_in = pool
            if state.failing == "begin":
                raise RuntimeError("cannot begin")

        def capture_end(self):
            if state.failing == "end":
                raise RuntimeError("operation failed due to a previous error during capture")

        def pool(self):
            return self.begun_in

    class Generator:
        def clone_state(self):
            return "cloned"

        def graphsafe_set_state(self, generator):
            state.undone.append(("generator", generator))

    @contextlib.contextmanager
    def on(stream):
        before, state.stream = state.stream, stream
        try:
            yield
        finally:
            state.stream = before

    for name, fake in dict(
        CUDAGraph=FakeGraph,
        Stream=FakeStream,
        stream=on,
        current_stream=lambda device=None: state.stream,
        set_stream=lambda stream: setattr(state, "stream", stream),
        device=lambda device: contextlib.nullcontext(),
        graph_pool_handle=lambda: (0, 1),
        default_generators=[Generator()],
        synchronize=lambda: None,
        empty_cache=lambda: None,
    ).items():
        monkeypatch.setattr(torch.cuda, name, fake)
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        monkeypatch.setattr(
            torch._C, name, lambda device, pool, name=name: state.undone.append((name, device, pool)), raising=False
        )
    monkeypatch.setattr(torch._C, "_host_emptyCache", lambda: None, raising=False)
    graphs._side_stream.cache_clear()
    yield state
    graphs._side_stream.cache_clear()


def refuse():
    raise ValueError("operation not permitted when stream is capturing")


@pytest.mark.parametrize("failing", ["begin", "end", "body"])
def test_a_capture_that_fails_leaves_the_stream_and_the_allocator_as_they_were(cuda, failing):
    capturer = graphs.Capturer(torch.device("cuda", 0))
    first, made = capturer.capture(lambda: cuda.stream is not cuda.own, None)
    assert made
    assert cuda.undone == []
    cuda.failing = failing
    with pytest.raises((RuntimeError, ValueError)):
        capturer.capture(refuse, first)
    assert cuda.stream is cuda.own
    assert cuda.undone == [
        ("_cuda_endAllocateToPool", 0, (0, 1)),
        ("_cuda_releasePool", 0, (0, 1)),
        ("generator", "cloned"),
    ]


def test_a_warm_up_that_fails_is_waited_for(cuda):
    capturer = graphs.Capturer(torch.device("cuda", 0))
    with pytest.raises(ValueError):
        capturer.warm(refuse)
    side = graphs._side_stream(torch.device("cuda", 0))
    assert cuda.stream is cuda.own
    assert (side.waited_for, cuda.own.waited_for) == ([cuda.own], [side])


class Watched(RecordingCapturer):
    """Notes beside which graph each was captured. failing: the captures that fail, by their numbers."""

    def __init__(self, failing=()):
        super().__init__()
        self.failing = failing
        self.beside = []

    def capture(self, body, beside):
        self.beside.append(beside)
        if len(self.beside) - 1 in self.failing:
            raise RuntimeError("operation failed due to a previous error during capture")
        return super().capture(body, beside)


class Denoiser(nn.Module):
    def forward(self, hidden_states):
        return hidden_states * 1.5


def loop(batches):
    """A run whose every second step is reused, at these batch sizes."""
    denoiser = Denoiser().eval()
    options = dict(every=2, scope="denoiser", num_steps=len(batches), cuda_graphs=True)
    with torch.no_grad(), dc.run(denoiser, "interval", **options) as run:
        for batch in batches:
            denoiser(torch.ones(batch, 3, 8))
            run.next_step()


def test_a_pool_in_which_a_capture_failed_takes_no_more_graphs(monkeypatch):
    watched = Watched(failing=[1])
    monkeypatch.setattr(graphs, "capturer", lambda device: watched)
    with pytest.warns(DiffusionCacheWarning, match="could not be captured"):
        loop([1] * 4 + [2] * 4)
    first, second, _ = watched.graphs
    assert watched.beside == [None, first, None, second]  # computed and reused, at one batch size and at another


def test_one_capture_at_a_time(monkeypatch):
    """What another thread runs on the stream that is captured would become a part of the graph."""
    inside, most = [], []

    class Slow(RecordingCapturer):
        def warm(self, body):
            inside.append(1)
            try:
                threading.Event().wait(0.05)
                most.append(len(inside))
                return super().warm(body)
            finally:
                inside.pop()

    monkeypatch.setattr(graphs, "capturer", lambda device: Slow())
    threads = [threading.Thread(target=loop, args=([1] * 4,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 4


def test_numbers_are_made_on_the_host_whatever_the_default_device():
    given = [0.5, 2.0]
    run = SimpleNamespace(spans=SimpleNamespace(slot_numbers=lambda *_: (given, None)))
    state = SimpleNamespace(history=SimpleNamespace(slots=[[torch.zeros(3)]]))
    with torch.device("meta"):
        of_one, of_none = graphs._numbers(run, None, [(None, 0, state)]), graphs._numbers(run, None, [])
    assert of_one.values.tolist() == [*given, 0, 0]
    assert of_none.values.tolist() == []
