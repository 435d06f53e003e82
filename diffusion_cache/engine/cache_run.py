"""CacheRun: one generation. The one loop of the engine: decide, compute or forecast, observe."""

import functools
import warnings
import weakref
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..chunks import Chunks, Ladder
from ..context import NoiseLevels, Step
from ..errors import ConfigError, DiffusionCacheError, DiffusionCacheWarning
from ..models import Span, fills_cache
from ..policies import Guarded
from ..signals import Grid
from .clock import StepClock, noise_levels, timestep_of
from .decisions import Decisions
from .frame import Frame, SampleRecord, Visit
from .graphs import Graphs
from .observer import Again, Observer
from .sigmas import move_sigmas
from .span_calls import SpanCalls
from .structure import copied, forked_rng, image_stream, sample_of, tensor_inputs, unshared

if TYPE_CHECKING:
    from .session import Method, Session

MAX_ROW_GROUPS = 4

# torch.export goes by dynamo only if it is strict. is_compiling, which is all that torch 2.6 has, is true in later ones
# as well while any other thread compiles
IS_EXPORTING: Callable[[], bool] = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)


class StepRecord(NamedTuple):
    """What happened in one denoiser call.

    computed: whether any span was; spans_reused of `spans` were not, for any sample. note: what the forecaster says of
    how they were. samples: what each sample had, where an adaptive policy was asked about each. replayed: whether a
    CUDA graph made the call.
    """

    step: int
    pass_name: str
    denoiser: str
    computed: bool
    reason: str
    spans: int
    spans_reused: int
    note: str = ""
    samples: tuple[SampleRecord, ...] = ()
    replayed: bool = False


