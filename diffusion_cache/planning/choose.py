"""Which of a profile's plans answers what was asked for."""

import warnings
from collections.abc import Sequence

from ..errors import ConfigError, DiffusionCacheWarning
from ..plain import rounded_down, rounded_up
from ..plan import REFITTED, Plan
from . import guarantee


def choose(
    plans: Sequence[Plan],
    *,
    speedup: float | None = None,
    min_psnr: float | None = None,
    nfe: float | None = None,
    plan: str | None = None,
) -> Plan:
    """The plan that suits one wish.

    speedup: the best plan whose measured speed (uncached time over its own) is at least that. min_psnr: in dB, the
    cheapest plan whose PSNR reaches it for at least 95% of prompts with 95% confidence, on held-out samples; where
    several of these are of one prompt, of seeds of those prompts, with a warning. nfe: the best plan of at most so
    many denoiser evaluations a run. plan: the one called so.

    Raises:
        ConfigError: for none or several wishes at once, and one that no plan fulfils; names the nearest that one does.
    """
    wishes = {"speedup": speedup, "min_psnr": min_psnr, "nfe": nfe, "plan": plan}
    given = {wish: value for wish, value in wishes.items() if value is not None}
    if not plans:
        raise ConfigError("the profile holds no plans: make some with `diffusion-cache plan`")
    if len(given) != 1:
        if not given and len(plans) == 1:
            return plans[0]
        raise ConfigError(f"say what you want of the profile, one of {', '.join(wishes)}. {_offered(plans)}")
    if plan is not None:
        named = [found for found in plans if found.name == plan]
        if not named:
            raise ConfigError(f"the profile has no plan {plan!r}. {_offered(plans)}")
        return named[0]
    if speedup is not None:
        _check_number("speedup", speedup, 0.0)
        timed = [plan for plan in plans if plan.speed is not None]
        if not timed:
            raise ConfigError(f"the profile's plans were not timed: choose by nfe or min_psnr. {_offered(plans)}")
        fast = [plan for plan in timed if _speed(plan) >= speedup]
        if not fast:
            nearest = max(timed, key=_speed)
            raise ConfigError(
                f"no plan is {speedup:g}× as fast as the uncached pipeline; the fastest is {nearest.name!r} with "
                f"{rounded_down(_speed(nearest)):.2f}×. Ask for that, or make faster plans with `diffusion-cache plan`"
            )
        return max(fast, key=_quality)
    if nfe is not None:
        _check_number("nfe", nfe, 0.0)
        cheap = [plan for plan in plans if plan.nfe <= nfe + 1e-6]
        if not cheap:
            nearest = min(plans, key=lambda plan: plan.nfe)
            raise ConfigError(
                f"no plan takes {nfe:g} denoiser evaluations or fewer; the cheapest, {nearest.name!r}, takes "
                f"{rounded_up(nearest.nfe):g}"
            )
        return max(cheap, key=_quality)
    assert min_psnr is not None
    _check_number("min_psnr", min_psnr, None)
    measured = [plan for plan in plans if plan.quality is not None and plan.quality.metric == "psnr"]
    if not measured:
        raise ConfigError("the profile's plans have no measured PSNR: make them with `diffusion-cache plan`")
    # of fewer samples nothing can be promised, so that such a plan is none to choose from; of all, that is told
    needed = guarantee.needed()
    measured = [plan for plan in measured if plan.quality and plan.quality.n >= needed] or measured
    # of equal cost, one that was fitted to all prompts first: a test that fails ends the search
    measured.sort(key=lambda plan: (-plan.nfe, REFITTED in plan.facts, plan.name))
    values = [plan.quality.values for plan in measured if plan.quality is not None]
    chosen = measured[guarantee.pick(values, min_psnr)]
    prompts = chosen.held_out_prompts
    if prompts is not None and chosen.quality is not None and prompts < chosen.quality.n:  # they are not independent
        of = f"{prompts} prompts that it was measured on" if prompts else "prompts that it was made from"
        warnings.warn(
            f"plan {chosen.name!r} is shown to reach {min_psnr:g} dB for 95% of seeds of the {of}, which says less of "
            f"other prompts: plan with as many prompts as held-out samples, at least {needed}",
            DiffusionCacheWarning,
            stacklevel=2,
        )
    return chosen


def _check_number(wish: str, value: float, above: float | None) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and value == value
    if not number or (above is not None and value <= above):
        raise ConfigError(f"{wish} must be a number{'' if above is None else f' above {above:g}'}, not {value!r}")


def _speed(plan: Plan) -> float:
    return plan.speed.ratio if plan.speed is not None else 0.0


def _quality(plan: Plan) -> tuple[float, float, float]:
    """Mean and 5th percentile together; plans that were not measured by the work they do."""
    if plan.quality is None:
        return (0.0, 0.0, plan.nfe)
    return (1.0, plan.quality.mean + plan.quality.p5, -plan.nfe)


def _offered(plans: Sequence[Plan]) -> str:
    shown = []
    for plan in plans:
        facts = [f"{plan.nfe:.4g} evaluations"]
        if plan.speed is not None:
            facts.append(f"{plan.speed.ratio:.2f}×")
        if plan.quality is not None:
            facts.append(f"{plan.quality.mean:.1f} dB")
        shown.append(f"{plan.name} ({', '.join(facts)})")
    return f"Plans: {'; '.join(shown)}"
