"""Stacks inside a denoiser that is compiled as a whole, where no call of a block can be intercepted.

The blocks' `forward` is replaced by one that the compiler traces: it reads one bool, so that there are two graphs, one
that computes the span and gives its feature as a further output, and one that takes the stored features and a tensor
of weights. All decisions, counting and storing stay outside. What blocks receive and return is learned beforehand,
from one computed and one reused step that run uncompiled.
"""

import functools
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from .. import ops
from ..models import Span
from .frame import Frame, Visit
from .intercept import run_uncompiled
from .structure import LEARNED, Like, Newest, PassThrough, Template, copied, signature, tensor_inputs

if TYPE_CHECKING:
    from .cache_run import CacheRun


class Cell:
    """What the traced code of one span reads and writes.

    slots: [history][leaf]; weights: [history], or [rows, history]; correction: [1 or rows, 2, channels].
    """

    def __init__(self) -> None:
        self.reuse = False
        self.template: Template | None = None
        self.passthrough: dict[int, PassThrough] = {}
        self.slots: list[list[Tensor]] = []
        self.weights: Tensor | None = None
        self.correction: Tensor | None = None
        self.bases: list[Tensor | None] = []
        self.feature: list[Tensor] | None = None


class Learned(NamedTuple):
    """What an uncompiled step has shown of one span. like: what its features look like, one per leaf."""

    template: Template
    signature: tuple
    passthrough: dict[int, PassThrough]
    like: list[Like]


