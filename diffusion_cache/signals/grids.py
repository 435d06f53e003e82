"""Where the tokens of a sample lie in its image."""

import math
from collections.abc import Collection

from torch import Tensor

Grid = tuple[int, int, int]


def channels_first(tensor: Tensor, channels: Collection[int]) -> Tensor:
    """Videos as [rows, C, frames, H, W], which some denoisers take frames first; channels: numbers that C can be."""
    frames_first = tensor.ndim == 5 and tensor.shape[2] in channels and tensor.shape[1] not in channels
    return tensor.transpose(1, 2) if frames_first else tensor


def grid_of(tokens: int, latent: tuple[int, ...], image: tuple[int, ...]) -> Grid | None:
    """(frames, height, width) of the tokens of a sample, if that many patches tile it; else None.

    latent: shape of its latents, (C, H, W), (C, F, H, W), or any where latents are packed; image: (…, F, C, H, W) or
    (C, H, W) of its image, whose proportions the tokens then have.
    """
    frames = latent[1] if len(latent) == 4 else 1
    if len(latent) not in (3, 4) and len(image) >= 4 and image[-4] > 1:
        return None  # of packed videos, nothing tells how many frames are one
    plane = latent[-2:] if len(latent) in (3, 4) else image[-2:]
    if tokens % frames or len(plane) < 2 or not all(plane):
        return None
    patches, (height, width) = tokens // frames, plane
    high = math.isqrt(patches * height // width)
    if not high or patches % high or high * width != height * (patches // high):
        return None
    return frames, high, patches // high
