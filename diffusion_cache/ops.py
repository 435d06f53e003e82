"""Tensor operations on the cached path. Only this module may import `diffusion_cache.kernels`."""

from collections.abc import Sequence

import torch
from torch import Tensor

LOW_PRECISION = (torch.float16, torch.bfloat16)


def forecast(base: Tensor | None, features: Sequence[Tensor], weights: Sequence[float] | Tensor) -> Tensor:
    """base + Σ_j weights[j] · features[j], accumulated in at least float32; always a new tensor.

    base and every feature have one shape and dtype, which the result keeps. base None stands for zero. weights: one
    number per feature, or a tensor [K] or [rows, K] for K features [rows, ...], each row with its own; features with
    zero weight must be finite then.
    """
    if isinstance(weights, Tensor):
        return _forecast_tensor(base, features, weights)
    terms = [(weight, feature) for weight, feature in zip(weights, features, strict=True) if weight != 0.0]
    if not terms:
        return torch.zeros_like(features[0]) if base is None else base.clone()
    dtype = features[0].dtype
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
    return total.to(dtype)


def _forecast_tensor(base: Tensor | None, features: Sequence[Tensor], weights: Tensor) -> Tensor:
    if weights.shape[-1] != len(features):
        raise ValueError(f"{weights.shape[-1]} weights for {len(features)} features")
    dtype = features[0].dtype
    wide = torch.float32 if dtype in LOW_PRECISION else dtype
    weights = weights.to(wide)
    shape = (-1, *[1] * (features[0].ndim - 1)) if weights.ndim == 2 else ()
    total = torch.zeros_like(features[0], dtype=wide) if base is None else base.to(wide)
    for j, feature in enumerate(features):
        total = torch.addcmul(total, weights[..., j].reshape(shape), feature.to(wide))
    return total.to(dtype)
