"""`diffusion-cache plan`: plans for a profiled pipeline, to a speed, a number of evaluations or a quality."""

import hashlib
import inspect
import json
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import OmegaConf
from rich.console import Console
from rich.markup import escape

from .. import reference
from ..context import SCOPES
from ..errors import ConfigError, DiffusionCacheWarning
from ..evaluation.prompts import BUILTIN, FITTING_SEEDS, Sample, read_prompts
from ..evaluation.subjects import Pretrained, Shipped, Subject, quieten_libraries
from ..fingerprint import DenoiserFacts, Fingerprint
from ..models import find_denoisers
from ..plain import plain_json
from ..plan import Plan
from ..planning import guarantee
from ..planning.build import Planner, Search, check_scopes, evaluations
from ..planning.choose import choose
from ..planning.selector import STORED
from ..profile import JSON_FILE, Profile, folder_of
from ..profiling.generation import Batch, Teacher, teach
from ..reference.models import scheduler
from ..registry import unknown_name
from ..schedule import distinct
from .progress import announcing
from .show import print_plans

FITTED, TUNED, HELD_OUT = (FITTING_SEEDS + offset for offset in (10_000, 20_000, 30_000))
MOST_SAMPLES = 10_000  # of one kind: its seeds end where the next one's begin
ROUNDING = 1e-9
LADDER = 0.87  # each rung computes so much of the one above: at most 15% more than the cheapest that would do
TRIES = 4
Progress = Callable[[str, int, int], None]
Prompt = TypeVar("Prompt")


@dataclass(frozen=True)
class Wishes:
    """What plans are asked for: one of the three."""

    speedups: tuple[float, ...] = ()
    nfes: tuple[float, ...] = ()
    min_psnr: float | None = None

    def __post_init__(self) -> None:
        given = [name for name, value in vars(self).items() if value not in ((), None)]
        if len(given) != 1:
            raise ConfigError("say what the plans are for with one of --speedup 2,3, --nfe 25,17 or --min-psnr 30")
        if not all(math.isfinite(value) and value > 0 for value in (*self.speedups, *self.nfes)):
            raise ConfigError("--speedup and --nfe take numbers above 0, with commas between them")
        if self.min_psnr is not None and not math.isfinite(self.min_psnr):
            raise ConfigError(f"--min-psnr takes a number of decibels, not {self.min_psnr}")


@dataclass(frozen=True)
class Settings:
    """How plans are made. fitting, tuning, held_out: samples; the first two are generated in one call each.

    batch: held-out samples in one call. scopes: tried for each plan, () for the profile's. guard: see `Search`.
    prompts: a file, for models that take text; column: of it, if it is a table. device, offload, call: of a pipeline
    that is no shipped model; call: where not as in the profile.
    """

    runs: int = 60
    fitting: int = 32
    tuning: int = 16
    held_out: int = 64
    batch: int = 8
    last: int = 0
    scopes: tuple[str, ...] = ()
    guard: str | None = None
    prompts: Path | None = None
    column: str = "prompt"
    device: str = "auto"
    offload: str = "none"
    call: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, least in {"runs": 1, "fitting": 2, "tuning": 1, "held_out": 1, "batch": 1, "last": 0}.items():
            value = getattr(self, name)
            if not least <= value <= MOST_SAMPLES:
                raise ConfigError(f"--{name.replace('_', '-')} must be {least} to {MOST_SAMPLES}, not {value}")
        for scope in self.scopes:
            if scope not in SCOPES:
                raise unknown_name("scope", scope, SCOPES)


