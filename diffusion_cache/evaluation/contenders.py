"""What is compared: baselines, our methods and rivals, each set up on a pipeline and taken off again."""

import contextlib
import dataclasses
import itertools
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from filelock import FileLock

from .. import api, reference, registry
from ..context import SCOPES, Policy
from ..errors import ConfigError
from ..models import default_scope
from ..planning.choose import choose
from ..policies import Guards
from ..profile import JSON_FILE, Profile, shipped_profiles
from ..profiling.jacobian import Norms, norms
from ..profiling.measure import Given, Options, measure
from ..registry import check_options, suggest
from ..systems import System
from .accounting import kinds_of
from .peers import peer, settings_of
from .prompts import FITTING_SEEDS
from .subjects import Subject, batches_of

PROFILED = 16  # samples
STRUCTURE = ("policy", "forecaster", "corrector", "depth", "feature", "cache_dtype")
DEFAULT_SCOPE = "auto"  # in tables, of contenders that name none
MAKE = "`diffusion-cache profile` makes one, and `diffusion-cache plan` its plans"


@dataclass(frozen=True)
class Call:
    """Arguments of `enable` that do what a contender does on a pipeline of which nothing was measured.

    tuned: the one among them that `enable` finds for a share of reused steps, if there is one.
    """

    arguments: Mapping[str, Any]
    tuned: str | None = None

    def reusing(self, share: float) -> dict[str, Any]:
        """The arguments, with that share of the steps to reuse in place of the tuned one."""
        if self.tuned is None:
            return dict(self.arguments)
        rest = {name: value for name, value in self.arguments.items() if name != self.tuned}
        return {**rest, "target_reuse": round(share, 2)}


@dataclass(frozen=True)
class Contender(ABC):
    """One method with one choice of settings.

    kind: ours, rival or baseline. method: its name in tables. settings: what tells it from others of that method.
    """

    kind: str
    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    scope: str = ""
    batchable = True  # whether a sample's result does not depend on the others in its batch
    uniform = True  # whether a batch executes the same for all its samples

    @property
    def call(self) -> Call | None:
        """What does the same on a pipeline of which nothing was measured; None where nothing does."""
        return None

    @abstractmethod
    def applied(self, subject: Subject, steps: int) -> contextlib.AbstractContextManager[Any]:
        """Its cache on the subject's pipeline, inside the block."""

    def never(self, subject: Subject, steps: int) -> contextlib.AbstractContextManager[Any] | None:
        """The same, but reusing nothing; None where that means nothing."""
        return None

    @property
    def control_key(self) -> Hashable:
        """What `never` depends on: contenders of a method that have it in common reuse nothing in the same way."""
        return None

    def steps(self, steps: int) -> int:
        """Sampler steps, where the uncached run takes `steps`."""
        return steps

    def cache_bytes(self, subject: Subject) -> int | None:
        """The most bytes that features took in the last run, if known."""
        return None

    def kinds(self, subject: Subject, samples: int) -> list[list[Hashable]] | None:
        """Of each sample of the last run, what kind of step each was, where a batch is not uniform; None if not known.

        See `accounting.kinds_of`.
        """
        return None

    def why_not(self, subject: Subject) -> str | None:
        """Why it cannot run on this subject at all, if so."""
        return None


@dataclass(frozen=True)
class Uncached(Contender):
    def applied(self, subject: Subject, steps: int) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()


@dataclass(frozen=True)
class FewerSteps(Contender):
    """No cache, and a share `ratio` of the sampler's steps, rounded."""

    ratio: float = 1.0

    def applied(self, subject: Subject, steps: int) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def steps(self, steps: int) -> int:
        return max(1, round(steps * self.ratio))


