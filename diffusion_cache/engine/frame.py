"""What is known of one denoiser call while it runs."""

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..chunks import Chunks
from ..context import Step, Verdict
from ..history import History
from ..models import Called, Span
from ..ops import Coded
from .deferred import Deferred, Terms
from .structure import Inputs, PassThrough, Template

PassKey = tuple[str, str]  # denoiser, pass


@dataclass
class SpanState:
    """One span in one pass: its history, and the structure of its output and of its members' outputs.

    place: of the span in the order in which those of its pass were first entered.
    """

    history: History
    template: Template | None = None
    signature: tuple = ()
    passthrough: dict[int, PassThrough] = field(default_factory=dict)
    unusable: str = ""
    place: int = 0
    unchecked: bool = False  # whether the newest feature is not known to be finite

    def knows_members(self, span: Span) -> bool:
        """Whether it is known what each member before the span's last one returns."""
        return len(self.passthrough) == len(span.members) - 1


class Visit:
    """One time that a span runs within a denoiser call.

    forecast: the span's output tensors where it is reused, in whole or in part; uncorrected: the same without what
    corrects them, where that is of use; rows: the batch rows that are computed all the same. quiet: computed with
    nothing left to learn from its middle members. given: the inputs themselves, of which `inputs` may be copies.
    entered: their signature, the state's own where it is equal to that.
    """

    forecast: list[Tensor] | None = None
    uncorrected: Sequence[Tensor] = ()
    rows: list[int] | None = None
    quiet = False
    finished = False
    independent: bool | None = None  # while it is tried out: whether batch rows do not depend on each other
    idle: Any = None  # what every middle member returns while the span is skipped, where that is known

    def __init__(
        self, span: Span, state: SpanState, inputs: Inputs, entered: tuple, stores: bool, given: Inputs | None = None
    ):
        self.span = span
        self.state = state
        self.inputs = inputs
        self.entered = entered
        self.stores = stores
        unknown = state.template is None or state.signature is not entered
        self.given = inputs if given is None else given
        self.versions = {key: mark_of(tensor) for key, tensor in self.given.items()} if unknown else {}

    def let_go(self) -> None:
        """Of what it was entered with and gave, now that it is left: a call may run many spans."""
        self.inputs, self.given, self.versions, self.uncorrected = {}, {}, {}, ()
        if self.forecast is not None:
            self.forecast = []

    @property
    def copied(self) -> bool:
        """Whether the span has not written into the inputs as they are kept here, whatever it did with its own."""
        return self.inputs is not self.given

    def wrote(self) -> bool:
        """Whether the span has written into what it was given, or may have: marks are made while it is not known."""
        marked = self.versions.keys() == self.given.keys()
        return not marked or any(written_since(self.given[key], mark) for key, mark in self.versions.items())


Mark = int | Tensor


def mark_of(tensor: Tensor) -> Mark:
    """What tells whether a tensor is written into: its version, or a copy, as inference tensors have no version."""
    return tensor.clone() if tensor.is_inference() else tensor._version


def written_since(tensor: Tensor, mark: Mark) -> bool:
    return not torch.equal(tensor, mark) if isinstance(mark, Tensor) else tensor._version != mark


class Fixed(NamedTuple):
    """What a span is forecast with in a graph, in memory that stays where it is.

    weights: [slots] or [rows, slots]; correction: [1 or rows, 2, channels].
    """

    weights: Tensor
    correction: Tensor | None


class Recorded(NamedTuple):
    """One time that a span runs in a call that a graph repeats.

    parts: what a slot is to hold of its feature, empty where it is reused; coded: as `History.encoded` gives it.
    """

    span: Span
    nth: int  # of the times that it runs in this call, from 0
    entered: tuple
    template: Template
    passthrough: dict[int, PassThrough]
    parts: list[Tensor]
    coded: list[torch.dtype | None]


class Recording:
    """What a call made of its spans, with nothing stored yet. given: for those that are reused, by span and count."""

    def __init__(self, given: dict[tuple[Span, int], Fixed]):
        self.given = given
        self.reused: list[Recorded] = []
        self.stored: list[Recorded] = []


