"""Making plans: candidates from a profile, refined in closed loop, fitted, and measured on samples kept apart."""

import functools
import math
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from .. import measure
from ..engine import Method
from ..errors import ConfigError
from ..fingerprint import same_levels
from ..forecasters.fitted import Fitted
from ..measure import paired
from ..plain import plain_json
from ..plan import GUARD_SIGNALS, Plan, Quality, Speed
from ..policies import Guarded, Planned
from ..profile import Profile
from ..profiling import trajectory
from ..profiling.generation import Batch, Teacher, attached, device_name, device_of, dtype_of, plan_method
from ..profiling.polish import polish
from ..profiling.replay import Replay
from ..registry import unknown_name
from ..schedule import Schedule, spaced
from . import closed_loop, surrogate
from .band import with_guard
from .dynamic import NoScheduleError, Objective, Steps, best_schedule
from .static import spared
from .timesteps import kept_if_better

Progress = Callable[[str, int, int], None]
EXPONENTS = (0.6, 1.0, 1.4, 1.8)  # of schedules spaced by a power law
HISTORIES, RIDGES = (4, 3), (1e-5, 1e-4, 1e-3)  # of the fit; the first of each while schedules are searched for
FINALISTS = 3
TIMED_PAIRS = 5
MAX_PSNR = 120.0  # of images equal to within rounding


@dataclass(frozen=True)
class Search:
    """How plans are looked for.

    runs: cached generations of the fitting batch for each number of computed steps. scopes: tried for each; () for
    the profile's. last: steps at the end that are always computed. fitted: fit weights (else Taylor-1). refined: move
    steps in closed loop (else the best start is taken). regressors: let the fit scale reused outputs too, where that
    is better on the tuning batch. polished: rounds of Gauss–Newton on the weights at the end. seed: of the search.
    sigmas: move the sampler's noise levels (`timesteps.kept_if_better`). guard: the signal that plans carry a band of,
    measured on the tuning batch; None for none.
    """

    runs: int = 60
    scopes: tuple[str | None, ...] = ()
    last: int = 0
    fitted: bool = True
    refined: bool = True
    regressors: bool = True
    polished: int = 2
    seed: int = 0
    sigmas: bool = False
    guard: str | None = None

    def __post_init__(self) -> None:
        if self.guard is not None and self.guard not in GUARD_SIGNALS:
            raise unknown_name("guard signal", self.guard, GUARD_SIGNALS)


