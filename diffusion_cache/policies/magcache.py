"""A schedule from the ratios of residual norms between neighbouring steps: MagCache (arXiv 2506.09045)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any, cast

from ..context import SCOPES, PassState, Policy, Step, Verdict
from ..errors import ConfigError
from ..plain import numbers
from ..plan import positions
from ..profile import Profile
from ..registry import policies
from ..schedule import Schedule, accumulated_ratios
from .ratios import Streams, ratios_of, streams_of


@policies.register("magcache")
@dataclass(frozen=True)
class MagCache(Policy):
    """Reuse while the errors that the ratios foretell stay below `threshold`, at most `max_skip` steps in a row.

    With ρ the product of the ratios since the last computed step, its error is E = Σ|1 − ρ|. Nothing is measured at
    run time, so the whole schedule is known beforehand.

    ratios: γ_s = mean over tokens of ‖R_s‖ / ‖R_{s−1}‖, one a step from step 0 on, or a sequence of such for each
    guidance branch that is a call of its own, in their order (`MagCache.from_profile` takes them from a profile, and
    profile="published/magcache/…" has those of real models). A run of other steps takes the ratio of the nearest noise
    level, or, without `levels` (log-SNR, one a ratio), of the nearest share of the run. retention: share of the
    run, at its start, that is computed. always: steps of the ratios that are computed as well, and those where a ratio
    is further from 1 than `max_deviation`.
    """

    ratios: Sequence[float] | Sequence[Sequence[float]]
    threshold: float = 0.06
    max_skip: int = 3
    retention: float = 0.2
    levels: Sequence[float] = ()
    always: Sequence[int] = ()
    max_deviation: float = math.inf

    scopes = frozenset(SCOPES)
    tuned = "threshold"

    def __post_init__(self) -> None:
        streams = streams_of("magcache", self.ratios)
        levels = numbers("magcache: levels must be numbers (log-SNR)", self.levels, lambda x: not math.isnan(x), 0)
        if len(levels) not in (0, len(streams[0])):
            raise ConfigError(f"magcache: {len(levels)} levels for {len(streams[0])} ratios")
        if not (self.threshold >= 0 and self.max_skip >= 0 and 0 <= self.retention <= 1 and self.max_deviation >= 0):
            raise ConfigError("magcache: threshold, max_skip and max_deviation must be ≥ 0, and retention from 0 to 1")
        if not all(isinstance(step, Integral) for step in self.always):
            raise ConfigError(f"magcache: always must be a list of steps, whole numbers, not {self.always!r}")
        if not all(0 <= step < len(streams[0]) for step in self.always):
            raise ConfigError(
                f"magcache: always must be steps of the ratios, from 0 to {len(streams[0]) - 1}, not {self.always!r}"
            )
        for name, value in {"ratios": streams, "levels": levels, "always": tuple(self.always)}.items():
            object.__setattr__(self, name, value)

    @classmethod
    def from_profile(cls, profile: Profile, **options: Any) -> "MagCache":
        """With the ratios that a profile has measured (`ratios.ratios_of`, which may raise)."""
        return cls(ratios_of(profile, "magcache"), levels=profile.noise_levels, **options)

    @property
    def streams(self) -> Streams:
        """The ratios of each guidance branch."""
        return cast(Streams, self.ratios)

    @property
    def spans_alike(self) -> bool:
        return True

    def for_run(self, noise_levels: Sequence[float]) -> "MagCache":
        return self._resampled(self.levels, noise_levels) if noise_levels and self.levels else self

    def _resampled(self, own: Sequence[float], levels: Sequence[float]) -> "MagCache":
        nearest = [round(place) for place in positions(own, levels, len(self.streams[0]))]
        ratios = tuple(tuple(one[place] for place in nearest) for one in self.streams)
        always = tuple(step for step, place in enumerate(nearest) if place in self.always)
        return replace(self, ratios=ratios, levels=levels, always=always)

    def schedule(self, total: int) -> Schedule:
        if total != len(self.streams[0]):
            return self._resampled((), (0.0,) * total).schedule(total)
        kept = {0, *self.always, *range(int(self.retention * total + 0.5))}
        limits = self.threshold, self.max_skip, self.max_deviation
        masks = [accumulated_ratios(one, kept, *limits) for one in self.streams]
        return Schedule(tuple(tuple((computed,) for computed in step) for step in zip(*masks, strict=True)))

    def decide(self, step: Step, value: float | None, state: PassState) -> Verdict:
        raise ConfigError("magcache needs the run's number of steps: pass num_steps to diffusion_cache.run")
