"""Denoisers of published models at full size with random weights: for speed, where quality is no question.

The configurations are those of the models' own `config.json` (values that diffusers' class has as its default are left
out where they agree). Weights are made on the device, so a 12-billion-parameter model never passes through host memory.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..registry import unknown_name

Inputs = dict[str, Any]
Branches = tuple[str, ...]

TRAIN_TIMESTEPS = 1000
# linear layers that make shifts, scales and gates from the noise level: undamped, random ones blow the residuals up
MODULATION = re.compile(r"(^|\.)(norm\w*\.linear|adaln_single\.linear|time_proj)$")
MODULATION_SCALE = 0.1
EMBEDDING_STD = 0.02


@dataclass(frozen=True)
class Draw:
    """Reproducible normal noise on one device."""

    device: torch.device
    dtype: torch.dtype
    generator: torch.Generator

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device, dtype=self.dtype)


@dataclass(frozen=True)
class Architecture:
    """One published denoiser: how to build it, and what it is called with.

    denoiser: diffusers' class. config: its published configuration; tiny_config: what differs in a model of the same
    structure that runs on a CPU in milliseconds. parameters: of the full size, in diffusers' class.
    steps: usual number of sampler steps. latent: one sample, [c, h, w] or [c, frames, h, w], at the usual size.
    tokens: of the text. passes: the guidance branches of a step, one entry a denoiser call; several names in one
    entry are groups of batch rows of one call. guidance: usual scale, 1.0 where there is one branch.
    conditions: the arguments of a call beside the latents and the timestep, from (architecture's configuration, draw,
    tokens, samples, branches).
    """

    name: str
    denoiser: str
    config: Mapping[str, Any]
    tiny_config: Mapping[str, Any]
    parameters: int
    steps: int
    latent: tuple[int, ...]
    tiny_latent: tuple[int, ...]
    tokens: int
    passes: tuple[Branches, ...]
    guidance: float
    conditions: Callable[[Mapping[str, Any], Draw, int, int, Branches], Inputs]
    sample: str = "hidden_states"

    @property
    def rows(self) -> int:
        """Batch rows that one sample takes in a call."""
        return len(self.passes[0])

    def settings(self, tiny: bool = False) -> dict[str, Any]:
        """The configuration of the full-size or the tiny model."""
        return {**self.config, **(self.tiny_config if tiny else {})}

    def build(
        self,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        tiny: bool = False,
        seed: int = 0,
    ) -> nn.Module:
        """The denoiser in eval mode with random weights that were made on the device; on "meta" without values.

        Modules that diffusers keeps in float32 when it loads a model in half precision are in float32 here too.
        """
        import diffusers
        from accelerate import init_empty_weights

        device = torch.device(device)
        with init_empty_weights(include_buffers=False):
            denoiser = getattr(diffusers, self.denoiser)(**self.settings(tiny))
        wide = set(getattr(denoiser, "_keep_in_fp32_modules", None) or ())
        generator = None if device.type == "meta" else torch.Generator(device).manual_seed(seed)
        for path, module in denoiser.named_modules():
            keep = bool(wide & set(path.split(".")))
            for name, empty in module._parameters.items():
                if empty is None:
                    continue
                kind = torch.float32 if keep or name in wide else dtype
                weight = torch.empty(empty.shape, device=device, dtype=kind)
                if generator is not None:
                    _fill(weight, path, name, module, generator)
                module._parameters[name] = nn.Parameter(weight, requires_grad=False)
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    stored = name not in module._non_persistent_buffers_set and buffer.is_floating_point()
                    module._buffers[name] = buffer.to(device, dtype if stored and not keep else buffer.dtype)
        return denoiser.eval()

    def calls(
        self,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        batch: int = 1,
        tiny: bool = False,
        seed: int = 0,
        latent: tuple[int, ...] | None = None,
    ) -> list[Inputs]:
        """Keyword arguments of the first step's denoiser calls, one entry for each of its passes.

        latent: shape of one sample, where another than the usual size is wanted.

        Raises:
            ConfigError: for batch < 1, or a latent of other dimensions.
        """
        usual = self.tiny_latent if tiny else self.latent
        latent = latent or usual
        if batch < 1:
            raise ConfigError(f"batch must be at least 1, not {batch}")
        if len(latent) != len(usual) or latent[0] != usual[0]:
            raise ConfigError(f"a latent of {self.name} has the shape of {list(usual)}, not {list(latent)}")
        device = torch.device(device)
        draw = Draw(device, dtype, torch.Generator(device).manual_seed(seed))
        noise = draw(batch, *latent)
        tokens = min(self.tokens, 16) if tiny else self.tokens
        config = self.settings(tiny)
        calls = []
        for branches in self.passes:
            call = self.conditions(config, draw, tokens, batch, branches)
            given, ids = _packed(noise) if "img_ids" in call else (noise, None)
            if ids is not None:
                call["img_ids"] = ids
            # guidance branches of one call start from the same noise, as pipelines stack them
            call[self.sample] = torch.cat([given] * len(branches))
            call["return_dict"] = False
            calls.append(call)
        return [{**call, "timestep": self._timestep(call, 0, 1)} for call in calls]

    def advance(self, calls: Sequence[Inputs], outputs: Sequence[Tensor], step: int, steps: int) -> list[Inputs]:
        """The calls of step + 1 of `steps`, from the outputs of this step's: guidance, then an Euler step.

        Nothing is read back from the device. Only the time it takes is like a sampler's: the weights are random.
        """
        branches: dict[str, Tensor] = {}
        for names, output in zip(self.passes, outputs, strict=True):
            branches.update(zip(names, output.chunk(len(names)), strict=True))
        guided = branches["positive"]
        if "negative" in branches:
            guided = torch.lerp(branches["negative"], guided, self.guidance)
        latents = calls[0][self.sample].chunk(self.rows)[0]
        guided = guided[:, : latents.shape[1]]  # the others are a learned variance
        latents = torch.sub(latents, guided.to(latents.dtype), alpha=1 / steps)
        return [
            {
                **call,
                self.sample: torch.cat([latents] * len(names)),
                "timestep": self._timestep(call, step + 1, steps),
            }
            for names, call in zip(self.passes, calls, strict=True)
        ]

    def _timestep(self, call: Inputs, step: int, steps: int) -> Tensor:
        latents = call[self.sample]
        value = TRAIN_TIMESTEPS * (1 - step / steps)
        if "img_ids" in call:  # FluxPipeline passes sigmas in the latents' dtype
            return latents.new_full((len(latents),), value / TRAIN_TIMESTEPS)
        return torch.full((len(latents),), value, device=latents.device)


def _fill(weight: Tensor, path: str, name: str, module: nn.Module, generator: torch.Generator) -> None:
    """Random values, none of them zero where training would start at zero, with outputs of about unit variance."""
    if name == "bias":
        weight.zero_()
    elif weight.ndim == 1:  # of norms
        weight.fill_(1.0)
    elif isinstance(module, nn.Embedding):
        weight.normal_(std=EMBEDDING_STD, generator=generator)
    elif name == "weight":
        scale = MODULATION_SCALE if MODULATION.search(path) else 1.0
        weight.normal_(std=scale / math.sqrt(weight[0].numel()), generator=generator)
    else:  # tables of shifts and scales
        weight.normal_(std=MODULATION_SCALE / math.sqrt(weight.shape[-1]), generator=generator)


def _packed(latents: Tensor) -> tuple[Tensor, Tensor]:
    """Latents [b, c, h, w] as FLUX takes them, [b, hw/4, 4c], and the position of each token [hw/4, 3]."""
    from diffusers import FluxPipeline

    b, c, h, w = latents.shape
    ids = FluxPipeline._prepare_latent_image_ids(b, h // 2, w // 2, latents.device, latents.dtype)
    return FluxPipeline._pack_latents(latents, b, c, h, w), ids


def _flux(config: Mapping[str, Any], draw: Draw, tokens: int, batch: int, branches: Branches) -> Inputs:
    return {
        "encoder_hidden_states": draw(batch, tokens, config["joint_attention_dim"]),
        "pooled_projections": draw(batch, config["pooled_projection_dim"]),
        "guidance": torch.full((batch,), 3.5, device=draw.device),
        "txt_ids": torch.zeros(tokens, 3, device=draw.device, dtype=draw.dtype),
        "img_ids": None,  # follow from the latents
    }


def _sd3(config: Mapping[str, Any], draw: Draw, tokens: int, batch: int, branches: Branches) -> Inputs:
    rows = batch * len(branches)
    return {
        "encoder_hidden_states": draw(rows, tokens, config["joint_attention_dim"]),
        "pooled_projections": draw(rows, config["pooled_projection_dim"]),
    }


def _pixart(config: Mapping[str, Any], draw: Draw, tokens: int, batch: int, branches: Branches) -> Inputs:
    rows = batch * len(branches)
    return {
        "encoder_hidden_states": draw(rows, tokens, config["caption_channels"]),
        "encoder_attention_mask": torch.ones(rows, tokens, device=draw.device, dtype=torch.int64),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def _wan(config: Mapping[str, Any], draw: Draw, tokens: int, batch: int, branches: Branches) -> Inputs:
    return {"encoder_hidden_states": draw(batch * len(branches), tokens, config["text_dim"])}


def _sdxl(config: Mapping[str, Any], draw: Draw, tokens: int, batch: int, branches: Branches) -> Inputs:
    rows = batch * len(branches)
    pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
    # original height and width, top and left of the crop, target height and width
    size = torch.tensor([[1024, 1024, 0, 0, 1024, 1024]], device=draw.device, dtype=draw.dtype)
    return {
        "encoder_hidden_states": draw(rows, tokens, config["cross_attention_dim"]),
        "added_cond_kwargs": {"text_embeds": draw(rows, pooled), "time_ids": size.repeat(rows, 1)},
    }


def _dit(config: Mapping[str, Any], draw: Draw, tokens: int, batch: int, branches: Branches) -> Inputs:
    null = config["num_embeds_ada_norm"]
    labels = [null if branch == "negative" else sample % null for branch in branches for sample in range(batch)]
    return {"class_labels": torch.tensor(labels, device=draw.device)}


ARCHITECTURES: Mapping[str, Architecture] = {
    architecture.name: architecture
    for architecture in (
        Architecture(
            name="flux-1-dev",
            denoiser="FluxTransformer2DModel",
            config=dict(
                patch_size=1,
                in_channels=64,
                num_layers=19,
                num_single_layers=38,
                attention_head_dim=128,
                num_attention_heads=24,
                joint_attention_dim=4096,
                pooled_projection_dim=768,
                guidance_embeds=True,
                axes_dims_rope=(16, 56, 56),
            ),
            tiny_config=dict(
                num_layers=3,
                num_single_layers=6,
                attention_head_dim=32,
                num_attention_heads=2,
                joint_attention_dim=64,
                pooled_projection_dim=64,
                axes_dims_rope=(8, 12, 12),
            ),
            parameters=11_901_408_320,
            steps=28,
            latent=(16, 128, 128),
            tiny_latent=(16, 16, 16),
            tokens=512,
            passes=(("positive",),),
            guidance=1.0,  # its guidance is an embedding
            conditions=_flux,
        ),
        Architecture(
            name="sd-3.5-medium",
            denoiser="SD3Transformer2DModel",
            config=dict(
                sample_size=128,
                patch_size=2,
                in_channels=16,
                out_channels=16,
                num_layers=24,
                attention_head_dim=64,
                num_attention_heads=24,
                joint_attention_dim=4096,
                caption_projection_dim=1536,
                pooled_projection_dim=2048,
                pos_embed_max_size=384,
                dual_attention_layers=tuple(range(13)),
                qk_norm="rms_norm",
            ),
            tiny_config=dict(
                sample_size=16,
                num_layers=8,
                attention_head_dim=32,
                num_attention_heads=2,
                joint_attention_dim=64,
                caption_projection_dim=64,
                pooled_projection_dim=64,
                pos_embed_max_size=24,
                dual_attention_layers=tuple(range(4)),
            ),
            parameters=2_243_171_520,  # beside these a table of positions, which is a buffer
            steps=40,
            latent=(16, 128, 128),
            tiny_latent=(16, 16, 16),
            tokens=333,  # 77 of CLIP and 256 of T5
            passes=(("negative", "positive"),),
            guidance=4.5,
            conditions=_sd3,
        ),
        Architecture(
            name="pixart-sigma",
            denoiser="PixArtTransformer2DModel",
            config=dict(
                sample_size=128,
                patch_size=2,
                in_channels=4,
                out_channels=8,
                num_layers=28,
                attention_head_dim=72,
                num_attention_heads=16,
                cross_attention_dim=1152,
                caption_channels=4096,
                interpolation_scale=2,
                use_additional_conditions=False,
            ),
            tiny_config=dict(
                sample_size=16,
                num_layers=8,
                attention_head_dim=32,
                num_attention_heads=2,
                cross_attention_dim=64,
                caption_channels=64,
            ),
            parameters=610_856_096,
            steps=20,
            latent=(4, 128, 128),
            tiny_latent=(4, 16, 16),
            tokens=300,
            passes=(("negative", "positive"),),
            guidance=4.5,
            conditions=_pixart,
        ),
        Architecture(
            name="wan-2.1-1.3b",
            denoiser="WanTransformer3DModel",
            config=dict(
                patch_size=(1, 2, 2),
                in_channels=16,
                out_channels=16,
                num_layers=30,
                attention_head_dim=128,
                num_attention_heads=12,
                text_dim=4096,
                freq_dim=256,
                ffn_dim=8960,
                cross_attn_norm=True,
                qk_norm="rms_norm_across_heads",
                rope_max_seq_len=1024,
            ),
            tiny_config=dict(
                num_layers=8,
                attention_head_dim=24,
                num_attention_heads=2,
                text_dim=64,
                freq_dim=64,
                ffn_dim=192,
                rope_max_seq_len=32,
            ),
            parameters=1_418_996_800,
            steps=50,
            latent=(16, 21, 60, 104),  # 81 frames of 480 × 832
            tiny_latent=(16, 3, 16, 16),
            tokens=512,
            passes=(("positive",), ("negative",)),
            guidance=5.0,
            conditions=_wan,
        ),
        Architecture(
            name="sdxl",
            denoiser="UNet2DConditionModel",
            config=dict(
                sample_size=128,
                in_channels=4,
                out_channels=4,
                block_out_channels=(320, 640, 1280),
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                layers_per_block=2,
                transformer_layers_per_block=(1, 2, 10),
                attention_head_dim=(5, 10, 20),
                cross_attention_dim=2048,
                use_linear_projection=True,
                addition_embed_type="text_time",
                addition_time_embed_dim=256,
                projection_class_embeddings_input_dim=2816,
            ),
            tiny_config=dict(
                sample_size=16,
                block_out_channels=(32, 64, 64),
                transformer_layers_per_block=(1, 2, 3),
                attention_head_dim=(1, 2, 2),
                cross_attention_dim=64,
                addition_time_embed_dim=8,
                projection_class_embeddings_input_dim=112,
            ),
            parameters=2_567_463_684,
            steps=50,
            latent=(4, 128, 128),
            tiny_latent=(4, 16, 16),
            tokens=77,
            passes=(("negative", "positive"),),
            guidance=5.0,
            conditions=_sdxl,
            sample="sample",
        ),
        Architecture(
            name="dit-xl-2",
            denoiser="DiTTransformer2DModel",
            config=dict(
                sample_size=32,  # 256 × 256
                patch_size=2,
                in_channels=4,
                out_channels=8,
                num_layers=28,
                attention_head_dim=72,
                num_attention_heads=16,
                num_embeds_ada_norm=1000,
            ),
            tiny_config=dict(sample_size=16, num_layers=8, attention_head_dim=32, num_attention_heads=2),
            parameters=749_826_464,  # 674,834,720 published; diffusers has the same embedder again in every block
            steps=50,
            latent=(4, 32, 32),
            tiny_latent=(4, 16, 16),
            tokens=0,
            passes=(("positive", "negative"),),  # DiTPipeline stacks them in this order
            guidance=4.0,
            conditions=_dit,
        ),
    )
}


def architecture(name: str) -> Architecture:
    """The architecture of that name.

    Raises:
        ConfigError: for an unknown name, with a suggestion.
    """
    if name not in ARCHITECTURES:
        raise unknown_name("architecture", name, ARCHITECTURES)
    return ARCHITECTURES[name]
