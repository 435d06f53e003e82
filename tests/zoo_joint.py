"""Image denoisers with a stream of text tokens beside the image's, in tiny configurations; see zoo.py for what a Case
holds.
"""

from typing import Any

import torch
from diffusers.models.transformers.transformer_flux2 import Flux2KVCache
from diffusers.models.transformers.transformer_glm_image import GlmImageKVCache
from torch import Tensor
from torch.nn.functional import pad
from zoo import Case, Draw
from zoo_image import grid, prefix_mask, steps

HEADS = dict(num_attention_heads=2, attention_head_dim=16)
DOUBLE = ("attn", "ff", "ff_context")
SINGLE = ("attn", "proj_mlp", "proj_out")  # proj_out takes attn's output joined with the feed-forward's hidden layer
QWEN_LIKE = ("attn", "img_mlp", "txt_mlp")

# most classes here: text and image apart in the first stack, joined in the second
FLUX_LIKE = dict(
    chain={"transformer_blocks": 3, "single_transformer_blocks": 4},
    branches={"transformer_blocks": DOUBLE, "single_transformer_blocks": SINGLE},
)
SHARED = dict(num_layers=3, num_single_layers=4, joint_attention_dim=24, axes_dims_rope=(4, 6, 6), **HEADS)


def tokens(draw: Draw, text: int = 24, edited: int = 0, **extra: Any) -> dict[str, Any]:
    """4x2 image tokens, those of the edited images after them, and five of text. text: width of the text."""
    return dict(
        hidden_states=draw(2, 8 * (1 + edited), 16), timestep=steps(0.7), encoder_hidden_states=draw(2, 5, text),
        txt_ids=torch.zeros(5, 3), img_ids=torch.cat([grid(i, 4, 2) for i in range(1 + edited)]).float(),
        return_dict=False,
    ) | extra  # fmt: skip


def residuals(draw: Draw, double: int, single: int, length: int = 8) -> dict[str, Any]:
    """What a ControlNet adds between the blocks of both stacks; length: tokens of those for the second."""
    return dict(
        controlnet_block_samples=[draw(2, 8, 32) for _ in range(double)] or None,
        controlnet_single_block_samples=[draw(2, length, 32) for _ in range(single)] or None,
    )


def with_image(mask: Tensor) -> Tensor:
    """The text's mask, with the image's eight tokens behind it."""
    return pad(mask, (0, 8), value=True)


def diagonal(length: int, modality: int = 0) -> Tensor:
    """(modality, n, n) of the nth text token."""
    return torch.stack([torch.full((length,), modality), torch.arange(length), torch.arange(length)], dim=-1).float()


# A block adds what its feed-forward made of attention and input to the input, not to their sum.
AURAFLOW = Case(
    name="AuraFlowTransformer2DModel",
    config=dict(
        sample_size=8, in_channels=4, out_channels=4, num_mmdit_layers=3, num_single_dit_layers=4,
        joint_attention_dim=24, caption_projection_dim=32, pos_embed_max_size=16, **HEADS,
    ),
    inputs=lambda draw: dict(
        hidden_states=draw(2, 4, 8, 4), encoder_hidden_states=draw(2, 5, 24), timestep=steps(0.7),
        attention_kwargs=None, return_dict=False,
    ),
    chain={"joint_transformer_blocks": 3, "single_transformer_blocks": 4},
    branches={"joint_transformer_blocks": DOUBLE, "single_transformer_blocks": ("attn", "ff")},
)  # fmt: skip


BRIA = dict(name="BriaTransformer2DModel", config=dict(in_channels=16, **SHARED), **FLUX_LIKE)


def bria_inputs(draw: Draw, **extra: Any) -> dict[str, Any]:
    return tokens(draw, timestep=steps(700.0), attention_kwargs=None, **extra)


# Before each of the seven blocks, the second half of the text's channels is replaced by a layer of the text encoder.
FIBO = dict(name="BriaFiboTransformer2DModel", config=dict(in_channels=16, text_encoder_dim=12, **SHARED), **FLUX_LIKE)


def fibo_inputs(draw: Draw, mask: Tensor | None = None, edited: int = 0) -> dict[str, Any]:
    return tokens(
        draw, edited=edited, timestep=steps(700.0),
        joint_attention_kwargs={} if mask is None else {"attention_mask": with_image(mask)[:, None, None]},
        text_encoder_layers=[draw(2, 5, 12) for _ in range(7)],
    )  # fmt: skip


