"""Small trained diffusion models that ship with the package, run through diffusers' own pipelines.

They give honest quality figures where no model can be downloaded: real architectures, trained on real handwritten
digits by `scripts/train_reference.py`. Each folder under `weights/` holds 16-bit weights and a card.
"""

import json
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..errors import ConfigError
from ..registry import unknown_name
from .models import BARE, MODELS, NULL_CLASS, ReferenceModel, class_embeddings, scheduler

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = ["MODELS", "assemble", "card", "denoiser", "images", "inputs", "load", "save", "spec"]

WEIGHTS = Path(__file__).parent / "weights"


def spec(name: str) -> ReferenceModel:
    """The shipped model of that name; ConfigError with a suggestion when there is none."""
    if name not in MODELS:
        raise unknown_name("reference model", name, MODELS)
    return MODELS[name]


def card(name: str) -> dict[str, Any]:
    """What is known of a shipped model: data, training, hardware, loss, and how it passed its gate."""
    return json.loads((_folder(name) / "card.json").read_text())


def _folder(name: str) -> Path:
    return WEIGHTS / (name if name in BARE else spec(name).name)


def save(name: str, model: nn.Module, card: Mapping[str, Any]) -> Path:
    """Store a trained denoiser as 16-bit weights beside its card; returns the folder."""
    folder = _folder(name)
    folder.mkdir(parents=True, exist_ok=True)
    state = {key: value.detach().half().contiguous() for key, value in model.state_dict().items()}
    save_file(state, folder / "model.safetensors")
    content = {"name": name, "parameters": sum(p.numel() for p in model.parameters()), **card}
    (folder / "card.json").write_text(json.dumps(content, indent=2) + "\n")
    return folder


def denoiser(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The trained denoiser on the CPU, in eval mode."""
    model = spec(name).build()
    model.load_state_dict(load_file(WEIGHTS / name / "model.safetensors"))
    return nn.Module.to(model, dtype).eval()  # diffusers' own `to` warns about parts it would keep in float32


def load(name: str, sampler: str | None = None, dtype: torch.dtype = torch.float32) -> "DiffusionPipeline":
    """Assemble a shipped model's pipeline: real diffusers pipeline class, trained denoiser, identity autoencoder.

    Call it with `pipe(**inputs(name, labels, seeds))`. sampler: one of the model's samplers, default its first.

    Raises:
        ConfigError: for an unknown model or sampler.
    """
    return assemble(name, denoiser(name, dtype), sampler)


def assemble(name: str, model: nn.Module, sampler: str | None = None) -> "DiffusionPipeline":
    """Put any denoiser of the named model's architecture (trained or not) into its pipeline."""
    import diffusers

    # imported as a submodule so that a stored pipeline names a module that can be imported again
    autoencoder = import_module(f"{__name__}.autoencoder").IdentityAutoencoder()
    nn.Module.to(autoencoder, next(model.parameters()).dtype)
    parts: dict[str, Any] = {
        spec(name).denoiser: model,
        "vae": autoencoder,
        "scheduler": scheduler(spec(name), sampler),
    }
    if name == "unet-digits":
        parts |= dict(text_encoder=None, tokenizer=None, safety_checker=None, feature_extractor=None)
        parts |= dict(requires_safety_checker=False)
    elif name == "flux-digits":
        parts |= dict(text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None)
    elif name == "wan-moving-digits":
        parts |= dict(text_encoder=None, tokenizer=None)
    pipe = getattr(diffusers, spec(name).pipeline)(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def inputs(
    name: str, labels: Sequence[int], seeds: Sequence[int], steps: int | None = None, guidance: float | None = None
) -> dict[str, Any]:
    """Keyword arguments for one call of the named model's pipeline: sample i is class labels[i] from seed seeds[i].

    steps and guidance default to the values the model is reported at. Outputs are float tensors ("pt").
    Generators are fresh, so the same call twice gives the same samples.

    Raises:
        ConfigError: for an unknown model, or seeds that do not match the labels.
    """
    if len(labels) != len(seeds):
        raise ConfigError(f"{len(labels)} labels but {len(seeds)} seeds: give one seed per label")
    model = spec(name)
    guidance = model.guidance if guidance is None else guidance
    common: dict[str, Any] = dict(
        num_inference_steps=steps or model.steps,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="pt",
    )
    if name == "dit-digits":
        return dict(class_labels=list(labels), guidance_scale=guidance, **common)
    table = class_embeddings()
    prompt, null = table[list(labels)], table[[NULL_CLASS] * len(labels)]
    if name == "unet-digits":
        return dict(prompt_embeds=prompt, negative_prompt_embeds=null, guidance_scale=guidance, **common)
    if name == "flux-digits":
        size = model.sample_shape[-1]
        call = dict(prompt_embeds=prompt, pooled_prompt_embeds=prompt.mean(1), height=size, width=size, **common)
        if guidance > 1:
            call |= dict(true_cfg_scale=guidance, negative_prompt_embeds=null)
            call |= dict(negative_pooled_prompt_embeds=null.mean(1))
        return call
    _, frames, height, width = model.sample_shape
    return dict(
        prompt_embeds=prompt,
        negative_prompt_embeds=null,
        guidance_scale=guidance,
        height=height,
        width=width,
        num_frames=frames - 1,  # the pipeline rounds up to a multiple of the temporal factor (1) plus one
        **common,
    )


def images(name: str, output: Any) -> Tensor:
    """The samples in a pipeline's output as a float tensor [n, frames, 1, height, width] in [0, 1]."""
    samples = output.frames if hasattr(output, "frames") else output.images
    return samples.float() if samples.ndim == 5 else samples.float()[:, None]
