"""Guards: limits on reuse, and on computing the unconditional pass, that hold for every policy, as one wrapper."""

import math
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from torch import Tensor

from ..context import Needs, PassState, Past, Policy, Step, Verdict, largest, noise_share
from ..errors import ConfigError, DiffusionCacheWarning
from ..schedule import Schedule
from .drift import Drift


@dataclass(frozen=True)
class Guards:
    """When a step is computed whatever the policy says.

    warmup: first steps computed (at least 1), of each denoiser and guidance branch by itself. last: last steps
    computed. start, end: reuse only inside this part of the run, as fractions of its steps. max_consecutive: longest
    run of reused steps. max_reused: reused steps in one run, per pass; both of each span, where spans have schedules of
    their own. sigma_max, sigma_min: reuse only at noise levels between them, σ / (α + σ) from 0 (no noise) to 1 (pure
    noise); of flow samplers, that is their own σ. unconditional_every: the unconditional pass (every guidance branch of
    a step but the first, where they are calls of their own) is computed at most at one step in so many, and reused in
    between whatever the policy says, as in FasterCache (arXiv 2410.19355): what is forecast of it is by how much it
    differs from the first branch, but for denoisers compiled as a whole, where it is forecast from its own past. Not
    for forecasters that keep inputs.
    """

    warmup: int = 1
    last: int = 0
    start: float = 0.0
    end: float = 1.0
    max_consecutive: int | None = None
    max_reused: int | None = None
    sigma_max: float = 1.0
    sigma_min: float = 0.0
    unconditional_every: int = 1

    def __post_init__(self) -> None:
        if self.warmup < 1:
            raise ConfigError(f"warmup must be at least 1 (the first step is always computed), not {self.warmup}")
        if self.unconditional_every < 1:
            raise ConfigError(f"unconditional_every must be at least 1 (no limit), not {self.unconditional_every}")
        if self.last < 0:
            raise ConfigError(f"last must be ≥ 0, not {self.last}")
        if not 0.0 <= self.start <= self.end <= 1.0:
            raise ConfigError(f"start and end must satisfy 0 ≤ start ≤ end ≤ 1, not {self.start} and {self.end}")
        if not 0.0 <= self.sigma_min <= self.sigma_max <= 1.0:
            raise ConfigError(
                f"sigma_min and sigma_max must satisfy 0 ≤ sigma_min ≤ sigma_max ≤ 1, not {self.sigma_min} and "
                f"{self.sigma_max}: they are shares of noise, σ / (α + σ)"
            )
        for name in ("max_consecutive", "max_reused"):
            limit = getattr(self, name)
            if limit is not None and limit < 0:
                raise ConfigError(f"{name} must be None or ≥ 0, not {limit}")

    @staticmethod
    def _first_step(fraction: float, total: int) -> int:
        """The first step at or past a fraction of the run; 0.28 × 50 is 14, though a little more in floating point."""
        return math.ceil(fraction * total - 1e-9)

    def _holds(self, step: Step) -> bool:
        """Whether a step lies in the window of noise."""
        if step.noise_level is None:
            raise ConfigError(
                "sigma_max and sigma_min need the sampler's noise levels, which it does not tell: use start and end, "
                "or in a loop of your own pass noise_levels to diffusion_cache.run"
            )
        return self.sigma_min - 1e-6 <= noise_share(step.noise_level) <= self.sigma_max + 1e-6

    @cached_property
    def _told(self) -> set[int]:
        """Lengths of runs in which nothing can be reused."""
        return set()

    def check(self, total: int) -> None:
        """Warn, once for a length, where they leave nothing to reuse in runs of so many steps."""
        first = max(self.warmup, self._first_step(self.start, total))
        end = min(total - self.last, self._first_step(self.end, total))
        if first >= end:
            window = f"warmup={self.warmup}, last={self.last}, start={self.start:g} and end={self.end:g}"
            self.tell_of_nothing(total, f"{window} have")

    def tell_of_nothing(self, total: int, which: str = "its guards have") -> None:
        """Warn that nothing is reused in runs of so many steps."""
        if total > 1 and total not in self._told:
            self._told.add(total)
            warnings.warn(
                f"nothing is reused in a run of {total} steps: {which} all of them computed",
                DiffusionCacheWarning,
                stacklevel=4,
            )

    @property
    def has_noise_window(self) -> bool:
        return self.sigma_min > 0 or self.sigma_max < 1

    def forced(self, step: Step, state: PassState) -> str | None:
        """The reason to compute this step, if a guard has one."""
        if step.index - state.first < self.warmup:
            return "warm-up"
        if self.max_consecutive is not None and state.consecutive >= self.max_consecutive:
            return "max_consecutive"
        if self.max_reused is not None and state.reused >= self.max_reused:
            return "max_reused"
        if self.has_noise_window and not self._holds(step):
            return "outside the window"
        if step.total is None:
            if self.last or self.start > 0 or self.end < 1:
                raise ConfigError("last, start and end need the number of steps: pass num_steps to diffusion_cache.run")
            return None
        if step.index >= step.total - self.last:
            return "last steps"
        if not self._first_step(self.start, step.total) <= step.index < self._first_step(self.end, step.total):
            return "outside the window"
        return None

    def spared(self, step: Step, state: PassState) -> bool:
        """Whether this is a pass that is reused though its policy would compute it; `forced` comes first."""
        due = state.last_computed < 0 or step.index - state.last_computed >= self.unconditional_every
        return step.pass_index > 0 and not due


