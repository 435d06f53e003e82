"""What the arguments of the front doors stand for: a method for the engine, or an error that says what is wrong.

`how` are the options of the engine (`HOW`, `UNNAMED`), which go with any policy, system or plan; `options` the fields
of policies, forecasters, correctors, systems and guards, as they were given by keyword.
"""

import dataclasses
import re
import warnings
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from . import published
from .chunks import Stream
from .context import SCOPES, Corrector, Forecaster, Policy
from .differences import DIFFERENCES
from .engine import Method
from .errors import ConfigError, DiffusionCacheWarning
from .forecasters.fitted import Fitted
from .language import LanguageCache
from .language import Planned as PlannedText
from .models import find_denoisers, unwrap
from .ops import CODES
from .plain import check_count
from .plan import GUARD_SIGNALS, Plan
from .planning.choose import choose
from .policies import Drift, Guarded, Guards, Planned
from .profile import Profile
from .registry import Registry, check_options, named_elsewhere, suggest, suggest_option, unknown_name
from .registry import correctors as corrector_registry
from .registry import forecasters as forecaster_registry
from .registry import languages as language_registry
from .registry import policies as policy_registry
from .registry import systems as system_registry

T = TypeVar("T")

DEFAULT_POLICY, DEFAULT_FORECASTER, DEFAULT_LANGUAGE = "first_block", "taylor", "prefix"
PUBLISHED = "published/"
UNKNOWN_OF_LOOPS = ("pipeline", "scheduler", "scheduler_config", "spacing")
# how samples are decided on, and what features are stored in: options of the engine, whatever the policy
HOW = {
    "granularity": ("sample", "batch"),
    "sync": ("immediate", "lagged"),
    "cache_dtype": ("model", *CODES, *DIFFERENCES),
    "cache_device": ("model", "cpu"),
}
UNNAMED = ("max_cache_bytes", "stream", "cuda_graphs")  # others of the engine, which are no choice among names


def refuse(given: Mapping[str, Any], why: Callable[[str, Any], str]) -> None:
    """ConfigError for the first of these arguments that is not None, with what `why` says of its name and value."""
    for name, value in given.items():
        if value is not None:
            raise ConfigError(why(name, value))


# of the front doors, beside options of methods, and of the engine
ARGUMENTS = (
    "policy", "forecaster", "corrector", "method", "scope", "depth", "group", "profile", "speedup", "min_psnr", "nfe",
    "plan", "target_reuse", "ignore", "guard", "guard_factor", "strict",
)  # fmt: skip
# of `run`
RUN_ARGUMENTS = (
    *(name for name in ARGUMENTS if name not in ("method", "target_reuse", "guard", "guard_factor", "strict")),
    "num_steps", "noise_levels",
)  # fmt: skip


def _wanting(door: str, of_speedup: str = "") -> Callable[[str, Any], str]:
    """What to say of an argument that needs a profile. of_speedup: what else there is for a speedup."""

    def why(name: str, value: Any) -> str:
        other = of_speedup.format(value) if name == "speedup" else ""
        return f"{name} needs a profile: {door}, profile=…, {name}={value!r}){other}"

    return why


needs_profile = _wanting("enable(pipe", ", or a policy: enable(pipe, policy='first_block', speedup={!r})")
run_needs_profile = _wanting("run(model", ", or a policy's threshold: run(model, policy='first_block', threshold=…)")
text_needs_profile = _wanting("enable(pipe")