def make_plans(
    folder: Path, model: str | None, wishes: Wishes, settings: Settings, out: Path | None, console: Console
) -> Profile:
    """Make plans, store them with the profile in `out` (its own folder where None) one by one, and print them.

    A plan that is there already, made by the same settings from the same samples, is not made again; another one of
    the same name is replaced.

    Raises:
        ConfigError: for a profile that is not of this model, a wish that cannot be fulfilled, and an `out` that holds
            what `select` has learned.
    """
    quieten_libraries()
    needed = guarantee.needed()
    if settings.held_out < needed:
        told = f"{settings.held_out} held-out samples cannot show what 95% of prompts reach; it takes {needed}"
        if wishes.min_psnr is not None:
            raise ConfigError(f"{told}: give --held-out {needed} or more")
        console.print(f"{told}. These plans cannot be chosen by min_psnr.", soft_wrap=True)
    shipped, folder = not folder.is_dir(), folder_of(folder)
    if shipped and out is None:
        raise ConfigError(f"{folder.name} comes with the package: say where to store it with its plans, --out FOLDER")
    profile = Profile.load(folder)
    out = folder if out is None else out
    stored = stored_in(out, profile)
    if stored is not None and out.resolve() != folder.resolve():
        if stored.facts.get(STORED) != profile.facts.get(STORED):  # scores go with the plans that they are of
            raise ConfigError(
                f"{out} and {folder} differ in what `diffusion-cache select` has learned, which would be lost: give "
                "--out another folder"
            )
        profile = profile.with_plans(stored.plans)
    check_scopes(profile, settings.scopes)  # before anything is generated
    for nfe in wishes.nfes:
        if nfe >= profile.total:
            raise ConfigError(
                f"a run of this profile takes {profile.total} denoiser evaluations without a cache, and nothing is "
                f"reused in {nfe:g}: ask for fewer with --nfe"
            )
        scopes = settings.scopes or (None,)
        if min(evaluations(profile, max(1, settings.last), scope) for scope in scopes) > nfe + ROUNDING:
            raise _too_few(profile, nfe, scopes, max(1, settings.last))
    source = source_of(profile, model, settings)
    profile.check(source.pipe, find_denoisers(source.pipe))
    with announcing(console, "plan") as progress:
        work = _Work(profile, _planner(profile, source, settings, progress), out, progress)
        if wishes.speedups:
            chosen = [work.faster_than(speedup) for speedup in wishes.speedups]
        elif wishes.nfes:
            chosen = [work.at_most(nfe) for nfe in wishes.nfes]
        else:
            assert wishes.min_psnr is not None
            chosen = [work.as_good_as(wishes.min_psnr)]
    print_plans(work.profile.plans, console)
    for plan in dict.fromkeys(chosen):
        console.print(f"{escape(str(out))}: {escape(_told(plan))}", soft_wrap=True)
    return work.profile


def _too_few(profile: Profile, nfe: float, scopes: Sequence[str | None], least: int) -> ConfigError:
    """That no plan which computes at least so many steps takes so few evaluations at any scope."""
    fewest = min(evaluations(profile, least, scope) for scope in scopes)
    other = _other_scope(profile, scopes)
    return ConfigError(f"no plan takes {nfe:g} denoiser evaluations or fewer; the least is {fewest:.4g}{other}")


def _other_scope(profile: Profile, scopes: Sequence[str | None]) -> str:
    if "denoiser" in scopes or (None in scopes and profile.scope == "denoiser"):
        return ""
    return ". With --scope denoiser a reused step costs none"


def stored_in(out: Path, profile: Profile) -> Profile | None:
    """The profile that is in a folder already, if there is one.

    Raises:
        ConfigError: where it is of something else than the given one, or was measured otherwise.
    """
    if not (out / JSON_FILE).is_file():
        return None
    stored = Profile.load(out)
    if stored.fingerprint != profile.fingerprint:
        raise ConfigError(f"{out} holds a profile of something else: choose another folder with --out")
    if _measured(stored) != _measured(profile):
        raise ConfigError(
            f"{out} holds a profile of the same model that was measured otherwise (scope, samples or options), which "
            "would be lost: choose another folder with --out"
        )
    return stored


def _measured(profile: Profile) -> tuple[Any, ...]:
    """What tells one profile of a model from another."""
    return profile.scope, profile.depth, profile.samples, profile.facts.get("key")


def _told(plan: Plan) -> str:
    assert plan.quality is not None
    assert plan.speed is not None
    prompts = f" of {plan.held_out_prompts} prompts" if plan.held_out_prompts is not None else ""
    return (
        f"{plan.name} computes {plan.nfe:.4g} of {plan.total}, {plan.speed.ratio:.2f}× as fast, "
        f"{plan.quality.mean:.1f} dB, and {plan.quality.p5:.1f} dB or more for 95% of {plan.quality.n} held-out samples"
        f"{prompts}"
    )


