"""What to cache with where no profile was made: what was measured to be best on the models that are most like it."""

import inspect
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any

from torch import nn

from . import published
from .engine.clock import is_flow
from .errors import ConfigError
from .models import default_scope, find_denoisers, unwrap
from .plain import check_count
from .plan import Plan
from .planning.choose import choose
from .policies import Guarded
from .profile import Profile, shipped_profiles
from .registry import policies
from .summaries import FEW_STEPS

FEW_STEP_SCHEDULERS = ("LCMScheduler", "TCDScheduler", "SCMScheduler")
FEW_STEP_NAME = re.compile(
    r"turbo|lightning|schnell|sprint|hyper-?sd|(?<![a-z])(lcm|tcd|dmd2?)(?![a-z])|(?<![a-z0-9])[1-8][-_]?steps?(?![a-z]|[-_]?[0-9])"
)
STOCHASTIC = re.compile(r"Ancestral|^DDPM|SDE|^RePaint|^UnCLIP")
FRAMES = frozenset({"num_frames", "video_length"})  # as calls for videos name them
PROFILE_IT = "a plan made from a profile of this very model (`diffusion-cache profile`, `diffusion-cache plan`)"
SPEEDUPS = (1.5, 2.0, 3.0)
TOLERANCE = 1.06  # by so much what counts as a speedup may fall short: 14 computed steps of 40 are to count as a third
GOOD = 30.0  # dB
GOOD_NOTE = (
    f"What leaves more than 5% of a model's samples below {GOOD:.0f} dB, a root-mean-square difference of "
    f"{10 ** (-GOOD / 20):.0%} of the range of values, does not count as good, and nor does what is no better than "
    f"fewer sampler steps. The {GOOD:.0f} dB are a convention: how much a viewer minds depends on the model."
)
PICKS = Path(__file__).with_name("advice.json")


@dataclass(frozen=True)
class Figures:
    """What a run measured. mean, p5: PSNR against the uncached output, in dB. work: denoiser evaluations as a share of
    the uncached run's. speed: time of the uncached run over this one's, if it was timed: wall time on a GPU, else the
    process's."""

    mean: float
    p5: float
    work: float
    speed: float | None

    def __str__(self) -> str:
        timed = "" if self.speed is None else f" ({self.speed:.2f}× as fast there)"
        return (
            f"{self.mean:.1f} dB on average and {self.p5:.1f} dB or more for 95% of samples, with {self.work:.0%} of "
            f"the evaluations{timed}"
        )


@dataclass(frozen=True)
class Measured:
    """A method at a speedup on one model, and beside it the best at that speedup of what else there is.

    best: of the methods that need no profile; fewer_steps: of the sampler without a cache; plan: of the plans of a
    profile of that model; the best by the statistic that the method was picked by.
    """

    model: str
    sampler: str
    steps: int
    chosen: Figures
    best: Figures
    fewer_steps: Figures | None
    plan: Figures | None


@dataclass(frozen=True)
class Pick:
    """What to take of the methods that need no profile, and what it is based on.

    kind, scheduler: the pipelines that it is for, see `kind_of`; None for any. equal: what `speedup` is of, work
    ("nfe") or time ("speed"). by: the statistic of PSNR, "mean" or "p5", that it is best by; on several models it
    is the one whose greatest loss against the best of each is least. call: arguments of `enable`.
    """

    kind: str | None
    scheduler: str | None
    speedup: float
    equal: str
    by: str
    method: str
    settings: str
    call: Mapping[str, Any]
    measured: tuple[Measured, ...]

    @property
    def good(self) -> bool:
        """See GOOD_NOTE."""
        return all(
            one.chosen.p5 >= GOOD
            and (one.fewer_steps is None or getattr(one.chosen, self.by) > getattr(one.fewer_steps, self.by))
            for one in self.measured
        )

    @property
    def loss(self) -> float:
        """The greatest, against the best method of each model, in dB."""
        return max(loss(one.best, one.chosen, self.by) for one in self.measured)

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> "Pick":
        def figures(found: Mapping[str, Any] | None) -> Figures | None:
            return None if found is None else Figures(**found)

        runs = ("chosen", "best", "fewer_steps", "plan")
        measured = (Measured(**{**one, **{run: figures(one[run]) for run in runs}}) for one in facts["measured"])
        return cls(**{**facts, "measured": tuple(measured)})


