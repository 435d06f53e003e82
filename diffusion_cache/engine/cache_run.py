"""CacheRun: one generation. The one loop of the engine: decide, compute or forecast, observe."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..context import PassState, Query, Step, Verdict
from ..errors import DiffusionCacheError, DiffusionCacheWarning
from ..history import History
from ..models import Span
from ..schedule import Schedule
from .clock import StepClock
from .structure import Inputs, PassThrough, Template, image_stream, signature, tensor_inputs

if TYPE_CHECKING:
    from .session import Session

PassKey = tuple[str, str]
MAX_ROW_GROUPS = 4
SIGNALS = frozenset({"probe_residual"})


class StepRecord(NamedTuple):
    """What happened in one denoiser call. computed: whether any span was; spans_reused of `spans` were not."""

    step: int
    pass_name: str
    denoiser: str
    computed: bool
    reason: str
    spans: int
    spans_reused: int


@dataclass
class SpanState:
    """One span in one pass: its history, and the structure of its output and of its members' outputs."""

    history: History
    template: Template | None = None
    signature: tuple = ()
    passthrough: dict[int, PassThrough] = field(default_factory=dict)
    unusable: str = ""
    unchecked: int = 0  # newest features that are not known to be finite


class Frame:
    """One denoiser call: its step, its decision and what its spans are doing."""

    __slots__ = (
        "actions", "current", "entries", "finished", "forecasts", "key", "open", "probe_input", "reason", "reentered",
        "signals", "step", "stores",
    )  # fmt: skip

    def __init__(self, step: Step, key: PassKey, stores: bool):
        self.step = step
        self.key = key
        self.stores = stores
        self.actions: tuple[bool, ...] | None = None
        self.reason = ""
        self.signals: dict[str, Tensor] = {}
        self.probe_input: Tensor | None = None
        self.entries: dict[Span, tuple[Inputs, tuple, SpanState]] = {}  # what is computed and stored, as it was entered
        self.forecasts: dict[Span, Any] = {}
        self.finished: set[Span] = set()
        self.reentered: set[Span] = set()
        self.open: Span | None = None


