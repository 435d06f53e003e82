"""Tiny pipelines whose denoiser is a transformer over image latents."""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image
from pipeline_zoo import PipelineCase
from torch import Tensor, nn
from zoo import Case, Draw, build, randomise_zeros

STEPS = 4
SIZE = 64
HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
WIDTH = 32
EULER = "FlowMatchEulerDiscreteScheduler"


def _model(name: str, **config: Any) -> Any:
    return build(Case(name, config, dict))


def _pipe(name: str, **components: Any) -> Any:
    """The pipeline, with None for what it asks for and is not given: text encoders and tokenizers."""
    import diffusers

    pipeline = getattr(diffusers, name)
    asked = inspect.signature(pipeline.__init__).parameters.values()
    missing = {p.name: None for p in asked if p.default is p.empty and p.name not in {"self", *components}}
    built = pipeline(**missing, **components)
    built.set_progress_bar_config(disable=True)
    return built


def _scheduler(name: str = EULER, **config: Any) -> Any:
    import diffusers

    return getattr(diffusers, name)(**config)


def _arguments(name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What make gives, and of the usual arguments those that the pipeline takes."""
    import diffusers

    usual = {
        "num_inference_steps": STEPS,
        "height": SIZE,
        "width": SIZE,
        "generator": torch.Generator().manual_seed(0),
        "output_type": "latent",
        "use_resolution_binning": False,
    }
    takes = inspect.signature(getattr(diffusers, name).__call__).parameters
    return {key: value for key, value in usual.items() if key in takes} | make()


def _row(
    name: str,
    builder: Callable[..., Any],
    make: Callable[[], dict[str, Any]],
    calls: int = 1,
    iterations: int = STEPS,
    variant: str = "",
) -> PipelineCase:
    return PipelineCase(name, partial(builder, name), partial(_arguments, name, make), iterations, calls, variant)


def _image(size: int = SIZE, seed: int = 5) -> Tensor:
    return Draw(seed)(1, 3, size, size).sigmoid()


def _mask(size: int = SIZE) -> Tensor:
    """White, the part to paint, on the right half."""
    mask = torch.zeros(1, 1, size, size)
    mask[..., size // 2 :] = 1
    return mask


def _noise(names: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    draw = Draw(1)
    return {name: draw(*shape) for name, shape in names.items()}


def _ones(names: str, length: int) -> dict[str, Tensor]:
    return {name: torch.ones(1, length, dtype=torch.bool) for name in names.split()}


def _picture(size: int = SIZE, seed: int = 5) -> Image.Image:
    """For pipelines that ask a PIL image for its size."""
    return Image.fromarray((_image(size, seed)[0].permute(1, 2, 0).numpy() * 255).astype("uint8"))


def _most_likely(vae: Any) -> Any:
    """For pipelines that sample the posterior without the caller's generator: two calls would differ."""
    encode = vae.encode

    def encode_to_mode(*args: Any, **kwargs: Any) -> Any:
        output = encode(*args, **kwargs)
        output.latent_dist.sample = lambda generator=None: output.latent_dist.mode()
        return output

    vae.encode = encode_to_mode
    return vae


class Stub(nn.Module):
    """Stand-in text encoder, tokenizer or processor for a pipeline that asks one for more than an encoding."""

    device = torch.device("cpu")
    dtype = torch.float32
    image_processor = None

    def __init__(self, **config: Any):
        super().__init__()
        self.config = SimpleNamespace(**config)

    @property
    def tokenizer(self) -> "Stub":
        return self

    def apply_chat_template(self, *args: Any, **kwargs: Any) -> list[list[int]]:
        return [[0] * 5]

    def encode(self, text: str) -> list[int]:
        return [7]


class PoolVae(Stub):
    """Stand-in encoder for pipelines that scale every image to a megapixel: one latent for factor x factor pixels."""

    def __init__(self, factor: int, channels: int = 4):
        from diffusers.configuration_utils import FrozenDict

        super().__init__()
        levels = factor.bit_length() - 1
        self.config = FrozenDict(
            latent_channels=channels,
            z_dim=channels,
            latents_mean=[0.1] * channels,
            latents_std=[1.5] * channels,
            scaling_factor=0.7,
            shift_factor=0.1,
            scale_factor_spatial=factor,
            scale_factor_temporal=4,
            block_out_channels=(8,) * (levels + 1),
        )
        self.temperal_downsample = [True] * levels
        self.factor = factor
        self.register_buffer("mix", Draw(3)(channels, 3))

    def encode(self, images: Tensor, return_dict: bool = True) -> Any:
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
        from diffusers.models.modeling_outputs import AutoencoderKLOutput

        pooled = (
            images[:, :3]
            .to(self.dtype)
            .unflatten(-1, (-1, self.factor))
            .unflatten(-3, (-1, self.factor))
            .mean((-1, -3))
        )
        mean = torch.einsum("oc,bc...->bo...", self.mix, pooled)
        spread = torch.full_like(mean, -30.0)
        return AutoencoderKLOutput(DiagonalGaussianDistribution(torch.cat([mean, spread], 1), deterministic=True))

    def decode(self, latents: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        """Colours only, as small as the latents."""
        return (torch.einsum("oc,bo...->bc...", self.mix, latents),)


def _kl(channels: int = 4, **config: Any) -> Any:
    """A KL autoencoder, 8 times smaller latents."""
    return _model(
        "AutoencoderKL",
        **{
            "block_out_channels": (8,) * 4,
            "down_block_types": ("DownEncoderBlock2D",) * 4,
            "up_block_types": ("UpDecoderBlock2D",) * 4,
            "latent_channels": channels,
            "norm_num_groups": 4,
            "scaling_factor": 0.7,
            "shift_factor": 0.1,
            **config,
        },
    )


# Flux

SHARED = {"num_layers": 2, "num_single_layers": 2, "joint_attention_dim": WIDTH, "axes_dims_rope": (4, 6, 6), **HEADS}
FLUX = {"guidance_embeds": True, "pooled_projection_dim": WIDTH, **SHARED}


def _flux(name: str, channels: int = 16, controlnet: bool = False, **components: Any) -> Any:
    more = {}
    if controlnet:
        config = FLUX | {"num_layers": 1, "num_single_layers": 1}
        more["controlnet"] = _model("FluxControlNetModel", in_channels=16, **config)
    return _pipe(
        name,
        transformer=_model("FluxTransformer2DModel", in_channels=channels, out_channels=16, **FLUX),
        vae=_kl(),
        scheduler=_scheduler(use_dynamic_shifting=True, shift=3.0),
        **more,
        **components,
    )


def _flux_text(negative: bool = False) -> dict[str, Any]:
    text = _noise({"prompt_embeds": (1, 6, WIDTH), "pooled_prompt_embeds": (1, WIDTH)})
    if not negative:
        return text
    bad = _noise({"negative_pooled_prompt_embeds": (1, WIDTH), "negative_prompt_embeds": (1, 6, WIDTH)})
    return text | bad | {"true_cfg_scale": 4.0}


_flux_control = partial(_flux, channels=32)
_flux_fill = partial(_flux, channels=16 * 2 + 256)
_flux_controlnet = partial(_flux, controlnet=True)

FLUX_CASES = [
    _row("FluxPipeline", _flux, _flux_text),
    _row("FluxPipeline", _flux, lambda: _flux_text(True), calls=2, variant="true_cfg"),
    _row("FluxPipeline", _flux, lambda: _flux_text() | {"num_images_per_prompt": 2}, variant="two_images"),
    # int(4 - 0.6 * 4) = 1 of the 4 steps is skipped
    _row("FluxImg2ImgPipeline", _flux, lambda: _flux_text() | {"image": _image(), "strength": 0.6}, iterations=3),
    _row(
        "FluxInpaintPipeline",
        _flux,
        lambda: _flux_text(True) | {"image": _image(), "mask_image": _mask(), "strength": 0.8},
        calls=2,
    ),
    _row("FluxFillPipeline", _flux_fill, lambda: _flux_text() | {"image": _image(), "mask_image": _mask()}),
    _row("FluxControlPipeline", _flux_control, lambda: _flux_text() | {"control_image": _image()}),
    _row(
        "FluxControlImg2ImgPipeline",
        _flux_control,
        lambda: _flux_text() | {"control_image": _image(), "image": _image(seed=6), "strength": 0.5},
        iterations=2,
    ),
    _row(
        "FluxControlInpaintPipeline",
        partial(_flux, channels=32),
        lambda: (
            _flux_text() | {"control_image": _image(), "image": _image(seed=6), "mask_image": _mask(), "strength": 1.0}
        ),
    ),
    _row("FluxControlNetPipeline", _flux_controlnet, lambda: _flux_text() | {"control_image": _image()}),
    _row(
        "FluxControlNetPipeline",
        _flux_controlnet,
        lambda: _flux_text(True) | {"control_image": _image()},
        calls=2,
        variant="true_cfg",
    ),
    _row(
        "FluxControlNetPipeline",
        _flux_controlnet,
        lambda: _flux_text() | {"control_image": _image(), "control_guidance_end": 0.5},
        variant="control_ends",
    ),
    _row(
        "FluxControlNetImg2ImgPipeline",
        _flux_controlnet,
        lambda: _flux_text() | {"control_image": _image(), "image": _image(seed=6), "strength": 0.75},
        iterations=3,
    ),
    _row(
        "FluxControlNetInpaintPipeline",
        _flux_controlnet,
        lambda: (
            _flux_text() | {"control_image": _image(), "image": _image(seed=6), "mask_image": _mask(), "strength": 1.0}
        ),
    ),
    _row(
        "FluxKontextPipeline",
        _flux,
        lambda: _flux_text() | {"image": _image(), "_auto_resize": False, "max_area": SIZE * SIZE},
    ),
    _row(
        "FluxKontextInpaintPipeline",
        _flux,
        lambda: (
            _flux_text()
            | {
                "image": _image(),
                "mask_image": _mask(),
                "_auto_resize": False,
                "max_area": SIZE * SIZE,
                "strength": 1.0,
            }
        ),
    ),
]

# Stable Diffusion 3

SD3 = {
    "sample_size": 8,
    "in_channels": 16,
    "joint_attention_dim": WIDTH,
    "caption_projection_dim": WIDTH,
    "pooled_projection_dim": WIDTH,
    "out_channels": 16,
    "pos_embed_max_size": 8,
    **HEADS,
}


def _sd3(name: str, controlnet: bool = False, extra: int = 0, scheduler: str = EULER, **config: Any) -> Any:
    more = {}
    if controlnet:
        more["controlnet"] = _model("SD3ControlNetModel", num_layers=1, extra_conditioning_channels=extra, **SD3)
    return _pipe(
        name,
        transformer=_model("SD3Transformer2DModel", num_layers=3, **SD3 | config),
        vae=_most_likely(_kl(16)) if controlnet else _kl(16),
        scheduler=_scheduler(scheduler, shift=3.0),
        **more,
    )


def _sd3_text() -> dict[str, Any]:
    return _noise(
        {
            "prompt_embeds": (1, 6, WIDTH),
            "negative_prompt_embeds": (1, 6, WIDTH),
            "pooled_prompt_embeds": (1, WIDTH),
            "negative_pooled_prompt_embeds": (1, WIDTH),
        }
    )


SD3_CASES = [
    _row("StableDiffusion3Pipeline", _sd3, _sd3_text),
    _row(
        "StableDiffusion3Pipeline",
        partial(_sd3, dual_attention_layers=(0, 1), qk_norm="rms_norm"),
        _sd3_text,
        variant="3.5",
    ),
    # each step but the last takes two timesteps
    _row(
        "StableDiffusion3Pipeline",
        partial(_sd3, scheduler="FlowMatchHeunDiscreteScheduler"),
        _sd3_text,
        iterations=2 * STEPS - 1,
        variant="heun",
    ),
    # a second call over the prompt's row alone, without a block; by default only between 1 and 20 % of the steps
    _row(
        "StableDiffusion3Pipeline",
        _sd3,
        lambda: (
            _sd3_text()
            | {"skip_guidance_layers": [1], "skip_layer_guidance_start": -1.0, "skip_layer_guidance_stop": 1.0}
        ),
        calls=2,
        variant="skip_layer",
    ),
    _row(
        "StableDiffusion3Img2ImgPipeline",
        _sd3,
        lambda: _sd3_text() | {"image": _image(), "strength": 0.6},
        iterations=3,
    ),
    _row(
        "StableDiffusion3InpaintPipeline",
        _sd3,
        lambda: _sd3_text() | {"image": _image(), "mask_image": _mask(), "strength": 0.75},
        iterations=3,
    ),
    _row(
        "StableDiffusion3ControlNetPipeline",
        partial(_sd3, controlnet=True),
        lambda: _sd3_text() | {"control_image": _image()},
    ),
    _row(
        "StableDiffusion3ControlNetInpaintingPipeline",
        partial(_sd3, controlnet=True, extra=1),
        lambda: _sd3_text() | {"control_image": _image(), "control_mask": _mask()},
    ),
    _row("StableDiffusion3PAGPipeline", _sd3, _sd3_text),
    _row(
        "StableDiffusion3PAGImg2ImgPipeline",
        _sd3,
        lambda: _sd3_text() | {"image": _image(), "strength": 0.5},
        iterations=2,
    ),
]

# Chroma


def _chroma(name: str) -> Any:
    approximator = {"approximator_num_channels": 16, "approximator_hidden_dim": 16, "approximator_layers": 1}
    transformer = _model("ChromaTransformer2DModel", in_channels=16, **SHARED, **approximator)
    # the inpainting pipeline reads this from the config, where the class does not put it
    transformer.register_to_config(guidance_embeds=False)
    return _pipe(name, transformer=transformer, vae=_kl(), scheduler=_scheduler())


def _masked_text(width: int = WIDTH, length: int = 6) -> dict[str, Any]:
    shape = (1, length, width)
    masks = _ones("prompt_attention_mask negative_prompt_attention_mask", length)
    masks["negative_prompt_attention_mask"][:, -2:] = False
    return _noise({"prompt_embeds": shape, "negative_prompt_embeds": shape}) | masks


CHROMA_CASES = [
    _row("ChromaPipeline", _chroma, _masked_text, calls=2),
    _row(
        "ChromaImg2ImgPipeline",
        _chroma,
        lambda: _masked_text() | {"image": _image(), "strength": 0.75},
        calls=2,
        iterations=3,
    ),
    _row(
        "ChromaInpaintPipeline",
        _chroma,
        lambda: _masked_text() | {"image": _image(), "mask_image": _mask(), "strength": 1.0},
        calls=2,
    ),
]

# cross-attention to text: DiT, PixArt, Sana, Hunyuan-DiT


def _dit(name: str) -> Any:
    transformer = _model(
        "DiTTransformer2DModel",
        in_channels=4,
        out_channels=8,
        num_layers=3,
        sample_size=8,
        num_embeds_ada_norm=1000,
        **HEADS,
    )
    return _pipe(name, transformer=transformer, vae=_kl(shift_factor=None), scheduler=_scheduler("DDIMScheduler"))


def _pixart(name: str, sizes: bool = False) -> Any:
    """sizes: as the models for 1024 pixels, which also embed the size and the aspect ratio."""
    transformer = _model(
        "PixArtTransformer2DModel",
        num_layers=3,
        num_attention_heads=3,
        attention_head_dim=16,
        cross_attention_dim=48,
        sample_size=128 if sizes else 8,
        caption_channels=WIDTH,
        use_additional_conditions=sizes,
    )
    scheduler = _scheduler("DPMSolverMultistepScheduler")
    return _pipe(name, transformer=transformer, vae=_kl(shift_factor=None), scheduler=scheduler)


SANA = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 16,
    "cross_attention_dim": WIDTH,
    "caption_channels": WIDTH,
    "sample_size": 8,
}


def _dc() -> Any:
    return _model(
        "AutoencoderDC",
        latent_channels=4,
        attention_head_dim=4,
        encoder_block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        encoder_layers_per_block=(1,) * 4,
        decoder_layers_per_block=(1,) * 4,
        encoder_qkv_multiscales=((),) * 4,
        decoder_qkv_multiscales=((),) * 4,
        scaling_factor=0.4,
    )


def _sana(name: str, controlnet: bool = False) -> Any:
    more = {}
    if controlnet:
        more["controlnet"] = _model("SanaControlNetModel", num_layers=1, **SANA)
    scheduler = _scheduler(
        "DPMSolverMultistepScheduler", prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    return _pipe(
        name, transformer=_model("SanaTransformer2DModel", num_layers=3, **SANA), vae=_dc(), scheduler=scheduler, **more
    )


def _sana_sprint(name: str) -> Any:
    transformer = _model(
        "SanaTransformer2DModel", num_layers=3, guidance_embeds=True, qk_norm="rms_norm_across_heads", **SANA
    )
    scheduler = _scheduler("SCMScheduler")
    return _pipe(name, transformer=transformer, vae=_dc(), scheduler=scheduler)


def _sprint_text() -> dict[str, Any]:
    text = {key: value for key, value in _masked_text().items() if not key.startswith("negative")}
    return text | {"intermediate_timesteps": None}


def _hunyuandit(name: str, controlnet: bool = False) -> Any:
    config = {
        "in_channels": 4,
        "patch_size": 2,
        "sample_size": 8,
        "hidden_size": WIDTH,
        "cross_attention_dim": WIDTH,
        "cross_attention_dim_t5": WIDTH,
        "pooled_projection_dim": 16,
        "text_len": 6,
        "text_len_t5": 5,
        "mlp_ratio": 2.0,
        **HEADS,
    }
    more = {}
    if controlnet:
        more["controlnet"] = _model("HunyuanDiT2DControlNetModel", transformer_num_layers=4, **config)
    return _pipe(
        name,
        transformer=_model("HunyuanDiT2DModel", num_layers=4, **config),
        vae=_most_likely(_kl(shift_factor=None)),
        scheduler=_scheduler("DDPMScheduler", prediction_type="v_prediction", beta_end=0.03),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **more,
    )


def _hunyuandit_text() -> dict[str, Any]:
    second = {
        key.replace("embeds", "embeds_2").replace("mask", "mask_2"): v for key, v in _masked_text(length=5).items()
    }
    return _masked_text() | second


CROSS_CASES = [
    _row("DiTPipeline", _dit, lambda: {"class_labels": [3], "output_type": "np"}),
    _row("PixArtAlphaPipeline", _pixart, lambda: _masked_text() | {"negative_prompt": None}),
    _row(
        "PixArtAlphaPipeline",
        partial(_pixart, sizes=True),
        lambda: _masked_text() | {"negative_prompt": None},
        variant="sizes",
    ),
    _row("PixArtSigmaPipeline", _pixart, lambda: _masked_text() | {"negative_prompt": None}),
    _row("PixArtSigmaPAGPipeline", _pixart, lambda: _masked_text() | {"negative_prompt": None}),
    _row("SanaPipeline", _sana, lambda: _masked_text() | {"negative_prompt": None}),
    _row("SanaPAGPipeline", _sana, lambda: _masked_text() | {"negative_prompt": None}),
    _row(
        "SanaControlNetPipeline",
        partial(_sana, controlnet=True),
        lambda: _masked_text() | {"negative_prompt": None, "control_image": _image()},
    ),
    _row("SanaSprintPipeline", _sana_sprint, _sprint_text),
    _row(
        "SanaSprintImg2ImgPipeline",
        _sana_sprint,
        lambda: _sprint_text() | {"image": _image(), "strength": 0.75},
        iterations=3,
    ),
    _row("HunyuanDiTPipeline", _hunyuandit, _hunyuandit_text),
    _row("HunyuanDiTPAGPipeline", _hunyuandit, _hunyuandit_text),
    _row(
        "HunyuanDiTControlNetPipeline",
        partial(_hunyuandit, controlnet=True),
        lambda: _hunyuandit_text() | {"control_image": _image()},
    ),
]

# text stream of its own, or text and image in one stream


def _auraflow(name: str) -> Any:
    transformer = _model(
        "AuraFlowTransformer2DModel",
        sample_size=8,
        in_channels=4,
        num_mmdit_layers=2,
        num_single_dit_layers=2,
        joint_attention_dim=WIDTH,
        caption_projection_dim=WIDTH,
        out_channels=4,
        pos_embed_max_size=16,
        **HEADS,
    )
    # without biases the gates are so small that no text would show
    transformer.time_step_proj.linear_2.weight.mul_(10)
    return _pipe(name, transformer=transformer, vae=_kl(shift_factor=None), scheduler=_scheduler(shift=1.73))


def _lumina(name: str) -> Any:
    transformer = _model(
        "LuminaNextDiT2DModel",
        sample_size=8,
        in_channels=4,
        hidden_size=WIDTH,
        num_layers=3,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        cross_attention_dim=WIDTH,
    )
    return _pipe(name, transformer=transformer, vae=_kl(shift_factor=None), scheduler=_scheduler())


def _lumina2(name: str) -> Any:
    transformer = _model(
        "Lumina2Transformer2DModel",
        sample_size=8,
        in_channels=4,
        hidden_size=WIDTH,
        num_layers=3,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 6, 6),
        axes_lens=(64, 16, 16),
        cap_feat_dim=WIDTH,
    )
    return _pipe(name, transformer=transformer, vae=_kl(), scheduler=_scheduler(use_dynamic_shifting=True))


COGVIEW = {
    "patch_size": 2,
    "num_layers": 3,
    "text_embed_dim": WIDTH,
    "time_embed_dim": 16,
    "condition_dim": 8,
    "out_channels": 4,
    "sample_size": 8,
    "pos_embed_max_size": 8,
    **HEADS,
}


def _cogview3(name: str) -> Any:
    scheduler = _scheduler(
        "CogVideoXDDIMScheduler",
        prediction_type="v_prediction",
        beta_schedule="scaled_linear",
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
    )
    transformer = _model("CogView3PlusTransformer2DModel", in_channels=4, **COGVIEW)
    return _pipe(name, transformer=transformer, vae=_kl(shift_factor=None), scheduler=scheduler)


def _cogview4(name: str, channels: int = 4) -> Any:
    transformer = _model("CogView4Transformer2DModel", in_channels=channels, rope_axes_dim=(16, 16), **COGVIEW)
    scheduler = _scheduler(
        use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75, base_image_seq_len=256, time_shift_type="linear"
    )
    return _pipe(name, transformer=transformer, vae=_most_likely(_kl(shift_factor=0.0)), scheduler=scheduler)


def _two_texts(width: int = WIDTH, lengths: tuple[int, int] = (6, 4)) -> dict[str, Any]:
    """Embeddings for prompt and negative prompt, of different lengths."""
    return _noise({"prompt_embeds": (1, lengths[0], width), "negative_prompt_embeds": (1, lengths[1], width)})


def _bria(name: str) -> Any:
    transformer = _model("BriaTransformer2DModel", in_channels=16, **SHARED)
    return _pipe(name, transformer=transformer, vae=_kl(), scheduler=_scheduler(use_dynamic_shifting=True))


def _hidream(name: str) -> Any:
    transformer = _model(
        "HiDreamImageTransformer2DModel",
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_single_layers=2,
        caption_channels=[WIDTH, 24],
        text_emb_dim=WIDTH,
        num_routed_experts=4,
        num_activated_experts=2,
        axes_dims_rope=(8, 4, 4),
        max_resolution=(8, 8),
        llama_layers=[0, 1, 1, 2],
        force_inference_output=True,
        **HEADS,
    )
    pipe = _pipe(name, transformer=transformer, vae=_kl(), scheduler=_scheduler(shift=3.0))
    pipe.default_sample_size = 8  # it scales every size to the area of this one
    return pipe


def _hidream_text() -> dict[str, Any]:
    text = {
        "prompt_embeds_t5": (1, 6, WIDTH),
        "prompt_embeds_llama3": (3, 1, 6, 24),
        "pooled_prompt_embeds": (1, WIDTH),
    }
    return _noise(text | {f"negative_{key}": shape for key, shape in text.items()})


JOINT_CASES = [
    _row("AuraFlowPipeline", _auraflow, _masked_text),
    _row("LuminaPipeline", _lumina, _masked_text),
    _row("Lumina2Pipeline", _lumina2, _masked_text, calls=2),
    # two calls in each of the first two iterations, one in each of the last two: counted here as six iterations
    _row(
        "Lumina2Pipeline",
        _lumina2,
        lambda: _masked_text() | {"cfg_trunc_ratio": 0.5},
        iterations=6,
        variant="cfg_trunc",
    ),
    _row("CogView3PlusPipeline", _cogview3, lambda: _two_texts(lengths=(6, 6))),
    _row("CogView4Pipeline", _cogview4, _two_texts, calls=2),
    _row(
        "CogView4ControlPipeline",
        partial(_cogview4, channels=8),
        lambda: _two_texts(lengths=(6, 6)) | {"control_image": _image()},
        calls=2,
    ),
    _row("BriaPipeline", _bria, lambda: _two_texts(lengths=(6, 6))),
    _row("HiDreamImagePipeline", _hidream, _hidream_text),
]

# Flux 2


def _flux2_vae() -> Any:
    return _model(
        "AutoencoderKLFlux2", block_out_channels=(8,) * 4, layers_per_block=1, latent_channels=4, norm_num_groups=4
    )


def _flux2(name: str, guidance: bool = False, **components: Any) -> Any:
    transformer = _model(
        "Flux2Transformer2DModel",
        in_channels=16,
        num_layers=2,
        num_single_layers=3,
        joint_attention_dim=WIDTH,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance,
        **HEADS,
    )
    return _pipe(
        name,
        transformer=transformer,
        vae=_model(
            "AutoencoderKLFlux2", block_out_channels=(8,) * 4, layers_per_block=1, latent_channels=4, norm_num_groups=4
        ),
        scheduler=_scheduler(use_dynamic_shifting=True, shift=3.0),
        **components,
    )


def _flux2_text() -> dict[str, Any]:
    return _noise({"prompt_embeds": (1, 6, WIDTH)})


FLUX2_CASES = [
    _row("Flux2Pipeline", partial(_flux2, guidance=True), _flux2_text),
    _row(
        "Flux2Pipeline", partial(_flux2, guidance=True), lambda: _flux2_text() | {"image": _picture()}, variant="image"
    ),
    _row("Flux2KleinPipeline", _flux2, _two_texts, calls=2),
    _row(
        "Flux2KleinPipeline",
        partial(_flux2, is_distilled=True),
        lambda: _flux2_text() | {"image": _picture()},
        variant="distilled_image",
    ),
    _row(
        "Flux2KleinInpaintPipeline",
        _flux2,
        lambda: _two_texts(lengths=(6, 6)) | {"image": _image(), "mask_image": _mask(), "strength": 0.75},
        calls=2,
        iterations=3,
    ),
    # with an image, the first step runs over its tokens too and keeps their keys and values for the other steps
    _row("Flux2KleinKVPipeline", _flux2, lambda: _flux2_text() | {"image": _picture()}),
    _row("Flux2KleinKVPipeline", _flux2, _flux2_text, variant="text"),
]

# Qwen-Image

QWEN = {
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 4,
    "joint_attention_dim": WIDTH,
    "axes_dims_rope": (4, 6, 6),
}


def _qwen_vae() -> Any:
    return _model(
        "AutoencoderKLQwenImage",
        base_dim=4,
        z_dim=4,
        num_res_blocks=1,
        latents_mean=[0.1] * 4,
        latents_std=[1.5] * 4,
    )


def _shifting(**config: Any) -> Any:
    return _scheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02, **config
    )


