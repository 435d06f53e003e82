"""Training data of the reference models: scikit-learn's handwritten digits, as images and as moving-digit videos.

Source: the UCI "Optical Recognition of Handwritten Digits" test set shipped with scikit-learn (`load_digits`),
1,797 grey images of 8×8 with values 0…16.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

IMAGE_SIZE = 16
VIDEO_FRAMES, VIDEO_SIZE, VIDEO_DIGIT = 7, 16, 10  # WanPipeline wants sizes divisible by 16


class MovingDigits(NamedTuple):
    """Videos [n, 1, frames, size, size] in [-1, 1], labels [n] and foreground masks, bool, shaped like the videos."""

    videos: Tensor
    labels: Tensor
    masks: Tensor


@lru_cache(maxsize=4)
def digit_images(size: int = IMAGE_SIZE) -> tuple[Tensor, Tensor]:
    """All digits upsampled (bicubic) to size×size: images [1797, 1, size, size] in [-1, 1] and labels [1797]."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    images = F.interpolate(images, size=(size, size), mode="bicubic", align_corners=False).clamp(-1, 1)
    return images, torch.tensor(digits.target)


def shift_images(images: Tensor, shifts: Tensor, background: float = -1.0) -> Tensor:
    """Shift each image [n, c, h, w] by whole pixels (dy, dx), shifts [n, 2], filling with the background value."""
    reach = int(shifts.abs().max())
    n, _, h, w = images.shape
    padded = F.pad(images, (reach,) * 4, value=background)
    rows = torch.arange(h)[None, :] + reach - shifts[:, 0, None]
    cols = torch.arange(w)[None, :] + reach - shifts[:, 1, None]
    picked = padded[torch.arange(n)[:, None, None], :, rows[:, :, None], cols[:, None, :]]  # [n, h, w, c]
    return picked.permute(0, 3, 1, 2)


def sample_digits(n: int, generator: torch.Generator, max_shift: int = 1) -> tuple[Tensor, Tensor]:
    """n random digits with random shifts of up to max_shift pixels: images [n, 1, 16, 16], labels [n]."""
    images, labels = digit_images()
    index = torch.randint(len(images), (n,), generator=generator)
    shifts = torch.randint(-max_shift, max_shift + 1, (n, 2), generator=generator)
    return shift_images(images[index], shifts), labels[index]


def digits_of(labels: Sequence[int], seeds: Sequence[int]) -> Tensor:
    """For each label a digit of that class that its seed picks, unshifted: images [n, 1, 16, 16]."""
    images, classes = digit_images()
    places = [(classes == label).nonzero().flatten() for label in labels]
    return images[[int(found[seed % len(found)]) for found, seed in zip(places, seeds, strict=True)]]


def textures(n: int, generator: torch.Generator) -> Tensor:
    """Smooth random backgrounds [n, 1, size, size] around -0.6, in about [-1, -0.2]."""
    coarse = torch.randn(n, 1, 5, 5, generator=generator)
    fine = F.interpolate(coarse, size=(VIDEO_SIZE, VIDEO_SIZE), mode="bicubic", align_corners=False)
    return (-0.6 + 0.17 * fine).clamp(-1, -0.1)


def opacity_of(digits: Tensor, corner: Tensor) -> Tensor:
    """Where digits [n, 1, 10, 10] with their top left at corner [n, 2] (y, x), in pixels, cover a frame: 0 to 1."""
    # output pixel p reads the digit at p - corner; grid_sample wants [-1, 1] over the digit's extent
    pixels = torch.arange(VIDEO_SIZE, dtype=torch.float32)
    ys = 2 * (pixels[None] - corner[:, :1] + 0.5) / VIDEO_DIGIT - 1
    xs = 2 * (pixels[None] - corner[:, 1:] + 0.5) / VIDEO_DIGIT - 1
    grid = torch.stack([xs[:, None, :].expand(-1, VIDEO_SIZE, -1), ys[:, :, None].expand(-1, -1, VIDEO_SIZE)], dim=-1)
    return F.grid_sample(digits, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def sample_moving_digits(n: int, generator: torch.Generator) -> MovingDigits:
    """n videos of a digit crossing a static textured background in a straight line.

    The middle frame shows the digit within half a pixel of the centre; the speed is at most 1.1 pixels a frame.
    """
    images, labels = digit_images(VIDEO_DIGIT)
    index = torch.randint(len(images), (n,), generator=generator)
    digits = (images[index] + 1) / 2  # opacity
    centre = (VIDEO_SIZE - VIDEO_DIGIT) / 2 + torch.rand(n, 2, generator=generator) - 0.5
    angle = 2 * torch.pi * torch.rand(n, generator=generator)
    speed = 0.4 + 0.7 * torch.rand(n, generator=generator)
    velocity = speed[:, None] * torch.stack([angle.sin(), angle.cos()], dim=1)
    background = textures(n, generator)

    frames, masks = [], []
    for frame in range(VIDEO_FRAMES):
        opacity = opacity_of(digits, centre + (frame - VIDEO_FRAMES // 2) * velocity)
        frames.append(background * (1 - opacity) + opacity)
        masks.append(opacity > 0.25)
    return MovingDigits(torch.stack(frames, dim=2), labels[index], torch.stack(masks, dim=2))