# The gates come from distilled_guidance_layer, for all blocks at once, and not from layers of the blocks.
CHROMA = dict(
    name="ChromaTransformer2DModel",
    config=dict(
        in_channels=16, approximator_num_channels=16, approximator_hidden_dim=32, approximator_layers=2, **SHARED
    ),
    **FLUX_LIKE,
)


def chroma_inputs(draw: Draw, **extra: Any) -> dict[str, Any]:
    return tokens(draw, attention_mask=with_image(prefix_mask(5, 3)), joint_attention_kwargs=None, **extra)


COGVIEW = dict(
    patch_size=2, out_channels=4, num_layers=3, text_embed_dim=24, time_embed_dim=32, condition_dim=8, sample_size=8,
    pos_embed_max_size=8, **HEADS,
)  # fmt: skip
COGVIEW_LIKE = dict(chain={"transformer_blocks": 3}, branches={"transformer_blocks": ("attn1", "ff")})


def cogview(name: str, variant: str = "", channels: int = 4, attends: bool = True, **config: Any) -> Case:
    """CogView 4 runs ff twice in a block, over the image and over the text; CogView 3 once, over both."""
    sizes = torch.tensor([[64.0, 32]] * 2)
    return Case(
        name=name,
        variant=variant,
        config=COGVIEW | dict(in_channels=channels) | config,
        inputs=lambda draw: dict(
            hidden_states=draw(2, channels, 8, 4), encoder_hidden_states=draw(2, 5, 24), timestep=steps(700.0),
            original_size=sizes, target_size=sizes, crop_coords=torch.zeros(2, 2), return_dict=False,
        ) | ({"attention_kwargs": None} if attends else {}),
        **COGVIEW_LIKE,
    )  # fmt: skip


FLUX = dict(name="FluxTransformer2DModel", **FLUX_LIKE)
FLUX_CONFIG = dict(in_channels=16, pooled_projection_dim=20, guidance_embeds=True, **SHARED)


def flux_inputs(draw: Draw, **extra: Any) -> dict[str, Any]:
    own = dict(pooled_projections=draw(2, 20), guidance=steps(3.5), joint_attention_kwargs=None)
    return tokens(draw, **own | extra)


# The gates are computed once for each stack. A single block's attn holds its feed-forward too.
FLUX2 = dict(
    name="Flux2Transformer2DModel",
    chain={"transformer_blocks": 3, "single_transformer_blocks": 4},
    branches={"transformer_blocks": DOUBLE, "single_transformer_blocks": ("attn",)},
)
FLUX2_CONFIG = SHARED | dict(in_channels=16, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4))


def ids4(frame: int, last: int = 0, scale: float = 1.0) -> Tensor:
    """(frame, row, column, last) of each of 4x2 tokens."""
    ids = pad(grid(frame, 4, 2).float(), (0, 1), value=last)
    ids[:, 1:3] *= scale
    return ids


def text4(length: int = 5) -> Tensor:
    return pad(torch.arange(length).float()[:, None], (3, 0))


def flux2_inputs(draw: Draw, edited: int = 0, **extra: Any) -> dict[str, Any]:
    ids = torch.cat([ids4(10 * i) for i in range(1 + edited)])
    common = dict(guidance=None, joint_attention_kwargs=None, txt_ids=text4().expand(2, -1, -1))
    return tokens(draw, edited=edited, **common | dict(img_ids=ids.expand(2, -1, -1)) | extra)


def flux2_stored(draw: Draw) -> Flux2KVCache:
    """Keys and values of the eight tokens of an edited image."""
    cache = Flux2KVCache(3, 4)
    cache.num_ref_tokens = 8
    for layer in (*cache.double_block_caches, *cache.single_block_caches):
        layer.store(draw(2, 8, 2, 16), draw(2, 8, 2, 16))
    return cache


