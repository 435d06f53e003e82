"""Sub-block cache of Fast-dLLM v2: a block is decoded in parts, and what lies on both sides of the part is kept."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigError
from ..registry import languages
from .base import LanguageCache, View


@languages.register("sub_block")
@dataclass(frozen=True)
class SubBlock(LanguageCache):
    """Compute the first `size` tokens (counted from a multiple of it) that have a masked one; at each new part, all.

    Its dual cache (Wu et al. 2025, arXiv 2509.26328) with the pipeline's sampler: of the refinement that
    begins a part, and so computes the whole block, every token may be decoded, in the paper those of the part.
    """

    size: int = 4

    paper = "Fast-dLLM v2 (arXiv 2509.26328)"

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ConfigError(f"sub_block: size must be at least 1, not {self.size}")

    def rows(self, view: View) -> Tensor:
        part, before = self._part(view.masked), self._part(view.was_masked)
        places = torch.arange(view.masked.shape[1], device=view.masked.device)
        inside = places // self.size == part[:, None]
        done = ~view.masked.any(dim=1)
        return torch.where(((part != before) | done)[:, None], view.unsettled, inside)

    def _part(self, masked: Tensor) -> Tensor:
        """Which part of its window each sample is at, [n]."""
        return masked.int().argmax(dim=1) // self.size