class _Work:
    """The plans so far, stored after each."""

    def __init__(self, profile: Profile, planner: Planner, out: Path, progress: Progress):
        self.profile, self.planner, self.out, self.progress = profile, planner, out, progress
        self._timed: dict[int, dict[str | None, float]] = {}

    @property
    def least(self) -> int:
        """The fewest steps that a plan can compute."""
        return self.planner.least

    def plan(self, computed: int, scopes: Sequence[str | None] = ()) -> Plan:
        """scopes: of those that are tried, what it may cache; () for all."""
        name = f"nfe-{computed}"
        known = {plan.name: plan for plan in self.profile.plans}
        if name in known and self.planner.made(known[name]) and known[name].scope in self._scope_names(scopes):
            self.progress(f"{name} is there already", 0, 0)
            plan = self.planner.timed_here(known[name])
            if plan is known[name]:
                return plan
        else:
            plan = self.planner.plan(computed, name, scopes)
        self.profile = self.profile.with_plan(plan)
        self.profile.save(self.out)
        self.progress(_told(plan), 0, 0)
        return plan

    def at_most(self, nfe: float) -> Plan:
        """The best plan of at most so many evaluations: of the scopes, those that leave most steps to compute."""
        planner = self.planner
        for computed in range(planner.steps, self.least - 1, -1):
            fitting = [scope for scope in planner.scopes if planner.nfe(computed, scope) <= nfe + ROUNDING]
            if fitting:
                return self.plan(computed, fitting)
        raise _too_few(self.profile, nfe, planner.scopes, self.least)

    def _scope_names(self, scopes: Sequence[str | None]) -> set[str]:
        return {scope or self.profile.scope for scope in scopes or self.planner.scopes}

    def faster_than(self, speedup: float) -> Plan:
        """The plan that computes most of those that are measured to be as fast.

        Speed depends on how many steps are computed, not on which: that number is found first.
        """
        computed, tried = self._count(speedup), []
        for _ in range(TRIES):
            ratios = self._speeds(computed)
            fast = [scope for scope, ratio in ratios.items() if ratio >= speedup]
            plan = self.plan(computed, fast or [max(ratios, key=lambda scope: ratios[scope])])
            tried.append(plan)
            assert plan.speed is not None
            if plan.speed.ratio >= speedup:
                return plan
            if computed == self.least:
                break
            computed = max(self.least, min(computed - 1, self._fitting_count(speedup, computed, plan.speed.ratio)))
        raise self._too_fast(speedup, max(plan.speed.ratio for plan in tried if plan.speed is not None))

    def _count(self, speedup: float) -> int:
        """The most computed steps that are as fast, by a short search."""
        steps = self.planner.steps
        computed = min(steps, max(self.least, math.floor(steps / speedup + 1e-9)))
        fast, slow = self.least - 1, steps + 1  # the most known to be fast enough, the fewest known not to be
        for _ in range(TRIES):
            ratio = self._speed(computed)
            if ratio >= speedup:
                fast = computed
            else:
                slow = computed
            if slow - fast <= 1:
                break
            computed = min(max(self._fitting_count(speedup, computed, ratio), fast + 1), slow - 1)
        if fast < self.least:
            ratio = self._speed(self.least)
            if ratio < speedup:
                raise self._too_fast(speedup, ratio)
            fast = self.least
        return fast

    def _fitting_count(self, speedup: float, computed: int, ratio: float) -> int:
        """How many computed steps would be as fast, were the cost of a reused one what this measurement says."""
        steps = self.planner.steps
        if computed == steps:
            return computed - 1
        reused = min(max((steps / ratio - computed) / (steps - computed), 0.0), 0.99)
        return math.floor((steps / speedup - reused * steps) / (1 - reused) + 1e-9)

    def _speed(self, computed: int) -> float:
        return max(self._speeds(computed).values())

    def _speeds(self, computed: int) -> dict[str | None, float]:
        """Of plans with so many computed steps, at each scope."""
        if computed not in self._timed:
            self.progress(f"timing {computed} computed steps", 0, 1)
            scopes = self.planner.scopes
            self._timed[computed] = {scope: self.planner.timed(computed, scope).ratio for scope in scopes}
        return self._timed[computed]

    def _too_fast(self, speedup: float, reached: float) -> ConfigError:
        fastest = max([reached, *(plan.speed.ratio for plan in self.profile.plans if plan.speed is not None)])
        return ConfigError(
            f"no plan is {speedup:g}× as fast here; the fastest reached is {fastest:.2f}×, with {self.least} of "
            f"{self.planner.steps} steps computed. Ask for less{_other_scope(self.profile, self.planner.scopes)}"
        )

    def as_good_as(self, target: float) -> Plan:
        """The cheapest plan that holds the target: plans are made from expensive to cheap, until one does not."""
        for computed in _ladder(self.planner.steps, self.least):
            plan = self.plan(computed)
            assert plan.quality is not None
            if not guarantee.holds(plan.quality.values, target):
                break
        return choose(self.profile.plans, min_psnr=target)


def _ladder(steps: int, least: int) -> Iterator[int]:
    """Numbers of computed steps, falling."""
    computed = steps
    while computed > least:
        computed = max(least, min(computed - 1, math.ceil(computed * LADDER)))
        yield computed


