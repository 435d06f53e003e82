"""Image denoisers with one stream of tokens, in tiny configurations; see zoo.py for what a Case holds."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.embeddings import get_2d_rotary_pos_embed, get_2d_rotary_pos_embed_lumina
from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21KVCache
from torch import Tensor
from zoo import Case, Draw

SELF = ("attn1", "ff")
SELF_CROSS = ("attn1", "attn2", "ff")


def steps(value: float) -> Tensor:
    """One timestep for both rows, as the pipelines expand it."""
    return torch.full((2,), value)


def prefix_mask(*lengths: int) -> Tensor:
    """Right-padded: the first `length` tokens of each row are real."""
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def grid(frame: int, height: int, width: int) -> Tensor:
    """(frame, row, column) of each token of one image."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.full_like(rows, frame), rows, columns], dim=-1).flatten(0, 1)


# Only the injection blocks (1 and 3) have a cross_attention; in the others it is None.
BRIA = dict(
    name="BriaFibo2Transformer2DModel",
    config=dict(
        in_channels=4, dim=32, n_layers=4, n_refiner_layers=3, n_heads=2, cap_feat_dim=24, injection_layer_ids=(1, 3),
        min_num_gist_tokens=4, max_num_gist_tokens=8, gist_step=2, gist_min_text_len=2, gist_max_text_len=10,
        axes_dims=(4, 6, 6), axes_lens=(32, 16, 16),
    ),
    chain={"noise_refiner": 3, "layers": 4},
    branches={
        "noise_refiner": ("attention", "feed_forward"),
        "layers": ("attention", "cross_attention", "feed_forward"),
    },
)  # fmt: skip


def bria_inputs(draw: Draw, **extra: Any) -> dict[str, Any]:
    return dict(
        hidden_states=draw(2, 4, 8, 4), timestep=steps(0.7), encoder_hidden_states=draw(2, 3, 10, 24),
        encoder_attention_mask=None, context_latents=None, return_dict=False,
    ) | extra  # fmt: skip


def dit(out_channels: int, variant: str = "") -> Case:
    config = dict(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=out_channels, num_layers=3,
        sample_size=8, num_embeds_ada_norm=10,
    )  # fmt: skip
    # Label 10 is the unconditional one. The output layer calls transformer_blocks[0].norm1.emb after the blocks.
    return Case(
        name="DiTTransformer2DModel",
        variant=variant,
        config=config,
        inputs=lambda draw: dict(
            hidden_states=draw(2, 4, 8, 8), timestep=torch.tensor([600, 600]), class_labels=torch.tensor([3, 10]),
            return_dict=False,
        ),
        chain={"transformer_blocks": 3},
        branches={"transformer_blocks": SELF},
    )  # fmt: skip


def dreamlite(use_self_attention: bool, variant: str = "") -> Case:
    # Without self-attention a block starts from norm1(x): nothing adds its input back.
    return Case(
        name="DreamLiteTransformer2DModel",
        variant=variant,
        config=dict(
            num_attention_heads=2, attention_head_dim=16, in_channels=16, num_layers=3, norm_num_groups=4,
            cross_attention_dim=24, use_linear_projection=True, qk_norm="rms_norm", ff_mult=3,
            use_self_attention=use_self_attention,
        ),
        inputs=lambda draw: dict(
            hidden_states=draw(2, 16, 4, 2), encoder_hidden_states=draw(2, 5, 24),
            encoder_attention_mask=prefix_mask(5, 3), return_dict=False,
        ),
        chain={"transformer_blocks": 3},
        branches={"transformer_blocks": SELF_CROSS if use_self_attention else ("attn2", "ff")},
    )  # fmt: skip


# Inside, the sequence is first and the batch second: (tokens, batch, channels).
ERNIE = Case(
    name="ErnieImageTransformer2DModel",
    config=dict(
        hidden_size=32, num_attention_heads=2, num_layers=3, ffn_hidden_size=64, in_channels=8, out_channels=8,
        text_in_dim=24, rope_axes_dim=(4, 6, 6),
    ),
    inputs=lambda draw: dict(
        hidden_states=draw(2, 8, 4, 2), timestep=steps(700.0), text_bth=draw(2, 5, 24), text_lens=torch.tensor([5, 3]),
        return_dict=False,
    ),
    chain={"layers": 3},
    branches={"layers": ("self_attention", "mlp")},
)  # fmt: skip


