"""Committed prefix: keys and values of finished blocks are kept, and every token of the current block is computed."""

from dataclasses import dataclass

from torch import Tensor

from ..registry import languages
from .base import LanguageCache, View


@languages.register("prefix")
@dataclass(frozen=True)
class Prefix(LanguageCache):
    """Exact: where attention never looks at later blocks, what is kept of finished ones cannot change.

    The block-level cache of block diffusion (Arriola et al. 2025, arXiv 2503.09573). On other models it is refused.
    """

    paper = "Block Diffusion (arXiv 2503.09573)"
    exact = True

    def rows(self, view: View) -> Tensor:
        return view.unsettled
