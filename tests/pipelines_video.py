"""Tiny video and audio pipelines whose denoiser is a transformer."""

import importlib
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from pipeline_zoo import PipelineCase
from torch import Tensor, nn
from zoo import Draw, randomise_zeros

STEPS = 4


def _new(name: str, **config: Any) -> Any:
    """A diffusers model in float32 and eval mode without zero weights, or a scheduler."""
    import diffusers

    torch.manual_seed(0)
    made = getattr(diffusers, name)(**config)
    if isinstance(made, nn.Module):
        made = made.float().eval().requires_grad_(False)
        randomise_zeros(made)
    return made


def _pipe(name: str, module: str = "diffusers", **components: Any) -> Any:
    pipe = getattr(importlib.import_module(module), name)(**components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _call(inputs: Callable[[Draw], dict[str, Any]], **options: Any) -> Callable[[], dict[str, Any]]:
    """A call with freshly drawn inputs, a fresh generator and latents as output, unless options say otherwise.

    For pipelines that do not take num_inference_steps, set it to None.
    """

    def call() -> dict[str, Any]:
        defaults = dict(num_inference_steps=STEPS, generator=torch.Generator().manual_seed(1), output_type="latent")
        arguments = defaults | inputs(Draw(0)) | options
        if arguments["num_inference_steps"] is None:
            del arguments["num_inference_steps"]
        return arguments

    return call


def _image(draw: Draw, size: int = 32) -> Any:
    from PIL import Image

    return Image.fromarray(draw.ints(256, size, size, 3).to(torch.uint8).numpy())


def _video(draw: Draw, frames: int = 5, size: int = 32) -> list[Any]:
    return [_image(draw, size) for _ in range(frames)]


def _embeds(draw: Draw, tokens: int = 6, width: int = 16) -> dict[str, Tensor]:
    return dict(prompt_embeds=draw(1, tokens, width), negative_prompt_embeds=draw(1, tokens, width))


def _masked_embeds(draw: Draw, tokens: int = 6, width: int = 16) -> dict[str, Tensor]:
    mask = torch.ones(1, tokens, dtype=torch.long)
    masks = dict(prompt_attention_mask=mask, negative_prompt_attention_mask=mask.clone())
    return _embeds(draw, tokens, width) | masks


NO_TEXT: dict[str, Any] = dict(text_encoder=None, tokenizer=None)
NO_TEXTS: dict[str, Any] = NO_TEXT | dict(text_encoder_2=None, tokenizer_2=None)
SIZE = dict(height=32, width=32)


class _StandIn(nn.Module):
    """What pipelines ask of any component."""

    dtype, device = torch.float32, torch.device("cpu")


class _Vision(_StandIn):
    """Stand-in for an image encoder: tokens that depend on the pixels."""

    def __init__(self, width: int, tokens: int = 4):
        super().__init__()
        self.token = nn.Parameter(torch.linspace(-1, 1, tokens * width).view(1, tokens, width), requires_grad=False)

    def forward(self, pixel_values: Tensor, **_: Any) -> Any:
        embeds = self.token * pixel_values.mean(dim=(1, 2, 3)).view(-1, 1, 1)
        return SimpleNamespace(last_hidden_state=embeds, hidden_states=[embeds] * 3)


class _Pixels:
    """Stand-in for the image processor of _Vision."""

    def __call__(self, images: Any, **_: Any) -> Any:
        from transformers import BatchFeature

        images = images if isinstance(images, (list, Tensor)) else [images]
        if isinstance(images, list):
            images = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255 for image in images])
        return BatchFeature({"pixel_values": images})

    preprocess = __call__


# Wan, SkyReels and their relatives

WAN = dict(num_attention_heads=2, attention_head_dim=12, text_dim=16, freq_dim=32, ffn_dim=32, num_layers=3)


def _unipc(shift: float = 5.0) -> Any:
    flow = dict(prediction_type="flow_prediction", use_flow_sigmas=True)
    return _new("UniPCMultistepScheduler", flow_shift=shift, **flow)


def _wan_vae() -> Any:
    return _new("AutoencoderKLWan", base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)


def _wan(
    name: str,
    transformer: str = "WanTransformer3DModel",
    two: bool = False,
    clip: bool = False,
    expand_timesteps: bool = False,
    scheduler: str = "",
    **config: Any,
) -> Any:
    parts = dict(
        transformer=_new(transformer, **(WAN | config)),
        vae=_wan_vae(),
        scheduler=_new(scheduler) if scheduler else _unipc(3.0),
    )
    if two:
        parts["transformer_2"] = _new(transformer, **(WAN | config))
        with torch.no_grad():
            for parameter in parts["transformer_2"].parameters():
                parameter.mul_(0.9)
        parts["boundary_ratio"] = 0.8
    if clip:
        parts |= dict(image_encoder=_Vision(16), image_processor=_Pixels())
    if expand_timesteps:
        parts["expand_timesteps"] = True
    return _pipe(name, **NO_TEXT, **parts)


def _wan_image(draw: Draw) -> dict[str, Any]:
    return _embeds(draw) | dict(image=_image(draw))


def _wan_video(draw: Draw) -> dict[str, Any]:
    return _embeds(draw) | dict(video=_video(draw))


def _wan_animate(draw: Draw, frames: int) -> dict[str, Any]:
    return _wan_image(draw) | dict(pose_video=_video(draw, frames), face_video=_video(draw, frames, 16))


SKYREELS = "SkyReelsV2Transformer3DModel"
CLIP = dict(clip=True, image_dim=16, added_kv_proj_dim=24, in_channels=36)
ANIMATE = dict(
    transformer="WanAnimateTransformer3DModel",
    clip=True,
    image_dim=16,
    added_kv_proj_dim=24,
    num_layers=4,
    motion_encoder_channel_sizes={"4": 8, "8": 8, "16": 8},
    motion_encoder_size=16,
    motion_style_dim=8,
    motion_dim=4,
    motion_encoder_dim=8,
    face_encoder_hidden_dim=8,
    face_encoder_num_heads=2,
    inject_face_latents_blocks=2,
)
VACE = dict(transformer="WanVACETransformer3DModel", vace_layers=[0, 2], vace_in_channels=96)
FRAMES = SIZE | dict(num_frames=5)


def _wan_case(
    name: str, inputs: Any, options: Any = None, iterations: int = STEPS, variant: str = "", **build: Any
) -> PipelineCase:
    call = _call(inputs, **(FRAMES if options is None else options))
    return PipelineCase(name, partial(_wan, name, **build), call, iterations, 2, variant)