@dataclass(frozen=True)
class Ours(Contender):
    """A policy and a forecaster of this package, or a plan of a profile; options: arguments of `enable`.

    scopes: kinds of span that the policy may govern. profile: that its options were taken from, if they were. tuned:
    the option that `enable` finds for a target, if there is one.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    control: Mapping[str, Any] = field(default_factory=dict)
    scopes: frozenset[str] = frozenset(SCOPES)
    profile: Profile | None = None
    tuned: str | None = None

    @property
    def call(self) -> Call | None:
        """Without the forecaster's defaults, and without the forecaster where that is the default of `enable`."""
        if self.profile is not None or "profile" in self.options:
            return None
        name = self.options["forecaster"]
        usual = registry.forecasters.options(name)
        usual |= {"forecaster": name} if name == api.DEFAULT_FORECASTER else {}
        told = {key: value for key, value in self.options.items() if key not in usual or value != usual[key]}
        return Call(told, self.tuned)

    def applied(self, subject: Subject, steps: int) -> contextlib.AbstractContextManager[Any]:
        if self.profile is not None:
            self.profile.check(subject.pipe, subject.denoisers)
        return api.cached(subject.pipe, **self.options)

    def never(self, subject: Subject, steps: int) -> contextlib.AbstractContextManager[Any]:
        return api.cached(subject.pipe, **self.control)

    @property
    def control_key(self) -> Hashable:
        """Which spans there are, and what is kept of them: not when, nor with which weights."""
        return self.scope, *(self.options.get(name) for name in STRUCTURE)

    def cache_bytes(self, subject: Subject) -> int | None:
        return api.summary(subject.pipe).cache_bytes

    def why_not(self, subject: Subject) -> str | None:
        if self.scope or "denoiser" in self.scopes:
            return None
        for denoiser in subject.denoisers.values():
            found = default_scope(denoiser)
            if found not in self.scopes:
                return f"it serves scope {' and '.join(sorted(self.scopes))}, and {type(denoiser).__name__} has {found}"
        return None


@dataclass(frozen=True)
class Adaptive(Ours):
    """Decides by what it sees, for each sample of a batch apart."""

    uniform = False

    def kinds(self, subject: Subject, samples: int) -> list[list[Hashable]] | None:
        records: tuple[Any, ...] = api.summary(subject.pipe).records
        return kinds_of(records, samples)


@dataclass(frozen=True)
class ByNorms(Adaptive):
    """Decides by how sensitive the denoiser is to its inputs, which is measured first (`profiling.jacobian`)."""

    @property
    def call(self) -> Call | None:
        return None

    def applied(self, subject: Subject, steps: int) -> contextlib.AbstractContextManager[Any]:
        return api.cached(subject.pipe, **self.options, **vars(measured_norms(subject, steps)))

    def why_not(self, subject: Subject) -> str | None:
        if not subject.classes:
            return f"its norms are measured on classes, and {subject.name} takes prompts, which nobody has chosen"
        return super().why_not(subject)


@dataclass(frozen=True)
class Published(Contender):
    """A published system as this package has it; profile: itself, its name or folder, None to measure one first."""

    system: System = None  # type: ignore[assignment]  # always given
    guards: Mapping[str, Any] = field(default_factory=dict)
    profile: str | Profile | None = None
    profile_scope: str | None = None

    @property
    def batchable(self) -> bool:  # type: ignore[override]
        return not self.system.by_prompt

    @property
    def call(self) -> Call | None:
        return None if self.system.needs_profile else Call({"method": self.system.name, **self.settings})

    def applied(self, subject: Subject, steps: int) -> contextlib.AbstractContextManager[Any]:
        return self._cached(subject, steps)

    def never(self, subject: Subject, steps: int) -> contextlib.AbstractContextManager[Any]:
        return self._cached(subject, steps, max_reused=0)

    def _cached(self, subject: Subject, steps: int, **more: Any) -> contextlib.AbstractContextManager[Any]:
        profile: Any = None
        if self.system.needs_profile:
            scope = self.profile_scope or min(self.system.scopes)
            profile = self.profile or measured_profile(
                subject, steps, scope, self.system.sensitivity, self.system.foreground
            )
        return api.cached(subject.pipe, method=self.system, profile=profile, **{**self.guards, **more})

    def cache_bytes(self, subject: Subject) -> int | None:
        return api.summary(subject.pipe).cache_bytes

    def why_not(self, subject: Subject) -> str | None:
        if self.system.by_prompt and self.profile is None:
            return (
                f"no profile that has learned to choose by the prompt comes with the package for {subject.name} with "
                f"{subject.sampler}: `diffusion-cache select` makes one, method.profile=…"
            )
        if self.system.foreground and not self.profile and not subject.video:
            return (
                f"{self.system.name} looks for what moves, and images do not: it needs a profile with a foreground mask"
            )
        return self.system.why_not(subject.denoisers)


