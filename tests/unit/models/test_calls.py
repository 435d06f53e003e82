"""What the arguments of a denoiser call tell of where its tokens lie."""

import pytest
import torch

from diffusion_cache.models import grid_of_call


def ids(frames, height, width):
    return torch.cartesian_prod(*map(torch.arange, (frames, height, width))).float()


@pytest.mark.parametrize(
    ("kwargs", "tokens", "grid"),
    [
        ({"img_ids": ids(1, 3, 4)}, 12, (1, 3, 4)),
        ({"img_ids": ids(2, 3, 4)[None].repeat(2, 1, 1)}, 24, (2, 3, 4)),
        ({"img_ids": ids(1, 3, 4)}, 20, None),  # text and image
        ({"img_ids": torch.zeros(12, 3)}, 12, None),
        ({"img_shapes": [[(1, 3, 4)], [(1, 3, 4)]]}, 12, (1, 3, 4)),
        ({"img_shapes": [(1, 3, 4)]}, 12, (1, 3, 4)),
        ({"img_shapes": [[(1, 3, 4), (1, 2, 6)]]}, 24, None),  # an edit's reference beside it
        ({"num_frames": 2, "height": 3, "width": 4}, 24, (2, 3, 4)),
        ({"num_frames": 2, "height": 3}, 6, None),
        ({"img_ids": None, "img_shapes": []}, 6, None),
        ({}, 12, None),
    ],
)
def test_grids(kwargs, tokens, grid):
    assert grid_of_call(kwargs, tokens) == grid