@dataclass(frozen=True)
class Guarded:
    """A policy under guards: what the engine asks. drift: for planned policies, whose runs are then decided stepwise.

    `guards` hold whatever the drift guard does; steps they compute are neither extra nor dropped. noise_levels: of the
    run that it is for, log-SNR, one a step; empty if not known. spans: their names in the denoiser that it is for.
    """

    policy: Policy
    guards: Guards = Guards()
    drift: Drift | None = None
    noise_levels: tuple[float, ...] = ()
    spans: tuple[str, ...] = ()

    @cached_property
    def needs(self) -> Needs:
        if self.drift is None:
            return self.policy.needs
        watched = self.drift.needs
        return replace(self.policy.needs, signals=watched.signals, previous=watched.previous)

    @property
    def planned(self) -> bool:
        """Whether decisions depend on the step alone, so that the whole schedule is known beforehand."""
        return not self.needs.signals

    @property
    def sigmas(self) -> tuple[float, ...] | None:
        """Noise levels that the policy moves the sampler's to."""
        return self.policy.sigmas

    def for_run(self, noise_levels: Sequence[float], spans: Sequence[str] = ()) -> "Guarded":
        """The same under the same guards, for a run through these noise levels; a band is for one run's alone."""
        policy, levels, names = self.policy.for_run(noise_levels), tuple(noise_levels), tuple(spans)
        if policy is self.policy:
            known = (levels, names) == (self.noise_levels, self.spans)
            return self if known else replace(self, noise_levels=levels, spans=names)
        return replace(self, policy=policy, drift=None, noise_levels=levels, spans=names)

    def schedule(self, total: int) -> Schedule | None:
        """The schedule of a run of `total` steps, or None where it is decided from signals."""
        self.guards.check(total)
        if self.policy.needs.signals or (self.drift is not None and self.drift.total == total):
            return None
        own = self.policy.schedule_of(total, self.spans)
        passes = max(map(len, own.compute)) if own else 1
        if self.guards.unconditional_every > 1:
            passes = max(passes, 2)
        width = max(len(row) for step in own.compute for row in step) if own else 1
        states = [PassState() for _ in range(passes)]
        of_spans = [[PassState() for _ in range(width)] for _ in range(passes)]
        rows = []
        for index in range(total):
            row = []
            for position, state in enumerate(states):
                step = self._step(index, total, position)
                wanted: tuple[bool, ...]
                if own is None:
                    verdict = self.policy.decide(step, None, state)
                    wanted, accumulated = (verdict.compute,), verdict.accumulated
                else:
                    wanted, accumulated = own.row(index, position), 0.0
                if self.guards.spared(step, state):
                    wanted, accumulated = (False,), 0.0
                spans = tuple(
                    compute or self.guards.forced(step, span) is not None
                    for compute, span in zip(wanted * (width // len(wanted)), of_spans[position], strict=True)
                )
                for compute, span in zip(spans, of_spans[position], strict=True):
                    span.update(index, compute)
                state.update(index, any(spans), accumulated)
                row.append(spans)
            rows.append(tuple(row))
        # what guards have computed besides is no node of any weights
        schedule = Schedule(tuple(rows), own if own is not None and self.policy.is_fitted else None)
        blocking = self.guards.max_consecutive == 0 or self.guards.has_noise_window
        if blocking and (own is None or own.reuses) and not schedule.reuses:
            self.guards.tell_of_nothing(total)
        return schedule

    def departure(self, total: int | None) -> str:
        """What to warn of in a run of `total` steps (None: not known), "" if nothing."""
        told = self.policy.departure(total)
        if told or total is None or not self.policy.is_fitted or self.guards == Guards():
            return told
        schedule = self.schedule(total)
        if schedule is None or schedule.kept is None or schedule.nfe == schedule.kept.nfe or not schedule.reuses:
            return ""  # where all is computed, nothing is forecast
        return (
            f"guards have {schedule.nfe - schedule.kept.nfe:.4g} more steps computed than the plan does, and its "
            "stated quality does not hold: fitted weights lead back from the errors that those steps would have had, "
            "so that the images may be worse. Leave the guards out, or take a plan that computes more"
        )

    def _step(self, index: int, total: int | None, position: int = 0) -> Step:
        """A step as far as it is known before the run."""
        level = self.noise_levels[index] if index < len(self.noise_levels) else None
        return Step(index, total, index, level, "", (slice(None),), position)

    def measure(self, signals: Mapping[str, Tensor], past: Past) -> Tensor | None:
        return (self.drift or self.policy).measure(signals, past)

    def combine(self, values: Sequence[float], step: Step) -> float:
        return self.policy.combine(values, step) if self.drift is None else largest(values)

    def remember(self, signals: Mapping[str, Tensor], past: Past) -> dict[str, Tensor]:
        return self.policy.remember(signals, past) if self.drift is None else {}

    def decide(self, step: Step, value: float | None, state: PassState) -> Verdict:
        reason = self.guards.forced(step, state)
        if reason:
            return Verdict(True, reason)
        verdict = self._decide(step, value, state)
        if self.guards.spared(step, state):
            return verdict._replace(compute=False, reason="unconditional", extra=False)
        return verdict

    def _decide(self, step: Step, value: float | None, state: PassState) -> Verdict:
        own = self.policy.schedule(step.total) if not self.planned and step.total is not None else None
        if own is None:
            return self.policy.decide(step, value, state)
        planned = [index for index in range(own.total) if all(own.row(index, 0))]
        fixed = [index for index in planned if self.guards.forced(self._step(index, step.total), PassState())]
        strict = self.drift is not None and self.drift.strict
        left = _remaining(planned, state.extra, fixed, strict)
        if step.index in left:
            return Verdict(True, "schedule")
        affordable = strict or _replaced(left, step.index, fixed) is not None
        # one extra step between two planned ones: else a run that asks for more at every step would spend all it has
        # at once
        if value is None or not affordable or state.last_computed in state.extra:
            return Verdict(False, "schedule")
        verdict = (self.drift or self.policy).decide(step, value, state)
        return verdict._replace(extra=verdict.compute)


def _remaining(
    planned: Collection[int], extra: Sequence[int], fixed: Collection[int] = (), strict: bool = False
) -> frozenset[int]:
    """What of the planned steps is left, with the extra ones, each of which has taken the place of the next.

    fixed: planned steps that stay whatever happens. strict: extra steps take nobody's place.
    """
    steps = set(planned)
    for step in extra:
        steps.add(step)
        dropped = None if strict else _replaced(steps, step, fixed)
        if dropped is not None:
            steps.remove(dropped)
    return frozenset(steps)


def _replaced(steps: Collection[int], step: int, fixed: Collection[int] = ()) -> int | None:
    """Which of the steps is dropped if an extra one is computed; None where none is left.

    The next one: what was to be computed then is computed at once.
    """
    return min((s for s in steps if s > step and s not in fixed), default=None)
