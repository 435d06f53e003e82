"""Denoiser calls as CUDA graphs, which repeat their kernels without the Python and the launches that led to them.

A call is captured when one like it is made for the second time: of the same pass, with arguments of the same shapes and
constants, and with the same spans reused. What changes between such calls goes through memory that stays where it is:
arguments, weights and slots are written into before a replay, and a feature is moved from where the graph leaves it to
its slot afterwards, which its weight then follows. Deciding, weighing and storing stay outside.
"""

import contextlib
import functools
import threading
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import ConfigError, DiffusionCacheWarning
from ..history import History
from ..models import Span, unwrap
from .frame import Fixed, Frame, PassKey, Recorded, Recording, SpanState, Visit
from .group_offload import hook_of
from .structure import Shape, flatten, unflatten

if TYPE_CHECKING:
    from .cache_run import CacheRun

MAX_GRAPHS = 16  # ways of calling one denoiser that are kept: it may have fewer graphs than that
CASTING = "layerwise_casting"  # diffusers' name of the hook
ALIGNED = 4  # numbers of 32 bits in 16 bytes, at multiples of which kernels are given memory
CONSTANTS = (type(None), bool, int, float, str, bytes, torch.dtype, torch.device, torch.layout, torch.memory_format)

Sizes = tuple[tuple[int, ...], tuple[int, ...] | None]  # of a span's weights and correction
Place = tuple[PassKey, Span, int]  # the n-th time that a span runs in a call of a pass


class Capturer:
    """Captures what a function launches on a CUDA device, all graphs in one pool of memory.

    What a graph has made is there until another one of the pool is replayed.
    """

    def __init__(self, device: torch.device):
        self._device = device

    def warm(self, body: Callable[[], Any]) -> Any:
        """What the function gives, run on the stream that it is captured on, where kernels are then known."""
        side, current = _side_stream(self._device), torch.cuda.current_stream(self._device)
        side.wait_stream(current)
        try:
            with torch.cuda.stream(side):
                return body()
        finally:
            current.wait_stream(side)  # memory that the function let go of is not another's before it is done

    def capture(self, body: Callable[[], Any], beside: Any) -> tuple[Any, Any]:
        """The graph, with `replay()`, and what the function gave: tensors that hold something after a replay.

        beside: a graph of the same pool, if there is one.
        """
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._device)
        pool = torch.cuda.graph_pool_handle() if beside is None else beside.pool()
        side = _side_stream(self._device)
        with torch.cuda.device(self._device):
            try:
                with torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
                    made = body()
            except BaseException:
                torch.cuda.set_stream(current)
                _abandon(self._device.index, pool)
                raise
        return graph, made


def _abandon(device: int, pool: Any) -> None:
    """Undo what torch leaves behind of a capture that could not end.

    Without that, the allocator takes the capture for one that goes on, and refuses to empty its cache; before torch had
    a state for each capture, the generator refused as well to give numbers outside of one.
    """
    # these raise where the capture has ended, and all that failed was what it was of; older torch has other names
    with contextlib.suppress(AttributeError, RuntimeError):
        torch._C._cuda_endAllocateToPool(device, pool)
        torch._C._cuda_releasePool(device, pool)
    generator = torch.cuda.default_generators[device]
    generator.graphsafe_set_state(generator.clone_state())


