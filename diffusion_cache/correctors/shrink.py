"""Shrinking a forecast towards what was last computed, as RACER does where forecasts are at risk."""

from dataclasses import dataclass

from ..context import Blend, Corrector, Query
from ..errors import ConfigError
from ..registry import correctors


@correctors.register("shrink")
@dataclass(frozen=True)
class Shrink(Corrector):
    """ŷ = a + strength·(ĥ − a), a the last computed feature: 1 keeps the forecast ĥ, 0 reuses a.

    One strength for the whole run, whose usual value is ours.
    """

    strength: float = 0.8

    def __post_init__(self) -> None:
        if not 0 <= self.strength <= 1:
            raise ConfigError(f"shrink: strength must be from 0 to 1, not {self.strength}")

    def blend(self, query: Query) -> Blend:
        return Blend(self.strength, (0.0,) * (len(query.nodes) - 1) + (1.0 - self.strength,))
