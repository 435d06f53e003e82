"""The front doors: enable, disable, cached, run, refresh, tune, summary, inspect."""

import contextlib
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from . import resolve
from .advice import Recommendation
from .chunks import Stream
from .context import Corrector, Forecaster, Needs, NoiseLevels, Policy
from .engine import CacheRun, Method, Session, session_of
from .engine.own_loop import enter, leave
from .engine.patches import active_runs
from .engine.structure import forked_rng
from .errors import ConfigError
from .language import LanguageCache, LanguageSession, LanguageSummary, serves
from .models import Layout, Span, find_denoisers
from .plain import check_count
from .plan import Plan
from .planning.kept import Tuned
from .planning.target import Target, Tuner
from .policies import Guarded, Interval
from .policies.select import Select
from .profile import Profile
from .profiling.generation import attached
from .resolve import DEFAULT_FORECASTER, DEFAULT_POLICY, needs_profile, refuse, run_needs_profile
from .summaries import Inspection, SpanInfo, Summary, summarise

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from .systems import System

__all__ = [
    "Inspection",
    "Run",
    "SpanInfo",
    "Summary",
    "cached",
    "disable",
    "enable",
    "inspect",
    "refresh",
    "run",
    "summary",
    "tune",
]


def enable(
    pipe: Any,
    policy: str | Policy | Recommendation | None = None,
    forecaster: str | Forecaster | None = None,
    *,
    corrector: str | Corrector | None = None,
    method: "str | System | LanguageCache | None" = None,
    profile: "str | Path | Profile | None" = None,
    speedup: float | None = None,
    min_psnr: float | None = None,
    nfe: float | None = None,
    plan: "str | Plan | None" = None,
    target_reuse: float | None = None,
    ignore: Collection[str] = (),
    guard: str | None = None,
    guard_factor: float | None = None,
    strict: bool = False,
    scope: str | None = None,
    depth: int | None = None,
    granularity: str = "sample",
    sync: str = "immediate",
    cache_dtype: str = "model",
    cache_device: str = "model",
    max_cache_bytes: int | None = None,
    stream: Stream | None = None,
    cuda_graphs: bool = False,
    group: "ProcessGroup | None" = None,
    **options: Any,
) -> Session | LanguageSession:
    """Make a pipeline's next generations reuse features between steps. Enabling again replaces what was enabled.

    Args:
        pipe: any diffusers pipeline with a transformer or UNet; or one that decodes masked tokens of text, which takes
            a method for that (see `diffusion-cache list languages`; default "prefix", which is exact) and its options,
            or a profile and which of its plans (see `planning.refinements`).
        policy, forecaster: names (see `diffusion-cache list policies`) or instances; default first_block and taylor.
            "select" is the system of that name. As the policy, also what `recommend` says, whole: its arguments, in
            place of which go those that are given beside it.
        corrector: what mends each forecast, by name (see `diffusion-cache list correctors`) or instance; None for
            nothing.
        method: instead of a policy, a published system by name (see `diffusion-cache list systems`) or instance; most
            plan from a profile at their own scope. An argument below that is also an option of the system (nfe) goes to
            the system.
        profile: instead of a policy, what was measured of this model and sampler: a Profile, its folder, the name of a
            shipped one ("dit-digits-ddim"), a repository, or ready-made figures ("published/magcache/flux-dev-28").
        speedup, min_psnr, nfe, plan: which of the profile's plans, one of the four, or none where it has a single plan:
            the best one that was at least so many times as fast where it was measured; the cheapest one whose PSNR (dB,
            against the uncached image) is at least that for 95% of prompts; the best one of at most so many computed
            steps; the one called so, or a Plan.
        target_reuse, speedup: of a named policy that decides by a threshold (teacache, first_block, …), with no
            profile: have it found, see `tune`. It is searched when the pipeline is first called, and once more for
            calls of other steps, sizes or guidance.
        ignore: fields in which the profile may differ from the pipeline. Differences in "model", "config", "layout",
            "weights", "lora", "scheduler" and "scheduler_config" refuse it, others are warned of.
        guard: the signal ("input_turn" or "input_l1") that a plan carries a band of, to watch each sample by: where it
            is more than guard_factor (default 10) times its spread above its mean, a step is computed that was to be
            reused, in place of the next one that was to be computed; with strict, beside it. The host waits for the
            signal at each step, as with adaptive policies.
        scope: "denoiser", "stack", "block", "branch" or "cut". None picks cut for UNets (block where their levels are
            no modules), stack for transformers, and denoiser for models with neither, or where policy or forecaster
            serves denoiser and not these.
        depth: for cuts, how many down and up blocks stay outside the cut; None for 1.
        granularity: with an adaptive policy or a guard, "sample" decides for every sample of a batch apart and computes
            only those that ask for it, so that an image does not depend on its neighbours (falling back, told once,
            where samples cannot be told apart); "batch" computes all if any asks.
        sync: with an adaptive policy or a guard, "immediate" has the host wait for each step's signal; "lagged" decides
            by that of the step before, which is on the host by then, at a loss of quality (README). The first steps,
            which have none, are computed; so is the one after a computed step, where the number of that one asks for it
            too.
        cache_dtype: what features are stored in: "model" for the model's own dtype; "fp8" (e4m3) or "int8" for one byte
            a number and a scale for each row of them, which takes half or a quarter of the memory and costs some
            quality; "int8-delta" or "fp8-delta" for the newest feature of each span as it is and each older one as its
            difference to the next newer one, in such codes. float64 and whole numbers are stored as they are.
        cache_device: where features are: "model" for the denoiser's device; "cpu" for host memory between the calls
            that use them, from which those of the next span are brought back while the device works.
        max_cache_bytes: the most that features may take, wherever they are; spans whose features would not fit are
            computed, told once.
        stream: for videos whose latent frames are denoised at noise levels of their own: how features of each are kept,
            and forecast from the levels that it had, `Stream()` or one with a capacity and sinks. With policies that
            look at no signals, and forecasters "taylor", "taylor_paper" or "reuse"; without correctors, "…-delta",
            cache_device="cpu" and max_cache_bytes.
        cuda_graphs: whether calls of the denoiser are captured, the second time that one like it is made (of the same
            pass and shapes, with the same spans reused), and repeated as a CUDA graph from then on, in this run and
            later ones; at most `engine.graphs.MAX_GRAPHS` of each denoiser, which keep their memory and that of all
            features until `disable`. For policies that look at no signals, forecasters that are weighted sums (not
            "rfc" or "frequency") and a denoiser that stays on one CUDA device; without unconditional_every, "…-delta",
            cache_device="cpu", max_cache_bytes and stream. What cannot be captured runs as usual, told once. Weights,
            modules and settings may change between runs, not inside of one.
        group: ranks that must decide alike because they meet in collectives inside the denoiser, each with as many
            samples: a call is computed if any of them asks for it. Needed where one shards it oneself (FSDP2 by
            `fully_shard`, tensor parallel). What diffusers' `enable_parallelism` shards is known without it, and plain
            data parallel needs none, as every sample is decided on by itself.
        options: fields of the policy, forecaster, corrector or system, and of `policies.Guards` (warmup, last, start,
            end, max_consecutive, max_reused, sigma_max, sigma_min, unconditional_every).

    Raises:
        ConfigError: unknown names or options, bad values, a scope the policy does not serve, a recommendation not to
            cache. Nothing has changed then.
        NoSpansError: nothing to cache at the scope.
    """
    defaults = {"forecaster": None, **(enable.__kwdefaults__ or {})}
    if isinstance(policy, Recommendation):
        given = locals()
        changed = {name: given[name] for name in defaults if given[name] != defaults[name]}
        return enable(pipe, **{**policy.arguments(), **changed, **options})
    how: dict[str, Any] = {
        "granularity": granularity,
        "sync": sync,
        "cache_dtype": cache_dtype,
        "cache_device": cache_device,
        "max_cache_bytes": max_cache_bytes,
        "stream": stream,
        "cuda_graphs": cuda_graphs,
    }
    parts: dict[str, Any] = {
        "policy": policy,
        "forecaster": forecaster,
        "corrector": corrector,
        "scope": scope,
        "depth": depth,
    }
    wish: dict[str, Any] = {"speedup": speedup, "min_psnr": min_psnr, "nfe": nfe, "plan": plan}
    watch = {"guard": guard, "guard_factor": guard_factor, "strict": strict or None}
    if serves(pipe):
        changed = {name: value for name, value in how.items() if value != defaults[name]}
        del wish["min_psnr"]
        refuse(
            {**parts, "min_psnr": min_psnr, "target_reuse": target_reuse, "group": group, **watch, **changed},
            lambda name, _: (
                f"{name} is for denoisers, and {type(pipe).__name__} decodes text: give a method, or a profile"
            ),
        )
        session = LanguageSession(resolve.language(pipe, method, profile, wish, ignore, options))
        session.attach_pipeline(pipe)
        return session
    if policy == Select.name:
        if method is not None:
            raise ConfigError(f"policy {policy!r} is a method of its own: give policy or method, not both")
        method, parts["policy"] = policy, None
    if method is not None:
        asked = {**parts, **wish, "target_reuse": target_reuse, **watch}
        own = {name: asked.pop(name) for name in resolve.system_fields(method) if asked.get(name) is not None}
        refuse(asked, lambda name, _: f"{name} comes from the method: give {name} or method, not both")
        return _attached(pipe, resolve.system(pipe, method, profile, ignore, how, {**options, **own}), group)
    if profile is not None or isinstance(plan, Plan):
        parts["target_reuse"] = target_reuse
        made = resolve.planned(pipe, find_denoisers(pipe), profile, parts, wish, watch, ignore, how, options)
        return _attached(pipe, made, group)
    target = wish.pop("speedup") if policy is not None else None
    refuse({**wish, "ignore": ignore or None, **watch}, needs_profile)
    made = resolve.method(policy, forecaster, scope, depth, how, options, corrector)
    tuner = None
    if target_reuse is not None or target is not None:
        tuner = _tuner(made, Target(target_reuse, target), group, options)
    return _attached(pipe, made, group, tuner)


