"""Compute where a plan says so."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from ..context import SCOPES, PassState, Policy, Step, Verdict
from ..errors import ConfigError
from ..fingerprint import start_in
from ..plan import Plan
from ..schedule import Schedule

TAYLOR = "Taylor forecasts take the place of fitted weights{}, "


@dataclass(frozen=True)
class Planned(Policy):
    """A plan's schedule. In a run with other noise levels its computed steps are those nearest to the plan's.

    moved: what is to be told of a run that the plan was not made for.
    """

    plan: Plan
    moved: str = ""

    name = "plan"
    scopes = frozenset(SCOPES)
    for_one_sampler = True

    @cached_property
    def _resampled(self) -> dict[tuple[float, ...], "Planned"]:
        return {}

    @cached_property
    def _stretched(self) -> dict[int, Schedule]:
        return {}

    @property
    def sigmas(self) -> tuple[float, ...] | None:
        return self.plan.sigmas

    def for_run(self, noise_levels: Sequence[float]) -> "Planned":
        if not noise_levels or not self.plan.noise_levels:
            return self
        levels = tuple(noise_levels)
        if levels not in self._resampled:
            plan = self.plan.resampled(levels)
            first = start_in(self.plan.noise_levels, levels)
            if plan is self.plan:
                self._resampled[levels] = self
                return self
            if first is None:
                moved = f"other noise levels ({self.plan.total} steps; this run has {len(levels)}): {self._resampling}"
            else:
                own = self.plan.weights[first : first + len(levels)]
                lost = bool((plan.weights.isnan() & own.isfinite()).any())
                taylor = TAYLOR.format(" that go by features from before them") + "and " if lost else ""
                moved = f"{self.plan.total} steps, and this run makes {len(levels)} of them: {taylor}"
            self._resampled[levels] = replace(self, plan=plan, moved=self._departure(moved))
        return self._resampled[levels]

    @property
    def spans_alike(self) -> bool:
        return self.plan.spans == 1

    @property
    def is_fitted(self) -> bool:
        return bool(self.plan.weights.isfinite().any())

    def departure(self, total: int | None) -> str:
        if total is None or total == self.plan.total:
            return self.moved
        return self._departure(f"{self.plan.total} steps, and this run has {total}: {self._resampling}")

    def _departure(self, moved: str) -> str:
        band = ", nor does the band of its guard, which is off" if self.plan.guard is not None else ""
        return (
            f"plan {self.plan.name!r} is for {moved}the plan's stated quality does not hold{band}. "
            "Make a plan for these steps"
        )

    def schedule(self, total: int) -> Schedule:
        """The plan's, stretched by the share of the run where the number of steps is all that is known."""
        if total == self.plan.total:
            return self.plan.schedule
        if total not in self._stretched:
            self._stretched[total] = replace(self.plan, noise_levels=()).resampled((0.0,) * total).schedule
        return self._stretched[total]

    @property
    def _resampling(self) -> str:
        taylor = TAYLOR.format("") if self.plan.history > 1 else ""
        return f"steps at the nearest noise levels are computed, {taylor}and "

    def decide(self, step: Step, value: float | None, state: PassState) -> Verdict:
        raise ConfigError("a plan needs the run's number of steps: pass num_steps to diffusion_cache.run")