# Blocks 4 and 5 take the outputs of blocks 1 and 0 as long skips; the depth has to be even.
HUNYUAN = dict(
    name="HunyuanDiT2DModel",
    config=dict(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, patch_size=2, sample_size=8, hidden_size=32,
        num_layers=6, cross_attention_dim=24, cross_attention_dim_t5=32, pooled_projection_dim=16, text_len=5,
        text_len_t5=7,
    ),
    chain={"blocks": 6},
    branches={"blocks": SELF_CROSS},
)  # fmt: skip


def hunyuan_inputs(draw: Draw, controls: int = 0) -> dict[str, Any]:
    rotary = get_2d_rotary_pos_embed(16, ((0, 0), (4, 2)), (4, 2), use_real=True, output_type="pt")
    inputs = dict(
        hidden_states=draw(2, 4, 8, 4), timestep=steps(700.0), encoder_hidden_states=draw(2, 5, 24),
        text_embedding_mask=prefix_mask(5, 3), encoder_hidden_states_t5=draw(2, 7, 32),
        text_embedding_mask_t5=prefix_mask(7, 4), image_meta_size=torch.tensor([[64.0, 32, 64, 32, 0, 0]] * 2),
        style=torch.tensor([0, 0]), image_rotary_emb=rotary, return_dict=False,
    )  # fmt: skip
    # The forward pops from this list until it is empty, so it serves one call only.
    return inputs | ({"controlnet_block_samples": [draw(2, 8, 32) for _ in range(controls)]} if controls else {})


IDEOGRAM = dict(
    name="Ideogram4Transformer2DModel",
    config=dict(
        in_channels=8, num_layers=3, attention_head_dim=16, num_attention_heads=2, intermediate_size=64, adaln_dim=24,
        llm_features_dim=40, mrope_section=(4, 2, 2),
    ),
    chain={"layers": 3},
    branches={"layers": ("attention", "feed_forward")},
)  # fmt: skip


def ideogram_inputs(draw: Draw, text: int) -> dict[str, Any]:
    """Left-padded text, then 4x2 image tokens; the transformer for the unconditional branch gets no text at all."""
    image = grid(0, 4, 2) + 65536
    positions = torch.zeros(2, text + 8, 3, dtype=torch.long)
    segments = torch.full((2, text + 8), -1)
    roles = torch.zeros(2, text + 8, dtype=torch.long)
    for row, length in enumerate((text, text - 2)):
        start = text - max(length, 0)
        positions[row, start:text] = torch.arange(text - start)[:, None]
        positions[row, text:] = image
        segments[row, start:] = 1
        roles[row, start:text] = 3
        roles[row, text:] = 2
    return dict(
        hidden_states=torch.cat([torch.zeros(2, text, 8), draw(2, 8, 8)], dim=1), timestep=steps(0.3),
        encoder_hidden_states=torch.cat([draw(2, text, 40), torch.zeros(2, 8, 40)], dim=1), position_ids=positions,
        segment_ids=segments, indicator=roles, attention_kwargs=None, return_dict=False,
    )  # fmt: skip


KREA = Case(
    name="Krea2Transformer2DModel",
    config=dict(
        in_channels=16, num_layers=3, attention_head_dim=16, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=64, timestep_embed_dim=32, text_hidden_dim=16, num_text_layers=3,
        text_num_attention_heads=2, text_num_key_value_heads=2, text_intermediate_size=32, axes_dims_rope=(4, 6, 6),
    ),
    inputs=lambda draw: dict(
        hidden_states=draw(2, 8, 16), encoder_hidden_states=draw(2, 5, 3, 16), timestep=steps(0.7),
        position_ids=torch.cat([torch.zeros(5, 3, dtype=torch.long), grid(0, 4, 2)]),
        encoder_attention_mask=prefix_mask(5, 3), attention_kwargs=None, return_dict=False,
    ),
    chain={"transformer_blocks": 3},
    branches={"transformer_blocks": ("attn", "ff")},
)  # fmt: skip


