"""What to cache with where no profile was made: by the kind of pipeline, and what was measured on that kind."""

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from . import published
from .engine.clock import is_flow
from .errors import ConfigError
from .models import default_scope, find_denoisers, unwrap
from .plan import Plan
from .planning.choose import choose
from .profile import Profile, shipped_profiles

FEW_STEPS = 8  # models made for so few have hardly a step that is like the one before it
MEASURED_FROM = 20  # steps; nothing was measured below
FEW_STEP_SCHEDULERS = ("LCMScheduler", "TCDScheduler", "SCMScheduler")
FEW_STEP_NAME = re.compile(
    r"turbo|lightning|schnell|sprint|hyper-?sd|(?<![a-z])(lcm|tcd|dmd2?)(?![a-z])|(?<![0-9])[1-8][-_]?steps?(?![a-z])"
)
PROFILE_IT = "a plan made from a profile of this very model (`diffusion-cache profile`, `diffusion-cache plan`)"


@dataclass(frozen=True)
class Measured:
    """A row of results/reference_all: PSNR (dB) against the uncached output. nfe: share of the uncached evaluations."""

    model: str
    method: str
    scope: str
    settings: Mapping[str, Any]
    nfe: float
    mean: float
    p5: float

    def __str__(self) -> str:
        return (
            f"{self.mean:.1f} dB on average and {self.p5:.1f} dB or more for 95% of samples, with {self.nfe:.0%} of "
            f"the evaluations"
        )


UNIFORM = {"every": 2, "forecaster": "taylor", "order": 1}
# what is recommended to each kind of model, as measured on the small one of that kind, beside the runner-up
UNET = Measured("unet-digits", "uniform Taylor", "denoiser", UNIFORM, 0.50, 60.8, 58.2)
UNET_CUT = Measured("unet-digits", "uniform Taylor", "auto", UNIFORM, 0.589, 58.9, 50.6)
DIFFUSION = Measured("dit-digits", "uniform Taylor", "auto", UNIFORM, 0.50, 58.0, 52.9)
DIFFUSION_ADAPTIVE = Measured(
    "dit-digits", "first block", "auto", {"forecaster": "taylor", "order": 1, "threshold": 0.1}, 0.453, 49.1, 41.5
)
FLOW = Measured(
    "flux-digits", "first block", "auto", {"forecaster": "taylor", "order": 1, "threshold": 0.1}, 0.517, 61.2, 48.4
)
FLOW_UNIFORM = Measured("flux-digits", "uniform Taylor", "auto", UNIFORM, 0.50, 48.3, 44.6)
VIDEO = Measured(
    "wan-moving-digits",
    "first block",
    "auto",
    {"forecaster": "taylor", "order": 1, "threshold": 0.06},
    0.485,
    57.0,
    46.5,
)
VIDEO_UNIFORM = Measured("wan-moving-digits", "uniform Taylor", "auto", UNIFORM, 0.50, 51.9, 50.9)


@dataclass(frozen=True)
class Recommendation:
    """What to do with a pipeline: `enable(pipe, policy, **options)`, or nothing where `cache` is False.

    policy: None where the options name a profile, or where caching is advised against. alternatives: in a few words.
    """

    policy: str | None
    options: Mapping[str, Any]
    reason: str
    alternatives: Sequence[str] = field(default=())

    @property
    def cache(self) -> bool:
        return self.policy is not None or bool(self.options)

    def __str__(self) -> str:
        given = {"policy": self.policy} if self.policy else {}
        arguments = "".join(f", {name}={value!r}" for name, value in {**given, **self.options}.items())
        lines = [f"dc.enable(pipe{arguments})" if self.cache else "Do not cache.", self.reason]
        return "\n".join([*lines, *(f"Or: {text}" for text in self.alternatives)])


