"""A session: one method attached to one pipeline (or bare denoiser), from enable to disable."""

import functools
import sys
import warnings
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from ..chunks import Stream
from ..context import KNOWN_AFTER, SIGNALS, Corrector, Forecaster, NoiseLevels
from ..differences import DIFFERENCES
from ..errors import ConfigError, DiffusionCacheError, DiffusionCacheWarning
from ..fingerprint import MEANINGS, Fingerprint, adapters_of
from ..models import (
    GUIDER_INPUTS,
    Called,
    Layout,
    Span,
    arrange,
    attentions,
    condition_of,
    default_scope,
    find_denoisers,
    find_layout,
    guidance_of,
    guidance_weights,
    guider_scales,
    guiders,
    is_unet,
    joined,
    merged,
    unwrap,
)
from ..offload import release_pinned
from ..policies import Guarded
from ..registry import unknown_name
from .attached import SESSION, Attached, bracket
from .cache_run import CacheRun
from .clock import StepClock, loop_total, noise_levels
from .compiled import CompiledSpans
from .graphs import Graphs, check_device
from .intercept import intercept, is_compiled, is_intercepted, release
from .observer import Observer
from .patches import ACTIVE, active_runs
from .ranks import Agree, agreement, checked_group
from .signals import PROBE_SIGNALS, TAIL_SIGNALS, attention_call
from .structure import LEARNED, Newest, Template

__all__ = ["MARK", "SESSION", "Method", "Session"]

# diffusers' modules whose hooks take what an earlier step gave
REUSING_HOOKS = frozenset(
    {
        "faster_cache", "first_block_cache", "mag_cache", "pyramid_attention_broadcast", "sea_cache",
        "taylorseer_cache",
    }
)  # fmt: skip
MARK = "_diffusion_cache_mark"  # on a scheduler: tokens of the sessions whose steps it counts; deep copies keep it


