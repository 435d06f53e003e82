"""The band of a plan's guard: what a signal is at each step of generations that go by the plan."""

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from ..context import PassState, Step, Verdict
from ..engine import Method
from ..errors import ConfigError
from ..forecasters.fitted import Fitted
from ..plan import Band, Plan
from ..policies import Drift, Guarded, Planned
from ..profiling.generation import Batch, attached


def with_guard(plan: Plan, signal: str, batches: Iterable[Batch]) -> Plan:
    """The plan with a guard (one of `plan.GUARD_SIGNALS`), whose band is measured on these samples along its own path.

    Raises:
        ConfigError: for an unknown signal, fewer than two samples, a plan that computes part of a step, or one of other
            steps than the batches'.
    """
    unlimited = Band(signal, (math.inf,) * plan.total, (0.0,) * plan.total, 2)
    plan = replace(plan, guard=unlimited)
    watched = _Watched(Planned(plan), drift=Drift(unlimited))
    method = Method(watched, Fitted.of(plan), plan.scope, plan.depth, "batch")
    samples = 0
    for batch in batches:
        samples += batch.count
        with attached(batch.pipe, method):
            batch.call()
    if not any(watched.values.values()):
        raise ConfigError(
            f"plan {plan.name!r}: no signal was seen in a generation; give generations of its own {plan.total} steps"
        )
    found = [watched.values.get(step, []) for step in range(plan.total)]
    spread = (statistics.stdev(values) if len(values) > 1 else math.nan for values in found)
    mean = (statistics.fmean(values) if len(values) > 1 else math.nan for values in found)
    return replace(plan, guard=Band(signal, tuple(mean), tuple(spread), samples))


@dataclass(frozen=True)
class _Watched(Guarded):
    """Notes the signal of every sample; values: by step."""

    values: dict[int, list[float]] = field(default_factory=dict)

    def decide(self, step: Step, value: float | None, state: PassState) -> Verdict:
        if value is not None and math.isfinite(value):
            self.values.setdefault(step.index, []).append(value)
        return super().decide(step, value, state)