@dataclass
class Planner:
    """Makes plans for one pipeline, sampler and number of steps.

    profile: of the same. fitting: weights and schedules are chosen on it; tuning: strengths and finalists are.
    held_out: what a plan states is measured on these, which nothing else has seen; seeds: of the held-out samples.
    origin: what tells these samples from others (prompts, seeds, arguments of calls); a plan says of which it is.
    prompts: how many different texts the held-out samples are of, None for samples of classes or of nothing.
    fitted_prompts: the texts that the fitting and tuning samples are of.
    A search also starts from the steps of the nearest plans, made by this planner or in the profile.
    """

    profile: Profile
    fitting: Teacher
    tuning: Teacher
    held_out: Sequence[Teacher]
    seeds: Sequence[int]
    search: Search = field(default_factory=Search)
    progress: Progress = lambda what, done, of: None
    origin: str | None = None
    prompts: int | None = None
    fitted_prompts: Collection[str] = ()
    _scores: dict[tuple[Steps, str | None, bool], float] = field(default_factory=dict)  # the last: with fitted weights
    _schedules: dict[int, Steps] = field(default_factory=dict, init=False)  # of plans, by their number of steps

    def __post_init__(self) -> None:
        for plan in self.profile.plans:
            computed = plan.schedule.computed
            if computed is not None and plan.total == self.steps:
                self._schedules[len(computed)] = computed
        for teacher in (self.fitting, self.tuning, *self.held_out):
            self._check(teacher)
        check_scopes(self.profile, self.search.scopes)
        if self.search.guard is not None and self.tuning.batch.count < 2:
            raise ConfigError("a guard's band is measured on the tuning samples: give at least 2")
        if not 0 <= self.search.last < self.steps:
            raise ConfigError(f"last must be from 0 to {self.steps - 1}, of {self.steps} steps, not {self.search.last}")
        held_out = sum(teacher.batch.count for teacher in self.held_out)
        if not held_out or held_out != len(self.seeds):
            raise ConfigError(
                f"{held_out} held-out samples and {len(self.seeds)} seeds: give at least one, each its seed"
            )

    def _check(self, teacher: Teacher) -> None:
        """What would only show once all is measured."""
        profile = self.profile
        if profile.total != teacher.steps:
            raise ConfigError(
                f"the profile has {profile.total} steps and the generation {teacher.steps}: profile again, "
                "or plan with the profile's number of steps"
            )
        levels = profile.noise_levels, teacher.noise_levels
        if all(levels) and not same_levels(*levels):
            raise ConfigError(
                "the generation runs through other noise levels than the profile: profile again with this sampler and "
                "size, or plan with the profile's"
            )
        if teacher.branches != len(profile.passes):
            raise ConfigError(
                f"the generation has {teacher.branches} guidance branches and the profile {len(profile.passes)}: "
                "profile again with this guidance, or plan with the profile's"
            )
        guidance, size = profile.fingerprint.guidance, profile.fingerprint.sample_shape
        if guidance is not None and teacher.guidance_scales and guidance not in teacher.guidance_scales:
            raise ConfigError(
                f"the generation is at guidance {max(teacher.guidance_scales):g} and the profile at {guidance:g}: "
                "profile again with this guidance, or plan with the profile's"
            )
        if size is not None and tuple(teacher.states[0].shape[1:]) != size:
            raise ConfigError(
                f"the generation's latents are of {list(teacher.states[0].shape[1:])} and the profile's of "
                f"{list(size)}: profile again at this size, or plan at the profile's"
            )

    @property
    def steps(self) -> int:
        return self.fitting.steps

    @property
    def _fixed(self) -> frozenset[int]:
        """Steps that every plan computes."""
        return frozenset(self.fitting.begun) | frozenset(range(self.steps - self.search.last, self.steps))

    @property
    def least(self) -> int:
        """The fewest steps that a plan can compute."""
        return len(self._fixed)

    @property
    def scopes(self) -> tuple[str | None, ...]:
        """Where plans may cache."""
        return self.search.scopes or (self.profile.scope,)

    def made(self, plan: Plan) -> bool:
        """Whether this planner would make the plan again: the same search, on as many samples, scored on the same."""
        facts = self._facts
        seeds = plan.quality is not None and plan.quality.seeds == tuple(self.seeds)
        found = {name: plan.facts.get(name) for name in facts}
        if isinstance(found["search"], dict):  # options that it does not name are at their defaults
            found["search"] = {**plain_json(vars(Search())), **found["search"]}
        return seeds and found == facts

    @property
    def _facts(self) -> dict[str, Any]:
        """What a plan depends on, beside the profile and the seeds."""
        origin = {} if self.origin is None else {"origin": self.origin}
        return {
            **origin,
            "fitted_on": self.fitting.batch.count,
            "tuned_on": self.tuning.batch.count,
            "search": plain_json(vars(self.search)),
        }

    def plan(self, computed: int, name: str | None = None, scopes: Sequence[str | None] = ()) -> Plan:
        """The best plan found that computes so many steps, with its quality and speed.

        scopes: of the search's, those to look at; () for all.

        Raises:
            ConfigError: for a number of computed steps that cannot be.
        """
        if not self.least <= computed <= self.steps:
            raise ConfigError(f"of {self.steps} steps, {self.least} to {self.steps} can be computed, not {computed}")
        label = name or f"nfe-{computed}"
        settings, finalists = self._finalists(computed, label, scopes or self.scopes)
        schedule, result, fit_settings = self._tuned(finalists, settings, label)
        if self.search.fitted and self.search.polished:
            result = replace(result, forecaster=self._polished(schedule, result.forecaster, fit_settings, label))
        self._schedules[computed] = schedule
        plan = self._assembled(label, schedule, result, fit_settings)
        if self.search.sigmas:
            plan = kept_if_better(
                plan,
                self.fitting,
                self.profile.fingerprint.sigmas,
                lambda moved: self._tuning_score(Planned(moved), Fitted.of(moved), fit_settings),
            )
        if self.search.guard is not None:
            plan = with_guard(plan, self.search.guard, [self.tuning.batch])
        return self.measured(plan)

    def _tuning_score(self, policy: Planned, forecaster: Fitted, settings: trajectory.Settings) -> float:
        return closed_loop.score(psnr(self._images(self.tuning, policy, forecaster, settings), self.tuning.images))

    def starts(self, computed: int) -> list[Steps]:
        """Schedules of so many computed steps: optimal ones for the profile's surrogates, those that add to the
        nearest cheaper plan's steps or leave some of the nearest dearer one's out, and evenly spaced ones.
        """
        damage = self._damage
        found = [
            self._optimal(damage, computed),
            self._optimal(damage**2, computed),
            self._optimal(surrogate.edge_powers(damage, 2.0), computed),
            self._optimal(damage, computed, "minimax"),
        ]
        cheaper = max((count for count in self._schedules if count < computed), default=None)
        dearer = min((count for count in self._schedules if count > computed), default=None)
        if cheaper is not None:
            more = damage.copy()
            more[..., list(self._schedules[cheaper])] = math.inf  # must not be reused
            found.append(self._optimal(more, computed))
        if dearer is not None:
            fewer = damage.copy()
            others = sorted({*range(self.steps)} - {*self._schedules[dearer]})
            fewer[:, others] = math.inf  # must not be reused from
            found.append(self._optimal(fewer, computed))
        every = -(-self.steps // computed)
        uniform = tuple(range(0, self.steps, every))
        if len(uniform) == computed and self._fixed <= {*uniform}:
            found.append(uniform)
        found += [self._spaced(computed, exponent) for exponent in EXPONENTS]
        return list(dict.fromkeys(steps for steps in found if steps is not None))

    def _spaced(self, computed: int, exponent: float) -> Steps:
        """By a power law, the nearest of its steps moved to each that every plan computes."""
        steps = {*spaced(self.steps, computed, exponent, self.search.last)}
        for fixed in sorted(self._fixed - steps):
            steps.remove(min(steps - self._fixed, key=lambda step: abs(step - fixed)))
            steps.add(fixed)
        return tuple(sorted(steps))

    def _optimal(self, damage: Any, computed: int, objective: Objective = "sum") -> Steps | None:
        try:
            best = best_schedule(damage, range(computed, computed + 1), objective, last=self.search.last)
        except NoScheduleError:
            return None
        return best[computed].computed

    @functools.cached_property
    def _damage(self) -> surrogate.Array:
        """Of forecasting by a straight line, [T, T, T], by the profile; infinite where nothing can be forecast."""
        damage = surrogate.mean_damages(self.profile)
        damage[..., list(self.fitting.begun)] = math.inf
        return damage

    def _finalists(
        self, computed: int, label: str, scopes: Sequence[str | None]
    ) -> tuple[trajectory.Settings, list[Steps]]:
        """The scope whose starts score best, and the best schedules found there."""
        starts = self.starts(computed)
        begun = {scope: self._searched(starts, scope, len(starts), label) for scope in scopes}
        best = max(begun, key=lambda scope: begun[scope][0].score)
        found = begun[best]
        start = found[0].computed
        if self.search.refined:
            found = self._searched([tried.computed for tried in found], best, self.search.runs, label)
        # the start too, in case the search has only learned the fitting batch by heart
        finalists = dict.fromkeys([*(tried.computed for tried in found[:FINALISTS]), start])
        return self._settings(best), list(finalists)

    def _searched(self, starts: Sequence[Steps], scope: str | None, runs: int, label: str) -> list[closed_loop.Tried]:
        """The schedules that a search ran, best first."""
        settings = self._settings(scope)

        def run(steps: Steps) -> float:
            key = steps, scope, self.search.fitted
            if key not in self._scores:
                self._scores[key] = closed_loop.score(psnr(self._fit(steps, settings).images, self.fitting.images))
            return self._scores[key]

        def told(done: int, of: int, best: float) -> None:
            self.progress(f"{label}, {scope}: {best:.2f} dB", done, of)

        last, seed = self.search.last, self.search.seed
        tried = closed_loop.refine(
            run, starts, self._damage, runs, last=last, also=self.fitting.begun, seed=seed, progress=told
        )
        return sorted(tried, key=lambda one: -one.score)

    def _settings(self, scope: str | None) -> trajectory.Settings:
        depth = self.profile.depth if scope == self.profile.scope else None
        return trajectory.Settings(scope=scope, depth=depth, history=HISTORIES[0], ridge=RIDGES[0])

    def _fit(self, computed: Steps, settings: trajectory.Settings) -> trajectory.Result:
        policy = Planned(self._bare(computed, settings))
        if self.search.fitted:
            return trajectory.fit(self.fitting, policy, settings)
        empty = Fitted(length=2, feature=settings.feature)
        return trajectory.Result(empty, self._images(self.fitting, policy, empty, settings), {}, {})

    def _tuned(
        self, finalists: Sequence[Steps], settings: trajectory.Settings, label: str
    ) -> tuple[Steps, trajectory.Result, trajectory.Settings]:
        """Of the finalists and strengths of the fit, the best on the tuning batch."""
        if self.search.fitted:
            choices = [replace(settings, history=k, ridge=ridge) for k in HISTORIES for ridge in RIDGES]
        else:
            choices = [settings]
        best: tuple[float, Steps, trajectory.Result, trajectory.Settings] | None = None
        tried = [(steps, settings) for steps in finalists]
        regressors = self.search.fitted and self.search.regressors
        for number, (steps, choice) in enumerate(tried):
            self.progress(f"{label}: tuning", number, len(finalists) + len(choices))
            result = self._fit(steps, choice)
            score = self._tuning_score(Planned(self._bare(steps, choice)), result.forecaster, choice)
            if best is None or score > best[0]:
                best = score, steps, result, choice
            if number == len(finalists) - 1:  # then its strengths
                tried += [(best[1], choice) for choice in choices if choice != settings]
            if number == len(tried) - 1 and not choice.scale:
                if self.search.fitted and not choice.robust:
                    tried.append((best[1], replace(best[3], robust=True)))
                elif regressors:
                    tried.append((best[1], replace(best[3], scale=True)))
        assert best is not None
        return best[1:]

    def _polished(self, computed: Steps, forecaster: Fitted, settings: trajectory.Settings, label: str) -> Fitted:
        policy = Planned(self._bare(computed, settings))
        replay = Replay(self.fitting.batch.pipe, _method(policy, forecaster, settings))

        def generate(weights: Fitted, step: int | None) -> Tensor:
            with replay.noted() if step is None else replay.until(step):
                return self._images(self.fitting, policy, weights, settings)

        return polish(
            forecaster,
            generate,
            self.fitting.images,
            lambda weights: self._tuning_score(policy, weights, settings),
            rounds=self.search.polished,
            nudge=trajectory.nudge_of(dtype_of(self.fitting.batch.pipe)),
            progress=lambda done, of: self.progress(f"{label}: polishing", done, of),
        )

    def _images(self, teacher: Teacher, policy: Planned, forecaster: Fitted, settings: trajectory.Settings) -> Tensor:
        batch = teacher.batch
        with attached(batch.pipe, _method(policy, forecaster, settings)):
            return batch.images(batch.call()).detach().float()

    def _bare(self, computed: Steps, settings: trajectory.Settings) -> Plan:
        """The plan without weights."""
        schedule = Schedule.uniform(step in computed for step in range(self.steps))
        return Plan(
            name="",
            scope=settings.scope or self.profile.scope,
            depth=settings.depth,
            feature=settings.feature,
            schedule=schedule,
            noise_levels=self.fitting.noise_levels,
        )

    def _assembled(self, name: str, computed: Steps, result: trajectory.Result, settings: trajectory.Settings) -> Plan:
        bare = self._bare(computed, settings)
        nodes, weights, correction = result.forecaster.as_tensors(self.steps, self.fitting.branches)
        facts = {
            **self._facts,
            "history": settings.history,
            "ridge": settings.ridge,
            "robust": settings.robust,
            "regressors": [name for name in ("scale", "bias") if getattr(settings, name)],
            "left_to_taylor": {str(step): why for step, why in sorted(result.notes.items())},
        }
        plan = replace(
            bare,
            name=name,
            nodes=nodes,
            weights=weights,
            correction=correction,
            row_passes=self.fitting.rows,
            nfe=self.nfe(len(computed), bare.scope),
            facts=facts,
        )
        return plan.fitted_to(self.fitted_prompts) if self.fitted_prompts else plan

    def nfe(self, computed: int, scope: str | None = None) -> float:
        """Denoiser evaluations of a plan with so many computed steps: see `evaluations`."""
        return evaluations(self.profile, computed, scope)

    def timed(self, computed: int, scope: str | None) -> Speed:
        """The speed of a plan with so many computed steps, before it is made: which ones they are hardly matters."""
        settings = self._settings(scope)
        return self._speed(self._bare(self._spaced(computed, 1.0), settings))

    def fitted(self, computed: Steps, name: str) -> Plan:
        """The plan of a schedule that is given, with fitted weights: not searched for, not measured.

        Raises:
            ConfigError: for one without a step that is computed whatever is planned.
        """
        lacking = sorted({*self.fitting.begun} - {*computed})
        if lacking:
            raise ConfigError(
                f"a denoiser or guidance branch begins at step {lacking[0]} with nothing to go on: compute it too"
            )
        settings = self._settings(self.scopes[0])
        return self._assembled(name, computed, self._fit(computed, settings), settings)

    def measured(self, plan: Plan) -> Plan:
        """The plan with its quality on the held-out samples, and its speed."""
        return replace(plan.stating(self.quality(plan), self.prompts), speed=self._speed(plan))

    def timed_here(self, plan: Plan) -> Plan:
        """The plan with its speed on this device in a batch of this size, measured where it states another's."""
        batch = self.held_out[-1].batch
        here = device_name(device_of(batch.pipe)), batch.count
        if plan.speed is not None and (plan.speed.device, plan.speed.batch) == here:
            return plan
        return replace(plan, speed=self._speed(plan))

    def quality(self, plan: Plan) -> Quality:
        """The plan's PSNR on the held-out samples."""
        settings = trajectory.Settings(scope=plan.scope, depth=plan.depth)
        forecaster, policy = Fitted.of(plan), Planned(plan)
        values: list[float] = []
        for number, teacher in enumerate(self.held_out):
            self.progress(f"{plan.name}: held-out samples", number, len(self.held_out))
            values += psnr(self._images(teacher, policy, forecaster, settings), teacher.images)
        return Quality.of("psnr", values, self.seeds)

    def _speed(self, plan: Plan) -> Speed:
        batch: Batch = self.held_out[-1].batch
        method = plan_method(plan)
        with ExitStack() as setting:
            timing = paired(
                batch.call,
                batch.call,
                TIMED_PAIRS,
                before_a=setting.close,
                before_b=lambda: setting.enter_context(attached(batch.pipe, method)),
            )
        ratios = sorted(timing.wall_ratios)
        return Speed(timing.wall_ratio, ratios[0], ratios[-1], device_name(device_of(batch.pipe)), batch.count)


def check_scopes(profile: Profile, scopes: Sequence[str | None]) -> None:
    """ConfigError for a scope that leaves out a part of the denoiser which this profile does not know the size of."""
    for scope, spans in (("cut", "a cut"), ("branch", "branches")):
        if scope in scopes and profile.scope != scope:
            raise ConfigError(
                f"how much of the denoiser a cache of {spans} spares is not in this profile, of scope {profile.scope}: "
                f"make one at scope {scope}"
            )


def evaluations(profile: Profile, computed: int, scope: str | None = None) -> float:
    """Denoiser evaluations of a plan with so many computed steps; scope None for the profile's.

    A reused step still runs what lies outside the spans: of a UNet's cut, or branches (see `check_scopes`).
    """
    share = spared(profile) if scope in (None, profile.scope) else 1.0
    return computed + (profile.total - computed) * (1.0 - share)


def _method(policy: Planned, forecaster: Fitted, settings: trajectory.Settings) -> Method:
    return Method(Guarded(policy), forecaster, settings.scope, settings.depth, "batch")


def psnr(images: Tensor, reference: Tensor) -> list[float]:
    """Of each sample, [n], in dB: float images clamped to [0, 1] against their references; at most MAX_PSNR."""
    return measure.psnr(images.clamp(0, 1), reference.clamp(0, 1)).clamp(max=MAX_PSNR).tolist()
