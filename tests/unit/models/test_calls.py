"""What the arguments of calls tell: where the tokens lie, and how the denoiser is guided."""

import pytest
import torch

from diffusion_cache.models import grid_of_call, guidance_of, is_unconditional, unconditional_last

LABELS, TEXT = torch.zeros(2, dtype=torch.long), torch.zeros(2, 3, 4)


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


def plain(self, prompt, guidance_scale=7.5): ...


def distilled(self, prompt, true_cfg_scale=1.0, guidance_scale=3.5): ...


def optional(self, prompt, true_cfg_scale=None, guidance_scale=4): ...


def none(self, prompt): ...


@pytest.mark.parametrize(
    ("call", "args", "kwargs", "expected"),
    [
        (plain, (None, "a"), {}, (7.5,)),
        (plain, (None, "a"), {"guidance_scale": 2}, (2.0,)),
        (plain, (None, "a", 3.0), {}, (3.0,)),
        (distilled, (None,), {}, (1.0, 3.5)),
        (distilled, (None,), {"true_cfg_scale": 5.0, "guidance_scale": 2.0}, (5.0, 2.0)),
        (optional, (None,), {}, (4.0,)),
        (plain, (None,), {"guidance_scale": [1.0, 2.0]}, ()),
        (plain, (None,), {"no_such_argument": 1}, ()),
        (none, (None,), {}, ()),
    ],
)
def test_guidance_of(call, args, kwargs, expected):
    assert guidance_of(call, args, kwargs) == expected


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({"class_labels": LABELS}, True),
        ({"encoder_hidden_states": TEXT}, False),
        ({"class_labels": LABELS, "encoder_hidden_states": TEXT}, False),  # an upscaler's level of noise
        ({"class_labels": None, "encoder_hidden_states": TEXT}, False),
        ({}, False),
    ],
)
def test_unconditional_last(kwargs, expected):
    assert unconditional_last(kwargs) == expected


def test_is_unconditional():
    names = {"cond": False, "uncond": True, "pred_uncond": True, "negative": True, "0": False, "1": True}
    assert {name: is_unconditional(name) for name in names} == names