# Text and edited images have stacks of their own, txt_mode_blocks and mode_blocks.image_cond, which know nothing of
# the timestep (but for a flow map) and nothing of the image; they meet in the second stack.
FLUX3 = dict(
    name="Flux3Transformer2DModel",
    chain={"mode_blocks.image": 3, "single_transformer_blocks": 4},
    branches={"mode_blocks.image": ("attn", "ff"), "single_transformer_blocks": ("attn", "ff")},
)
FLUX3_CONFIG = SHARED | dict(in_channels=16, cond_in_channels=12, timestep_channels=16, axes_dims_rope=(4, 4, 4, 4))


def flux3_inputs(draw: Draw, edited: bool = False, **extra: Any) -> dict[str, Any]:
    condition = dict(image_cond_hidden_states=draw(2, 8, 12), image_cond_ids=ids4(0, -1, 0.5)) if edited else {}
    return tokens(draw, **dict(img_ids=ids4(0, scale=0.5), txt_ids=text4()) | condition | extra)


GLM = dict(
    name="GlmImageTransformer2DModel",
    config=dict(
        in_channels=4, out_channels=4, num_layers=3, text_embed_dim=24, time_embed_dim=32, condition_dim=8,
        prior_vq_quantizer_codebook_size=20, **HEADS,
    ),
    **COGVIEW_LIKE,
)  # fmt: skip


def glm_inputs(draw: Draw, mode: str | None = None, edited: bool = False, drop: bool = False) -> dict[str, Any]:
    """mode: of the cache of keys and values, which holds those of an edited image of six tokens if edited."""
    cache = GlmImageKVCache(3)
    for _ in range(2 if edited else 0):
        for layer in range(3):
            cache[layer].store(draw(1, 6, 2, 16), draw(1, 6, 2, 16))
        cache.next_sample()
    cache.set_mode(mode)
    return dict(
        hidden_states=draw(2, 4, 8, 4), encoder_hidden_states=draw(2, 5, 24), prior_token_id=draw.ints(20, 2, 8),
        prior_token_drop=torch.full((2, 8), drop), timestep=steps(699.0), target_size=torch.tensor([[64.0, 32]] * 2),
        crop_coords=torch.zeros(2, 2), attention_kwargs=None, kv_caches=cache, return_dict=False,
    )  # fmt: skip


def glm_write_inputs(draw: Draw) -> dict[str, Any]:
    """Before the first step, over one edited image alone: every block stores its keys and values."""
    inputs = {
        key: value[:1] if isinstance(value, Tensor) else value for key, value in glm_inputs(draw, "write").items()
    }
    return inputs | dict(encoder_hidden_states=torch.zeros(1, 0, 24), timestep=torch.zeros(1))


# Every block gets a layer of Llama's after the text so far, and what became of it is cut off behind the block.
HIDREAM = dict(
    name="HiDreamImageTransformer2DModel",
    config=dict(
        patch_size=2, in_channels=4, num_layers=3, num_single_layers=4, caption_channels=[24, 20], text_emb_dim=16,
        num_routed_experts=3, num_activated_experts=2, axes_dims_rope=(8, 4, 4), max_resolution=(8, 8),
        llama_layers=[0, 1, 2, 3, 4, 4, 4], **HEADS,
    ),
    chain={"double_stream_blocks": 3, "single_stream_blocks": 4},
    branches={
        "double_stream_blocks": ("block.attn1", "block.ff_i", "block.ff_t"),
        "single_stream_blocks": ("block.attn1", "block.ff_i"),
    },
)  # fmt: skip


def hidream_inputs(draw: Draw, width: int) -> dict[str, Any]:
    return dict(
        hidden_states=draw(2, 4, 8, width), timesteps=steps(700.0), encoder_hidden_states_t5=draw(2, 5, 24),
        encoder_hidden_states_llama3=draw(5, 2, 4, 20), pooled_embeds=draw(2, 16), attention_kwargs=None,
        return_dict=False,
    )  # fmt: skip


# The projection of the second text is 2048 wide whatever the config: 4 of the 4.5 million parameters.
HUNYUAN = dict(name="HunyuanImageTransformer2DModel", **FLUX_LIKE)
HUNYUAN_CONFIG = dict(
    in_channels=4, out_channels=4, num_layers=3, num_single_layers=4, num_refiner_layers=3, mlp_ratio=2.0,
    text_embed_dim=24, rope_axes_dim=(8, 8), **HEADS,
)  # fmt: skip