LUMINA2 = Case(
    name="Lumina2Transformer2DModel",
    config=dict(
        sample_size=8, in_channels=4, hidden_size=32, num_layers=3, num_refiner_layers=3, num_attention_heads=2,
        num_kv_heads=1, multiple_of=32, axes_dim_rope=(4, 6, 6), axes_lens=(32, 16, 16), cap_feat_dim=24,
    ),
    inputs=lambda draw: dict(
        hidden_states=draw(2, 4, 8, 4), timestep=steps(0.3), encoder_hidden_states=draw(2, 5, 24),
        encoder_attention_mask=prefix_mask(5, 3), attention_kwargs=None, return_dict=False,
    ),
    chain={"noise_refiner": 3, "layers": 3},
    branches={"noise_refiner": ("attn", "feed_forward"), "layers": ("attn", "feed_forward")},
)  # fmt: skip


# attn1 and attn2 return heads apart, (batch, tokens, heads, channels). The block gates and adds the two, and only then
# calls attn2.to_out[0] itself.
LUMINA_NEXT = Case(
    name="LuminaNextDiT2DModel",
    config=dict(
        sample_size=8, in_channels=4, hidden_size=32, num_layers=3, num_attention_heads=2, num_kv_heads=1,
        multiple_of=32, cross_attention_dim=24,
    ),
    inputs=lambda draw: dict(
        hidden_states=draw(2, 4, 8, 4), timestep=steps(0.3), encoder_hidden_states=draw(2, 5, 24),
        encoder_mask=prefix_mask(5, 3).int(), image_rotary_emb=get_2d_rotary_pos_embed_lumina(16, 8, 8),
        cross_attention_kwargs={"base_sequence_length": 16}, return_dict=False,
    ),
    chain={"layers": 3},
    branches={"layers": ("attn1", "attn2", "feed_forward")},
)  # fmt: skip


# Blocks 0, 1, 2 and 5 are dense, 3 and 4 mixtures whose experts choose their tokens over the whole row.
NUCLEUS = Case(
    name="NucleusMoEImageTransformer2DModel",
    config=dict(
        in_channels=16, out_channels=4, num_layers=6, attention_head_dim=16, num_attention_heads=2,
        num_key_value_heads=1, joint_attention_dim=24, axes_dims_rope=(4, 6, 6), mlp_ratio=6.0, num_experts=4,
        moe_intermediate_dim=32, capacity_factors=2.0,
    ),
    inputs=lambda draw: dict(
        hidden_states=draw(2, 8, 16), timestep=steps(0.7), encoder_hidden_states=draw(2, 5, 24),
        encoder_hidden_states_mask=prefix_mask(5, 3), img_shapes=[(1, 4, 2)] * 2, attention_kwargs=None,
        return_dict=False,
    ),
    chain={"transformer_blocks": 6},
    branches={"transformer_blocks": ("attn", "img_mlp")},
)  # fmt: skip


OMNIGEN = dict(
    name="OmniGenTransformer2DModel",
    config=dict(
        in_channels=4, hidden_size=32, num_attention_heads=2, num_key_value_heads=1, intermediate_size=64,
        num_layers=3, pad_token_id=0, vocab_size=50, rope_scaling={"short_factor": [1.0] * 8, "long_factor": [1.0] * 8},
        pos_embed_max_size=16, time_step_dim=32,
    ),
    chain={"layers": 3},
    branches={"layers": ("self_attn", "mlp")},
)  # fmt: skip


def omnigen_inputs(draw: Draw, lengths: tuple[int, int], images: Mapping[int, list[list[int]]]) -> dict[str, Any]:
    """Left-padded prompt, the time token, 4x2 image tokens. images: per row, where input images (4x2) stand in it."""
    text = max(lengths)
    total = text + 1 + 8
    ids = draw.ints(49, 2, text) + 1
    mask = torch.ones(2, total, total)
    positions = torch.zeros(2, total, dtype=torch.long)
    for row, length in enumerate(lengths):
        pad = text - length
        ids[row, :pad] = 0
        mask[row, pad:, :pad] = 0
        mask[row, pad : text + 1, pad : text + 1].tril_()
        mask[row, pad : text + 1, text + 1 :] = 0
        positions[row, pad:] = torch.arange(total - pad)
        for start, end in images.get(row, []):
            mask[row, start:end, start:end] = 1
    return dict(
        hidden_states=draw(2, 4, 8, 4), timestep=steps(0.3), input_ids=ids,
        input_img_latents=[draw(1, 4, 8, 4) for spans in images.values() for _ in spans], input_image_sizes=images,
        attention_mask=mask, position_ids=positions, return_dict=False,
    )  # fmt: skip