class CompiledSpans:
    """The spans of one denoiser that is compiled as a whole, while a session is attached to it."""

    def __init__(self, denoiser: nn.Module, spans: tuple[Span, ...]):
        self.denoiser = denoiser
        self.spans = spans
        self._kept = _kept(denoiser, spans)
        self.cells = dict(zip(spans, self._kept.cells, strict=True))
        self._kept.install()

    def remove(self) -> None:
        """Give every block its own forward back."""
        self.release()
        self._kept.remove()

    def release(self) -> None:
        """Let go of what the last call took and gave, so that calls from elsewhere pass through."""
        for cell in self.cells.values():
            cell.reuse, cell.template = False, None
            cell.slots, cell.bases, cell.feature = [], [], None
            cell.weights = cell.correction = None

    def call(self, run: "CacheRun", frame: Frame, inner: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The denoiser's output, its spans computed or reused as the frame says."""
        feature = run.forecaster.feature
        key = feature, frame.variant[:2], signature(tensor_inputs(args, kwargs))
        learned = self._kept.learned.get(key)
        if learned is None:
            if not run.decisions.ever_reuses(frame.step.total):
                return inner(*args, **kwargs)
            return self._learn(run, frame, key, args, kwargs)
        with self._kept.lock:  # another thread may run the same blocks
            try:
                for i, span in enumerate(self.spans):
                    self._prepare(run, frame, span, learned.get(i))
                output = inner(*args, **kwargs)
                for span in self.spans:
                    self._store(run, frame, span)
            finally:
                self.release()
        return output

    def _learn(self, run: "CacheRun", frame: Frame, key: tuple, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Compute the step uncompiled, then reuse it, to see what blocks return and that nothing else is used."""
        for cell in self.cells.values():
            cell.template = None
        kept = [run.spans.stores(frame, span) for span in self.spans]
        frame.actions, frame.stores = (True,), (True,)
        frame.reason = "learning what the blocks return"
        given = copied(args), copied(kwargs)
        uncompiled = functools.partial(run_uncompiled, self.denoiser)
        output = uncompiled(*args, **kwargs)
        if self is not run.session.compiled.get(frame.key[0]):
            return output  # the spans were arranged anew
        learned = {}
        for i, span in enumerate(self.spans):
            state = run.spans.state(frame.key, span, 0)
            if state.template is not None and state.history and not state.unusable:
                like = [Like(t.shape, t.dtype, t.device) for t in state.history.slots[0]]
                learned[i] = Learned(state.template, state.signature, dict(state.passthrough), like)
        patterns = run.decisions.patterns(frame.step.total)
        if all(not run.repeat(frame, pattern, uncompiled, *given) for pattern in patterns):
            self._kept.learned[key] = learned
        for span, stores in zip(self.spans, kept, strict=True):
            if not stores:
                run.spans.forget(run.spans.state(frame.key, span, 0))
        return output

    def _prepare(self, run: "CacheRun", frame: Frame, span: Span, learned: Learned | None) -> None:
        """Set a span's cell for the next call."""
        cell, state = self.cells[span], run.spans.state(frame.key, span, 0)
        cell.reuse, cell.template, cell.feature = False, None, None
        if learned is None or state.unusable:
            return
        if state.signature != learned.signature:
            run.spans.forget(state)
        if state.template is None:  # forgotten, with whatever history there was then
            state.template, state.signature = learned.template, learned.signature
            state.passthrough = dict(learned.passthrough)
        cell.template, cell.passthrough = state.template, state.passthrough
        cell.weights, cell.correction = run.spans.slot_weights(frame, span, state)
        cell.reuse = cell.weights is not None
        if cell.reuse:
            state.history.reserve(learned.like)
            cell.slots = state.history.slots

    def _store(self, run: "CacheRun", frame: Frame, span: Span) -> None:
        cell, state = self.cells[span], run.spans.state(frame.key, span, 0)
        feature, cell.feature, cell.bases = cell.feature, None, []
        stores = run.spans.stores(frame, span)
        visit = Visit(span, state, {}, state.signature, stores)
        visit.finished = True
        frame.visits[span] = visit
        if cell.reuse:
            frame.reused.append(visit)
            return
        frame.computed += 1
        if feature and stores:
            state.history.observe(frame.step.index, feature, [None] * len(feature))
            state.unchecked = True


class _Kept:
    """The replaced forwards of one choice of blocks, kept with their denoiser: new ones would be compiled anew."""

    def __init__(self, spans: tuple[Span, ...]):
        self.cells = [Cell() for _ in spans]
        self.learned: dict[tuple, dict[int, Learned]] = Newest(LEARNED)
        self.users = 0
        self.lock = threading.RLock()
        self._own: list[tuple[nn.Module, Callable | None, Callable]] = []
        for span, cell in zip(spans, self.cells, strict=True):
            for member, module in enumerate(span.members):
                traced = _traced(cell, member, member == len(span.members) - 1, module.forward)
                self._own.append((module, vars(module).get("forward"), traced))

    @property
    def current(self) -> bool:
        """Whether blocks still have the forwards that were replaced: hooks may have come or gone."""
        return all(vars(module).get("forward") in (own, traced) for module, own, traced in self._own)

    def install(self) -> None:
        self.users += 1
        for module, _, traced in self._own:
            module.forward = traced

    def remove(self) -> None:
        self.users -= 1
        for module, own, traced in self._own if not self.users else ():
            if vars(module).get("forward") is not traced:
                continue  # wrapped since: what is left of ours in there passes calls through
            if own is None:
                del module.forward
            else:
                module.forward = own


_KEPT: "WeakKeyDictionary[nn.Module, dict[tuple, _Kept]]" = WeakKeyDictionary()


def _kept(denoiser: nn.Module, spans: tuple[Span, ...]) -> _Kept:
    by_blocks = _KEPT.setdefault(denoiser, {})
    blocks = tuple(tuple(id(member) for member in span.members) for span in spans)
    if blocks not in by_blocks or not by_blocks[blocks].current:
        by_blocks[blocks] = _Kept(spans)
    return by_blocks[blocks]


def _traced(cell: Cell, member: int, last: bool, forward: Callable) -> Callable:
    def traced(*args: Any, **kwargs: Any) -> Any:
        if cell.template is None:
            return forward(*args, **kwargs)
        if member == 0:
            keys = [leaf.base for leaf in cell.template.leaves]
            cell.bases = [None if key is None else _argument(key, args, kwargs) for key in keys]
        if cell.reuse:
            if not last:
                return cell.passthrough[member].output()
            assert cell.weights is not None
            tensors = [
                ops.forecast(base, [feature[i] for feature in cell.slots], cell.weights, cell.correction)
                for i, base in enumerate(cell.bases)
            ]
            return cell.template.join(tensors)
        output = forward(*args, **kwargs)
        if last:
            outputs = cell.template.split(output) or []
            cell.feature = [
                out.clone() if base is None else out - base for out, base in zip(outputs, cell.bases, strict=True)
            ]
        return output

    return traced


def _argument(key: int | str, args: tuple, kwargs: Mapping[str, Any]) -> Tensor:
    if isinstance(key, int):
        return args[key]
    if key in kwargs:
        return kwargs[key]
    first, *path = key.split(".")
    value: Any = args[int(first)] if first.isdigit() else kwargs[first]
    for part in path:
        value = value[part] if isinstance(value, Mapping) else value[int(part)]
    return value