def hunyuan_inputs(draw: Draw, glyphs: bool = True, **extra: Any) -> dict[str, Any]:
    """glyphs: texts to write into the image; the second prompt asks for none."""
    second = dict(encoder_hidden_states_2=draw(2, 4, 20), encoder_attention_mask_2=prefix_mask(4, 0))
    return dict(
        hidden_states=draw(2, 4, 4, 2), timestep=steps(700.0), encoder_hidden_states=draw(2, 5, 24),
        encoder_attention_mask=prefix_mask(5, 3), guidance=None, attention_kwargs={}, return_dict=False,
    ) | (second if glyphs else {}) | extra  # fmt: skip


JOY_CONFIG = dict(
    patch_size=[1, 2, 2], in_channels=4, hidden_size=32, num_attention_heads=2, text_dim=24, mlp_width_ratio=2.0,
    num_layers=3, rope_dim_list=[4, 6, 6],
)  # fmt: skip
JOY = dict(config=JOY_CONFIG, chain={"double_blocks": 3}, branches={"double_blocks": QWEN_LIKE})


def joy_inputs(draw: Draw, images: int) -> dict[str, Any]:
    return dict(
        hidden_states=draw(2, images, 4, 1, 8, 4), timestep=steps(700.0), encoder_hidden_states=draw(2, 5, 24),
        return_dict=False,
    )  # fmt: skip


def joy_plus_inputs(draw: Draw, shapes: list[list[tuple[int, int, int]]]) -> dict[str, Any]:
    """shapes: per row, of the image to make and those to edit, in tokens."""
    lengths = [sum(t * h * w for t, h, w in row) for row in shapes]
    patches = draw(2, max(lengths), 4, 1, 2, 2) * prefix_mask(*lengths)[:, :, None, None, None, None]
    return dict(
        hidden_states=patches, timestep=steps(700.0), encoder_hidden_states=draw(2, 5, 24),
        encoder_hidden_states_mask=prefix_mask(5, 3).long(), shape_list=shapes, return_dict=False,
    )  # fmt: skip


LONGCAT = dict(
    name="LongCatImageTransformer2DModel", config=dict(in_channels=16, pooled_projection_dim=20, **SHARED), **FLUX_LIKE
)


def longcat_inputs(draw: Draw, edited: int = 0) -> dict[str, Any]:
    ids = torch.cat([grid(1 + i, 4, 2).float() for i in range(1 + edited)])
    ids[:, 1:] += 5
    return tokens(draw, edited=edited, guidance=None, txt_ids=diagonal(5), img_ids=ids)


OVIS = Case(
    name="OvisImageTransformer2DModel",
    config=dict(in_channels=16, out_channels=16, **SHARED),
    inputs=lambda draw: tokens(draw, txt_ids=diagonal(5), joint_attention_kwargs=None),
    **FLUX_LIKE,
)


QWEN = dict(
    name="QwenImageTransformer2DModel", chain={"transformer_blocks": 3}, branches={"transformer_blocks": QWEN_LIKE}
)
QWEN_CONFIG = dict(
    in_channels=16, out_channels=4, num_layers=3, joint_attention_dim=24, axes_dims_rope=(4, 6, 6), **HEADS
)


def qwen_inputs(draw: Draw, images: int = 1, **extra: Any) -> dict[str, Any]:
    return dict(
        hidden_states=draw(2, 8 * images, 16), timestep=steps(0.7), guidance=None,
        encoder_hidden_states_mask=prefix_mask(5, 3), encoder_hidden_states=draw(2, 5, 24),
        img_shapes=[[(1, 4, 2)] * images] * 2, attention_kwargs={}, return_dict=False,
    ) | extra  # fmt: skip


# The last block has no feed-forward for the text, and returns None in its place.
SD3 = dict(name="SD3Transformer2DModel", chain={"transformer_blocks": 4})
SD3_CONFIG = dict(
    sample_size=8, in_channels=4, out_channels=4, num_layers=4, joint_attention_dim=24, caption_projection_dim=32,
    pooled_projection_dim=20, pos_embed_max_size=8, **HEADS,
)  # fmt: skip
SD3_BRANCHES = {"transformer_blocks": DOUBLE}