class CacheRun:
    """The state of one generation; made at its start and dropped at its end, so nothing can leak into the next."""

    def __init__(
        self,
        session: "Session",
        method: "Method",
        observer: Observer | None,
        clock: StepClock,
        noise_levels: Callable[[Any], NoiseLevels],
        pipe: Any = None,
    ):
        self.session, self.method, self.observer = session, method, observer
        self.pipe = None if pipe is None else weakref.ref(pipe)
        self.any_scheduler = pipe is None  # steps of every scheduler count, not of the pipeline's alone
        self.samples: int | None = None  # rows of what the scheduler steps on
        self.around: Any = None  # the run that was active when this one, of a user's own loop, was entered
        self.scheduler: Any = None  # of the loop that runs, or is about to
        self.layouts = dict(session.layouts)
        self.clock = clock
        self.forecaster = method.forecaster
        self.times: tuple[float, ...] = ()  # the sampler's variable at each step, for a forecaster that goes by it
        self.history = method.history  # features kept of each span
        self.decisions = Decisions(method, self.warn, self.warn_failure, session.agree, session.denoisers)
        self.spans = SpanCalls(self)
        self.records: list[StepRecord] = []
        self.grids: dict[torch.Size, Grid | None] = {}  # of the tokens of spans' inputs, by shape
        self.whole: CacheRun | None = None  # the run of a pipeline that this one's is a part of
        self.sizes: dict[tuple[str, str], int] = {}  # of one feature of each denoiser's spans, known at the end
        self._part_bytes = self._part_resident = 0
        self.guidance_scales: tuple[float, ...] = ()  # in the pipeline's call, that of guidance first
        self.guidance_weights: dict[str, float] = {}  # by denoiser, see `Step.guidance`
        self.pass_name: str | None = None  # set by diffusers' cache_context where the pipeline enters it
        self.guided: list[str] = []  # names of the step's passes in order, where a guider gives them
        self._passes: dict[tuple[str, str], int] = {}  # of this step so far, by denoiser and name
        self.chunks: tuple[int, ...] | None = None  # of a stream, those that calls hold, where the user's loop tells
        self._ladder = Ladder()
        self.progress_total: int | None = None  # what the pipeline's progress bar counts to
        self.frame: Frame | None = None
        guarded = method.guarded
        self._tells_rows = not guarded.planned or guarded.guards.unconditional_every > 1
        self._told_before: Any = None
        self._noise_levels = noise_levels
        self._levels = NoiseLevels()
        self._moved_from: NoiseLevels | None = None  # the sampler's own levels, where the policy has moved them
        self._groups, self._grouped_batch = 1, 0
        self.messages = session.noted  # that were warned with, in order; a part's are those of the whole
        self._reached: dict[str, bool] = {}  # by denoiser: whether any of its spans was ever entered

    @property
    def outer(self) -> "CacheRun | None":
        """The run that calls of other denoisers go on to: not a pipeline's, in whose callback this one may be."""
        return self.around if getattr(self.around, "any_scheduler", False) else None

    # the denoiser

    def denoiser_call(
        self, name: str, spans: tuple[Span, ...], inner: Callable, args: tuple, kwargs: dict[str, Any]
    ) -> Any:
        """Run the denoiser called `name`, its spans computed or reused."""
        if self.frame is not None or IS_EXPORTING():  # a denoiser that calls itself, or is written down
            return inner(*args, **kwargs)
        try:
            self.frame = frame = self._open_frame(name, spans, args, kwargs)
        except DiffusionCacheError:
            raise
        except Exception as error:
            self.warn_failure("tracking the step", error)
            return inner(*args, **kwargs)
        layout = self.layouts[name]
        given = (copied(args), copied(kwargs)) if frame.trace is not None else ((), {})
        try:
            output = self._forward(spans, inner, args, kwargs)
            wrong = self._wrongly_reused(frame, output, args, kwargs) if frame.reused else []
            if wrong:
                for visit, why in wrong:
                    if why:
                        self.spans.give_up(visit.state, visit.span, why)
                    else:
                        self.spans.forget(visit.state)
                # from the root, all computed: impure chains do not allow replaying single blocks
                frame = self.frame = frame.again((False,))
                frame.actions, frame.reason = (True,), "computed again"
                output = self._forward(spans, inner, args, kwargs)
            elif frame.reused and (again := self.decisions.verified(frame)) is not None:
                frame = self.frame = again
                output = self._forward(spans, inner, args, kwargs)
        finally:
            self.frame = None
        self._close_frame(frame, name, spans)
        if frame.trace is not None and self.layouts[name] is not layout and any(frame.stores):
            self._learn(frame, inner, *given)
        if self.observer is not None and not frame.fills_cache:
            self.observer.denoiser_called(frame, output, self._repeatable(frame, inner, args, kwargs))
        elif self._is_last(frame):
            self.spans.conclude(frame)
            self.decisions.conclude(frame.key)
        return output

    def _is_last(self, frame: Frame) -> bool:
        """Whether no later call of this run's loop is of this frame's pass."""
        streams = self.method.stream is not None or frame.fills_cache
        return not streams and self.observer is None and frame.step.index + 1 == frame.step.total

    def _repeatable(self, called: Frame, inner: Callable, args: tuple, kwargs: dict[str, Any]) -> Again:
        """A function that makes a call again, its spans reused as they were, with nothing stored or recorded."""

        def again(compute: bool = False, given: tuple[tuple, dict[str, Any]] | None = None) -> Any:
            taken, named = given or (args, kwargs)
            outer, self.frame = self.frame, called.again((False,))
            self.frame.actions, self.frame.variant = (True,) if compute else called.actions, called.variant
            try:
                with forked_rng():
                    return self._forward(self.layouts[called.key[0]].spans, inner, copied(taken), copied(named))
            finally:
                self.frame = outer

        return again

    def _learn(self, computed: Frame, inner: Callable, args: tuple, kwargs: dict[str, Any]) -> None:
        """Compute the step once more for spans that have been arranged anew, and try reusing it right away.

        Blocks have turned out to run in another order than they are listed in. At the first step already, so that a
        first run is like those after it.
        """
        try:
            self.repeat(computed, (True,), inner, args, kwargs)
            for pattern in self.decisions.patterns(computed.step.total):
                self.repeat(computed, pattern, inner, args, kwargs)
        except Exception as error:
            self.warn_failure("looking at what would be reused", error)

    def repeat(
        self, computed: Frame, actions: tuple[bool, ...] | None, inner: Callable, args: tuple, kwargs: dict[str, Any]
    ) -> list[tuple[Visit, str]]:
        """The call again, computed and stored, or reused; actions None: reused by an adaptive policy."""
        reuse = actions is None or not all(actions)
        frame = computed.again((not reuse,))
        outer, self.frame = self.frame, frame
        frame.actions, frame.poisoned = actions or (False,), reuse
        frame.variant = (*computed.variant[:2], actions)
        args, kwargs = copied(args), copied(kwargs)
        try:
            with forked_rng():
                if computed.key[0] in self.session.compiled:
                    output = inner(*args, **kwargs)
                else:
                    output = self._forward(self.layouts[computed.key[0]].spans, inner, args, kwargs)
            wrong = self._wrongly_reused(frame, output, args, kwargs)
        finally:
            self.frame = outer
        for visit, why in wrong:
            self.spans.give_up(visit.state, visit.span, why) if why else self.spans.forget(visit.state)
        return wrong

    def graphs(self, name: str) -> Graphs | None:
        """The graphs of a denoiser, where this run goes by any."""
        graphs = self.session.graphs.get(name)
        return graphs if graphs is not None and graphs.serves(self) else None

    def _forward(self, spans: tuple[Span, ...], inner: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        assert self.frame is not None
        if self.observer is not None or self.frame.may_reuse:
            args, kwargs = unshared(args), unshared(kwargs)  # the call may be made again
        graphs = self.graphs(self.frame.key[0])
        if graphs is None:
            return self._through(spans, inner, args, kwargs)
        return graphs.call(self, self.frame, functools.partial(self._through, spans, inner), args, kwargs)

    def _through(self, spans: tuple[Span, ...], inner: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The denoiser's output, made by its modules."""
        assert self.frame is not None
        compiled = self.session.compiled.get(self.frame.key[0])
        if compiled is not None:
            self._reached[self.frame.key[0]] = True
            return compiled.call(self, self.frame, inner, args, kwargs)
        if spans[0].kind == "denoiser":
            return self.spans.call(self.frame, spans[0], 0, inner, args, kwargs)
        frame = self.frame
        try:
            output = inner(*args, **kwargs)
        finally:
            self.spans.groups.restore()
        if frame.deferred:
            frame.settle()
        return output

    def _open_frame(self, name: str, spans: tuple[Span, ...], args: tuple, kwargs: dict[str, Any]) -> Frame:
        clock = self.clock
        clock.denoiser_called(args, kwargs)
        batch = batch_size(args, kwargs)
        if clock.index == 0 and clock.position == 0:
            if clock.evaluation > 0:  # another loop of the same run: nothing is carried over
                self.spans.release()
                self.decisions.clear()
            if self.method.stream is None:  # whose chunks have each their own
                self._levels = self._noise_levels(clock.first_timestep).until(clock.total)
            method = self.method.for_call(kwargs, self.session.agree)
            levels = self._own_levels(method.guarded)
            self.forecaster = forecaster = method.forecaster.for_run(levels)
            timed = forecaster.timed
            self.times = levels.times(f"forecaster {forecaster.name!r}", timed) if timed else ()
            self.history = replace(method, forecaster=self.forecaster).history
            guarded = method.guarded.for_run(levels, [span.name for span in spans])
            self.decisions.begin_loop(guarded, self.history)
            if departure := guarded.departure(clock.total):
                self.session.tell(departure)
        # samples that start from one noise differ from the second step on; reading back costs, so not for plans
        if self._tells_rows and clock.index < 2 and clock.position == 0 and (clock.index == 0 or self._groups > 1):
            self._groups, self._grouped_batch = row_groups(args, kwargs), batch
        filling = fills_cache(kwargs)
        step = Step(
            index=clock.index,
            total=clock.total,
            evaluation=clock.evaluation,
            noise_level=self._levels[clock.index] if clock.index < len(self._levels) else None,
            pass_name=self._name_pass(name, clock.position, counted=not filling),
            rows=self._rows(batch),
            pass_index=clock.position,
            guidance=self.guidance_weights.get(name),
        )
        frame = Frame(step, (name, step.pass_name), (True,), batch, clock.position)
        frame.called = args, kwargs
        if filling:
            frame.actions, frame.stores, frame.fills_cache = (True,), (False,), True
            frame.reason = "fills a cache of keys and values"
            return frame
        frame.chunks = self._chunks(args, kwargs, batch)
        if self.pipe is None and step.total is not None and step.index == step.total and frame.chunks is None:
            self.warn(
                f"this run makes more steps than the {step.total} that it was told of: planned policies compute the "
                "others. Give the number to run as num_steps"
            )
        self.decisions.open(frame, clock.position)
        if frame.actions is not None and len(frame.actions) not in (1, len(spans)):
            count = len(frame.actions)
            self.warn(f"the policy's schedule is for {count} spans, but there are {len(spans)}: computing")
            frame.actions, frame.stores = (True,), (False,)
        if self._is_to_trace(name, spans, args, kwargs):
            frame.trace = []
        if frame.may_reuse or frame.trace is not None or name in self.session.compiled:
            frame.variant = (*_forms(args, kwargs), frame.actions)
            frame.poisoned = frame.variant not in self.session.verified.get(name, ())
        self.spans.prefetch_first(frame)
        return frame

    def _is_to_trace(self, name: str, spans: tuple[Span, ...], args: tuple, kwargs: dict[str, Any]) -> bool:
        """Whether to see in which order a denoiser's blocks run and what flows between them.

        Once, or where stacks in a row are one span, for each form of a run's first call: what a ControlNet gives may
        be added between them.
        """
        known = self.session.traced.get(name)
        if known is None:
            return any(len(span.members) > 1 for span in spans)
        return self.clock.index == 0 and self.layouts[name].apart is not None and _forms(args, kwargs) not in known

    def _name_pass(self, denoiser: str, position: int, counted: bool) -> str:
        """The guidance branch of a call: one that is named like an earlier one of its step is another all the same."""
        if position == 0:
            self._passes.clear()
        name = self.pass_name or (self.guided[position] if position < len(self.guided) else str(position))
        count = self._passes[denoiser, name] = self._passes.get((denoiser, name), 0) + counted
        return name if count < 2 else f"{name}.{count}"

    def _chunks(self, args: tuple, kwargs: dict[str, Any], batch: int) -> Chunks | None:
        """What a call of a stream holds; None where features are filed by steps."""
        stream = self.method.stream
        if stream is None:
            return None
        if self.pipe is None and self.chunks is None:
            raise ConfigError("a stream in a loop of your own needs to know what each call holds: run.chunks(range(n))")
        chunks = Chunks.of(timestep_of(args, kwargs), batch, self._ladder, self.chunks)
        stream.check([unit.number for unit in chunks.units])
        return chunks

    def _rows(self, batch: int) -> tuple[slice, ...]:
        groups = self._groups if batch == self._grouped_batch else 1
        if self.samples and batch % self.samples == 0:
            groups = max(groups, batch // self.samples)
        if groups == 1:
            return (slice(None),)
        size = batch // groups
        return tuple(slice(start, start + size) for start in range(0, batch, size))

    def _wrongly_reused(
        self, frame: Frame, output: Any, args: tuple, kwargs: dict[str, Any]
    ) -> list[tuple[Visit, str]]:
        """Spans whose forecast did not make it to the output, or not alone; and why they cannot be cached, if so."""
        name = frame.key[0]
        missed = [visit for visit in frame.reused if not visit.finished]
        if missed:
            why = "is not called in the same way at every step"
            if self.layouts[name].apart is not None and self._rejoined(name):
                why = ""  # only one of the stacks may be so
            return [(visit, why) for visit in missed]
        skipping = [visit for visit in frame.reused if len(visit.span.members) > 1 and visit.rows is None]
        if not frame.poisoned or not skipping:
            return []
        # once per way of calling the denoiser: it reads the output back
        leaves = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        if any(bool(leaf.isnan().any()) for leaf in leaves):
            given = [*tensor_inputs(args, kwargs).values(), *(t for v in skipping for t in v.state.history.tensors())]
            if any(bool(tensor.isnan().any()) for tensor in given if tensor.is_floating_point()):
                return [(visit, "") for visit in skipping]  # the NaN may come from there: nothing is learned
            if self._rejoined(name):  # a later stack may be what uses it (U-ViT), or what comes after all
                return [(visit, "") for visit in skipping]
            why = "has blocks whose output is used outside of it as well"
            self.session.unusable.update({visit.span: why for visit in skipping})
            return [(visit, why) for visit in skipping]
        self.session.verified.setdefault(name, set()).add(frame.variant)
        return []

    def _rejoined(self, name: str) -> bool:
        """Whether a denoiser's stacks can be taken apart or made one; they are so from the next computed step on."""
        if not self.session.rejoin_spans(name):
            return False
        self._take_layout(name)
        return True

    def _close_frame(self, frame: Frame, name: str, spans: tuple[Span, ...]) -> None:
        whole = sum([visit.rows is None for visit in frame.reused])
        computed = frame.computed > 0 or whole == 0
        self.decisions.close(frame)
        if frame.compared:
            self.spans.forecasts.keep_compared(frame)
        self.spans.prefetch_next(frame)
        if not self._reached.get(name):
            self._reached[name] = bool(frame.counts)
        count = max(len(spans), frame.computed + whole)
        made = frame.reason, count, whole, frame.note, frame.samples, frame.replayed
        self.records.append(StepRecord(frame.step.index, frame.step.pass_name, name, computed, *made))
        if frame.trace and name in self.session.layouts:  # unless it was disabled meanwhile, by another thread
            self.session.arrange_spans(name, frame.trace)
            self.session.traced[name].add(frame.variant[:2])
            self._take_layout(name)

    def _take_layout(self, name: str) -> None:
        """Go on with the spans that the session has found for a denoiser."""
        self.layouts[name] = self.session.layouts[name]
        self.spans.keep_only(name, self.layouts[name].spans)

    def refresh(self) -> None:
        """Forget what is stored, so that what is called next is computed."""
        self.spans.release()
        self.decisions.forget()

    def timesteps_set(self, scheduler: Any) -> None:
        """A scheduler's timesteps are set: a loop follows, of which the pipeline may tell the length."""
        self.clock.timesteps_set()
        self._move_sigmas(scheduler)
        pipe = self.pipe() if self.pipe is not None else None
        if pipe is not None and any(component is scheduler for component in pipe.components.values()):
            self.scheduler = scheduler  # a pipeline may have one for each of its loops
        if pipe is not None:  # what it has told before is of all loops, or of the last one
            self._told_before = vars(pipe).pop("_num_timesteps", self._told_before)

    def _move_sigmas(self, scheduler: Any) -> None:
        """Where the policy moves the noise levels of such a run, move them."""
        if self.clock.is_suppressed or self.method.guarded.sigmas is None:
            return
        own = noise_levels(scheduler)
        sigmas = self.method.guarded.for_run(own).sigmas
        self._moved_from = None if sigmas is None else own
        if sigmas is not None:
            move_sigmas(scheduler, sigmas)

    def _own_levels(self, guarded: Guarded) -> NoiseLevels:
        """This loop's noise levels as the sampler has them by itself, which is what plans go by."""
        own = self._moved_from
        if own is None:
            if guarded.sigmas is not None and guarded.for_run(self._levels).sigmas is not None:
                raise ConfigError(
                    "the plan moves noise levels, which is done when a run's timesteps are set: call set_timesteps "
                    "inside of the run, or use a plan without sigmas (one that is chosen by the prompt comes too late)"
                )
            return self._levels
        if self._levels and len(self._levels) != len(own):
            raise ConfigError(
                f"the plan moves the noise levels of all {len(own)} steps, and this run makes only {len(self._levels)} "
                "of them (image to image, or an end before the last step): use a plan without sigmas"
            )
        return own

    def told_total(self) -> Any:
        """What the pipeline says is the length of the loop that begins, if it does."""
        pipe = self.pipe() if self.pipe is not None else None
        told = getattr(pipe, "_num_timesteps", None)
        if pipe is not None and told is None and self._told_before is not None:
            pipe._num_timesteps = self._told_before
        return told

    def has_part(self, pipe: Any) -> bool:
        """Whether a pipeline is one that this run's pipeline is made of."""
        whole = self.pipe() if self.pipe is not None else None
        return whole is not None and any(part is pipe for part in vars(whole).values())

    @property
    def noise_levels(self) -> tuple[float, ...]:
        """log-SNR of each step of the current loop; empty where the sampler does not tell."""
        return tuple(self._levels)

    # the spans

    def probe_call(self, inner: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The first probe block: note what goes in."""
        if self.frame is not None:
            inputs = tensor_inputs(args, kwargs)
            if inputs:
                probed = image_stream(inputs, self.layouts[self.frame.key[0]].probe)
                # blocks may write into what they are given, which inference tensors do not tell
                if "probe_input" in self.decisions.guarded.needs.signals or probed.is_inference():
                    self.frame.probe_input, self.frame.probe_version = probed.detach().clone(), None
                else:
                    self.frame.probe_input, self.frame.probe_version = probed, probed._version
        return inner(*args, **kwargs)

    def tail_call(self, inner: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The last tail block: note what it gives, and what is forecast of that where the spans are reused."""
        output = inner(*args, **kwargs)
        if self.frame is not None and self.frame.signals is not None:
            self.spans.forecasts.note_tail(self.frame, output, tensor_inputs(args, kwargs))
        return output

    # the end

    @property
    def cache_bytes(self) -> int:
        """The most bytes that features have taken in this run."""
        return max(self.spans.peak_bytes, self._part_bytes)

    @property
    def resident_bytes(self) -> int:
        """The most bytes that features have taken on the denoiser's device in this run."""
        return max(self.spans.resident_bytes, self._part_resident)

    def finish(self) -> None:
        """Release every feature, then tell what could not be checked on the way."""
        self.sizes |= self.spans.feature_bytes()
        if self.whole is not None:
            self.whole.sizes |= self.sizes
            self.whole._part_bytes = max(self.whole._part_bytes, self.cache_bytes)
            self.whole._part_resident = max(self.whole._part_resident, self.resident_bytes)
        try:
            self.spans.release()
        finally:
            self.decisions.clear()
            # what is kept for summary must not keep the pipeline alive
            self.clock.close()
            self.scheduler = self.around = None
            self._noise_levels = lambda timestep: NoiseLevels()
        for name, reached in self._reached.items():
            if not reached:
                self.warn(
                    f"nothing was cached in {name}: it ran without calling the modules of its spans. If it is compiled "
                    "as a whole, use scope 'denoiser', a planned policy at scope 'stack', or compile its blocks "
                    "(compile_repeated_blocks)"
                )

    def warn_failure(self, what: str, error: Exception) -> None:
        self.warn(f"{what} failed, so steps are computed instead: {type(error).__name__}: {error}")

    def warn(self, message: str) -> None:
        if message not in self.messages:
            self.messages[message] = None
            warnings.warn(message, DiffusionCacheWarning, stacklevel=2)


def _forms(args: tuple, kwargs: dict[str, Any]) -> tuple[frozenset[tuple[Any, Any]], ...]:
    """What of a call's arguments may change the way through a denoiser: that they are there, and switches."""
    return tuple(
        frozenset([(name, it if it is None or isinstance(it, (bool, str)) else True) for name, it in given])
        for given in (enumerate(args), kwargs.items())
    )


def batch_size(args: tuple, kwargs: dict[str, Any]) -> int:
    """Rows of the sample, which some denoisers take as a list of single ones."""
    sample = sample_of(args, kwargs)
    if isinstance(sample, (list, tuple)):
        return max(len(sample), 1)
    return sample.shape[0] if isinstance(sample, Tensor) and sample.ndim else 1


def row_groups(args: tuple, kwargs: dict[str, Any]) -> int:
    """How many guidance branches are stacked in a batch: parts with the same sample under different conditions.

    Parts that are alike in all tensors are samples of one seed and prompt. Reads back.
    """
    sample, batch = sample_of(args, kwargs), batch_size(args, kwargs)
    if not isinstance(sample, Tensor):
        return 1
    inputs = [tensor for tensor in tensor_inputs(args, kwargs).values() if tensor.ndim and len(tensor) % batch == 0]
    for groups in range(MAX_ROW_GROUPS, 1, -1):
        if batch % groups == 0:
            parts = sample.chunk(groups)
            branches = [*zip(*(tensor.chunk(groups) for tensor in inputs), strict=True)]
            if all(torch.equal(parts[0], part) for part in parts[1:]) and not any(
                all(map(torch.equal, *pair)) for pair in combinations(branches, 2)
            ):
                return groups
    return 1