def loss(best: Figures, other: Figures, by: str) -> float:
    """By how much another's PSNR is below the best one's, in dB; both may be infinite."""
    high, low = getattr(best, by), getattr(other, by)
    return 0.0 if high == low else high - low


def kind_of(unet: bool, flow: bool, video: bool) -> str:
    """What pipelines are told apart by: the denoiser, whether the sampler's path is a flow, and what is generated."""
    return f"{'UNet' if unet else 'transformer'} with a {'flow' if flow else 'diffusion'} sampler" + (
        ", for video" if video else ""
    )


def call_text(arguments: Mapping[str, Any]) -> str:
    """The call of `enable` to write."""
    return f"dc.enable(pipe{''.join(f', {name}={value!r}' for name, value in arguments.items())})"


@dataclass(frozen=True)
class Recommendation:
    """What to do with a pipeline: `enable(pipe, recommendation)`, or nothing where `cache` is False.

    That is `enable(pipe, policy, **options)`. policy: None where the options name a profile, or where caching is
    advised against. alternatives: in a few words.
    """

    policy: str | None
    options: Mapping[str, Any]
    reason: str
    alternatives: Sequence[str] = field(default=())

    @property
    def cache(self) -> bool:
        return self.policy is not None or bool(self.options)

    def arguments(self) -> dict[str, Any]:
        """Those of `enable`.

        Raises:
            ConfigError: where caching is advised against.
        """
        if not self.cache:
            raise ConfigError(f"the recommendation is not to cache, so there is nothing to enable. {self.reason}")
        return {**({"policy": self.policy} if self.policy else {}), **self.options}

    def __str__(self) -> str:
        lines = [call_text(self.arguments()) if self.cache else "Do not cache.", self.reason]
        return "\n".join([*lines, *(f"Or: {text}" for text in self.alternatives)])


def recommend(pipe: Any, steps: int | None = None, speedup: float = 2.0) -> Recommendation:
    """What to use with a pipeline, and why: `enable(pipe, recommend(pipe))` does so. Nothing is run.

    steps: how many the pipeline will be called with; None for its own default. speedup: in work that the denoiser is
    spared, 1.5, 2 or 3 where other models are gone by; the time that is saved depends on the machine. In order: nothing
    for few-step models; a shipped profile of these very weights and this sampler; what was published for this very
    model; else, of the methods that need no profile, what was best for 95% of samples on the small models that are most
    like it, as in the table of `results/reference_grid/report.md`.

    Raises:
        ConfigError: if this is no diffusers pipeline, for steps below 1, or a speedup that there is nothing for.
        NoSpansError: if it has nothing to cache.
    """
    denoisers = find_denoisers(pipe)
    if steps is not None:
        check_count("steps", steps)
    if not isinstance(speedup, Real) or not 1 < speedup < math.inf:
        raise ConfigError(f"speedup must be a number above 1, not {speedup!r}")
    if steps is None:
        found = _shipped_profile(pipe, denoisers, None, speedup)
        if found is not None:
            return found
        marker = _few_step_marker(pipe, denoisers)
        if marker:
            return _none(f"{marker}: a model made for very few steps")
        steps = _default_steps(pipe)
    if steps <= FEW_STEPS:
        return _none(f"it takes {steps} step{'s' if steps > 1 else ''}")
    return (
        _shipped_profile(pipe, denoisers, steps, speedup)
        or _published(pipe, denoisers, steps, speedup)
        or _measured(pipe, denoisers, steps, speedup)
    )


