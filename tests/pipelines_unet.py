"""Tiny pipelines whose denoiser is a UNet, of every family in diffusers. See pipeline_zoo.py."""

import importlib
import inspect
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any, ClassVar

import diffusers
import PIL.Image
import torch
import transformers
from pipeline_zoo import PipelineCase
from torch import Tensor, nn
from zoo import Draw, randomise_zeros

STEPS = 4
WIDTH = 16  # of prompt embeddings
TOKENS = 5


def _make(cls: type, **config: Any) -> Any:
    torch.manual_seed(0)
    model = cls(**config).eval().requires_grad_(False)
    randomise_zeros(model)
    return model


def _pipe(name: str, *, module: str = "diffusers", **parts: Any) -> Any:
    """A pipeline of these components; those that it asks for and that are not given are None."""
    cls = getattr(importlib.import_module(module), name)
    wanted = inspect.signature(cls.__init__).parameters
    parts = {
        key: None for key, parameter in wanted.items() if key != "self" and parameter.default is parameter.empty
    } | parts
    if "requires_safety_checker" in wanted:
        parts["requires_safety_checker"] = False
    pipe = cls(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _noise(*shape: int, seed: int = 0) -> Tensor:
    return Draw(seed)(*shape)


def _picture(size: int = 16, channels: int = 3) -> Tensor:
    return Draw(1)(1, channels, size, size).sigmoid()


def _mask(size: int = 16) -> Tensor:
    mask = torch.zeros(1, 1, size, size)
    mask[..., : size // 2] = 1
    return mask


def _call(**arguments: Any) -> Callable[[], dict[str, Any]]:
    return lambda: deepcopy(arguments) | {"generator": torch.Generator().manual_seed(0)}


def _globally(call: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
    """The call of a pipeline that also draws from the global generator."""

    def seeded() -> dict[str, Any]:
        torch.manual_seed(0)
        return call()

    return seeded


def _text(*, steps: int = STEPS, negative: bool = True, **more: Any) -> Callable[[], dict[str, Any]]:
    """A call with prompt embeddings; latents come back."""
    embeds = {"prompt_embeds": _noise(1, TOKENS, WIDTH)}
    if negative:
        embeds["negative_prompt_embeds"] = _noise(1, TOKENS, WIDTH, seed=1)
    return _call(**{**embeds, "num_inference_steps": steps, "output_type": "latent", **more})


def _pooled(**more: Any) -> Callable[[], dict[str, Any]]:
    pooled = {"pooled_prompt_embeds": _noise(1, WIDTH), "negative_pooled_prompt_embeds": _noise(1, WIDTH, seed=1)}
    return _text(**pooled, **more)


def _unet(**more: Any) -> nn.Module:
    config = {
        "sample_size": 8,
        "block_out_channels": (8, 16, 16),
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "cross_attention_dim": WIDTH,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
    }
    return _make(diffusers.UNet2DConditionModel, **config | more)


SDXL = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "transformer_layers_per_block": (1, 1, 2),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + WIDTH,
}


def _unet_xl(**more: Any) -> nn.Module:
    up = ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")
    return _unet(**SDXL | {"up_block_types": up} | more)


def _vae(**more: Any) -> nn.Module:
    config = {
        "block_out_channels": (4, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "latent_channels": 4,
        "norm_num_groups": 2,
        "sample_size": 16,
    }
    return _make(diffusers.AutoencoderKL, **config | more)


def _controlnet(cls: str = "ControlNetModel", **more: Any) -> nn.Module:
    config = {
        "block_out_channels": (8, 16, 16),
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "layers_per_block": 1,
        "cross_attention_dim": WIDTH,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
        "conditioning_embedding_out_channels": (4, 8),
    }
    return _make(getattr(diffusers, cls), **config | more)


class Words:
    """A tokenizer: two numbers for each word."""

    model_max_length = 12
    pad_token_id = 0
    eos_token_id = 1
    bos_token_id = 2
    added_tokens_encoder: ClassVar[dict[str, int]] = {}

    def tokenize(self, text: str) -> list[str]:
        return text.split()

    def __call__(
        self, text: Any, *, padding: Any = False, max_length: int = 0, return_tensors: str | None = None, **more: Any
    ) -> Any:
        texts = [text] if isinstance(text, str) else list(text)
        rows = [[2, *(3 + number % 29 for word in line.split() for number in word.encode()[:2]), 1] for line in texts]
        longest = max(map(len, rows))
        length = (max_length or self.model_max_length) if padding == "max_length" else max(longest, 2)
        ids = [row[:length] + [0] * (length - len(row)) for row in rows]
        mask = [[1] * min(len(row), length) + [0] * (length - len(row)) for row in rows]
        parts = {"input_ids": ids, "attention_mask": mask}
        if more.get("return_length"):
            parts["length"] = [len(row) for row in rows]
        return transformers.BatchEncoding(parts, tensor_type=return_tensors)


TEXT = {
    "vocab_size": 32,
    "hidden_size": WIDTH,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 80,
    "projection_dim": WIDTH,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "bos_token_id": 2,
}


def _clip(cls: str = "CLIPTextModel") -> nn.Module:
    return _from_config(getattr(transformers, cls), transformers.CLIPTextConfig(**TEXT))


def _clip_vision(size: int = 16) -> nn.Module:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "projection_dim")
    config = transformers.CLIPVisionConfig(
        **{name: TEXT[name] for name in names}, image_size=size, patch_size=size // 2
    )
    return _from_config(transformers.CLIPVisionModelWithProjection, config)


def _clip_vision_plain() -> nn.Module:
    return _from_config(transformers.CLIPVisionModel, _clip_vision().config)


def _clip_pixels(size: int = 16) -> Any:
    crop = {"height": size, "width": size}
    return transformers.CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size=crop)


def _from_config(cls: type, config: Any) -> nn.Module:
    return _make(cls, config=config)


def _worded(name: str, **parts: Any) -> Any:
    return _sd(name, text_encoder=_clip(), tokenizer=Words(), **parts)


def _worded_xl(name: str, **parts: Any) -> Any:
    encoders = {"text_encoder": _clip(), "text_encoder_2": _clip("CLIPTextModelWithProjection")}
    words = {"tokenizer": Words(), "tokenizer_2": Words()}
    return _sdxl(name, unet=_unet_xl(cross_attention_dim=2 * WIDTH), **encoders, **words, **parts)


def _adapter(**more: Any) -> nn.Module:
    config = {"in_channels": 3, "channels": [8, 16, 16], "num_res_blocks": 1, "downscale_factor": 2}
    return _make(diffusers.T2IAdapter, **config | more)


def _adapter_xl() -> nn.Module:
    return _adapter(channels=[8, 16, 16, 16], downscale_factor=4, adapter_type="full_adapter_xl")


SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def _ddim(**more: Any) -> Any:
    return diffusers.DDIMScheduler(
        **SD_BETAS | {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1} | more
    )


def _pndm() -> Any:
    return diffusers.PNDMScheduler(**SD_BETAS, skip_prk_steps=True, steps_offset=1)


def _euler() -> Any:
    return diffusers.EulerDiscreteScheduler(**SD_BETAS, steps_offset=1, timestep_spacing="leading")


def _sd(name: str, *, scheduler: Callable[[], Any] = _ddim, channels: int = 4, **parts: Any) -> Any:
    given = {"unet": _unet(in_channels=channels), "vae": _vae(), "scheduler": scheduler()}
    return _pipe(name, **given | parts)


def _sd_control(name: str, **parts: Any) -> Any:
    return _sd(name, controlnet=_controlnet(), **parts)


def _sdxl(name: str, *, scheduler: Callable[[], Any] = _euler, channels: int = 4, **parts: Any) -> Any:
    given = {"unet": _unet_xl(in_channels=channels), "vae": _vae(), "scheduler": scheduler()}
    return _pipe(name, **given | parts)


def _sdxl_control(name: str, cls: str = "ControlNetModel", **more: Any) -> Any:
    return _sdxl(name, controlnet=_controlnet(cls, **SDXL, **more))


def _sdxl_union(name: str) -> Any:
    return _sdxl_control(
        name, "ControlNetUnionModel", num_control_type=6, num_trans_channel=8, num_trans_head=2, num_proj_channel=8
    )


def _case(name: str, build: Callable[..., Any], call: Any, iterations: int, calls: int = 1, variant: str = "") -> Any:
    return PipelineCase(name, partial(build, name), call, iterations, calls, variant)


def _words(*, steps: int = STEPS, negative: bool = True, **more: Any) -> Callable[[], dict[str, Any]]:
    words = {"prompt": "a red fox"} | ({"negative_prompt": "dull"} if negative else {})
    return _call(**{**words, "num_inference_steps": steps, "output_type": "latent", **more})


def _pil(size: int = 16, seed: int = 0) -> PIL.Image.Image:
    return PIL.Image.fromarray(Draw(seed).ints(256, size, size, 3).to(torch.uint8).numpy())


def _panorama(name: str) -> Any:
    # The views are cut as if the latents were an eighth of the image.
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    return _sd(name, vae=_vae(block_out_channels=(4, 4, 4, 4), **blocks))


def _upscale(name: str) -> Any:
    return _sd(name, channels=7, low_res_scheduler=diffusers.DDPMScheduler())


def _latent_upscale(name: str) -> Any:
    unet = _unet(in_channels=8, out_channels=5, time_cond_proj_dim=128 + WIDTH)
    return _sd(name, unet=unet, scheduler=_euler)


def _gligen(name: str, kind: str = "gated", **parts: Any) -> Any:
    return _worded(name, unet=_unet(attention_type=kind), **parts)


def _xs(**more: Any) -> nn.Module:
    config = {
        "block_out_channels": (4, 8, 8),
        "base_block_out_channels": (8, 16, 16),
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "conditioning_embedding_out_channels": (4, 8),
        "cross_attention_dim": WIDTH,
        "num_attention_heads": 2,
        "max_norm_num_groups": 4,
        "sample_size": 8,
    }
    return _make(diffusers.ControlNetXSAdapter, **config | more)


def _sd_xs(name: str) -> Any:
    return _sd(name, controlnet=_xs(), unet=_unet(layers_per_block=2, use_linear_projection=True))


def _sdxl_xs(name: str) -> Any:
    unet = _unet_xl(layers_per_block=2)
    types = {key: SDXL[key] for key in ("down_block_types", "transformer_layers_per_block")}
    return _sdxl(name, unet=unet, controlnet=_xs(**types))


def _sde() -> Any:
    return diffusers.DPMSolverMultistepScheduler(**SD_BETAS, algorithm_type="sde-dpmsolver++", solver_order=2)


def _kolors(name: str, module: str = "kolors.pipeline_kolors", **parts: Any) -> Any:
    # Not exported where sentencepiece is missing, which only its tokenizer needs.
    unet = _unet_xl(encoder_hid_dim=WIDTH, encoder_hid_dim_type="text_proj")
    return _sdxl(name, unet=unet, module=f"diffusers.pipelines.{module}", **parts)


class Placed(Words):
    """With the positions that ChatGLM takes."""

    def __call__(self, *arguments: Any, **more: Any) -> Any:
        parts = super().__call__(*arguments, **more)
        parts["position_ids"] = torch.arange(parts["input_ids"].shape[1])[None].expand_as(parts["input_ids"])
        return parts


def _kolors_worded(name: str) -> Any:
    # Embeddings given to it leave out the pooled ones: a small ChatGLM.
    from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig, ChatGLMModel

    sizes = {"num_layers": 2, "hidden_size": WIDTH, "ffn_hidden_size": 32, "kv_channels": 8, "num_attention_heads": 2}
    config = ChatGLMConfig(padded_vocab_size=32, seq_length=256, original_rope=True, **sizes)
    encoder = ChatGLMModel(config).eval().requires_grad_(False)
    for seed, parameter in enumerate(encoder.parameters()):  # which it leaves uninitialised
        parameter.copy_(0.1 * _noise(*parameter.shape, seed=seed))
    text = {"text_encoder": encoder, "tokenizer": Placed()}
    return _kolors(name, module="kolors.pipeline_kolors_img2img", **text)


def _unidiffuser(name: str) -> Any:
    unet = _make(
        diffusers.UniDiffuserModel,
        text_dim=WIDTH,
        clip_img_dim=WIDTH,
        num_text_tokens=12,
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        sample_size=8,
        patch_size=2,
        activation_fn="gelu",
        norm_num_groups=4,
        num_embeds_ada_norm=1000,
        norm_type="layer_norm",
        block_type="unidiffuser",
        use_patch_pos_embed=False,
        ff_final_dropout=True,
    )
    decoder = _make(
        diffusers.UniDiffuserTextDecoder,
        prefix_length=12,
        prefix_inner_dim=WIDTH,
        vocab_size=32,
        n_positions=32,
        n_embd=WIDTH,
        n_layer=1,
        n_head=2,
    )
    seen = {"image_encoder": _clip_vision(), "clip_image_processor": _clip_pixels()}
    text = {"text_encoder": _clip(), "clip_tokenizer": Words(), "text_decoder": decoder, "text_tokenizer": Words()}
    solver = diffusers.DPMSolverMultistepScheduler(**SD_BETAS)
    pipe = _pipe(name, unet=unet, vae=_vae(), scheduler=solver, **seen, **text)
    pipe.set_text_to_image_mode()
    return pipe


def _refiner(name: str) -> Any:
    unet = _unet_xl(projection_class_embeddings_input_dim=5 * 8 + WIDTH)
    return _sdxl(name, unet=unet, requires_aesthetics_score=True)


def _freeu(name: str) -> Any:
    pipe = _sd(name)
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
    return pipe


def _free_init(name: str) -> Any:
    pipe = _animate(name)
    pipe.enable_free_init(num_iters=2)
    return pipe


def _free_noise(name: str) -> Any:
    pipe = _animate(name, text_encoder=_clip(), tokenizer=Words())
    pipe.enable_free_noise(context_length=4, context_stride=2)
    return pipe


def _stop_guidance(pipe: Any, step: int, _: Any, state: dict[str, Any]) -> dict[str, Any]:
    if step == 1:
        pipe._guidance_scale = 0.0
        state["prompt_embeds"] = state["prompt_embeds"].chunk(2)[-1]
    return state


STOPPED = {"callback_on_step_end": _stop_guidance, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
HEUN = partial(_sd, scheduler=lambda: diffusers.HeunDiscreteScheduler(**SD_BETAS))
SOLVER = partial(_sd, scheduler=lambda: diffusers.DPMSolverMultistepScheduler(**SD_BETAS))


def _ledits(name: str) -> Any:
    attending = {"down_block_types": ("CrossAttnDownBlock2D",) * 3, "up_block_types": ("CrossAttnUpBlock2D",) * 3}
    pipe = _worded(name, scheduler=_sde, unet=_unet(**attending))  # its masks are of a quarter of the latents' size
    pipe.invert(_pil(32), num_inversion_steps=STEPS, skip=0.0, generator=torch.Generator().manual_seed(0))
    return pipe


def _ledits_xl(name: str) -> Any:
    pipe = _worded_xl(name, scheduler=_sde)
    pipe.invert(_pil(32), num_inversion_steps=STEPS, skip=0.0, generator=torch.Generator().manual_seed(0))
    return pipe


def _versatile(name: str, **parts: Any) -> Any:
    given = {"image_unet": _unet(), "vae": _vae(), "scheduler": _ddim()}
    encoder = {"text_encoder": _clip("CLIPTextModelWithProjection"), "tokenizer": Words()}
    if "Text" in name or "Dual" in name:
        given |= encoder | {"text_unet": _unet()}
    if "Image" in name.replace("TextToImage", "") or "Dual" in name:
        given |= {"image_encoder": _clip_vision(), "image_feature_extractor": _clip_pixels()}
    return _pipe(name, **given)


class Query(nn.Module):
    """In place of Blip's Q-Former, which loads a tokenizer when it is built."""

    def __init__(self) -> None:
        super().__init__()
        self.config = transformers.PretrainedConfig(num_query_tokens=2)
        self.layer = nn.Linear(3, 2 * WIDTH)

    @property
    def device(self) -> torch.device:
        return self.layer.weight.device

    def forward(self, image_input: Tensor, **_: Any) -> Tensor:
        return self.layer(image_input.mean((2, 3))).view(-1, 2, WIDTH)


def _blip(name: str, **parts: Any) -> Any:
    from diffusers.pipelines.deprecated.blip_diffusion.blip_image_processing import BlipImageProcessor
    from diffusers.pipelines.deprecated.blip_diffusion.modeling_ctx_clip import ContextCLIPTextModel

    text = _from_config(ContextCLIPTextModel, transformers.CLIPTextConfig(**TEXT))
    pixels = BlipImageProcessor(size={"height": 16, "width": 16})
    parts |= {"qformer": _make(Query), "image_processor": pixels, "text_encoder": text, "tokenizer": Words()}
    return _sd(name, scheduler=_pndm, mean=[0.5] * 3, std=[0.5] * 3, **parts)


def _dance(name: str) -> Any:
    unet = _make(
        diffusers.UNet1DModel,
        sample_size=64,
        sample_rate=16000,
        extra_in_channels=64,
        block_out_channels=(32, 32, 64),
    )
    return _pipe(name, unet=unet, scheduler=diffusers.IPNDMScheduler())


def _vq(**more: Any) -> nn.Module:
    config = {
        "block_out_channels": (4, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "latent_channels": 4,
        "num_vq_embeddings": 8,
        "norm_num_groups": 2,
    }
    return _make(diffusers.VQModel, **config | more)


SIMPLE = {
    "out_channels": 8,
    "attention_head_dim": 8,
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D", "SimpleCrossAttnDownBlock2D"),
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "resnet_time_scale_shift": "scale_shift",
    "encoder_hid_dim": WIDTH,
}


def _kandinsky(name: str, *, channels: int = 4, **parts: Any) -> Any:
    unet = _unet(
        **SIMPLE, in_channels=channels, encoder_hid_dim_type="text_image_proj", addition_embed_type="text_image"
    )
    scheduler = diffusers.DDIMScheduler(beta_start=0.00085, beta_end=0.012, clip_sample=False, set_alpha_to_one=False)
    encoder = {"text_encoder": _mclip(), "tokenizer": Words()}
    return _pipe(name, **{"unet": unet, "movq": _vq(), "scheduler": scheduler} | encoder | parts)


def _mclip() -> nn.Module:
    from diffusers.pipelines.kandinsky.text_encoder import MCLIPConfig, MultilingualCLIP

    sizes = {key: value for key, value in TEXT.items() if key != "projection_dim"}
    return _from_config(MultilingualCLIP, MCLIPConfig(transformerDimSize=WIDTH, imageDimSize=WIDTH, **sizes))


def _kandinsky2(name: str, *, channels: int = 4, embed: str = "image", **parts: Any) -> Any:
    unet = _unet(**SIMPLE, encoder_hid_dim_type="image_proj", addition_embed_type=embed, in_channels=channels)
    scheduler = diffusers.DDPMScheduler(beta_start=0.00085, beta_end=0.012, variance_type="learned_range")
    return _pipe(name, unet=unet, movq=_vq(), scheduler=scheduler, **parts)


def _prior_parts(prefix: str = "") -> dict[str, Any]:
    prior = _make(
        diffusers.PriorTransformer,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        embedding_dim=WIDTH,
        num_embeddings=12,
    )
    scheduler = diffusers.UnCLIPScheduler(prediction_type="sample", clip_sample_range=5.0)
    parts = {
        "prior": prior,
        "image_encoder": _clip_vision(),
        "text_encoder": _clip("CLIPTextModelWithProjection"),
        "tokenizer": Words(),
        "scheduler": scheduler,
        "image_processor": _clip_pixels(),
    }
    return {prefix + key: part for key, part in parts.items()}


def _prior(name: str) -> Any:
    return _pipe(name, **_prior_parts())


def _combined(build: Callable[..., Any]) -> Callable[[str], Any]:
    return lambda name: build(name, **_prior_parts("prior_"))


def _shap_e(name: str) -> Any:
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 3, "embedding_dim": 8}
    kind = {"num_embeddings": 4, "additional_embeddings": 0, "added_emb_type": None, "time_embed_act_fn": "gelu"}
    images = "Img" in name
    proj = {"embedding_proj_dim": WIDTH, "encoder_hid_proj_type": None, "norm_in_type": "layer"}
    prior = _make(diffusers.PriorTransformer, **sizes, **kind, **proj, clip_embed_dim=16, time_embed_dim=32)
    scheduler = diffusers.HeunDiscreteScheduler(
        beta_schedule="exp", prediction_type="sample", use_karras_sigmas=True, clip_sample=True
    )
    seen = {"image_encoder": _clip_vision_plain(), "image_processor": _clip_pixels()}
    text = {"text_encoder": _clip("CLIPTextModelWithProjection"), "tokenizer": Words()}
    return _pipe(name, prior=prior, scheduler=scheduler, **(seen if images else text))


def _kandinsky3(name: str) -> Any:
    unet = _make(
        diffusers.Kandinsky3UNet,
        time_embedding_dim=16,
        groups=4,
        attention_head_dim=4,
        layers_per_block=2,
        block_out_channels=(8, 16, 16, 16),
        cross_attention_dim=WIDTH,
        encoder_hid_dim=WIDTH,
    )
    scheduler = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2", thresholding=True)
    return _pipe(name, unet=unet, movq=_vq(), scheduler=scheduler)


def _deepfloyd(name: str, *, scale: int = 1) -> Any:
    more = {"in_channels": 3 * scale, "out_channels": 6, "sample_size": 16 * scale} | (
        {"class_embed_type": "timestep"} if scale > 1 else {}
    )
    unet = _unet(
        **SIMPLE
        | {
            "encoder_hid_dim_type": "text_proj",
            "addition_embed_type": "text",
            "addition_embed_type_num_heads": 2,
            "cross_attention_norm": "group_norm",
            "cross_attention_dim": 32,
            "resnet_skip_time_act": True,
            "resnet_out_scale_factor": 1.414,
            "act_fn": "gelu",
            "time_embedding_act_fn": "gelu",
        }
        | more
    )
    noising = {"beta_schedule": "squaredcos_cap_v2", "variance_type": "learned_range", "thresholding": True}
    parts = {"unet": unet, "scheduler": diffusers.DDPMScheduler(**noising)}
    if scale > 1:
        parts["image_noising_scheduler"] = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    return _pipe(name, **parts)


def _unet_pixels(**more: Any) -> nn.Module:
    config = {
        "sample_size": 8,
        "block_out_channels": (8, 16, 16),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 4,
    }
    return _make(diffusers.UNet2DModel, **config | more)


def _pixels(name: str, scheduler: Callable[[], Any], **parts: Any) -> Any:
    return _pipe(name, **{"unet": _unet_pixels(), "scheduler": scheduler()} | parts)


def _plain(*, steps: int = STEPS, **more: Any) -> Callable[[], dict[str, Any]]:
    return _call(**{"num_inference_steps": steps, "output_type": "np"} | more)


def _ldm_text(name: str) -> Any:
    return _pipe(name, vqvae=_vae(), unet=_unet(), bert=_clip(), tokenizer=Words(), scheduler=_ddim())


def _stable_unclip(name: str, **parts: Any) -> Any:
    from diffusers.pipelines.stable_diffusion import StableUnCLIPImageNormalizer

    unet = _unet(class_embed_type="projection", projection_class_embeddings_input_dim=2 * WIDTH)
    noising = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    normalizer = _make(StableUnCLIPImageNormalizer, embedding_dim=WIDTH)
    return _worded(name, unet=unet, image_normalizer=normalizer, image_noising_scheduler=noising, **parts)


def _stable_unclip_prior(name: str) -> Any:
    wanted = {"prior", "prior_scheduler", "prior_text_encoder", "prior_tokenizer"}
    parts = _prior_parts() | _prior_parts("prior_")
    return _stable_unclip(name, **{key: part for key, part in parts.items() if key in wanted})


def _unclip(name: str) -> Any:
    from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel

    config = {key: value for key, value in SIMPLE.items() if key != "encoder_hid_dim"}
    # Were there as many pixels at some level as tokens (16), the decoder's mask would not be extended to both.
    config |= {"sample_size": 12, "in_channels": 3, "out_channels": 6, "class_embed_type": "identity"}
    decoder = _unet(**config)
    larger = {"sample_size": 16, "in_channels": 6, "out_channels": 3}
    prior = _prior_parts()
    parts = {
        "decoder": decoder,
        "text_encoder": prior["text_encoder"],
        "tokenizer": Words(),
        "text_proj": _make(
            UnCLIPTextProjModel, time_embed_dim=32, clip_embeddings_dim=WIDTH, cross_attention_dim=WIDTH
        ),
        "super_res_first": _unet_pixels(**larger),
        "super_res_last": _unet_pixels(**larger),
        "decoder_scheduler": diffusers.UnCLIPScheduler(variance_type="learned_range"),
        "super_res_scheduler": diffusers.UnCLIPScheduler(),
    }
    if name == "UnCLIPPipeline":
        parts |= {"prior": prior["prior"], "prior_scheduler": prior["scheduler"]}
    else:
        parts |= {"image_encoder": prior["image_encoder"], "feature_extractor": prior["image_processor"]}
    return _pipe(name, **parts)


def _paint_by_example(name: str) -> Any:
    from diffusers.pipelines.deprecated.paint_by_example.image_encoder import PaintByExampleImageEncoder

    encoder = _from_config(PaintByExampleImageEncoder, _clip_vision().config)
    return _sd(name, channels=9, image_encoder=encoder)


def _marigold(name: str, *, targets: int = 1, **more: Any) -> Any:
    return _worded(name, unet=_unet(in_channels=4 + 4 * targets, out_channels=4 * targets), **more)


def _cascade(*, decoder: bool = False) -> nn.Module:
    config = {
        "in_channels": 4,
        "out_channels": 4,
        "timestep_ratio_embedding_dim": 8,
        "conditioning_dim": WIDTH,
        "block_out_channels": (8, 16),
        "num_attention_heads": (2, 2),
        "down_num_layers_per_block": (1, 2),
        "up_num_layers_per_block": (2, 1),
        "clip_text_pooled_in_channels": WIDTH,
        "clip_seq": 2,
        "dropout": (0.0, 0.0),
    }
    if decoder:
        config |= {"patch_size": 2, "effnet_in_channels": 4, "timestep_conditioning_type": ("sca",)}
    else:
        config |= {"clip_text_in_channels": WIDTH, "clip_image_in_channels": WIDTH, "switch_level": (False,)}
    return _make(diffusers.StableCascadeUNet, **config)


def _cascade_prior(name: str) -> Any:
    text = _clip("CLIPTextModelWithProjection")
    return _pipe(name, prior=_cascade(), text_encoder=text, scheduler=diffusers.DDPMWuerstchenScheduler())


def _cascade_decoder(name: str) -> Any:
    return _pipe(name, decoder=_cascade(decoder=True), scheduler=diffusers.DDPMWuerstchenScheduler(), vqgan=_paella())


def _cascade_combined(name: str) -> Any:
    prior = {"prior_prior": _cascade(), "prior_scheduler": diffusers.DDPMWuerstchenScheduler()}
    decoder = {"decoder": _cascade(decoder=True), "scheduler": diffusers.DDPMWuerstchenScheduler()}
    text = _clip("CLIPTextModelWithProjection")
    return _pipe(name, vqgan=_paella(), text_encoder=text, prior_text_encoder=text, **prior, **decoder)


def _paella() -> nn.Module:
    from diffusers.pipelines.deprecated.wuerstchen.modeling_paella_vq_model import PaellaVQModel

    return _make(PaellaVQModel, bottleneck_blocks=1, embed_dim=8, num_vq_embeddings=8)


def _wuerstchen_parts() -> tuple[dict[str, Any], dict[str, Any]]:
    """The components of the prior and of the decoder."""
    from diffusers.pipelines.deprecated.wuerstchen.modeling_wuerstchen_diffnext import WuerstchenDiffNeXt
    from diffusers.pipelines.deprecated.wuerstchen.modeling_wuerstchen_prior import WuerstchenPrior

    text = {"text_encoder": _clip(), "tokenizer": Words()}
    sizes = {"c_in": 4, "c_cond": WIDTH, "c_r": 8, "dropout": 0.0}
    prior = _make(WuerstchenPrior, c=16, depth=3, nhead=2, **sizes)
    decoder = _make(
        WuerstchenDiffNeXt,
        c_hidden=[8, 16],
        nhead=[-1, 2],
        blocks=[1, 2],
        level_config=["CT", "CTA"],
        inject_effnet=[False, True],
        effnet_embd=4,
        clip_embd=WIDTH,
        **sizes,
    )
    first, second = (text | {"scheduler": diffusers.DDPMWuerstchenScheduler()} for _ in range(2))
    return first | {"prior": prior}, second | {"decoder": decoder, "vqgan": _paella()}


def _wuerstchen_combined(name: str) -> Any:
    prior, decoder = _wuerstchen_parts()
    return _pipe(name, **{f"prior_{key}": part for key, part in prior.items()}, **decoder)


def _motion() -> nn.Module:
    return _make(
        diffusers.MotionAdapter,
        block_out_channels=(8, 16, 16),
        motion_layers_per_block=1,
        motion_num_attention_heads=2,
        motion_norm_num_groups=4,
        motion_max_seq_length=8,
    )


def _animate(name: str, **parts: Any) -> Any:
    scheduler = partial(diffusers.DDIMScheduler, beta_schedule="linear", clip_sample=False, steps_offset=1)
    pipe = _sd(name, motion_adapter=_motion(), scheduler=scheduler, **parts)
    randomise_zeros(pipe.unet)
    return pipe


def _animate_control(name: str) -> Any:
    return _animate(name, controlnet=_controlnet())


def _sparse(name: str) -> Any:
    blocks = ("CrossAttnDownBlockMotion", "CrossAttnDownBlockMotion", "DownBlockMotion")
    more = {"motion_num_attention_heads": 2, "motion_max_seq_length": 8, "down_block_types": blocks}
    # Of frames as they are: otherwise the pipeline encodes them with noise that no generator determines.
    more |= {"conditioning_channels": 3, "use_simplified_condition_embedding": False}
    return _animate(name, controlnet=_controlnet("SparseControlNetModel", **more))


def _animate_xl(name: str) -> Any:
    pipe = _sdxl(name, motion_adapter=_motion())
    randomise_zeros(pipe.unet)
    return pipe


def _unet_video(cls: str, **more: Any) -> nn.Module:
    blocks = ("CrossAttnDownBlock3D", "CrossAttnDownBlock3D", "DownBlock3D")
    config = {
        "sample_size": 8,
        "block_out_channels": (8, 16, 16),
        "down_block_types": blocks,
        "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D", "CrossAttnUpBlock3D"),
        "layers_per_block": 1,
        "cross_attention_dim": WIDTH,
        "norm_num_groups": 4,
        "attention_head_dim": 4,
    }
    return _make(getattr(diffusers, cls), **config | more)


def _i2vgen(name: str) -> Any:
    unet = _unet_video("I2VGenXLUNet")
    return _worded(name, unet=unet, image_encoder=_clip_vision(), feature_extractor=_clip_pixels())


def _seen(size: int) -> dict[str, Any]:
    return {"image_encoder": _clip_vision(size), "feature_extractor": _clip_pixels(size)}


def _svd(name: str) -> Any:
    unet = _make(
        diffusers.UNetSpatioTemporalConditionModel,
        sample_size=8,
        block_out_channels=(32, 64, 64),
        down_block_types=("CrossAttnDownBlockSpatioTemporal",) * 2 + ("DownBlockSpatioTemporal",),
        up_block_types=("UpBlockSpatioTemporal",) + ("CrossAttnUpBlockSpatioTemporal",) * 2,
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        num_attention_heads=(2, 4, 4),
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24,
        num_frames=3,
    )
    vae = _make(
        diffusers.AutoencoderKLTemporalDecoder,
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        sample_size=16,
    )
    sigmas = {"sigma_min": 0.002, "sigma_max": 700.0, "use_karras_sigmas": True, "timestep_type": "continuous"}
    scheduler = diffusers.EulerDiscreteScheduler(**sigmas, timestep_spacing="leading", prediction_type="v_prediction")
    return _pipe(name, unet=unet, vae=vae, scheduler=scheduler, **_seen(224))


def _audio_parts() -> dict[str, Any]:
    config = transformers.SpeechT5HifiGanConfig(
        model_in_dim=16,
        upsample_initial_channel=8,
        upsample_rates=[2, 2],
        upsample_kernel_sizes=[4, 4],
        resblock_kernel_sizes=[3],
        resblock_dilation_sizes=[[1]],
        normalize_before=False,
    )
    vocoder = _from_config(transformers.SpeechT5HifiGan, config)
    return {"vae": _vae(in_channels=1, out_channels=1), "vocoder": vocoder, "scheduler": _ddim()}


def _clap() -> nn.Module:
    sizes = {key: value for key, value in TEXT.items() if not key.endswith("_id")}
    return _from_config(transformers.ClapTextModelWithProjection, transformers.ClapTextConfig(**sizes))


def _audioldm(name: str) -> Any:
    unet = _unet(
        class_embed_type="simple_projection",
        projection_class_embeddings_input_dim=WIDTH,
        class_embeddings_concat=True,
        cross_attention_dim=(8, 16, 16),
    )
    return _pipe(name, unet=unet, text_encoder=_clap(), **_audio_parts())


def _audioldm2(name: str) -> Any:
    unet = _make(
        diffusers.AudioLDM2UNet2DConditionModel,
        sample_size=8,
        block_out_channels=(8, 16, 16),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=((None, WIDTH, WIDTH),) * 3,
        norm_num_groups=4,
        attention_head_dim=2,
    )
    return _pipe(name, unet=unet, text_encoder_2=_clip(), language_model=_clip(), **_audio_parts())


POOLED = {"prompt_embeds": _noise(1, WIDTH), "negative_prompt_embeds": _noise(1, WIDTH, seed=1)}
AUDIO = {
    "generated_prompt_embeds": _noise(1, 3, WIDTH),
    "negative_generated_prompt_embeds": _noise(1, 3, WIDTH, seed=1),
    "attention_mask": torch.ones(1, TOKENS, dtype=torch.long),
    "negative_attention_mask": torch.ones(1, TOKENS, dtype=torch.long),
}
BLIP = {
    "prompt": ["by a lake"],
    "reference_image": _pil(),
    "source_subject_category": ["fox"],
    "target_subject_category": ["cat"],
    "num_inference_steps": STEPS,
    "height": 32,
    "width": 32,
    "prompt_reps": 1,
    "output_type": "np",
}
CASCADE = {"prompt_embeds_pooled": _noise(1, 1, WIDTH), "negative_prompt_embeds_pooled": _noise(1, 1, WIDTH, seed=1)}
FRAMES = [_pil(seed=seed) for seed in range(3)]
TARGETS = {
    "target_names": ["albedo", "roughness"],
    "albedo": {"prediction_space": "linear", "up_to_scale": False},
    "roughness": {"prediction_space": "linear", "up_to_scale": False},
}
MASKS = {"attention_mask": torch.ones(1, TOKENS), "negative_attention_mask": torch.ones(1, TOKENS)}
HINTED = partial(_kandinsky2, channels=8, embed="image_hint")
HOLE = {"image": _pil(), "mask_image": _mask()[0, 0].numpy()}
IMAGE_EMBEDS = {"image_embeds": _noise(1, WIDTH), "negative_image_embeds": _noise(1, WIDTH, seed=1)}
SMALL = {"height": 16, "width": 16, "output_type": "pt"}


def _gligen_seen(name: str) -> Any:
    seen = {"image_encoder": _clip_vision(), "processor": _clip_pixels()}
    project = _make(diffusers.pipelines.stable_diffusion.CLIPImageProjection, hidden_size=WIDTH)
    return _gligen(name, "gated-text-image", image_project=project, **seen)


GLIGEN = {
    "gligen_phrases": ["fox"],
    "gligen_boxes": [[0.1, 0.1, 0.6, 0.6]],
    "gligen_scheduled_sampling_beta": 0.5,
}
IMAGE = {"image": _picture()}
MASKED = {"image": _picture(), "mask_image": _mask()}
CONTROL = {"image": _picture()}
IMAGE_CONTROL = {"image": _picture(), "control_image": _picture()}
MASKED_CONTROL = MASKED | {"control_image": _picture()}

CASES = [
    # Stable Diffusion 1 and 2. PLMS runs its second step twice.
    _case("StableDiffusionPipeline", partial(_sd, scheduler=_pndm), _text(), STEPS + 1),
    _case("StableDiffusionImg2ImgPipeline", _sd, _text(**IMAGE, strength=0.75), 3),
    _case("StableDiffusionInpaintPipeline", partial(_sd, channels=9), _text(**MASKED, height=16, width=16), STEPS),
    _case("StableDiffusionInpaintPipeline", _sd, _text(**MASKED, strength=0.75), 3, variant="4-channels"),
    _case("StableDiffusionDepth2ImgPipeline", partial(_sd, channels=5), _text(**IMAGE, depth_map=_picture()[:, 0]), 3),
    _case("StableDiffusionInstructPix2PixPipeline", partial(_sd, channels=8), _text(**IMAGE), STEPS),
    _case("StableDiffusionControlNetPipeline", _sd_control, _text(**CONTROL), STEPS),
    _case("StableDiffusionControlNetImg2ImgPipeline", _sd_control, _text(**IMAGE_CONTROL, strength=0.75), 3),
    _case("StableDiffusionControlNetInpaintPipeline", _sd_control, _text(**MASKED_CONTROL), STEPS),
    _case("StableDiffusionAdapterPipeline", lambda name: _sd(name, adapter=_adapter()), _text(**IMAGE), STEPS),
    _case("StableDiffusionPAGPipeline", _sd, _text(), STEPS),
    _case("StableDiffusionPAGImg2ImgPipeline", _sd, _text(**IMAGE, strength=0.75), 3),
    _case("StableDiffusionPAGInpaintPipeline", _sd, _text(**MASKED, strength=0.75), 3),
    _case("StableDiffusionControlNetPAGPipeline", _sd_control, _text(**CONTROL), STEPS),
    _case("StableDiffusionControlNetPAGInpaintPipeline", _sd_control, _text(**MASKED_CONTROL), STEPS),
    # A call for each of two views, and a step of the scheduler
    _case("StableDiffusionPanoramaPipeline", _panorama, _text(height=64, width=576), STEPS, 2),
    # The second call takes the latents blurred where the first one looked.
    _case("StableDiffusionSAGPipeline", _sd, _text(), STEPS, 2),
    _case(
        "StableDiffusionLDM3DPipeline",
        lambda name: _sd(name, vae=_vae(in_channels=6, out_channels=6)),
        _text(output_type="np"),
        STEPS,
    ),
    _case(
        "StableDiffusionUpscalePipeline",
        _upscale,
        _text(**IMAGE),
        STEPS,
    ),
    _case("StableDiffusionLatentUpscalePipeline", _latent_upscale, _pooled(image=_noise(1, 4, 8, 8)), STEPS),
    _case(
        "StableDiffusionImageVariationPipeline",
        lambda name: _sd(name, image_encoder=_clip_vision()),
        _call(**IMAGE, num_inference_steps=STEPS, output_type="latent"),
        STEPS,
    ),
    _case(
        "StableDiffusionGLIGENPipeline",
        _gligen,
        _words(**GLIGEN),
        STEPS,
    ),
    _case("StableDiffusionGLIGENTextImagePipeline", _gligen_seen, _words(**GLIGEN, gligen_images=[_pil()]), STEPS, 2),
    _case(
        "StableDiffusionAttendAndExcitePipeline",
        _worded,
        _words(token_indices=[2], thresholds={}, attn_res=(8, 8)),
        STEPS,
        2,
    ),
    _case("StableDiffusionPipelineSafe", _worded, _words(), STEPS),
    _case("SemanticStableDiffusionPipeline", _worded, _words(editing_prompt=["smiling"], edit_warmup_steps=1), STEPS),
    _case(
        "StableDiffusionDiffEditPipeline",
        lambda name: _sd(name, inverse_scheduler=diffusers.DDIMInverseScheduler()),
        _text(mask_image=_mask(8)[0], image_latents=_noise(1, 3, 4, 8, 8), inpaint_strength=0.75),
        3,
    ),
    _case("StableDiffusionInpaintPipelineLegacy", _sd, _text(**MASKED, strength=0.75), 3),
    _case("StableDiffusionModelEditingPipeline", _worded, _text(), STEPS),
    _case(
        "StableDiffusionParadigmsPipeline",
        lambda name: _sd(name, scheduler=lambda: diffusers.DDIMParallelScheduler(**SD_BETAS, clip_sample=False)),
        _text(parallel=2),
        STEPS,
    ),
    _case(
        "CycleDiffusionPipeline", _worded, _words(source_prompt="a grey fox", negative=False, **IMAGE, strength=0.75), 3
    ),
    _case(
        "StableDiffusionPix2PixZeroPipeline",
        _worded,
        _words(source_embeds=_noise(1, 12, WIDTH), target_embeds=_noise(1, 12, WIDTH, seed=3)),
        3 * STEPS,
        variant="two-loops",
    ),
    _case("LEditsPPPipelineStableDiffusion", _ledits, _call(editing_prompt=["a smile"], output_type="latent"), STEPS),
    _case("StableDiffusionControlNetXSPipeline", _sd_xs, _text(**CONTROL), STEPS),
    _case("StableDiffusionXLControlNetXSPipeline", _sdxl_xs, _pooled(**CONTROL), STEPS),
    _case(
        "LatentConsistencyModelPipeline",
        lambda name: _sd(name, unet=_unet(time_cond_proj_dim=8), scheduler=diffusers.LCMScheduler),
        _text(negative=False),
        STEPS,
    ),
    _case(
        "LatentConsistencyModelImg2ImgPipeline",
        lambda name: _sd(name, unet=_unet(time_cond_proj_dim=8), scheduler=diffusers.LCMScheduler),
        _text(**IMAGE, strength=0.75, negative=False),
        STEPS,
    ),
    # One class, used in other ways
    _case("StableDiffusionPipeline", HEUN, _text(), 2 * STEPS - 1, variant="heun"),
    _case("StableDiffusionImg2ImgPipeline", HEUN, _text(**IMAGE, strength=0.75), 5, variant="heun"),
    _case("StableDiffusionPipeline", SOLVER, _text(steps=6), 6, variant="dpm"),
    _case("StableDiffusionPipeline", _sd, _text(num_images_per_prompt=2), STEPS, variant="two-images"),
    _case("StableDiffusionPipeline", _sd, _text(guidance_scale=1.0), STEPS, variant="unguided"),
    _case("StableDiffusionPipeline", _sd, _text(**STOPPED), STEPS, variant="guidance-stops"),
    _case("StableDiffusionPipeline", _freeu, _text(), STEPS, variant="freeu"),
    _case("StableDiffusionControlNetPipeline", _sd_control, _text(**CONTROL, guess_mode=True), STEPS, variant="guess"),
    _case(
        "StableDiffusionControlNetPipeline",
        _sd_control,
        _text(**CONTROL, control_guidance_end=0.5),
        STEPS,
        variant="half",
    ),
    # Nine views, two in a call and one in the last
    _case(
        "StableDiffusionPanoramaPipeline",
        _panorama,
        _text(height=64, width=576, view_batch_size=2, circular_padding=True),
        STEPS,
        5,
        variant="circular",
    ),
    _case("StableDiffusionXLPipeline", _sdxl, _pooled(denoising_end=0.5), 2, variant="first-half"),
    _case("StableDiffusionXLImg2ImgPipeline", _sdxl, _pooled(**IMAGE, denoising_start=0.5), 2, variant="second-half"),
    _case("StableDiffusionXLImg2ImgPipeline", _refiner, _pooled(**IMAGE, strength=0.75), 3, variant="refiner"),
    _case("AnimateDiffPipeline", _free_init, _text(num_frames=3), 2 * STEPS, variant="free-init"),
    _case("AnimateDiffPipeline", _free_noise, _words(num_frames=6), STEPS, variant="free-noise"),
    # Kolors
    _case("KolorsPipeline", _kolors, _pooled(), STEPS),
    _case(
        "KolorsImg2ImgPipeline",
        _kolors_worded,
        _words(**IMAGE, strength=0.75),
        3,
    ),
    _case("KolorsPAGPipeline", partial(_kolors, module="pag.pipeline_pag_kolors"), _pooled(), STEPS),
    # Kandinsky
    _case("KandinskyPriorPipeline", _prior, _words(output_type="pt"), STEPS),
    _case("KandinskyPipeline", _kandinsky, _words(**IMAGE_EMBEDS, **SMALL), STEPS),
    _case("KandinskyImg2ImgPipeline", _kandinsky, _words(**IMAGE_EMBEDS, **SMALL, image=_pil(), strength=0.75), 3),
    _case(
        "KandinskyInpaintPipeline",
        partial(_kandinsky, channels=9),
        _words(**IMAGE_EMBEDS, **SMALL, **HOLE),
        STEPS,
    ),
    _case("KandinskyCombinedPipeline", _combined(_kandinsky), _words(**SMALL, prior_num_inference_steps=3), STEPS + 3),
    _case("KandinskyV22PriorPipeline", _prior, _words(output_type="pt"), STEPS),
    _case(
        "KandinskyV22PriorEmb2EmbPipeline", _prior, _words(output_type="pt", image=_noise(1, WIDTH), strength=0.75), 3
    ),
    _case("KandinskyV22Pipeline", _kandinsky2, _plain(**IMAGE_EMBEDS | SMALL), STEPS),
    _case(
        "KandinskyV22Img2ImgPipeline", _kandinsky2, _plain(**IMAGE_EMBEDS | SMALL, image=_picture(), strength=0.75), 3
    ),
    _case(
        "KandinskyV22InpaintPipeline",
        partial(_kandinsky2, channels=9),
        _plain(**IMAGE_EMBEDS | SMALL, **HOLE),
        STEPS,
    ),
    _case(
        "KandinskyV22ControlnetPipeline",
        HINTED,
        _plain(**IMAGE_EMBEDS | SMALL, hint=_picture(64)),
        STEPS,
    ),
    _case(
        "KandinskyV22ControlnetImg2ImgPipeline",
        HINTED,
        _plain(**IMAGE_EMBEDS | SMALL, image=_picture(), hint=_picture(64), strength=0.75),
        3,
    ),
    _case(
        "KandinskyV22CombinedPipeline", _combined(_kandinsky2), _words(**SMALL, prior_num_inference_steps=3), STEPS + 3
    ),
    _case("Kandinsky3Pipeline", _kandinsky3, _text(**MASKS, height=64, width=64), STEPS),
    _case("Kandinsky3Img2ImgPipeline", _kandinsky3, _text(**MASKS, image=_picture(64), strength=0.75), 3),
    _case(
        "KandinskyImg2ImgCombinedPipeline",
        _combined(_kandinsky),
        _words(**SMALL, image=_pil(), strength=0.75, prior_num_inference_steps=3),
        6,
    ),
    _case(
        "KandinskyInpaintCombinedPipeline",
        _combined(partial(_kandinsky, channels=9)),
        _words(**SMALL, **HOLE, prior_num_inference_steps=3),
        STEPS + 3,
    ),
    _case(
        "KandinskyV22Img2ImgCombinedPipeline",
        _combined(_kandinsky2),
        _words(**SMALL, image=_pil(), strength=0.75, prior_num_inference_steps=3),
        6,
    ),
    _case(
        "KandinskyV22InpaintCombinedPipeline",
        _combined(partial(_kandinsky2, channels=9)),
        _words(**SMALL, **HOLE, prior_num_inference_steps=3),
        STEPS + 3,
    ),
    # DeepFloyd IF
    _case("IFPipeline", _deepfloyd, _text(output_type="pt"), STEPS),
    _case("IFImg2ImgPipeline", _deepfloyd, _text(output_type="pt", **IMAGE, strength=0.75), 3),
    _case("IFInpaintingPipeline", _deepfloyd, _text(output_type="pt", **MASKED, strength=0.75), 3),
    _case("IFSuperResolutionPipeline", partial(_deepfloyd, scale=2), _text(output_type="pt", **IMAGE), STEPS),
    _case(
        "IFImg2ImgSuperResolutionPipeline",
        partial(_deepfloyd, scale=2),
        _text(output_type="pt", **IMAGE, original_image=_picture(32), strength=0.75),
        3,
    ),
    _case(
        "IFInpaintingSuperResolutionPipeline",
        partial(_deepfloyd, scale=2),
        _text(output_type="pt", **IMAGE, original_image=_picture(32), mask_image=_mask(32), strength=0.75),
        3,
    ),
    # Pixels and small latents
    _case("DDPMPipeline", partial(_pixels, scheduler=diffusers.DDPMScheduler), _plain(), STEPS),
    _case("DDIMPipeline", partial(_pixels, scheduler=diffusers.DDIMScheduler), _plain(), STEPS),
    _case(
        "PNDMPipeline",
        partial(_pixels, scheduler=lambda: diffusers.PNDMScheduler(beta_end=0.004, skip_prk_steps=True)),
        _plain(),
        STEPS + 1,
    ),
    _case(
        "ConsistencyModelPipeline",
        partial(_pixels, scheduler=diffusers.CMStochasticIterativeScheduler),
        _plain(),
        STEPS,
    ),
    _case(
        "LDMSuperResolutionPipeline",
        lambda name: _pixels(name, _ddim, unet=_unet_pixels(in_channels=6), vqvae=_vq(latent_channels=3)),
        _plain(image=_picture(8)),
        STEPS,
    ),
    _case(
        "LDMPipeline",
        lambda name: _pixels(name, _ddim, unet=_unet_pixels(in_channels=4, out_channels=4), vqvae=_vq()),
        _plain(),
        STEPS,
    ),
    _case(
        "RePaintPipeline",
        partial(_pixels, scheduler=diffusers.RePaintScheduler),
        _plain(image=_picture(8) * 2 - 1, mask_image=_mask(8), jump_length=2, jump_n_sample=2),
        STEPS + 2,
    ),
    _case(
        "ScoreSdeVePipeline",
        partial(_pixels, scheduler=lambda: diffusers.ScoreSdeVeScheduler(sigma_max=0.1, snr=0.05)),
        _plain(),
        STEPS,
        2,
    ),
    _case(
        "LDMTextToImagePipeline",
        _ldm_text,
        _call(prompt="a fox", guidance_scale=6.0, num_inference_steps=STEPS, output_type="np"),
        STEPS,
    ),
    _case("DanceDiffusionPipeline", _dance, _call(num_inference_steps=STEPS), STEPS),
    # Heun's method: two calls in a step, but one in the last
    _case(
        "KarrasVePipeline",
        partial(_pixels, scheduler=lambda: diffusers.KarrasVeScheduler(sigma_max=1.0)),
        _plain(),
        2 * STEPS - 1,
        variant="calls",
    ),
    _case("VersatileDiffusionTextToImagePipeline", _versatile, _words(), STEPS),
    _case(
        "VersatileDiffusionImageVariationPipeline",
        _versatile,
        _call(image=_pil(), num_inference_steps=STEPS, output_type="latent"),
        STEPS,
    ),
    _case("AltDiffusionPipeline", _sd, _text(), STEPS),
    _case("AltDiffusionImg2ImgPipeline", _sd, _text(**IMAGE, strength=0.75), 3),
    _case("BlipDiffusionPipeline", _blip, _call(**BLIP), STEPS + 1),
    _case(
        "BlipDiffusionControlNetPipeline",
        lambda name: _blip(name, controlnet=_controlnet(conditioning_embedding_out_channels=(4, 8, 8))),
        _call(**BLIP, condtioning_image=_pil()),
        STEPS + 1,
    ),
    # The prior of Shap-E with Heun's method
    _case(
        "ShapEPipeline", _shap_e, _call(prompt="a fox", num_inference_steps=STEPS, output_type="latent"), 2 * STEPS - 1
    ),
    _case(
        "ShapEImg2ImgPipeline",
        _shap_e,
        _call(image=_pil(), num_inference_steps=STEPS, output_type="latent"),
        2 * STEPS - 1,
    ),
    _case("UniDiffuserPipeline", _unidiffuser, _words(negative=False, height=16, width=16), STEPS, 2),
    # unCLIP
    _case("StableUnCLIPPipeline", _stable_unclip_prior, _words(prior_num_inference_steps=3), STEPS + 3),
    _case(
        "StableUnCLIPImg2ImgPipeline",
        lambda name: _stable_unclip(name, image_encoder=_clip_vision()),
        _words(**IMAGE),
        STEPS,
    ),
    _case(
        "UnCLIPPipeline",
        _unclip,
        _call(
            prompt="a fox",
            prior_num_inference_steps=3,
            decoder_num_inference_steps=4,
            super_res_num_inference_steps=3,
            output_type="np",
        ),
        10,
    ),
    _case(
        "UnCLIPImageVariationPipeline",
        _unclip,
        _call(image=_pil(), decoder_num_inference_steps=4, super_res_num_inference_steps=3, output_type="np"),
        7,
    ),
    _case(
        "PaintByExamplePipeline",
        _paint_by_example,
        _call(**MASKED, example_image=_picture(), num_inference_steps=STEPS, output_type="latent"),
        STEPS,
    ),
    # Marigold
    _case(
        "MarigoldDepthPipeline",
        partial(_marigold, prediction_type="depth"),
        _call(**IMAGE, num_inference_steps=STEPS, processing_resolution=0, output_type="pt"),
        STEPS,
    ),
    _case(
        "MarigoldNormalsPipeline",
        partial(_marigold, prediction_type="normals"),
        _call(**IMAGE, num_inference_steps=STEPS, processing_resolution=0, output_type="pt"),
        STEPS,
    ),
    _case(
        "MarigoldIntrinsicsPipeline",
        partial(_marigold, targets=2, prediction_type="intrinsics", target_properties=TARGETS),
        _call(**IMAGE, num_inference_steps=STEPS, processing_resolution=0, output_type="pt"),
        STEPS,
    ),
    # Stable Cascade and Wuerstchen
    _case(
        "StableCascadePriorPipeline", _cascade_prior, _text(**CASCADE, height=160, width=160, output_type="pt"), STEPS
    ),
    _case(
        "StableCascadeDecoderPipeline",
        _cascade_decoder,
        _text(**CASCADE, image_embeddings=_noise(1, 4, 3, 3), guidance_scale=2.0),
        STEPS,
    ),
    _case(
        "StableCascadeCombinedPipeline",
        _cascade_combined,
        _text(**CASCADE, height=128, width=128, prior_num_inference_steps=3),
        STEPS + 3,
    ),
    _case(
        "WuerstchenPriorPipeline",
        lambda name: _pipe(name, **_wuerstchen_parts()[0]),
        _words(height=160, width=160, output_type="pt"),
        STEPS,
    ),
    _case(
        "WuerstchenDecoderPipeline",
        lambda name: _pipe(name, **_wuerstchen_parts()[1]),
        _words(image_embeddings=_noise(1, 4, 3, 3), guidance_scale=2.0),
        STEPS,
    ),
    _case(
        "WuerstchenCombinedPipeline",
        _wuerstchen_combined,
        _words(height=128, width=128, prior_num_inference_steps=3),
        STEPS + 3,
    ),
    # Video
    _case("AnimateDiffPipeline", _animate, _text(num_frames=3), STEPS),
    _case("AnimateDiffPAGPipeline", _animate, _text(num_frames=3), STEPS),
    _case("AnimateDiffSDXLPipeline", _animate_xl, _pooled(num_frames=3), STEPS),
    _case("AnimateDiffControlNetPipeline", _animate_control, _text(num_frames=3, conditioning_frames=FRAMES), STEPS),
    _case("AnimateDiffSparseControlNetPipeline", _sparse, _text(num_frames=3, conditioning_frames=FRAMES[:1]), STEPS),
    _case("AnimateDiffVideoToVideoPipeline", _animate, _text(video=FRAMES, strength=0.75), 3),
    _case(
        "AnimateDiffVideoToVideoControlNetPipeline",
        _animate_control,
        _text(video=FRAMES, conditioning_frames=FRAMES, strength=0.75),
        3,
    ),
    _case("PIAPipeline", lambda name: _animate(name, channels=9), _text(**IMAGE, num_frames=3), STEPS),
    _case(
        "TextToVideoSDPipeline",
        lambda name: _sd(name, unet=_unet_video("UNet3DConditionModel")),
        _text(num_frames=3),
        STEPS,
    ),
    _case(
        "VideoToVideoSDPipeline",
        lambda name: _sd(name, unet=_unet_video("UNet3DConditionModel")),
        _text(video=FRAMES, strength=0.75),
        3,
    ),
    _case("I2VGenXLPipeline", _i2vgen, _globally(_text(image=_pil(), num_frames=3, height=16, width=16)), STEPS),
    _case(
        "StableVideoDiffusionPipeline",
        _svd,
        _call(image=_pil(), height=16, width=16, num_inference_steps=STEPS, output_type="latent"),
        STEPS,
    ),
    _case(
        "TextToVideoZeroPipeline",
        _worded,
        _call(prompt="a fox", video_length=2, num_inference_steps=5, t0=1, t1=2, output_type="latent"),
        6,
        variant="two-passes",
    ),
    _case(
        "TextToVideoZeroSDXLPipeline",
        _worded_xl,
        _call(prompt="a fox", video_length=2, num_inference_steps=5, t0=1, t1=2, output_type="latent"),
        6,
        variant="two-passes",
    ),
    # Audio
    _case("AudioLDMPipeline", _audioldm, _call(**POOLED, num_inference_steps=STEPS), STEPS),
    _case("MusicLDMPipeline", _audioldm, _call(**POOLED, num_inference_steps=STEPS, output_type="latent"), STEPS),
    _case("AudioLDM2Pipeline", _audioldm2, _text(**AUDIO), STEPS),
    # Stable Diffusion XL
    _case("StableDiffusionXLPipeline", _sdxl, _pooled(), STEPS),
    _case("StableDiffusionXLImg2ImgPipeline", _sdxl, _pooled(**IMAGE, strength=0.75), 3),
    _case("StableDiffusionXLInpaintPipeline", partial(_sdxl, channels=9), _pooled(**MASKED, strength=0.75), 3),
    _case("StableDiffusionXLInstructPix2PixPipeline", partial(_sdxl, channels=8), _pooled(**IMAGE), STEPS),
    _case("StableDiffusionXLControlNetPipeline", _sdxl_control, _pooled(**CONTROL), STEPS),
    _case("StableDiffusionXLControlNetImg2ImgPipeline", _sdxl_control, _pooled(**IMAGE_CONTROL, strength=0.75), 3),
    _case("StableDiffusionXLControlNetInpaintPipeline", _sdxl_control, _pooled(**MASKED_CONTROL, strength=0.75), 3),
    _case(
        "StableDiffusionXLControlNetUnionPipeline",
        _sdxl_union,
        _pooled(control_image=[_picture()], control_mode=[3]),
        STEPS,
    ),
    _case(
        "StableDiffusionXLControlNetUnionImg2ImgPipeline",
        _sdxl_union,
        _pooled(**IMAGE, control_image=[_picture()], control_mode=[3], strength=0.75),
        3,
    ),
    _case(
        "StableDiffusionXLControlNetUnionInpaintPipeline",
        _sdxl_union,
        _pooled(**MASKED, control_image=[_picture()], control_mode=[3], strength=0.75),
        3,
    ),
    _case(
        "LEditsPPPipelineStableDiffusionXL", _ledits_xl, _call(editing_prompt=["a smile"], output_type="latent"), STEPS
    ),
    _case("StableDiffusionXLAdapterPipeline", lambda name: _sdxl(name, adapter=_adapter_xl()), _pooled(**IMAGE), STEPS),
    _case("StableDiffusionXLPAGPipeline", _sdxl, _pooled(), STEPS),
    _case("StableDiffusionXLPAGImg2ImgPipeline", _sdxl, _pooled(**IMAGE, strength=0.75), 3),
    _case("StableDiffusionXLPAGInpaintPipeline", _sdxl, _pooled(**MASKED, strength=0.75), 3),
    _case("StableDiffusionXLControlNetPAGPipeline", _sdxl_control, _pooled(**CONTROL), STEPS),
    _case("StableDiffusionXLControlNetPAGImg2ImgPipeline", _sdxl_control, _pooled(**IMAGE_CONTROL, strength=0.75), 3),
]

SKIPPED = {
    "VersatileDiffusionDualGuidedPipeline": "its DualTransformer2DModel takes no encoder_attention_mask, which the "
    "UNet's blocks pass to it: the pipeline cannot run in this version of diffusers",
    "VersatileDiffusionPipeline": "has no loop of its own: it makes one of the other three",
}