def _qwen(
    name: str,
    controlnet: bool = False,
    extra: int = 0,
    vae: Callable[[], Any] = _qwen_vae,
    text: bool = False,
    **config: Any,
) -> Any:
    more = {"text_encoder": Stub()} if text else {}
    if controlnet:
        more["controlnet"] = _model(
            "QwenImageControlNetModel", num_layers=1, extra_condition_channels=extra, **QWEN, **HEADS
        )
    transformer = _model("QwenImageTransformer2DModel", num_layers=3, **QWEN, **HEADS, **config)
    return _pipe(name, transformer=transformer, vae=_most_likely(vae()), scheduler=_shifting(), **more)


def _qwen_text(lengths: tuple[int, int] = (6, 4), width: int = WIDTH) -> dict[str, Any]:
    masks = _ones("prompt_embeds_mask", lengths[0]) | _ones("negative_prompt_embeds_mask", lengths[1])
    return _two_texts(width, lengths) | masks


QWEN_CASES = [
    _row("QwenImagePipeline", _qwen, _qwen_text, calls=2),
    _row(
        "QwenImageImg2ImgPipeline",
        _qwen,
        lambda: _qwen_text() | {"image": _image(), "strength": 0.6},
        calls=2,
        iterations=3,
    ),
    _row(
        "QwenImageInpaintPipeline",
        _qwen,
        lambda: _qwen_text() | {"image": _image(), "mask_image": _mask(), "strength": 1.0},
        calls=2,
    ),
    _row(
        "QwenImageControlNetPipeline",
        partial(_qwen, controlnet=True),
        lambda: _qwen_text() | {"control_image": _image()},
        calls=2,
    ),
    _row(
        "QwenImageControlNetInpaintPipeline",
        partial(_qwen, controlnet=True, extra=4),
        lambda: _qwen_text() | {"control_image": _image(), "control_mask": _mask()},
        calls=2,
    ),
]

