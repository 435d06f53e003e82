"""Running spans: entered at their first member, passed through, and left at their last."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import ops
from ..chunks import ChunkHistory, Chunks
from ..differences import DIFFERENCES, DifferenceHistory
from ..errors import DiffusionCacheError
from ..history import History, finite, is_finite, row_index
from ..models import Called, Span
from ..offload import Offload
from .forecasting import Forecasts, as_tensor
from .frame import Frame, PassKey, Recorded, SpanState, Visit, mark_of, written_since
from .group_offload import Groups
from .signals import take
from .structure import (
    Inputs,
    PassThrough,
    Template,
    copied,
    flatten,
    forked_rng,
    row_output,
    sample_of,
    select_rows,
    signature,
    tensor_inputs,
    unshared,
)

if TYPE_CHECKING:
    from .cache_run import CacheRun

# rows computed alone may differ from the same rows in a batch by as much, relative, by the order of summation
ROW_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}
LOW_PRECISION_ROW_TOLERANCE = 2e-2
FIRST_PASS = "first pass."


class SpanCalls:
    """The spans of one run: what they have stored, and how each call of their members is answered."""

    def __init__(self, run: "CacheRun"):
        self._run = run
        self._method = run.method
        # a step's later passes are forecast as differences from its first one, which change far less
        self._relates_passes = self._method.guarded.guards.unconditional_every > 1
        self.forecasts = Forecasts(run)
        self.groups = Groups()
        self._states: dict[tuple[PassKey, Span, int], SpanState] = {}
        self._order: dict[PassKey, list[tuple[Span, SpanState]]] = {}  # as the spans of a pass were first entered
        self._offload = Offload() if self._method.cache_device == "cpu" else None
        self._peak_bytes = self._peak_first_bytes = 0
        # of features that are let go of before the run is over
        self._concluded_sizes: Counter[tuple[str, str]] = Counter()
        self._concluded_checks: list[tuple[Span, Tensor]] = []  # spans, and whether what they held was finite
        self._first: dict[
            tuple[str, Span, int], tuple[int, list[Tensor]]
        ] = {}  # the step, and what its first pass gave

    @property
    def _first_bytes(self) -> int:
        return sum(tensor.nbytes for _, given in self._first.values() for tensor in given)

    def call(self, frame: Frame, span: Span, member: int, inner: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The output of one member of a span, computed or not."""
        visit = self._enter(frame, span, inner, args, kwargs) if member == 0 else frame.visits.get(span)
        called = None if frame.trace is None else self._called(frame, span, member, args, kwargs)
        if visit is None or visit.finished:
            output = inner(*args, **kwargs)
        elif visit.forecast is not None:
            output = self._forecast_member(frame, visit, member, inner, args, kwargs)
        else:
            output = self._compute_member(frame, visit, member, inner, args, kwargs)
        if called is not None:
            assert frame.trace is not None
            made = [leaf for leaf in flatten(output)[0] if isinstance(leaf, Tensor)]
            frame.outputs[span] = [(tensor, mark_of(tensor)) for tensor in made]
            frame.trace.append(called._replace(shapes=tuple(tensor.shape for tensor in made)))
        return output

    def _called(self, frame: Frame, span: Span, member: int, args: tuple, kwargs: dict[str, Any]) -> Called:
        """A member that is about to run, and whether it takes what the span's last member gave."""
        given = {id(tensor) for tensor in tensor_inputs(args, kwargs).values()}
        made = frame.outputs.get(span, [])
        taken = [id(tensor) in given for tensor, _ in made]
        as_given = not any(written_since(tensor, mark) for tensor, mark in made)
        return Called(span, member, any(taken), all(taken) and as_given)

    def _forecast_member(
        self, frame: Frame, visit: Visit, member: int, inner: Callable, args: tuple, kwargs: dict[str, Any]
    ) -> Any:
        """The output of a member of a span that is forecast, in whole or in part."""
        if visit.rows is not None:
            return self._compute_rows(frame, visit, member, inner, args, kwargs)
        assert visit.forecast is not None
        grouped = self.groups.contain(visit.span)
        if member == len(visit.span.members) - 1:
            if grouped:
                self.groups.skip(visit.span.members[member])
            visit.finished, visit.idle = True, None
            assert visit.state.template is not None
            self._note_first_pass(frame, visit, visit.uncorrected or visit.forecast)
            output = visit.state.template.join(visit.forecast)
            self._let_go(visit)
            return output
        known = visit.state.passthrough.get(member)
        if known is None:
            return inner(*args, **kwargs)
        if grouped:
            self.groups.skip(visit.span.members[member])
        output = known.output(frame.poisoned)
        if not (grouped or frame.poisoned) and visit.state.knows_members(visit.span):
            learned = visit.state.passthrough.values()
            visit.idle = output if known.shareable and all([one is known for one in learned]) else None
        return output

    def _compute_member(
        self, frame: Frame, visit: Visit, member: int, inner: Callable, args: tuple, kwargs: dict[str, Any]
    ) -> Any:
        """The output of a member of a span that is computed, which is looked at where it serves a later forecast."""
        if visit.independent:  # the call is made again for one row
            output = inner(*unshared(args), **unshared(kwargs))
        else:
            output = inner(*args, **kwargs)
        tensors = None
        try:
            if visit.independent:
                visit.independent = self._rows_are_independent(frame, inner, args, kwargs, output)
            if member == len(visit.span.members) - 1:
                tensors = self._leave(frame, visit, output)
            elif member not in visit.state.passthrough:
                learned, others = PassThrough.of(output), visit.state.passthrough.values()
                visit.state.passthrough[member] = next((one for one in others if one.serves(learned)), learned)
        except Exception as error:
            if frame.recording is not None:
                raise
            self.forget(visit.state)
            self._run.warn_failure("storing a feature", error)
        observer = self._run.observer
        if observer is not None and tensors is not None:
            assert visit.state.template is not None
            observer.span_computed(frame, visit.span, visit.inputs, visit.state.template.leaves, tensors)
        if visit.finished:
            self._let_go(visit)
        return output

    def _enter(self, frame: Frame, span: Span, inner: Callable, args: tuple, kwargs: dict[str, Any]) -> Visit | None:
        """Decide what happens to a span now. None: it is computed and not stored."""
        count = frame.counts.get(span, 0)
        frame.counts[span] = count + 1
        before = frame.visits.pop(span, None)
        state = self.state(frame.key, span, count)
        if before is not None and not before.finished:
            if before.forecast is None:
                frame.open = None
                joined = self._run.layouts[frame.key[0]].apart is not None
                if frame.trace is None or not joined:  # else it is taken apart at the end of the call
                    self.give_up(before.state, span, "is entered again before it ends")
            return None
        if frame.open is not None:
            self._interrupted(frame, state, span)
            return None
        session = self._run.session
        watched = (self._run.observer is not None or self._relates_passes) and not frame.fills_cache
        stores = frame.actions is None or self.stores(frame, span)  # what is decided on now may be reused later
        if not (stores or watched):
            frame.computed += 1
            if self._offload is not None:
                self._prefetch(frame.key, state.place + 1, frame.actions)
            return None
        given = inputs = tensor_inputs(args, kwargs)
        if self._relates_passes:
            given |= self._first_pass(frame, span)
        entered = signature(given)
        if entered == state.signature:
            entered = state.signature  # from here on it is known by its identity
        unknown = state.template is None and (span, count + 1, entered) not in session.templates
        if span in session.written or (unknown and self._adds(span)):  # for all that is known, it writes into them
            inputs = copied(given)
        if frame.actions is None:
            try:
                take(self._run, frame, span, args, kwargs, inputs)
            except DiffusionCacheError:
                raise
            except Exception as error:
                self._run.warn_failure("taking signals", error)  # a policy computes where it has none to go by
            self._run.decisions.after_probe(frame, self._apart(frame, span, inputs))
        assert frame.actions is not None
        visit = Visit(span, state, inputs, entered, stores, given)
        forecast = not self._entry(frame.actions, span) and self._forecast(frame, visit)
        if self._offload is not None:
            self._prefetch(frame.key, state.place + 1, frame.actions)
        if forecast:
            frame.reused.append(visit)
            frame.computed += visit.rows is not None
            frame.visits[span] = visit
            return visit
        frame.computed += 1
        if state.unusable:
            return None
        if state.template is not None and state.signature is not entered:
            self._reshape(state)
        if frame.batch > 1 and self._tries_rows(span, visit.entered):
            visit.independent = True
        if len(span.members) > 1:
            frame.open = visit
            visit.quiet = state.knows_members(span) and visit.independent is None and frame.trace is None
        frame.visits[span] = visit
        return visit

    def _computes(self, frame: Frame, span: Span) -> bool:
        """What the frame's actions say of a span."""
        assert frame.actions is not None
        return self._entry(frame.actions, span)

    def stores(self, frame: Frame, span: Span) -> bool:
        """Whether a span's feature is stored, if it is computed."""
        # computed for want of a history, a feature is one: the second of two denoisers starts in the middle of a plan
        return self._entry(frame.stores, span) or not self._computes(frame, span)

    def _entry(self, entries: tuple[bool, ...], span: Span) -> bool:
        return entries[self._run.session.span_index[span] if len(entries) > 1 else 0]

    def _interrupted(self, frame: Frame, state: SpanState, span: Span) -> None:
        assert frame.open is not None
        if frame.trace is None:  # else the layout is mended at the end of the call
            self.give_up(state, span, f"runs between the blocks of {frame.open.span.name}")
            self.give_up(frame.open.state, frame.open.span, f"is interrupted by {span.name}")
        frame.visits.pop(frame.open.span, None)
        frame.open = None

    def state(self, key: PassKey, span: Span, count: int) -> SpanState:
        state = self._states.get((key, span, count))
        if state is None:
            state = self._states[key, span, count] = SpanState(self._history())
            order = self._order.setdefault(key, [])
            state.place = len(order)
            order.append((span, state))
            if span in self._run.session.unusable:
                self.give_up(state, span, self._run.session.unusable[span])
        return state

    def _history(self) -> History:
        stream, kept, dtype = self._method.stream, self._run.history, self._method.cache_dtype
        if stream is not None:
            return ChunkHistory(kept, stream, dtype)
        code = DIFFERENCES.get(dtype)
        return History(kept, dtype) if code is None else DifferenceHistory(kept, code)

    def _note_first_pass(self, frame: Frame, visit: Visit, tensors: Sequence[Tensor]) -> None:
        if self._relates_passes and frame.position == 0:
            given = [tensor.detach().clone() for tensor in tensors]
            self._first[frame.key[0], visit.span, frame.counts[visit.span]] = frame.step.index, given

    def _first_pass(self, frame: Frame, span: Span) -> Inputs:
        """What this step's first pass gave of the span, as inputs of a later pass."""
        if not self._relates_passes or frame.position == 0:
            return {}
        step, given = self._first.get((frame.key[0], span, frame.counts[span]), (-1, []))
        return {f"{FIRST_PASS}{i}": tensor for i, tensor in enumerate(given)} if step == frame.step.index else {}

    def _note_output(self, frame: Frame, visit: Visit, tensors: list[Tensor]) -> None:
        """What the last span gave is a signal too, for a policy that looks at it: its stream of the sample."""
        if frame.signals is None or "output" not in self._run.decisions.guarded.needs.signals:
            return
        if isinstance(sample_of(*frame.called), (list, tuple)) and len({tensor.shape for tensor in tensors}) == 1:
            given = torch.stack(tensors) if visit.span.kind == "denoiser" else tensors[0]
        else:
            given = row_output(tensors, visit.inputs, visit.span.members[0])
        frame.signals["output"] = given.detach().clone()

    def _is_residual(self, span: Span) -> bool:
        """Whether what is stored of a span is its residual."""
        feature = self._run.forecaster.feature
        return span.stores_residual if feature == "auto" else feature == "residual"

    def _adds(self, span: Span) -> bool:
        """Whether what a span is given is looked at when it is left."""
        return self._is_residual(span) or self._run.forecaster.keeps_inputs

    # reusing

    def _forecast(self, frame: Frame, visit: Visit) -> bool:
        """Forecast the span's output from its history. False where it must be computed."""
        span, state = visit.span, visit.state
        if state.unusable:
            frame.reason = f"{span.name} {state.unusable}"
            return False
        if not state.history or state.template is None:
            frame.reason = "no history"
            return False
        if state.signature is not visit.entered:
            frame.reason = "other shapes"
            self._reshape(state)
            return False
        if frame.rows is not None and not (
            self._run.session.independent.get((span, visit.entered)) and state.knows_members(span)
        ):
            return False  # its rows cannot be told apart, or not yet: computed for all samples
        if not self._is_checked(span, state):
            frame.reason = "not finite"
            return False
        try:
            history = self.held(state.history, frame.chunks)
            if history is None:
                frame.reason = "new chunks"
                return False
            weights: Sequence[float] | Tensor
            if frame.recording is not None:
                fixed = frame.recording.given[span, frame.counts[span] - 1]
                weights, correction, slots = fixed.weights, fixed.correction, list(range(history.capacity))
                frame.recording.reused.append(self._recorded(frame, visit))
            else:
                weights, slots = self.forecasts.weights(frame, span, history)
                correction = self.forecasts.correction(frame, span, history)
            leaves = state.template.leaves
            forecast: list[Tensor] = []
            related = correction is not None and self._relates_passes and frame.position == 0
            for i, leaf in enumerate(leaves):
                base = None if leaf.base is None else visit.inputs[leaf.base]
                inputs = None if leaf.kept is None else len(leaves) + i  # stored behind the features, one for each
                features = self.forecasts.features(frame, span, history, i, slots, inputs)
                if related:  # what is added to it later is corrected then
                    bare = _forecast(frame.chunks, base, features, weights, None)
                    visit.uncorrected = [*visit.uncorrected, bare]
                if base is None and self._defers(frame, span, features):
                    forecast.append(frame.defer(features, weights, correction))
                else:
                    forecast.append(_forecast(frame.chunks, base, features, weights, correction))
            visit.forecast = forecast
            visit.rows = frame.rows
            return True
        except Exception as error:
            if frame.recording is not None:
                raise
            self._run.warn_failure("forecasting", error)
            self.forget(state)
            frame.reason = "failure"
            return False

    def held(self, history: History, chunks: Chunks | None = None) -> History | None:
        """What a history holds for a call, on its device and rows in the call's order; None: nothing of a chunk."""
        if chunks is not None:
            assert isinstance(history, ChunkHistory)
            return history.of(chunks)
        return history if self._offload is None else self._offload.held(history)

    def _defers(self, frame: Frame, span: Span, features: Sequence[Tensor | ops.Coded]) -> bool:
        """Whether a forecast is left to the block that asks for it, which may do more in the same pass over memory."""
        whole = span.kind == "branch" and frame.rows is None and frame.chunks is None
        return whole and not torch.is_grad_enabled() and ops.fuses(features)

    def slot_weights(self, frame: Frame, span: Span, state: SpanState) -> tuple[Tensor | None, Tensor | None]:
        """What a span whose every slot is taken is forecast with; weights None: it is computed.

        Weights are [slots] or [rows, slots]; a correction is [1 or rows, 2, channels], and given at each reused step
        by a forecaster that makes any.
        """
        if self._computes(frame, span):
            return None, None
        if not state.history:
            frame.reason = "no history"
            return None, None
        if not self._is_checked(span, state):
            frame.reason = "not finite"
            return None, None
        numbers = self.slot_numbers(frame, span, state)
        if numbers is None:
            return None, None
        feature = state.history.slots[0][0]
        weights, correction = numbers
        return as_tensor(weights, feature), None if correction is None else as_tensor(correction, feature)

    def slot_numbers(self, frame: Frame, span: Span, state: SpanState) -> tuple[list[Any], list[Any] | None] | None:
        """The numbers of `slot_weights` for a span that is reused; None where that fails, and it is computed."""
        try:
            return self.forecasts.slot_numbers(frame, span, state.history)
        except Exception as error:
            self._run.warn_failure("forecasting", error)
            self.forget(state)
            frame.reason = "failure"
            return None

    def _compute_rows(
        self, frame: Frame, visit: Visit, member: int, inner: Callable, args: tuple, kwargs: dict[str, Any]
    ) -> Any:
        """A member of a span that is computed for some samples and forecast for the others."""
        state, forecast, rows = visit.state, visit.forecast, visit.rows
        template = state.template
        assert template is not None
        assert forecast is not None
        assert rows is not None
        index = row_index(rows, next(iter(visit.inputs.values())))
        output = inner(*select_rows(args, frame.batch, index), **select_rows(kwargs, frame.batch, index))
        if member < len(visit.span.members) - 1:
            return state.passthrough[member].spread(output, index)
        visit.finished = True
        tensors = template.split(output)
        assert tensors is not None
        bases = [
            None if leaf.base is None else select_rows(visit.inputs[leaf.base], frame.batch, index)
            for leaf in template.leaves
        ]
        if torch.is_grad_enabled():
            whole = [f.index_copy(0, index, tensor) for f, tensor in zip(forecast, tensors, strict=True)]
        else:
            whole = [f.index_copy_(0, index, tensor) for f, tensor in zip(forecast, tensors, strict=True)]
        self._note_output(frame, visit, whole)
        uncorrected = [f.index_copy(0, index, tensor) for f, tensor in zip(visit.uncorrected, tensors, strict=False)]
        self._note_first_pass(frame, visit, uncorrected or whole)
        try:
            kept = select_rows(_kept(template, visit.inputs), frame.batch, index)
            self._observe(frame, visit, [*tensors, *kept], [*bases, *[None] * len(kept)], rows)
            state.unchecked = True
        except Exception as error:
            self.forget(state)
            self._run.warn_failure("storing a feature", error)
        self._let_go(visit)
        return template.join(whole)

    def _let_go(self, visit: Visit) -> None:
        if self._run.observer is None:  # which may look at what was forecast when the call is over
            visit.let_go()

    # computing

    def _leave(self, frame: Frame, visit: Visit, output: Any) -> list[Tensor] | None:
        """Store what a computed span gave, where it is wanted. Its tensors; None where it cannot be cached."""
        visit.finished = True
        frame.open = None
        span, state = visit.span, visit.state
        if visit.independent is not None:
            self._run.session.independent[span, visit.entered] = self._agreed(visit)
        if state.template is None or state.signature is not visit.entered:
            self._reshape(state, members=False)
            # kept over runs: to tell which input an output continues may take reading them back
            known = self._run.session.templates.get((span, frame.counts[span], visit.entered))
            state.template, state.signature = known, visit.entered
        tensors = state.template.split(output) if state.template else None
        if tensors is None:
            self._reshape(state, members=False)
            residual, keeps = self._is_residual(span), self._run.forecaster.keeps_inputs
            if self._adds(span) and visit.wrote():
                self._run.session.written.add(span)
                if not visit.copied:
                    return None  # where it began is not known any more
            related = {key: tensor for key, tensor in visit.inputs.items() if str(key).startswith(FIRST_PASS)}
            state.template = Template.of(output, related or visit.inputs, residual or bool(related), keeps)
            self._run.session.templates[span, frame.counts[span], visit.entered] = state.template
            tensors = state.template.split(output)
        if not tensors or state.template is None:
            self.give_up(state, span, "returns no tensors")
            return None
        if frame.signals is not None:
            self._note_output(frame, visit, tensors)
        if self._relates_passes:
            self._note_first_pass(frame, visit, tensors)
        kept = _kept(state.template, visit.inputs) if self._run.forecaster.keeps_inputs else []
        stored = [*tensors, *kept]
        if visit.stores and self._fits(state, stored):
            bases = [None if leaf.base is None else visit.inputs[leaf.base] for leaf in state.template.leaves]
            bases += [None] * len(kept)
            if frame.recording is not None:
                frame.recording.stored.append(self._recorded(frame, visit, *state.history.encoded(stored, bases)))
                return tensors
            if frame.chunks is None:
                self._observe(frame, visit, stored, bases)
            elif len(tensors) == 1 and frame.chunks.divides(tensors[0]):
                assert isinstance(state.history, ChunkHistory)
                state.history.observe_chunks(frame.chunks, tensors[0], bases[0])
            else:
                self.give_up(state, span, f"does not return the {frame.chunks.count} chunks of a call side by side")
                return None
            state.unchecked = True
        return tensors

    def _observe(
        self,
        frame: Frame,
        visit: Visit,
        outputs: Sequence[Tensor],
        bases: Sequence[Tensor | None],
        rows: Sequence[int] | None = None,
    ) -> None:
        history, graphs = visit.state.history, self._run.graphs(frame.key[0])
        if graphs is not None:
            place = frame.key, visit.span, frame.counts[visit.span] - 1
            graphs.file(place, frame.step.index, history, *history.encoded(outputs, bases))
        elif self._offload is None:
            history.observe(frame.step.index, outputs, bases, rows, frame.batch)
        else:
            self._offload.observe(history, frame.step.index, outputs, bases, rows, frame.batch)

    # calls that graphs repeat

    def _recorded(
        self, frame: Frame, visit: Visit, parts: list[Tensor] | None = None, coded: list[Any] | None = None
    ) -> Recorded:
        state, count = visit.state, frame.counts[visit.span] - 1
        assert state.template is not None
        return Recorded(
            visit.span, count, visit.entered, state.template, dict(state.passthrough), parts or [], coded or []
        )

    def reusable(self, frame: Frame) -> list[tuple[Span, int, SpanState]]:
        """What of the spans of this call, by the times that each runs in it, can be reused and is to be."""
        assert frame.actions is not None
        if all(frame.actions):
            return []
        found = [
            (span, count, state)
            for (key, span, count), state in self._states.items()
            if key == frame.key and not self._computes(frame, span)
            if state.history and state.template is not None and not state.unusable and self._is_checked(span, state)
        ]
        return sorted(found, key=lambda one: (self._run.session.span_index[one[0]], one[1]))

    def file(self, frame: Frame, recorded: Recorded) -> None:
        """Store the feature that a call made, as if its span had been left just now."""
        state = self.state(frame.key, recorded.span, recorded.nth)
        if state.unusable:
            return
        if state.template is not recorded.template or state.signature != recorded.entered:
            self._reshape(state)
            state.template, state.signature = recorded.template, recorded.entered
        state.passthrough = dict(recorded.passthrough)
        graphs = self._run.graphs(frame.key[0])
        assert graphs is not None
        try:
            place = frame.key, recorded.span, recorded.nth
            graphs.file(place, frame.step.index, state.history, recorded.parts, recorded.coded)
            state.unchecked = True
        except Exception as error:
            self.forget(state)
            self._run.warn_failure("storing a feature", error)

    # bringing back what waits on the host

    def prefetch_first(self, frame: Frame) -> None:
        """At the start of a call: what its first span will be forecast from, if it is or may be."""
        self._prefetch(frame.key, 0, frame.actions)

    def prefetch_next(self, frame: Frame) -> None:
        """At the end of a call: the same of the call that follows, where the policy knows it already."""
        if self._offload is None:
            return
        keys = [key for key in self._order if key[0] == frame.key[0]]
        place = keys.index(frame.key) + 1 if frame.key in keys else 0
        wraps = place >= len(keys)
        schedule = self._run.decisions.schedule(frame.step.total)
        step = frame.step.index + wraps
        if schedule is not None and keys and step < len(schedule.compute):
            self._prefetch(keys[0 if wraps else place], 0, schedule.row(step, 0 if wraps else frame.position + 1))

    def _prefetch(self, key: PassKey, place: int, actions: tuple[bool, ...] | None) -> None:
        """The features of the span that is entered at that place of a pass, unless it is going to be computed."""
        if self._offload is None or place >= len(order := self._order.get(key, [])):
            return
        span, state = order[place]
        index = self._run.session.span_index.get(span, 0)
        if actions is None or not actions[index if len(actions) > 1 else 0]:
            try:
                self._offload.fetch(state.history)
            except Exception as error:
                self._run.warn_failure("bringing back features", error)
                self.forget(state)

    def _fits(self, state: SpanState, outputs: Sequence[Tensor]) -> bool:
        """Whether a full history of such features is within `max_cache_bytes` with the others; told once if not."""
        limit = self._method.max_cache_bytes
        if limit is None or state.history:
            return True
        histories = [other.history for other in self._states.values() if other.history]
        taken = self._first_bytes + sum(history.full_bytes for history in histories)
        if taken + state.history.bytes_of(outputs) <= limit:
            return True
        state.unusable = "does not fit into max_cache_bytes"
        self._run.warn(
            f"max_cache_bytes={limit} does not hold the features of all spans: those that do not fit are computed"
        )
        return False

    # samples apart

    def _tries_rows(self, span: Span, entered: tuple) -> bool:
        """Whether to find out now if this span's batch rows, of which there are several, can be computed apart.

        At the first step already, where samples that begin at one noise look like guidance branches of one.
        """
        return (
            self._method.granularity == "sample"
            and not self._method.guarded.planned
            and (span, entered) not in self._run.session.independent
        )

    def _apart(self, frame: Frame, entered: Span, inputs: Inputs) -> bool:
        """Whether some samples of this call can be computed and others not: known of every span, it seems."""
        if self._method.granularity != "sample":
            return False
        independent = self._run.session.independent
        spans = self._run.layouts[frame.key[0]].spans
        return independent.get((entered, signature(inputs)), False) and all(
            known for (span, _), known in independent.items() if span in spans
        )

    def _agreed(self, visit: Visit) -> bool:
        """Whether batch rows were seen to be independent on all ranks that work on them."""
        agree = self._run.session.agree
        if agree is None:
            return bool(visit.independent)
        device = next(iter(visit.inputs.values())).device
        return bool(agree(torch.tensor([0.0 if visit.independent else math.nan], device=device)) == 0)

    def _rows_are_independent(
        self, frame: Frame, inner: Callable, args: tuple, kwargs: dict[str, Any], output: Any
    ) -> bool | None:
        """Run the last row alone and compare: the one sure way to tell which inputs are batched, and how.

        None where nothing can be learned, for the values are not finite.
        """
        try:
            whole = [leaf for leaf in flatten(output)[0] if isinstance(leaf, Tensor)]
            if not all(len(leaf) == frame.batch for leaf in whole if leaf.ndim):
                return False
            index = row_index([frame.batch - 1], whole[0])
            with forked_rng():
                alone = inner(*select_rows(args, frame.batch, index), **select_rows(kwargs, frame.batch, index))
            parts = [leaf for leaf in flatten(alone)[0] if isinstance(leaf, Tensor)]
            close = len(parts) == len(whole) and all(
                _close(part, leaf.index_select(0, index)) for part, leaf in zip(parts, whole, strict=True)
            )
            return close or (False if is_finite([leaf for leaf in whole if leaf.is_floating_point()]) else None)
        except Exception:
            return False  # an input that is not batched was taken for one

    # the rest

    def _is_checked(self, span: Span, state: SpanState) -> bool:
        """Whether a span's history may be used; forgets and tells where it holds values that are not finite.

        Reading back is free on the CPU. Elsewhere it would stall, and ranks would decide apart: those runs look once,
        at their end.
        """
        here = self._offload is None and state.history.on_host and self._run.session.agree is None
        if state.unchecked and here and not is_finite(state.history.tensors()):
            self.forget(state)
            self._run.warn(f"{span.name} produced values that are not finite; they are not reused")
            return False
        state.unchecked = False
        return True

    def give_up(self, state: SpanState, span: Span, why: str) -> None:
        """This span cannot be cached as it is: compute it from here on."""
        self.forget(state)
        state.unusable = why
        self._run.warn(
            f"{span.name} {why}, so it cannot be cached as one and is computed; try scope 'block' or 'denoiser'"
        )

    def keep_only(self, denoiser: str, spans: Sequence[Span]) -> None:
        """Let go of what is stored of a denoiser's other spans, which are arranged anew."""
        gone = [key for key in self._states if key[0][0] == denoiser and key[1] not in spans]
        self._count_bytes()
        for key in gone:
            self.forget(self._states.pop(key))
        for (name, _), order in self._order.items():
            if name == denoiser:
                order[:] = [(span, state) for span, state in order if span in spans]
                for place, (_, state) in enumerate(order):
                    state.place = place

    def forget(self, state: SpanState) -> None:
        self._reshape(state)
        state.history.clear()

    def _reshape(self, state: SpanState, members: bool = True) -> None:
        """What the span returns has another structure from now on, and what its members return as well."""
        self._count_bytes()
        if self._offload is not None:
            self._offload.drop(state.history)
        state.history.reshaped()
        state.template = None
        if members:
            state.passthrough.clear()

    @property
    def peak_bytes(self) -> int:
        """The most bytes that features have taken so far."""
        self._count_bytes()
        return self._peak_bytes

    @property
    def resident_bytes(self) -> int:
        """The most bytes that features have taken on the denoiser's device so far."""
        if self._offload is None:
            return self.peak_bytes
        self._count_bytes()
        return self._peak_first_bytes + self._offload.resident_bytes

    def _count_bytes(self) -> None:
        self._peak_first_bytes = max(self._peak_first_bytes, self._first_bytes)
        histories = sum(state.history.nbytes for state in self._states.values())
        self._peak_bytes = max(self._peak_bytes, self._first_bytes + histories)

    def feature_bytes(self) -> dict[tuple[str, str], int]:
        """Bytes of one stored feature of each denoiser's spans, on average over those of a full history, summed over
        passes.
        """
        sizes = Counter(self._concluded_sizes)
        for (key, span, _), state in self._states.items():
            if state.history:
                sizes[key[0], span.name] += state.history.mean_feature_bytes
        return dict(sizes)

    def conclude(self, frame: Frame) -> None:
        """After the last call of a pass: let go of its features, which would stand beside what decodes the latents."""
        if self._offload is not None or self._run.graphs(frame.key[0]) is not None:
            return  # they are on the host, or a graph's, which keeps them
        self._count_bytes()
        for (key, span, _), state in self._states.items():
            if key != frame.key or not state.history:
                continue
            self._concluded_sizes[key[0], span.name] += state.history.mean_feature_bytes
            if not state.history.on_host:
                self._concluded_checks.append((span, finite(state.history.tensors())))
            state.history.clear()
        self.forecasts.conclude(frame.key)

    def release(self) -> None:
        """Let go of every feature, telling of those that could not be checked on the way."""
        try:
            unchecked = self._not_finite()
        finally:
            if self._offload is not None:
                self._offload.release()
            self._states.clear()
            self._order.clear()
            self._first.clear()
            self._concluded_sizes.clear()
            self._concluded_checks.clear()
            self.forecasts.release()
        for span in unchecked:
            self._run.warn(f"{span.name} produced values that are not finite; the images of this run may show it")

    def _not_finite(self) -> list[Span]:
        """Of spans whose features were not checked on the way, those whose newest holds NaN or infinity. Reads back."""
        self._count_bytes()
        newest = [(span, state.history) for (_, span, _), state in self._states.items() if state.history]
        if self._offload is None:
            late = [(span, finite(history.tensors())) for span, history in newest if not history.on_host]
            late += self._concluded_checks
        else:
            late = [(span, self._offload.finite[history]) for span, history in newest]
        # read at once, wherever they are
        known = torch.stack([held.to(late[0][1].device) for _, held in late]).tolist() if late else []
        if self._offload is not None:
            self._offload.finish()
        return [span for (span, _), holds in zip(late, known, strict=True) if not holds]


def _forecast(
    chunks: Chunks | None,
    base: Tensor | None,
    features: Sequence[Tensor],
    weights: Sequence[float] | Tensor,
    correction: Tensor | None,
) -> Tensor:
    """`ops.forecast`, of features that are rows of chunks where there are any."""
    if chunks is None:
        return ops.forecast(base, features, weights, correction)
    return chunks.together(ops.forecast(None if base is None else chunks.apart(base), features, weights, correction))


def _kept(template: Template, inputs: Inputs) -> list[Tensor]:
    """The inputs that are stored with a feature."""
    return [inputs[leaf.kept] for leaf in template.leaves if leaf.kept is not None]


def _close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    tolerance = ROW_TOLERANCE.get(a.dtype, LOW_PRECISION_ROW_TOLERANCE)
    a, b = ops.double(a), ops.double(b)
    return bool((a - b).norm() <= tolerance * b.norm().clamp_min(1e-12))