def method(
    policy: str | Policy | None,
    forecaster: str | Forecaster | None,
    scope: str | None,
    depth: int | None,
    how: Mapping[str, Any],
    options: Mapping[str, Any],
    corrector: str | Corrector | None = None,
    arguments: Collection[str] = ARGUMENTS,
) -> Method:
    """A policy with a forecaster, by names or as instances; None for the default. arguments: of the front door.

    Raises:
        ConfigError: for unknown names, options and values, and a policy for which a scope has to be named.
    """
    _check(scope, depth, how)
    policy = DEFAULT_POLICY if policy is None else policy
    forecaster = DEFAULT_FORECASTER if forecaster is None else forecaster
    remaining = dict(options)
    guards = _construct("guards", Guards, _take(remaining, _fields(Guards)))
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
        known = [name for part in (*parts.values(), guards) for name in _fields(part)]
        raise _unknown_option(remaining, named, [*known, *arguments, *HOW, *UNNAMED])
    if scope is None and getattr(built_policy, "scopes", None) == {"branch"}:
        raise ConfigError(f"policy {built_policy.name!r} serves no model's default scope: add scope='branch'")
    return Method(Guarded(built_policy, guards), built_forecaster, scope, depth, corrector=built_corrector, **how)


def planned(
    pipe: Any,
    denoisers: Mapping[str, nn.Module],
    profile: str | Path | Profile | None,
    parts: Mapping[str, Any],
    wish: Mapping[str, Any],
    watch: Mapping[str, Any],
    ignore: Collection[str],
    how: Mapping[str, Any],
    options: Mapping[str, Any],
) -> Method:
    """What a profile's plan, or a plan itself, stands for.

    pipe: None for a bare denoiser. parts: what the profile says itself, None each, but for a forecaster beside
    published figures, which say when to compute. wish: speedup, min_psnr, nfe and plan, which say which one; watch:
    guard, guard_factor and strict.
    """
    _check_passes(options)
    if isinstance(profile, str) and profile.startswith(PUBLISHED):
        refuse({**parts, "forecaster": None}, _of_the_profile)
        wish = {**wish, **watch, "ignore": ignore or None}
        return _published(profile, denoisers, parts["forecaster"], wish, how, options)
    refuse(parts, _of_the_profile)
    plan = wish["plan"]
    if isinstance(plan, Plan):
        refuse({**wish, "plan": None}, _given_already)
    if profile is None:
        refuse({"ignore": ignore or None}, run_needs_profile if pipe is None else needs_profile)
    else:
        found, how = _checked(profile, pipe, denoisers, ignore, how)
        if not isinstance(plan, Plan):
            plan = choose(found.plans, **wish)
    arguments = RUN_ARGUMENTS if pipe is None else ARGUMENTS
    made = method(Planned(plan), Fitted.of(plan), plan.scope, plan.depth, how, options, arguments=arguments)
    return dataclasses.replace(made, guarded=dataclasses.replace(made.guarded, drift=_drift(plan, **watch)))


def _check_passes(options: Mapping[str, Any]) -> None:
    if options.get("unconditional_every", 1) != 1:
        raise ConfigError("unconditional_every is for policies: a plan says itself when each pass is computed")


def _of_the_profile(name: str, _: Any) -> str:
    return f"{name} comes from the profile: give {name} or profile, not both"


def _given_already(name: str, _: Any) -> str:
    return f"{name} chooses among a profile's plans, and this plan is given already: leave {name} out"


def system(
    pipe: Any,
    given: Any,
    profile: str | Path | Profile | None,
    ignore: Collection[str],
    how: Mapping[str, Any],
    options: Mapping[str, Any],
) -> Method:
    """What a published system stands for, on this pipeline. given: its name, or an instance."""
    from .systems import System

    denoisers = find_denoisers(pipe)
    remaining = dict(options)
    built = _build(system_registry, given, System, remaining)
    unknown = {name: value for name, value in remaining.items() if name not in _fields(Guards)}
    if unknown:
        known = [*_fields(built), *_fields(Guards), "profile", "ignore", *HOW, *UNNAMED]
        raise _unknown_option(unknown, f"system {built.name!r}", known)
    found = None
    if profile is None and ignore:
        raise ConfigError(f"ignore needs a profile: enable(pipe, method={built.name!r}, profile=…, ignore={ignore!r})")
    if profile is not None:
        found, how = _checked(profile, pipe, denoisers, ignore, how)
    parts = built.made_for(denoisers, found)
    if isinstance(parts.policy, Planned):
        _check_passes(remaining)
    return method(parts.policy, parts.forecaster, parts.scope, parts.depth, how, remaining)