# Z-Image

ZIMAGE = {"dim": WIDTH, "n_heads": 2, "n_kv_heads": 2, "n_refiner_layers": 1}


def _zimage(name: str, controlnet: int = 0) -> Any:
    """controlnet: channels of its condition, 0 for none."""
    more = {}
    if controlnet:
        more["controlnet"] = _model(
            "ZImageControlNetModel",
            control_layers_places=[0, 2],
            control_refiner_layers_places=[0],
            control_in_dim=controlnet,
            **ZIMAGE,
        )
    transformer = _model(
        "ZImageTransformer2DModel",
        in_channels=4,
        n_layers=3,
        cap_feat_dim=WIDTH,
        axes_dims=[4, 6, 6],
        axes_lens=[128, 16, 16],
        **ZIMAGE,
    )
    return _pipe(name, transformer=transformer, vae=_kl(), scheduler=_scheduler(shift=3.0), **more)


def _zimage_omni(name: str) -> Any:
    transformer = _model(
        "ZImageTransformer2DModel",
        in_channels=4,
        n_layers=3,
        cap_feat_dim=WIDTH,
        siglip_feat_dim=24,
        axes_dims=[4, 6, 6],
        axes_lens=[512, 16, 16],
        **ZIMAGE,
    )
    pipe = _pipe(name, transformer=transformer, vae=PoolVae(8), scheduler=_scheduler(shift=3.0))
    pipe.prepare_siglip_embeds = lambda images, batch_size, **_: [
        [Draw(7)(2, 2, 24) for _ in images] for _ in range(batch_size)
    ]
    return pipe


