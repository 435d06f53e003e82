"""Elastic-Cache: layers are refreshed from where the attention of the most-attended token has drifted."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import ConfigError
from ..registry import languages
from .base import LanguageCache, View, Watcher


@languages.register("elastic")
@dataclass(frozen=True)
class Elastic(LanguageCache):
    """Compute the first `window` masked tokens; all, in the layers after one whose attention has drifted.

    In each layer one token is watched, the one that the others attend to most when the layer is refreshed. Where the
    cosine between the watched token's attention weights now and at the last look falls below `threshold`, every layer
    after it is refreshed (Nguyen-Tri et al. 2025, arXiv 2510.14973). Ours: a token is chosen at refreshes, among those
    that can drift, and compared with the last refresh or failed test.
    """

    window: int = 4
    threshold: float = 0.9

    paper = "Elastic-Cache (arXiv 2510.14973)"

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ConfigError(f"elastic: window must be at least 1, not {self.window}")
        if not -1 <= self.threshold <= 1:
            raise ConfigError(f"elastic: threshold is a cosine, from -1 (never refresh) to 1, not {self.threshold}")

    def rows(self, view: View) -> Tensor:
        first = view.masked & (view.masked.cumsum(dim=1) <= self.window)
        return first | view.changed

    def watcher(self) -> Watcher:
        return Drift(self.threshold)


class Drift(Watcher):
    """Of each layer, which token is watched, [n], and its attention weights, [n, tokens]."""

    def __init__(self, threshold: float):
        self.threshold = threshold
        self.watched: dict[int, Tensor] = {}
        self.weights: dict[int, Tensor] = {}

    def tracked(self) -> Tensor | None:
        if not self.watched:
            return None
        chosen = torch.zeros_like(self.weights[0], dtype=torch.bool)
        return chosen.scatter_(1, torch.stack([self.watched[layer] for layer in sorted(self.watched)], dim=1), True)

    def refreshed(self, layer: int, weights: Tensor, places: Tensor, samples: Tensor, lasting: Tensor) -> None:
        received = weights.sum(dim=1).masked_fill(~lasting, -1)
        chosen = received.argmax(dim=1)
        if not samples.all():
            chosen = torch.where(samples, chosen, self.watched[layer])
        now = weights_of(weights, places, chosen)
        if not samples.all():
            now = torch.where(samples[:, None], now, self.weights[layer])
        self.watched[layer], self.weights[layer] = chosen, now

    def drifted(self, layer: int, weights: Tensor, places: Tensor) -> Tensor:
        now, before = weights_of(weights, places, self.watched[layer]), self.weights[layer]
        seen = (places == self.watched[layer][:, None]).any(dim=1)  # where it is settled, it is computed no more
        # written so that NaN refreshes
        drifted = seen & ~(F.cosine_similarity(now, before, dim=1) >= self.threshold)
        self.weights[layer] = torch.where(drifted[:, None], now, before)
        return drifted


def weights_of(weights: Tensor, places: Tensor, chosen: Tensor) -> Tensor:
    """The attention weights [n, tokens] of each sample's chosen token [n], or of its first query if that is none."""
    query = (places == chosen[:, None]).int().argmax(dim=1)
    return weights[torch.arange(len(weights), device=weights.device), query]