def prx(variant: str = "", **extra: Any) -> Case:
    # The feed-forward is no module of its own: the block gates what down_proj returns.
    return Case(
        name="PRXTransformer2DModel",
        variant=variant,
        config=dict(
            in_channels=4, context_in_dim=24, hidden_size=32, mlp_ratio=2.0, num_heads=2, depth=3, axes_dim=[8, 8]
        )
        | extra,
        inputs=lambda draw: dict(
            hidden_states=draw(2, 4, 8, 4), timestep=steps(0.7), encoder_hidden_states=draw(2, 5, 24),
            attention_mask=prefix_mask(5, 3), return_dict=False,
        ),
        chain={"blocks": 3},
        branches={"blocks": ("attention", "down_proj")},
    )  # fmt: skip


def pixart(out_channels: int, sizes: bool, variant: str = "") -> Case:
    added = {"resolution": torch.tensor([[64.0, 32]] * 2), "aspect_ratio": torch.tensor([[2.0]] * 2)}
    return Case(
        name="PixArtTransformer2DModel",
        variant=variant,
        config=dict(
            num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=out_channels, num_layers=3,
            cross_attention_dim=24, sample_size=8, caption_channels=20, use_additional_conditions=sizes,
        ),
        inputs=lambda draw: dict(
            hidden_states=draw(2, 4, 8, 4), encoder_hidden_states=draw(2, 5, 20),
            encoder_attention_mask=prefix_mask(5, 3), timestep=torch.tensor([700, 700]),
            added_cond_kwargs=added if sizes else dict.fromkeys(added), return_dict=False,
        ),
        chain={"transformer_blocks": 3},
        branches={"transformer_blocks": SELF_CROSS},
    )  # fmt: skip


PRIOR = dict(name="PriorTransformer", chain={"transformer_blocks": 3}, branches={"transformer_blocks": SELF})
PRIOR_CONFIG = dict(num_attention_heads=2, attention_head_dim=16, num_layers=3, embedding_dim=24, num_embeddings=5)


QWEN21 = dict(
    name="QwenImage21Transformer2DModel",
    config=dict(
        in_channels=8, out_channels=8, num_layers=3, attention_head_dim=16, num_attention_heads=2, context_in_dim=24,
        axes_dims_rope=(4, 6, 6),
    ),
    chain={"transformer_blocks": 3},
    branches={"transformer_blocks": ("attn", "img_mlp")},
)  # fmt: skip


def qwen21_inputs(draw: Draw, edited: int = 0, mode: str | None = None) -> dict[str, Any]:
    """Three text tokens, the image to edit, two text tokens, the image to make; images are 4x2, two 2x2 slots each."""
    slots = [False] * 3 + [True] * 2 * edited + [False] * 2 + [True] * 2
    text = len(slots) - 2
    cache = None if mode is None else QwenImage21KVCache(3)
    if mode == "cached":
        prefix = 5 + 8 * edited
        for layer in range(3):
            cache.get_layer(layer).store(draw(2, prefix, 2, 16), draw(2, prefix, 2, 16))
    return dict(
        hidden_states=draw(2, 8 * (1 + edited), 8), timestep=steps(0.7), encoder_hidden_states=draw(2, text, 24),
        encoder_hidden_states_mask=prefix_mask(text, text - 1), img_shapes=[[(1, 4, 2)] * (1 + edited)] * 2,
        img_mask=torch.tensor([slots] * 2), attention_kwargs=None, kv_cache=cache, kv_cache_mode=mode,
        return_dict=False,
    )  # fmt: skip


SANA = dict(name="SanaTransformer2DModel", chain={"transformer_blocks": 4}, branches={"transformer_blocks": SELF_CROSS})
SANA_CONFIG = dict(
    in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=4,
    num_cross_attention_heads=2, cross_attention_head_dim=16, cross_attention_dim=32, caption_channels=24,
    sample_size=4,
)  # fmt: skip


def sana_inputs(draw: Draw, **extra: Any) -> dict[str, Any]:
    return dict(
        hidden_states=draw(2, 4, 4, 2), encoder_hidden_states=draw(2, 5, 24), encoder_attention_mask=prefix_mask(5, 3),
        timestep=steps(700.0), attention_kwargs=None, return_dict=False,
    ) | extra  # fmt: skip