def _omni_text(parts: int) -> dict[str, Any]:
    """parts: pieces of the prompt around its images."""
    return {
        f"{sign}prompt_embeds": [[Draw(10 * length + part)(length, WIDTH) for part in range(parts)]]
        for sign, length in (("", 6), ("negative_", 4))
    }


def _zimage_text() -> dict[str, Any]:
    return {"prompt_embeds": [Draw(1)(6, WIDTH)], "negative_prompt_embeds": [Draw(2)(4, WIDTH)]}


ZIMAGE_CASES = [
    _row("ZImagePipeline", _zimage, _zimage_text),
    # both rows in the first steps, one row without guidance in the others
    _row("ZImagePipeline", _zimage, lambda: _zimage_text() | {"cfg_truncation": 0.3}, variant="cfg_truncation"),
    _row("ZImageOmniPipeline", _zimage_omni, lambda: _omni_text(1), variant="text"),
    _row("ZImageOmniPipeline", _zimage_omni, lambda: _omni_text(3) | {"image": _picture()}),
    _row("ZImageImg2ImgPipeline", _zimage, lambda: _zimage_text() | {"image": _image(), "strength": 0.5}, iterations=2),
    _row("ZImageInpaintPipeline", _zimage, lambda: _zimage_text() | {"image": _image(), "mask_image": _mask()}),
    _row(
        "ZImageControlNetPipeline", partial(_zimage, controlnet=4), lambda: _zimage_text() | {"control_image": _image()}
    ),
    _row(
        "ZImageControlNetInpaintPipeline",
        partial(_zimage, controlnet=9),
        lambda: _zimage_text() | {"control_image": _image(), "image": _image(seed=6), "mask_image": _mask()},
    ),
]

