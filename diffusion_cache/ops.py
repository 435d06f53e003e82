"""Tensor operations on the cached path. Only this module may import `diffusion_cache.kernels`."""

from collections.abc import Sequence

import torch
from torch import Tensor

LOW_PRECISION = (torch.float16, torch.bfloat16)


def forecast(
    base: Tensor | None,
    features: Sequence[Tensor],
    weights: Sequence[float] | Tensor,
    correction: Tensor | None = None,
) -> Tensor:
    """scale · (base + Σ_j weights[j] · features[j]) + bias, accumulated in at least float32; always a new tensor.

    base and every feature have one shape and dtype, which the result keeps. base None stands for zero. weights: one
    number per feature, or a tensor [K] or [rows, K] for K features [rows, ...], each row with its own; features with
    zero weight must be finite then. correction: scale and bias, [rows or 1, 2, channels or 1]. None for 1 and 0.
    """
    if isinstance(weights, Tensor):
        return _forecast_tensor(base, features, weights, correction)
    terms = [(weight, feature) for weight, feature in zip(weights, features, strict=True) if weight != 0.0]
    dtype = features[0].dtype
    if not terms:
        return _corrected(torch.zeros_like(features[0]) if base is None else base.clone(), correction).to(dtype)
    if dtype in LOW_PRECISION:
        terms = [(weight, feature.float()) for weight, feature in terms]
        base = None if base is None else base.float()
    (weight, feature), *rest = terms
    if base is not None:
        total = torch.add(base, feature, alpha=weight)
    else:
        total = feature.clone() if weight == 1.0 else feature * weight
    for weight, feature in rest:
        total.add_(feature, alpha=weight)
    return _corrected(total, correction).to(dtype)


def _forecast_tensor(
    base: Tensor | None, features: Sequence[Tensor], weights: Tensor, correction: Tensor | None
) -> Tensor:
    if weights.shape[-1] != len(features):
        raise ValueError(f"{weights.shape[-1]} weights for {len(features)} features")
    dtype = features[0].dtype
    wide = torch.float32 if dtype in LOW_PRECISION else dtype
    weights = weights.to(wide)
    shape = (-1, *[1] * (features[0].ndim - 1)) if weights.ndim == 2 else ()
    total = torch.zeros_like(features[0], dtype=wide) if base is None else base.to(wide)
    for j, feature in enumerate(features):
        total = torch.addcmul(total, weights[..., j].reshape(shape), feature.to(wide))
    return _corrected(total, correction).to(dtype)


def _corrected(output: Tensor, correction: Tensor | None) -> Tensor:
    if correction is None or not output.is_floating_point():
        return output
    rows, _, count = correction.shape
    between = (1,) * (output.ndim - 2)
    shape = (rows, *between, count) if output.ndim <= 3 else (rows, count, *between)
    wide = output.float() if output.dtype in LOW_PRECISION else output
    scale, bias = (part.reshape(shape).to(wide.dtype) for part in correction.unbind(1))
    return torch.addcmul(bias, scale, wide)


def channel_axis(feature: Tensor) -> int:
    """Of a feature [rows, ..., channels], or of one with more than 3 axes, [rows, channels, ...]."""
    return -1 if feature.ndim <= 3 else 1


def channels(feature: Tensor) -> int:
    """How many channels a feature has."""
    return feature.shape[channel_axis(feature)]


def wide(tensor: Tensor) -> Tensor:
    """In at least float32."""
    return tensor.float() if tensor.dtype in LOW_PRECISION else tensor