def _none(why: str) -> Recommendation:
    return Recommendation(
        None,
        {},
        f"{why[0].upper()}{why[1:]}. With so few steps hardly one is like the one before it, and a reused one cannot "
        f"be made up for. Nothing was measured at {FEW_STEPS} steps or fewer.",
    )


def _few_step_marker(pipe: Any, denoisers: Mapping[str, nn.Module]) -> str | None:
    """What gives a pipeline away as made for few steps, if anything does."""
    scheduler = getattr(pipe, "scheduler", None)
    if type(scheduler).__name__ in FEW_STEP_SCHEDULERS:
        return f"the scheduler is {type(scheduler).__name__}"
    for name in _names(pipe, denoisers):
        found = FEW_STEP_NAME.search(name.lower())
        if found:
            return f"its name ({name}) says {found[0]}"
    settings = _config(scheduler)
    for denoiser in denoisers.values():
        config = _config(unwrap(denoiser))
        if config.get("time_cond_proj_dim"):
            return "its guidance is distilled into the UNet (time_cond_proj_dim), as in latent consistency models"
        # of the two, only the one for few steps has neither guidance embedding nor shifted noise levels
        plain = settings.get("shift") == 1 and not settings.get("use_dynamic_shifting")
        if type(unwrap(denoiser)).__name__ == "FluxTransformer2DModel" and not config.get("guidance_embeds") and plain:
            return "a Flux without guidance embedding and without shifted noise levels is Flux schnell"
    return None


def _names(pipe: Any, denoisers: Mapping[str, nn.Module]) -> Iterator[str]:
    """What pipeline, denoisers and active adapters are called, as far as is known."""
    for part in (pipe, *map(unwrap, denoisers.values())):
        path = _config(part).get("_name_or_path")
        if path:
            yield _repository(str(path))
    for denoiser in denoisers.values():
        active = getattr(unwrap(denoiser), "active_adapters", None)
        if callable(active) and getattr(unwrap(denoiser), "_hf_peft_config_loaded", False):
            yield from active()


def _repository(path: str) -> str:
    """The name of a repository in its id, a folder or the Hub's cache."""
    cached = re.search(r"models--[^/\\]+?--([^/\\]+)", path)
    return cached[1] if cached else Path(path).name


def _config(part: Any) -> Mapping[str, Any]:
    return dict(getattr(part, "config", None) or {})


def _default_steps(pipe: Any) -> int:
    parameter = inspect.signature(type(pipe).__call__).parameters.get("num_inference_steps")
    return parameter.default if parameter is not None and isinstance(parameter.default, int) else 50


def _shipped_profile(
    pipe: Any, denoisers: Mapping[str, nn.Module], steps: int | None, speedup: float
) -> Recommendation | None:
    classes = {name: type(unwrap(denoiser)).__name__ for name, denoiser in denoisers.items()}
    for name, folder in shipped_profiles().items():
        profile = Profile.load(folder)
        if any("router" in plan.facts for plan in profile.plans):
            continue  # docs/routers.md: plans are better
        facts = profile.fingerprint
        own = {name: denoiser.class_name for name, denoiser in facts.denoisers.items()}
        if own != classes or facts.scheduler != type(getattr(pipe, "scheduler", None)).__name__ or not profile.plans:
            continue
        if steps not in (None, profile.total) or any(d.strict for d in profile.matches(pipe, denoisers)):
            continue
        plan = _plan_for(profile, speedup)
        reason = (
            f"A profile of this model and sampler, in {profile.total} steps, comes with the package: call the pipeline "
            f"with num_inference_steps={profile.total}."
        )
        if plan.quality is not None:
            quality = plan.quality
            reason += (
                f" This plan computes {plan.nfe:.4g} of them: {quality.mean:.1f} dB on average and {quality.p5:.1f} dB "
                f"or more for 95% of {quality.n} held-out samples."
            )
        if plan.nfe > TOLERANCE * profile.total / speedup:
            reason += f" None of its plans does {speedup:g}× less work; this does least."
        others = [other.name for other in profile.plans if other is not plan]
        alternatives = (f"another of its plans: {', '.join(others)}",) if others else ()
        return Recommendation(None, {"profile": name, "plan": plan.name}, reason, alternatives)
    return None


