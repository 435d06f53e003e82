"""DiCache's trajectory alignment (arXiv 2508.17356): go as far past the older feature as the probe has gone."""

from dataclasses import dataclass
from typing import ClassVar

from ..context import Blend, Corrector, Query
from ..errors import ConfigError
from ..registry import correctors
from ..signals import mean_abs


@correctors.register("alignment")
@dataclass(frozen=True)
class Alignment(Corrector):
    """ŷ = F_a + γ·(ĥ − F_a) with γ = clip(mean|q_s − q_a| / mean|q_b − q_a|, least, most) of each batch row.

    a < b: the last two computed steps, s the one to forecast; q: what the probe blocks add to their input. With
    forecaster "reuse", ĥ is F_b and this is the paper's formula. With one step computed nothing is mended, and γ is
    `least` where the probe has not moved at all.

    What it must be given: `Query.signals["probe_residual"]`, whose `now` is q_s and whose `nodes` are q of each of
    `Query.nodes`, all of the call's shape [rows, ...], where the row of every tensor is the row of the feature that it
    is compared for (where rows were computed at other steps, those of `Query.nodes` for the row that is asked about).
    """

    least: float = 1.0
    most: float = 1.5

    needs_signals: ClassVar[tuple[str, ...]] = ("probe_residual",)
    history: ClassVar[int] = 2

    def __post_init__(self) -> None:
        if not 0 <= self.least <= self.most:
            raise ConfigError(f"alignment: 0 ≤ least ≤ most must hold, not {self.least} and {self.most}")

    def blend(self, query: Query) -> Blend | None:
        if len(query.nodes) < 2:
            return None
        assert query.signals is not None
        now, (*_, a, b) = query.signals["probe_residual"]
        start = a.float()
        # 0/0 is where nothing has moved
        factor = (mean_abs(now - start) / mean_abs(b - start)).nan_to_num(self.least).clamp(self.least, self.most)
        return Blend(factor, (*(0.0,) * (len(query.nodes) - 2), 1.0 - factor, 0.0))