# text from language models


def _ovis(name: str) -> Any:
    transformer = _model("OvisImageTransformer2DModel", in_channels=16, out_channels=16, **SHARED)
    return _pipe(name, transformer=transformer, vae=_kl(), scheduler=_shifting())


def _longcat(name: str, vae: Callable[[], Any]) -> Any:
    transformer = _model("LongCatImageTransformer2DModel", in_channels=64, pooled_projection_dim=WIDTH, **SHARED)
    pipe = _pipe(name, transformer=transformer, vae=vae(), scheduler=_shifting(), text_processor=Stub())
    # it refuses embeddings without a prompt, and with one
    pipe._encode_prompt = lambda prompts, *_: Draw(len(prompts[0]))(1, 4 + len(prompts[0]), WIDTH)
    return pipe


def _ernie(name: str) -> Any:
    transformer = _model(
        "ErnieImageTransformer2DModel",
        hidden_size=WIDTH,
        num_attention_heads=2,
        num_layers=3,
        ffn_hidden_size=48,
        in_channels=16,
        out_channels=16,
        text_in_dim=WIDTH,
        rope_axes_dim=(4, 6, 6),
    )
    return _pipe(name, transformer=transformer, vae=_flux2_vae(), scheduler=_scheduler(shift=3.0))


def _glm(name: str) -> Any:
    transformer = _model(
        "GlmImageTransformer2DModel",
        in_channels=4,
        out_channels=4,
        num_layers=3,
        text_embed_dim=WIDTH,
        time_embed_dim=16,
        condition_dim=8,
        prior_vq_quantizer_codebook_size=20,
        **HEADS,
    )
    vae = _kl(latents_mean=[0.1] * 4, latents_std=[1.5] * 4)
    scheduler = _scheduler(use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75, time_shift_type="linear")
    return _pipe(name, transformer=transformer, vae=vae, scheduler=scheduler)


def _glm_text() -> dict[str, Any]:
    # a token of the prior for each token of the image
    return _two_texts(lengths=(6, 6)) | {"prior_token_ids": Draw(4).ints(20, 1, 16)}


def _krea(name: str) -> Any:
    transformer = _model(
        "Krea2Transformer2DModel",
        in_channels=16,
        num_layers=3,
        num_key_value_heads=1,
        intermediate_size=48,
        timestep_embed_dim=16,
        text_hidden_dim=WIDTH,
        num_text_layers=3,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=48,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 6, 6),
        **HEADS,
    )
    return _pipe(name, transformer=transformer, vae=_qwen_vae(), scheduler=_shifting())


def _krea_text() -> dict[str, Any]:
    masks = _ones("prompt_embeds_mask negative_prompt_embeds_mask", 6)
    return masks | _noise({"prompt_embeds": (1, 6, 3, WIDTH), "negative_prompt_embeds": (1, 6, 3, WIDTH)})


def _nucleus(name: str) -> Any:
    transformer = _model(
        "NucleusMoEImageTransformer2DModel",
        in_channels=16,
        out_channels=4,
        num_layers=6,
        num_key_value_heads=1,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 6, 6),
        num_experts=4,
        moe_intermediate_dim=16,
        capacity_factors=2.0,
        **HEADS,
    )
    return _pipe(name, transformer=transformer, vae=_qwen_vae(), scheduler=_shifting())


def _ideogram(name: str) -> Any:
    config = {
        "in_channels": 16,
        "num_layers": 3,
        "intermediate_size": 48,
        "adaln_dim": 16,
        "llm_features_dim": WIDTH,
        "mrope_section": (4, 2, 2),
        **HEADS,
    }
    pipe = _pipe(
        name,
        transformer=_model("Ideogram4Transformer2DModel", **config),
        unconditional_transformer=_model("Ideogram4Transformer2DModel", **config),
        vae=_flux2_vae(),
        scheduler=_scheduler(),
    )

    def encode(prompt: str, grid_h: int, grid_w: int, max_sequence_length: int, device: Any) -> tuple[Tensor, ...]:
        text = torch.cat([Draw(1)(1, max_sequence_length, WIDTH), torch.zeros(1, grid_h * grid_w, WIDTH)], dim=1)
        return text, *pipe._prepare_ids([max_sequence_length - 2], grid_h, grid_w, max_sequence_length, device)

    pipe.encode_prompt = encode  # takes no embeddings
    return pipe


