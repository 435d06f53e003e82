"""What the arguments of calls tell: where the tokens lie, and how the denoiser is guided."""

import pytest
import torch
from diffusers import LuminaNextDiT2DModel, OmniGenTransformer2DModel, SanaTransformer2DModel, ZImageTransformer2DModel

from diffusion_cache.models import (
    grid_of_call,
    guidance_of,
    guidance_weights,
    is_unconditional,
    unconditional_last,
)

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
    assert unconditional_last(None, kwargs) == expected
    assert unconditional_last(torch.nn.Linear(1, 1), kwargs) == expected


@pytest.mark.parametrize(
    ("cls", "expected"),
    [
        (LuminaNextDiT2DModel, True),
        (OmniGenTransformer2DModel, True),
        (ZImageTransformer2DModel, True),
        (SanaTransformer2DModel, False),
    ],
)
def test_pipelines_that_stack_the_prompt_first_are_known_by_their_denoiser(cls, expected):
    assert unconditional_last(cls.__new__(cls), {"encoder_hidden_states": TEXT}) == expected


def called(name, call):
    return type(name, (), {"__call__": call, "components": {}})()


def two_experts(self, prompt, guidance_scale=5.0, guidance_scale_2=None): ...


@pytest.mark.parametrize(
    ("name", "call", "kwargs", "expected"),
    [
        ("SanaPipeline", plain, {"guidance_scale": 4.5}, {"transformer": 4.5, "transformer_2": 4.5}),
        ("ZImageImg2ImgPipeline", plain, {"guidance_scale": 4.5}, {"transformer": 5.5, "transformer_2": 5.5}),
        ("Cosmos2_5_PredictBasePipeline", plain, {}, {"transformer": 8.5, "transformer_2": 8.5}),
        ("Cosmos3OmniPipeline", plain, {}, {"transformer": 7.5, "transformer_2": 7.5}),
        ("WanPipeline", two_experts, {}, {"transformer": 5.0, "transformer_2": 5.0}),
        ("WanPipeline", two_experts, {"guidance_scale_2": 3}, {"transformer": 5.0, "transformer_2": 3.0}),
        ("WanPipeline", none, {}, {}),
    ],
)
def test_guidance_weights(name, call, kwargs, expected):
    """Of a pipeline's subclass as well."""
    pipe = called(name, call)
    own = type("Own", (type(pipe),), {})()
    for one in (pipe, own):
        assert guidance_weights(one, ("a",), kwargs, ["transformer", "transformer_2"]) == expected


def test_is_unconditional():
    names = {"cond": False, "uncond": True, "pred_uncond": True, "negative": True, "0": False, "1": True}
    names |= {"cond_uncond": False, "uncond_cond": False, "uncond_stg": True}
    assert {name: is_unconditional(name) for name in names} == names