def _attached(pipe: Any, method: Method, group: "ProcessGroup | None", tuner: Tuner | None = None) -> Session:
    session = Session(method, group, tuner=tuner)
    session.attach_pipeline(pipe)
    return session


def disable(pipe: Any) -> None:
    """Take the cache off: the pipeline, its modules and their classes are as they were. No-op if there is none."""
    session = session_of(pipe)
    if session is not None:
        session.detach_pipeline(pipe)


def _tuner(method: Method, target: Target, group: "ProcessGroup | None", options: Mapping[str, Any]) -> Tuner:
    tuner = Tuner(method, target)
    if tuner.field in options:
        raise ConfigError(f"{tuner.field} is what a target is met with: give {tuner.field}, target_reuse or speedup")
    if group is not None:
        raise ConfigError(
            "a target cannot be searched by a group of ranks: find the threshold on one (tune), and give it"
        )
    return tuner


def tune(
    pipe: Any,
    inputs: Mapping[str, Any],
    policy: str | Policy = DEFAULT_POLICY,
    forecaster: str | Forecaster = DEFAULT_FORECASTER,
    *,
    target_reuse: float | None = None,
    speedup: float | None = None,
    corrector: str | Corrector | None = None,
    scope: str | None = None,
    depth: int | None = None,
    granularity: str = "sample",
    sync: str = "immediate",
    **options: Any,
) -> Tuned:
    """The threshold (a policy's `tuned` field) at which a call reuses a share of its steps, or is so much faster.

    The call is made a few times for each value that is tried, with generators and latents of its own, so that the
    user's are left as they are; nothing is enabled by it. The nearest value is told on stderr, and kept for later in
    the platform's folder for caches by the fingerprint of the model, the sampler, the call's numbers and sizes, and the
    method; environment variable DIFFUSION_CACHE_FOLDER names another folder, or none.

    Args:
        inputs: arguments of a pipeline call.
        target_reuse: share of the steps to reuse, between 0 and 1; the guards keep some from being reused.
        speedup: of a whole call on this machine, uncached time over cached. Both are timed in turn, the latter with as
            much reused as can be; the share in between that is needed follows, as time falls in proportion to it.
        policy, forecaster, corrector, scope, depth, granularity, sync, options: as for `enable`.

    Returns:
        value, of the threshold, and reuse, the share of the steps that it reuses, with all that was tried:
        `enable(pipe, policy="teacache", threshold=tune(pipe, inputs, "teacache", target_reuse=0.5).value)`.

    Raises:
        ConfigError: as for `enable`; for a policy without a tuned field, a call of which nothing can be reused, a
            target beyond what the guards leave to reuse, and denoisers that ranks share.

    Warns where a policy goes from less than the target to more at once; the nearest is found then.
    """
    how = {"granularity": granularity, "sync": sync}
    method = resolve.method(policy, forecaster, scope, depth, how, options, corrector)
    tuner = _tuner(method, Target(target_reuse, speedup), None, options)
    given = dict(_by_name(inputs))
    with attached(pipe, method) as session:
        return tuner.tuned(session, pipe, (), given)