class CacheRun:
    """The state of one generation; made at its start and dropped at its end, so nothing can leak into the next."""

    def __init__(
        self,
        session: "Session",
        clock: StepClock,
        noise_levels: Callable[[Any], list[float]],
        any_scheduler: bool = False,
    ):
        self.session = session
        self.any_scheduler = any_scheduler  # steps of every scheduler count, not of the pipeline's alone
        self.method = session.method
        self.layouts = dict(session.layouts)
        self.clock = clock
        self.records: list[StepRecord] = []
        self._peak_bytes = 0
        self.pass_name: str | None = None  # set by diffusers' cache_context where the pipeline enters it
        self.progress_total: int | None = None  # what the pipeline's progress bar counts to
        self.frame: Frame | None = None
        self._noise_levels = noise_levels
        self._levels: list[float] = []
        self._groups: int | None = None
        self._schedules: dict[int, Schedule | None] = {}
        self._passes: dict[PassKey, PassState] = {}
        self._spans: dict[tuple[PassKey, Span], SpanState] = {}
        self._warned: set[str] = set()
        self._denoisers: set[str] = set()  # seen in this run
        self._unreached: set[str] = set()  # denoisers of which no span was ever entered
        self.sizes: dict[str, int] = {}  # of one feature of each span, known at the end

    # the denoiser

    def denoiser_call(
        self, name: str, spans: tuple[Span, ...], inner: Callable, args: tuple, kwargs: dict[str, Any]
    ) -> Any:
        """Run the denoiser called `name`, its spans computed or reused."""
        outer = self.frame
        if outer is not None:
            return inner(*args, **kwargs)  # a denoiser that calls itself
        try:
            self.frame = frame = self._open_frame(name, args, kwargs)
        except DiffusionCacheError:
            raise
        except Exception as error:
            self._warn_failure("tracking the step", error)
            return inner(*args, **kwargs)
        try:
            if spans[0].kind == "denoiser":
                output = self.member_call(spans[0], 0, inner, args, kwargs)
            else:
                output = inner(*args, **kwargs)
            missed = [span for span in frame.forecasts if span not in frame.finished]
            if missed:
                for span in missed:
                    self._give_up(frame, span, "is not called in the same way at every step")
                frame = self.frame = self._computing_again(frame)
                output = inner(*args, **kwargs)
        finally:
            self.frame = None
        self._close_frame(frame, name, spans)
        return output

    def _open_frame(self, name: str, args: tuple, kwargs: dict[str, Any]) -> Frame:
        clock = self.clock
        clock.denoiser_called(args, kwargs)
        if name not in self._denoisers:
            self._denoisers.add(name)
            self._unreached.add(name)
        if clock.evaluation == 0:
            self._levels = self._noise_levels(clock.first_timestep)
            self._groups = row_groups(tensor_inputs(args, kwargs))
        pass_name = self.pass_name or str(clock.position)
        step = Step(
            index=clock.index,
            total=clock.total,
            evaluation=clock.evaluation,
            noise_level=self._levels[clock.index] if clock.index < len(self._levels) else None,
            pass_name=pass_name,
            rows=self._rows(args, kwargs),
        )
        schedule = self._schedule(clock.total)
        stores = schedule is None or schedule.stores(step.index, clock.position, self.method.forecaster.history)
        frame = Frame(step, (name, pass_name), stores)
        if schedule is not None:
            frame.actions = schedule.row(step.index, clock.position)
            frame.reason = "schedule"
            spans = len(self.layouts[name].spans)
            if len(frame.actions) not in (1, spans):
                self._warn(f"the policy's schedule is for {len(frame.actions)} spans, but there are {spans}: computing")
                frame.actions = (True,)
        elif self.method.guarded.planned:
            self._decide(frame)
        return frame

    def _computing_again(self, failed: Frame) -> Frame:
        """Roll back: the call again from its root, all computed. Impure chains do not allow replaying single blocks."""
        frame = Frame(failed.step, failed.key, stores=False)
        frame.actions, frame.reason = (True,), "computed again"
        return frame

    def _close_frame(self, frame: Frame, name: str, spans: tuple[Span, ...]) -> None:
        reused = len(frame.forecasts)
        computed = reused < len(spans)
        state = self._pass(frame.key)
        state.update(frame.step.index, computed)
        if computed and frame.signals:
            state.kept = frame.signals
        self.records.append(
            StepRecord(frame.step.index, frame.step.pass_name, name, computed, frame.reason, len(spans), reused)
        )

    def _rows(self, args: tuple, kwargs: dict[str, Any]) -> tuple[slice, ...]:
        groups = self._groups or 1
        if groups == 1:
            return (slice(None),)
        batch = len(image_stream(tensor_inputs(args, kwargs)))
        if batch % groups:
            return (slice(None),)
        size = batch // groups
        return tuple(slice(start, start + size) for start in range(0, batch, size))

    def _schedule(self, total: int | None) -> Schedule | None:
        if total is None:
            return None
        if total not in self._schedules:
            try:
                self._schedules[total] = self.method.guarded.schedule(total)
            except DiffusionCacheError:
                raise
            except Exception as error:
                self._schedules[total] = Schedule.uniform([True])
                self._warn_failure("the policy", error)
        return self._schedules[total]

    def _pass(self, key: PassKey) -> PassState:
        return self._passes.setdefault(key, PassState())

    def _decide(self, frame: Frame) -> None:
        try:
            verdict = self.method.guarded.decide(frame.step, frame.signals, self._pass(frame.key))
        except DiffusionCacheError:
            raise
        except Exception as error:
            verdict = Verdict(True, "failure")
            self._warn_failure("the policy", error)
        frame.actions, frame.reason = (verdict.compute,), verdict.reason

    # the spans

    def probe_call(self, inner: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The first probe block: note what goes in."""
        if self.frame is not None:
            inputs = tensor_inputs(args, kwargs)
            self.frame.probe_input = image_stream(inputs) if inputs else None
        return inner(*args, **kwargs)

    def member_call(self, span: Span, member: int, inner: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """One member of a span: enter it, pass through it or leave it."""
        frame = self.frame
        if frame is None:
            return inner(*args, **kwargs)
        if member == 0:
            self._enter(frame, span, args, kwargs)
        last = member == len(span.members) - 1
        if span in frame.forecasts:
            if last:
                if span not in frame.reentered:
                    frame.finished.add(span)
                return frame.forecasts[span]
            return self._spans[frame.key, span].passthrough[member].output(args, kwargs)
        output = inner(*args, **kwargs)
        entry = frame.entries.get(span)
        if entry is not None and (last or member not in entry[2].passthrough):
            try:
                if last:
                    frame.open = None
                    self._observe(frame, span, output)
                else:
                    self._note_structure(entry[2], span, member, output, args, kwargs)
            except Exception as error:
                self._forget(self._spans[frame.key, span])
                self._warn_failure("storing a feature", error)
        return output

    def _enter(self, frame: Frame, span: Span, args: tuple, kwargs: dict[str, Any]) -> None:
        self._unreached.discard(frame.key[0])
        inputs = tensor_inputs(args, kwargs)
        state = self._span_state(frame.key, span)
        if span in frame.forecasts:
            frame.finished.discard(span)  # entered twice: the call is rolled back at its end
            frame.reentered.add(span)
            return
        if span in frame.entries:
            self._give_up(frame, span, "runs several times in one call")
            return
        if frame.open is not None:
            self._give_up(frame, span, f"runs between the blocks of {frame.open.name}")
            self._give_up(frame, frame.open, f"is interrupted by {span.name}")
            frame.open = None
            return
        if frame.actions is None:
            self._measure(frame, inputs)
            self._decide(frame)
        assert frame.actions is not None
        index = self.session.span_index[span] if len(frame.actions) > 1 else 0
        reuse = not frame.actions[index]
        if reuse:
            forecast = self._forecast(frame, span, state, inputs)
            if forecast is not None:
                frame.forecasts[span] = forecast
                return
        # computed for want of a history, a feature is one: the second of two denoisers starts in the middle of a plan
        if (frame.stores or reuse) and not state.unusable:
            frame.entries[span] = inputs, signature(inputs), state
            frame.open = span

    def _measure(self, frame: Frame, inputs: Inputs) -> None:
        """The probe's residual, or its output where the shape changes within (UNet cuts)."""
        out = image_stream(inputs).detach()
        before = frame.probe_input
        if before is not None and before.shape == out.shape:
            frame.signals["probe_residual"] = out - before.detach()
        else:
            frame.signals["probe_residual"] = out.clone()

    def _span_state(self, key: PassKey, span: Span) -> SpanState:
        if (key, span) not in self._spans:
            self._spans[key, span] = SpanState(History(self.method.forecaster.history))
        return self._spans[key, span]

    def _forecast(self, frame: Frame, span: Span, state: SpanState, inputs: Inputs) -> Any:
        """The span's output forecast from its history, or None where it must be computed."""
        if state.unusable:
            frame.reason = f"{span.name} {state.unusable}"
            return None
        if not state.history or state.template is None:
            frame.reason = "no history"
            return None
        if state.signature != signature(inputs):
            frame.reason = "other shapes"
            self._forget(state)
            return None
        # reading back is free on the CPU; elsewhere it would stall, so those runs check once, at their end
        if state.unchecked and state.history.on_host and not state.history.is_finite(state.unchecked):
            self._not_finite(span, state)
            frame.reason = "not finite"
            return None
        state.unchecked = 0
        try:
            weights = self.method.forecaster.weights(Query(state.history.nodes, frame.step.index))
            tensors = []
            for i, leaf in enumerate(state.template.leaves):
                base = None if leaf.base is None else inputs[leaf.base]
                tensors.append(ops.forecast(base, state.history.leaf(i), weights))
            return state.template.join(tensors)
        except Exception as error:
            self._warn_failure("forecasting", error)
            self._forget(state)
            frame.reason = "failure"
            return None

    def _note_structure(
        self, state: SpanState, span: Span, member: int, output: Any, args: tuple, kwargs: dict[str, Any]
    ) -> None:
        inputs = tensor_inputs(args, kwargs) if span.stores_residual else {}
        state.passthrough[member] = PassThrough.of(output, inputs)

    def _observe(self, frame: Frame, span: Span, output: Any) -> None:
        inputs, entered, state = frame.entries[span]
        feature = self.method.forecaster.feature
        residual = span.stores_residual if feature == "auto" else feature == "residual"
        tensors = state.template.split(output) if state.template and state.signature == entered else None
        if tensors is None or state.template is None:
            self._forget(state, structure=False)
            state.template, state.signature = Template.of(output, inputs, residual), entered
            tensors = state.template.split(output)
            assert tensors is not None
        bases = [None if leaf.base is None else inputs[leaf.base] for leaf in state.template.leaves]
        state.history.observe(frame.step.index, tensors, bases)
        state.unchecked += 1

    def _not_finite(self, span: Span, state: SpanState) -> None:
        self._forget(state)
        self._warn(f"{span.name} produced values that are not finite; they are not reused")

    def _give_up(self, frame: Frame, span: Span, why: str) -> None:
        """This span cannot be cached as it is: compute it from here on."""
        state = self._span_state(frame.key, span)
        self._forget(state)
        state.unusable = why
        frame.entries.pop(span, None)
        self._warn(f"{span.name} {why}, so it cannot be cached as one and is computed; try scope 'block' or 'denoiser'")

    def _forget(self, state: SpanState, structure: bool = True) -> None:
        self._count_bytes()
        state.history.clear()
        state.template = None
        if structure:
            state.passthrough.clear()

    # the end

    @property
    def cache_bytes(self) -> int:
        """The most bytes that features have taken in this run."""
        self._count_bytes()
        return self._peak_bytes

    def _count_bytes(self) -> None:
        self._peak_bytes = max(self._peak_bytes, sum(state.history.nbytes for state in self._spans.values()))

    def feature_bytes(self) -> dict[str, int]:
        """Bytes of one stored feature of each span, summed over passes."""
        sizes: dict[str, int] = {}
        for (_, span), state in self._spans.items():
            if state.history:
                sizes[span.name] = sizes.get(span.name, 0) + state.history.nbytes // len(state.history)
        return sizes

    def finish(self) -> None:
        """Release every feature, then tell what could not be checked on the way."""
        self._count_bytes()
        self.sizes = self.feature_bytes()
        newest = [(span, state.history) for (_, span), state in self._spans.items() if state.history]
        unchecked = [span for span, history in newest if not history.on_host and not history.is_finite()]
        self._spans.clear()
        self._passes.clear()
        # what is kept for summary must not keep the pipeline alive
        self.clock.close()
        self._noise_levels = lambda timestep: []
        for span in unchecked:
            self._warn(f"{span.name} produced values that are not finite; the images of this run may show it")
        for name in self._unreached:
            self._warn(
                f"nothing was cached in {name}: it ran without calling the modules of its spans. If it is compiled as "
                "a whole, use scope 'denoiser', or compile its blocks (compile_repeated_blocks)"
            )

    def _warn_failure(self, what: str, error: Exception) -> None:
        self._warn(f"{what} failed, so steps are computed instead: {type(error).__name__}: {error}")

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, DiffusionCacheWarning, stacklevel=2)


def row_groups(inputs: Inputs) -> int:
    """How many guidance branches are stacked in a batch: the parts of the sample that are equal. Read once a run."""
    if not inputs:
        return 1
    sample = image_stream(inputs)
    batch = len(sample) if sample.ndim else 1
    for groups in range(MAX_ROW_GROUPS, 1, -1):
        if batch % groups == 0:
            parts = sample.chunk(groups)
            if all(torch.equal(parts[0], part) for part in parts[1:]):
                return groups
    return 1
