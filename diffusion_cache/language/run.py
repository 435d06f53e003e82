"""One generation of a language pipeline: at each refinement, compute some tokens and keep what the others had."""

import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..errors import DiffusionCacheError, DiffusionCacheWarning
from .base import View, Watcher
from .decoder import Decoder
from .store import Store

if TYPE_CHECKING:
    from .session import LanguageSession

HELD = 1e-3  # by what logits are multiplied that must not be decided on: their order stays, their confidence goes


class Refinement(NamedTuple):
    """One call of the model. Tokens are counted over samples: those of the window, and those that were executed.

    executed: the mean over the layers, as single layers may be refreshed. computed: whether this was a refresh, of all
    that could differ from what computing everything would give.
    """

    tokens: int
    executed: float
    computed: bool


@dataclass(frozen=True)
class LanguageSummary:
    """What one generation did. records: its refinements. cache_bytes: the most that was kept at once."""

    method: str
    records: tuple[Refinement, ...]
    cache_bytes: int

    @property
    def computed(self) -> int:
        """Refinements that were refreshes."""
        return sum(record.computed for record in self.records)

    @property
    def reused(self) -> int:
        return len(self.records) - self.computed

    @property
    def executed(self) -> float:
        """Tokens that were run through the model."""
        return sum(record.executed for record in self.records)

    @property
    def tokens(self) -> int:
        """Tokens that these refinements would have run through the model without a cache."""
        return sum(record.tokens for record in self.records)

    @property
    def hit_rate(self) -> float:
        """Share of the tokens that were not run through the model."""
        return 1 - self.executed / self.tokens if self.tokens else 0.0

    def __str__(self) -> str:
        return (
            f"{self.method}: {len(self.records)} refinements, {self.computed} of them refreshes; {self.executed:.0f} "
            f"of {self.tokens} tokens run through the model, hit rate {self.hit_rate:.0%}, "
            f"cache {self.cache_bytes / 2**20:.2f} MiB"
        )


