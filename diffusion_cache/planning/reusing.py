"""Plans that reuse each span's last computed feature as it is, at steps of the span's own."""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from ..errors import ConfigError
from ..plan import Plan
from ..profile import Profile
from ..schedule import Schedule


def reusing(
    name: str, profile: Profile, computed: Sequence[Collection[int]], facts: Mapping[str, Any] | None = None
) -> Plan:
    """The plan that computes each span of a profile at its steps, one set a span, and reuses the last of them between.

    Its NFE counts what is not reused, by the spans' shares. facts: of the plan.

    Raises:
        ConfigError: for another number of sets than of spans, a step that is none, or a span whose step 0 is reused.
    """
    total, spans = profile.total, len(profile.spans)
    if len(computed) != spans or not all(0 <= step < total for steps in computed for step in steps):
        raise ConfigError(f"{name}: give the computed steps of each of {spans} spans, from 0 to {total - 1}")
    nodes = torch.full((total, spans, 1), -1, dtype=torch.int32)
    weights = torch.full((total, 1, spans, 1), math.nan, dtype=torch.float64)
    compute = torch.zeros(total, 1, spans, dtype=torch.bool)
    for span, steps in enumerate(computed):
        ordered = sorted(steps)
        compute[ordered, 0, span] = True
        for last, following in zip(ordered, [*ordered[1:], total], strict=True):
            nodes[last + 1 : following, span] = last
            weights[last + 1 : following, 0, span] = 1.0
    spared = sum(span.share * (total - len(set(steps))) for span, steps in zip(profile.spans, computed, strict=True))
    return Plan(
        name=name,
        scope=profile.scope,
        depth=profile.depth,
        feature=str(profile.facts.get("feature", "auto")),
        schedule=Schedule(tuple(tuple(tuple(row) for row in step) for step in compute.tolist())),
        noise_levels=profile.noise_levels,
        nodes=nodes,
        weights=weights,
        nfe=total - spared,
        facts=facts or {},
    )