@contextlib.contextmanager
def cached(pipe: Any, *args: Any, **kwargs: Any) -> Iterator[Any]:
    """`enable` for the length of a with block; gives the pipeline. What was enabled before comes back."""
    before = session_of(pipe)
    enable(pipe, *args, **kwargs)
    try:
        yield pipe
    finally:
        disable(pipe)
        if before is not None:
            before.attach_pipeline(pipe)


def refresh(pipe: Any) -> None:
    """Within a call of an enabled pipeline, in a callback that changes the prompt, say: forget what is stored, so that
    the next step is computed.

    Raises:
        ConfigError: if the pipeline is not enabled, or not in a call.
    """
    session = session_of(pipe)
    found = [run for run in active_runs() if run.session is session and isinstance(run, CacheRun)]
    if session is None or not found:
        where = "is not enabled" if session is None else "is not in a call: refresh is for its callbacks"
        raise ConfigError(f"this {type(pipe).__name__} {where}")
    for run in found:
        run.refresh()


class Run:
    """One generation with a bare denoiser in the user's own loop; see `run`."""

    def __init__(self, session: Session, cache_run: CacheRun):
        self._session = session
        self._run = cache_run

    def next_step(self) -> None:
        """The next call of the denoiser belongs to the next step. For loops without a diffusers scheduler."""
        self._run.clock.next_step()

    def refresh(self) -> None:
        """Forget what is stored, so that the next call is computed: where conditions change in the middle of a run."""
        self._run.refresh()

    def chunks(self, numbers: Iterable[int]) -> None:
        """The next calls hold these chunks of the stream, in this order, counted from its start.

        Raises:
            ConfigError: if the run is none of a stream.
        """
        if self._session.method.stream is None:
            raise ConfigError("chunks are told to a stream: run(…, stream=Stream())")
        self._run.chunks = tuple(numbers)

    def summary(self) -> "Summary":
        """What has happened so far."""
        return summarise(self._run)