def system_fields(given: Any) -> list[str]:
    """The options of a published system."""
    cls = system_registry.get(given) if isinstance(given, str) else type(given)
    return _fields(cls) if dataclasses.is_dataclass(cls) else []


def language(
    pipe: Any,
    given: Any,
    profile: str | Path | Profile | None,
    wish: Mapping[str, Any],
    ignore: Collection[str],
    options: Mapping[str, Any],
) -> LanguageCache:
    """How a pipeline that decodes text is to be cached.

    given: a method's name, an instance, or None. wish: speedup, nfe and plan, which say which of the profile's plans.
    """
    remaining = dict(options)
    plan = wish["plan"]
    if profile is not None:
        if given is not None:
            raise ConfigError("a method comes from the profile: give method or profile, not both")
        found = _profile(profile)
        found.check(pipe, {"model": pipe.model}, ignore)
        if not found.plans:
            raise ConfigError("the profile holds no plans: make some with planning.refinements.planned")
        given = PlannedText(plan if isinstance(plan, Plan) else choose(found.plans, **wish))
    else:
        if isinstance(plan, Plan):
            given = PlannedText.name if given is None else given
            remaining["plan"], wish = plan, {**wish, "plan": None}
        refuse({**wish, "ignore": ignore or None}, text_needs_profile)
    built = _build(language_registry, DEFAULT_LANGUAGE if given is None else given, LanguageCache, remaining)
    if remaining:
        raise _unknown_option(remaining, f"language cache {built.name!r}", _fields(built))
    return built


def _check(scope: str | None, depth: int | None, how: Mapping[str, Any]) -> None:
    if scope is not None and scope not in SCOPES:
        raise ConfigError(f"Unknown scope {scope!r}. {suggest(scope, SCOPES)}")
    for name, chosen in how.items():
        if name in HOW and chosen not in HOW[name]:
            raise ConfigError(f"Unknown {name} {chosen!r}. {suggest(str(chosen), HOW[name])}")
    for name, count in {"depth": depth, "max_cache_bytes": how.get("max_cache_bytes")}.items():
        if count is not None:
            check_count(name, count)
    graphs, stream = how.get("cuda_graphs", False), how.get("stream")
    if not isinstance(graphs, bool):
        raise ConfigError(f"cuda_graphs must be True or False, not {graphs!r}")
    if stream is not None and not isinstance(stream, Stream):
        raise ConfigError(f"stream takes a diffusion_cache.Stream(…), not {stream!r}")


def _drift(
    plan: Plan, guard: str | None = None, guard_factor: float | None = None, strict: bool | None = None
) -> Drift | None:
    """What a plan's runs are watched by, if they are to be."""
    if guard is None:
        refuse(
            {"guard_factor": guard_factor, "strict": strict},
            lambda name, _: f"{name} says how a guard works: name its signal too, guard={GUARD_SIGNALS[0]!r}",
        )
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


def _published(
    name: str,
    denoisers: Mapping[str, nn.Module],
    forecaster: str | Forecaster | None,
    wish: Mapping[str, Any],
    how: Mapping[str, Any],
    options: Mapping[str, Any],
) -> Method:
    refuse(wish, lambda key, _: f"{name} is a ready-made method, for which {key} says nothing: leave it out")
    entry = published.load(name)
    classes = [type(unwrap(denoiser)).__name__ for denoiser in denoisers.values()]
    if entry.transformer is not None and entry.transformer not in classes:
        raise ConfigError(f"{name} is for {entry.transformer}, and this pipeline has {', '.join(classes)}")
    if entry.transformer is None and entry.model != "generic":
        warnings.warn(
            f"{name} is for {entry.model}, of which diffusers has no class: whether this pipeline is that model cannot "
            f"be told from {', '.join(classes)}",
            DiffusionCacheWarning,
            stacklevel=4,
        )
    driven = entry.driven()
    forecaster = driven.forecaster if forecaster is None else forecaster
    return method(driven.policy, forecaster, driven.scope, None, how, {**driven.options, **options})


