"""Tiny video denoisers; see zoo.py. Where nothing else is said latents are 3 frames of 4 x 8 in patches 1 x 2 x 2."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from zoo import Case, Draw

TOKENS = 24
TEXT = 6
UNBUILDABLE: dict[str, str] = {}


def case(
    name: str,
    config: Mapping[str, Any],
    inputs: Callable[[Draw], dict[str, Any]],
    stacks: Mapping[str, tuple[int, tuple[str, ...]]],
    variant: str = "",
) -> Case:
    """stacks: per ModuleList its length and the attribute names of attention and feed-forward in one block."""
    chain = {stack: length for stack, (length, _) in stacks.items()}
    branches = {stack: names for stack, (_, names) in stacks.items()}
    return Case(name, config, lambda draw: inputs(draw) | {"return_dict": False}, variant, chain, branches)


def latents(draw: Draw, channels: int = 4, frames: int = 3) -> Tensor:
    return draw(2, channels, frames, 4, 8)


def mask(length: int = TEXT) -> Tensor:
    """The second prompt is two tokens shorter."""
    return (torch.arange(length) < torch.tensor([[length], [length - 2]])).long()


def rotary(tokens: int, width: int) -> tuple[Tensor, Tensor]:
    angles = torch.outer(torch.arange(tokens), 0.5 ** torch.arange(width // 2)).repeat_interleave(2, dim=1)
    return angles.cos(), angles.sin()


STEP = torch.tensor([500, 500])  # DDIM-like schedulers count in integers, flow matching in floats
TIME = STEP.float()


# Wan and the models built from its blocks

WAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 16,
    "ffn_dim": 48,
    "num_layers": 4,
    "rope_max_seq_len": 32,
}
WAN_IMAGE = WAN | {"in_channels": 12, "image_dim": 16, "added_kv_proj_dim": 24}
WAN_STACKS = {"blocks": (4, ("attn1", "attn2", "ffn"))}


def wan(draw: Draw, channels: int = 4, frames: int = 3, **more: Any) -> dict[str, Any]:
    given = {"hidden_states": latents(draw, channels, frames), "timestep": TIME}
    return given | {"encoder_hidden_states": draw(2, TEXT, 16)} | more


def wan_image(draw: Draw, rows: int = 2, **more: Any) -> dict[str, Any]:
    """The image's latents and mask are channels of the sample, its features go before the text.

    Attention takes all but the last 512 tokens for the image's, so the text has to have that many.
    """
    return (
        wan(draw, 12)
        | {
            "encoder_hidden_states": draw(2, 512, 16),
            "encoder_hidden_states_image": draw(rows, 5, 16),
        }
        | more
    )


WANS = [
    case("WanTransformer3DModel", WAN, wan, WAN_STACKS),
    case("WanTransformer3DModel", WAN_IMAGE, wan_image, WAN_STACKS, "i2v"),
    case(
        "WanTransformer3DModel",
        WAN_IMAGE | {"pos_embed_seq_len": 10},
        lambda draw: wan_image(draw, rows=4),  # first and last frame of each sample
        WAN_STACKS,
        "first-last",
    ),
    case(
        "WanTransformer3DModel",
        WAN,
        # Wan 2.2 TI2V: one timestep per token, zero for those of the given first frame
        lambda draw: wan(draw) | {"timestep": (torch.arange(TOKENS) >= 8).expand(2, -1) * 500.0},
        WAN_STACKS,
        "ti2v",
    ),
    case("ChronoEditTransformer3DModel", WAN_IMAGE, wan_image, WAN_STACKS),
    case(
        "ChronoEditTransformer3DModel",
        WAN_IMAGE | {"rope_temporal_skip_len": 8},
        lambda draw: wan_image(draw, hidden_states=latents(draw, 12, 2)),
        WAN_STACKS,
        "two-frames",
    ),
    case("SkyReelsV2Transformer3DModel", WAN, wan, WAN_STACKS),
    case("SkyReelsV2Transformer3DModel", WAN_IMAGE, wan_image, WAN_STACKS, "i2v"),
    case(
        "SkyReelsV2Transformer3DModel",
        WAN | {"num_frame_per_block": 2},
        lambda draw: (
            wan(draw, frames=4)
            | {"timestep": torch.tensor([[100, 100, 500, 500]] * 2), "enable_diffusion_forcing": True}
        ),
        WAN_STACKS,
        "forcing",
    ),
    # with diffusion forcing the forward takes fps for a batch of one only
    case(
        "SkyReelsV2Transformer3DModel",
        WAN | {"inject_sample_info": True},
        lambda draw: wan(draw) | {"fps": [0, 1]},
        WAN_STACKS,
        "fps",
    ),
    # vace_blocks run before blocks; each of their outputs is added after the block that vace_layers names
    case(
        "WanVACETransformer3DModel",
        WAN | {"vace_layers": [0, 2], "vace_in_channels": 6},
        lambda draw: (
            wan(draw)
            | {"control_hidden_states": latents(draw, 6), "control_hidden_states_scale": torch.tensor([1.0, 0.5])}
        ),
        WAN_STACKS,
    ),
    # face_adapter outputs are added after every second block; latent frames are one for the reference and one per pose
    case(
        "WanAnimateTransformer3DModel",
        WAN_IMAGE
        | {
            "latent_channels": 4,
            "motion_encoder_channel_sizes": {"4": 16, "8": 16},
            "motion_encoder_size": 8,
            "motion_style_dim": 16,
            "motion_dim": 4,
            "motion_encoder_dim": 16,
            "face_encoder_hidden_dim": 16,
            "face_encoder_num_heads": 2,
            "inject_face_latents_blocks": 2,
        },
        lambda draw: (
            wan_image(draw) | {"pose_hidden_states": latents(draw, 4, 2), "face_pixel_values": draw(2, 3, 5, 8, 8)}
        ),
        WAN_STACKS,
    ),
]


def animate2(draw: Draw, frames: int = 3, **more: Any) -> dict[str, Any]:
    """Lists of single videos: noise and condition latents are joined by channels, prompts may differ in length."""
    return {
        "hidden_states": [draw(4, frames, 4, 8) for _ in range(2)],
        "timestep": TIME,
        "encoder_hidden_states": [draw(TEXT, 16), draw(TEXT - 2, 16)],
        "condition_latents": [draw(2, frames, 4, 8) for _ in range(2)],
        "seq_len": frames * 8,
    } | more


def animate2_cache(layers: int, draw: Draw | None = None) -> Any:
    """What the extract call over two frames of driving video stores: keys and values of every layer."""
    from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

    cache = WanAnimate2KVCache(layers)
    if draw is not None:
        for layer in cache.layer_caches:
            layer.store(draw(2, 16, 2, 16), draw(2, 16, 2, 16))
    return cache


def animate2_cached(draw: Draw, layers: int = 4, **more: Any) -> dict[str, Any]:
    return animate2(
        draw,
        kv_cache=animate2_cache(layers, draw),
        kv_cache_mode="cached",
        reference_grid_sizes=torch.tensor([[2, 2, 4]] * 2),
        origin_len=5,
        origin_area=[32, 64],
        **more,
    )


ANIMATE2 = {
    "text_len": 8,
    "in_dim": 6,
    "dim": 32,
    "ffn_dim": 48,
    "freq_dim": 16,
    "text_dim": 16,
    "out_dim": 4,
    "num_heads": 2,
    "num_layers": 4,
    "use_img_emb": False,
}
ANIMATE2_BRANCHES = ("self_attn", "cross_attn", "ffn")

ANIMATE2S = [
    # The image embedder is 1280 wide whatever the config. A process's first "cached" call compiles the attention mask's
    # construction: that needs a C++ compiler and takes seconds.
    case(
        "WanAnimate2Transformer3DModel",
        ANIMATE2 | {"use_img_emb": True},
        lambda draw: animate2_cached(draw, encoder_hidden_states_image=draw(2, 5, 1280)),
        {"blocks": (4, ANIMATE2_BRANCHES)},
    ),
    # runs once per segment and serves only to fill kv_cache
    case(
        "WanAnimate2Transformer3DModel",
        ANIMATE2,
        lambda draw: animate2(
            draw,
            frames=2,
            kv_cache=animate2_cache(4),
            kv_cache_mode="extract",
            offset_grid_sizes=torch.tensor([[2, 2, 4]] * 2),
        ),
        {"blocks": (4, ANIMATE2_BRANCHES)},
        "extract",
    ),
    # the negative prompt's calls leave out the tenth block
    case(
        "WanAnimate2Transformer3DModel",
        ANIMATE2 | {"num_layers": 12},
        lambda draw: animate2_cached(draw, 12, is_uncondtion=True),
        {"blocks": (12, ANIMATE2_BRANCHES)},
        "uncond",
    ),
]


def anyflow(draw: Draw, frames: int = 3, **more: Any) -> dict[str, Any]:
    """Frames before channels, and for every frame the timestep it is at and the one it goes to."""
    return {
        "hidden_states": draw(2, frames, 4, 4, 8),
        "timestep": torch.full((2, frames), 500.0),
        "r_timestep": torch.full((2, frames), 250.0),
        "encoder_hidden_states": draw(2, TEXT, 16),
    } | more


# two frames to a chunk; of the latest two chunks the tokens are kept in full, of earlier ones compressed
FAR = WAN | {"full_chunk_limit": 2, "chunk_partition": (2, 2, 2)}


def far_cache(draw: Draw | None = None) -> dict[int, dict[str, Tensor]]:
    sizes = {"full_cache": (2, 2, 2, 32, 12), "compressed_cache": (2, 2, 2, 8, 12)}
    return {i: {name: draw(*size) if draw else torch.zeros(size) for name, size in sizes.items()} for i in range(4)}


ANYFLOWS = [
    case("AnyFlowTransformer3DModel", WAN, anyflow, WAN_STACKS),
    case(
        "AnyFlowTransformer3DModel",
        WAN | {"image_dim": 16, "deltatime_type": "t-r"},
        lambda draw: anyflow(draw) | {"encoder_hidden_states_image": draw(2, 5, 16)},
        WAN_STACKS,
        "i2v",
    ),
    # a step of the third chunk, reading the keys and values of the first two
    case(
        "AnyFlowFARTransformer3DModel",
        FAR,
        lambda draw: anyflow(
            draw,
            frames=2,
            chunk_partition=[2, 2, 2],
            kv_cache=far_cache(draw),
            kv_cache_flag={"num_cached_chunks": 2, "is_cache_step": False},
        ),
        WAN_STACKS,
    ),
    # between chunks: writes keys and values of all frames so far into kv_cache and predicts nothing
    case(
        "AnyFlowFARTransformer3DModel",
        FAR,
        lambda draw: anyflow(
            draw,
            frames=4,
            chunk_partition=[2, 2],
            kv_cache=far_cache(),
            kv_cache_flag={"num_cached_chunks": 1, "is_cache_step": True},
        ),
        WAN_STACKS,
        "prefill",
    ),
    # use_kv_cache=False: all chunks so far, the oldest compressed
    case(
        "AnyFlowFARTransformer3DModel",
        FAR,
        lambda draw: anyflow(draw, frames=6, chunk_partition=[2, 2, 2]),
        WAN_STACKS,
        "rollout",
    ),
]


# CogVideoX and what came of it: frames before channels

COG = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 16,
    "text_embed_dim": 16,
    "num_layers": 4,
    "sample_width": 8,
    "sample_height": 4,
    "sample_frames": 9,
    "max_text_seq_length": TEXT,
}
COG_STACKS = {"transformer_blocks": (4, ("attn1", "ff"))}


def cog(draw: Draw, channels: int = 4, frames: int = 3, **more: Any) -> dict[str, Any]:
    given = {"hidden_states": draw(2, frames, channels, 4, 8), "encoder_hidden_states": draw(2, TEXT, 16)}
    return given | {"timestep": STEP} | more


CONSISID = COG | {"num_attention_heads": 3, "use_rotary_positional_embeddings": True}
CONSISID_FACE = CONSISID | {
    "is_train_face": True,
    "cross_attn_interval": 2,
    "cross_attn_dim_head": 8,
    "cross_attn_num_heads": 2,
    "LFE_id_dim": 24,
    "LFE_vit_dim": 16,
    "LFE_depth": 2,
    "LFE_dim_head": 8,
    "LFE_num_heads": 2,
    "LFE_num_id_token": 2,
    "LFE_num_querie": 4,
    "LFE_output_dim": 32,
    "LFE_num_scale": 2,
}

COGS = [
    case("CogVideoXTransformer3DModel", COG, cog, COG_STACKS),
    # 5B I2V: the image's latents are channels
    case(
        "CogVideoXTransformer3DModel",
        COG | {"in_channels": 8, "use_rotary_positional_embeddings": True, "use_learned_positional_embeddings": True},
        lambda draw: cog(draw, 8, image_rotary_emb=rotary(TOKENS, 16)),
        COG_STACKS,
        "i2v",
    ),
    # 1.5 I2V: patches over two frames, and one offset for the whole batch
    case(
        "CogVideoXTransformer3DModel",
        COG
        | {
            "in_channels": 8,
            "use_rotary_positional_embeddings": True,
            "patch_size_t": 2,
            "patch_bias": False,
            "ofs_embed_dim": 16,
        },
        lambda draw: cog(draw, 8, 4, image_rotary_emb=rotary(16, 16), ofs=torch.full((1,), 2.0)),
        COG_STACKS,
        "1.5-i2v",
    ),
    # after every second block perceiver_cross_attention adds the face; there is one face for all rows
    case(
        "ConsisIDTransformer3DModel",
        CONSISID_FACE,
        lambda draw: cog(
            draw,
            image_rotary_emb=rotary(TOKENS, 16),
            id_cond=draw(1, 24),
            id_vit_hidden=[draw(1, 5, 16) for _ in range(2)],
        ),
        COG_STACKS,
    ),
    case(
        "ConsisIDTransformer3DModel",
        CONSISID,
        lambda draw: cog(draw, image_rotary_emb=rotary(TOKENS, 16)),
        COG_STACKS,
        "faceless",
    ),
]


EASY = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "patch_size": 2,
    "num_layers": 4,
    "mmdit_layers": 4,
    "time_embed_dim": 16,
    "text_embed_dim": 16,
}


def easy(draw: Draw, **more: Any) -> dict[str, Any]:
    given = {"hidden_states": latents(draw), "timestep": TIME}
    return given | {"encoder_hidden_states": draw(2, TEXT, 16)} | more


EASYS = [
    case("EasyAnimateTransformer3DModel", EASY, easy, {"transformer_blocks": (4, ("attn1", "ff", "txt_ff"))}),
    # the last block has one feed-forward for video and text, called twice
    case(
        "EasyAnimateTransformer3DModel",
        EASY
        | {
            "in_channels": 14,
            "mmdit_layers": 3,
            "after_norm": True,
            "add_norm_text_encoder": True,
            "text_embed_dim_t5": 16,
        },
        lambda draw: easy(
            draw,
            encoder_hidden_states_t5=draw(2, 3, 16),
            inpaint_latents=latents(draw, 6),
            control_latents=latents(draw, 4),
        ),
        {"transformer_blocks": (4, ("attn1", "ff"))},
        "inpaint",
    ),
]


# HunyuanVideo: blocks of two streams, then of one

HUNYUAN = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 3,
    "num_single_layers": 3,
    "num_refiner_layers": 1,
    "mlp_ratio": 2.0,
    "text_embed_dim": 16,
    "pooled_projection_dim": 8,
    "rope_axes_dim": (4, 6, 6),
}
HUNYUAN_STACKS = {
    "transformer_blocks": (3, ("attn", "ff", "ff_context")),
    # proj_out takes attn's output joined with the feed-forward's hidden layer
    "single_transformer_blocks": (3, ("attn", "proj_mlp", "proj_out")),
}


def hunyuan(draw: Draw, channels: int = 4, **more: Any) -> dict[str, Any]:
    return {
        "hidden_states": latents(draw, channels),
        "timestep": TIME,
        "encoder_hidden_states": draw(2, TEXT, 16),
        "encoder_attention_mask": mask(),
        "pooled_projections": draw(2, 8),
        "guidance": torch.full((2,), 6000.0),
    } | more


def framepack(draw: Draw) -> dict[str, Any]:
    """Three new frames after one at full size, two and four of history and the prefix."""
    return hunyuan(
        draw,
        image_embeds=draw(2, 5, 12),
        indices_latents=torch.arange(8, 11),
        latents_clean=latents(draw, frames=2),
        indices_latents_clean=torch.tensor([0, 7]),
        latents_history_2x=latents(draw, frames=2),
        indices_latents_history_2x=torch.arange(5, 7),
        latents_history_4x=latents(draw, frames=4),
        indices_latents_history_4x=torch.arange(1, 5),
    )


HUNYUAN15 = {name: HUNYUAN[name] for name in HUNYUAN if name not in ("num_single_layers", "pooled_projection_dim")}
HUNYUAN15 |= {"in_channels": 9, "num_layers": 4, "patch_size": 2, "text_embed_2_dim": 12, "image_embed_dim": 12}


def hunyuan15(draw: Draw, **more: Any) -> dict[str, Any]:
    """Without an image its features and its channels are zero."""
    return {
        "hidden_states": torch.cat([latents(draw), torch.zeros(2, 5, 3, 4, 8)], dim=1),
        "timestep": TIME,
        "encoder_hidden_states": draw(2, TEXT, 16),
        "encoder_attention_mask": mask(),
        "encoder_hidden_states_2": draw(2, 4, 12),
        "encoder_attention_mask_2": mask(4),
        "image_embeds": torch.zeros(2, 5, 12),
    } | more


HUNYUANS = [
    case("HunyuanVideoTransformer3DModel", HUNYUAN, hunyuan, HUNYUAN_STACKS),
    case(
        "HunyuanVideoTransformer3DModel",
        HUNYUAN | {"in_channels": 9, "guidance_embeds": False, "image_condition_type": "latent_concat"},
        lambda draw: hunyuan(draw, 9, guidance=None),
        HUNYUAN_STACKS,
        "latent-concat",
    ),
    case(
        "HunyuanVideoTransformer3DModel",
        HUNYUAN | {"image_condition_type": "token_replace"},
        hunyuan,
        HUNYUAN_STACKS,
        "token-replace",
    ),
    case(
        "HunyuanVideoFramepackTransformer3DModel",
        HUNYUAN | {"has_image_proj": True, "image_proj_dim": 12, "has_clean_x_embedder": True},
        framepack,
        HUNYUAN_STACKS,
    ),
    # one embedder of the second text is 2048 wide whatever the config, and makes up nearly all parameters
    case(
        "HunyuanVideo15Transformer3DModel",
        HUNYUAN15,
        hunyuan15,
        {"transformer_blocks": (4, ("attn", "ff", "ff_context"))},
    ),
    case(
        "HunyuanVideo15Transformer3DModel",
        HUNYUAN15 | {"use_meanflow": True},
        lambda draw: hunyuan15(
            draw, hidden_states=latents(draw, 9), image_embeds=draw(2, 5, 12), timestep_r=TIME - 100
        ),
        {"transformer_blocks": (4, ("attn", "ff", "ff_context"))},
        "i2v",
    ),
]


MOTIF = {name: value for name, value in HUNYUAN.items() if name not in ("num_refiner_layers", "pooled_projection_dim")}


def motif(draw: Draw, **more: Any) -> dict[str, Any]:
    given = {"hidden_states": latents(draw, 9), "timestep": TIME, "encoder_hidden_states": draw(2, TEXT, 16)}
    return given | {"encoder_attention_mask": mask()} | more


MOTIFS = [
    case("MotifVideoTransformer3DModel", MOTIF | {"in_channels": 9}, motif, HUNYUAN_STACKS),
    # the last two single blocks start again from the patch embeddings, with the video so far in place of the text
    case(
        "MotifVideoTransformer3DModel",
        MOTIF
        | {
            "in_channels": 9,
            "num_single_layers": 5,
            "num_decoder_layers": 2,
            "image_embed_dim": 12,
            "enable_text_cross_attention_dual": True,
            "enable_text_cross_attention_single": True,
        },
        lambda draw: motif(draw, image_embeds=draw(2, 5, 12)),
        {
            "transformer_blocks": (3, ("attn", "cross_attn", "ff", "ff_context")),
            "single_transformer_blocks": (5, ("attn", "proj_mlp", "proj_out")),
        },
        "decoder",
    ),
]


KANDINSKY = {
    "in_visual_dim": 4,
    "in_text_dim": 16,
    "in_text_dim2": 8,
    "time_dim": 16,
    "out_visual_dim": 4,
    "model_dim": 32,
    "ff_dim": 48,
    "num_text_blocks": 2,
    "num_visual_blocks": 4,
    "axes_dims": (4, 6, 6),
}


def kandinsky(draw: Draw, channels: int = 4) -> dict[str, Any]:
    return {
        "hidden_states": draw(2, 3, 4, 8, channels),
        "encoder_hidden_states": draw(2, TEXT, 16),
        "pooled_projections": draw(2, 8),
        "timestep": TIME,
        "visual_rope_pos": [torch.arange(3), torch.arange(2), torch.arange(4)],
        "text_rope_pos": torch.arange(TEXT),
        "scale_factor": (1.0, 2.0, 2.0),
    }


KANDINSKY_STACKS = {"visual_transformer_blocks": (4, ("self_attention", "cross_attention", "feed_forward"))}

KANDINSKYS = [
    # channels last, and the output is a bare tensor; text_transformer_blocks run before for the text alone
    case("Kandinsky5Transformer3DModel", KANDINSKY, kandinsky, KANDINSKY_STACKS),
    case(
        "Kandinsky5Transformer3DModel",
        KANDINSKY | {"visual_cond": True},
        lambda draw: kandinsky(draw, 9),
        KANDINSKY_STACKS,
        "i2v",
    ),
    # no text; attention picks its blocks of 8 x 8 tokens by what they hold
    case(
        "Kandinsky6SRTransformer3DModel",
        {
            "in_visual_dim": 4,
            "out_visual_dim": 4,
            "time_dim": 16,
            "model_dim": 32,
            "ff_dim": 48,
            "num_visual_blocks": 4,
            "axes_dims": (4, 6, 6),
            "nabla_window": (1, 1, 1),
            "nabla_threshold": 0.3,
        },
        lambda draw: {"hidden_states": draw(2, 2, 8, 16, 9), "timestep": TIME},
        {"visual_transformer_blocks": (4, ("self_attention", "feed_forward"))},
    ),
]


COSMOS = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 4,
    "mlp_ratio": 2.0,
    "text_embed_dim": 16,
    "adaln_lora_dim": 8,
    "max_size": (4, 16, 16),
    "concat_padding_mask": False,  # True needs torchvision, only to resize the mask before it becomes a channel
}
COSMOS_STACKS = {"transformer_blocks": (4, ("attn1", "attn2", "ff"))}


def cosmos(draw: Draw, channels: int = 4, **more: Any) -> dict[str, Any]:
    return {
        "hidden_states": latents(draw, channels),
        "timestep": TIME,
        "encoder_hidden_states": draw(2, TEXT, 16),
        "padding_mask": torch.zeros(1, 1, 32, 64),
    } | more


def transfer(draw: Draw, **more: Any) -> dict[str, Any]:
    """Cosmos 2.5: given first frame, a timestep per frame, text and image context."""
    given = torch.zeros(2, 1, 3, 4, 8)
    given[:, :, 0] = 1
    times = torch.tensor([0.1, 0.5, 0.5]).view(1, 1, 3, 1, 1).expand(2, -1, -1, -1, -1)
    text = draw(2, TEXT, 12), draw(2, 5, 10)
    return cosmos(draw, condition_mask=given, timestep=times) | {"encoder_hidden_states": text} | more


TRANSFER = COSMOS | {
    "in_channels": 5,
    "extra_pos_embed_type": None,
    "use_crossattn_projection": True,
    "crossattn_proj_in_channels": 12,
    "encoder_hidden_states_channels": 16,
    "img_context_dim_in": 10,
    "img_context_dim_out": 32,
    "img_context_num_tokens": 5,
    "controlnet_block_every_n": 2,
}

COSMOSES = [
    # learnable_pos_embed is added again in every block
    case("CosmosTransformer3DModel", COSMOS, lambda draw: cosmos(draw, fps=24), COSMOS_STACKS),
    case("CosmosTransformer3DModel", TRANSFER, transfer, COSMOS_STACKS, "image-context"),
    # every second block adds its residual to its output, in place
    case(
        "CosmosTransformer3DModel",
        TRANSFER,
        lambda draw: transfer(draw, block_controlnet_hidden_states=[draw(2, TOKENS, 32) for _ in range(2)]),
        COSMOS_STACKS,
        "controlnet",
    ),
]


def helios(draw: Draw) -> dict[str, Any]:
    """Three new frames after history at three scales; the frame numbers are the same for all rows."""
    return {
        "hidden_states": latents(draw),
        "timestep": STEP,
        "encoder_hidden_states": draw(2, TEXT, 16),
        "indices_hidden_states": torch.arange(8, 11)[None],
        "indices_latents_history_short": torch.tensor([[0, 7]]),
        "indices_latents_history_mid": torch.arange(5, 7)[None],
        "indices_latents_history_long": torch.arange(1, 5)[None],
        "latents_history_short": latents(draw, frames=2),
        "latents_history_mid": latents(draw, frames=2),
        "latents_history_long": latents(draw, frames=4),
    }


HELIOS = {name: value for name, value in WAN.items() if name != "rope_max_seq_len"} | {"rope_dim": (4, 4, 4)}

HELIOSES = [
    # history tokens precede the sample's in the blocks
    case("HeliosTransformer3DModel", HELIOS, helios, WAN_STACKS),
    case(
        "HeliosTransformer3DModel",
        HELIOS | {"is_amplify_history": True, "guidance_cross_attn": False, "zero_history_timestep": False},
        helios,
        WAN_STACKS,
        "amplify",
    ),
]


LATTE = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 3,
    "cross_attention_dim": 32,
    "attention_bias": True,
    "sample_size": 8,
    "patch_size": 2,
    "activation_fn": "gelu-approximate",
    "num_embeds_ada_norm": 1000,
    "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "caption_channels": 16,
    "video_length": 3,
}


def latte(draw: Draw, frames: int = 3, **more: Any) -> dict[str, Any]:
    given = {"hidden_states": draw(2, 4, frames, 8, 8), "timestep": STEP}
    return given | {"encoder_hidden_states": draw(2, TEXT, 16), "enable_temporal_attentions": True} | more


LATTES = [
    # the two stacks take turns, frames by tokens and tokens by frames; half of the output is the learned variance
    case(
        "LatteTransformer3DModel",
        LATTE,
        latte,
        {"transformer_blocks": (3, ("attn1", "attn2", "ff")), "temporal_transformer_blocks": (3, ("attn1", "ff"))},
    ),
    # temporal_transformer_blocks stay idle
    case(
        "LatteTransformer3DModel",
        LATTE | {"video_length": 1},
        lambda draw: latte(draw, 1, enable_temporal_attentions=False),
        {"transformer_blocks": (3, ("attn1", "attn2", "ff"))},
        "image",
    ),
]


def allegro(draw: Draw) -> dict[str, Any]:
    """The positions of the rotary embedding are given as tables of angles and an index into them for every token."""
    grid = torch.cartesian_prod(torch.arange(3), torch.arange(2), torch.arange(4)).T.reshape(3, 1, -1).contiguous()
    return {
        "hidden_states": latents(draw),
        "encoder_hidden_states": draw(2, TEXT, 16),
        "encoder_attention_mask": mask(),
        "timestep": STEP,
        "image_rotary_emb": (tuple(rotary(size, 4) for size in (3, 2, 4)), tuple(grid)),
    }


def minimax(draw: Draw) -> dict[str, Any]:
    """Six text rows, four of audio, then three frames of four video rows, the first of which is given.

    timestep has one entry per noise level among the rows: video and text, audio, given frame.
    """
    text, audio, video = torch.arange(6), torch.arange(6, 10), torch.arange(10, 22)
    tags = torch.tensor([1] * 6 + [2] * 4 + [0] * 12)
    frames = torch.cartesian_prod(torch.arange(6, 9), torch.arange(2), torch.arange(2))
    rows = torch.stack([torch.arange(10), torch.zeros(10), torch.zeros(10)], dim=1)
    return {
        "hidden_states": draw(2, 12, 16),
        "audio_hidden_states": draw(2, 4, 6),
        "encoder_hidden_states": draw(2, 6, 16),
        "timestep": torch.tensor([0.3, 0.4, 0.9]),
        "timestep_indices": torch.tensor([0] * 6 + [1] * 4 + [2] * 4 + [0] * 8),
        "token_tags": tags,
        "position_ids": torch.cat([rows, frames]).double(),
        "video_indices": video,
        "audio_indices": audio,
        "text_indices": text,
    }


OTHERS = [
    case(
        "AllegroTransformer3DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "num_layers": 4,
            "cross_attention_dim": 24,
            "sample_height": 4,
            "sample_width": 8,
            "sample_frames": 3,
            "caption_channels": 16,
        },
        allegro,
        {"transformer_blocks": (4, ("attn1", "attn2", "ff"))},
    ),
    # video and audio out; token_refiner's blocks are the text's
    case(
        "MiniMaxH3Transformer3DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "hidden_size": 32,
            "num_layers": 4,
            "num_refiner_layers": 2,
            "ffn_dim": 48,
            "in_channels": 4,
            "audio_in_channels": 6,
            "text_dim": 16,
            "freq_dim": 16,
            "time_embed_hidden_dim": 16,
            "time_embed_dim": 8,
            "rope_freq_dim": 2,
        },
        minimax,
        {"transformer_blocks": (4, ("attn", "ff"))},
    ),
    # the last block has no ff_context and returns the text as it got it
    case(
        "MochiTransformer3DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "num_layers": 4,
            "pooled_projection_dim": 24,
            "in_channels": 4,
            "text_embed_dim": 16,
            "time_embed_dim": 16,
            "max_sequence_length": TEXT,
        },
        lambda draw: {
            "hidden_states": latents(draw),
            "encoder_hidden_states": draw(2, TEXT, 16),
            "timestep": STEP,
            "encoder_attention_mask": mask().bool(),
        },
        {"transformer_blocks": (4, ("attn1", "ff"))},
    ),
]

CASES = [
    *WANS,
    *ANIMATE2S,
    *ANYFLOWS,
    *COGS,
    *EASYS,
    *HUNYUANS,
    *MOTIFS,
    *KANDINSKYS,
    *COSMOSES,
    *HELIOSES,
    *LATTES,
    *OTHERS,
]