WAN_CASES = [
    _wan_case("WanPipeline", _embeds),
    # timesteps 999, 900, 750 and 500: two iterations with each transformer
    _wan_case("WanPipeline", _embeds, variant="two-transformers", two=True),
    _wan_case("WanPipeline", _embeds, variant="expand-timesteps", expand_timesteps=True),
    # second order: two iterations a step, but one for the last
    _wan_case(
        "WanPipeline", _embeds, iterations=2 * STEPS - 1, variant="heun", scheduler="FlowMatchHeunDiscreteScheduler"
    ),
    _wan_case("WanImageToVideoPipeline", _wan_image, **CLIP),
    _wan_case("WanImageToVideoPipeline", _wan_image, variant="expand-timesteps", expand_timesteps=True),
    _wan_case("WanImageToVideoPipeline", _wan_image, variant="two-transformers", two=True, in_channels=36),
    # strength 0.75 of 4 steps
    _wan_case("WanVideoToVideoPipeline", _wan_video, SIZE | dict(strength=0.75), iterations=3),
    _wan_case("WanVACEPipeline", _wan_video, **VACE),
    _wan_case("WanVACEPipeline", _embeds, variant="two-transformers", two=True, **VACE),
    _wan_case(
        "WanAnimatePipeline",
        partial(_wan_animate, frames=5),
        SIZE | dict(segment_frame_length=5, guidance_scale=2.0),
        **ANIMATE,
    ),
    # nine frames in segments of five that share one: the whole loop runs twice in one call
    _wan_case(
        "WanAnimatePipeline",
        partial(_wan_animate, frames=9),
        SIZE | dict(segment_frame_length=5, guidance_scale=2.0),
        iterations=2 * STEPS,
        variant="two-segments",
        **ANIMATE,
    ),
    _wan_case("LucyEditPipeline", _wan_video, in_channels=32),
    _wan_case(
        "ChronoEditPipeline", _wan_image, transformer="ChronoEditTransformer3DModel", rope_temporal_skip_len=4, **CLIP
    ),
    # halfway the frames between the first and last are dropped
    _wan_case(
        "ChronoEditPipeline",
        _wan_image,
        SIZE | dict(num_frames=9, enable_temporal_reasoning=True, num_temporal_reasoning_steps=2),
        variant="reasoning",
        transformer="ChronoEditTransformer3DModel",
        rope_temporal_skip_len=4,
        **CLIP,
    ),
    _wan_case("SkyReelsV2Pipeline", _embeds, transformer=SKYREELS),
    _wan_case("SkyReelsV2ImageToVideoPipeline", _wan_image, transformer=SKYREELS, **CLIP),
    _wan_case("SkyReelsV2DiffusionForcingPipeline", lambda d: _embeds(d) | dict(prompt=None), transformer=SKYREELS),
    # every latent frame starts two steps after the one before it: timesteps differ between frames
    _wan_case(
        "SkyReelsV2DiffusionForcingPipeline",
        lambda d: _embeds(d) | dict(prompt=None),
        SIZE | dict(num_frames=9, ar_step=2, causal_block_size=1),
        iterations=STEPS + 4,
        variant="asynchronous",
        transformer=SKYREELS,
    ),
    # 13 frames in windows of 9 that share 5: the loop runs twice
    _wan_case(
        "SkyReelsV2DiffusionForcingPipeline",
        lambda d: _embeds(d) | dict(prompt=None),
        SIZE | dict(num_frames=13, base_num_frames=9, overlap_history=5),
        iterations=2 * STEPS,
        variant="long",
        transformer=SKYREELS,
    ),
    _wan_case("SkyReelsV2DiffusionForcingImageToVideoPipeline", _wan_image, transformer=SKYREELS),
    _wan_case(
        "SkyReelsV2DiffusionForcingVideoToVideoPipeline",
        _wan_video,
        SIZE | dict(num_frames=13, base_num_frames=9, overlap_history=5),
        iterations=2 * STEPS,
        transformer=SKYREELS,
    ),
]

# HunyuanVideo

HUNYUAN = dict(
    num_attention_heads=2,
    attention_head_dim=10,
    num_layers=2,
    num_single_layers=2,
    num_refiner_layers=1,
    patch_size=2,
    text_embed_dim=16,
    pooled_projection_dim=8,
    rope_axes_dim=(2, 4, 4),
)


def _hunyuan(
    name: str, transformer: str = "HunyuanVideoTransformer3DModel", components: Any = None, **config: Any
) -> Any:
    return _pipe(
        name,
        transformer=_new(transformer, **(HUNYUAN | dict(in_channels=4, out_channels=4) | config)),
        vae=_new(
            "AutoencoderKLHunyuanVideo",
            latent_channels=4,
            block_out_channels=(4, 4, 4, 4),
            layers_per_block=1,
            norm_num_groups=2,
        ),
        scheduler=_new("FlowMatchEulerDiscreteScheduler", shift=7.0),
        **NO_TEXTS,
        **(components or {}),
    )


def _hunyuan_inputs(draw: Draw, negative: bool = False, image: bool = False) -> dict[str, Any]:
    inputs: dict[str, Any] = {}
    for prefix in ["", "negative_"] if negative else [""]:
        inputs |= {
            f"{prefix}prompt_embeds": draw(1, 6, 16),
            f"{prefix}pooled_prompt_embeds": draw(1, 8),
            f"{prefix}prompt_attention_mask": torch.ones(1, 6),
        }
    return inputs | (dict(image=_image(draw)) if image else {})


def _hunyuan_case(
    name: str,
    image: bool,
    true_cfg: float,
    iterations: int = STEPS,
    variant: str = "",
    options: Any = None,
    **build: Any,
) -> PipelineCase:
    inputs = partial(_hunyuan_inputs, negative=true_cfg > 1, image=image)
    call = _call(inputs, **(FRAMES if options is None else options), true_cfg_scale=true_cfg)
    return PipelineCase(name, partial(_hunyuan, name, **build), call, iterations, 2 if true_cfg > 1 else 1, variant)


FRAMEPACK = dict(
    transformer="HunyuanVideoFramepackTransformer3DModel",
    has_image_proj=True,
    image_proj_dim=8,
    has_clean_x_embedder=True,
)


def _framepack(name: str) -> Any:
    return _hunyuan(name, components=dict(image_encoder=_Vision(8), feature_extractor=_Pixels()), **FRAMEPACK)


def _hunyuan15(name: str, **components: Any) -> Any:
    return _pipe(
        name,
        transformer=_new(
            "HunyuanVideo15Transformer3DModel",
            in_channels=9,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=10,
            num_layers=3,
            num_refiner_layers=1,
            text_embed_dim=16,
            text_embed_2_dim=12,
            image_embed_dim=8,
            rope_axes_dim=(2, 4, 4),
            target_size=64,
        ),
        vae=_new(
            "AutoencoderKLHunyuanVideo15",
            latent_channels=4,
            block_out_channels=(32, 32, 32, 32, 32),
            layers_per_block=1,
        ),
        scheduler=_new("FlowMatchEulerDiscreteScheduler", shift=7.0),
        guider=_new("ClassifierFreeGuidance", guidance_scale=6.0),
        **NO_TEXTS,
        **components,
    )


def _hunyuan15_inputs(draw: Draw) -> dict[str, Any]:
    inputs = {}
    for prefix in ["", "negative_"]:
        inputs |= {
            f"{prefix}prompt_embeds": draw(1, 6, 16),
            f"{prefix}prompt_embeds_mask": torch.ones(1, 6),
            f"{prefix}prompt_embeds_2": draw(1, 3, 12),
            f"{prefix}prompt_embeds_mask_2": torch.ones(1, 3),
        }
    return inputs


