"""BAC's claims, on a Diffusion-Policy transformer that acts in a loop of its own, and on images."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cache, cached_property
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from ... import api
from ...context import branch_kind
from ...forecasters.fitted import Fitted
from ...measure import executed_flops
from ...plan import Plan
from ...planning.static import marks, static_plan
from ...policies import Planned
from ...profile import Profile
from ...profiling.generation import Batch, Loop
from ...profiling.measure import Options, measure
from ...reference import reacher, reaching
from ...schedule import spaced
from ...systems import BAC
from ...systems.bac import FEED_FORWARD, similarity, update_steps
from .bench import Bench
from .claims import Outcome, SeedSet, claim

EACH = 3  # episodes and moments of each seed
UPDATES = (10, 20)  # of 100 steps
PLAYED = 20  # updates where episodes are played
IMAGE_UPDATES, IMAGES = 17, 4  # of 50 steps; samples
LAST = 3  # steps at the end that are computed as well, to see how much hangs on them
FEW = 10  # steps that all schedules are tried of
TOLERANCE = 0.05  # of success that "as often" allows


class Acting:
    """The reacher with one set of seeds: what plans do to its actions, from the same moments and noise."""

    def __init__(self, seeds: SeedSet):
        self.model = reacher.load()
        self.loop = Loop(self.model, reacher.scheduler())
        self.fitting = seeds.fitting
        self.reporting = [seed * EACH + i for seed in seeds.reporting for i in range(EACH)]  # no other set has them

    def actions(self, seeds: Sequence[int], plan: Plan | None = None) -> Tensor:
        """At a random moment of a demonstration each; plan None: uncached."""
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        moments = [reaching.demonstrations(1, reacher.HORIZON, generator)[0] for generator in generators]
        with self.within(plan):
            return reacher.act(self.model, torch.cat(moments), generators, sampler=self.loop.scheduler)

    def within(self, plan: Plan | None) -> AbstractContextManager[Any]:
        if plan is None:
            return nullcontext()
        parts = Planned(plan), Fitted.of(plan)
        return api.run(self.model, *parts, scope=plan.scope, num_steps=reacher.STEPS)

    @cached_property
    def profile(self) -> Profile:
        def make(samples: Sequence[tuple[str, int]]) -> Batch:
            return self.loop.batch(lambda: self.actions([seed for _, seed in samples]), len(samples))

        options = Options("branch", batch=len(self.fitting), sensitivity_samples=0)
        found = measure(make, [("a moment", seed) for seed in self.fitting], options)
        assert found is not None
        return found

    @cached_property
    def uncached(self) -> tuple[Tensor, int]:
        """Actions, and the FLOPs of one denoising."""
        return self.actions(self.reporting), executed_flops(lambda: self.actions(self.reporting[:1]))

    def error(self, plan: Plan) -> float:
        """Relative L2 distance to the uncached actions, mean over moments."""
        full = self.uncached[0]
        difference = (self.actions(self.reporting, plan) - full).flatten(1).norm(dim=1)
        return (difference / full.flatten(1).norm(dim=1)).mean().item()

    def work(self, plan: Plan) -> float:
        """Executed FLOPs over the uncached ones."""
        return executed_flops(lambda: self.actions(self.reporting[:1], plan)) / self.uncached[1]

    def success(self, plan: Plan | None) -> float:
        """Share of episodes that succeed."""
        return reacher.successes(self.model, self.reporting, lambda: self.within(plan)).float().mean().item()


acting = cache(Acting)


@cache
def images(seeds: SeedSet) -> Bench:
    return Bench("dit-digits", seeds, count=IMAGES)


def with_as_much(nfe: float, plans: Iterable[Plan]) -> Plan:
    """The first of these plans, with ever more updates, that spends no less."""
    return next(plan for plan in plans if plan.nfe >= nfe)


def each_its_own(profile: Profile, least: int) -> Iterable[Plan]:
    """Plans with a schedule for each branch, without the union, of ever more updates."""
    return (BAC(updates, upstream=0).plan(profile) for updates in range(least, profile.total + 1))


def one_for_all(profile: Profile, least: int) -> Iterable[Plan]:
    return (BAC(updates, unified=True).plan(profile) for updates in range(least, profile.total + 1))


def evenly(profile: Profile, least: int) -> Iterable[Plan]:
    """Evenly spaced updates of all branches at once."""
    for updates in range(least, profile.total + 1):
        even = [spaced(profile.total, updates, 1.0)] * len(profile.spans)
        yield static_plan(profile, f"even-{updates}", marks(profile.total, even))


def less_harm(seeds: SeedSet, compared: Callable[[Profile, int], tuple[Plan, Plan]], names: tuple[str, str]) -> Outcome:
    """Whether the first plan's actions are nearer to the uncached ones than the second's, at each of UPDATES."""
    bench = acting(seeds)
    figures: dict[str, float] = {}
    ours, spent = [], []
    for updates in UPDATES:
        plans = compared(bench.profile, updates)
        errors, works = [bench.error(plan) for plan in plans], [bench.work(plan) for plan in plans]
        for name, error, work in zip(names, errors, works, strict=True):
            figures |= {f"{name}, {updates}: error": error, f"{name}, {updates}: work": work}
        ours.append(f"{updates} updates: error {errors[0]:.3f} and {errors[1]:.3f}")
        spent.append(f"{works[0]:.3f} and {works[1]:.3f} of the FLOPs")
    holds = all(figures[f"{names[0]}, {m}: error"] < figures[f"{names[1]}, {m}: error"] for m in UPDATES)
    return Outcome("; ".join(ours), "; ".join(spent), holds, figures)


def less_harm_to_images(seeds: SeedSet, compared: Callable[[Profile, int], tuple[Plan, Plan]]) -> Outcome:
    bench = images(seeds)
    first, second = (
        bench.run(plan=plan) for plan in compared(bench.profile("branch", sensitivity_samples=0), IMAGE_UPDATES)
    )
    return Outcome(
        f"{first.mean:.2f} and {second.mean:.2f} dB",
        f"{first.work:.3f} and {second.work:.3f} of the FLOPs",
        first.mean > second.mean,
        {
            "first: psnr": first.mean,
            "second: psnr": second.mean,
            "first: work": first.work,
            "second: work": second.work,
        },
    )


def _unified_and_own(profile: Profile, updates: int) -> tuple[Plan, Plan]:
    return BAC(updates, unified=True).plan(profile), BAC(updates, upstream=0).plan(profile)


def _union_and_own(profile: Profile, updates: int) -> tuple[Plan, Plan]:
    union = BAC(updates).plan(profile)
    return union, with_as_much(union.nfe, each_its_own(profile, updates))


def _union_and_unified(profile: Profile, updates: int) -> tuple[Plan, Plan]:
    union = BAC(updates).plan(profile)
    return union, with_as_much(union.nfe, one_for_all(profile, updates))


def _attention_and_feed_forwards_own(profile: Profile, updates: int) -> tuple[Plan, Plan]:
    """Where the others have the schedule that is best for all."""
    alike = similarity(profile.arrays["gram_output"])
    shared, own = update_steps(alike.mean(dim=0), updates), [update_steps(values, updates) for values in alike]
    forward = [branch_kind(span.name) == FEED_FORWARD for span in profile.spans]
    first = [shared if there else steps for steps, there in zip(own, forward, strict=True)]
    second = [steps if there else shared for steps, there in zip(own, forward, strict=True)]
    plans = (("attention's own", first), ("feed-forwards' own", second))
    one, other = (static_plan(profile, name, marks(profile.total, steps)) for name, steps in plans)
    return one, other


def with_last(plan: Plan, profile: Profile) -> Plan:
    """The plan with the LAST steps computed as well."""
    last = range(plan.total - LAST, plan.total)
    steps = [{*column.nonzero().flatten().tolist(), *last} for column in plan.computed()[:, 0].T]
    return static_plan(profile, f"{plan.name}-last", marks(profile.total, steps))


@claim(
    system="bac",
    claim="Before the union, a schedule for each branch (second figure) does more harm to actions than one for all.",
)
def unified_against_each_its_own(seeds: SeedSet) -> Outcome:
    return less_harm(seeds, _unified_and_own, ("one for all", "each its own"))


@claim(
    system="bac",
    claim="It is the feed-forwards' own schedules (second figure) that do the harm, more than attention's own.",
)
def attention_against_feed_forwards(seeds: SeedSet) -> Outcome:
    return less_harm(seeds, _attention_and_feed_forwards_own, ("attention's own", "feed-forwards' own"))


@claim(
    system="bac",
    claim="The union does less harm to actions than spending as much on more updates of each branch (second figure).",
)
def union_against_each_its_own(seeds: SeedSet) -> Outcome:
    return less_harm(seeds, _union_and_own, ("union", "each its own"))


@claim(
    system="bac",
    claim="With the union, a schedule for each branch does less harm to actions than one for all (second figure).",
    reason="The union lifts three branches of 18; the other feed-forwards keep schedules of their own, which do the "
    "harm, and a union over more branches (up to all, tried once) gains less than it costs. One schedule for all, "
    "given as much, has a later last update, and the last steps of a denoising decide, where cosine similarity counts "
    f"every step alike: with the last {LAST} computed as well, errors fall to less than half, and one for all stays "
    "ahead (in the figures).",
)
def union_against_unified(seeds: SeedSet) -> Outcome:
    bench, names = acting(seeds), ("union", "one for all")
    outcome = less_harm(seeds, _union_and_unified, names)
    figures = dict(outcome.figures)
    for updates in UPDATES:
        for name, plan in zip(names, _union_and_unified(bench.profile, updates), strict=True):
            longer = with_last(plan, bench.profile)
            figures[f"{name} and the last {LAST}, {updates}: error"] = bench.error(longer)
    return replace(outcome, figures=figures)


@claim(
    system="bac",
    claim="Of images too: before the union, a schedule per branch (second figure) does more harm than one for all.",
)
def unified_against_each_its_own_on_images(seeds: SeedSet) -> Outcome:
    return less_harm_to_images(seeds, _unified_and_own)


@claim(
    system="bac",
    claim="Of images too: the union does less harm than more updates of each branch (second figure).",
    reason="As much work gives each of the 24 branches 20 updates instead of 17, which gains more than what the union "
    "takes over for three of them.",
)
def union_against_each_its_own_on_images(seeds: SeedSet) -> Outcome:
    return less_harm_to_images(seeds, _union_and_own)


@claim(system="bac", claim="The scheduler finds what trying all schedules finds.")
def scheduler_is_exact(seeds: SeedSet) -> Outcome:
    profile = acting(seeds).profile
    chosen = torch.linspace(0, profile.total - 1, FEW).round().long()
    tried, gap = 0, 0.0
    for alike in similarity(profile.arrays["gram_output"])[:, chosen][:, :, chosen]:
        for updates in range(1, FEW + 1):
            schedules = [(0, *rest) for rest in combinations(range(1, FEW), updates - 1)]
            best = max(kept(alike, steps) for steps in schedules)
            gap = max(gap, abs(best - kept(alike, sorted(update_steps(alike, updates)))))
            tried += len(schedules)
    figures = {"schedules tried": float(tried), "largest gap": gap}
    return Outcome(f"{tried:,} schedules, largest gap {gap:.1e}", "as many updates", gap < 1e-9, figures)


def kept(alike: Tensor, steps: Sequence[int]) -> float:
    """Similarity of all steps' outputs to those that they reuse."""
    ends = [*steps[1:], len(alike)]
    return sum(alike[a, a:b].sum().item() for a, b in zip(steps, ends, strict=True))


