"""The front doors: enable, disable, cached, run, summary, inspect."""

import contextlib
import dataclasses
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from . import published
from .chunks import Stream
from .context import SCOPES, Corrector, Forecaster, Needs, NoiseLevels, Policy
from .differences import DIFFERENCES
from .engine import CacheRun, Method, Session, StepRecord
from .engine.patches import ACTIVE
from .engine.session import session_of
from .engine.structure import forked_rng
from .errors import ConfigError
from .forecasters.fitted import UNFITTED, Fitted
from .language import LanguageCache, LanguageSession, LanguageSummary, serves
from .language import Planned as PlannedText
from .models import find_denoisers, unwrap
from .ops import CODES
from .plan import GUARD_SIGNALS, Plan
from .planning.choose import choose
from .planning.kept import Tuned
from .planning.target import Target, Tuner
from .policies import Drift, Guarded, Guards, Interval, Planned
from .policies.select import Select
from .profile import Profile, shipped_profiles
from .profiling.generation import attached
from .registry import Registry, check_options, suggest, unknown_name
from .registry import correctors as corrector_registry
from .registry import forecasters as forecaster_registry
from .registry import languages as language_registry
from .registry import policies as policy_registry
from .registry import systems as system_registry

if TYPE_CHECKING:
    from rich.table import Table
    from torch.distributed import ProcessGroup

    from .systems import System

T = TypeVar("T")

__all__ = [
    "Inspection",
    "Run",
    "SpanInfo",
    "Summary",
    "cached",
    "disable",
    "enable",
    "inspect",
    "run",
    "summary",
    "tune",
]

DEFAULT_POLICY, DEFAULT_FORECASTER = "first_block", "taylor"
PUBLISHED = "published/"
# how samples are decided on, and what features are stored in: options of the engine, whatever the policy
HOW = {
    "granularity": ("sample", "batch"),
    "sync": ("immediate", "lagged"),
    "cache_dtype": ("model", *CODES, *DIFFERENCES),
    "cache_device": ("model", "cpu"),
}
UNNAMED = ("max_cache_bytes", "stream", "cuda_graphs")  # others of the engine, which are no choice among names


