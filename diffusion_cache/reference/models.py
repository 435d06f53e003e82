"""The reference models: real diffusers architectures, small enough to train on a CPU in an hour and to ship."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from .data import IMAGE_SIZE, VIDEO_FRAMES, VIDEO_SIZE

BARE = ("reacher", "fill-forward", "rolling-digits")  # shipped beside MODELS, with modules of their own
NULL_CLASS = 10
DIT_NULL_CLASS = 1000  # hard-coded in DiTPipeline
EMBEDDING_TOKENS, EMBEDDING_DIM = 4, 64


def class_embeddings() -> Tensor:
    """Fixed embeddings that stand in for text [11, tokens, dim], unit variance; the last row (null) is zero."""
    generator = torch.Generator().manual_seed(20)
    table = torch.randn(NULL_CLASS + 1, EMBEDDING_TOKENS, EMBEDDING_DIM, generator=generator)
    table[NULL_CLASS] = 0
    return table


@dataclass(frozen=True)
class ReferenceModel:
    """One shipped model: how to build, train, sample and score it.

    objective: "v" (velocity of the variance-preserving process, squared-cosine schedule) or "flow" (x1 − x0).
    samplers: sampler names accepted by `load`, the first is the default.
    guidance: the classifier-free guidance scale its results are reported at (1 = none).
    gate: the share of generated samples in which the digit classifier must see the requested class.
    denoise(model, x, t, labels): the model output for the noisy sample x at noise level t, timesteps in 0…1000.
    """

    name: str
    build: Callable[[], nn.Module]
    pipeline: str
    denoiser: str
    samplers: tuple[str, ...]
    objective: str
    guidance: float
    steps: int
    gate: float
    sample_shape: tuple[int, ...]
    denoise: Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]


def _build_dit() -> Any:
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(
        num_attention_heads=3,
        attention_head_dim=32,
        in_channels=1,
        out_channels=1,
        num_layers=12,
        norm_num_groups=32,
        sample_size=IMAGE_SIZE,
        patch_size=2,
        num_embeds_ada_norm=DIT_NULL_CLASS,
    )


def _denoise_dit(model: nn.Module, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    classes = torch.where(labels == NULL_CLASS, DIT_NULL_CLASS, labels)
    return model(x, timestep=t, class_labels=classes, return_dict=False)[0]


def _build_unet() -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=IMAGE_SIZE,
        in_channels=1,
        out_channels=1,
        block_out_channels=(32, 80, 112),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=EMBEDDING_DIM,
        attention_head_dim=(2, 4, 4),  # diffusers reads this as the number of heads here
        norm_num_groups=16,
    )


def _denoise_unet(model: nn.Module, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    return model(x, t, encoder_hidden_states=class_embeddings().to(x)[labels], return_dict=False)[0]


def _build_flux() -> Any:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=3,
        num_single_layers=8,
        attention_head_dim=32,
        num_attention_heads=3,
        joint_attention_dim=EMBEDDING_DIM,
        pooled_projection_dim=EMBEDDING_DIM,
        axes_dims_rope=(8, 12, 12),
    )


def _denoise_flux(model: nn.Module, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    from diffusers import FluxPipeline

    b, c, h, w = x.shape
    embeddings = class_embeddings().to(x)[labels]
    output = model(
        hidden_states=FluxPipeline._pack_latents(x, b, c, h, w),
        timestep=t / 1000,
        encoder_hidden_states=embeddings,
        pooled_projections=embeddings.mean(1),
        txt_ids=torch.zeros(EMBEDDING_TOKENS, 3, device=x.device, dtype=x.dtype),
        img_ids=FluxPipeline._prepare_latent_image_ids(b, h // 2, w // 2, x.device, x.dtype),
        return_dict=False,
    )[0]
    return FluxPipeline._unpack_latents(output, h, w, 1)


def _build_wan() -> Any:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        patch_size=(1, 4, 4),
        num_attention_heads=4,
        attention_head_dim=24,
        in_channels=1,
        out_channels=1,
        text_dim=EMBEDDING_DIM,
        freq_dim=128,
        ffn_dim=288,
        num_layers=10,
        rope_max_seq_len=32,
    )


def _denoise_wan(model: nn.Module, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    return model(
        hidden_states=x, timestep=t, encoder_hidden_states=class_embeddings().to(x)[labels], return_dict=False
    )[0]


MODELS: Mapping[str, ReferenceModel] = {
    model.name: model
    for model in (
        ReferenceModel(
            name="dit-digits",
            build=_build_dit,
            pipeline="DiTPipeline",
            denoiser="transformer",
            samplers=("ddim", "dpm++"),
            objective="v",
            guidance=1.5,
            steps=50,
            gate=0.9,
            sample_shape=(1, IMAGE_SIZE, IMAGE_SIZE),
            denoise=_denoise_dit,
        ),
        ReferenceModel(
            name="unet-digits",
            build=_build_unet,
            pipeline="StableDiffusionPipeline",
            denoiser="unet",
            samplers=("ddim",),
            objective="v",
            guidance=1.5,
            steps=50,
            gate=0.9,
            sample_shape=(1, IMAGE_SIZE, IMAGE_SIZE),
            denoise=_denoise_unet,
        ),
        ReferenceModel(
            name="flux-digits",
            build=_build_flux,
            pipeline="FluxPipeline",
            denoiser="transformer",
            samplers=("flow-euler",),
            objective="flow",
            guidance=1.0,
            steps=40,
            gate=0.9,
            sample_shape=(1, IMAGE_SIZE, IMAGE_SIZE),
            denoise=_denoise_flux,
        ),
        ReferenceModel(
            name="wan-moving-digits",
            build=_build_wan,
            pipeline="WanPipeline",
            denoiser="transformer",
            samplers=("flow-euler", "unipc"),
            objective="flow",
            guidance=2.0,
            steps=40,
            gate=0.8,
            sample_shape=(1, VIDEO_FRAMES, VIDEO_SIZE, VIDEO_SIZE),
            denoise=_denoise_wan,
        ),
    )
}


def scheduler(model: ReferenceModel, sampler: str | None = None) -> Any:
    """The diffusers scheduler for one of the model's samplers.

    Raises:
        ConfigError: for a sampler the model was not validated with.
    """
    import diffusers

    sampler = sampler or model.samplers[0]
    if sampler not in model.samplers:
        raise ConfigError(f"{model.name} has the samplers {', '.join(model.samplers)}, not {sampler!r}")
    variance_preserving = dict(
        beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", timestep_spacing="leading", steps_offset=1
    )
    if sampler == "ddim":
        return diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=False, **variance_preserving)
    if sampler == "dpm++":
        return diffusers.DPMSolverMultistepScheduler(**variance_preserving)
    if sampler == "flow-euler":
        return diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    return diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