@claim(
    system="bac",
    claim=f"With BAC the policy succeeds as often, within {TOLERANCE}, as uncached and as with evenly spaced updates.",
    published="success .79 with BAC, .76 uncached and evenly spaced, at 3.4× speed (RoboMimic)",
    reason="BAC keeps up with even spacing, but neither keeps the success at a quarter of the work: the gates of this "
    "task are narrow, so that small errors of actions end an episode. One schedule for all branches, with the last "
    f"{LAST} steps computed as well, comes nearer to the uncached success for as much work (in the figures): schedules "
    "of their own set the feed-forwards apart, and similarity counts the last steps, which decide, like any other.",
)
def success_is_kept(seeds: SeedSet) -> Outcome:
    bench = acting(seeds)
    bac = BAC(PLAYED).plan(bench.profile)
    even = with_as_much(bac.nfe, evenly(bench.profile, PLAYED))
    shared = with_last(with_as_much(bac.nfe - LAST, one_for_all(bench.profile, 1)), bench.profile)
    full, ours, evens, longer = (bench.success(plan) for plan in (None, bac, even, shared))
    work, even_work, longer_work = (bench.work(plan) for plan in (bac, even, shared))
    return Outcome(
        f"success {ours:.2f} with BAC, {full:.2f} uncached, {evens:.2f} evenly spaced",
        f"{work:.3f} with BAC and {even_work:.3f} evenly spaced of the uncached FLOPs",
        ours >= max(full, evens) - TOLERANCE,
        {
            "bac": ours,
            f"one for all and the last {LAST}": longer,
            "uncached": full,
            "even": evens,
            "bac: work": work,
            "even: work": even_work,
            f"one for all and the last {LAST}: work": longer_work,
        },
    )