def recommend(pipe: Any, steps: int | None = None) -> Recommendation:
    """What to use with a pipeline, and why. Nothing is run.

    steps: how many the pipeline will be called with; None for its own default. In order: nothing for few-step models;
    a shipped profile of these very weights and this sampler; what was published for this very model; else what was best
    on the small model of the same kind (`results/reference_all`), of the methods that fit no schedule to a model.

    Raises:
        ConfigError: if this is no diffusers pipeline, or for steps below 1.
        NoSpansError: if it has nothing to cache.
    """
    denoisers = find_denoisers(pipe)
    if steps is not None and (not isinstance(steps, int) or isinstance(steps, bool) or steps < 1):
        raise ConfigError(f"steps must be a whole number of at least 1, not {steps!r}")
    if steps is None:
        found = _shipped_profile(pipe, denoisers, None)
        if found is not None:
            return found
        marker = _few_step_marker(pipe, denoisers)
        if marker:
            return _none(f"{marker}: a model made for very few steps")
        steps = _default_steps(pipe)
    if steps <= FEW_STEPS:
        return _none(f"it takes {steps} step{'s' if steps > 1 else ''}")
    return (
        _shipped_profile(pipe, denoisers, steps)
        or _published(pipe, denoisers, steps)
        or _by_kind(pipe, denoisers, steps)
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


def _shipped_profile(pipe: Any, denoisers: Mapping[str, nn.Module], steps: int | None) -> Recommendation | None:
    classes = {name: type(unwrap(denoiser)).__name__ for name, denoiser in denoisers.items()}
    for name, folder in shipped_profiles().items():
        profile = Profile.load(folder)
        facts = profile.fingerprint
        own = {name: denoiser.class_name for name, denoiser in facts.denoisers.items()}
        if own != classes or facts.scheduler != type(getattr(pipe, "scheduler", None)).__name__ or not profile.plans:
            continue
        if steps not in (None, profile.total) or any(d.strict for d in profile.matches(pipe, denoisers)):
            continue
        plan = _half(profile)
        reason = f"A profile of this model and sampler, in {profile.total} steps, comes with the package."
        if plan.quality is not None:
            quality = plan.quality
            reason += (
                f" This plan computes {plan.nfe:.4g} of them: {quality.mean:.1f} dB on average and {quality.p5:.1f} dB "
                f"or more for 95% of {quality.n} held-out samples."
            )
        others = [other.name for other in profile.plans if other is not plan]
        alternatives = (f"another of its plans: {', '.join(others)}",) if others else ()
        return Recommendation(None, {"profile": name, "plan": plan.name}, reason, alternatives)
    return None


def _half(profile: Profile) -> Plan:
    """The best plan of at most half of the evaluations, else the cheapest."""
    least = min(plan.nfe for plan in profile.plans)
    return choose(profile.plans, nfe=max(profile.total / 2, least))


def _published(pipe: Any, denoisers: Mapping[str, nn.Module], steps: int) -> Recommendation | None:
    """A published step list of this very model."""
    names = {name.lower().removesuffix("-diffusers") for name in _names(pipe, denoisers)}
    entries = [
        entry
        for entry in _entries(denoisers)
        if entry.model.rsplit("/")[-1].lower().removesuffix("-diffusers") in names
    ]
    if not entries:
        return None

    def distance(entry: published.Published) -> tuple[int, float]:
        mask = entry.mask(steps)
        return abs((entry.steps or steps) - steps), abs(mask.count("1") / len(mask) - 0.5)

    entries.sort(key=distance)
    best = entries[0]
    return Recommendation(
        None,
        {"profile": f"published/{best.name}"},
        f"Published for {best.model} ({best.variant}, {best.steps} steps) by its authors: {best.source}. Not measured "
        "here on that model.",
        (PROFILE_IT, *(f"profile='published/{entry.name}'" for entry in entries[1:4])),
    )


def _entries(denoisers: Mapping[str, nn.Module]) -> list[published.Published]:
    """Published step lists for denoisers of these classes."""
    classes = {type(unwrap(denoiser)).__name__ for denoiser in denoisers.values()}
    found = [published.load(name) for name in published.names()]
    return [entry for entry in found if entry.has_mask and entry.transformer in classes]


def _by_kind(pipe: Any, denoisers: Mapping[str, nn.Module], steps: int) -> Recommendation:
    alternatives = [PROFILE_IT]
    models = sorted({entry.model for entry in _entries(denoisers)})
    if models:
        more = f", … {len(models)} in all" if len(models) > 3 else ""
        alternatives.append(
            f"a published step list (profile='published/…', see diffusion_cache.published.names), if the model is one "
            f"of {', '.join(models[:3])}{more}"
        )
    if steps < MEASURED_FROM:
        return Recommendation(
            "first_block",
            {"threshold": 0.03},
            f"Nothing was measured at {steps} steps ({MEASURED_FROM} and more only), and reuse gains less the fewer "
            "there are. This policy computes wherever the first block says that features change much, and 0.03 is the "
            "most careful threshold that was measured.",
            tuple(alternatives),
        )
    if any(default_scope(denoiser) == "cut" for denoiser in denoisers.values()):
        return Recommendation(
            "interval",
            {"every": 2, "scope": "denoiser"},
            f"A UNet: on {UNET.model}, computing every second step and forecasting its output with Taylor gave {UNET}. "
            f"Reusing below a cut gave {UNET_CUT}.",
            tuple(alternatives),
        )
    scheduler = getattr(pipe, "scheduler", None)
    if scheduler is None or not hasattr(scheduler, "sigmas") or not is_flow(scheduler):
        return Recommendation(
            "interval",
            {"every": 2},
            f"A transformer with a diffusion sampler: on {DIFFUSION.model} with DDIM, computing every second step and "
            f"forecasting with Taylor gave {DIFFUSION}. The adaptive first_block gave {DIFFUSION_ADAPTIVE}.",
            tuple(alternatives),
        )
    video = "num_frames" in inspect.signature(type(pipe).__call__).parameters
    best, uniform = (VIDEO, VIDEO_UNIFORM) if video else (FLOW, FLOW_UNIFORM)
    return Recommendation(
        "first_block",
        {"threshold": best.settings["threshold"]},
        f"A transformer with a flow sampler{', for video' if video else ''}: on {best.model}, deciding by the change "
        f"of the first block and forecasting with Taylor gave {best}. Computing every second step gave {uniform}.",
        tuple(alternatives),
    )
