"""Decide by how much the first block's modulated input has changed: TeaCache (arXiv 2411.19108).

With m what the first attention receives, A += p(L1r(m_s, m_{s−1})) at every step; reuse while A < threshold. The
polynomial p turns a change of the input into the change of the output that goes with it, in this model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

from torch import Tensor

from ..context import Needs, Past
from ..plain import numbers
from ..registry import policies
from ..signals import relative_l1
from .accumulate import Accumulate


@policies.register("teacache")
@dataclass(frozen=True)
class TeaCache(Accumulate):
    """Reuse while the summed changes of the modulated input stay below `threshold`.

    coefficients: of p, highest power first; (1, 0) leaves changes as they are. `published.names()` lists fitted ones,
    "teacache/…". The paper computes the first and the last step: last=1.
    """

    threshold: float = 0.3
    coefficients: Sequence[float] = (1.0, 0.0)

    scopes = frozenset({"stack"})

    def __post_init__(self) -> None:
        super().__post_init__()
        given = numbers("teacache: coefficients must be finite numbers, highest power first", self.coefficients)
        object.__setattr__(self, "coefficients", given)

    @property
    def needs(self) -> Needs:
        return Needs(signals=("modulated_input",), previous=1)

    def measure(self, signals: Mapping[str, Tensor], past: Past) -> Tensor:
        change = relative_l1(signals["modulated_input"], past.previous["modulated_input"])
        return reduce(lambda value, coefficient: value * change + coefficient, self.coefficients, change * 0)