@lru_cache(maxsize=2)
def measured_profile(
    subject: Subject, steps: int, scope: str, sensitivity: bool = False, foreground: bool = False
) -> Profile:
    """A profile of PROFILED samples of a model that takes class labels, kept for the next contender.

    sensitivity: with that of the output, which takes most of the time. foreground: with attention against what moves.

    Raises:
        ConfigError: for a model that takes text, whose prompts nobody has chosen.
    """
    if not subject.classes:
        raise ConfigError(f"{subject.name} needs a profile at scope {scope}: give its folder, method.profile=…. {MAKE}")
    samples = Options.sensitivity_samples if sensitivity else 0
    options = Options(scope=scope, sensitivity_samples=samples, attention=foreground)
    wanted = {"sensitivity": sensitivity, "foreground": foreground}
    name = "-".join([scope, str(steps), *(what for what, is_wanted in wanted.items() if is_wanted)])
    with ExitStack() as stack:
        folder = None
        if subject.profiles is not None:
            folder = subject.profiles / name
            subject.profiles.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(f"{folder}.lock"))  # whoever comes second has it measured
        batches = batches_of(subject, steps)
        profile = measure(batches, _drawn(), options, foreground="motion" if foreground else None, folder=folder)
    assert profile is not None
    return profile


@lru_cache(maxsize=2)
def measured_norms(subject: Subject, steps: int) -> Norms:
    """Of the same samples, for policy sencache."""
    make = batches_of(subject, steps)
    return norms([make([sample]) for sample in _drawn()])


def _drawn() -> list[Given]:
    """Samples to fit on: classes with seeds that nothing is reported of."""
    return [(str(number % 10), FITTING_SEEDS + number) for number in range(PROFILED)]


@dataclass(frozen=True)
class Rival(Contender):
    peer: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def batchable(self) -> bool:  # type: ignore[override]
        return peer(self.peer).batchable

    @property
    def control_key(self) -> Hashable:
        return json.dumps(peer(self.peer).never(self.options), sort_keys=True)

    def applied(self, subject: Subject, steps: int) -> contextlib.AbstractContextManager[Any]:
        return peer(self.peer).apply(subject.pipe, self.options, steps)

    def never(self, subject: Subject, steps: int) -> contextlib.AbstractContextManager[Any]:
        return peer(self.peer).apply(subject.pipe, peer(self.peer).never(self.options), steps)

    def why_not(self, subject: Subject) -> str | None:
        rival = peer(self.peer)
        lacking = rival.lacks(self.options)
        if lacking is None:
            return rival.why_not(subject.pipe)
        missing = f"no {lacking} for {subject.name}/{subject.sampler}: give them as method.settings.{lacking}"
        return rival.why_not(subject.pipe) or missing