HUNYUAN_CASES = [
    _hunyuan_case("HunyuanVideoPipeline", False, 1.0),
    _hunyuan_case("HunyuanVideoPipeline", False, 3.0, variant="true-cfg"),
    _hunyuan_case("HunyuanSkyreelsImageToVideoPipeline", True, 6.0, in_channels=8),
    _hunyuan_case(
        "HunyuanVideoImageToVideoPipeline",
        True,
        1.0,
        components=dict(image_processor=None),
        in_channels=9,
        image_condition_type="latent_concat",
    ),
    _hunyuan_case(
        "HunyuanVideoImageToVideoPipeline",
        True,
        3.0,
        variant="token-replace",
        components=dict(image_processor=None),
        image_condition_type="token_replace",
        guidance_embeds=False,
    ),
    # two sections of one window each, last first: the loop runs twice
    PipelineCase(
        "HunyuanVideoFramepackPipeline",
        partial(_framepack, "HunyuanVideoFramepackPipeline"),
        _call(partial(_hunyuan_inputs, image=True), **SIZE, num_frames=9, latent_window_size=2),
        2 * STEPS,
    ),
    # first section first, each with the ones before it as history
    PipelineCase(
        "HunyuanVideoFramepackPipeline",
        partial(_framepack, "HunyuanVideoFramepackPipeline"),
        _call(
            partial(_hunyuan_inputs, negative=True, image=True),
            **SIZE,
            num_frames=9,
            latent_window_size=2,
            true_cfg_scale=3.0,
            sampling_type="vanilla",
        ),
        2 * STEPS,
        2,
        "vanilla",
    ),
    PipelineCase(
        "HunyuanVideo15Pipeline",
        partial(_hunyuan15, "HunyuanVideo15Pipeline"),
        _call(_hunyuan15_inputs, height=64, width=64, num_frames=5),
        STEPS,
        2,
    ),
    PipelineCase(
        "HunyuanVideo15ImageToVideoPipeline",
        lambda: _hunyuan15("HunyuanVideo15ImageToVideoPipeline", image_encoder=_Vision(8), feature_extractor=_Pixels()),
        _call(lambda d: _hunyuan15_inputs(d) | dict(image=_image(d, 64)), num_frames=5),
        STEPS,
        2,
    ),
]

# LTX