@dataclass(frozen=True)
class Source:
    """Where samples come from. make: a batch of them, each a prompt and a seed.

    classes: the prompts are all that there are. call: arguments of each call, beside prompts and seeds.
    """

    pipe: Any
    prompts: Sequence[str | int]
    make: Callable[[Sequence[Sample]], Batch]
    classes: bool
    call: Mapping[str, Any]

    def parts(self, counts: Sequence[int]) -> list[Sequence[str | int]]:
        """The prompts for so many samples of each kind: of text, no kind has one that another has.

        Raises:
            ConfigError: for fewer prompts than kinds.
        """
        return [self.prompts] * len(counts) if self.classes else shared_out(self.prompts, counts)

    def profiled_first(self, profile: Profile) -> "Source":
        """With the texts that a profile was measured on first, so that none is held out where there are enough."""
        if self.classes:
            return self
        profiled = {prompt for prompt, _ in profile.samples}
        return replace(self, prompts=sorted(self.prompts, key=lambda prompt: prompt not in profiled))


def texts_beside(profile: Profile, samples: Sequence[Sample]) -> int:
    """How many different texts the samples are of that the profile was not measured on."""
    return len({sample.prompt for sample in samples} - {prompt for prompt, _ in profile.samples})


def shared_out(prompts: Sequence[Prompt], counts: Sequence[int]) -> list[Sequence[Prompt]]:
    """The prompts for so many samples of each kind, in order, none in two of them.

    Raises:
        ConfigError: for fewer prompts than kinds.
    """
    if len(prompts) < len(counts):
        raise ConfigError(f"{len(prompts)} prompts are too few: give at least {len(counts)} with --prompts")
    shares = list(accumulate(counts, initial=0))
    ends = distinct([len(prompts) * share / shares[-1] for share in shares[:-1]], len(prompts))
    return [prompts[first:end] for first, end in zip(ends, [*ends[1:], len(prompts)], strict=True)]


def _planner(profile: Profile, source: Source, settings: Settings, progress: Progress) -> Planner:
    search = Search(runs=settings.runs, scopes=settings.scopes, last=settings.last, guard=settings.guard)
    taken = {seed for _, seed in profile.samples}
    source = source.profiled_first(profile)
    counts = {FITTED: settings.fitting, TUNED: settings.tuning, HELD_OUT: settings.held_out}
    drawn: dict[int, list[Sample]] = {}
    for (first, count), prompts in zip(counts.items(), source.parts(list(counts.values())), strict=True):
        seeds = [seed for seed in range(first, first + MOST_SAMPLES) if seed not in taken][:count]
        drawn[first] = [Sample(i, prompts[i % len(prompts)], seed) for i, seed in enumerate(seeds)]
    held_out = drawn[HELD_OUT]
    different = texts_beside(profile, held_out)
    if not source.classes and different < len(held_out):
        warnings.warn(
            f"the {len(held_out)} held-out samples are of {different} prompts beside the profile's, so that what plans "
            "state is of other seeds of the same more than of other prompts: give more prompts with --prompts",
            DiffusionCacheWarning,
            stacklevel=2,
        )
    # speed is measured on the last batch: a whole one
    odd = len(held_out) % settings.batch
    parts = [held_out[:odd]] if odd else []
    parts += [held_out[i : i + settings.batch] for i in range(odd, len(held_out), settings.batch)]
    samples = [drawn[FITTED], drawn[TUNED], *parts]
    teachers: list[Teacher] = []
    for number, part in enumerate(samples):
        progress("uncached runs", number, len(samples))
        teachers.append(teach(source.make(part)))
    seeds = [sample.seed for sample in held_out]
    asked = [(sample.prompt, sample.seed) for kind in drawn.values() for sample in kind]
    origin = hashlib.sha256(json.dumps([asked, plain_json(source.call)]).encode()).hexdigest()[:16]
    texts = None if source.classes else different
    fitted = () if source.classes else {str(sample.prompt) for sample in (*drawn[FITTED], *drawn[TUNED])}
    return Planner(profile, teachers[0], teachers[1], teachers[2:], seeds, search, progress, origin, texts, fitted)


