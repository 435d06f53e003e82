"""Attention masks of block-causal models, as transformers' attention takes them."""

import torch
from torch import Tensor


def sees(queries: Tensor, keys: Tensor, block: int | None) -> Tensor:
    """Whether the token at each place of queries [..., n] attends to each place of keys [m], bool [..., n, m].

    block: tokens see their own block of so many and the ones before it, 1 being plain causal attention; None: all.
    """
    if block is None:
        return torch.ones(*queries.shape, len(keys), dtype=torch.bool, device=queries.device)
    return queries[..., None] // block >= keys // block


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to attention scores [n, 1, queries, keys]: nothing where seen [(n,) queries, keys], else -max."""
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)
    return mask[..., None, :, :] if mask.ndim == 3 else mask[None, None]