class SampleRecord(NamedTuple):
    """What one sample had of a denoiser call that is decided on for each apart.

    computed: what was decided; a call may have to be computed for all samples for the sake of one. spans_reused: for
    it. again: whether it was reused at first, and decided against at the end of the call.
    """

    computed: bool
    spans_reused: int
    again: bool = False


class Frame:
    """One denoiser call: its step, its decision and what its spans are doing."""

    # what few calls change stands with the class: one is made at each step
    chunks: Chunks | None = None  # of a stream, whose features are filed by the levels of each
    actions: tuple[bool, ...] | None = None  # for all spans or each of them
    apart = False  # whether some samples can be computed and others not
    fills_cache = False  # of keys and values: no part of any history
    verdicts: Sequence[Verdict] = ()  # on each sample
    asking: Sequence[bool] = ()  # of each sample, whether it is to be computed
    rejected: Sequence[bool] = ()  # of each sample, whether the same call was made before with it reused
    rows: list[int] | None = None  # of a call that is computed for some samples: their batch rows
    reason = ""
    note = ""  # on how it was forecast
    called: tuple[tuple, dict[str, Any]] = ((), {})  # the denoiser's arguments
    signals: dict[str, Tensor] | None = None  # that the policy asks for, once the first span is entered
    compared: Mapping[str, Tensor] = MappingProxyType({})  # those that the corrector asks for
    peeking = False  # a block is run only to see what its attention receives
    probe_input: Tensor | None = None
    probe_version: int | None = None  # of a copy, which nothing writes into
    computed = 0
    open: Visit | None = None  # computed, and between its first and last member
    variant: tuple = ()  # what may change the way through the denoiser: arguments given, spans reused
    poisoned = False
    trace: list[Called] | None = None  # members in the order they are called
    recording: Recording | None = None  # while a call is made that a graph is to repeat
    replayed = False  # whether a graph was

    def __init__(self, step: Step, key: PassKey, stores: tuple[bool, ...], batch: int, position: int = 0):
        self.step = step
        self.key = key
        self.position = position  # of the call in its step
        self.stores = stores  # what is computed: for all spans or each of them
        self.batch = batch  # rows of the sample
        self.visits: dict[Span, Visit] = {}  # the latest of each span
        self.counts: dict[Span, int] = {}
        self.reused: list[Visit] = []
        self.deferred: list[weakref.ref[Deferred]] = []  # forecasts that blocks were given
        self.outputs: dict[Span, list[tuple[Tensor, Mark]]] = {}  # while tracing: of each span's latest member

    @property
    def may_reuse(self) -> bool:
        """Whether any span may be reused in this call."""
        return self.actions is None or not all(self.actions)

    @property
    def samples(self) -> tuple[SampleRecord, ...]:
        """What each sample had, where the policy was asked about each; to be called at the end."""
        if self.signals is None:
            return ()
        apart = sum(visit.rows is not None for visit in self.reused)
        rejected = self.rejected or [False] * len(self.asking)
        return tuple(
            SampleRecord(asks, len(self.reused) - (apart if asks else 0), again)
            for asks, again in zip(self.asking, rejected, strict=True)
        )

    def again(self, stores: tuple[bool, ...]) -> "Frame":
        """The same call, about to be made once more."""
        frame = Frame(self.step, self.key, stores, self.batch, self.position)
        frame.chunks = self.chunks
        return frame

    def defer(
        self, features: Sequence[Tensor | Coded], weights: Sequence[float] | Tensor, correction: Tensor | None
    ) -> Deferred:
        """A forecast that is made where it is used, in this call."""
        return Deferred(Terms(features, weights, correction, self.deferred), features[0].dtype)

    def settle(self) -> None:
        """Make what is left of the deferred forecasts: their features may be written into from now on."""
        for reference in self.deferred:
            forecast = reference()
            if forecast is not None:
                forecast.made()

    def query(self, history: History, lane: int) -> tuple[tuple[float, ...], float]:
        """The steps of a lane's features, and the one that they are forecast at: of the run, or of the lane's chunk."""
        nodes = tuple(node for node, _ in history.lanes[lane])
        if self.chunks is None:
            return nodes, self.step.index
        step = self.chunks.ladder.step
        return tuple(map(step, nodes)), step(self.chunks.levels[lane])
