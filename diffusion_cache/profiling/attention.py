"""How much attention each token receives in each block, measured while a model runs."""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..errors import ConfigError, DiffusionCacheWarning
from .moments import Sums

CHUNK = 2**24  # attention probabilities computed at once


class AttentionReceived(TorchFunctionMode, Sums):
    """Measures ā_j, the mean over queries, heads and samples of the attention A_ij that token j receives.

    ProfilingDiT's measure of what a block looks at (averaged over queries: over keys it would be a constant). As a
    context it sees every `scaled_dot_product_attention` that runs inside, adds what self-attention gives to the
    current block's sums, and passes the call on as it is:

        with received:
            with received.block("transformer_blocks.3", step):
                ...

    blocks: their names, in order. Calls outside a block, and those whose queries and keys differ in number, are
    passed over. offset, tokens: where in the sequence the tokens of interest begin, and how many they are (None: all
    that follow), for joint sequences of text and image: others are left out as queries and as receivers, but not
    from the softmax, so that ā then sums to what they do not receive. With `tokens` given, shorter sequences are
    passed over. max_queries: an evenly spaced part of the queries, for long sequences; None for all. top: remember for
    each batch row which share of the tokens received most, until `compare` has seen its foreground.

    Attention kernels that are called by another way (diffusers' flash, sage, xformers and flex backends) are not
    seen: `pipe.transformer.reset_attention_backend()` while this runs.
    """

    def __init__(
        self,
        blocks: Sequence[str],
        steps: int,
        *,
        offset: int = 0,
        tokens: int | None = None,
        max_queries: int | None = None,
        top: float | None = None,
    ):
        if top is not None and not 0 < top <= 1:
            raise ConfigError(f"the share of top tokens must be in (0, 1], not {top}")
        TorchFunctionMode.__init__(self)
        Sums.__init__(self, f"the attention of {', '.join(blocks)}")
        self.blocks, self.steps = tuple(blocks), steps
        self.offset, self.tokens, self.max_queries, self.top = offset, tokens, max_queries, top
        self._most: list[tuple[int, int, np.ndarray]] = []  # block, step, and the tokens attended most: bits of [B, N]
        self._current: tuple[int, int] | None = None

    @contextmanager
    def block(self, name: str, step: int) -> Iterator[None]:
        """Attention inside belongs to this block and step.

        Raises:
            ConfigError: for a block or step that was not announced.
        """
        if name not in self.blocks or not 0 <= step < self.steps:
            raise ConfigError(
                f"block {name!r} at step {step} is none of the {len(self.blocks)} × {self.steps} announced"
            )
        outer, self._current = self._current, (self.blocks.index(name), step)
        try:
            yield
        finally:
            self._current = outer

    def __torch_function__(
        self, func: Callable, types: Sequence[type], args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and self._current is not None:
            with torch.no_grad():
                self._observe(*args, **kwargs)
        return func(*args, **kwargs)

    def _observe(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> None:
        assert self._current is not None
        length = query.shape[-2]
        end = length if self.tokens is None else self.offset + self.tokens
        if key.shape[-2] != length or end > length or self.offset >= end:
            return
        block, step = self._current
        span = slice(self.offset, end)
        per_sample = attention_received(query, key, span, attn_mask, is_causal, scale, self.max_queries)
        if not per_sample.isfinite().all():
            raise ConfigError(f"the attention of {self.blocks[block]} is NaN at step {step}: nothing can be measured")
        known = self.sums.get(f"{block}.sum")
        if known is not None and known.shape[1] != end - self.offset:
            raise ConfigError(
                f"{self.blocks[block]} attends over {known.shape[1]} and over {end - self.offset} tokens: say which "
                "with tokens=…, and profile all samples at one size"
            )
        self.add(f"{block}.sum", per_sample.sum(0), (step,), (self.steps, end - self.offset))
        self.add(f"{block}.count", torch.tensor(len(per_sample)), (step,), (self.steps,))
        if self.top is not None:
            most = per_sample.topk(math.ceil(self.top * per_sample.shape[1]), dim=1).indices
            among = torch.zeros_like(per_sample, dtype=torch.bool).scatter_(1, most, True)
            self._most.append((block, step, np.packbits(among.cpu().numpy(), axis=1)))

    def result(self) -> dict[str, Tensor]:
        """attention_received.<block index>: [T, N] float32 for each block that was seen; NaN at steps that were not.

        Warns of blocks that were never seen, and with none at all raises ConfigError.
        """
        means = {
            index: (self.sums[f"{index}.sum"] / self.sums[f"{index}.count"][:, None]).float()
            for index in range(len(self.blocks))
            if f"{index}.sum" in self.sums
        }
        unseen = [name for index, name in enumerate(self.blocks) if index not in means]
        advice = (
            "they have none, it is not over the tokens asked for, or it runs on a backend other than PyTorch's own "
            "(pipe.transformer.reset_attention_backend())"
        )
        if not means:
            raise ConfigError(f"no self-attention was seen in any block: {advice}")
        if unseen:
            warnings.warn(
                f"no self-attention was seen in {len(unseen)} of {len(self.blocks)} blocks, as {unseen[0]}: {advice}",
                DiffusionCacheWarning,
                stacklevel=2,
            )
        return {f"attention_received.{index}": value for index, value in means.items()}

    def compare(self, foreground: Tensor) -> None:
        """Add to the sums how much of the foreground is among the tokens that received most, since the last call.

        foreground: bool [n, N], of the n samples that were generated since then in batch rows [guidance branch · n].

        Raises:
            ConfigError: for a mask of another number of tokens than the blocks' sequences, or of samples than rows.
        """
        foreground = foreground.cpu()
        for block, step, bits in self._most:
            tokens = self.sums[f"{block}.sum"].shape[1]
            if foreground.shape[1] != tokens:
                raise ConfigError(
                    f"the foreground mask has {foreground.shape[1]} tokens, but {self.blocks[block]} attends over "
                    f"{tokens}: give one value for each token, in the order of the sequence"
                )
            if len(bits) % len(foreground):
                raise ConfigError(
                    f"{self.blocks[block]} attends in {len(bits)} rows for {len(foreground)} samples, which cannot be "
                    "told apart: a foreground has no meaning there"
                )
            masks = foreground.repeat(len(bits) // len(foreground), 1)
            most = torch.from_numpy(np.unpackbits(bits, axis=1, count=tokens)).bool()
            shares = (most & masks).sum(1) / most.sum(1)
            self.add(f"{block}.share", shares.sum(), (step,), (self.steps,))
            self.add(f"{block}.compared", torch.tensor(len(bits)), (step,), (self.steps,))
        self._most.clear()

    def foreground_share(self) -> Tensor:
        """The share of foreground among the tokens that receive most attention: [S, T] float32, NaN where not seen.

        Mean over samples and guidance branches, each with the foreground of its own (ProfilingDiT's R). The paper
        leaves open how many tokens are the most attended ones.
        """
        shares = torch.full((len(self.blocks), self.steps), torch.nan)
        for index in range(len(self.blocks)):
            if f"{index}.share" in self.sums:  # 0/0 is NaN
                shares[index] = (self.sums[f"{index}.share"] / self.sums[f"{index}.compared"]).float()
        return shares


def attention_received(
    query: Tensor,
    key: Tensor,
    span: slice,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    max_queries: int | None = None,
) -> Tensor:
    """Mean over heads and the queries in `span` of softmax(q·kᵀ·scale + mask), for the keys in `span`.

    query [..., H, L, d] or [B, L, d], key the same or with H/n heads: [B, span] float32, where B is the product of
    the leading dimensions. Arguments as of `scaled_dot_product_attention`. Holds `CHUNK` probabilities at once.
    Queries that may attend to nothing give nothing.
    """
    length, width = key.shape[-2:]
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*query.shape[:-1], length)
    if query.ndim == 3:
        query, key = query[:, None], key[:, None]
        attn_mask = None if attn_mask is None else attn_mask[:, None]
    query, key = (x.reshape(-1, *x.shape[-3:]) for x in (query, key))
    attn_mask = None if attn_mask is None else attn_mask.reshape(-1, *attn_mask.shape[-3:])
    batch, heads = query.shape[:2]
    scale = 1 / math.sqrt(width) if scale is None else scale
    rows = torch.arange(span.start, span.stop, device=query.device)
    if max_queries is not None and len(rows) > max_queries:
        rows = rows[torch.linspace(0, len(rows) - 1, max_queries, device=rows.device).round().long()]
    group = max(1, min(heads, CHUNK // (len(rows) * length)))
    received = torch.zeros(batch, span.stop - span.start, device=query.device)
    for sample in range(batch):
        for low in range(0, heads, group):
            some = slice(low, min(low + group, heads))
            shared = torch.arange(some.start, some.stop, device=key.device) * key.shape[1] // heads
            keys = key[sample, shared].float().mT  # a key head may serve several query heads
            for at in rows.split(max(1, CHUNK // (len(shared) * length))):
                logits = query[sample, some][:, at].float() @ keys * scale
                if attn_mask is not None:
                    allowed = attn_mask[sample, some][:, at]
                    if allowed.dtype == torch.bool:
                        logits.masked_fill_(~allowed, -torch.inf)
                    else:
                        logits += allowed
                if is_causal:
                    logits.masked_fill_(torch.arange(length, device=at.device) > at[:, None], -torch.inf)
                idle = (logits == -torch.inf).all(-1, keepdim=True)
                probabilities = logits.softmax(-1).masked_fill_(idle, 0)
                received[sample] += probabilities[..., span].sum((0, 1))
    return received / (heads * len(rows))
