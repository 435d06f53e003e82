"""The frequencies of a feature over its tokens or places: FreqCa's bands (arXiv 2510.08669)."""

import math

import torch
from torch import Tensor


def low_pass(feature: Tensor, cutoff: float) -> Tensor:
    """What of it has frequencies up to the cutoff along every axis, in units of the highest frequency there.

    feature: [rows, channels, ...], or tokens [rows, tokens, channels], which make a square if their number is one.
    What has no such axis is all of low frequency.
    """
    grid = feature
    if feature.ndim == 3:
        rows, tokens, channels = feature.shape
        side = math.isqrt(tokens)
        grid = feature.reshape(rows, side, side, channels) if side**2 == tokens else feature
    axes = range(1, grid.ndim - 1) if feature.ndim <= 3 else range(2, grid.ndim)
    if not axes:
        return feature
    spectrum = torch.fft.fftn(grid, dim=tuple(axes))
    for axis in axes:
        frequencies = torch.fft.fftfreq(grid.shape[axis], device=grid.device).abs()
        spectrum = spectrum * (frequencies <= 0.5 * cutoff).reshape(-1, *[1] * (grid.ndim - 1 - axis))
    return torch.fft.ifftn(spectrum, dim=tuple(axes)).real.reshape(feature.shape)
