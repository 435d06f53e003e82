"""Wan's blocks: keys and values of all tokens, then everything else in slices of tokens, which is exact."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor

from .runner import Runner

PROCESSOR = "WanAttnProcessor"
TEXT_TOKENS = 512  # of the context; what comes before belongs to the image
Rotation = tuple[Tensor, Tensor]  # cosines and sines, [1, tokens, 1, c]
KeyValue = tuple[Tensor, Tensor]  # [b, tokens, heads, c] each


def block(runner: Runner, inner: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """WanTransformerBlock."""
    module: Any = runner.module
    if not all(_plain(attention) for attention in (module.attn1, module.attn2)):
        return None
    sample, rotation = arguments["hidden_states"], arguments["rotary_emb"]
    context = _contexts(module.attn2, arguments["encoder_hidden_states"])
    temb, tokens = arguments["temb"], sample.shape[1]
    shared = (module.scale_shift_table + temb.float())[:, None] if temb.ndim == 3 else None

    def modulation(part: slice) -> tuple[Tensor, ...]:
        """Shift, scale and gate of the self-attention, and those of the feed-forward, [b, 1 or tokens, c] each."""
        values = module.scale_shift_table + temb[:, part].float() if shared is None else shared
        return values.unbind(2)

    def modulated(norm: Any, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return (norm(x.float()) * (1 + scale) + shift).type_as(x)

    def keys_and_values(part: slice) -> Tensor:
        shift, scale, *_ = modulation(part)
        given = modulated(module.norm1, sample[:, part], shift, scale)
        return torch.stack(_key_value(module.attn1, given, _at(rotation, part)))

    key, value = runner.sweep("keys and values", sample, tokens, keys_and_values, dim=2, others=arguments)

    def run(part: slice) -> Tensor:
        shift, scale, gate, ff_shift, ff_scale, ff_gate = modulation(part)
        x = sample[:, part]
        given = modulated(module.norm1, x, shift, scale)
        x = (x.float() + _attended(module.attn1, given, [(key, value)], _at(rotation, part)) * gate).type_as(x)
        given = module.norm2(x.float()).type_as(x)
        x = x + _attended(module.attn2, given, context)
        given = modulated(module.norm3, x, ff_shift, ff_scale)
        return (x.float() + module.ffn(given).float() * ff_gate).type_as(x)

    return runner.sweep("tokens", sample, tokens, run, dim=1, others=arguments)


def _plain(attention: Any) -> bool:
    """Whether the attention is computed as diffusers does without further ado."""
    processor = attention.processor
    plain = type(processor).__name__ == PROCESSOR and processor._parallel_config is None
    return plain and not attention.fused_projections


def _contexts(attention: Any, context: Tensor) -> list[KeyValue]:
    """Keys and values of the text, and of the image where there is one."""
    found = []
    if attention.add_k_proj is not None:
        image, context = context.tensor_split([context.shape[1] - TEXT_TOKENS], dim=1)
        key, value = attention.norm_added_k(attention.add_k_proj(image)), attention.add_v_proj(image)
        found = [(_heads(attention, key), _heads(attention, value))]
    return [_key_value(attention, context), *found]


def _key_value(attention: Any, context: Tensor, rotation: Rotation | None = None) -> KeyValue:
    key = _heads(attention, attention.norm_k(attention.to_k(context)))
    return _rotated(key, rotation), _heads(attention, attention.to_v(context))


def _attended(attention: Any, x: Tensor, context: list[KeyValue], rotation: Rotation | None = None) -> Tensor:
    query = _rotated(_heads(attention, attention.norm_q(attention.to_q(x))), rotation)
    backend = attention.processor._attention_backend
    outputs = [dispatch_attention_fn(query, *key_value, backend=backend).type_as(query) for key_value in context]
    output = sum(outputs[1:], outputs[0]).flatten(2)
    for module in attention.to_out:
        output = module(output)
    return output


def _heads(attention: Any, x: Tensor) -> Tensor:
    return x.unflatten(2, (attention.heads, -1))


def _at(rotation: Rotation, part: slice) -> Rotation:
    cosine, sine = rotation
    return cosine[:, part], sine[:, part]


def _rotated(x: Tensor, rotation: Rotation | None) -> Tensor:
    """x with its pairs of channels turned by the angles of their token's place (RoPE, arXiv 2104.09864)."""
    if rotation is None:
        return x
    cosine, sine = rotation[0][..., 0::2], rotation[1][..., 1::2]
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cosine - odd * sine, even * sine + odd * cosine), -1).flatten(-2).type_as(x)