def expand(node: Mapping[str, Any], model: str, sampler: str = "") -> list[dict[str, Any]]:
    """A `method` configuration without its grid, once for every combination of the grid's values.

    grid: dotted keys of the node and the values each takes; points: a list of such choices instead, or as well;
    models: by model name, another grid and points. A node of a plan (`share`), of a policy that has a `profile` or of
    a system that has a `variant` of shipped profiles comes back with the profile's name or folder and its digest, so
    that another profile makes another run. norms: of a node of policy sencache, whether they are measured first.

    Raises:
        ConfigError: for a grid that is not of that form or names a key that the method does not have, or no profile.
    """
    node = dict(node)
    if node["kind"] == "rival":
        rest = {"kind": "rival", "label": node.get("label"), "peer": node["peer"]}
        return [{**rest, "settings": settings} for settings in settings_of(node, model, sampler)]
    chosen = (node.pop("models", None) or {}).get(model) or node
    grid, points = chosen.get("grid") or {}, chosen.get("points") or []
    node.pop("grid", None), node.pop("points", None)
    if not isinstance(grid, Mapping) or not all(isinstance(values, Sequence) for values in grid.values()):
        raise ConfigError("method.grid must map keys to lists of values, as in {policy.every: [2, 3, 5]}")
    choices: list[dict[str, Any]] = [dict(point) for point in points]
    if grid or not points:
        names = list(grid)
        choices += [dict(zip(names, values, strict=True)) for values in itertools.product(*grid.values())]
    found = [_with(node, choice) for choice in choices]
    if "share" in node or ("policy" in node and "profile" in node):
        return [_with_profile(one, _profile_name(one, model)) for one in found]
    if "variant" in node or ("system" in node and node.get("profile")):  # which says itself why it cannot do without
        return [_with_profile(one, _shipped_name(one, model)) for one in found]
    return found


def _with(node: Mapping[str, Any], choice: Mapping[str, Any]) -> dict[str, Any]:
    result = _copied(node)
    for key, value in choice.items():
        *path, last = key.split(".")
        place = result
        for name in path:
            if not isinstance(place.get(name), dict):
                raise ConfigError(f"the grid's key {key!r} is not in the method. {suggest(key, _keys(node))}")
            place = place[name]
        # options of a policy are checked when it is made
        if not path and last not in place:
            raise ConfigError(f"the grid's key {key!r} is not in the method. {suggest(key, _keys(node))}")
        place[last] = value
    return result


def _copied(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list) else value