def source_of(profile: Profile, model: str | None, settings: Settings) -> Source:
    """The pipeline that a profile is of, and what it is asked to generate."""
    steps = profile.total
    subject: Subject
    extra: dict[str, Any] = {}
    if model is None:
        model = _shipped_model(profile.fingerprint)
    if model in reference.MODELS:
        subject = _shipped(profile.fingerprint, model, settings)
    elif Path(model).is_dir() or "/" in model:
        subject = _pretrained(profile, model, settings)
        guidance = profile.fingerprint.guidance
        parameters = inspect.signature(type(subject.pipe).__call__).parameters
        if guidance is not None and "guidance_scale" in parameters:
            extra["guidance_scale"] = guidance
    else:
        raise unknown_name("model", model, list(reference.MODELS))
    prompts: Sequence[str | int] = list(range(10))
    if subject.classes:
        if settings.prompts is not None:
            raise ConfigError("this model takes classes and no text, so that there is no use for --prompts")
    else:
        listed = BUILTIN["motion" if subject.video else "short"]
        given = read_prompts(settings.prompts, settings.column) if settings.prompts else listed
        prompts = [*dict.fromkeys(given)]  # one text twice would be fitted on and held out

    def make(samples: Sequence[Sample]) -> Batch:
        def call() -> Any:
            return subject.pipe(**{**extra, **subject.inputs(samples, steps)})

        return Batch(subject.pipe, call, subject.images, len(samples))

    call = {**extra, **_profiled(profile, "model", "call"), **settings.call}
    return Source(subject.pipe, prompts, make, bool(subject.classes), call)


def _shipped_model(fingerprint: Fingerprint) -> str:
    """The shipped model that a profile is of."""
    for name, spec in reference.MODELS.items():
        facts = fingerprint.denoisers.get(spec.denoiser)
        if facts is not None and spec.pipeline == fingerprint.pipeline:
            own = DenoiserFacts.of(reference.denoiser(name))
            if (own.class_name, own.layout) == (facts.class_name, facts.layout):
                return name
    raise ConfigError("this profile is of no shipped model: name its folder or repository with --model")


def _shipped(fingerprint: Fingerprint, name: str, settings: Settings) -> Subject:
    for option in ("prompts", "column", "call", "device", "offload"):
        if getattr(settings, option) != getattr(Settings(), option):
            raise ConfigError(f"{name} is a shipped model, which takes no --{option}")
    spec = reference.spec(name)
    samplers = [s for s in spec.samplers if type(scheduler(spec, s)).__name__ == fingerprint.scheduler]
    return Shipped(name, samplers[0] if samplers else None)  # a profile of another sampler is refused by its `check`


def _pretrained(profile: Profile, model: str, settings: Settings) -> Subject:
    """The pipeline, loaded as the profile's was, with its sampler."""
    if settings.prompts is None and settings.column != Settings().column:
        raise ConfigError("--column names a column of the table in --prompts: give that too, or leave --column out")
    fingerprint, loaded = profile.fingerprint, _profiled(profile, "model")
    dtypes = {facts.dtype for facts in fingerprint.denoisers.values()}
    variant = loaded.get("variant")
    if variant and Path(model).is_dir() and not any(Path(model).rglob(f"*.{variant}*")):
        variant = None  # a copy that was saved without
    options = {
        "repository": model,
        "steps": profile.total,
        "device": settings.device,
        "dtype": loaded.get("dtype") or (dtypes.pop() if len(dtypes) == 1 else "bfloat16"),
        "variant": variant,
        "offload": settings.offload,
        "compile": "none",
        "call": {**_profiled(profile, "model", "call"), **settings.call},
    }
    try:
        return Pretrained(options, {"name": fingerprint.scheduler, "options": dict(fingerprint.scheduler_config)})
    except ConfigError as error:  # which names the options of a configuration
        raise ConfigError(re.sub(r"\bmodel\.(device|offload)\b", r"--\1", str(error))) from error


def _profiled(profile: Profile, *names: str) -> Mapping[str, Any]:
    """What a profile says it was measured with, by names of settings: {} where it does not."""
    found: Any = profile.facts
    for name in ("settings", *names):
        found = found.get(name) if isinstance(found, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def numbers(given: str | None, option: str) -> tuple[float, ...]:
    """Numbers with commas between them; () for none."""
    if given is None:
        return ()
    try:
        return tuple(float(part) for part in given.split(","))
    except ValueError as error:
        raise ConfigError(
            f"{option} takes numbers with commas between them, as in {option} 2,3; not {given!r}"
        ) from error


def arguments(given: Sequence[str]) -> dict[str, Any]:
    """Arguments of a pipeline's call from NAME=VALUE, values as in YAML."""
    for text in given:
        name, equals, _ = text.partition("=")
        if not equals or not name.isidentifier():
            raise ConfigError(f"--call takes NAME=VALUE, as in --call height=512; not {text!r}")
    found = OmegaConf.to_container(OmegaConf.from_dotlist(list(given)))
    assert isinstance(found, dict)
    return {str(name): value for name, value in found.items()}
