"""Where tokens lie, by how many there are and the shapes around them."""

import pytest
import torch

from diffusion_cache.signals import channels_first, grid_of


@pytest.mark.parametrize(
    ("tokens", "latent", "image", "grid"),
    [
        (64, (1, 16, 16), (1, 1, 16, 16), (1, 8, 8)),
        (32, (4, 8, 16), (1, 3, 64, 128), (1, 4, 8)),
        (64, (64, 4), (1, 1, 16, 16), (1, 8, 8)),
        (512, (512, 64), (1, 3, 256, 512), (1, 16, 32)),
        (7 * 16, (1, 7, 16, 16), (7, 1, 16, 16), (7, 4, 4)),
        (68, (64, 4), (1, 1, 16, 16), None),  # text and image
        (30, (1, 7, 16, 16), (7, 1, 16, 16), None),
        (64, (64, 4), (9, 1, 16, 16), None),  # a packed video
        (0, (1, 16, 16), (1, 1, 16, 16), None),
        (64, (64, 4), (1000,), None),  # sound
    ],
)
def test_grids_of_tokens(tokens, latent, image, grid):
    assert grid_of(tokens, latent, image) == grid


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((1, 3, 4, 2, 2), (1, 4, 3, 2, 2)),
        ((1, 4, 3, 2, 2), (1, 4, 3, 2, 2)),
        ((1, 4, 4, 2, 2), (1, 4, 4, 2, 2)),  # as many frames as channels
        ((1, 8, 4, 2, 2), (1, 8, 4, 2, 2)),  # 8 channels are known too
        ((3, 4, 2, 2), (3, 4, 2, 2)),
    ],
)
def test_frames_that_come_before_channels(shape, expected):
    assert channels_first(torch.zeros(shape), {4, 8}).shape == expected