# torch has one capture in a process at a time, and what another thread ran on the side stream would become a part of it
_CAPTURING = threading.RLock()


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all captures: libraries keep a workspace for each stream that they have run on."""
    return torch.cuda.Stream(device)


def capturer(device: torch.device) -> Capturer:
    """What captures on a device.

    Raises:
        ConfigError: for a device without graphs.
    """
    if device.type != "cuda":
        raise ConfigError(
            f"cuda_graphs=True needs a denoiser that is and stays on a CUDA device, and this one is on {device}: move "
            'the pipeline first (pipe.to("cuda")), or leave cuda_graphs out'
        )
    return Capturer(device)


def device_of(denoiser: nn.Module) -> torch.device:
    """Where a denoiser is.

    Raises:
        ConfigError: if it is on several devices.
    """
    devices = {tensor.device for tensor in chain(denoiser.parameters(), denoiser.buffers())}
    if len(devices) > 1:
        raise ConfigError(
            f"cuda_graphs=True needs a denoiser on one CUDA device, and this one is on "
            f"{', '.join(sorted(map(str, devices)))}: leave cuda_graphs out"
        )
    return next(iter(devices), torch.device("cpu"))


def check_device(denoiser: nn.Module) -> None:
    """That a denoiser is on one device, and that it has graphs.

    Raises:
        ConfigError: if not.
    """
    capturer(device_of(denoiser))


class Made(NamedTuple):
    """What a call gave: leaves and shape of its output; visits of spans; and what a frame counts of them."""

    leaves: list[Any]
    shape: Shape
    reused: list[Recorded]
    stored: list[Recorded]
    computed: int
    counts: dict[Span, int]
    reason: str


class Entry:
    """One way of calling a denoiser, seen once at least. slots: of the spans that the graph reads.

    shares: whether others may be captured into its graph's pool, in which no capture has failed.
    """

    def __init__(self) -> None:
        self.graph: Any = None
        self.shares = True
        self.made: Made | None = None
        self.inputs: list[Tensor] = []
        self.numbers: Tensor | None = None
        self.sizes: list[Sizes] = []
        self.slots: dict[tuple[Span, int], list[Tensor]] = {}
        self.failed = False


class Graphs:
    """The graphs of one denoiser, while a session is attached to it. They serve one run at a time."""

    def __init__(self, denoiser: nn.Module):
        self._denoiser = denoiser
        self._device: torch.device | None = None
        self._capturer: Capturer | None = None
        self._elsewhere = ""  # why the denoiser, where and as it is now, has no graphs
        self._lock = threading.Lock()
        self._run: weakref.ref[CacheRun] | None = None
        self._refused: weakref.WeakSet[CacheRun] = weakref.WeakSet()  # their features are elsewhere, also later on
        self._entries: dict[tuple, Entry] = {}
        self._slots: dict[tuple, list[list[Tensor]]] = {}
        self._used: set[tuple] = set()  # by the run, of both
        self._before: tuple | None = None  # what the denoiser was at the end of the last run
        self._told: set[str] = set()

    # runs

    def serves(self, run: "CacheRun") -> bool:
        """Whether this run is the one that the memory is for; it becomes that where there is no other."""
        with self._lock:
            current = None if self._run is None else self._run()
            if current is run or run in self._refused:
                return current is run
            if current is None:
                self._run = weakref.ref(run)
                self._used.clear()
                if self._entries and self._before != _condition(self._denoiser):
                    self._tell("the denoiser's weights, modules or settings have changed: its graphs are captured anew")
                    self._entries.clear()
                self._find()
            else:
                self._refused.add(run)
                self._tell("a run has begun before another of the same denoiser is over: it goes without graphs")
            return current is None

    def _find(self) -> None:
        """Look where the denoiser is, and whether its weights stay there."""
        try:
            device = device_of(self._denoiser)
            if device != self._device:
                self._entries.clear()
                self._slots.clear()
                self._capturer, self._device = capturer(device), device
            cast = any(hook_of(module, CASTING) is not None for module in self._denoiser.modules())
            self._elsewhere = "layerwise casting gives the weights new memory in each call" if cast else ""
        except ConfigError as error:
            self._elsewhere = str(error)

    def release(self, run: "CacheRun") -> None:
        """The run is over: its memory may be another's."""
        with self._lock:
            if self._run is not None and self._run() in (run, None):
                self._run = None
                self._before = _condition(self._denoiser) if self._entries else None

    # calls

    def call(
        self, run: "CacheRun", frame: Frame, forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any]
    ) -> Any:
        """What `forward(args, kwargs)` gives, by a graph where there is one of such a call or can be by now."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        hindrance = self._hindrance(run, frame, leaves)
        if hindrance is not None:
            if hindrance:
                self._tell(f"{hindrance}: such calls go without graphs")
            return forward(args, kwargs)
        reused = run.spans.reusable(frame)
        kept = run.history, run.forecaster.feature, run.forecaster.keeps_inputs
        spans = tuple((run.session.span_index[span], count) for span, count, _ in reused)
        given = tuple(map(_form, leaves))
        key = frame.key, spec, given, frame.actions, frame.stores, spans, kept, torch.is_inference_mode_enabled()
        entry = self._entries.get(key)
        if entry is None and self._has_room():
            self._entries[key] = Entry()
        self._used.add(key)
        if entry is None or entry.failed or _is_learning(run, frame):
            return forward(args, kwargs)
        numbers = _numbers(run, frame, reused)
        if numbers is None:
            return forward(args, kwargs)
        if entry.graph is None:
            made = self._captured(run, frame, forward, entry, (leaves, spec), reused, numbers)
        else:
            made = self._replayed(entry, leaves, reused, numbers)
            frame.replayed = made is not None
        return forward(args, kwargs) if made is None else _taken(run, frame, made)

    def _captured(
        self,
        run: "CacheRun",
        frame: Frame,
        forward: Callable[..., Any],
        entry: Entry,
        given: tuple[list[Any], Any],
        reused: "Sequence[tuple[Span, int, SpanState]]",
        numbers: "Numbers",
    ) -> Made | None:
        """Make the call from fixed memory, then capture it. What it made; None where it cannot be made so."""
        assert self._capturer is not None
        leaves, spec = given
        fixed = [leaf.to(self._device, copy=True) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        held = numbers.values.to(self._device)
        args, kwargs = pytree.tree_unflatten(fixed, spec)
        places = [(span, count) for span, count, _ in reused]
        weights = dict(zip(places, numbers.split(held), strict=True))

        def body() -> Made:
            shadow = frame.again(frame.stores)
            shadow.actions, shadow.variant, shadow.called = frame.actions, frame.variant, (args, kwargs)
            shadow.recording = Recording(weights)
            outer, run.frame = run.frame, shadow
            try:
                return _made(run, shadow, forward(args, kwargs))
            finally:
                run.frame = outer

        others = [other for other in self._entries.values() if other.graph is not None]
        beside = next((other.graph for other in others if other.shares), None)
        made = None
        try:
            with _CAPTURING:
                before = _condition(self._denoiser)
                made = self._capturer.warm(body)
                if before != _condition(self._denoiser):
                    raise RuntimeError("the denoiser's weights, modules or settings change while it runs")
                entry.graph, entry.made = self._capturer.capture(body, beside)
        except Exception as error:
            entry.failed = True
            for other in others:
                other.shares = False
            self._tell(f"a call could not be captured, and its like go without graphs: {type(error).__name__}: {error}")
            return made
        entry.inputs = [leaf for leaf in fixed if isinstance(leaf, Tensor)]
        entry.numbers, entry.sizes = held, numbers.sizes
        entry.slots = {(span, count): state.history.tensors() for span, count, state in reused}
        return made

    def _replayed(
        self,
        entry: Entry,
        leaves: Sequence[Any],
        reused: "Sequence[tuple[Span, int, SpanState]]",
        numbers: "Numbers",
    ) -> Made | None:
        """What the graph made of these arguments; None where the features are not those that it reads."""
        assert entry.made is not None
        assert entry.numbers is not None
        if numbers.sizes != entry.sizes:
            return None
        recorded = {(one.span, one.nth): one for one in entry.made.reused}
        for span, count, state in reused:
            one, slots = recorded[span, count], state.history.tensors()
            read = entry.slots[span, count]
            same = len(slots) == len(read) and all(a is b for a, b in zip(slots, read, strict=True))
            if not same or state.template is not one.template or state.signature != one.entered:
                return None
        tensors = (leaf for leaf in leaves if isinstance(leaf, Tensor))
        for into, tensor in zip(entry.inputs, tensors, strict=True):
            into.copy_(tensor, non_blocking=True)
        entry.numbers.copy_(numbers.values, non_blocking=True)
        entry.graph.replay()
        return entry.made

    def file(
        self,
        place: Place,
        node: float,
        history: History,
        parts: Sequence[Tensor],
        coded: Sequence[torch.dtype | None],
    ) -> None:
        """Store a feature, as `History.encoded` gives it, in slots that graphs may read."""
        if not history:
            like = tuple((part.shape, part.stride(), part.dtype, part.device) for part in parts)
            key = place, history.capacity, like, torch.is_inference_mode_enabled()
            if key not in self._slots:
                self._slots[key] = [[torch.zeros_like(part) for part in parts] for _ in range(history.capacity)]
            self._used.add(key)
            history.lend(self._slots[key], coded)
        for into, part in zip(history.claim(node), parts, strict=True):
            into.copy_(part)

    # which calls

    def _hindrance(self, run: "CacheRun", frame: Frame, leaves: Sequence[Any]) -> str | None:
        """Why this call goes without a graph: empty where that is no news, None where nothing is in the way."""
        if run.observer is not None or frame.fills_cache:
            return ""
        if self._elsewhere:
            return self._elsewhere
        assert self._device is not None
        if torch.is_grad_enabled():
            return "gradients are on, which graphs do not carry (torch.no_grad() switches them off)"
        if torch.is_autocast_enabled(self._device.type):
            return "autocast is on, whose cached casts graphs cannot hold (give the denoiser a dtype of its own)"
        if self._denoiser.training:
            return "the denoiser is in training mode (denoiser.eval() ends it)"
        if run.session.agree is not None:
            return "ranks share the denoiser's work"
        for leaf in leaves:
            if not isinstance(leaf, (Tensor, *CONSTANTS)):
                return f"whether a {type(leaf).__name__} among the arguments has changed cannot be told"
        return None

    def _has_room(self) -> bool:
        """Whether one more way of calling can be kept, once those that this run has not used are let go of."""
        if len(self._entries) >= MAX_GRAPHS:
            self._entries = {key: entry for key, entry in self._entries.items() if key in self._used}
            self._slots = {key: slots for key, slots in self._slots.items() if key in self._used}
        if len(self._entries) >= MAX_GRAPHS:
            self._tell(f"the denoiser is called in more than {MAX_GRAPHS} ways in a run: the others go without graphs")
            return False
        return True

    def _tell(self, message: str) -> None:
        if message not in self._told:
            self._told.add(message)
            warnings.warn(message, DiffusionCacheWarning, stacklevel=3)


class Numbers(NamedTuple):
    """Weights and corrections of all reused spans in a row, on the host; sizes: of both, None where not corrected."""

    values: Tensor
    sizes: list[Sizes]

    def split(self, values: Tensor) -> list[Fixed]:
        """Those of each span in memory that holds all."""
        found, start = [], 0

        def next_of(size: tuple[int, ...]) -> Tensor:
            nonlocal start
            begin, start = start, start + _aligned(torch.Size(size).numel())
            return values[begin : begin + torch.Size(size).numel()].view(size)

        for weights, correction in self.sizes:
            found.append(Fixed(next_of(weights), None if correction is None else next_of(correction)))
        return found


def _aligned(count: int) -> int:
    return -(-count // ALIGNED) * ALIGNED


def _is_learning(run: "CacheRun", frame: Frame) -> bool:
    """Whether it is being found out in this call how its spans run, or what else uses what is in them."""
    assert frame.actions is not None
    if frame.trace is not None:
        return True
    skips = any(len(span.members) > 1 for span in run.layouts[frame.key[0]].spans)
    return frame.poisoned and skips and not all(frame.actions)


def _numbers(run: "CacheRun", frame: Frame, reused: "Sequence[tuple[Span, int, SpanState]]") -> Numbers | None:
    """What the spans are forecast with in this call; None where that fails, and one is computed."""
    parts: list[Tensor] = []
    sizes: list[Sizes] = []
    dtype = torch.float32
    for span, _, state in reused:
        found = run.spans.slot_numbers(frame, span, state)
        if found is None:
            return None
        if state.history.slots[0][0].dtype == torch.float64:
            dtype = torch.float64
        weights, correction = [
            None if part is None else torch.tensor(part, dtype=torch.float64, device="cpu") for part in found
        ]
        assert weights is not None
        sizes.append((tuple(weights.shape), None if correction is None else tuple(correction.shape)))
        for part in (weights, correction):
            if part is not None:
                parts += [part.flatten(), part.new_zeros(_aligned(part.numel()) - part.numel())]
    values = torch.cat(parts).to(dtype) if parts else torch.zeros(0, device="cpu")
    if parts and reused[0][2].history.slots[0][0].is_cuda:
        values = values.pin_memory()  # or the host would wait for the copy
    return Numbers(values, sizes)


def _made(run: "CacheRun", shadow: Frame, output: Any) -> Made:
    """What a call made under a recording.

    Raises:
        RuntimeError: where its spans were not as they were said to be.
    """
    recording = shadow.recording
    assert recording is not None
    visits = [*recording.reused, *recording.stored]
    if {(one.span, one.nth) for one in recording.reused} != set(recording.given):
        raise RuntimeError("other spans were reused than before")
    if not all(visit.finished for visit in shadow.reused):
        raise RuntimeError("a span was entered and not left")
    if any(run.spans.state(shadow.key, one.span, one.nth).unusable for one in visits):
        raise RuntimeError("a span cannot be cached as one")
    leaves, shape = flatten(output)
    return Made(leaves, shape, recording.reused, recording.stored, shadow.computed, dict(shadow.counts), shadow.reason)


def _taken(run: "CacheRun", frame: Frame, made: Made) -> Any:
    """The output, in memory of its own, with the features stored and the frame as if the call had just been made."""
    for recorded in made.stored:
        run.spans.file(frame, recorded)
    for recorded in made.reused:
        state = run.spans.state(frame.key, recorded.span, recorded.nth)
        visit = Visit(recorded.span, state, {}, recorded.entered, True)
        visit.finished = True
        frame.reused.append(visit)
    frame.computed, frame.counts = made.computed, dict(made.counts)
    frame.reason = made.reason or frame.reason
    leaves = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in made.leaves]
    return unflatten(leaves, made.shape)


def _form(leaf: Any) -> Any:
    """What must be equal of an argument for a graph to serve: all of a constant, but not the numbers in a tensor."""
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.stride(), leaf.dtype, leaf.device
    return type(leaf), leaf


def _condition(denoiser: nn.Module) -> tuple:
    """What graphs take for given of a denoiser: where its weights are, its modules, their hooks and settings."""
    return tuple(
        (
            id(module),
            *(
                (_address(tensor), tensor.dtype, tensor.shape)
                for tensors in (module._parameters, module._buffers)
                for tensor in tensors.values()
                if tensor is not None
            ),
            *((name, _setting(value)) for name, value in vars(module).items() if name not in _OF_MODULES),
            *(tuple(hooks) for hooks in (module._forward_hooks, module._forward_pre_hooks)),
        )
        for module in unwrap(denoiser).modules()
    )


def _address(tensor: Tensor) -> Any:
    """Where the numbers of a tensor are, or those of its parts if it is quantised or sharded."""
    if hasattr(tensor, "__tensor_flatten__"):
        return tuple(_address(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.data_ptr()


_OF_MODULES = {*vars(nn.Module()), "_compiled_call_impl"} - {"training"}


def _setting(value: Any, depth: int = 3) -> Any:
    """A value that is equal as long as what an attribute says is the same."""
    if isinstance(value, CONSTANTS):
        return value
    if isinstance(value, Tensor):
        return _address(value), value.shape
    if not depth or isinstance(value, nn.Module):
        return id(value)
    if isinstance(value, Mapping):
        return tuple((str(key), _setting(item, depth - 1)) for key, item in value.items())
    if isinstance(value, (list, tuple, set, frozenset)):
        return tuple(_setting(item, depth - 1) for item in value)
    own = getattr(value, "__dict__", {})
    return id(value), tuple((name, _setting(item, depth - 1)) for name, item in own.items())