def transformer2d(variant: str, inputs: Any, branches: tuple[str, ...], **config: Any) -> Case:
    return Case(
        name="Transformer2DModel",
        variant=variant,
        config=dict(num_attention_heads=2, attention_head_dim=12, num_layers=3) | config,
        inputs=lambda draw: inputs(draw) | {"return_dict": False},
        chain={"transformer_blocks": 3},
        branches={"transformer_blocks": branches},
    )


ZIMAGE = dict(
    name="ZImageTransformer2DModel",
    chain={"noise_refiner": 3, "layers": 4},
    branches={"noise_refiner": ("attention", "feed_forward"), "layers": ("attention", "feed_forward")},
)
ZIMAGE_CONFIG = dict(
    in_channels=16, dim=32, n_layers=4, n_refiner_layers=3, n_heads=2, n_kv_heads=2, cap_feat_dim=24,
    axes_dims=[4, 6, 6], axes_lens=[256, 32, 32],
)  # fmt: skip


def zimage_inputs(draw: Draw, controls: tuple[int, ...] = ()) -> dict[str, Any]:
    """Image and text are each padded to a multiple of 32: 32 + 32 tokens in the first row, 32 + 64 in the second."""
    inputs = dict(
        x=[draw(16, 1, 8, 4), draw(16, 1, 8, 4)], t=steps(0.3), cap_feats=[draw(5, 24), draw(40, 24)],
        joint_attention_kwargs=None, return_dict=False,
    )  # fmt: skip
    return inputs | ({"controlnet_block_samples": {i: draw(2, 96, 32) for i in controls}} if controls else {})


def zimage_omni_inputs(draw: Draw) -> dict[str, Any]:
    """One image to edit per row, which stands clean before the noisy one; the noisy one has no SigLIP features."""
    return dict(
        x=[[draw(16, 1, 4, 4), draw(16, 1, 8, 4)] for _ in range(2)], t=steps(0.3),
        cap_feats=[[draw(n, 24) for n in lengths] for lengths in ((2, 6, 2), (2, 40, 2))],
        siglip_feats=[[draw(2, 3, 20), None] for _ in range(2)], image_noise_mask=[[0, 1]] * 2,
        joint_attention_kwargs=None, return_dict=False,
    )  # fmt: skip