class LanguageRun:
    """The state of one generation; made at its start and emptied at its end, so nothing can leak into the next."""

    any_scheduler = False

    def __init__(self, session: "LanguageSession", decoder: Decoder, pipe: Any, block: int, mask_token: int):
        self.session = session
        self.decoder = decoder
        self.pipe = weakref.ref(pipe)
        self.pass_name: str | None = None
        self.block = block
        self.mask_token = mask_token
        self.records: list[Refinement] = []
        self.cache_bytes = 0
        self._store: Store | None = None
        self._watcher: Watcher | None = None
        self._failed = False

    def has_part(self, pipe: Any) -> bool:
        return False

    def finish(self) -> None:
        """Let go of everything that was kept."""
        self._store = self._watcher = None

    def summary(self) -> LanguageSummary:
        return LanguageSummary(str(self.session), tuple(self.records), self.cache_bytes)

    def model_call(self, inner: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The model's output for a window, of which `logits` are those of its last block [n, block, vocabulary].

        Called as the pipeline does: tokens, attention_mask and position_ids, [n, tokens] each. Where anything fails,
        the model computes everything, with one warning.
        """
        from transformers.modeling_outputs import CausalLMOutput

        if self._failed:
            return inner(*args, **kwargs)
        try:
            return CausalLMOutput(logits=self._refine(*args, **kwargs))
        except DiffusionCacheError:
            raise
        except Exception as error:
            self._failed = True
            self.finish()
            warnings.warn(
                f"the language cache failed ({type(error).__name__}: {error}); this generation goes on without it",
                DiffusionCacheWarning,
                stacklevel=3,
            )
            return inner(*args, **kwargs)

    def _refine(self, tokens: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
        window = (tokens, attention_mask, position_ids)
        samples, length = tokens.shape
        store = self._store
        if store is None or len(store.tokens) != samples or store.tokens.shape[1] > length:
            store = self._store = Store(samples, tokens.device, self.decoder.reach)
            self._watcher = self.session.method.watcher()
        grown = store.grow(length)
        places = torch.arange(length, device=tokens.device)
        unsettled = (places >= store.settled(*window)).expand(samples, -1)
        masked = tokens.eq(self.mask_token)
        view = View(masked, store.masked, tokens.ne(store.tokens), unsettled, store.age, store.refinement)
        rows = unsettled if grown else self._chosen(view)
        refresh = bool((rows == unsettled).all())
        store.age += 1
        store.refinement += 1
        computed, executed = rows, 0.0
        if rows.any():
            with self.decoder.watched():
                computed, executed = self._compute(store, window, rows, view)
        if refresh:
            store.refresh(*window)
        store.tokens = torch.where(rows, tokens, store.tokens)
        store.masked = masked
        self.records.append(Refinement(tokens.numel(), executed, refresh))
        self.cache_bytes = max(self.cache_bytes, store.nbytes)
        assert store.logits is not None
        # a sampler takes the most confident token: let it be one that was computed, where any was
        fresh = masked & computed
        held = (masked & unsettled & ~fresh & fresh.any(dim=1, keepdim=True))[:, -self.block :, None]
        return torch.where(held, store.logits * HELD, store.logits)

    def _chosen(self, view: View) -> Tensor:
        """The tokens to compute where a method may choose."""
        rows = self.session.method.rows(view)
        tracked = self._watcher.tracked() if self._watcher is not None else None
        if tracked is not None:
            rows = rows | tracked
        return rows & view.unsettled

    def _compute(self, store: Store, window: tuple[Tensor, ...], rows: Tensor, view: View) -> tuple[Tensor, float]:
        """Run the model on these tokens [n, tokens] and keep what comes out.

        Returns: the tokens that the last layer computed, and how many each layer did on average.
        """
        tokens, padding, positions = window
        decoder, watcher = self.decoder, self._watcher
        lasting = self._lasting(view) if watcher is not None else rows
        places = places_of(rows)
        store.given(places)
        given = decoder.rows(places, positions, padding)
        hidden = decoder.embed(tokens.gather(1, places))
        executed = 0
        for layer in range(len(decoder.layers)):
            if watcher is not None:
                store.enter(layer, hidden)
            hidden = decoder.layer(layer, hidden, given, store)
            executed += places.numel()
            if watcher is None:
                continue
            whole = (rows | ~view.unsettled).all(dim=1)
            drifted = ~whole
            if drifted.any():
                drifted = drifted & watcher.drifted(layer, decoder.weights, places)
            watcher.refreshed(layer, decoder.weights, places, whole, lasting)
            if drifted.any() and layer + 1 < len(decoder.layers):
                hidden = store.enter(layer + 1, hidden)
                rows = rows | (view.unsettled & drifted[:, None])
                places = places_of(rows)
                store.given(places)
                given = decoder.rows(places, positions, padding)
                hidden = hidden.gather(1, places[..., None].expand(-1, -1, hidden.shape[-1]))
        self._keep_logits(store, hidden, rows)
        return rows, executed / len(decoder.layers)

    def _keep_logits(self, store: Store, hidden: Tensor, rows: Tensor) -> None:
        """hidden [n, queries, channels]: what left the last layer, of the tokens in rows."""
        columns = rows.cumsum(dim=1) - 1  # in which column of hidden each token is
        wanted = rows[:, -self.block :]
        sample = wanted.nonzero()[:, 0]
        fresh = self.decoder.logits(hidden[sample, columns[:, -self.block :][wanted]])
        if store.logits is None:
            store.logits = fresh.new_zeros(*wanted.shape, fresh.shape[-1])
        store.logits[wanted] = fresh

    def _lasting(self, view: View) -> Tensor:
        """Tokens whose keys and values may change until all are decoded: from the first masked token's block on."""
        if self.decoder.reach is None or not view.masked.any():
            return view.unsettled
        first = int(view.masked.any(dim=0).int().argmax())
        places = torch.arange(view.masked.shape[1], device=view.masked.device)
        return view.unsettled & (places >= first // self.decoder.reach * self.decoder.reach)


def places_of(rows: Tensor) -> Tensor:
    """Where each sample's tokens are, in order [n, most]; samples with fewer than others repeat their first.

    rows: bool [n, tokens]; a sample with none is given its first token, whatever that is.
    """
    counts = rows.sum(dim=1, keepdim=True)
    order = rows.int().argsort(dim=1, descending=True, stable=True)[:, : int(counts.max())]
    return torch.where(torch.arange(order.shape[1], device=rows.device) < counts, order, order[:, :1])