@contextlib.contextmanager
def run(
    model: nn.Module,
    policy: str | Policy | None = None,
    forecaster: str | Forecaster | None = None,
    *,
    corrector: str | Corrector | None = None,
    profile: "str | Path | Profile | None" = None,
    speedup: float | None = None,
    min_psnr: float | None = None,
    nfe: float | None = None,
    plan: "str | Plan | None" = None,
    ignore: Collection[str] = (),
    num_steps: int | None = None,
    noise_levels: Sequence[float] | None = None,
    scope: str | None = None,
    depth: int | None = None,
    granularity: str = "sample",
    sync: str = "immediate",
    cache_dtype: str = "model",
    cache_device: str = "model",
    max_cache_bytes: int | None = None,
    stream: Stream | None = None,
    cuda_graphs: bool = False,
    group: "ProcessGroup | None" = None,
    **options: Any,
) -> Iterator[Run]:
    """One generation of a bare denoiser, cached; gives a `Run`. Arguments and errors as for `enable`, which has more
    of them: method, target_reuse, guard and strict are for pipelines. For a loop with several denoisers, enter a run of
    each. A run belongs to the thread or task that it was entered in.

    A step ends with `step` of any diffusers scheduler, or with `run.next_step()`; where neither is called, a call
    at another timestep counts as the next step. With a stream, whose run it is, `run.chunks(numbers)` says before a
    call which chunks it holds. profile: of such a loop (`profiling.generation.Loop`), not of a pipeline. num_steps:
    needed by plans, and by policies that place their computed steps relative to the end. noise_levels: log-SNR
    log(α²/σ²) of each step, needed by policies and guards that go by it; forecasters that integrate like the sampler
    need `context.NoiseLevels`, which say in which variable. A plan takes them to be those of its profile where they are
    not given.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"run takes a bare denoiser, not {type(model).__name__}; for pipelines use enable")
    if num_steps is not None:
        check_count("num_steps", num_steps)
    levels = _noise_levels(noise_levels)
    if noise_levels is not None and num_steps is not None and len(levels) != num_steps:
        raise ConfigError(f"{len(levels)} noise_levels for {num_steps} steps: give one for each")
    how: dict[str, Any] = {
        "granularity": granularity,
        "sync": sync,
        "cache_dtype": cache_dtype,
        "cache_device": cache_device,
        "max_cache_bytes": max_cache_bytes,
        "stream": stream,
        "cuda_graphs": cuda_graphs,
    }
    parts = {"policy": policy, "forecaster": forecaster, "corrector": corrector, "scope": scope, "depth": depth}
    wish = {"speedup": speedup, "min_psnr": min_psnr, "nfe": nfe, "plan": plan}
    if profile is not None or isinstance(plan, Plan):
        method = resolve.planned(None, {"denoiser": model}, profile, parts, wish, {}, ignore, how, options)
    else:
        refuse({**wish, "ignore": ignore or None}, run_needs_profile)
        method = resolve.method(policy, forecaster, scope, depth, how, options, corrector, resolve.RUN_ARGUMENTS)
    session = Session(method, group)
    session.attach_model(model)
    cache_run = session.begin_model(num_steps, levels)
    enter(cache_run)
    try:
        yield Run(session, cache_run)
    finally:
        try:
            leave(cache_run, model)
        finally:
            session.detach_model()
            session.finish(cache_run)


def _noise_levels(given: Sequence[float] | None) -> NoiseLevels:
    """A run's noise levels as the engine takes them, from any sequence of numbers.

    Raises:
        ConfigError: for what is no sequence of numbers, or NaN.
    """
    if isinstance(given, NoiseLevels) or given is None:
        return given or NoiseLevels()
    try:
        levels = NoiseLevels(float(level) for level in given)
    except (TypeError, ValueError, RuntimeError):
        levels = NoiseLevels([math.nan])
    if isinstance(given, str) or any(map(math.isnan, levels)):
        raise ConfigError(f"noise_levels must be numbers (log-SNR), one a step, not {given!r}")
    return levels


def summary(pipe: Any) -> Summary | LanguageSummary:
    """What the pipeline's last generation did.

    Raises:
        ConfigError: if the cache is not enabled, or nothing was generated since.
    """
    session = session_of(pipe)
    if session is None:
        raise ConfigError("the cache is not enabled on this pipeline: call diffusion_cache.enable first")
    if session.last_run is None:
        raise ConfigError("nothing was generated since the cache was enabled: call the pipeline first")
    if isinstance(session, LanguageSession):
        return session.last_run.summary()
    return summarise(session.last_run)


def inspect(
    pipe: Any,
    inputs: Mapping[str, Any] | None = None,
    *,
    policy: str | Policy | None = None,
    forecaster: str | Forecaster = DEFAULT_FORECASTER,
    corrector: str | Corrector | None = None,
    scope: str | None = None,
    depth: int | None = None,
    **options: Any,
) -> Inspection:
    """Which spans were found, their sizes, and the bytes a cache would take.

    inputs: arguments of a pipeline call; two steps of it are run to measure the features, or as many as it says where
    the pipeline does not take num_inference_steps, or not two. Without them the sizes come from the last generation, if
    the cache is enabled at this scope. What is enabled stays enabled.
    policy: the one that is meant to be used: blocks that it always computes are no part of the spans, and features that
    it keeps count. None for a plain schedule. forecaster, corrector, scope, depth, options: as for `enable`.

    Raises:
        ConfigError, NoSpansError: as `enable`.
    """
    method = resolve.method(Interval(2) if policy is None else policy, forecaster, scope, depth, {}, options, corrector)
    layouts = {name: method.layout(denoiser) for name, denoiser in find_denoisers(pipe).items()}
    before = session_of(pipe)
    ran: CacheRun | None = None
    if inputs is not None:
        generators = [(generator, generator.get_state()) for generator in _generators(_by_name(inputs))]
        measuring = _Measuring(2, of=method.guarded.policy, alike=method.spans_alike)
        measured = replace(method, guarded=Guarded(measuring), corrector=None)
        try:
            ran = _tried(pipe, measured, inputs)
        finally:
            for generator, state in generators:
                generator.set_state(state)
    elif isinstance(before, Session):
        ran = before.last_run
    sizes = {} if ran is None else _seen(ran)
    if ran is not None:
        taken = {name: layout for name, layout in ran.layouts.items() if layout.apart is None or method.spans_alike}
        layouts = {name: _as_run(layout, taken.get(name, layout)) for name, layout in layouts.items()}
    spans = tuple(
        SpanInfo(denoiser, span.name, span.kind, len(span.members), span.parameters, sizes.get((denoiser, span.name)))
        for denoiser, layout in layouts.items()
        for span in layout.spans
    )
    return Inspection(type(pipe).__name__, spans, method.history)


def _as_run(found: Layout, ran: Layout) -> Layout:
    """A layout with the stacks as one span that were one in a run."""
    by_name = {span.name: span for span in found.spans}
    if (found.scope, ran.scope) != ("stack", "stack"):
        return found
    for span in ran.spans:
        if stacks := [by_name.pop(name) for name in span.name.split("+") if name in by_name]:
            members = tuple(member for stack in stacks for member in stack.members)
            by_name[span.name] = Span(span.name, span.kind, members)
    return replace(found, spans=tuple(by_name.values()))


def _tried(pipe: Any, method: Method, inputs: Mapping[str, Any]) -> CacheRun:
    """A call of two steps if the pipeline can make such.

    Callbacks are left out: nobody is to be told of a trial.
    """
    inputs = {name: value for name, value in inputs.items() if not name.startswith("callback")}

    def called(arguments: Mapping[str, Any]) -> CacheRun:
        with attached(pipe, method) as measuring, forked_rng():
            pipe(**arguments)
        assert measuring.last_run is not None
        return measuring.last_run

    if "num_inference_steps" in signature(type(pipe).__call__).parameters:
        with contextlib.suppress(Exception):  # some need more, and what is wrong with the call itself is told below
            return called({**inputs, "num_inference_steps": 2})
    return called(inputs)


def _seen(done: CacheRun) -> dict[tuple[str, str], int]:
    """Bytes of one feature of each span of the denoisers that a run has stored any of; 0 of those never stored."""
    ran = {denoiser for denoiser, _ in done.sizes}
    spans = [(name, span.name) for name, layout in done.layouts.items() if name in ran for span in layout.spans]
    return {**dict.fromkeys(spans, 0), **done.sizes}


@dataclass(frozen=True)
class _Measuring(Interval):
    """Computes and stores the first of two steps, in the spans of another policy."""

    of: Policy | None = None
    alike: bool = True

    @property
    def needs(self) -> Needs:
        return Needs() if self.of is None else replace(self.of.needs, signals=(), condition=False)

    @property
    def spans_alike(self) -> bool:
        return self.alike


def _by_name(inputs: Any) -> Mapping[str, Any]:
    if not isinstance(inputs, Mapping):
        raise ConfigError(f"inputs must be the arguments of a pipeline call by name, as a dict, not {inputs!r}")
    return inputs


def _generators(inputs: Mapping[str, Any]) -> list[torch.Generator]:
    values = [value for given in inputs.values() for value in (given if isinstance(given, list) else [given])]
    return [value for value in values if isinstance(value, torch.Generator)]
