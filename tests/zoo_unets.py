"""Tiny UNets, Stable Cascade's and the other denoisers of diffusers.models.unets; see zoo.py."""

import math
from typing import Any

import torch
from torch import Tensor
from zoo import Case, Draw

T = torch.tensor(601)  # a scheduler's timesteps are integers without a dimension
WIDTHS = (16, 32, 32)
TEXT = 16  # width of the text embeddings
CROSS_ATTENTION = dict(
    down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
)
SDXL_BLOCKS = dict(
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
)
SIMPLE_CROSS_ATTENTION = dict(
    down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D", "SimpleCrossAttnDownBlock2D"),
    up_block_types=("SimpleCrossAttnUpBlock2D", "SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    mid_block_type="UNetMidBlock2DSimpleCrossAttn",
    resnet_time_scale_shift="scale_shift",
)


def conditional(**extra: Any) -> dict[str, Any]:
    shared = dict(norm_num_groups=8, layers_per_block=2, cross_attention_dim=TEXT, attention_head_dim=4)
    return dict(block_out_channels=WIDTHS, **shared) | CROSS_ATTENTION | extra


def sdxl(**extra: Any) -> dict[str, Any]:
    embeddings = dict(addition_embed_type="text_time", addition_time_embed_dim=8)
    return conditional(
        **SDXL_BLOCKS,
        **embeddings,
        projection_class_embeddings_input_dim=TEXT + 6 * 8,
        transformer_layers_per_block=(1, 1, 2),
        use_linear_projection=True,
        **extra,
    )


def blocks(kind: str, suffix: str) -> dict[str, Any]:
    """Names as UNet2DConditionModel has them, in another model's spelling: CrossAttnDownBlock3D."""
    return {
        name: tuple(block.replace("Block2D", f"{kind}{suffix}") for block in names)
        for name, names in CROSS_ATTENTION.items()
    }


def text(draw: Draw, channels: int = 4, size: tuple[int, ...] = (8, 8), **extra: Any) -> dict[str, Any]:
    """What most UNets take: the sample, a timestep and the text's embeddings."""
    inputs = dict(sample=draw(2, channels, *size), timestep=T, encoder_hidden_states=draw(2, 5, TEXT))
    return dict(inputs, **extra, return_dict=False)


def text_time(draw: Draw) -> dict[str, Any]:
    return dict(added_cond_kwargs=dict(text_embeds=draw(2, TEXT), time_ids=draw.ints(64, 2, 6).float()))


def controlnet(draw: Draw, size: int = 8, layers: int = 2, rows: int = 2) -> dict[str, Any]:
    """A ControlNet's residuals: one for conv_in and each layer and downsampler of the down blocks, one for the mid."""
    shapes = [(WIDTHS[0], size)]
    for level, width in enumerate(WIDTHS):
        shapes += [(width, size)] * layers
        if level < len(WIDTHS) - 1:
            size //= 2
            shapes.append((width, size))
    down: list[Tensor] = [draw(rows, width, side, side) for width, side in shapes]
    return dict(down_block_additional_residuals=down, mid_block_additional_residual=draw(rows, WIDTHS[-1], size, size))


def adapter(draw: Draw, *shapes: tuple[int, int]) -> dict[str, Any]:
    """A T2I-Adapter's features. The forward pops them off this very list, so that every call needs its own."""
    return dict(down_intrablock_additional_residuals=[draw(2, width, side, side) for width, side in shapes])


def cascade(
    levels: int, switch_level: tuple[bool, ...] | None, layers: tuple[int, ...], **extra: Any
) -> dict[str, Any]:
    plain, attending = ("SDCascadeResBlock", "SDCascadeTimestepBlock"), ("SDCascadeAttnBlock",)
    return dict(
        block_out_channels=(16, 32, 32)[-levels:],
        num_attention_heads=(4,) * levels,
        down_num_layers_per_block=layers,
        up_num_layers_per_block=layers[::-1],
        switch_level=switch_level,
        block_types_per_layer=(*[plain] * (levels - 2), plain + attending, plain + attending),
        in_channels=4,
        out_channels=4,
        dropout=0.1,
        timestep_ratio_embedding_dim=16,
        conditioning_dim=TEXT,
        clip_text_pooled_in_channels=TEXT,
    ) | dict(dict(down_blocks_repeat_mappers=(1,) * levels, up_blocks_repeat_mappers=(1,) * levels), **extra)


CASES = [
    Case(
        "UNet1DModel",  # DanceDiffusion: the first down and the last up block have no skip connection
        dict(
            block_out_channels=(32, 32, 32),
            time_embedding_type="fourier",
            time_embedding_dim=16,
            extra_in_channels=16,  # of the timestep, which is concatenated to the sample
        ),
        lambda draw: dict(sample=draw(2, 2, 64), timestep=torch.tensor(0.6), return_dict=False),
        levels=3,
    ),
    Case(
        "UNet1DModel",
        dict(  # the reinforcement learning pipeline's: horizon x (state, action)
            in_channels=6,
            out_channels=6,
            block_out_channels=WIDTHS,
            down_block_types=("DownResnetBlock1D",) * 3,
            up_block_types=("UpResnetBlock1D",) * 2,
            mid_block_type="MidResTemporalBlock1D",
            out_block_type="OutConv1DBlock",
            time_embedding_type="positional",
            use_timestep_embedding=True,
            act_fn="mish",
        ),
        lambda draw: dict(sample=draw(2, 6, 8), timestep=torch.tensor([7, 7]), return_dict=False),
        "resnets",
        levels=3,
    ),
    Case(
        "UNet2DModel",
        dict(
            block_out_channels=WIDTHS,
            norm_num_groups=8,
            attention_head_dim=8,
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        ),
        lambda draw: dict(sample=draw(2, 3, 8, 8), timestep=T, return_dict=False),
        levels=3,
    ),
    Case(
        "UNet2DModel",
        dict(  # consistency models: a class label, and the noise level in place of a timestep
            block_out_channels=WIDTHS,
            norm_num_groups=8,
            attention_head_dim=8,
            down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
            resnet_time_scale_shift="scale_shift",
            num_class_embeds=10,
        ),
        lambda draw: dict(
            sample=draw(2, 3, 8, 8), timestep=torch.tensor(250.5), class_labels=torch.tensor([3, 8]), return_dict=False
        ),
        "classes",
        levels=3,
    ),
    Case(
        "UNet2DModel",
        dict(  # score SDE: a second, image-sized stream of skip connections runs from block to block
            block_out_channels=(32, 32, 32),  # its group norms are of up to 32 groups
            layers_per_block=1,
            norm_num_groups=4,
            attention_head_dim=8,
            down_block_types=("SkipDownBlock2D", "AttnSkipDownBlock2D", "SkipDownBlock2D"),
            up_block_types=("SkipUpBlock2D", "AttnSkipUpBlock2D", "SkipUpBlock2D"),
            mid_block_scale_factor=math.sqrt(2),
            time_embedding_type="fourier",
        ),
        lambda draw: dict(sample=draw(2, 3, 8, 8), timestep=torch.tensor([7.5, 7.5]), return_dict=False),
        "skip",
        levels=3,
    ),
    Case("UNet2DConditionModel", conditional(), text, levels=3),
    Case("UNet2DConditionModel", conditional(), lambda d: text(d, size=(10, 6)), "odd-size", levels=3),
    Case("UNet2DConditionModel", conditional(), lambda d: text(d, **controlnet(d)), "controlnet", levels=3),
    Case(
        "UNet2DConditionModel",
        conditional(),
        lambda d: text(d, **adapter(d, (16, 8), (32, 4), (32, 2))),  # within the down blocks, the last one after them
        "t2i-adapter",
        levels=3,
    ),
    Case("UNet2DConditionModel", sdxl(), lambda d: text(d, **text_time(d)), "sdxl", levels=3),
    Case(
        "UNet2DConditionModel",
        sdxl(),
        lambda d: text(d, **text_time(d), **adapter(d, (16, 4), (32, 4), (32, 2), (32, 2))),  # one after the mid block
        "sdxl-t2i-adapter",
        levels=3,
    ),
    Case(
        "UNet2DConditionModel",
        sdxl(),
        lambda d: text(d, **text_time(d), **controlnet(d), **adapter(d, (16, 4), (32, 4), (32, 2), (32, 2))),
        "sdxl-both",
        levels=3,
    ),
    Case(
        "UNet2DConditionModel",
        conditional(in_channels=9),  # latents, mask and masked image
        lambda d: text(d, 9),
        "inpaint",
        levels=3,
    ),
    Case(
        "UNet2DConditionModel",
        conditional(time_cond_proj_dim=12),
        lambda d: text(d, timestep_cond=d(2, 12)),
        "guidance-embedding",
        levels=3,
    ),
    Case(
        "UNet2DConditionModel",
        conditional(mid_block_type=None),
        text,
        "no-mid",
        levels=3,
    ),
    Case(
        "UNet2DConditionModel",
        conditional(  # DeepFloyd IF's upscaler: six channels in, predicted variance out
            **SIMPLE_CROSS_ATTENTION,
            in_channels=6,
            out_channels=6,
            act_fn="gelu",
            attention_head_dim=8,
            class_embed_type="timestep",
            encoder_hid_dim=24,
            encoder_hid_dim_type="text_proj",
            addition_embed_type="text",
            addition_embed_type_num_heads=2,
            cross_attention_dim=32,
            cross_attention_norm="group_norm",
        ),
        lambda d: text(d, 6, class_labels=torch.tensor([250, 250])) | dict(encoder_hidden_states=d(2, 5, 24)),
        "learned-sigma",
        levels=3,
    ),
    Case(
        "UNet2DConditionModel",
        conditional(  # Kandinsky 2.2 with a control hint, which is encoded and concatenated to the sample
            **SIMPLE_CROSS_ATTENTION,
            in_channels=8,
            out_channels=8,
            attention_head_dim=8,
            encoder_hid_dim=24,
            encoder_hid_dim_type="image_proj",
            addition_embed_type="image_hint",
        ),
        lambda d: (
            text(d, added_cond_kwargs=dict(image_embeds=d(2, 24), hint=d(2, 3, 64, 64)))
            | dict(encoder_hidden_states=None)
        ),
        "hint",
        levels=3,
    ),
    Case(
        "AudioLDM2UNet2DConditionModel",  # per layer a self-attention and one for each of the two texts
        conditional(cross_attention_dim=((None, TEXT, 12),) * 3),
        lambda d: text(
            d,
            size=(8, 4),
            encoder_hidden_states_1=d(2, 4, 12),
            encoder_attention_mask_1=torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]),
        ),
        levels=3,
    ),
    Case(
        "UNet3DConditionModel",
        conditional(**blocks("Block", "3D")),
        lambda d: text(d, size=(3, 8, 8)),
        levels=3,
    ),
    Case(
        "UNetMotionModel",
        dict(
            block_out_channels=WIDTHS,
            norm_num_groups=8,
            cross_attention_dim=TEXT,
            num_attention_heads=4,
            motion_num_attention_heads=4,
            **blocks("Block", "Motion"),
        ),
        lambda d: text(d, size=(3, 8, 8)) | dict(encoder_hidden_states=d(6, 5, TEXT)),  # a row per frame
        levels=3,
    ),
    Case(
        "UNetMotionModel",
        dict(  # an older AnimateDiff's, without a motion module in the middle
            block_out_channels=WIDTHS,
            norm_num_groups=8,
            cross_attention_dim=TEXT,
            num_attention_heads=4,
            motion_num_attention_heads=4,
            use_motion_mid_block=False,
            **blocks("Block", "Motion"),
        ),
        lambda d: text(d, size=(3, 8, 8), **controlnet(d, rows=6)) | dict(encoder_hidden_states=d(6, 5, TEXT)),
        "controlnet",
        levels=3,
    ),
    Case(
        "UNetSpatioTemporalConditionModel",
        dict(
            block_out_channels=(32, 32, 32),  # its group norms are of 32 groups
            layers_per_block=1,
            cross_attention_dim=TEXT,
            num_attention_heads=4,
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=24,
            **blocks("Block", "SpatioTemporal"),
        ),
        # frames before channels; the image's latents are concatenated to the noisy ones
        lambda d: (
            text(d, 3, (8, 8, 8), added_time_ids=d.ints(9, 2, 3).float()) | dict(encoder_hidden_states=d(2, 1, TEXT))
        ),
        levels=3,
    ),
    Case(
        "I2VGenXLUNet",
        dict(
            block_out_channels=WIDTHS,
            norm_num_groups=8,
            layers_per_block=1,
            cross_attention_dim=TEXT,
            attention_head_dim=4,
            **blocks("Block", "3D"),
        ),
        lambda d: text(
            d,
            size=(3, 8, 8),
            fps=torch.tensor([8, 16]),
            image_latents=d(2, 4, 3, 8, 8),
            image_embeddings=d(2, 1, TEXT),
        ),
        levels=3,
    ),
    Case(
        "DreamLiteUNetModel",
        dict(
            block_out_channels=WIDTHS,
            norm_num_groups=8,
            cross_attention_dim=TEXT,
            attention_head_dim=4,
            transformer_layers_per_block=(1, 1, 2),
            ff_mult=2,
            use_linear_projection=True,
            encoder_hid_dim=24,
            encoder_hid_dim_type="text_proj_rms",
            addition_embed_type="time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=16,
        ),
        # the image that is edited stands to the right of the noisy one
        lambda d: (
            text(
                d,
                size=(8, 16),
                encoder_attention_mask=torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]]),
                added_cond_kwargs=dict(time_ids=d.ints(64, 2, 2).float()),
            )
            | dict(timestep=torch.tensor([601.5, 601.5]), encoder_hidden_states=d(2, 5, 24))
        ),
        levels=3,
    ),
    Case(
        "Kandinsky3UNet",  # four levels are in its code; no mid block, one skip connection a level
        dict(
            block_out_channels=(16, 16, 32, 32),
            time_embedding_dim=32,
            groups=4,
            attention_head_dim=8,
            layers_per_block=2,
            cross_attention_dim=TEXT,
            encoder_hid_dim=24,
        ),
        lambda d: (
            text(d, encoder_attention_mask=torch.tensor([[1.0, 1, 1, 1, 0], [1, 1, 1, 0, 0]]))
            | dict(encoder_hidden_states=d(2, 5, 24))
        ),
        levels=4,
    ),
    Case(
        "StableCascadeUNet",  # the prior: two levels of one size, conditioned on text and image
        cascade(2, (False,), (2, 2), clip_text_in_channels=24, clip_image_in_channels=20),
        lambda d: dict(
            sample=d(2, 4, 6, 6),
            timestep_ratio=torch.tensor([0.6, 0.6]),
            clip_text_pooled=d(2, 1, TEXT),
            clip_text=d(2, 5, 24),
            clip_img=d(2, 1, 20),
            return_dict=False,
        ),
        # the levels are ModuleLists themselves, and have no call of their own; their blocks are of three kinds in turn
        chain={"down_blocks.0": 6, "down_blocks.1": 6, "up_blocks.0": 6, "up_blocks.1": 6},
        levels=2,
    ),
    Case(
        "StableCascadeUNet",
        # the decoder: each level's blocks run two or three times in a forward, with a 1x1 convolution in between
        cascade(
            3,
            None,
            (1, 2, 2),
            down_blocks_repeat_mappers=(1, 2, 3),
            up_blocks_repeat_mappers=(3, 2, 2),
            effnet_in_channels=5,
            pixel_mapper_in_channels=3,
            patch_size=2,
        ),
        lambda d: dict(
            sample=d(2, 4, 16, 16),
            timestep_ratio=torch.tensor([0.6, 0.6]),
            clip_text_pooled=d(2, 1, TEXT),
            effnet=d(2, 5, 3, 3),
            return_dict=False,
        ),
        "repeated",
        chain={"down_blocks.0": 2, "down_blocks.1": 6, "down_blocks.2": 6}
        | {"up_blocks.0": 6, "up_blocks.1": 6, "up_blocks.2": 2},
        levels=3,
    ),
    Case(
        "UVit2DModel",  # no timestep: tokens in, logits out, and how much is masked says how far it is
        dict(
            hidden_size=32,
            cond_embed_dim=12,
            micro_cond_encode_dim=4,
            micro_cond_embed_dim=20,
            encoder_hidden_size=TEXT,
            vocab_size=40,
            codebook_size=32,
            in_channels=16,
            block_out_channels=16,
            block_num_heads=2,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=48,
            downsample=True,
            upsample=True,
        ),
        lambda d: dict(
            input_ids=d.ints(40, 2, 8, 8),
            encoder_hidden_states=d(2, 5, TEXT),
            pooled_text_emb=d(2, 12),
            micro_conds=d.ints(64, 2, 5),
        ),
        # between one down and one up block; without skip connections, for all its name
        chain={"transformer_layers": 3},
        branches={"transformer_layers": ("attn1", "attn2", "ff")},
    ),
    Case(
        "UNetControlNetXSModel",  # two streams: down and mid blocks take and return the base's and the control's states
        dict(
            block_out_channels=WIDTHS,
            norm_num_groups=8,
            cross_attention_dim=TEXT,
            num_attention_heads=4,
            ctrl_block_out_channels=(8, 16, 16),
            ctrl_conditioning_embedding_out_channels=(8, 8, 8, 8),
            ctrl_num_attention_heads=2,
            ctrl_max_norm_num_groups=4,
            ctrl_learn_time_embedding=True,
            time_embedding_mix=0.5,
            **CROSS_ATTENTION,
        ),
        lambda d: text(d, controlnet_cond=d(2, 3, 64, 64), conditioning_scale=0.7, apply_control=True),
        levels=3,
    ),
]

UNBUILDABLE = {
    "MotionAdapter": "not a denoiser: a container of motion modules for a UNetMotionModel, its forward does nothing",
}