def _kandinsky(name: str, condition: bool = False) -> Any:
    transformer = _model(
        "Kandinsky5Transformer3DModel",
        in_visual_dim=4,
        out_visual_dim=4,
        in_text_dim=WIDTH,
        in_text_dim2=24,
        time_dim=16,
        model_dim=WIDTH,
        ff_dim=48,
        num_text_blocks=1,
        num_visual_blocks=3,
        axes_dims=(4, 6, 6),
        visual_cond=condition,
    )
    pipe = _pipe(name, transformer=transformer, vae=_kl(), scheduler=_scheduler(shift=3.0))
    pipe.resolutions = [(SIZE, SIZE)]  # it scales every size to one of these
    return pipe


def _kandinsky_text() -> dict[str, Any]:
    text = {"prompt_embeds_qwen": (1, 6, WIDTH), "prompt_embeds_clip": (1, 24)}
    ends = {"prompt_cu_seqlens": torch.tensor([0, 6]), "negative_prompt_cu_seqlens": torch.tensor([0, 6])}
    return ends | _noise(text | {f"negative_{key}": shape for key, shape in text.items()})


def _prx(name: str) -> Any:
    pixels = name == "PRXPixelPipeline"
    transformer = _model(
        "PRXTransformer2DModel",
        in_channels=3 if pixels else 4,
        patch_size=16 if pixels else 2,
        context_in_dim=WIDTH,
        hidden_size=WIDTH,
        mlp_ratio=2.0,
        num_heads=2,
        depth=3,
        axes_dim=[8, 8],
        bottleneck_size=8 if pixels else None,
    )
    more = {} if pixels else {"vae": _kl()}
    return _pipe(name, transformer=transformer, scheduler=_scheduler(shift=3.0), **more)


def _hunyuan(name: str, distilled: bool = False) -> Any:
    import diffusers

    transformer = _model(
        "HunyuanImageTransformer2DModel",
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=WIDTH,
        text_embed_2_dim=24,
        rope_axes_dim=(8, 8),
        guidance_embeds=distilled,
        use_meanflow=distilled,
        **HEADS,
    )
    vae = _model(
        "AutoencoderKLHunyuanImage",
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(32,) * 4,
        layers_per_block=1,
        spatial_compression_ratio=8,
        sample_size=SIZE,
        scaling_factor=0.7,
    )
    # plain guidance for two steps, adaptive projected guidance after them
    guider = diffusers.AdaptiveProjectedMixGuidance(adaptive_projected_guidance_start_step=2, enabled=not distilled)
    return _pipe(name, transformer=transformer, vae=vae, scheduler=_scheduler(shift=5.0), guider=guider)


def _hunyuan_text() -> dict[str, Any]:
    text = {"prompt_embeds": (1, 6, WIDTH), "prompt_embeds_2": (1, 4, 24)}
    masks = _ones("prompt_embeds_mask negative_prompt_embeds_mask", 6)
    masks |= _ones("prompt_embeds_mask_2 negative_prompt_embeds_mask_2", 4)
    return masks | _noise(text | {f"negative_{key}": shape for key, shape in text.items()})


def _hunyuan_refiner(name: str) -> Any:
    import diffusers

    transformer = _model(
        "HunyuanImageTransformer2DModel",
        in_channels=16,
        out_channels=8,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        patch_size=(1, 1, 1),
        guidance_embeds=True,
        text_embed_dim=WIDTH,
        rope_axes_dim=(4, 6, 6),
        **HEADS,
    )
    vae = _model(
        "AutoencoderKLHunyuanImageRefiner",
        latent_channels=4,
        block_out_channels=(8,) * 5,
        layers_per_block=1,
    )
    guider = diffusers.AdaptiveProjectedMixGuidance(enabled=False)
    return _pipe(name, transformer=transformer, vae=vae, scheduler=_scheduler(shift=4.0), guider=guider)


def _joy(name: str, vae: Callable[[], Any]) -> Any:
    model = "JoyImageEditPlusTransformer3DModel" if "Plus" in name else "JoyImageEditTransformer3DModel"
    transformer = _model(
        model,
        patch_size=[1, 2, 2],
        in_channels=4,
        hidden_size=WIDTH,
        num_attention_heads=2,
        text_dim=WIDTH,
        mlp_width_ratio=2.0,
        num_layers=3,
        rope_dim_list=[4, 6, 6],
    )
    pipe = _pipe(name, transformer=transformer, vae=vae(), scheduler=_scheduler(shift=1.5))
    if "Plus" in name:
        # it refuses embeddings without a prompt, and a prompt without a text encoder
        pipe.encode_prompt_multiple_images = lambda prompt, **_: (
            Draw(len(prompt[0]))(1, 6, WIDTH),
            torch.ones(1, 6, dtype=torch.bool),
        )
    return pipe


def _qwen21(name: str, image_tokens: int = 0, **config: Any) -> Any:
    """image_tokens: how many of the text encoder's tokens stand for condition images."""
    transformer = _model(
        "QwenImage21Transformer2DModel",
        in_channels=4,
        out_channels=4,
        num_layers=3,
        context_in_dim=WIDTH,
        mlp_ratio=2,
        axes_dims_rope=(4, 6, 6),
        **HEADS,
        **config,
    )
    pipe = _pipe(name, transformer=transformer, vae=PoolVae(16), scheduler=_shifting(), processor=Stub())
    if image_tokens:
        # with a condition image the pipeline takes no embeddings

        def encode(prompt: str, **_: Any) -> tuple[Tensor, None, Tensor]:
            mask = torch.zeros(1, 6 + image_tokens, dtype=torch.bool)
            mask[:, 1 : 1 + image_tokens] = True
            return Draw(len(prompt))(1, 6 + image_tokens, WIDTH), None, mask

        pipe.encode_prompt = encode
    return pipe


def _fibo(name: str) -> Any:
    transformer = _model("BriaFiboTransformer2DModel", in_channels=4, text_encoder_dim=16, **SHARED)
    scheduler = _scheduler(use_dynamic_shifting=True)
    pipe = _pipe(name, transformer=transformer, vae=_wan_vae(), scheduler=scheduler, text_encoder=Stub())

    def encode(prompt: str, **_: Any) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
        length = 6 if any(prompt) else 1
        layers = tuple(Draw(length + index)(1, length, 16) for index in range(5))
        return torch.cat(layers[-2:], dim=-1), layers, torch.ones(1, length, dtype=torch.long)

    pipe.get_prompt_embeds = encode  # the pipeline takes no embeddings
    return pipe


def _wan_vae() -> Any:
    return _model(
        "AutoencoderKLWan", base_dim=4, z_dim=4, num_res_blocks=1, latents_mean=[0.1] * 4, latents_std=[1.5] * 4
    )


def _fibo2(name: str) -> Any:
    transformer = _model(
        "BriaFibo2Transformer2DModel",
        in_channels=4,
        dim=WIDTH,
        n_layers=4,
        n_refiner_layers=1,
        n_heads=2,
        cap_feat_dim=24,
        injection_layer_ids=(1, 3),
        perceiver_num_layers=1,
        min_num_gist_tokens=4,
        max_num_gist_tokens=8,
        gist_step=2,
        gist_min_text_len=2,
        gist_max_text_len=16,
        axes_dims=(4, 6, 6),
        axes_lens=(64, 32, 32),
    )
    return _pipe(name, transformer=transformer, vae=_flux2_vae(), scheduler=_scheduler(use_dynamic_shifting=True))


