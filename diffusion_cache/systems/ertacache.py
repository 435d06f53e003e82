"""ERTACache: a schedule from replaying the residuals of full runs, and reused steps that go less far."""

import math
from dataclasses import dataclass, replace

import numpy as np

from ..context import Feature
from ..errors import ConfigError
from ..plan import FEATURES, Plan
from ..planning.static import static_plan
from ..planning.timesteps import KINDS, Array, adjusted, distances, profiled_shares, total_gram
from ..profile import Profile
from ..registry import systems
from .base import System


@systems.register("ertacache")
@dataclass(frozen=True)
class ERTACache(System):
    """Reuse the residual r of the last computed step c while ‖r_c − r_t‖ / ‖r_t‖ < λ over full runs, else compute.

    Norms are L2, over all calibration samples, spans and passes, for a profile keeps inner products (the paper's are
    L1; its λ are 0.08 to 0.6). nfe: in place of λ, the smallest with which at most so many steps are computed.
    feature: "residual", v − x at scope denoiser and the hidden residual at scope stack; "output", v itself, which is
    constant on straight flows; or "auto", what was measured of the spans. adjust: how far reused steps go, "none" (all
    the way), "A" or "B" (`planning.timesteps`), for flow samplers that take noise levels. The rectification of what is
    reused needs runs of the pipeline: `profiling.rectify`.
    """

    threshold: float = 0.1
    nfe: int | None = None
    feature: Feature = "auto"
    adjust: str = "none"

    paper = "ERTACache (arXiv 2508.21091)"
    scopes = frozenset({"denoiser", "stack"})

    def __post_init__(self) -> None:
        if not 0 <= self.threshold < math.inf:
            raise ConfigError(f"ertacache: threshold must be a finite number of at least 0, not {self.threshold}")
        if self.feature not in FEATURES:
            raise ConfigError(f"ertacache: feature must be one of {', '.join(FEATURES)}, not {self.feature!r}")
        if self.adjust not in ("none", *KINDS):
            raise ConfigError(f"ertacache: adjust must be 'none', 'A' or 'B', not {self.adjust!r}")

    def plan(self, profile: Profile) -> Plan:
        feature = profile.spans[0].feature if self.feature == "auto" else self.feature
        gram = total_gram(profile, feature)
        size = np.sqrt(gram.diagonal())
        distance = distances(gram)
        errors = np.divide(distance, size, out=np.where(distance > 0, np.inf, 0.0), where=size > 0)
        threshold = self.threshold if self.nfe is None else least_threshold(errors, self.nfe)
        computed = replay(errors, threshold)
        plan = static_plan(profile, self.name, computed, facts={"threshold": threshold})
        return replace(plan, feature=feature, sigmas=self._sigmas(profile, computed, feature))

    def _sigmas(self, profile: Profile, computed: list[bool], feature: str) -> tuple[float, ...] | None:
        if self.adjust == "none" or all(computed):
            return None
        own = profile.fingerprint.sigmas
        if own is None or len(own) != profile.total + 1:
            raise ConfigError(
                "ertacache: adjust moves the sampler's noise levels, and this profile's sampler goes by none: "
                "set adjust='none'"
            )
        return adjusted(own, profiled_shares(profile, computed, feature, self.adjust))


def replay(errors: Array, threshold: float) -> list[bool]:
    """Which steps are computed: those whose feature is not within the threshold of the last computed one's.

    errors: [T, T], of step t forecast by step c, relative.
    """
    computed, last = [True], 0
    for step in range(1, len(errors)):
        reuse = bool(errors[last, step] < threshold)
        computed.append(not reuse)
        last = last if reuse else step
    return computed


def least_threshold(errors: Array, most: int) -> float:
    """The smallest threshold with which at most so many steps are computed.

    Raises:
        ConfigError: for less than one step.
    """
    if most < 1:
        raise ConfigError(f"ertacache: nfe must be at least 1, not {most}")
    # where one more pair of steps comes within it, something changes
    within = np.unique(errors[np.triu_indices(len(errors), 1)])
    for threshold in (0.0, *(float(np.nextafter(error, np.inf)) for error in within)):
        if sum(replay(errors, threshold)) <= most:
            return threshold
    raise ConfigError(
        "ertacache: some residuals are zero where others are not, so that no threshold takes so few steps"
    )
