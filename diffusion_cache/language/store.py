"""Keys and values of every token of a window, by layer; stands in for transformers' `past_key_values`."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


class Store:
    """What one run keeps of its window, and which of it is certainly exact.

    tokens: those that keys and values were computed from, -1 for none [n, tokens]. hidden: what entered each layer
    [n, tokens, channels], kept where single layers are refreshed. logits: of the current block [n, block, vocabulary].
    age, refinement: see `View`.
    """

    def __init__(self, samples: int, device: torch.device, reach: int | None):
        self.reach = reach
        self.tokens = torch.empty(samples, 0, dtype=torch.long, device=device)
        self.masked = self.tokens.bool()
        self.hidden: dict[int, Tensor] = {}
        self.logits: Tensor | None = None
        self.age = self.refinement = 0
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}
        self._places = self.tokens  # of the tokens that the model is being given
        self._refreshed: tuple[Tensor, ...] = ()  # tokens, padding and positions at the last refresh

    @property
    def nbytes(self) -> int:
        kept = [*self._keys.values(), *self._values.values(), *self.hidden.values(), self.tokens, self.masked]
        kept += [] if self.logits is None else [self.logits]
        return sum(tensor.nbytes for tensor in kept)

    def settled(self, *window: Tensor) -> int:
        """How many of the window's first tokens are kept exactly as computing everything would give them.

        window: tokens, padding and positions, [n, tokens] each. Attention that looks `reach` tokens at a time settles
        in whole blocks, up to the first token that is another than at the last refresh; attention that looks
        everywhere, only where nothing has changed at all.
        """
        if not self._refreshed:
            return 0
        before = self._refreshed[0].shape[1]
        pairs = zip(self._refreshed, window, strict=True)
        same = torch.stack([(old == new[:, :before]).all(dim=0) for old, new in pairs]).all(dim=0)
        count = int(same.long().cumprod(dim=0).sum())
        length = window[0].shape[1]
        return length if count == length else count // self.reach * self.reach if self.reach else 0

    def refresh(self, *window: Tensor) -> None:
        """All tokens that were not settled have just been computed."""
        self._refreshed = tuple(tensor.clone() for tensor in window)  # the pipeline writes into its own
        self.age = 0

    def grow(self, length: int) -> bool:
        """Make room for so many tokens; whether there was less."""
        more = length - self.tokens.shape[1]
        if more:
            self.tokens = F.pad(self.tokens, (0, more), value=-1)
            self.masked = F.pad(self.masked, (0, more))
            for kept in (self._keys, self._values, self.hidden):
                kept.update({layer: F.pad(tensor, (0, 0, 0, more)) for layer, tensor in kept.items()})
            self.logits = None
            self.refinement = 0
        return bool(more)

    def given(self, places: Tensor) -> None:
        """The model is about to be given the tokens at these places [n, queries]."""
        self._places = places

    def enter(self, layer: int, hidden: Tensor) -> Tensor:
        """Keep what enters a layer, of the tokens that it is given, and return that of all tokens."""
        return self._write(self.hidden, layer, hidden)

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """What attention calls: keep keys and values [n, heads, queries, channels], and return those of all tokens."""
        return self._write(self._keys, layer_idx, keys), self._write(self._values, layer_idx, values)

    def _write(self, kept: dict[int, Tensor], layer: int, rows: Tensor) -> Tensor:
        if layer not in kept:
            kept[layer] = rows.new_zeros(*rows.shape[:-2], self.tokens.shape[1], rows.shape[-1])
        places = self._places.view(len(rows), *(1,) * (rows.ndim - 3), -1, 1)
        return kept[layer].scatter_(-2, places.expand_as(rows), rows)