def _fibo2_pictures(name: str) -> Any:
    """Prompts that come with pictures of their words, which the text encoder sees from noise level 0.9 on."""
    pipe = _fibo2(name)

    def encode(prompt: Any, *args: Any, text_images: Any = None, **kwargs: Any) -> tuple[Tensor, Tensor]:
        length = 4 if prompt == ["b"] else 8 if text_images else 6
        return Draw(length)(1, 3, length, 24), torch.ones(1, length, dtype=torch.bool)

    pipe.encode_prompt = encode
    return pipe


def _fibo2_text() -> dict[str, Any]:
    # one set of features for the perceiver, one for each injection block
    return _noise({"prompt_embeds": (1, 3, 6, 24), "negative_prompt_embeds": (1, 3, 4, 24)})


def _omnigen(name: str) -> Any:
    from unittest.mock import patch

    from diffusers.pipelines.omnigen import pipeline_omnigen
    from diffusers.pipelines.omnigen.processor_omnigen import OmniGenCollator

    class Processor:
        """Token ids by the pipeline's own collator; the real processor needs torchvision and a tokenizer."""

        max_image_size = 1024

        def __init__(self, *args: Any, **kwargs: Any):
            pass

        def __call__(self, prompts: list[str], *args: Any, height: int, width: int, **kwargs: Any) -> Any:
            def ids(length: int) -> dict[str, Any]:
                return {"input_ids": list(range(3, 3 + length)), "pixel_values": None, "image_sizes": None}

            return OmniGenCollator()([(ids(6), ids(4), None, [height, width]) for _ in prompts])

    transformer = _model(
        "OmniGenTransformer2DModel",
        in_channels=4,
        hidden_size=WIDTH,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=48,
        num_layers=3,
        pad_token_id=0,
        vocab_size=20,
        time_step_dim=16,
        rope_scaling={"long_factor": [1.0] * 8, "short_factor": [1.0] * 8},
        pos_embed_max_size=8,
    )
    with patch.object(pipeline_omnigen, "OmniGenMultiModalProcessor", Processor, create=True):
        return _pipe(name, transformer=transformer, vae=_kl(), scheduler=_scheduler(invert_sigmas=True))


LANGUAGE_CASES = [
    _row("OvisImagePipeline", _ovis, lambda: _two_texts() | {"negative_prompt": None}, calls=2),
    _row(
        "LongCatImagePipeline",
        partial(_longcat, vae=lambda: _kl(16)),
        lambda: {"prompt": "ab", "enable_prompt_rewrite": False},
        calls=2,
    ),
    _row(
        "LongCatImageEditPipeline",
        partial(_longcat, vae=lambda: PoolVae(64, 16)),
        lambda: {"prompt": "ab", "image": _picture()},
        calls=2,
    ),
    _row(
        "ErnieImagePipeline",
        _ernie,
        lambda: {"prompt_embeds": [Draw(1)(6, WIDTH)], "negative_prompt_embeds": [Draw(2)(4, WIDTH)]},
    ),
    _row("GlmImagePipeline", _glm, _glm_text, calls=2),
    # before the loop, one call over the condition image fills a cache of keys and values: a fifth iteration here
    _row(
        "GlmImagePipeline",
        _glm,
        lambda: (
            _glm_text()
            | {
                "image": [_picture()],
                "prior_token_image_ids": [Draw(5).ints(20, 16)],
                "source_image_grid_thw": [torch.tensor([[1, 4, 4]])],
                "guidance_scale": 1.0,
            }
        ),
        iterations=5,
        variant="image",
    ),
    _row("OmniGenPipeline", _omnigen, lambda: {"prompt": "a"}),
    _row("Krea2Pipeline", _krea, _krea_text, calls=2),
    _row("NucleusMoEImagePipeline", _nucleus, _qwen_text, calls=2),
    # one call of each of two transformers
    _row(
        "Ideogram4Pipeline",
        _ideogram,
        lambda: {"prompt": "a", "guidance_schedule": (7.0, 7.0, 7.0, 3.0), "max_sequence_length": 8},
        calls=2,
    ),
    _row("Kandinsky5T2IPipeline", _kandinsky, _kandinsky_text, calls=2),
    _row(
        "Kandinsky5I2IPipeline",
        partial(_kandinsky, condition=True),
        lambda: _kandinsky_text() | {"image": _picture()},
        calls=2,
    ),
    _row("PRXPipeline", _prx, lambda: _masked_text() | {"negative_prompt": ""}),
    _row("PRXPixelPipeline", _prx, lambda: _masked_text() | {"negative_prompt": "", "output_type": "pt"}),
    _row("HunyuanImagePipeline", _hunyuan, _hunyuan_text, calls=2),
    _row("HunyuanImagePipeline", partial(_hunyuan, distilled=True), _hunyuan_text, variant="distilled"),
    _row(
        "HunyuanImageRefinerPipeline",
        _hunyuan_refiner,
        lambda: _qwen_text((6, 6)) | {"image": _image()},
    ),
    _row(
        "JoyImageEditPipeline",
        partial(_joy, vae=lambda: PoolVae(128)),
        lambda: _qwen_text((6, 6)),
        calls=2,
        variant="text",
    ),
    _row(
        "JoyImageEditPipeline",
        partial(_joy, vae=lambda: PoolVae(128)),
        lambda: _qwen_text((6, 6)) | {"image": _picture(), "height": None, "width": None},
        calls=2,
    ),
    _row(
        "JoyImageEditPlusPipeline",
        partial(_joy, vae=lambda: PoolVae(128)),
        lambda: {"prompt": "ab", "images": [_picture(), _picture(seed=6)], "height": None, "width": None},
    ),
    _row("QwenImage21Pipeline", _qwen21, lambda: _two_texts() | {"true_cfg_scale": 4.0}, calls=2),
    _row(
        "QwenImage21Pipeline",
        partial(_qwen21, image_tokens=4),
        lambda: {"prompt": "a", "image": _picture(), "output_resolution": SIZE},
        variant="image",
    ),
    _row(
        "QwenImage21Pipeline",
        partial(_qwen21, image_tokens=4),
        lambda: {
            "prompt": "a",
            "negative_prompt": "bc",
            "true_cfg_scale": 4.0,
            "image": _picture(),
            "output_resolution": SIZE,
            "use_kv_cache": False,
        },
        calls=2,
        variant="no_kv",
    ),
    _row("BriaFiboPipeline", _fibo, lambda: {"prompt": "{}", "negative_prompt": ""}),
    _row(
        "BriaFiboEditPipeline",
        _fibo,
        lambda: {"prompt": '{"edit_instruction": "a"}', "negative_prompt": "", "image": _picture()},
    ),
    _row("BriaFibo2Pipeline", _fibo2, _fibo2_text, calls=2),
    _row("BriaFibo2Pipeline", _fibo2, lambda: _fibo2_text() | {"image": _picture()}, calls=2, variant="image"),
    _row(
        "BriaFibo2Pipeline",
        _fibo2_pictures,
        lambda: {"prompt": '{"text_render": [{"text": "a"}]}', "negative_prompt": "b", "text_images": [_picture()]},
        calls=2,
        variant="text_images",
    ),
]

_qwen_edit = partial(_qwen, vae=lambda: PoolVae(64))


def _edit(**more: Any) -> dict[str, Any]:
    return _qwen_text() | {"image": _picture(), "height": None, "width": None, **more}