def _plan_for(profile: Profile, speedup: float) -> Plan:
    """The best plan of so many fewer evaluations, else the cheapest."""
    least = min(plan.nfe for plan in profile.plans)
    return choose(profile.plans, nfe=max(TOLERANCE * profile.total / speedup, least))


def _published(pipe: Any, denoisers: Mapping[str, nn.Module], steps: int, speedup: float) -> Recommendation | None:
    """A published step list of this very model that spares as much as is asked for."""
    names = {name.lower().removesuffix("-diffusers") for name in _names(pipe, denoisers)}
    entries = [
        entry
        for entry in _entries(denoisers)
        if entry.model.rsplit("/")[-1].lower().removesuffix("-diffusers") in names
        # what is reused of a few blocks alone spares less than the steps tell
        if not entry.blocks and _share(entry, steps) <= TOLERANCE / speedup
    ]
    if not entries:
        return None

    def distance(entry: published.Published) -> tuple[int, float]:
        return abs((entry.steps or steps) - steps), abs(_share(entry, steps) - 1 / speedup)

    entries.sort(key=distance)
    best = entries[0]
    return Recommendation(
        None,
        {"profile": f"published/{best.name}"},
        f"Published for {best.model} ({best.variant}, {best.steps} steps) by its authors: {best.source}. It computes "
        f"{_share(best, steps):.0%} of the steps. Not measured here on that model."
        + (f" Note: {best.notes}" if best.notes else ""),
        (PROFILE_IT, *(f"profile='published/{entry.name}'" for entry in entries[1:4])),
    )


def _share(entry: published.Published, steps: int) -> float:
    """The share of computed steps, over all guidance passes."""
    driven = entry.driven()
    schedule = Guarded(policies.get(driven.policy)(**driven.options)).schedule(steps)
    assert schedule is not None  # of a scheduled entry
    return schedule.nfe / steps


def _entries(denoisers: Mapping[str, nn.Module]) -> list[published.Published]:
    """Published step lists for denoisers of these classes."""
    classes = {type(unwrap(denoiser)).__name__ for denoiser in denoisers.values()}
    found = [published.load(name) for name in published.names()]
    return [entry for entry in found if entry.is_scheduled and entry.transformer in classes]


def picks() -> list[Pick]:
    """The table that recommendations without a profile are read from, which the evaluation's report writes."""
    return [Pick.from_json(facts) for facts in json.loads(PICKS.read_text(encoding="utf-8"))]