def _t5(width: int = 16) -> Any:
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    config = T5Config(vocab_size=32, d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return T5EncoderModel(config).eval().requires_grad_(False)


class _Tokenizer:
    """One token per character, 64 at most."""

    model_max_length = 64
    padding_side = "right"

    def __call__(self, text: Any, max_length: int = 64, padding: Any = True, **_: Any) -> Any:
        from transformers import BatchEncoding

        texts = [text] if isinstance(text, str) else text
        rows = [[ord(letter) % 31 + 1 for letter in row][: min(64, max_length)] for row in texts]
        length = min(64, max_length) if padding == "max_length" else max(len(row) for row in rows)
        ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
        return BatchEncoding({"input_ids": ids, "attention_mask": (ids > 0).long()})


def _ltx(name: str, scheduler: Any = None, text: bool = False) -> Any:
    dynamic = dict(use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, shift_terminal=0.1)
    return _pipe(
        name,
        transformer=_new(
            "LTXVideoTransformer3DModel",
            in_channels=8,
            out_channels=8,
            num_attention_heads=2,
            attention_head_dim=8,
            cross_attention_dim=16,
            num_layers=3,
            caption_channels=16,
        ),
        vae=_new(
            "AutoencoderKLLTXVideo",
            latent_channels=8,
            block_out_channels=(8, 8, 8, 8),
            decoder_block_out_channels=(8, 8, 8, 8),
            layers_per_block=(1, 1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1, 1),
            patch_size=1,
        ),
        scheduler=scheduler() if scheduler else _new("FlowMatchEulerDiscreteScheduler", **dynamic),
        **(dict(text_encoder=_t5(), tokenizer=_Tokenizer()) if text else NO_TEXT),
    )


def _ltx_case(
    name: str,
    options: Any = None,
    iterations: int = STEPS,
    variant: str = "",
    inputs: Any = _masked_embeds,
    **build: Any,
) -> PipelineCase:
    call = _call(inputs, height=32, width=32, **(dict(num_frames=9) | (options or {})))
    return PipelineCase(name, partial(_ltx, name, **build), call, iterations, 1, variant)


def _ltx_condition() -> Any:
    return _new("FlowMatchEulerDiscreteScheduler")


LTX_CASES = [
    _ltx_case("LTXPipeline"),
    _ltx_case("LTXImageToVideoPipeline", inputs=lambda d: _masked_embeds(d) | dict(image=_image(d))),
    _ltx_case(
        "LTXConditionPipeline", inputs=lambda d: _masked_embeds(d) | dict(image=_image(d)), scheduler=_ltx_condition
    ),
    # the last half of six steps, from a noised video
    _ltx_case(
        "LTXConditionPipeline",
        dict(denoise_strength=0.5, num_inference_steps=6),
        iterations=3,
        variant="strength",
        inputs=lambda d: _masked_embeds(d) | dict(latents=d(1, 8, 2, 4, 4)),
        scheduler=_ltx_condition,
    ),
    # windows of three latent frames that share one; each leaves out its last timestep
    _ltx_case(
        "LTXI2VLongMultiPromptPipeline",
        dict(num_frames=33, temporal_tile_size=24, temporal_overlap=8, guidance_scale=3.0),
        iterations=2 * (STEPS - 1),
        inputs=lambda d: dict(prompt="a | b", negative_prompt="c", cond_image=_image(d)),
        scheduler=lambda: _new("LTXEulerAncestralRFScheduler"),
        text=True,
    ),
]

# CogVideoX

COGVIDEO = dict(
    num_attention_heads=2,
    attention_head_dim=16,
    out_channels=4,
    time_embed_dim=8,
    text_embed_dim=16,
    num_layers=3,
    sample_width=4,
    sample_height=4,
    sample_frames=5,
    max_text_seq_length=6,
    use_rotary_positional_embeddings=True,
)


def _cogvideo(
    name: str,
    scheduler: str = "CogVideoXDDIMScheduler",
    model: str = "CogVideoXTransformer3DModel",
    module: str = "diffusers",
    **config: Any,
) -> Any:
    return _pipe(
        name,
        module,
        transformer=_new(model, **(COGVIDEO | dict(in_channels=4) | config)),
        vae=_new(
            "AutoencoderKLCogVideoX",
            block_out_channels=(4, 4, 4, 4),
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=2,
        ),
        scheduler=_new(
            scheduler,
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            snr_shift_scale=1.0,
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            set_alpha_to_one=True,
            timestep_spacing="trailing",
        ),
        **NO_TEXT,
    )


def _cogvideo_case(
    name: str, inputs: Any, iterations: int = STEPS, variant: str = "", options: Any = None, **build: Any
) -> PipelineCase:
    call = _call(inputs, **(FRAMES if options is None else options))
    return PipelineCase(name, partial(_cogvideo, name, **build), call, iterations, 1, variant)


def _face(draw: Draw) -> dict[str, Any]:
    return _wan_image(draw) | dict(id_cond=draw(1, 8), id_vit_hidden=[draw(1, 3, 8) for _ in range(5)])


COGVIDEO_CASES = [
    _cogvideo_case("CogVideoXPipeline", _embeds, use_rotary_positional_embeddings=False),
    # 5B: this scheduler's step takes and returns the previous prediction
    _cogvideo_case("CogVideoXPipeline", _embeds, variant="dpm", scheduler="CogVideoXDPMScheduler"),
    _cogvideo_case(
        "CogVideoXPipeline",
        _embeds,
        variant="v1.5",
        scheduler="CogVideoXDPMScheduler",
        patch_size_t=2,
        patch_bias=False,
    ),
    _cogvideo_case("CogVideoXImageToVideoPipeline", _wan_image, in_channels=8),
    _cogvideo_case("CogVideoXVideoToVideoPipeline", _wan_video, 3, options=SIZE | dict(strength=0.75)),
    _cogvideo_case(
        "CogVideoXFunControlPipeline", lambda d: _embeds(d) | dict(control_video=_video(d)), options=SIZE, in_channels=8
    ),
    # exported only where OpenCV is installed, which key points alone need; faces are mixed in after every second block
    _cogvideo_case(
        "ConsisIDPipeline",
        _face,
        module="diffusers.pipelines.consisid.pipeline_consisid",
        model="ConsisIDTransformer3DModel",
        scheduler="CogVideoXDPMScheduler",
        in_channels=8,
        num_attention_heads=3,
        num_layers=4,
        is_train_face=True,
        cross_attn_dim_head=8,
        cross_attn_num_heads=2,
        LFE_id_dim=8,
        LFE_vit_dim=8,
        LFE_depth=5,
        LFE_dim_head=4,
        LFE_num_heads=2,
        LFE_num_id_token=2,
        LFE_num_querie=4,
        LFE_output_dim=32,
    ),
]


# other text-to-video models


def _mochi() -> Any:
    return _pipe(
        "MochiPipeline",
        transformer=_new(
            "MochiTransformer3DModel",
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=3,
            pooled_projection_dim=8,
            in_channels=12,
            text_embed_dim=16,
            time_embed_dim=4,
            max_sequence_length=6,
        ),
        vae=None,
        scheduler=_new("FlowMatchEulerDiscreteScheduler", invert_sigmas=True),
        **NO_TEXT,
    )


def _allegro() -> Any:
    return _pipe(
        "AllegroPipeline",
        transformer=_new(
            "AllegroTransformer3DModel",
            num_attention_heads=2,
            attention_head_dim=12,
            num_layers=3,
            cross_attention_dim=24,
            sample_height=4,
            sample_width=4,
            sample_frames=2,
            caption_channels=16,
        ),
        vae=_new(
            "AutoencoderKLAllegro",
            block_out_channels=(4, 4, 4, 4),
            layers_per_block=1,
            norm_num_groups=2,
            sample_size=32,
        ),
        scheduler=_new("EulerAncestralDiscreteScheduler", beta_schedule="scaled_linear"),
        **NO_TEXT,
    )


def _latte() -> Any:
    return _pipe(
        "LattePipeline",
        transformer=_new(
            "LatteTransformer3DModel",
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            cross_attention_dim=16,
            attention_bias=True,
            sample_size=4,
            patch_size=2,
            activation_fn="gelu-approximate",
            num_embeds_ada_norm=1000,
            norm_type="ada_norm_single",
            norm_elementwise_affine=False,
            caption_channels=16,
            video_length=2,
        ),
        vae=_new(
            "AutoencoderKL",
            block_out_channels=(4, 4, 4, 4),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            norm_num_groups=2,
        ),
        scheduler=_new("DDIMScheduler", beta_schedule="linear", clip_sample=False),
        **NO_TEXT,
    )


def _easyanimate(name: str, channels: int) -> Any:
    return _pipe(
        name,
        transformer=_new(
            "EasyAnimateTransformer3DModel",
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=channels,
            out_channels=4,
            patch_size=2,
            sample_width=4,
            sample_height=4,
            num_layers=3,
            mmdit_layers=2,
            time_embed_dim=8,
            add_norm_text_encoder=True,
            text_embed_dim=16,
            resize_inpaint_mask_directly=False,
        ),
        vae=_new(
            "AutoencoderKLMagvit",
            latent_channels=4,
            block_out_channels=[4, 4, 4, 4],
            layers_per_block=1,
            norm_num_groups=2,
        ),
        scheduler=_new("FlowMatchEulerDiscreteScheduler", shift=3.0),
        **NO_TEXT,
    )


def _pixels(draw: Draw, channels: int = 3, frames: int = 5) -> Tensor:
    return draw(1, channels, frames, 32, 32).sigmoid()


def _sana(name: str, scheduler: str, **options: Any) -> Any:
    return _pipe(
        name,
        transformer=_new(
            "SanaVideoTransformer3DModel",
            num_attention_heads=2,
            attention_head_dim=12,
            num_layers=3,
            num_cross_attention_heads=2,
            cross_attention_head_dim=12,
            cross_attention_dim=24,
            caption_channels=16,
            sample_size=4,
        ),
        vae=_wan_vae(),
        scheduler=_new(scheduler, **options),
        **NO_TEXT,
    )


HELIOS = dict(
    num_attention_heads=2, attention_head_dim=12, text_dim=16, freq_dim=32, ffn_dim=32, num_layers=3, rope_dim=(4, 4, 4)
)
PYRAMID = dict(gamma=0.3)  # the default, 1/3, makes a singular covariance that fails to factorise on the CPU
HISTORY = dict(history_sizes=[4, 2, 1], num_latent_frames_per_chunk=2)


def _pyramid(**options: Any) -> Callable[[], dict[str, Any]]:
    """A call of the pyramid: two steps at each of three resolutions."""
    sizes = dict(height=128, width=128, num_frames=5, pyramid_num_inference_steps_list=[2, 2, 2])
    return _call(_embeds, **sizes, **HISTORY, **options, num_inference_steps=None)


def _helios(name: str, scheduler: Any, **config: Any) -> Any:
    transformer = _new("HeliosTransformer3DModel", **HELIOS)
    return _pipe(name, transformer=transformer, vae=_wan_vae(), scheduler=scheduler(), **NO_TEXT, **config)


ANYFLOW = dict(num_attention_heads=2, attention_head_dim=12, text_dim=16, freq_dim=32, ffn_dim=32, num_layers=3)


def _anyflow(name: str, transformer: str, **config: Any) -> Any:
    return _pipe(
        name,
        transformer=_new(transformer, **ANYFLOW, **config),
        vae=_wan_vae(),
        scheduler=_new("FlowMapEulerDiscreteScheduler", shift=5.0),
        **NO_TEXT,
    )


def _anyflow_far(chunks: tuple[int, ...]) -> Any:
    sizes = dict(chunk_partition=chunks, full_chunk_limit=len(chunks), compressed_patch_size=(1, 4, 4))
    return _anyflow("AnyFlowFARPipeline", "AnyFlowFARTransformer3DModel", **sizes)


def _motif(name: str, **components: Any) -> Any:
    return _pipe(
        name,
        transformer=_new(
            "MotifVideoTransformer3DModel",
            in_channels=33,
            out_channels=16,
            num_attention_heads=2,
            attention_head_dim=12,
            num_layers=2,
            num_single_layers=3,
            num_decoder_layers=1,
            text_embed_dim=16,
            rope_axes_dim=(4, 4, 4),
        ),
        vae=_wan_vae(),
        scheduler=_new("FlowMatchEulerDiscreteScheduler", use_dynamic_shifting=True),
        guider=_new("ClassifierFreeGuidance", guidance_scale=5.0),
        **NO_TEXT,
        **components,
    )


def _kandinsky(name: str) -> Any:
    return _pipe(
        name,
        transformer=_new(
            "Kandinsky5Transformer3DModel",
            in_visual_dim=4,
            in_text_dim=16,
            in_text_dim2=8,
            time_dim=16,
            out_visual_dim=4,
            model_dim=24,
            ff_dim=32,
            num_text_blocks=1,
            num_visual_blocks=3,
            axes_dims=(4, 4, 4),
            visual_cond=True,
        ),
        vae=_new(
            "AutoencoderKLHunyuanVideo",
            latent_channels=4,
            block_out_channels=(4, 4, 4, 4),
            layers_per_block=1,
            norm_num_groups=2,
        ),
        scheduler=_new("FlowMatchEulerDiscreteScheduler", shift=5.0),
        **NO_TEXTS,
    )


def _kandinsky_inputs(draw: Draw) -> dict[str, Any]:
    inputs: dict[str, Any] = {}
    for prefix in ("", "negative_"):
        inputs |= {
            f"{prefix}prompt_embeds_qwen": draw(1, 6, 16),
            f"{prefix}prompt_embeds_clip": draw(1, 8),
            f"{prefix}prompt_cu_seqlens": torch.tensor([0, 6], dtype=torch.int32),
        }
    return inputs


OTHER_CASES = [
    # its timesteps increase
    PipelineCase("MochiPipeline", _mochi, _call(_masked_embeds, **SIZE, num_frames=7), STEPS),
    PipelineCase("AllegroPipeline", _allegro, _call(_masked_embeds, **SIZE, num_frames=8, negative_prompt=None), STEPS),
    PipelineCase("LattePipeline", _latte, _call(_embeds, **SIZE, video_length=2, negative_prompt=None), STEPS),
    PipelineCase(
        "EasyAnimatePipeline", partial(_easyanimate, "EasyAnimatePipeline", 4), _call(_masked_embeds, **FRAMES), STEPS
    ),
    PipelineCase(
        "EasyAnimateInpaintPipeline",
        partial(_easyanimate, "EasyAnimateInpaintPipeline", 12),
        _call(
            lambda d: _masked_embeds(d) | dict(video=_pixels(d), mask_video=(_pixels(d, 1) > 0.5).float()),
            **FRAMES,
            # below 1 it encodes the video with global random numbers, not the generator
            strength=1.0,
        ),
        STEPS,
    ),
    PipelineCase(
        "SanaVideoPipeline",
        partial(
            _sana,
            "SanaVideoPipeline",
            "DPMSolverMultistepScheduler",
            use_flow_sigmas=True,
            prediction_type="flow_prediction",
            flow_shift=8.0,
        ),
        _call(_masked_embeds, **SIZE, frames=5, negative_prompt=None, use_resolution_binning=False),
        STEPS,
    ),
    PipelineCase(
        "SanaImageToVideoPipeline",
        partial(_sana, "SanaImageToVideoPipeline", "FlowMatchEulerDiscreteScheduler", shift=8.0),
        _call(
            lambda d: _masked_embeds(d) | dict(image=_image(d)),
            **SIZE,
            frames=5,
            negative_prompt=None,
            use_resolution_binning=False,
        ),
        STEPS,
    ),
    # nine frames in two chunks of two latent frames, the second with the first as history
    PipelineCase(
        "HeliosPipeline",
        partial(_helios, "HeliosPipeline", lambda: _new("HeliosScheduler", stages=1, stage_range=[0, 1])),
        _call(_embeds, height=64, width=64, num_frames=9, **HISTORY),
        2 * STEPS,
        2,
    ),
    # three resolutions of two steps each
    PipelineCase(
        "HeliosPyramidPipeline",
        partial(_helios, "HeliosPyramidPipeline", lambda: _new("HeliosScheduler", **PYRAMID)),
        _pyramid(),
        6,
        2,
    ),
    PipelineCase(
        "HeliosPyramidPipeline",
        partial(_helios, "HeliosPyramidPipeline", lambda: _new("HeliosDMDScheduler", **PYRAMID), is_distilled=True),
        _pyramid(guidance_scale=1.0),
        6,
        variant="distilled",
    ),
    PipelineCase(
        "AnyFlowPipeline",
        partial(_anyflow, "AnyFlowPipeline", "AnyFlowTransformer3DModel"),
        _call(_embeds, **FRAMES, guidance_scale=3.0),
        STEPS,
    ),
    PipelineCase(
        "AnyFlowFARPipeline", partial(_anyflow_far, (2,)), _call(_embeds, **FRAMES, guidance_scale=3.0), STEPS
    ),
    # two chunks, of four loop iterations each, and between them one call that only fills the key-value cache
    PipelineCase(
        "AnyFlowFARPipeline",
        partial(_anyflow_far, (1, 1)),
        _call(_embeds, **FRAMES, guidance_scale=3.0),
        2 * STEPS + 1,
        variant="two-chunks",
    ),
    PipelineCase(
        "MotifVideoPipeline", partial(_motif, "MotifVideoPipeline"), _call(_masked_embeds, **FRAMES), STEPS, 2
    ),
    PipelineCase(
        "Kandinsky5T2VPipeline",
        partial(_kandinsky, "Kandinsky5T2VPipeline"),
        _call(_kandinsky_inputs, **FRAMES),
        STEPS,
        2,
    ),
    PipelineCase(
        "Kandinsky5I2VPipeline",
        partial(_kandinsky, "Kandinsky5I2VPipeline"),
        # the first four latent frames are normalised by those after them
        _call(lambda d: _kandinsky_inputs(d) | dict(image=_image(d)), **SIZE, num_frames=21),
        STEPS,
        2,
    ),
]

# Cosmos


class _Guardrail(_StandIn):
    """Stand-in for the safety checker, which needs another package: everything passes."""

    def check_text_safety(self, prompt: str) -> bool:
        return True

    def check_video_safety(self, frames: Any) -> Any:
        return frames


COSMOS = dict(
    num_attention_heads=2,
    attention_head_dim=12,
    num_layers=3,
    mlp_ratio=2.0,
    text_embed_dim=16,
    adaln_lora_dim=4,
    max_size=(4, 16, 16),
    concat_padding_mask=False,  # its resizing needs torchvision
)


def _cosmos_vae() -> Any:
    return _new(
        "AutoencoderKLCosmos",
        encoder_block_out_channels=(4, 4, 4, 4),
        decode_block_out_channels=(4, 4, 4, 4),
        attention_resolutions=(8,),
        resolution=32,
        num_layers=1,
    )


def _cosmos(name: str, scheduler: Any, vae: Any = _wan_vae, controlnet: Any = None, **config: Any) -> Any:
    return _pipe(
        name,
        transformer=_new("CosmosTransformer3DModel", **(COSMOS | config)),
        vae=vae(),
        scheduler=scheduler(),
        safety_checker=_Guardrail(),
        **NO_TEXT,
        **(controlnet() if controlnet else {}),
    )


def _edm() -> Any:
    return _new("EDMEulerScheduler", sigma_max=80.0, sigma_data=0.5, final_sigmas_type="sigma_min")


def _karras() -> Any:
    return _new("FlowMatchEulerDiscreteScheduler", use_karras_sigmas=True)


def _cosmos_case(name: str, inputs: Any, options: Any = None, variant: str = "", **build: Any) -> PipelineCase:
    call = _call(inputs, **(FRAMES if options is None else options))
    return PipelineCase(name, partial(_cosmos, name, **build), call, STEPS, 2, variant)


class _Control(_StandIn):
    """Stand-in for the control net, which needs torchvision: one residual for every second block."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace()

    def forward(self, controls_latents: Tensor, **_: Any) -> tuple[list[Tensor]]:
        tokens = controls_latents[:, :1, :, ::2, ::2].flatten(1).unsqueeze(-1).expand(-1, -1, 24)
        return ([0.1 * tokens, 0.2 * tokens],)


class _ChatTokenizer:
    eos_token_id = 1

    def convert_tokens_to_ids(self, token: str) -> int:
        return 2

    def apply_chat_template(self, conversations: list[dict[str, str]], **_: Any) -> Any:
        from transformers import BatchEncoding

        text = conversations[-1]["content"][:12]
        return BatchEncoding({"input_ids": [ord(letter) % 29 + 3 for letter in text]})


def _cosmos3() -> Any:
    return _pipe(
        "Cosmos3OmniPipeline",
        transformer=_new(
            "Cosmos3OmniTransformer",
            head_dim=16,
            hidden_size=32,
            intermediate_size=32,
            latent_channel=16,
            num_attention_heads=2,
            num_hidden_layers=3,
            num_key_value_heads=1,
            patch_latent_dim=64,
            vocab_size=32,
            rope_axes_dim=[4, 2, 2],
        ),
        text_tokenizer=_ChatTokenizer(),
        vae=_wan_vae(),
        scheduler=_unipc(),
        enable_safety_checker=False,
    )


# the first two call step twice an iteration: for the prediction of the clean video, then with the index taken back
COSMOS_CASES = [
    _cosmos_case("CosmosTextToWorldPipeline", _embeds, SIZE | dict(num_frames=9), scheduler=_edm, vae=_cosmos_vae),
    _cosmos_case(
        "CosmosVideoToWorldPipeline",
        _wan_image,
        SIZE | dict(num_frames=9),
        scheduler=_edm,
        vae=_cosmos_vae,
        in_channels=17,
    ),
    _cosmos_case("Cosmos2TextToImagePipeline", _embeds, SIZE, scheduler=_karras, extra_pos_embed_type=None),
    _cosmos_case(
        "Cosmos2VideoToWorldPipeline", _wan_image, scheduler=_karras, in_channels=17, extra_pos_embed_type=None
    ),
    _cosmos_case(
        "Cosmos2_5_PredictBasePipeline",
        _wan_video,
        FRAMES | dict(num_latent_conditional_frames=1),
        scheduler=_unipc,
        in_channels=17,
        extra_pos_embed_type=None,
    ),
    _cosmos_case(
        "Cosmos2_5_TransferPipeline",
        lambda d: _embeds(d) | dict(controls=_video(d), negative_prompt=None),
        FRAMES | dict(num_frames_per_chunk=5),
        scheduler=_unipc,
        controlnet=lambda: dict(controlnet=_Control()),
        controlnet_block_every_n=2,
        in_channels=17,
        extra_pos_embed_type=None,
    ),
    PipelineCase(
        "Cosmos3OmniPipeline",
        _cosmos3,
        _call(
            lambda d: dict(prompt="red fox", negative_prompt="grey", video=_video(d)),
            **FRAMES,
            condition_frame_indexes_vision=(0,),
        ),
        STEPS,
        2,
    ),
]

# LTX2


def _ltx2(name: str, eta: float | None = None, **components: Any) -> Any:
    dynamic = dict(use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, shift_terminal=0.1)
    return _pipe(
        name,
        transformer=_new(
            "LTX2VideoTransformer3DModel",
            in_channels=8,
            out_channels=8,
            num_attention_heads=2,
            attention_head_dim=8,
            cross_attention_dim=16,
            audio_in_channels=8,
            audio_out_channels=8,
            audio_num_attention_heads=2,
            audio_attention_head_dim=4,
            audio_cross_attention_dim=8,
            num_layers=3,
            caption_channels=16,
            rope_double_precision=False,
            use_keyframes_abs_pos_embedding=eta is not None,
        ),
        vae=_ltx2_vae(),
        audio_vae=_new("AutoencoderKLLTX2Audio", base_channels=8, num_res_blocks=1, latent_channels=2, mel_bins=16),
        connectors=_ltx2_connectors(),
        scheduler=_new("FlowMatchEulerDiscreteScheduler", **dynamic)
        if eta is None
        else _new("LTXEulerAncestralRFScheduler", eta=eta),
        vocoder=None,
        **NO_TEXT,
        **components,
    )


def _ltx2_vae() -> Any:
    return _new(
        "AutoencoderKLLTX2Video",
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1),
        patch_size=1,
        spatial_compression_ratio=8,
        temporal_compression_ratio=8,
    )


def _ltx2_connectors() -> Any:
    from diffusers.pipelines.ltx2 import LTX2TextConnectors

    torch.manual_seed(0)
    sizes = {
        f"{kind}_connector_{size}": value
        for kind in ("video", "audio")
        for size, value in dict(
            num_attention_heads=2, attention_head_dim=8, num_layers=1, num_learnable_registers=2
        ).items()
    }
    connectors = LTX2TextConnectors(caption_channels=16, text_proj_in_factor=1, rope_double_precision=False, **sizes)
    return connectors.eval().requires_grad_(False)


def _ltx2_case(
    name: str, inputs: Any = _masked_embeds, calls: int = 3, variant: str = "", **options: Any
) -> PipelineCase:
    options = SIZE | dict(num_frames=9, spatio_temporal_guidance_blocks=[1]) | options
    return PipelineCase(name, partial(_ltx2, name), _call(inputs, **options), STEPS, calls, variant)


def _ltx2_condition(draw: Draw) -> dict[str, Any]:
    from diffusers.pipelines.ltx2.pipeline_ltx2_condition import LTX2VideoCondition

    return _masked_embeds(draw) | dict(conditions=[LTX2VideoCondition(frames=_image(draw), crf=0)])


def _ltx2_reference(draw: Draw) -> dict[str, Any]:
    from diffusers.pipelines.ltx2.pipeline_ltx2_ic_lora import LTX2ReferenceCondition

    return _masked_embeds(draw) | dict(reference_conditions=[LTX2ReferenceCondition(frames=_video(draw, 9))])


def _ltx2_distilled(draw: Draw) -> dict[str, Any]:
    return dict(prompt_embeds=draw(1, 6, 16), prompt_attention_mask=torch.ones(1, 6).long())


def _ltx2_round(draw: Draw) -> dict[str, Any]:
    latents = dict(latents=draw(1, 8, 7, 4, 4), keyframes_latents=draw(1, 8, 2, 4, 4), keyframe_positions=[24, 48])
    return _ltx2_distilled(draw) | latents | dict(audio_latents=draw(1, 2, 51, 4))


def _ltx2_refine(name: str) -> Any:
    from diffusers.pipelines.ltx2.latent_upsampler import LTX2LatentUpsamplerModel

    torch.manual_seed(0)
    upsampler = LTX2LatentUpsamplerModel(
        in_channels=8, mid_channels=32, num_blocks_per_stage=1, spatial_upsample=False, temporal_upsample=True
    )
    return _ltx2(name, eta=1.0, temporal_latent_upsampler=upsampler.eval().requires_grad_(False))


SIGMAS = [1.0, 0.9, 0.7, 0.4]


def _ltx2_hdr(draw: Draw) -> dict[str, Any]:
    from diffusers.pipelines.ltx2.pipeline_ltx2_hdr_lora import LTX2HDRReferenceCondition

    return _masked_embeds(draw) | dict(reference_conditions=[LTX2HDRReferenceCondition(frames=_video(draw, 9))])


# Three calls an iteration: both rows of classifier-free guidance, then one row with the attention of some blocks
# left out, then one row with sound and picture apart. Video and audio have a scheduler each (the audio's is a copy).
LTX2_CASES = [
    _ltx2_case("LTX2Pipeline"),
    _ltx2_case(
        "LTX2Pipeline",
        calls=1,
        variant="cfg",
        stg_scale=0.0,
        audio_stg_scale=0.0,
        modality_scale=1.0,
        audio_modality_scale=1.0,
    ),
    _ltx2_case("LTX2ImageToVideoPipeline", lambda d: _masked_embeds(d) | dict(image=_image(d)), image_crf=0),
    _ltx2_case("LTX2ConditionPipeline", _ltx2_condition),
    _ltx2_case("LTX2InContextPipeline", _ltx2_reference),
    _ltx2_case("LTX2HDRPipeline", _ltx2_hdr, calls=1, spatio_temporal_guidance_blocks=None),
    # sound is kept: its ancestral steps take the global random numbers, not the generator
    PipelineCase(
        "LTX2DFRPipeline",
        partial(_ltx2, "LTX2DFRPipeline", eta=1.0),
        _call(
            lambda d: _ltx2_distilled(d) | dict(audio_latents=d(1, 2, 26, 4)),
            **SIZE,
            num_frames=25,
            sigmas=SIGMAS,
            freeze_audio=True,
            num_inference_steps=None,
        ),
        STEPS,
    ),
    PipelineCase(
        "LTX2DFRPipeline",
        partial(_ltx2, "LTX2DFRPipeline", eta=0.0),
        _call(_ltx2_distilled, **SIZE, num_frames=25, sigmas=SIGMAS, num_inference_steps=None),
        STEPS,
        variant="sound",
    ),
    # two temporal tiles: the loop runs twice
    PipelineCase(
        "LTX2DFRTemporalRefinePipeline",
        partial(_ltx2_refine, "LTX2DFRTemporalRefinePipeline"),
        _call(_ltx2_round, **SIZE, num_frames=49, sigmas=SIGMAS, num_inference_steps=None),
        2 * STEPS,
    ),
]

# audio


def _oobleck() -> Any:
    return _new(
        "AutoencoderOobleck",
        encoder_hidden_size=4,
        downsampling_ratios=[2, 2],
        channel_multiples=[1, 1],
        decoder_channels=4,
        decoder_input_channels=8,
        sampling_rate=16,
    )


def _stable_audio() -> Any:
    return _pipe(
        "StableAudioPipeline",
        transformer=_new(
            "StableAudioDiTModel",
            sample_size=16,
            in_channels=8,
            num_layers=3,
            attention_head_dim=8,
            num_attention_heads=2,
            num_key_value_attention_heads=1,
            out_channels=8,
            cross_attention_dim=16,
            time_proj_dim=16,
            global_states_input_dim=32,
            cross_attention_input_dim=16,
        ),
        projection_model=_new(
            "StableAudioProjectionModel", text_encoder_dim=16, conditioning_dim=16, min_value=0, max_value=32
        ),
        vae=_oobleck(),
        # the family's own CosineDPMSolverMultistepScheduler draws its noise with torchsde
        scheduler=_new(
            "EDMDPMSolverMultistepScheduler", sigma_min=0.3, sigma_max=500.0, sigma_data=1.0, prediction_type="epsilon"
        ),
        **NO_TEXT,
    )


def _stable_audio_3(name: str) -> Any:
    return _pipe(
        name,
        transformer=_new(
            "StableAudio3DiTModel",
            io_channels=8,
            embed_dim=32,
            depth=3,
            num_heads=2,
            cond_token_dim=16,
            global_cond_dim=16,
            local_add_cond_dim=9,
            timestep_features_dim=16,
            num_memory_tokens=2,
        ),
        vae=_new(
            "AutoencoderSAME",
            patch_size=4,
            encoder_channels=16,
            encoder_c_mults=(1,),
            encoder_strides=(2,),
            encoder_transformer_depths=(1,),
            latent_dim=8,
            dim_heads=8,
            sampling_rate=32,
        ),
        duration_embedder=_new("StableAudio3DurationEmbedder", output_dim=16, fourier_dim=16),
        scheduler=_new("FlowMatchEulerDiscreteScheduler", stochastic_sampling=True),
        **NO_TEXT,
    )


def _prompt_3(draw: Draw, negative: bool = False, audio: bool = False) -> dict[str, Any]:
    inputs: dict[str, Any] = dict(prompt_embeds=draw(1, 6, 16), encoder_attention_mask=torch.ones(1, 6).long())
    if negative:
        inputs |= dict(negative_prompt_embeds=draw(1, 6, 16), negative_encoder_attention_mask=torch.ones(1, 6).long())
    return inputs | (dict(audio=draw(1, 2, 128)) if audio else {})


def _longcat_audio() -> Any:
    return _pipe(
        "LongCatAudioDiTPipeline",
        transformer=_new(
            "LongCatAudioDiTTransformer", dit_dim=32, dit_depth=4, dit_heads=2, dit_text_dim=16, latent_dim=8
        ),
        vae=_new(
            "LongCatAudioDiTVae",
            channels=8,
            c_mults=[1, 2],
            strides=[2, 2],
            latent_dim=8,
            encoder_latent_dim=16,
            downsampling_ratio=4,
            sample_rate=16,
        ),
        text_encoder=_t5(),
        tokenizer=_Tokenizer(),
    )


def _ace_step() -> Any:
    sizes = dict(hidden_size=16, intermediate_size=32, num_attention_heads=2, num_key_value_heads=1, head_dim=8)
    return _pipe(
        "AceStepPipeline",
        transformer=_new(
            "AceStepTransformer1DModel",
            num_hidden_layers=3,
            in_channels=24,
            audio_acoustic_hidden_dim=8,
            encoder_hidden_size=16,
            **sizes,
        ),
        condition_encoder=_new(
            "AceStepConditionEncoder",
            text_hidden_dim=16,
            timbre_hidden_dim=8,
            num_lyric_encoder_hidden_layers=1,
            num_timbre_encoder_hidden_layers=1,
            **sizes,
        ),
        vae=_oobleck(),
        scheduler=_new("FlowMatchEulerDiscreteScheduler", num_train_timesteps=1, shift=1.0),
        text_encoder=_t5(),
        tokenizer=_Tokenizer(),
    )


AUDIO_CASES = [
    PipelineCase("StableAudioPipeline", _stable_audio, _call(_embeds, audio_end_in_s=4.0), STEPS),
    PipelineCase(
        "StableAudio3Pipeline",
        partial(_stable_audio_3, "StableAudio3Pipeline"),
        _call(partial(_prompt_3, negative=True), duration=4.0, guidance_scale=3.0),
        STEPS,
    ),
    # its timesteps are 700, 909, 705 and 362: the first alone follows the noise level
    PipelineCase(
        "StableAudio3AudioToAudioPipeline",
        partial(_stable_audio_3, "StableAudio3AudioToAudioPipeline"),
        _call(partial(_prompt_3, audio=True), duration=4.0, init_noise_level=0.7),
        STEPS,
    ),
    PipelineCase(
        "StableAudio3InpaintPipeline",
        partial(_stable_audio_3, "StableAudio3InpaintPipeline"),
        _call(partial(_prompt_3, audio=True), duration=4.0, mask_start_seconds=1.0, mask_end_seconds=2.0),
        STEPS,
    ),
    # its timesteps increase
    PipelineCase(
        "LongCatAudioDiTPipeline",
        _longcat_audio,
        _call(lambda d: dict(prompt="rain", negative_prompt="wind"), audio_duration_s=4.0),
        STEPS,
        2,
    ),
    # its timesteps are sigmas in [0, 1]
    PipelineCase(
        "AceStepPipeline", _ace_step, _call(lambda d: dict(prompt="rain", lyrics="la"), audio_duration=4.0), STEPS
    ),
    # guidance only in the middle of the schedule: two rows in some iterations, one in the others
    PipelineCase(
        "AceStepPipeline",
        _ace_step,
        _call(
            lambda d: dict(prompt="rain", lyrics="la"),
            audio_duration=4.0,
            shift=1.0,
            cfg_interval_start=0.2,
            cfg_interval_end=0.6,
        ),
        STEPS,
        variant="interval",
    ),
]

# others


class _BlockVae(_StandIn):
    """Stand-in VAE for pipelines that insist on large images: a latent is the mean of a block of pixels."""

    def __init__(self, block: int, channels: int = 16):
        super().__init__()
        self.config = SimpleNamespace(
            latents_mean=[0.0] * channels,
            latents_std=[1.0] * channels,
            scaling_factor=1.0,
            scale_factor_spatial=block,
            scale_factor_temporal=1,
        )
        self.block, self.channels = block, channels
        self.spatial_compression_ratio, self.temporal_compression_ratio = block, 1

    def encode(self, pixels: Tensor, return_dict: bool = True) -> Any:
        means = nn.functional.avg_pool3d(pixels, (1, self.block, self.block))
        means = means.mean(1, keepdim=True) * torch.linspace(-1, 1, self.channels).view(1, -1, 1, 1, 1)
        latent = SimpleNamespace(mode=lambda: means, sample=lambda: means)
        return SimpleNamespace(latent_dist=latent) if return_dict else (latent,)

    def decode(self, latents: Tensor, return_dict: bool = True) -> Any:
        pixels = latents[:, :3].repeat_interleave(self.block, -1).repeat_interleave(self.block, -2)
        return SimpleNamespace(sample=pixels) if return_dict else (pixels,)


def _kandinsky6() -> Any:
    audio = _StandIn()  # only its rates are asked for
    audio.config, audio.latent_hop_length = SimpleNamespace(sample_rate=160), 4
    return _pipe(
        "Kandinsky6TI2VAPipeline",
        transformer=_new(
            "Kandinsky6Transformer3DModel",
            in_visual_dim=4,
            out_visual_dim=4,
            in_text_dim=16,
            in_text_dim2=8,
            time_dim=16,
            model_dim=24,
            ff_dim=32,
            num_text_blocks=1,
            num_visual_blocks=3,
            axes_dims=(4, 4, 4),
            in_audio_dim=4,
            out_audio_dim=4,
            model_dim_a=24,
            time_dim_a=16,
            ff_dim_a=32,
        ),
        vae=None,
        audio_vae=audio,
        vocoder=audio,
        scheduler=_new("FlowMatchEulerDiscreteScheduler", shift=5.0),
        **NO_TEXTS,
    )


def _kandinsky6_sr() -> Any:
    return _pipe(
        "Kandinsky6SRPipeline",
        transformer=_new(
            "Kandinsky6SRTransformer3DModel",
            in_visual_dim=4,
            out_visual_dim=4,
            time_dim=16,
            model_dim=32,
            ff_dim=32,
            num_visual_blocks=3,
            axes_dims=(4, 6, 6),
            nabla_window=(3, 3, 3),
            tile_sizes=((64, 64),),
        ),
        vae=_BlockVae(8, 4),
        scheduler=_new("FlowMatchEulerDiscreteScheduler"),
    )


def _sana_wm() -> Any:
    return _pipe(
        "SanaWMPipeline",
        transformer=_new(
            "SanaWMTransformer3DModel",
            in_channels=8,
            num_layers=4,
            hidden_size=32,
            num_attention_heads=2,
            linear_head_dim=16,
            chunk_plucker_post_attn_blocks=4,
            caption_channels=16,
        ),
        vae=_ltx2_vae(),
        scheduler=_new("FlowMatchEulerDiscreteScheduler"),
        **NO_TEXT,
    )


def _camera(draw: Draw) -> dict[str, Any]:
    path = np.tile(np.eye(4, dtype=np.float32), (9, 1, 1))
    path[:, 2, 3] = np.linspace(0, 1, 9)
    return _masked_embeds(draw) | dict(image=_image(draw), prompt=None, c2w=path, intrinsics=[32.0, 32.0, 16.0, 16.0])


def _kandinsky6_inputs(draw: Draw) -> dict[str, Any]:
    pooled = dict(pooled_prompt_embeds=draw(1, 8), negative_pooled_prompt_embeds=draw(1, 8))
    return _embeds(draw) | pooled


MORE_CASES = [
    # picture and sound have a scheduler each, the second a copy of the first
    PipelineCase("Kandinsky6TI2VAPipeline", _kandinsky6, _call(_kandinsky6_inputs, **FRAMES), STEPS, 2),
    PipelineCase(
        "MotifVideoImage2VideoPipeline",
        partial(_motif, "MotifVideoImage2VideoPipeline", feature_extractor=None),
        _call(lambda d: _masked_embeds(d) | dict(image=_image(d), prompt=None), **FRAMES),
        STEPS,
        2,
    ),
    PipelineCase("SanaWMPipeline", _sana_wm, _call(_camera, **SIZE, num_frames=9), STEPS),
    # four tiles, one after another: the loop runs four times
    PipelineCase(
        "Kandinsky6SRPipeline",
        _kandinsky6_sr,
        _call(lambda d: dict(video=_video(d, 1, 48)), resolution_scale=2, output_type="np"),
        4 * STEPS,
    ),
]

CASES: list[PipelineCase] = [
    *WAN_CASES,
    *HUNYUAN_CASES,
    *LTX_CASES,
    *COGVIDEO_CASES,
    *OTHER_CASES,
    *COSMOS_CASES,
    *LTX2_CASES,
    *AUDIO_CASES,
    *MORE_CASES,
]

SKIPPED: dict[str, str] = {
    "EasyAnimateControlPipeline": "every call raises TypeError in diffusers 0.42.1: it passes text_encoder_index to an "
    "encode_prompt that does not take it",
    "LTXLatentUpsamplePipeline": "no denoiser and no scheduler: one pass of a latent upsampler",
    "LTX2LatentUpsamplePipeline": "no denoiser and no scheduler: one pass of a latent upsampler",
    "LTX2VideoDiffusionDecodePipeline": "no loop of its own: it denoises within diffusion_decoder.decode, without its "
    "scheduler",
}