EDIT_CASES = [
    _row("QwenImageEditPipeline", _qwen_edit, _edit, calls=2),
    _row(
        "QwenImageEditInpaintPipeline",
        _qwen_edit,
        lambda: _edit(mask_image=_mask(), strength=0.75),
        calls=2,
        iterations=3,
    ),
    _row("QwenImageEditPlusPipeline", _qwen_edit, lambda: _edit(image=[_picture(), _picture(seed=6)]), calls=2),
    # not for latents, where it returns a variable that it never set
    _row(
        "QwenImageLayeredPipeline",
        partial(_qwen_edit, use_additional_t_cond=True, use_layer3d_rope=True, text=True),
        lambda: _qwen_text() | {"prompt": "a", "image": _picture(), "layers": 2, "output_type": "pt"},
        calls=2,
    ),
]

# VisualCloze


def _visualcloze(name: str) -> Any:
    pipe = _flux_fill(name, resolution=SIZE)

    def encode(**kwargs: Any) -> tuple[Tensor, ...]:
        text = _flux_text()
        return text["prompt_embeds"], text["pooled_prompt_embeds"], torch.zeros(6, 3)

    # no embeddings without prompts, no prompts without a text encoder
    for each in (pipe, getattr(pipe, "generation_pipe", pipe), getattr(pipe, "upsampling_pipe", pipe)):
        each.encode_prompt = encode
        each.set_progress_bar_config(disable=True)
    return pipe


def _cloze() -> dict[str, Any]:
    rows = [[_picture(seed=1), _picture(seed=2)], [_picture(seed=3), None]]
    return {"task_prompt": "a", "content_prompt": "b", "image": rows}


CLOZE_CASES = [
    _row("VisualClozeGenerationPipeline", _visualcloze, _cloze),
    # two loops with one transformer: at the grid's size, then over the result at its own size
    _row(
        "VisualClozePipeline",
        _visualcloze,
        lambda: _cloze() | {"upsampling_height": SIZE, "upsampling_width": SIZE, "upsampling_strength": 0.5},
        iterations=STEPS + STEPS // 2,
    ),
]

# Amused fills in tokens of a codebook, Shap-E denoises the parameters of a scene


def _amused(name: str) -> Any:
    transformer = _model(
        "UVit2DModel",
        hidden_size=WIDTH,
        cond_embed_dim=WIDTH,
        micro_cond_encode_dim=8,
        micro_cond_embed_dim=40,
        encoder_hidden_size=WIDTH,
        vocab_size=33,
        codebook_size=32,
        in_channels=WIDTH,
        block_out_channels=WIDTH,
        num_res_blocks=1,
        block_num_heads=2,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=48,
        sample_size=8,
    )
    scheduler = _scheduler("AmusedScheduler", mask_token_id=32)
    return _pipe(name, transformer=transformer, vqvae=_codebook(), scheduler=scheduler)


def _codebook(tokens: bool = True) -> Any:
    return _model(
        "VQModel",
        block_out_channels=(8,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=8,
        norm_num_groups=4,
        num_vq_embeddings=32,
        vq_embed_dim=8,
        mid_block_add_attention=False,
        lookup_from_codebook=tokens,
    )


def _amused_text() -> dict[str, Any]:
    text = {"prompt_embeds": (1, WIDTH), "encoder_hidden_states": (1, 6, WIDTH)}
    return _noise(text | {f"negative_{key}": shape for key, shape in text.items()})


def _vqdiffusion(name: str) -> Any:
    transformer = _model(
        "Transformer2DModel",
        num_layers=3,
        cross_attention_dim=WIDTH,
        sample_size=8,
        num_vector_embeds=33,
        norm_num_groups=4,
        num_embeds_ada_norm=100,
        attention_bias=True,
        activation_fn="geglu-approximate",
        **HEADS,
    )
    pipe = _pipe(
        name,
        transformer=transformer,
        vqvae=_codebook(tokens=False),
        scheduler=_scheduler("VQDiffusionScheduler", num_vec_classes=33),
        learned_classifier_free_sampling_embeddings=None,
    )
    pipe._encode_prompt = lambda *_: Draw(1)(2, 6, WIDTH)  # takes no embeddings
    return pipe


def _unidiffuser(name: str) -> Any:
    from diffusers.pipelines.deprecated.unidiffuser.modeling_uvit import UniDiffuserModel

    torch.manual_seed(0)
    model = UniDiffuserModel(
        text_dim=WIDTH,
        clip_img_dim=16,
        num_text_tokens=6,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        sample_size=8,
        patch_size=2,
        use_timestep_embedding=True,
        **HEADS,
    ).eval()
    randomise_zeros(model)
    decoder = Stub()
    decoder.prefix_inner_dim = decoder.prefix_hidden_dim = WIDTH
    pipe = _pipe(
        name,
        unet=model.requires_grad_(False),
        vae=_kl(shift_factor=None),
        text_encoder=Stub(hidden_size=WIDTH, max_position_embeddings=6),
        image_encoder=Stub(projection_dim=16),
        text_decoder=decoder,
        scheduler=_scheduler("DPMSolverMultistepScheduler", beta_schedule="scaled_linear"),
    )
    pipe.set_text_to_image_mode()
    return pipe


def _dreamlite(name: str) -> Any:
    unet = _model(
        "DreamLiteUNetModel",
        sample_size=8,
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        norm_num_groups=8,
        attention_head_dim=16,
        addition_embed_type="time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=16,
        ff_mult=2,
    )
    vae = _model(
        "AutoencoderTiny",
        encoder_block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        num_encoder_blocks=(1,) * 4,
        num_decoder_blocks=(1,) * 4,
    )
    pipe = _pipe(name, unet=unet, vae=vae, scheduler=_scheduler(use_dynamic_shifting=True), text_encoder=Stub())
    pipe.encode_prompt = lambda prompts, **_: (
        Draw(1)(len(prompts), 6, WIDTH),
        torch.ones(len(prompts), 6, dtype=torch.long),
    )  # takes no embeddings
    return pipe


OTHER_CASES = [
    _row("AmusedPipeline", _amused, _amused_text),
    _row("AmusedImg2ImgPipeline", _amused, lambda: _amused_text() | {"image": _image(), "strength": 0.5}, iterations=2),
    _row(
        "AmusedInpaintPipeline",
        _amused,
        lambda: _amused_text() | {"image": _image(), "mask_image": _mask(), "strength": 1.0},
    ),
    _row("VQDiffusionPipeline", _vqdiffusion, lambda: {"prompt": "a", "output_type": "np"}),
    # the second call's text is new noise at each step
    _row(
        "UniDiffuserPipeline",
        _unidiffuser,
        lambda: _two_texts(lengths=(6, 6)) | {"guidance_scale": 8.0},
        calls=2,
        variant="embeddings",
    ),
    _row("DreamLitePipeline", _dreamlite, lambda: {"prompt": "a"}),
    _row("DreamLitePipeline", _dreamlite, lambda: {"prompt": "a", "image": _picture()}, variant="edit"),
    _row("DreamLiteMobilePipeline", _dreamlite, lambda: {"prompt": "a"}),
    _row("DreamLiteMobilePipeline", _dreamlite, lambda: {"prompt": "a", "image": _picture()}, variant="edit"),
]

CASES = [
    *FLUX_CASES,
    *SD3_CASES,
    *CHROMA_CASES,
    *CROSS_CASES,
    *JOINT_CASES,
    *FLUX2_CASES,
    *QWEN_CASES,
    *ZIMAGE_CASES,
    *LANGUAGE_CASES,
    *EDIT_CASES,
    *CLOZE_CASES,
    *OTHER_CASES,
]
SKIPPED: dict[str, str] = {"FluxPriorReduxPipeline": "no denoiser: image embeddings for FluxPipeline"}