def _keys(node: Mapping[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key, value in node.items():
        found.append(prefix + key)
        if isinstance(value, Mapping):
            found += _keys(value, f"{prefix}{key}.")
    return found


def _with_profile(node: Mapping[str, Any], name: str | None) -> dict[str, Any]:
    """A node with its profile named and told from others; without `sampler` and `variant`, which were for that."""
    rest = {key: value for key, value in node.items() if key not in ("sampler", "variant")}
    return rest if name is None else {**rest, "profile": name, "digest": _digest(_profile_folder(name))}


def _profile_name(node: Mapping[str, Any], model: str) -> str:
    """The profile that a node names, else what that of the package for the model and sampler is called."""
    if node["profile"] is not None:
        return str(node["profile"])
    if model not in reference.MODELS:
        raise ConfigError(f"no profile of {model} comes with the package: give a folder, method.profile=…. {MAKE}")
    parts = model, node.get("sampler") or reference.MODELS[model].samplers[0], node.get("variant")
    return "-".join(filter(None, parts))


def _shipped_name(node: Mapping[str, Any], model: str) -> str | None:
    """The same; None where the package has none for the model and sampler."""
    if node["profile"] is None and model not in reference.MODELS:
        return None
    name = _profile_name(node, model)
    return name if node["profile"] is not None or name in shipped_profiles() else None


def _profile_folder(name: str) -> Path:
    """The folder of a profile, given as such or by the name of a shipped one."""
    folder = Path(name) if (Path(name) / JSON_FILE).is_file() else shipped_profiles().get(name)
    if folder is None:
        raise ConfigError(f"there is no profile {name!r}, neither a folder of that name nor one of the package. {MAKE}")
    return folder


def _digest(folder: Path) -> str:
    """Of all that a profile holds, as it says itself; loading it makes sure of that."""
    path = folder / JSON_FILE
    try:
        return str(json.loads(path.read_bytes())["digest"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is not a profile's, or damaged ({error!r}). {MAKE}") from error


@lru_cache(maxsize=1)
def _profile(name: str, digest: str) -> Profile:
    """The profile, read once for all the plans that are taken from it."""
    folder = _profile_folder(name)
    profile = Profile.load(folder)
    if _digest(folder) != digest:
        raise ConfigError(f"the profile in {folder} was changed while it was evaluated: give the same command again")
    return profile


def contender(node: Mapping[str, Any], forecaster: Mapping[str, Any], steps: int) -> Contender:
    """What a `method` configuration without a grid describes.

    Raises:
        ConfigError: for names, options or combinations that cannot work.
    """
    kind, label = node["kind"], node.get("label")
    if kind == "rival":
        options = dict(node["settings"])
        usual = {option.name: option.default for option in dataclasses.fields(peer(node["peer"]).Settings)}
        told = {key: value for key, value in options.items() if key not in usual or value != usual[key]}
        told.pop("ratios", None)  # MagCache's: one number a step
        return Rival(kind, label or node["peer"], told, peer=node["peer"], options=options)
    if "steps_ratio" in node:
        ratio = node["steps_ratio"]
        if not isinstance(ratio, (int, float)) or not 0 < ratio <= 1:
            raise ConfigError(f"method.steps_ratio must be above 0 and at most 1, not {ratio!r}")
        if ratio == 1:
            return Uncached(kind, label or "uncached")
        return FewerSteps(kind, label or "fewer steps", {"steps": max(1, round(steps * ratio))}, ratio=ratio)
    if "share" in node:
        return _planned(node, steps)
    if "system" in node:
        return _published(node, steps)
    return _ours(node, forecaster)


def call_of(node: Mapping[str, Any], steps: int) -> Call | None:
    """The call of what a `method` configuration describes, for runs of so many steps, if it has one.

    Nor has it one where this version of the package does not know the method or an option of it.
    """
    if node["kind"] == "rival" or node.get("profile") or not node.keys() & {"policy", "system"}:
        return None
    try:
        return contender(node, {}, steps).call
    except ConfigError:
        return None


def _planned(node: Mapping[str, Any], steps: int) -> Contender:
    """The best plan of at most so many denoiser evaluations as `share` of the steps is, rounded down.

    cache_dtype: what its features are stored in, where the node says.
    """
    nfe = _part(steps, "share", node["share"])
    profile = _profile(node["profile"], node["digest"])
    # with other steps than the profile's, the plan will be resampled, which keeps its share of computed ones
    plan = choose(profile.plans, nfe=nfe * profile.total / steps)
    stored = {key: node[key] for key in ("cache_dtype",) if key in node}
    options = {"profile": profile, "plan": plan.name, **stored}
    label = node.get("label") or "plan"
    return Ours(
        node["kind"],
        label if "plan" in label else f"plan, {label}",
        {"nfe": nfe, "plan": plan.name, **stored},
        scope=plan.scope,
        options=options,
        control={**options, "max_reused": 0},
    )


def _published(node: Mapping[str, Any], steps: int) -> Contender:
    """A published system. of_steps: options of it that are given as shares of the steps, rounded down."""
    options = dict(node["system"])
    options |= {name: _part(steps, f"of_steps.{name}", share) for name, share in (node.get("of_steps") or {}).items()}
    guards = {key: value for key, value in (node.get("guards") or {}).items() if value is not None}
    cls = registry.systems.get(options.pop("name"))
    usual = registry.systems.options(cls.name)
    unknown = sorted(set(options) - set(usual))
    if unknown:
        raise ConfigError(f"{cls.name} has no option {unknown[0]!r}. {suggest(unknown[0], usual)}")
    check_options(cls.name, cls, options)
    system = cls(**options)
    Guards(**guards)
    scope = node.get("profile_scope")
    if scope is not None and scope not in system.scopes:
        raise ConfigError(f"{cls.name} needs a profile at scope {' or '.join(sorted(system.scopes))}, not {scope!r}")
    told = {key: value for key, value in options.items() if value != usual[key]} | guards
    profile = node["profile"]
    if "digest" in node:
        profile = _profile(profile, node["digest"])
    elif profile:
        told["profile"] = profile
    label, place = node.get("label") or cls.name, scope or ", ".join(sorted(system.scopes))
    return Published(node["kind"], label, told, scope=place, system=system, guards=guards,
                     profile=profile, profile_scope=scope)  # fmt: skip


def _part(steps: int, name: str, share: Any) -> int:
    """So many of the steps as a share of them is, rounded down."""
    if not isinstance(share, (int, float)) or isinstance(share, bool) or not 0 < share <= 1:
        raise ConfigError(f"method.{name} must be above 0 and at most 1, not {share!r}")
    return max(1, math.floor(steps * share + 1e-9))


def _ours(node: Mapping[str, Any], forecaster: Mapping[str, Any]) -> Contender:
    policy = dict(node["policy"])
    predictor = dict(node.get("forecaster") or forecaster)
    corrector = dict(node.get("corrector") or {})
    guards = {key: value for key, value in (node.get("guards") or {}).items() if value is not None}
    name, predictor_name, corrector_name = policy.pop("name"), predictor.pop("name"), corrector.pop("name", None)
    told = dict(policy)  # what tells this choice from others
    cls = registry.policies.get(name)
    for what, found, given in (
        (name, cls, policy),
        (predictor_name, registry.forecasters.get(predictor_name), predictor),
        *([(corrector_name, registry.correctors.get(corrector_name), corrector)] if corrector_name else []),
    ):
        unknown = set(given) - {option.name for option in dataclasses.fields(found)}
        if unknown:
            option = sorted(unknown)[0]
            known = [option.name for option in dataclasses.fields(found)]
            raise ConfigError(f"{what} has no option {option!r}. {suggest(option, known)}")
        check_options(what, found, given)
    profile = None
    if "profile" in node:
        profile = _profile(node["profile"], node["digest"])
        policy = _measured(cls, profile, policy)
        node = {**node, "scope": profile.scope, "depth": profile.depth}
    made = cls(**policy)
    Guards(**guards)
    place = {key: node[key] for key in ("scope", "depth") if node.get(key) is not None}
    for option in policy.keys() & corrector.keys():
        if policy[option] != corrector[option]:
            raise ConfigError(f"{name} and {corrector_name} share the option {option!r}: give both the same")
    mending = {"corrector": corrector_name, **corrector} if corrector_name else {}
    common = {"forecaster": predictor_name, **predictor, **mending, **place}
    options = {"policy": name, **policy, **guards, **common}
    control = {**options, "max_reused": 0}
    told |= guards | {key: node[key] for key in ("depth",) if node.get(key) is not None}
    told |= {"forecaster": predictor_name, **predictor, **mending}
    told = {key: round(value, 4) if isinstance(value, float) else value for key, value in told.items()}
    label = node.get("label") or ", ".join(filter(None, (name, predictor_name, corrector_name)))
    form: type[Ours] = Adaptive if made.needs.signals else Ours
    if node.get("norms"):
        form, told = ByNorms, {**told, "norms": "measured"}
    return form(node["kind"], label, told, scope=node.get("scope") or "", options=options, control=control,
                scopes=made.scopes, profile=profile, tuned=cls.tuned)  # fmt: skip


def _measured(cls: type[Policy], profile: Profile, options: Mapping[str, Any]) -> dict[str, Any]:
    """All options of a policy, those that it takes from a profile among them."""
    make = getattr(cls, "from_profile", None)
    if make is None:
        raise ConfigError(f"{cls.name} takes nothing from a profile: leave method.profile out")
    return vars(make(profile, **options))
