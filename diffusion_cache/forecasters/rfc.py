"""Direction and scale of a feature forecast apart, after RFC (Relational Feature Caching, arXiv 2602.19506).

The paper estimates how much a module's output changes from how much its input does; here, where a skipped module's
input need not exist, the scale is extrapolated instead. The split per token and both orders are ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from ..context import Feature, NonLinear, Query
from ..registry import forecasters
from .weights import check_degree, polynomial_weights


@forecasters.register("rfc")
@dataclass(frozen=True)
class RFC(NonLinear):
    """F̂ = n̂·d̂/‖d̂‖ per token: the polynomials of degree `order` through its norms, and through its directions F/‖F‖.

    An extrapolated norm below zero is zero. Turning features keep their size, which a line through them does not.
    """

    order: int = 1
    feature: Feature = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_degree("rfc: order", self.order)

    @property
    def history(self) -> int:
        return self.order + 1

    @property
    def exact_degree(self) -> int:
        return 0

    def forecast(self, query: Query, features: Sequence[Tensor]) -> Tensor:
        weights = polynomial_weights(query.nodes, query.target, self.order)
        axis = ops.channel_axis(features[0])
        smallest = torch.finfo(features[0].dtype).tiny
        norms = [feature.norm(dim=axis, keepdim=True) for feature in features]  # [rows, tokens, 1]
        directions = [feature / norm.clamp_min(smallest) for feature, norm in zip(features, norms, strict=True)]
        norm = ops.forecast(None, norms, weights).clamp_min(0.0)
        direction = ops.forecast(None, directions, weights)
        return norm * direction / direction.norm(dim=axis, keepdim=True).clamp_min(smallest)
