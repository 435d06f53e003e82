"""Reuse attention the longer the less its kind changes: Pyramid Attention Broadcast (PAB, arXiv 2408.12588)."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields

from ..context import PassState, Policy, Step, Verdict, branch_kind
from ..errors import ConfigError
from ..registry import policies
from ..schedule import Schedule

TEMPORAL = re.compile(r"temporal|motion|temp_attentions", re.IGNORECASE)


@policies.register("pab")
@dataclass(frozen=True)
class PAB(Policy):
    """Compute each branch at every n-th step, n by its kind; the paper's 2, 4 and 6 for attention, and each MLP.

    spatial: attention within an image or over all tokens; temporal: attention over frames alone, where the model has
    blocks for it; cross: attention to the prompt; feed_forward: what is no attention. The paper does so only at
    timesteps from 100 to 800 of 1000, which the guards say: sigma_min=0.1, sigma_max=0.8 for a flow sampler.
    """

    spatial: int = 2
    temporal: int = 4
    cross: int = 6
    feed_forward: int = 1

    scopes = frozenset({"branch"})

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) < 1:
                raise ConfigError(
                    f"pab: {field.name} must be at least 1 (compute always), not {getattr(self, field.name)}"
                )

    def every(self, name: str, names: Sequence[str] = ()) -> int:
        """At one step in how many the branch of this name is computed, of a denoiser with branches of these names."""
        kind = branch_kind(name, names)
        if kind == "attention":
            return self.temporal if TEMPORAL.search(name) else self.spatial
        return self.cross if kind == "cross-attention" else self.feed_forward

    def schedule_of(self, total: int, spans: Sequence[str]) -> Schedule:
        every = [self.every(name, spans) for name in spans]
        return Schedule(tuple((tuple(step % n == 0 for n in every),) for step in range(total)))

    def decide(self, step: Step, value: float | None, state: PassState) -> Verdict:
        raise ConfigError("pab needs the run's number of steps: pass num_steps to diffusion_cache.run")
