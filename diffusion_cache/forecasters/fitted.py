"""Weights that were fitted to a model's trajectory, step by step; Taylor-1 wherever there are none."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..context import Feature, Forecaster, Query
from .taylor import Taylor

Key = tuple[int, int, int]  # step, span group, guidance branch


@dataclass(frozen=True)
class Fit:
    """Of one span group at one reused step, for one guidance branch: a weight for the feature of each node."""

    nodes: tuple[int, ...]
    weights: tuple[float, ...]


@dataclass(frozen=True)
class Fitted(Forecaster):
    """Where the history holds just the steps that weights were fitted for, those; else the line through the last two.

    table: by step, span group and guidance branch; groups: of each span, or () where all spans are one group.
    """

    table: Mapping[Key, Fit] = field(default_factory=dict)
    length: int = 3
    groups: tuple[int, ...] = ()
    branches: int = 1
    feature: Feature = "auto"

    @property
    def history(self) -> int:
        return self.length

    @property
    def row_guidance(self) -> int:
        return self.branches

    @property
    def exact_degree(self) -> int:
        return 0  # fitted weights sum to one, no more

    def group(self, span: int) -> int:
        return self.groups[span] if self.groups else 0

    def fit(self, query: Query) -> Fit | None:
        """What was fitted for just this case, if anything was."""
        found = self.table.get((int(query.target), self.group(query.span), query.guidance))
        return found if found is not None and found.nodes == tuple(query.nodes) else None

    def weights(self, query: Query) -> tuple[float, ...]:
        found = self.fit(query)
        return taylor_weights(query.nodes, query.target) if found is None else found.weights


def taylor_weights(nodes: Sequence[float], target: float) -> tuple[float, ...]:
    """Taylor-1: weights of the line through the last two nodes, read at the target; one per node."""
    used = nodes[-2:]
    return (0.0,) * (len(nodes) - len(used)) + Taylor(1).weights(Query(used, target))