def _measured(pipe: Any, denoisers: Mapping[str, nn.Module], steps: int, speedup: float) -> Recommendation:
    """What was measured to be best on the most similar models."""
    if speedup not in SPEEDUPS:
        raise ConfigError(
            f"speedup must be {', '.join(f'{one:g}' for one in SPEEDUPS)}, which were measured on other models, not "
            f"{speedup!r}: for others make a profile of this one, enable(pipe, profile=…, speedup=…)"
        )
    table = {((pick.kind, pick.scheduler), pick.equal, pick.by): pick for pick in picks() if pick.speedup == speedup}
    place = next((place for place in _places(pipe, denoisers) if (place, "nfe", "p5") in table), None)
    if place is None:
        reason = (
            f"No method that needs no profile was measured to do {speedup:g}× less work on all of the small models."
        )
        return Recommendation(None, {}, reason, (PROFILE_IT,))
    pick = table[place, "nfe", "p5"]
    others = {
        "better on average": table.get((place, "nfe", "mean")),
        f"{speedup:g}× as fast in time, too": table.get((place, "speed", "p5")),
    }

    reason = f"{_likeness(pick)} {_figures(pick)}"
    fewest = min(one.steps for one in pick.measured)
    if _is_stochastic(getattr(pipe, "scheduler", None)):
        reason += (
            " Those samplers add no noise on the way, as this one does at each step: nothing was measured with such, "
            "and what is reused suits it less."
        )
    if steps < fewest:
        reason += (
            f" That was in {fewest} steps or more: of {steps}, each is less like the one before it, and reuse loses "
            "more. The smaller the speedup, the less."
        )
    alternatives = [f"{PROFILE_IT}{_gain(pick)}"]
    for what, other in others.items():
        if other is not None and other.call != pick.call:
            alternatives.append(f"{what}: {call_text(other.call)}. {_figures(other)}")
    models = sorted({entry.model for entry in _entries(denoisers)})
    if models:
        more = f", … {len(models)} in all" if len(models) > 3 else ""
        alternatives.append(
            f"a published step list (profile='published/…', see diffusion_cache.published.names), if the model is one "
            f"of {', '.join(models[:3])}{more}"
        )
    options = dict(pick.call)
    if not pick.good:
        reason = f"Without a profile nothing was good at {speedup:g}×. {GOOD_NOTE} {reason}"
        return Recommendation(None, {}, reason, (*alternatives, f"the best of them: {call_text(options)}"))
    return Recommendation(options.pop("policy", None), options, reason, tuple(alternatives))


def _places(pipe: Any, denoisers: Mapping[str, nn.Module]) -> list[tuple[str | None, str | None]]:
    """(kind, scheduler) of the picks that are for a pipeline, the closest first."""
    scheduler = getattr(pipe, "scheduler", None)
    kind = kind_of(
        unet=any(default_scope(denoiser) == "cut" for denoiser in denoisers.values()),
        flow=hasattr(scheduler, "sigmas") and is_flow(scheduler),
        video=not FRAMES.isdisjoint(inspect.signature(type(pipe).__call__).parameters),
    )
    return [(kind, type(scheduler).__name__), (kind, None), (None, None)]


def _is_stochastic(scheduler: Any) -> bool:
    config = _config(scheduler)
    algorithm = str(config.get("algorithm_type") or "")
    drawn = algorithm.startswith("sde") or bool(config.get("stochastic_sampling"))
    return drawn or bool(STOCHASTIC.search(type(scheduler).__name__))


def _likeness(pick: Pick) -> str:
    """What the pipeline has in common with the models that the pick was measured on."""
    names = ", ".join(f"{one.model} ({one.sampler})" for one in pick.measured)
    return f"Like {names}, a {pick.kind}:" if pick.kind else f"Of no kind that was measured ({names}):"


def _figures(pick: Pick) -> str:
    named = f"{pick.method} ({pick.settings})" if pick.settings else pick.method
    if len(pick.measured) == 1:
        (one,) = pick.measured
        fewer = "" if one.fewer_steps is None else f" Fewer sampler steps gave {one.fewer_steps}."
        return f"{named} gave {one.chosen}.{fewer}"
    psnr = ((one.model, *(getattr(figures, pick.by) for figures in (one.chosen, one.best))) for one in pick.measured)
    told = "; ".join(f"{chosen:.1f} of {best:.1f} dB on {model}" for model, chosen, best in psnr)
    what = "What 95% of samples reached" if pick.by == "p5" else "On average"
    return f"{named} falls short of the best method of each by {pick.loss:.1f} dB at most. {what}: {told}."


def _gain(pick: Pick) -> str:
    """What a plan gained over the pick where both were measured, in words."""
    gains = [(loss(one.plan, one.chosen, "p5"), one.model) for one in pick.measured if one.plan is not None]
    return f": {', '.join(f'{gain:+.1f} dB on {model}' for gain, model in gains)}, for 95% of samples" if gains else ""