CASES = [
    Case(**BRIA, inputs=bria_inputs),
    # Prompts of 10 and 4 tokens get 8 and 6 gist tokens, which then stand last, with a mask.
    Case(**BRIA, variant="padded", inputs=lambda d: bria_inputs(d, encoder_attention_mask=prefix_mask(10, 4))),
    Case(**BRIA, variant="edit", inputs=lambda d: bria_inputs(d, context_latents=[d(2, 4, 4, 4), d(2, 4, 8, 4)])),
    dit(4),
    dit(8, "learned_sigma"),
    dreamlite(True),
    dreamlite(False, "cross_only"),
    ERNIE,
    Case(**HUNYUAN, inputs=hunyuan_inputs),
    Case(**HUNYUAN, variant="controlnet", inputs=lambda d: hunyuan_inputs(d, controls=2)),
    Case(**IDEOGRAM, inputs=lambda d: ideogram_inputs(d, text=5)),
    Case(**IDEOGRAM, variant="unconditional", inputs=lambda d: ideogram_inputs(d, text=0)),
    KREA,
    LUMINA2,
    LUMINA_NEXT,
    NUCLEUS,
    Case(**OMNIGEN, inputs=lambda d: omnigen_inputs(d, (6, 4), {})),
    Case(**OMNIGEN, variant="edit", inputs=lambda d: omnigen_inputs(d, (12, 10), {0: [[1, 9]], 1: [[3, 11]]})),
    prx(),
    prx("pixel", bottleneck_size=8, resolution_embeds=True),
    pixart(4, sizes=False),
    pixart(8, sizes=True, variant="learned_sigma"),
    # The sample is one token of the sequence; what is read out is the last, learned one.
    Case(
        **PRIOR,
        config=PRIOR_CONFIG,
        inputs=lambda d: dict(
            hidden_states=d(2, 24), timestep=torch.tensor(700), proj_embedding=d(2, 24),
            encoder_hidden_states=d(2, 5, 24), attention_mask=prefix_mask(5, 3), return_dict=False,
        ),
    ),
    Case(
        **PRIOR,
        variant="tokens",  # Shap-E: the sample is a sequence, and its variance is learned too
        config=PRIOR_CONFIG
        | dict(
            additional_embeddings=0, norm_in_type="layer", embedding_proj_norm_type="layer",
            encoder_hid_proj_type=None, added_emb_type=None, embedding_proj_dim=20, clip_embed_dim=48,
            time_embed_act_fn="gelu", time_embed_dim=64,
        ),
        inputs=lambda d: dict(
            hidden_states=d(2, 5, 24), timestep=torch.tensor(700), proj_embedding=d(2, 20), return_dict=False
        ),
    ),
    Case(**QWEN21, inputs=qwen21_inputs),
    Case(**QWEN21, variant="edit", inputs=lambda d: qwen21_inputs(d, edited=1)),
    # The pipeline's default: the first step stores keys and values of the prefix in every block, the later steps send
    # only the tokens of the new image through the blocks.
    Case(**QWEN21, variant="kv_extract", inputs=lambda d: qwen21_inputs(d, edited=1, mode="extract")),
    Case(**QWEN21, variant="kv_cached", inputs=lambda d: qwen21_inputs(d, edited=1, mode="cached")),
    Case(**SANA, config=SANA_CONFIG, inputs=sana_inputs),
    # Added after blocks 1 and 2; block 0 gets none.
    Case(
        **SANA,
        variant="controlnet",
        config=SANA_CONFIG,
        inputs=lambda d: sana_inputs(d, controlnet_block_samples=(d(2, 8, 32), d(2, 8, 32))),
    ),
    Case(
        **SANA,
        variant="sprint",
        config=SANA_CONFIG | dict(guidance_embeds=True, qk_norm="rms_norm_across_heads"),
        inputs=lambda d: sana_inputs(d, timestep=steps(0.7), guidance=steps(0.45)),
    ),
    transformer2d(
        "",
        lambda d: dict(hidden_states=d(2, 16, 4, 2), encoder_hidden_states=d(2, 5, 20)),
        SELF_CROSS,
        in_channels=16, norm_num_groups=4, cross_attention_dim=20,
    ),
    transformer2d(
        "patches",
        lambda d: dict(
            hidden_states=d(2, 4, 8, 8), timestep=torch.tensor([600, 600]), class_labels=torch.tensor([3, 10])
        ),
        SELF,
        in_channels=4, out_channels=8, patch_size=2, sample_size=8, norm_type="ada_norm_zero", num_embeds_ada_norm=10,
        attention_bias=True, activation_fn="gelu-approximate", norm_elementwise_affine=False,
    ),
    transformer2d(
        "ada_single",
        lambda d: dict(
            hidden_states=d(2, 4, 8, 4), encoder_hidden_states=d(2, 5, 20), timestep=torch.tensor([700, 700]),
            encoder_attention_mask=prefix_mask(5, 3),
            added_cond_kwargs={"resolution": torch.tensor([[64.0, 32]] * 2), "aspect_ratio": torch.tensor([[2.0]] * 2)},
        ),
        SELF_CROSS,
        in_channels=4, out_channels=8, patch_size=2, sample_size=8, norm_type="ada_norm_single", cross_attention_dim=24,
        caption_channels=20, use_additional_conditions=True, attention_bias=True, norm_elementwise_affine=False,
    ),
    # The sample is integers; the output is the log-probabilities of every code but the masking one.
    transformer2d(
        "codes",
        lambda d: dict(hidden_states=d.ints(12, 2, 16), encoder_hidden_states=d(2, 5, 20), timestep=torch.tensor(7)),
        SELF_CROSS,
        num_vector_embeds=12, sample_size=4, cross_attention_dim=20, norm_type="ada_norm", num_embeds_ada_norm=10,
        attention_bias=True, activation_fn="geglu-approximate",
    ),
    Case(**ZIMAGE, config=ZIMAGE_CONFIG, inputs=zimage_inputs),
    Case(**ZIMAGE, variant="controlnet", config=ZIMAGE_CONFIG, inputs=lambda d: zimage_inputs(d, controls=(0, 2))),
    Case(**ZIMAGE, variant="omni", config=ZIMAGE_CONFIG | dict(siglip_feat_dim=20), inputs=zimage_omni_inputs),
]  # fmt: skip

UNBUILDABLE: dict[str, str] = {}