def _checked(
    given: str | Path | Profile,
    pipe: Any,
    denoisers: Mapping[str, nn.Module],
    ignore: Collection[str],
    how: Mapping[str, Any],
) -> tuple[Profile, dict[str, Any]]:
    """A profile that matches the pipeline, and `how` with the guidance and size that calls are expected to have."""
    if isinstance(ignore, str) or not isinstance(ignore, Collection):
        raise ConfigError(f"ignore must be a list of fields, as in ignore=['weights'], not {ignore!r}")
    found = _profile(given)
    # whoever calls a bare denoiser says nothing of the sampler beyond the noise levels, which plans compare themselves
    found.check(pipe, denoisers, ignore if pipe is not None else (*ignore, *UNKNOWN_OF_LOOPS))
    expected = {name: getattr(found.fingerprint, name) for name in ("guidance", "sample_shape") if name not in ignore}
    return found, {**how, **expected}


def _profile(given: str | Path | Profile) -> Profile:
    """A profile, or the one in a folder, of a shipped name or in a repository."""
    if isinstance(given, Profile):
        return given
    if not isinstance(given, (str, Path)):
        raise ConfigError(f"profile must be a Profile, its folder, a shipped name or a repository, not {given!r}")
    return Profile.from_pretrained(given)


def _build(registry: Registry[Any], given: Any, kind: type, options: dict[str, Any]) -> Any:
    """An instance from a name and those of the options that are its fields, which are taken out."""
    if isinstance(given, kind):
        if not dataclasses.is_dataclass(given):
            raise ConfigError(f"{registry.kind}: {type(given).__name__} must be a frozen dataclass")
        fields = {name: getattr(given, name) for name in _fields(given)}
        for name in fields:
            if name in options:
                raise ConfigError(f"{name!r} belongs to the {registry.kind}, which is an instance: set it there")
        check_options(f"{registry.kind} {type(given).__name__}", type(given), fields)
        return given
    if not isinstance(given, str):
        name = type(given).__name__
        other = named_elsewhere(name) if name.endswith("Config") else None  # of diffusers or cache-dit
        what = repr(given) if other is None else f"a {name}. {other}"
        raise ConfigError(f"{registry.kind} must be a name or an instance, not {what}")
    cls = registry.get(given)
    built = _construct(f"{registry.kind} {given!r}", cls, _take(options, list(registry.options(given))))
    if not isinstance(built, kind):
        home = kind.__module__.removeprefix("diffusion_cache.")
        raise ConfigError(f"{registry.kind} {given!r}: {cls.__name__} must be a subclass of {home}.{kind.__name__}")
    return built


def _construct(what: str, cls: type[T], options: dict[str, Any]) -> T:
    check_options(what, cls, options)
    fields: Any = dataclasses.fields(cls)  # type: ignore[arg-type]
    for field in fields:
        required = field.init and field.default is field.default_factory is dataclasses.MISSING
        if required and field.name not in options:
            raise ConfigError(f"{what} needs the option {field.name!r}{_said_of(field.name, cls)}")
    try:
        return cls(**options)
    except TypeError as error:  # a method that lacks its abstract parts
        raise ConfigError(f"{what}: {error}") from error


def _said_of(field: str, cls: type) -> str:
    """What the class's docstring, or one that it inherits from, says of a field in its first sentence on it."""
    for base in cls.__mro__:
        found = re.search(rf"\b{field}: (.*?)\.(?: |$)", " ".join((base.__doc__ or "").split()))
        if found:
            return f": {found[1]}"
    return ""


def _fields(of: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(of)]


def _take(options: dict[str, Any], names: list[str]) -> dict[str, Any]:
    return {name: options.pop(name) for name in names if name in options}


def _unknown_option(options: Mapping[str, Any], of: str, known: Collection[str]) -> ConfigError:
    name = next(iter(options))
    if name in (*ARGUMENTS, *HOW, *UNNAMED):
        return ConfigError(f"{name} is an argument of enable(pipe, …), and not of this call: leave it out")
    return ConfigError(f"Unknown option {name!r} for {of}. {suggest_option(name, known)}")
