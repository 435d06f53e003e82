"""dKV-Cache-Decode: a token's keys and values are kept from one refinement after the one that decoded it."""

from dataclasses import dataclass

from torch import Tensor

from ..errors import ConfigError
from ..registry import languages
from .base import LanguageCache, View


@languages.register("dkv")
@dataclass(frozen=True)
class DelayedKV(LanguageCache):
    """Compute what is masked and what was decoded by the refinement before; every `refresh`-th, everything.

    What is kept of a token when it is decoded still stems from a mask, hence the delay (Ma et al. 2025, arXiv
    2505.15781: its variant for decoding).
    """

    refresh: int = 8

    paper = "dKV-Cache (arXiv 2505.15781)"

    def __post_init__(self) -> None:
        if self.refresh < 1:
            raise ConfigError(f"dkv: refresh must be at least 1, not {self.refresh}")

    def rows(self, view: View) -> Tensor:
        return view.unsettled if view.age + 1 >= self.refresh else view.masked | view.changed