@dataclass(frozen=True)
class Method:
    """What a session does: a guarded policy, a forecaster, and where.

    scope None: each denoiser's default, or denoiser where policy or forecaster do not serve that. granularity, sync,
    cache_dtype, cache_device, max_cache_bytes, stream, cuda_graphs: see `diffusion_cache.enable`. guidance,
    sample_shape: the scale and the size of a sample's latents at which it was planned, None where they do not matter or
    are not known.

    Raises:
        ConfigError: if both the forecaster and the corrector scale outputs, or for parts that do not serve a stream or
            CUDA graphs.
    """

    guarded: Guarded
    forecaster: Forecaster
    scope: str | None = None
    depth: int | None = None
    granularity: str = "sample"
    sync: str = "immediate"
    corrector: Corrector | None = None
    cache_dtype: str = "model"
    cache_device: str = "model"
    max_cache_bytes: int | None = None
    stream: Stream | None = None
    guidance: float | None = None
    sample_shape: tuple[int, ...] | None = None
    cuda_graphs: bool = False

    def __post_init__(self) -> None:
        if self.stream is not None:
            self._check_stream()
        if self.cuda_graphs:
            self._check_graphs()
        if self.forecaster.keeps_inputs and self.guarded.guards.unconditional_every > 1:
            raise ConfigError(
                f"forecaster {self.forecaster.name!r} goes by the path of the inputs, which follows all guidance "
                "branches, and unconditional_every has one of them reused alone: take 'taylor', or leave "
                "unconditional_every out"
            )
        if self.corrector is None:
            return
        if self.corrector.corrected_channels and self.forecaster.corrected_channels:
            raise ConfigError(
                f"forecaster {self.forecaster.name!r} scales outputs itself: leave corrector {self.corrector.name!r} "
                "out"
            )
        served = self.corrector.forecasters
        if served is not None and self.forecaster.name not in served:
            raise ConfigError(
                f"corrector {self.corrector.name!r} does not mend what forecaster {self.forecaster.name!r} gives: take "
                f"forecaster={' or '.join(map(repr, sorted(served)))}"
            )

    def __str__(self) -> str:
        def text(part: Any) -> str:
            fields = ", ".join(f"{key}={value!r}" for key, value in vars(part).items() if not key.startswith("_"))
            return f"{part.name}({fields})"

        where = f"{self.scope or 'default scope'}{', each chunk by itself' * (self.stream is not None)}"
        parts = [self.guarded.policy, self.forecaster, *([self.corrector] if self.corrector is not None else [])]
        return f"{' + '.join(map(text, parts))} on {where}"

    def _check_stream(self) -> None:
        policy, forecaster = self.guarded.policy, self.forecaster
        if not self.guarded.planned:
            raise ConfigError(
                f"policy {policy.name!r} compares one step with another, between which the window of a stream may have "
                "moved: take one that looks at no signals, such as 'interval'"
            )
        if not forecaster.scale_free:
            raise ConfigError(
                f"forecaster {forecaster.name!r} goes by step numbers, and chunks of a stream by their noise levels: "
                "take 'taylor' or 'reuse'"
            )
        if self.corrector is not None:
            raise ConfigError(f"corrector {self.corrector.name!r} goes by step numbers: leave it out of a stream")
        if self.cache_dtype in DIFFERENCES:
            raise ConfigError(
                f"cache_dtype={self.cache_dtype!r} stores differences to a span's newest feature, and a stream has one "
                f"for each chunk: take {DIFFERENCES[self.cache_dtype]!r}"
            )
        if self.cache_device != "model":
            raise ConfigError("the features of a stream stay on its device: leave cache_device out")
        if self.max_cache_bytes is not None:
            raise ConfigError("the memory of a stream is limited by its capacity: leave max_cache_bytes out")

    def _check_graphs(self) -> None:
        policy, forecaster = self.guarded.policy, self.forecaster
        if not self.guarded.planned:
            watched = f"policy {policy.name!r}" if policy.needs.signals else "a guard that watches a signal"
            raise ConfigError(
                f"{watched} decides in the middle of a call, which a CUDA graph repeats as it is: take a policy that "
                "looks at no signals ('interval') or a profile's plan, or leave cuda_graphs out"
            )
        if not forecaster.static:
            raise ConfigError(
                f"forecaster {forecaster.name!r} is no weighted sum of features, which is all that CUDA graphs take: "
                "use another such as 'taylor', or leave cuda_graphs out"
            )
        if self.guarded.guards.unconditional_every > 1:
            raise ConfigError(
                "unconditional_every takes one pass for another's input, which CUDA graphs do not: leave one of them "
                "out"
            )
        if self.cache_dtype in DIFFERENCES:
            raise ConfigError(
                f"cache_dtype={self.cache_dtype!r} moves features from slot to slot, and CUDA graphs read them where "
                f"they are: take {DIFFERENCES[self.cache_dtype]!r} or 'model', or leave cuda_graphs out"
            )
        kept: dict[str, Any] = {"stream": self.stream, "max_cache_bytes": self.max_cache_bytes}
        kept["cache_device"] = None if self.cache_device == "model" else self.cache_device
        for name, given in kept.items():
            if given is not None:
                raise ConfigError(
                    f"{name} is not for CUDA graphs, which take features where they are, and all of them: leave {name} "
                    "or cuda_graphs out"
                )

    @property
    def history(self) -> int:
        """Features kept of each span: as many as any of its parts looks at."""
        least = 1 if self.corrector is None else self.corrector.history
        return max(self.forecaster.history, self.guarded.policy.needs.history, least)

    @property
    def spans_alike(self) -> bool:
        """Whether stacks in a row give the same, but for rounding, where they are cached as one."""
        parts = self.guarded.policy, self.forecaster
        return self.corrector is None and all(part.spans_alike for part in parts)

    def for_call(self, kwargs: Mapping[str, Any], agree: Agree | None) -> "Method":
        """What a run goes by whose first denoiser call has these arguments."""
        if not self.guarded.policy.needs.condition:
            return self
        policy, forecaster = self.guarded.policy.choose(condition_of(kwargs), agree)
        return replace(self, guarded=replace(self.guarded, policy=policy), forecaster=forecaster)

    def layout(self, denoiser: nn.Module) -> Layout:
        """The denoiser's spans under this method.

        Raises:
            ConfigError: for a scope that policy or forecaster does not serve, options that leave nothing to skip, a
                denoiser compiled as a whole with a forecaster that it cannot trace, a corrector whose signals are
                not taken, or CUDA graphs of a denoiser that is not on one CUDA device.
            NoSpansError: if the denoiser has none at this scope.
        """
        policy = self.guarded.policy
        if not getattr(policy, "scopes", None):
            raise ConfigError(f"policy {policy.name!r} declares no scopes: name the kinds of span it may govern")
        forecaster, corrector = self.forecaster, self.corrector
        scope, served = self.scope or default_scope(denoiser), policy.scopes & forecaster.scopes
        if self.scope is None and scope not in served and "denoiser" in served:
            scope = "denoiser"  # which every model has
        compared = () if corrector is None else corrector.needs_signals
        for name in (*policy.needs.signals, *compared):
            if name not in SIGNALS or (name in compared and name in KNOWN_AFTER):
                raise unknown_name("signal", name, SIGNALS)
        if scope not in policy.scopes:
            served_nowhere = policy.scopes == {"stack"} and is_unet(unwrap(denoiser))
            other = ", which no UNet has: take 'first_block' or 'seacache'" if served_nowhere else ""
            raise ConfigError(
                f"policy {policy.name!r} does not serve scope {scope!r} ({type(unwrap(denoiser)).__name__}); "
                f"it serves {', '.join(sorted(policy.scopes))}{other}"
            )
        if scope not in forecaster.scopes:
            raise ConfigError(
                f"forecaster {forecaster.name!r} does not serve scope {scope!r} ({type(unwrap(denoiser)).__name__}): "
                f"use scope {' or '.join(map(repr, sorted(forecaster.scopes)))}"
            )
        needs = policy.needs
        if corrector is not None and corrector.needs_signals:
            probed = needs.probe > 0 or scope == "cut" or PROBE_SIGNALS.isdisjoint(corrector.needs_signals)
            if not (needs.signals and probed):
                raise ConfigError(
                    f"corrector {corrector.name!r} compares {', '.join(corrector.needs_signals)} of each step, which "
                    f"is not taken for policy {policy.name!r}: take 'dicache', 'first_block' or 'ra_cfg', or leave the "
                    "corrector out"
                )
        if self.is_traced(denoiser, scope) and (not forecaster.static or forecaster.keeps_inputs):
            raise ConfigError(
                f"forecaster {forecaster.name!r} is no weighted sum of features, which is all that a denoiser compiled "
                "as a whole takes: compile its blocks instead (compile_repeated_blocks), use scope 'denoiser', or "
                "another forecaster such as 'taylor'"
            )
        kept = self.cache_dtype, self.cache_device, self.max_cache_bytes
        if self.is_traced(denoiser, scope) and kept != ("model", "model", None):
            raise ConfigError(
                "cache_dtype, cache_device and max_cache_bytes are not for a denoiser compiled as a whole, which takes "
                "its features as they are, where they are, and all of them: compile its blocks instead "
                "(compile_repeated_blocks), or use scope 'denoiser'"
            )
        if self.is_traced(denoiser, scope) and self.stream is not None:
            raise ConfigError(
                "a stream is not for a denoiser compiled as a whole: compile its blocks instead "
                "(compile_repeated_blocks), or use scope 'denoiser'"
            )
        if self.cuda_graphs:
            if is_compiled(denoiser):
                raise ConfigError(
                    "cuda_graphs is not for a denoiser compiled as a whole: torch.compile(mode='reduce-overhead') has "
                    "graphs of its own there, and compiled blocks (compile_repeated_blocks) go with cuda_graphs"
                )
            check_device(unwrap(denoiser))
        if needs.rollback and self.sync == "lagged":
            raise ConfigError(f"policy {policy.name!r} waits for each step's signal to roll it back: not sync='lagged'")
        if scope == "cut" and (needs.probe > 1 or needs.tail):
            raise ConfigError(
                f"on a UNet cut the probe of {policy.name!r} is the down blocks above the cut: "
                f"set depth instead of front and back"
            )
        if self.depth is not None and scope != "cut":
            raise ConfigError(f"depth is for scope 'cut' of UNets; {type(unwrap(denoiser)).__name__} runs at {scope!r}")
        if scope == "cut" and "probe_input" in needs.signals:
            raise ConfigError(f"policy {policy.name!r} looks at what enters its probe: not known on a UNet cut")
        depth, adaptive = self.depth or 1, bool(needs.signals)
        return find_layout(denoiser, scope, depth, needs.probe, needs.tail, needs.blocks, adaptive)

    def is_traced(self, denoiser: nn.Module, scope: str) -> bool:
        """Whether the spans are inside of what is compiled."""
        return scope == "stack" and self.guarded.planned and is_compiled(denoiser)