def enable(
    pipe: Any,
    policy: str | Policy | None = None,
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
            "select" is the system of that name.
        corrector: what mends each forecast, by name (see `diffusion-cache list correctors`) or instance; None for
            nothing.
        method: instead of a policy, a published system by name (see `diffusion-cache list systems`) or instance; most
            plan from a profile at their own scope. Of the arguments below, it takes those that are its fields.
        profile: instead of a policy, what was measured of this model and sampler: a Profile, its folder, the name of a
            shipped one ("dit-digits-ddim"), a repository, or ready-made figures ("published/magcache/flux-dev-28").
        speedup, min_psnr, nfe, plan: which of the profile's plans: the best one with that measured speed; the cheapest
            one whose PSNR (dB, against the uncached image) is at least that for 95% of prompts; the best one of at
            most so many denoiser evaluations; the one called so, or a Plan.
        target_reuse, speedup: of a policy that decides by a threshold (teacache, first_block, …), with no profile: have
            it found, see `tune`. It is searched when the pipeline is first called, and once more for calls of other
            steps, sizes or guidance.
        ignore: fields in which the profile may differ from the pipeline ("scheduler", "weights", …).
        guard: the signal ("input_turn" or "input_l1") that a plan carries a band of, to watch each sample by: where it
            is more than guard_factor (default 10) times its spread above its mean, a step is computed that was to be
            reused, in place of the next one that was to be computed; with strict, beside it. The host waits for the
            signal at each step, as with adaptive policies.
        scope: "denoiser", "stack", "block", "branch" or "cut"; None picks cut for UNets and stack for transformers.
        depth: for cuts, how many down and up blocks stay outside the cut; None for 1.
        granularity: with an adaptive policy or a guard, "sample" decides for every sample of a batch apart and computes
            only those that ask for it, so that an image does not depend on its neighbours (falling back, told once,
            where samples cannot be told apart); "batch" computes all if any asks.
        sync: with an adaptive policy or a guard, "immediate" has the host wait for each step's signal; "lagged" decides
            by that of the step before, which is on the host by then. The first steps, which have none, are computed.
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
            look at no signals, and forecasters "taylor", "taylor_paper" or "reuse".
        cuda_graphs: whether calls of the denoiser are captured, the second time that one like it is made (of the same
            pass and shapes, with the same spans reused), and repeated as a CUDA graph from then on, in this run and
            later ones; at most `engine.graphs.MAX_GRAPHS` of each denoiser, which keep their memory and that of all
            features until `disable`. For policies that look at no signals and a denoiser that stays on one CUDA
            device. What cannot be captured runs as usual, told once. Weights, modules and settings may change between
            runs, not inside of one.
        group: ranks that must decide alike because they meet in collectives inside the denoiser, each with as many
            samples: a call is computed if any of them asks for it. Needed where one shards it oneself (FSDP, tensor
            parallel). What diffusers' `enable_parallelism` shards is known without it, and plain data parallel needs
            none, as every sample is decided on by itself.
        options: fields of the policy, forecaster, corrector or system, and of `policies.Guards` (warmup, last, start,
            end, max_consecutive, max_reused, sigma_max, sigma_min).

    Raises:
        ConfigError: unknown names or options, bad values, a scope the policy does not serve. Nothing has changed then.
        NoSpansError: nothing to cache at the scope.
    """
    how: dict[str, Any] = {"granularity": granularity, "sync": sync, "cache_dtype": cache_dtype}
    how |= {"cache_device": cache_device, "max_cache_bytes": max_cache_bytes, "stream": stream}
    how["cuda_graphs"] = cuda_graphs
    watch = {"guard": guard, "guard_factor": guard_factor, "strict": strict or None}
    if serves(pipe):
        defaults = enable.__kwdefaults__ or {}
        others: dict[str, Any] = {"policy": policy, "forecaster": forecaster, "corrector": corrector, "scope": scope}
        others |= {"min_psnr": min_psnr, "target_reuse": target_reuse, "depth": depth, "group": group, **watch}
        others |= {name: value for name, value in how.items() if value != defaults.get(name)}
        for name, value in others.items():
            if value is not None:
                raise ConfigError(
                    f"{name} is for denoisers, and {type(pipe).__name__} decodes text: give a method, or a profile"
                )
        return _language(pipe, method, profile, {"speedup": speedup, "nfe": nfe, "plan": plan}, ignore, options)
    if policy == Select.name:
        method, policy = policy, None
    if method is not None:
        wishes: dict[str, Any] = {"policy": policy, "forecaster": forecaster, "corrector": corrector, "scope": scope}
        wishes |= {"depth": depth, "speedup": speedup}
        fields = _fields(method)
        wishes |= {"min_psnr": min_psnr, "nfe": nfe, "plan": plan, "target_reuse": target_reuse, **watch}
        for name, given in wishes.items():
            if given is None:
                continue
            if name not in fields:
                raise ConfigError(f"{name} comes from the method: give {name} or method, not both")
            options[name] = given  # some systems have a field of that name
        made = _system(pipe, method, profile, ignore, how, options)
        return _attached(pipe, made, group)
    tuner = None
    wish: dict[str, Any] = {"speedup": speedup, "min_psnr": min_psnr, "nfe": nfe, "plan": plan}
    if isinstance(plan, Plan) and (speedup, min_psnr, nfe) != (None, None, None):
        raise ConfigError("speedup, min_psnr and nfe choose among a profile's plans, and this plan is given already")
    if profile is None and (ignore or not isinstance(plan, Plan)):
        target = None if policy is None else wish.pop("speedup")
        for name, value in {**wish, "ignore": ignore or None, **(watch if plan is None else {})}.items():
            if value is not None and not isinstance(value, Plan):
                raise ConfigError(f"{name} needs a profile: enable(pipe, profile=…, {name}={value!r})")
        chosen = DEFAULT_POLICY if policy is None else policy, DEFAULT_FORECASTER if forecaster is None else forecaster
        made = _method(*chosen, scope, depth, how, options, corrector)
        if target_reuse is not None or target is not None:
            tuner = _tuner(made, Target(target_reuse, target), group, options)
    else:
        own: dict[str, Any] = {"policy": policy, "forecaster": forecaster, "corrector": corrector, "scope": scope}
        own |= {"depth": depth, "target_reuse": target_reuse}
        for name, given in own.items():
            if given is not None:
                raise ConfigError(f"{name} comes from the profile: give {name} or profile, not both")
        made = _planned(pipe, profile, wish, watch, ignore, how, options)
    return _attached(pipe, made, group, tuner)


def _language(
    pipe: Any,
    method: Any,
    profile: "str | Path | Profile | None",
    wish: Mapping[str, Any],
    ignore: Collection[str],
    options: dict[str, Any],
) -> LanguageSession:
    if profile is not None:
        if method is not None:
            raise ConfigError("a method comes from the profile: give method or profile, not both")
        found = _profile(profile)
        found.check(pipe, {"model": pipe.model}, ignore)
        if not found.plans:
            raise ConfigError("the profile holds no plans: make some with planning.refinements.planned")
        given = wish["plan"]
        method = PlannedText(given if isinstance(given, Plan) else choose(found.plans, **wish))
    else:
        if isinstance(wish["plan"], Plan):
            method = PlannedText.name if method is None else method
            options["plan"], wish = wish["plan"], {**wish, "plan": None}
        for name, value in {**wish, "ignore": ignore or None}.items():
            if value is not None:
                raise ConfigError(f"{name} needs a profile: enable(pipe, profile=…, {name}={value!r})")
    built = _build(language_registry, "prefix" if method is None else method, LanguageCache, options)
    if options:
        name, known = next(iter(options)), [field.name for field in dataclasses.fields(built)]
        raise ConfigError(f"Unknown option {name!r} for language cache {built.name!r}. {suggest(name, known)}")
    session = LanguageSession(built)
    session.attach_pipeline(pipe)
    return session


def _attached(pipe: Any, method: Method, group: "ProcessGroup | None", tuner: Tuner | None = None) -> Session:
    session = Session(method, group, tuner=tuner)
    session.attach_pipeline(pipe)
    return session


def disable(pipe: Any) -> None:
    """Take the cache off: the pipeline, its modules and their classes are as they were. No-op if there is none."""
    session = _session(pipe)
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
        others: as for `enable`.

    Raises:
        ConfigError: as for `enable`; for a policy without a tuned field, a call of which nothing can be reused, and
            denoisers that ranks share.

    Warns where the target cannot be met; the nearest that can be is found then.
    """
    how = {"granularity": granularity, "sync": sync}
    method = _method(policy, forecaster, scope, depth, how, options, corrector)
    tuner = _tuner(method, Target(target_reuse, speedup), None, options)
    given = dict(_by_name(inputs))
    with attached(pipe, method) as session:
        return tuner.tuned(session, pipe, (), given)


@contextlib.contextmanager
def cached(pipe: Any, *args: Any, **kwargs: Any) -> Iterator[Any]:
    """`enable` for the length of a with block; gives the pipeline. What was enabled before comes back."""
    before = _session(pipe)
    enable(pipe, *args, **kwargs)
    try:
        yield pipe
    finally:
        disable(pipe)
        if before is not None:
            before.attach_pipeline(pipe)


class Run:
    """One generation with a bare denoiser in the user's own loop; see `run`."""

    def __init__(self, session: Session, cache_run: CacheRun):
        self._session = session
        self._run = cache_run

    def next_step(self) -> None:
        """The next call of the denoiser belongs to the next step. For loops without a diffusers scheduler."""
        self._run.clock.next_step()

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
        return _summarise(self._session, self._run)


@contextlib.contextmanager
def run(
    model: nn.Module,
    policy: str | Policy = DEFAULT_POLICY,
    forecaster: str | Forecaster = DEFAULT_FORECASTER,
    *,
    corrector: str | Corrector | None = None,
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
    """One generation of a bare denoiser, cached. Options and errors as for `enable`.

    A step ends with `step` of any diffusers scheduler, or with `run.next_step()`; where neither is called, a call
    at another timestep counts as the next step. With a stream, whose run it is, `run.chunks(numbers)` says before a
    call which chunks it holds. num_steps: needed by policies that place their computed steps
    relative to the end. noise_levels: log-SNR log(α²/σ²) of each step, needed by policies and guards that go by it;
    forecasters that integrate like the sampler need `context.NoiseLevels`, which say in which variable.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"run takes a bare denoiser, not {type(model).__name__}; for pipelines use enable")
    if num_steps is not None and (not isinstance(num_steps, int) or isinstance(num_steps, bool) or num_steps < 1):
        raise ConfigError(f"num_steps must be a whole number of at least 1, not {num_steps!r}")
    levels = _noise_levels(noise_levels)
    if noise_levels is not None and num_steps is not None and len(levels) != num_steps:
        raise ConfigError(f"{len(levels)} noise_levels for {num_steps} steps: give one for each")
    how: dict[str, Any] = {"granularity": granularity, "sync": sync, "cache_dtype": cache_dtype}
    how |= {"cache_device": cache_device, "max_cache_bytes": max_cache_bytes, "stream": stream}
    how["cuda_graphs"] = cuda_graphs
    method = _method(policy, forecaster, scope, depth, how, options, corrector)
    session = Session(method, group)
    session.attach_model(model)
    cache_run = session.begin_model(num_steps, levels)
    token = ACTIVE.set(cache_run)
    try:
        yield Run(session, cache_run)
    finally:
        ACTIVE.reset(token)
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


@dataclass(frozen=True)
class Summary:
    """What one generation did.

    spans: things cached, over all denoisers. computed, reused: denoiser calls in which any span was computed, or
    none. replayed: denoiser calls that a CUDA graph made. hit_rate: share of span calls that were reused. cache_bytes:
    the most bytes that features took, of which resident_bytes at most were on the denoiser's device at once. total:
    steps of the run, if known.
    """

    method: str
    scopes: tuple[str, ...]
    spans: int
    total: int | None
    records: tuple[StepRecord, ...]
    cache_bytes: int
    resident_bytes: int

    @property
    def computed(self) -> int:
        return sum(record.computed for record in self.records)

    @property
    def reused(self) -> int:
        return len(self.records) - self.computed

    @property
    def replayed(self) -> int:
        return sum(record.replayed for record in self.records)

    @property
    def hit_rate(self) -> float:
        visits = sum(record.spans for record in self.records)
        return sum(record.spans_reused for record in self.records) / visits if visits else 0.0

    @property
    def unfitted(self) -> int:
        """Reused calls that a plan has no fitted weights for: its own choice, or the run departs from the plan."""
        return sum(record.note == UNFITTED for record in self.records if record.spans_reused)

    @property
    def cache_mib(self) -> float:
        return self.cache_bytes / 2**20

    def __rich__(self) -> "Table":
        from rich.table import Table

        table = Table(title=f"{self.method}", caption=self._caption())
        table.add_column("pass")
        table.add_column("steps (█ computed, · reused)", overflow="fold")
        table.add_column("computed", justify="right")
        table.add_column("reasons to compute")
        for key in dict.fromkeys((record.denoiser, record.pass_name) for record in self.records):
            rows = [record for record in self.records if (record.denoiser, record.pass_name) == key]
            # what some samples ask for follows how many do: "1 of 4 samples: guard (…)"
            whys = (record.reason.rpartition(" samples: ")[2] for record in rows if record.computed)
            reasons = dict.fromkeys(why.split(" ")[0] for why in whys)
            strip = "".join("█" if row.spans_reused == 0 else "·" if not row.computed else "▒" for row in rows)
            computed = sum(row.computed for row in rows)
            table.add_row(" ".join(key), strip, f"{computed}/{len(rows)}", ", ".join(reasons))
        return table

    def _caption(self) -> str:
        return (
            f"{self.spans} span(s) at scope {'/'.join(self.scopes)}, "
            f"{self.computed} calls computed and {self.reused} reused, "
            f"hit rate {self.hit_rate:.0%}, cache {self.cache_mib:.2f} MiB"
            + f"; {self.replayed} calls by CUDA graphs" * bool(self.replayed)
            + (f"; {self.unfitted} of the reused forecast by Taylor, for want of fitted weights" * bool(self.unfitted))
        )

    def __str__(self) -> str:
        return _rendered(self)


def summary(pipe: Any) -> Summary | LanguageSummary:
    """What the pipeline's last generation did.

    Raises:
        ConfigError: if the cache is not enabled, or nothing was generated since.
    """
    session = _session(pipe)
    if session is None:
        raise ConfigError("the cache is not enabled on this pipeline: call diffusion_cache.enable first")
    if session.last_run is None:
        raise ConfigError("nothing was generated since the cache was enabled: call the pipeline first")
    if isinstance(session, LanguageSession):
        return session.last_run.summary()
    return _summarise(session, session.last_run)


@dataclass(frozen=True)
class SpanInfo:
    """One span. feature_bytes: of one stored feature over all passes, None until something was generated.

    Where the newest feature is stored otherwise than older ones ("int8-delta"), their mean.
    """

    denoiser: str
    name: str
    kind: str
    modules: int
    parameters: int
    feature_bytes: int | None


@dataclass(frozen=True)
class Inspection:
    """What a pipeline offers to cache. history: features kept per span and pass by the forecaster asked about."""

    pipeline: str
    spans: tuple[SpanInfo, ...]
    history: int

    @property
    def cache_bytes(self) -> int | None:
        """Bytes a cache of this many features would take, None if no feature has been seen."""
        if any(span.feature_bytes is None for span in self.spans):
            return None
        return self.history * sum(span.feature_bytes or 0 for span in self.spans)

    def __rich__(self) -> "Table":
        from rich.table import Table

        known = self.cache_bytes
        caption = (
            f"a cache of {self.history} feature(s) a span takes {known / 2**20:.2f} MiB"
            if known is not None
            else "bytes are known after a generation, or with inspect(pipe, inputs={…the pipeline's arguments…})"
        )
        table = Table(title=self.pipeline, caption=caption)
        for name in ("denoiser", "span", "kind"):
            table.add_column(name)
        for name in ("modules", "parameters", "feature KiB"):
            table.add_column(name, justify="right")
        for span in self.spans:
            size = "?" if span.feature_bytes is None else f"{span.feature_bytes / 1024:.1f}"
            table.add_row(span.denoiser, span.name, span.kind, str(span.modules), f"{span.parameters:,}", size)
        return table

    def __str__(self) -> str:
        return _rendered(self)


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

    inputs: arguments of a pipeline call; two steps of it are run to measure the features. Without them the sizes
    come from the last generation, if the cache is enabled at this scope. What is enabled stays enabled.
    policy: whose probe and tail blocks are no part of the spans, and which may ask for more features to be kept; None
    for one that does neither. options: fields of policy, forecaster and corrector.

    Raises:
        ConfigError, NoSpansError: as `enable`.
    """
    method = _method(Interval(2) if policy is None else policy, forecaster, scope, depth, {}, options, corrector)
    layouts = {name: method.layout(denoiser) for name, denoiser in find_denoisers(pipe).items()}
    before = _session(pipe)
    sizes: dict[str, int] = {}
    if inputs is not None:
        generators = [(generator, generator.get_state()) for generator in _generators(_by_name(inputs))]
        measured = replace(method, guarded=Guarded(_Measuring(2, of=method.guarded.policy)), corrector=None)
        try:
            with attached(pipe, measured) as measuring, forked_rng():
                pipe(**{**inputs, "num_inference_steps": 2})
        finally:
            for generator, state in generators:
                generator.set_state(state)
        assert measuring.last_run is not None
        sizes = measuring.last_run.sizes
    elif before is not None and before.last_run is not None:
        sizes = before.last_run.sizes
    spans = tuple(
        SpanInfo(denoiser, span.name, span.kind, len(span.members), span.parameters, sizes.get(span.name))
        for denoiser, layout in layouts.items()
        for span in layout.spans
    )
    return Inspection(type(pipe).__name__, spans, method.history)


@dataclass(frozen=True)
class _Measuring(Interval):
    """Computes and stores the first of two steps, in the spans of another policy."""

    of: Policy | None = None

    @property
    def needs(self) -> Needs:
        return Needs() if self.of is None else replace(self.of.needs, signals=(), condition=False)


def _by_name(inputs: Any) -> Mapping[str, Any]:
    if not isinstance(inputs, Mapping):
        raise ConfigError(f"inputs must be the arguments of a pipeline call by name, as a dict, not {inputs!r}")
    return inputs


def _generators(inputs: Mapping[str, Any]) -> list[torch.Generator]:
    values = [value for given in inputs.values() for value in (given if isinstance(given, list) else [given])]
    return [value for value in values if isinstance(value, torch.Generator)]


def _summarise(session: Session, cache_run: CacheRun) -> Summary:
    layouts = cache_run.layouts.values()
    return Summary(
        method=_described(replace(session.method, guarded=cache_run.decisions.guarded)),
        scopes=tuple(dict.fromkeys(layout.scope for layout in layouts)),
        spans=sum(len(layout.spans) for layout in layouts),
        total=cache_run.clock.total,
        records=tuple(cache_run.records),
        cache_bytes=cache_run.cache_bytes,
        resident_bytes=cache_run.resident_bytes,
    )


def _described(method: Method) -> str:
    policy = method.guarded.policy
    if not isinstance(policy, Planned):
        return str(method)
    plan = policy.plan
    drift = method.guarded.drift
    watched = f", watched by {drift.band.signal}" if drift is not None else ""
    return f"plan {plan.name!r}: {plan.nfe:.4g} evaluations in {plan.total} steps, on {plan.scope}{watched}"


def _rendered(shown: Any) -> str:
    from rich.console import Console

    console = Console(width=110)
    with console.capture() as capture:
        console.print(shown)
    return capture.get()


def _session(pipe: Any) -> Session | None:
    return session_of(pipe)


def _method(
    policy: str | Policy,
    forecaster: str | Forecaster,
    scope: str | None,
    depth: int | None,
    how: Mapping[str, Any],
    options: Mapping[str, Any],
    corrector: str | Corrector | None = None,
) -> Method:
    if scope is not None and scope not in SCOPES:
        raise ConfigError(f"Unknown scope {scope!r}. {suggest(scope, SCOPES)}")
    if depth is not None and (not isinstance(depth, int) or isinstance(depth, bool) or depth < 1):
        raise ConfigError(f"depth must be a whole number of at least 1, not {depth!r}")
    for name, chosen in how.items():
        if name in HOW and chosen not in HOW[name]:
            raise ConfigError(f"Unknown {name} {chosen!r}. {suggest(str(chosen), HOW[name])}")
    limit = how.get("max_cache_bytes")
    if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
        raise ConfigError(f"max_cache_bytes must be a whole number of at least 1, not {limit!r}")
    graphs = how.get("cuda_graphs", False)
    if not isinstance(graphs, bool):
        raise ConfigError(f"cuda_graphs must be True or False, not {graphs!r}")
    remaining = dict(options)
    stream = how.get("stream")
    if stream is not None and not isinstance(stream, Stream):
        raise ConfigError(f"stream takes a diffusion_cache.Stream(…), not {stream!r}")
    guards = _construct("guards", Guards, _take(remaining, [field.name for field in dataclasses.fields(Guards)]))
    built_policy = _build(policy_registry, policy, Policy, remaining)
    built_forecaster = _build(forecaster_registry, forecaster, Forecaster, remaining)
    # by its name, a corrector shares options with the policy: both may go by one model's ratios
    own = dict(options) if isinstance(corrector, str) else remaining
    built_corrector = None if corrector is None else _build(corrector_registry, corrector, Corrector, own)
    remaining = {name: value for name, value in remaining.items() if name in own}
    if remaining:
        parts = {"policy": built_policy, "forecaster": built_forecaster, "corrector": built_corrector}
        parts = {kind: part for kind, part in parts.items() if part is not None}
        named = ", ".join(f"{kind} {part.name!r}" for kind, part in parts.items())
        known = [field.name for part in (*parts.values(), guards) for field in dataclasses.fields(part)]
        name = next(iter(remaining))
        raise ConfigError(
            f"Unknown option {name!r} for {named}. "
            f"{suggest(name, [*known, 'corrector', 'scope', 'depth', *HOW, *UNNAMED, 'group'])}"
        )
    return Method(Guarded(built_policy, guards), built_forecaster, scope, depth, corrector=built_corrector, **how)


def _planned(
    pipe: Any,
    profile: "str | Path | Profile | None",
    wish: Mapping[str, Any],
    watch: Mapping[str, Any],
    ignore: Collection[str],
    how: Mapping[str, Any],
    options: Mapping[str, Any],
) -> Method:
    """The method that a profile's plan, or a plan itself, stands for."""
    if options.get("unconditional_every", 1) != 1:
        raise ConfigError("unconditional_every is for policies: a plan says itself when each pass is computed")
    denoisers = find_denoisers(pipe)
    if isinstance(profile, str) and profile.startswith(PUBLISHED):
        return _published(profile, denoisers, {**wish, **watch, "ignore": ignore or None}, how, options)
    plan = wish["plan"]
    if profile is not None:
        found, how = _checked(profile, pipe, denoisers, ignore, how)
        if not isinstance(plan, Plan):
            plan = choose(found.plans, **wish)
    method = _method(Planned(plan), Fitted.of(plan), plan.scope, plan.depth, how, options)
    return dataclasses.replace(method, guarded=dataclasses.replace(method.guarded, drift=_drift(plan, **watch)))


def _drift(plan: Plan, guard: str | None, guard_factor: float | None, strict: bool | None) -> Drift | None:
    """What a plan's runs are watched by, if they are to be."""
    if guard is None:
        for name, given in {"guard_factor": guard_factor, "strict": strict}.items():
            if given is not None:
                raise ConfigError(f"{name} says how a guard works: name its signal too, guard={GUARD_SIGNALS[0]!r}")
        return None
    if guard not in GUARD_SIGNALS:
        raise unknown_name("guard signal", guard, GUARD_SIGNALS)
    if plan.guard is None or plan.guard.signal != guard:
        carried = f"carries no guard {guard!r}" + (f", but {plan.guard.signal!r}" if plan.guard is not None else "")
        raise ConfigError(
            f"plan {plan.name!r} {carried}: `diffusion-cache plan --guard {guard}` makes plans that do, and "
            "planning.band.with_guard measures it for one that is there"
        )
    return Drift(plan.guard, Drift.factor if guard_factor is None else guard_factor, bool(strict))


def _fields(system: Any) -> set[str]:
    """The options of a published system."""
    cls = system_registry.get(system) if isinstance(system, str) else type(system)
    return {field.name for field in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else set()


def _system(
    pipe: Any,
    system: Any,
    profile: "str | Path | Profile | None",
    ignore: Collection[str],
    how: Mapping[str, Any],
    options: Mapping[str, Any],
) -> Method:
    """The method that a published system stands for, on this pipeline."""
    from .systems import System

    denoisers = find_denoisers(pipe)
    remaining = dict(options)
    built = _build(system_registry, system, System, remaining)
    guards = [field.name for field in dataclasses.fields(Guards)]
    for name in remaining:
        if name not in guards:
            known = [
                *(field.name for field in dataclasses.fields(built)),
                *guards,
                "profile",
                "ignore",
                *HOW,
                *UNNAMED,
            ]
            raise ConfigError(f"Unknown option {name!r} for system {built.name!r}. {suggest(name, known)}")
    found = None
    if profile is None and ignore:
        raise ConfigError(f"ignore needs a profile: enable(pipe, method={built.name!r}, profile=…, ignore={ignore!r})")
    if profile is not None:
        found, how = _checked(profile, pipe, denoisers, ignore, how)
    parts = built.made_for(denoisers, found)
    return _method(parts.policy, parts.forecaster, parts.scope, parts.depth, how, remaining)


def _published(
    name: str,
    denoisers: Mapping[str, nn.Module],
    wish: Mapping[str, Any],
    how: Mapping[str, Any],
    options: Mapping[str, Any],
) -> Method:
    for key, value in wish.items():
        if value is not None:
            raise ConfigError(f"{name} is a ready-made method, for which {key} says nothing: leave it out")
    entry = published.load(name)
    classes = [type(unwrap(denoiser)).__name__ for denoiser in denoisers.values()]
    if entry.transformer is not None and entry.transformer not in classes:
        raise ConfigError(f"{name} is for {entry.transformer}, and this pipeline has {', '.join(classes)}")
    driven = entry.driven()
    forecaster = driven.forecaster or DEFAULT_FORECASTER
    return _method(driven.policy, forecaster, driven.scope, None, how, {**driven.options, **options})


def _checked(
    given: "str | Path | Profile",
    pipe: Any,
    denoisers: Mapping[str, nn.Module],
    ignore: Collection[str],
    how: Mapping[str, Any],
) -> tuple[Profile, dict[str, Any]]:
    """A profile that matches the pipeline, and `how` with the guidance that calls are expected to have."""
    found = _profile(given)
    found.check(pipe, denoisers, ignore)
    return found, {**how, "guidance": None if "guidance" in ignore else found.fingerprint.guidance}


def _profile(given: "str | Path | Profile") -> Profile:
    """A profile, or the one in a folder, of a shipped name or in a repository."""
    if isinstance(given, Profile):
        return given
    if not isinstance(given, (str, Path)):
        raise ConfigError(f"profile must be a Profile, its folder, a shipped name or a repository, not {given!r}")
    return Profile.from_pretrained(given if Path(given).exists() else shipped_profiles().get(str(given), given))


def _build(registry: Registry[Any], given: Any, kind: type, options: dict[str, Any]) -> Any:
    """An instance from a name and those of the options that are its fields, which are taken out."""
    if isinstance(given, kind):
        if not dataclasses.is_dataclass(given):
            raise ConfigError(f"{registry.kind}: {type(given).__name__} must be a frozen dataclass")
        fields = {field.name: getattr(given, field.name) for field in dataclasses.fields(given)}
        for name in fields:
            if name in options:
                raise ConfigError(f"{name!r} belongs to the {registry.kind}, which is an instance: set it there")
        check_options(f"{registry.kind} {type(given).__name__}", type(given), fields)
        return given
    if not isinstance(given, str):
        raise ConfigError(f"{registry.kind} must be a name or an instance, not {given!r}")
    cls = registry.get(given)
    built = _construct(f"{registry.kind} {given!r}", cls, _take(options, list(registry.options(given))))
    if not isinstance(built, kind):
        home = kind.__module__.removeprefix("diffusion_cache.")
        raise ConfigError(f"{registry.kind} {given!r}: {cls.__name__} must be a subclass of {home}.{kind.__name__}")
    return built


def _construct(what: str, cls: type[T], options: dict[str, Any]) -> T:
    check_options(what, cls, options)
    try:
        return cls(**options)
    except TypeError as error:  # a missing option, or a method that lacks its abstract parts
        raise ConfigError(f"{what}: {error}") from error


def _take(options: dict[str, Any], names: list[str]) -> dict[str, Any]:
    return {name: options.pop(name) for name in names if name in options}