def sd3_inputs(draw: Draw, **extra: Any) -> dict[str, Any]:
    return dict(
        hidden_states=draw(2, 4, 8, 4), timestep=steps(700.0), encoder_hidden_states=draw(2, 5, 24),
        pooled_projections=draw(2, 20), joint_attention_kwargs=None, return_dict=False,
    ) | extra  # fmt: skip


def sd3_residuals(draw: Draw) -> dict[str, Any]:
    return dict(block_controlnet_hidden_states=[draw(2, 8, 32) for _ in range(2)])


CASES = [
    AURAFLOW,
    Case(**FIBO, inputs=fibo_inputs),
    Case(**FIBO, variant="padded", inputs=lambda d: fibo_inputs(d, prefix_mask(5, 3))),
    Case(**FIBO, variant="edit", inputs=lambda d: fibo_inputs(d, edited=1)),
    Case(**BRIA, inputs=bria_inputs),
    Case(**BRIA, variant="controlnet", inputs=lambda d: bria_inputs(d, **residuals(d, 2, 0))),
    # Written into the block's output, behind as many of the image's tokens as the text has.
    Case(**BRIA, variant="controlnet_single", inputs=lambda d: bria_inputs(d, **residuals(d, 2, 2, length=3))),
    Case(**CHROMA, inputs=chroma_inputs),
    # The single blocks' are written into the block's output.
    Case(**CHROMA, variant="controlnet", inputs=lambda d: chroma_inputs(d, **residuals(d, 2, 2))),
    cogview("CogView3PlusTransformer2DModel", attends=False),
    cogview("CogView4Transformer2DModel", rope_axes_dim=(16, 16)),
    cogview("CogView4Transformer2DModel", "control", channels=8, rope_axes_dim=(16, 16)),
    Case(**FLUX, config=FLUX_CONFIG, inputs=flux_inputs),
    Case(
        **FLUX,
        variant="schnell",
        config=FLUX_CONFIG | dict(guidance_embeds=False),
        inputs=lambda d: flux_inputs(d, guidance=None),
    ),
    Case(
        **FLUX,
        variant="control",
        config=FLUX_CONFIG | dict(in_channels=32, out_channels=16),
        inputs=lambda d: flux_inputs(d, hidden_states=d(2, 8, 32)),
    ),
    Case(**FLUX, variant="kontext", config=FLUX_CONFIG, inputs=lambda d: flux_inputs(d, edited=1)),
    Case(**FLUX, variant="controlnet", config=FLUX_CONFIG, inputs=lambda d: flux_inputs(d, **residuals(d, 2, 2))),
    Case(
        **FLUX,
        variant="controlnet_repeat",
        config=FLUX_CONFIG,
        inputs=lambda d: flux_inputs(d, controlnet_blocks_repeat=True, **residuals(d, 2, 0)),
    ),
    Case(**FLUX2, config=FLUX2_CONFIG, inputs=lambda d: flux2_inputs(d, guidance=steps(4.0))),
    Case(
        **FLUX2,
        variant="klein_edit",
        config=FLUX2_CONFIG | dict(guidance_embeds=False),
        inputs=lambda d: flux2_inputs(d, edited=1),
    ),
    # Without the attention processors that only the pipeline sets, nothing is stored and nothing stored is read.
    Case(
        **FLUX2,
        variant="kv_extract",
        config=FLUX2_CONFIG | dict(guidance_embeds=False),
        inputs=lambda d: flux2_inputs(d, edited=1, kv_cache_mode="extract", num_ref_tokens=8),
    ),
    Case(
        **FLUX2,
        variant="kv_cached",
        config=FLUX2_CONFIG | dict(guidance_embeds=False),
        inputs=lambda d: flux2_inputs(d, kv_cache=flux2_stored(d), kv_cache_mode="cached"),
    ),
    Case(**FLUX3, config=FLUX3_CONFIG, inputs=flux3_inputs),
    Case(**FLUX3, variant="edit", config=FLUX3_CONFIG, inputs=lambda d: flux3_inputs(d, edited=True)),
    Case(
        **FLUX3,
        variant="flow_map",
        config=FLUX3_CONFIG | dict(flow_map=True),
        inputs=lambda d: flux3_inputs(d, edited=True, target_timestep=steps(0.4)),
    ),
    Case(**GLM, inputs=glm_inputs),
    Case(**GLM, variant="kv_write", inputs=glm_write_inputs),
    Case(**GLM, variant="kv_read", inputs=lambda d: glm_inputs(d, "read", edited=True)),
    # The same cache in the negative prompt's call, which must not read it.
    Case(**GLM, variant="kv_skip", inputs=lambda d: glm_inputs(d, "skip", edited=True, drop=True)),
    Case(**HIDREAM, inputs=lambda d: hidream_inputs(d, 8)),
    # Images that are not square are padded to the longest sequence, here 16 tokens, and come with a mask.
    Case(**HIDREAM, variant="padded", inputs=lambda d: hidream_inputs(d, 4)),
    Case(**HUNYUAN, config=HUNYUAN_CONFIG | dict(text_embed_2_dim=20), inputs=hunyuan_inputs),
    Case(
        **HUNYUAN,
        variant="distilled",
        config=HUNYUAN_CONFIG | dict(text_embed_2_dim=20, guidance_embeds=True, use_meanflow=True),
        inputs=lambda d: hunyuan_inputs(d, guidance=steps(3250.0), timestep_r=steps(400.0)),
    ),
    # Five dimensions; noise and the image to refine are joined by channels.
    Case(
        **HUNYUAN,
        variant="refiner",
        config=HUNYUAN_CONFIG
        | dict(in_channels=8, patch_size=(1, 1, 1), rope_axes_dim=(4, 6, 6), guidance_embeds=True),
        inputs=lambda d: hunyuan_inputs(d, False, hidden_states=d(2, 8, 1, 4, 2), guidance=steps(3250.0)),
    ),
    Case(name="JoyImageEditTransformer3DModel", **JOY, inputs=lambda d: joy_inputs(d, 1)),
    # The image to edit stands first in the latents and last in the sequence of tokens.
    Case(name="JoyImageEditTransformer3DModel", variant="edit", **JOY, inputs=lambda d: joy_inputs(d, 2)),
    Case(
        name="JoyImageEditPlusTransformer3DModel",
        **JOY,
        inputs=lambda d: joy_plus_inputs(d, [[(1, 4, 2), (1, 2, 2), (1, 2, 3)], [(1, 4, 2), (1, 2, 2)]]),
    ),
    Case(**LONGCAT, inputs=longcat_inputs),
    Case(**LONGCAT, variant="edit", inputs=lambda d: longcat_inputs(d, edited=1)),
    OVIS,
    Case(**QWEN, config=QWEN_CONFIG, inputs=qwen_inputs),
    Case(
        **QWEN,
        variant="controlnet",
        config=QWEN_CONFIG,
        inputs=lambda d: qwen_inputs(d, controlnet_block_samples=[d(2, 8, 32), d(2, 8, 32)]),
    ),
    # Inside, the timestep's embedding has four rows: the edited images' tokens are modulated by those of timestep 0.
    Case(
        **QWEN,
        variant="edit",
        config=QWEN_CONFIG | dict(zero_cond_t=True),
        inputs=lambda d: qwen_inputs(d, images=3),
    ),
    Case(
        **QWEN,
        variant="layered",
        config=QWEN_CONFIG | dict(use_additional_t_cond=True, use_layer3d_rope=True),
        inputs=lambda d: qwen_inputs(d, images=4, additional_t_cond=torch.tensor([0, 0])),
    ),
    Case(**SD3, config=SD3_CONFIG, branches=SD3_BRANCHES, inputs=sd3_inputs),
    Case(
        **SD3,
        variant="3.5",
        config=SD3_CONFIG | dict(dual_attention_layers=(0, 1), qk_norm="rms_norm"),
        branches={"transformer_blocks": ("attn", "attn2", "ff", "ff_context")},
        inputs=sd3_inputs,
    ),
    # None behind the last block.
    Case(
        **SD3,
        variant="controlnet",
        config=SD3_CONFIG,
        branches=SD3_BRANCHES,
        inputs=lambda d: sd3_inputs(d, **sd3_residuals(d)),
    ),
    # The blocks named are not called.
    Case(
        **SD3,
        variant="skip_layers",
        config=SD3_CONFIG,
        branches=SD3_BRANCHES,
        inputs=lambda d: sd3_inputs(d, skip_layers=[1]),
    ),
]

UNBUILDABLE: dict[str, str] = {}