class Tuner(Protocol):
    """Finds the method for a call of a pipeline, which it may call itself (`Session.generate`)."""

    def __call__(self, session: "Session", pipe: Any, args: tuple, kwargs: dict[str, Any]) -> Method: ...


class Weights(NamedTuple):
    """Whose weights a plan was checked against: what of them can be compared before every run."""

    denoiser: "weakref.ref[nn.Module]"
    adapters: tuple

    @classmethod
    def of(cls, denoiser: nn.Module) -> "Weights":
        return cls(weakref.ref(unwrap(denoiser)), adapters_of(denoiser))


class Session(Attached):
    """Interceptors on the denoisers' modules and brackets on classes, installed together and removed exactly."""

    def __init__(
        self, method: Method, group: Any = None, observer: Observer | None = None, tuner: "Tuner | None" = None
    ):
        super().__init__()
        self.method = method
        self.observer = observer
        self.tuner = tuner  # finds the method for each call, where it is not known beforehand
        self.group = checked_group(group)  # ranks that must decide alike, where the user names them
        self.layouts: dict[str, Layout] = {}
        self.denoisers: dict[str, nn.Module] = {}
        self.span_index: dict[Span, int] = {}
        self.last_run: CacheRun | None = None
        self.agree: Agree | None = None  # makes ranks that share their work decide alike; found at each run's start
        # learned once and kept over runs: denoisers whose blocks' order is known, with the arguments that they were
        # called with; ways of calling them (arguments, what is reused) in which nothing but the last blocks' output was
        # seen to be used; spans whose batch rows were seen to be independent, or not
        self.traced: dict[str, set[tuple]] = {}
        self.verified: dict[str, set[tuple]] = {}
        self.independent: Newest[tuple[Span, tuple], bool] = Newest(LEARNED)
        # what spans return, by visit and inputs
        self.templates: Newest[tuple[Span, int, tuple], Template] = Newest(LEARNED)
        self.written: set[Span] = set()  # spans that write into what they are given
        self.unusable: dict[Span, str] = {}  # why a span cannot be cached as one
        self.directions: dict[Span, float] = {}  # see `Query.direction`
        self._marked: list[weakref.ref[Any]] = []  # schedulers, which may be swapped out while enabled
        self.compiled: dict[str, CompiledSpans] = {}  # denoisers that are compiled as a whole, at scope stack
        self.graphs: dict[str, Graphs] = {}  # of denoisers, where calls are captured
        self._handlers: dict[str, list[tuple[nn.Module, Callable]]] = {}
        self._parts: dict[str, list[Any]] = {}  # of denoisers, at the start of the latest run
        self._sampler: Fingerprint | None = None  # that a plan was enabled for
        self._weights: dict[str, Weights] = {}  # likewise, by denoiser
        self._told: set[str] = set()  # warnings
        self.noted: dict[str, None] = {}  # those that the latest run gave reason for, told then or before

    # attaching

    def attach_pipeline(self, pipe: Any) -> None:
        """Attach to all denoisers of a pipeline, or to none: whatever is wrong is raised before anything changes."""
        denoisers = find_denoisers(pipe)
        for name, denoiser in denoisers.items():
            _check_other_caches(denoiser, "pipe", name)
        layouts = {name: self._layout(denoiser) for name, denoiser in denoisers.items()}
        if self.method.guarded.policy.for_one_sampler:
            self._sampler = self._sampler or Fingerprint.of(pipe, {})
            self._weights = self._weights or {name: Weights.of(denoiser) for name, denoiser in denoisers.items()}
        try:
            for name, denoiser in denoisers.items():
                self._bind(name, denoiser, layouts[name])
                self._parts[name] = _parts(denoiser)
            for cls in {type(pipe), *_imported_pipelines()}:
                self._patch(cls, "__call__", bracket)
            self._patch_progress_bar(pipe)
            for denoiser in denoisers.values():
                self._patch_cache_context(denoiser)
            for scheduler in _schedulers(pipe):
                self._patch_scheduler(type(scheduler))
            self._patch_guiders(pipe)
        except BaseException:
            self._detach()
            raise
        self._settle(pipe)

    def attach_model(self, model: nn.Module) -> None:
        """Attach to a bare denoiser; any of diffusers' schedulers then counts its steps."""
        _check_other_caches(model, "model")
        layout = self._layout(model)
        try:
            self._bind("denoiser", model, layout)
            self._patch_cache_context(model)
            for cls in _imported_schedulers():
                self._patch_scheduler(cls)
        except BaseException:
            self._detach()
            raise

    def detach_model(self) -> None:
        self._detach()

    def _layout(self, denoiser: nn.Module) -> Layout:
        """The denoiser's spans under the method: stacks in a row as one, which takes half the memory of two.

        Not where an observer asks about each, a tuner goes on to other methods, or a graph that is compiled as a whole
        does not show what flows between them.

        Raises:
            ConfigError, NoSpansError: as `Method.layout`.
        """
        layout = self.method.layout(denoiser)
        apart = self.observer is not None or self.tuner is not None or self.method.is_traced(denoiser, layout.scope)
        return layout if layout.scope != "stack" or apart or not self.method.spans_alike else joined(layout)

    def _bind(self, name: str, denoiser: nn.Module, layout: Layout) -> None:
        handlers: list[tuple[nn.Module, Callable]] = []
        spans = layout.spans

        def root(run: CacheRun, inner: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
            return run.denoiser_call(name, spans, inner, args, kwargs)

        handlers.append((denoiser, root))
        for index, span in enumerate(spans):
            self.span_index[span] = index
            if span.kind == "denoiser":
                continue
            for member, module in enumerate(span.members):
                handlers.append((module, _member_handler(span, member)))
            if "modulated_input" in self.method.guarded.needs.signals:
                handlers += [
                    (module, functools.partial(attention_call, module)) for module in attentions(span.members[0])
                ]
        if layout.probe is not None:
            handlers.append((layout.probe, CacheRun.probe_call))
        if layout.tail is not None and not TAIL_SIGNALS.isdisjoint(self.method.guarded.needs.signals):
            handlers.append((layout.tail, CacheRun.tail_call))
        self._handlers[name] = handlers
        self.denoisers[name], self.layouts[name] = denoiser, layout
        for module, handler in handlers:
            intercept(module, self, handler)
        if self.method.is_traced(denoiser, layout.scope):
            self.compiled[name] = CompiledSpans(unwrap(denoiser), spans)
        elif self.method.cuda_graphs:
            self.graphs[name] = Graphs(unwrap(denoiser))

    def arrange_spans(self, name: str, trace: list[Called]) -> None:
        """Have the spans as their blocks were seen to run: stacks whose blocks take turns become one span."""
        self._rebind(name, arrange(self.layouts[name], trace))

    def rejoin_spans(self, name: str) -> bool:
        """Take apart the stacks that are one span, or make one of them, where what is skipped turns out to be used.

        False where neither is left to try.
        """
        if name not in self.layouts:  # disabled meanwhile, by another thread
            return False
        if (apart := self.layouts[name].apart) is not None:
            self._rebind(name, apart)
            return True
        if self.layouts[name].scope != "stack" or sum(not span.side for span in self.layouts[name].spans) < 2:
            return False
        self._rebind(name, merged(self.layouts[name]))
        return True

    def _rebind(self, name: str, layout: Layout) -> None:
        if layout is not self.layouts[name]:
            denoiser = self.denoisers[name]
            self._unbind(name, layout.spans)
            self._bind(name, denoiser, layout)
        self.traced.setdefault(name, set())

    def _unbind(self, name: str, kept: Sequence[Span] = ()) -> None:
        """kept: spans of which is remembered what was found out about them."""
        self.traced.pop(name, None)  # of the next denoiser of this name nothing is known
        self.verified.pop(name, None)
        if name in self.compiled:
            self.compiled.pop(name).remove()
        self.graphs.pop(name, None)
        for module, _ in self._handlers.pop(name, ()):
            release(module, self)
        self.denoisers.pop(name, None)
        layout = self.layouts.pop(name, None)
        for span in layout.spans if layout else ():
            self.span_index.pop(span, None)
        gone = {span for span in layout.spans if span not in kept} if layout else set()
        self.written -= gone
        self.unusable = {span: why for span, why in self.unusable.items() if span not in gone}
        self.directions = {span: found for span, found in self.directions.items() if span not in gone}
        self.templates.drop(lambda key: key[0] in gone)
        self.independent.drop(lambda key: key[0] in gone)

    def _patch_scheduler(self, cls: type) -> None:
        self._patch(cls, "step", _counted_step)
        if hasattr(cls, "set_timesteps"):
            self._patch(cls, "set_timesteps", _noted_timesteps)

    def _patch_progress_bar(self, pipe: Any) -> None:
        if hasattr(type(pipe), "progress_bar"):
            self._patch(type(pipe), "progress_bar", _noted_progress_bar)

    def _patch_cache_context(self, denoiser: nn.Module) -> None:
        cls = type(unwrap(denoiser))
        if hasattr(cls, "cache_context"):
            self._patch(cls, "cache_context", _noted_cache_context)

    def _patch_guiders(self, pipe: Any) -> None:
        for guider in guiders(pipe):
            for name in GUIDER_INPUTS:
                self._patch(type(guider), name, _noted_passes)

    def _detach(self) -> None:
        for name in list(self._handlers):
            self._unbind(name)
        super()._detach()
        for marked in self._marked:
            scheduler = marked()
            if scheduler is not None:
                _mark(scheduler, _marks(scheduler) - {self.token})
        self._marked.clear()
        if self.method.cache_device == "cpu":
            release_pinned()

    # running

    def generate(self, pipe: Any, call: Mapping[str, Any], method: Method, observer: Observer | None) -> CacheRun:
        """A generation by another method, which shares this one's layout; the session goes on as if it had not been."""
        self.noted = {}
        self._refresh(pipe)
        run = self._begin(pipe, (), dict(call), method, observer)
        token = ACTIVE.set(run)
        try:
            pipe(**call)
        finally:
            ACTIVE.reset(token)
            self._end(run)
        return run

    def begin(self, pipe: Any, args: tuple, kwargs: dict[str, Any]) -> CacheRun:
        """Start a run of a pipeline: look again at its denoisers and scheduler, which users swap."""
        method = self.method if self.tuner is None else self.tuner(self, pipe, args, kwargs)
        self.noted = {}
        self._refresh(pipe)
        self._check_sampler(pipe)
        self._check_weights()
        return self._begin(pipe, args, kwargs, method, self.observer)

    def begin_part(self, whole: CacheRun, pipe: Any, args: tuple, kwargs: dict[str, Any]) -> CacheRun:
        """Start a run of a pipeline that another, which this session is enabled on, is made of."""
        self._patch_progress_bar(pipe)
        run = self._begin(pipe, args, kwargs, whole.method, whole.observer)
        run.whole, run.records = whole, whole.records
        return run

    def _begin(
        self, pipe: Any, args: tuple, kwargs: dict[str, Any], method: Method, observer: Observer | None
    ) -> CacheRun:
        self._marked = [marked for marked in self._marked if marked() is not None]
        for scheduler in _schedulers(pipe):
            self._patch_scheduler(type(scheduler))
            _mark(scheduler, _marks(scheduler) | {self.token})
            if not any(marked() is scheduler for marked in self._marked):
                self._marked.append(weakref.ref(scheduler))
        self._patch_guiders(pipe)
        vars(pipe).pop("_num_timesteps", None)  # an earlier run's; pipelines that use it set it before their loop

        def total(timestep: Any) -> int | None:
            told = run.told_total()
            return int(told) if told else loop_total(run.scheduler, timestep, run.progress_total)

        def levels(timestep: Any) -> NoiseLevels:
            return noise_levels(run.scheduler, timestep)

        self.agree = agreement(self.denoisers.values(), self.group)
        run = CacheRun(self, method, observer, StepClock(total), levels, pipe)
        run.scheduler = getattr(pipe, "scheduler", None)
        scales = guidance_of(type(pipe).__call__, (pipe, *args), kwargs) or guider_scales(pipe)
        run.guidance_scales = tuple(scales)
        run.guidance_weights = guidance_weights(pipe, args, kwargs, self.denoisers)
        self._check_guidance(method, scales)
        if observer is not None:
            observer.run_began(run)
        return run

    def begin_model(self, num_steps: int | None, levels: NoiseLevels) -> CacheRun:
        self.agree = agreement(self.denoisers.values(), self.group)
        self.noted = {}
        return CacheRun(self, self.method, self.observer, StepClock(lambda timestep: num_steps), lambda _: levels)

    def finish(self, run: CacheRun) -> None:
        self.last_run = run
        self._end(run)

    def _end(self, run: CacheRun) -> None:
        try:
            run.finish()
        finally:
            for compiled in self.compiled.values():
                compiled.release()
            for graphs in self.graphs.values():
                graphs.release(run)

    def _check_sampler(self, pipe: Any) -> None:
        """Tell once where the sampler of a plan was swapped for another, which may have the very same noise levels."""
        if self._sampler is None:
            return
        found = [str(one) for one in self._sampler.differences(Fingerprint.of(pipe, {})) if one.strict]
        if found:
            self.tell(
                "the sampler is not the one that a plan was enabled for, and its stated quality does not hold: "
                f"{'; '.join(found)}. Enable a plan made for this sampler"
            )

    def _check_weights(self) -> None:
        """Tell once where a plan's denoiser was swapped since it was enabled, or its adapters were."""
        for name, known in self._weights.items():
            denoiser = self.denoisers.get(name)
            if denoiser is None:
                continue
            found = Weights.of(denoiser)
            if found != known:
                what = "LoRA adapters are" if found.denoiser() is known.denoiser() else "weights are"
                self.tell(
                    f"the {what} not those of {name} that a plan was enabled for, and its stated quality does not "
                    "hold: enable a plan of a profile made with them"
                )

    def _check_guidance(self, method: Method, scales: Collection[float]) -> None:
        """Tell once where a call's guidance is not the one that its plan was made at, by either scale."""
        planned = method.guidance
        if planned is not None and scales and planned not in scales:
            self.tell(
                f"the plan was made at guidance {planned:g}, and this call is at {max(scales):g}: "
                f"{MEANINGS['guidance']}, and the plan's stated quality does not hold. Make a profile at this guidance"
            )

    def check_size(self, method: Method, sample: Tensor) -> None:
        """Tell once where latents are not of the size that their plan was made at. sample: [rows, …]."""
        planned, found = method.sample_shape, tuple(sample.shape[1:])
        if planned is not None and found != planned and method.stream is None:
            self.tell(
                f"the plan was made for latents of {list(planned)}, and this call's are of {list(found)}: "
                f"{MEANINGS['sample_shape']}, and the plan's stated quality does not hold. Make a profile at this size"
            )

    def tell(self, message: str) -> None:
        """Once while enabled, and in the summary of every run that it holds of."""
        self.noted[message] = None
        if message not in self._told:
            self._told.add(message)
            warnings.warn(message, DiffusionCacheWarning, stacklevel=6)

    def _tell_uncached(self, where: str, error: DiffusionCacheError) -> None:
        message = f"running without the cache{where}, which cannot be attached any more: {error}"
        self.noted[message] = None
        warnings.warn(message, DiffusionCacheWarning, stacklevel=6)

    def _refresh(self, pipe: Any) -> None:
        """Follow denoisers that were swapped, and take calls back that `module.compile()` took since."""
        try:
            current = find_denoisers(pipe)
        except DiffusionCacheError as error:
            for name in [*self._handlers]:
                self._unbind(name)
            self._tell_uncached("", error)
            return
        for name in [*self._handlers]:
            if current.get(name) is not self.denoisers[name] or _other_cache(self.denoisers[name]):
                self._unbind(name)
        for name, denoiser in current.items():
            try:
                self._follow(name, denoiser)
            except DiffusionCacheError as error:
                self._tell_uncached(f" in {name}", error)

    def _follow(self, name: str, denoiser: nn.Module) -> None:
        """Attach to a denoiser that is new or was compiled since, or has other modules or attention processors.

        Raises:
            ConfigError, NoSpansError: if it cannot be cached.
        """
        _check_other_caches(denoiser, "pipe", name)
        before, self._parts[name] = self._parts.get(name), _parts(denoiser)
        if name in self._handlers and not _are_same(before, self._parts[name]):
            self._unbind(name)  # what was learned of it may not hold any more
        if name not in self._handlers:
            self._bind(name, denoiser, self._layout(denoiser))
            self._patch_cache_context(denoiser)
            return
        layout = self.layouts[name]
        intercepted = all(is_intercepted(module, self) for module, _ in self._handlers[name])
        if not intercepted or self.method.is_traced(denoiser, layout.scope) != (name in self.compiled):
            known = layout.apart is None or name in self.traced
            self._unbind(name)  # compiled since
            found = self._layout(denoiser)  # raises where the method is not for what is compiled
            self._bind(name, denoiser, layout if known else found)


def _parts(denoiser: nn.Module) -> list[Any]:
    """The modules and attention processors that a denoiser is made of, held weakly where that is possible."""
    found: list[Any] = []
    for module in unwrap(denoiser).modules():
        found.append(weakref.ref(module))
        processor = vars(module).get("processor")
        with suppress(TypeError):
            processor = weakref.ref(processor)
        found.append(processor)
    return found


def _are_same(one: list[Any] | None, other: list[Any]) -> bool:
    """Whether a denoiser is still made of the same: an object has one weak reference, and never a dead one's."""
    return one is not None and len(one) == len(other) and all(a is b for a, b in zip(one, other, strict=True))


def _other_cache(denoiser: nn.Module) -> str:
    """Whose cache is on in a denoiser beside this one, if any is."""
    inner = unwrap(denoiser)
    if getattr(inner, "is_cache_enabled", False):
        return "diffusers"
    if {"_is_cached", "_context_manager"} <= vars(inner).keys():
        return "cache-dit"
    if getattr(vars(inner).get("forward"), "__module__", "").startswith("DeepCache"):
        return "DeepCache"
    return "diffusers.hooks" if _cache_hooks(inner) else ""


def _cache_hooks(denoiser: nn.Module) -> list[str]:
    """Names of the hooks by which diffusers' `apply_…_cache` reuses anything, in a denoiser's modules."""
    registries = [found for module in denoiser.modules() if (found := getattr(module, "_diffusers_hook", None))]
    return list(
        dict.fromkeys(
            name
            for registry in registries
            for name, hook in registry.hooks.items()
            if type(hook).__module__.rpartition(".")[2] in REUSING_HOOKS
        )
    )


def _check_other_caches(denoiser: nn.Module, owner: str, name: str = "") -> None:
    """That no other cache is on, which would reuse what is said here to be computed.

    Raises:
        ConfigError: if one is.
    """
    other = _other_cache(denoiser)
    if other:
        place = f"{owner}.{name}" if name else owner
        ends = {
            "diffusers": f"call {place}.disable_cache() first",
            "cache-dit": f"call cache_dit.disable_cache({owner}) first",
            "DeepCache": "call disable() of its helper first",
            "diffusers.hooks": "remove its hooks first, by diffusers.hooks.HookRegistry.check_if_exists_or_initialize("
            f"{place}).remove_hook(name, recurse=True) for name in {_cache_hooks(unwrap(denoiser))}, or load it anew",
        }
        raise ConfigError(f"the cache of {other.partition('.')[0]} is on for {name or owner}: {ends[other]}")


def _member_handler(span: Span, member: int) -> Callable:
    def end(run: CacheRun, inner: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        frame = run.frame
        if frame is None:
            return inner(*args, **kwargs)
        return run.spans.call(frame, span, member, inner, args, kwargs)

    def middle(run: CacheRun, inner: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        # most calls of most runs come through here: nothing is looked up that need not be
        frame = run.frame
        if frame is None:
            return inner(*args, **kwargs)
        visit = frame.visits.get(span)
        if visit is None:
            if frame.trace is None:
                return inner(*args, **kwargs)
        elif visit.quiet:
            return inner(*args, **kwargs)
        elif visit.idle is not None:
            return visit.idle
        return run.spans.call(frame, span, member, inner, args, kwargs)

    return middle if 0 < member < len(span.members) - 1 else end


def _marks(scheduler: Any) -> frozenset[int]:
    return vars(scheduler).get(MARK, frozenset())


def _mark(scheduler: Any, tokens: frozenset[int]) -> None:
    if tokens:
        setattr(scheduler, MARK, tokens)
    else:
        vars(scheduler).pop(MARK, None)


def _schedulers(pipe: Any) -> list[Any]:
    return [
        component
        for component in pipe.components.values()
        if callable(getattr(component, "step", None)) and hasattr(component, "set_timesteps")
    ]


def _imported_schedulers() -> list[type]:
    from diffusers import SchedulerMixin

    return [cls for cls in _subclasses(SchedulerMixin) if "step" in vars(cls)]


def _imported_pipelines() -> list[type]:
    """Pipelines that may share a denoiser with an enabled one, and may be called from its callback."""
    from diffusers import DiffusionPipeline

    roots = [DiffusionPipeline]
    modular = sys.modules.get("diffusers.modular_pipelines.modular_pipeline")
    if modular is not None:
        roots.append(modular.ModularPipeline)
    return [cls for root in roots for cls in _subclasses(root) if "__call__" in vars(cls)]


def _subclasses(root: type) -> list[type]:
    found: list[type] = []
    queue = [root]
    while queue:
        cls = queue.pop()
        if cls not in found:
            found.append(cls)
            queue += cls.__subclasses__()
    return found


def _counted_step(original: Callable) -> Callable:
    """A scheduler's `step`, counted by the active run if the scheduler (or what it was copied from) is the run's."""

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        run = ACTIVE.get()
        if run is not None and _counts(run, self):
            run.clock.scheduler_stepped()
            sample = kwargs.get("sample", args[2] if len(args) > 2 else None)
            if isinstance(sample, Tensor) and sample.ndim:
                run.samples = len(sample)
                if run.any_scheduler or _is_own(run, self):
                    run.session.check_size(run.method, sample)
        return result

    return step


def _noted_timesteps(original: Callable) -> Callable:
    """A scheduler's `set_timesteps`: in the middle of a run it begins another loop (of the next window, say)."""

    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        run = ACTIVE.get()
        if run is not None and _counts(run, self):
            run.timesteps_set(self)
        return result

    return set_timesteps


def _counts(run: CacheRun, scheduler: Any) -> bool:
    return run.any_scheduler or run.session.token in _marks(scheduler)


def _is_own(run: CacheRun, scheduler: Any) -> bool:
    """Whether this is the pipeline's scheduler itself: a copy steps latents of another kind (LTX2's audio)."""
    pipe = run.pipe() if run.pipe is not None else None
    return getattr(pipe, "scheduler", None) is scheduler


def _noted_progress_bar(original: Callable) -> Callable:
    def progress_bar(self: Any, iterable: Any = None, total: int | None = None, *args: Any, **kwargs: Any) -> Any:
        run = ACTIVE.get()
        if run is not None and run.pipe is not None and run.pipe() is self:
            length = total if total is not None else len(iterable) if hasattr(iterable, "__len__") else None
            if length:
                run.progress_total = length
        return original(self, iterable, total, *args, **kwargs)

    return progress_bar


def _noted_cache_context(original: Callable) -> Callable:
    """diffusers' own name for the pass, where the pipeline gives one."""

    @contextmanager
    def cache_context(self: nn.Module, name: str, **kwargs: Any) -> Any:
        run = next((run for run in active_runs() if is_intercepted(self, run.session)), ACTIVE.get())
        with original(self, name, **kwargs):
            if run is None:
                yield
                return
            outer, run.pass_name = run.pass_name, name
            try:
                yield
            finally:
                run.pass_name = outer

    return functools.wraps(original)(cache_context)


def _noted_passes(original: Callable) -> Callable:
    """A guider names the batches of each step, which come and go over a run: the second is not always the same."""

    def prepare(self: Any, *args: Any, **kwargs: Any) -> Any:
        batches = original(self, *args, **kwargs)
        run = ACTIVE.get()
        if run is not None and run.pipe is not None:
            run.guided = [str(getattr(batch, self._identifier_key, i)) for i, batch in enumerate(batches)]
        return batches

    return prepare
