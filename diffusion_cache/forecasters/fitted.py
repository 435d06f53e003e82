"""Weights that were fitted to a model's trajectory, step by step; Taylor-1 wherever there are none."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from typing import cast

import torch
from torch import Tensor

from ..context import Correction, Feature, Forecaster, Query
from ..fingerprint import same_levels, start_in
from ..plan import Plan
from .weights import polynomial_weights

UNFITTED = "Taylor"
ANY_PASS = -1
Key = tuple[int, int, int]  # step, span group, guidance branch or ANY_PASS


@dataclass(frozen=True)
class Fit:
    """Of one span group at one reused step, for one guidance branch: a weight for the feature of each node.

    correction: of the output that is forecast with them, if it is corrected.
    """

    nodes: tuple[int, ...]
    weights: tuple[float, ...]
    correction: Correction | None = None


@dataclass(frozen=True)
class Fitted(Forecaster):
    """Where the history holds just the steps that weights were fitted for, those; else the line through the last two.

    table: by step, span group and guidance branch; groups: of each span, or () where all spans are one group.
    branches: guidance branches stacked in the rows of one call. noise_levels: of the steps; in a run of some of them,
    weights are for those that go by features of these alone, unless they are for whole runs; in a run with others,
    none are fitted. total: the number of steps; the same.
    """

    table: Mapping[Key, Fit] = field(default_factory=dict)
    length: int = 3
    groups: tuple[int, ...] = ()
    branches: int = 1
    feature: Feature = "auto"
    noise_levels: tuple[float, ...] = ()
    total: int | None = None
    whole: bool = False

    name = "fitted"

    @classmethod
    def of(cls, plan: Plan) -> "Fitted":
        """A plan's weights."""
        table: dict[Key, Fit] = {}
        steps, passes, spans, _ = plan.weights.shape
        weights, nodes = plan.weights.tolist(), plan.nodes.tolist()
        corrections = None if plan.correction is None else plan.correction.tolist()
        for step, branch, span in product(range(steps), range(passes), range(spans)):
            used = [place for place, node in enumerate(nodes[step][span]) if node >= 0]
            values = tuple(weights[step][branch][span][place] for place in used)
            if values and not any(map(math.isnan, values)):
                held = tuple(nodes[step][span][place] for place in used)
                correction = None
                if corrections is not None:
                    scale, bias = corrections[step][branch][span]
                    correction = None if math.isnan(scale[0]) else Correction(tuple(scale), tuple(bias))
                table[step, span, branch if passes > 1 else ANY_PASS] = Fit(held, values, correction)
        groups = tuple(range(spans)) if spans > 1 else ()
        feature = cast(Feature, plan.feature)
        whole = plan.sigmas is not None  # which a part of a run does not have
        return cls(table, plan.history, groups, plan.row_passes, feature, plan.noise_levels, plan.total, whole)

    def as_tensors(self, steps: int, branches: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """The table as a plan's nodes [T, S, K], weights [T, P, S, K] and correction [T, P, S, 2, C] or None."""
        groups = max(self.groups, default=0) + 1
        nodes = torch.full((steps, groups, self.history), -1, dtype=torch.int32)
        weights = torch.full((steps, branches, groups, self.history), math.nan, dtype=torch.float64)
        for (step, group, branch), fit in self.table.items():
            place = self.history - len(fit.nodes)
            nodes[step, group, place:] = torch.tensor(fit.nodes, dtype=torch.int32)
            weights[step, branch, group] = 0.0
            weights[step, branch, group, place:] = torch.tensor(fit.weights, dtype=torch.float64)
        channels = self.corrected_channels
        if not channels:
            return nodes, weights, None
        correction = torch.full((*weights.shape[:3], 2, channels), math.nan, dtype=torch.float64)
        for (step, group, branch), fit in self.table.items():
            if fit.correction:
                correction[step, branch, group] = torch.tensor(fit.correction, dtype=torch.float64)
        return nodes, weights, correction

    def for_run(self, noise_levels: Sequence[float]) -> "Fitted":
        if not noise_levels or not self.noise_levels or same_levels(self.noise_levels, noise_levels):
            return self
        first = None if self.whole else start_in(self.noise_levels, noise_levels)
        if first is None:
            return replace(self, table={})
        end = first + len(noise_levels)
        table = {
            (step - first, group, branch): replace(fit, nodes=tuple(node - first for node in fit.nodes))
            for (step, group, branch), fit in self.table.items()
            if first < step < end and fit.nodes[0] >= first
        }
        return replace(self, table=table, noise_levels=tuple(noise_levels), total=len(noise_levels))

    @property
    def history(self) -> int:
        return self.length

    @property
    def row_passes(self) -> int:
        return self.branches

    @property
    def exact_degree(self) -> int | None:
        return None if self.corrected_channels else 0  # fitted weights sum to one, no more

    @property
    def spans_alike(self) -> bool:
        return not self.groups and super().spans_alike

    def group(self, span: int) -> int:
        return self.groups[span] if self.groups else 0

    def fit(self, query: Query) -> Fit | None:
        """What was fitted for just this case, if anything was."""
        if query.total is not None and self.total not in (None, query.total):
            return None
        step, group = int(query.target), self.group(query.span)
        found = self.table.get((step, group, query.pass_index)) or self.table.get((step, group, ANY_PASS))
        return found if found is not None and found.nodes == tuple(query.nodes) else None

    @cached_property
    def corrected_channels(self) -> int:  # counted once: the table can be long
        return max((len(fit.correction.bias) for fit in self.table.values() if fit.correction), default=0)

    def correction(self, query: Query) -> Correction | None:
        found = self.fit(query)
        return found.correction if found else None

    def note(self, query: Query) -> str:
        return "" if self.fit(query) else UNFITTED

    def weights(self, query: Query) -> tuple[float, ...]:
        found = self.fit(query)
        return taylor_weights(query.nodes, query.target) if found is None else found.weights


def taylor_weights(nodes: Sequence[float], target: float) -> tuple[float, ...]:
    """Taylor-1: weights of the line through the last two nodes, read at the target; one per node."""
    return polynomial_weights(nodes, target, 1)
