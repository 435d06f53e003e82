"""Videos of any length of a digit that bounces around, made in a window whose frames have noise levels of their own.

The model is diffusers' SkyReelsV2Transformer3DModel, starts from the weights of `wan-moving-digits` and is trained on
with levels that rise from frame to frame (diffusion forcing, Chen et al. 2024, arXiv 2407.01392). It makes videos in
two ways: `generate` moves a window of WINDOW frames over a video, `pipeline` is diffusers' own for such models.
scripts/train_reference.py trains it.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import ConfigError
from . import WEIGHTS, denoiser, spec
from .autoencoder import IdentityAutoencoder
from .data import VIDEO_DIGIT, VIDEO_FRAMES, VIDEO_SIZE, digit_images, opacity_of, textures
from .models import NULL_CLASS, class_embeddings, scheduler

NAME, BASE = "rolling-digits", "wan-moving-digits"
WINDOW = VIDEO_FRAMES
STEPS, LAG = 24, 4  # of each frame, and how many it is behind the frame before
FRAMES = 24
NULL_FRACTION = 0.1  # labels replaced by the null class in training
GATE = 0.4  # four times what guessing gives; samples are made without guidance
GATE_SEED = 10_000
GATE_BATCH, GATE_FRAMES, GATE_STEPS = 50, 9, 12


def build() -> nn.Module:
    """The denoiser with the weights that its training starts from."""
    from diffusers import SkyReelsV2Transformer3DModel

    base: Any = denoiser(BASE)
    model: Any = SkyReelsV2Transformer3DModel.from_config(base.config)
    model.load_state_dict(base.state_dict())
    return model.eval()


def load(dtype: torch.dtype = torch.float32) -> nn.Module:
    """The trained denoiser on the CPU, in eval mode."""
    model = build()
    model.load_state_dict(load_file(WEIGHTS / NAME / "model.safetensors"))
    return nn.Module.to(model, dtype)


def bouncing_digits(n: int, frames: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Videos [n, 1, frames, size, size] in [-1, 1] of digits that bounce off the borders, and their labels [n]."""
    images, labels = digit_images(VIDEO_DIGIT)
    index = torch.randint(len(images), (n,), generator=generator)
    digits, room = (images[index] + 1) / 2, VIDEO_SIZE - VIDEO_DIGIT
    start = 2 * room * torch.rand(n, 2, generator=generator)
    angle = 2 * torch.pi * torch.rand(n, generator=generator)
    speed = 0.4 + 0.7 * torch.rand(n, generator=generator)
    velocity = speed[:, None] * torch.stack([angle.sin(), angle.cos()], 1)
    background = textures(n, generator)
    corners = [room - ((start + frame * velocity) % (2 * room) - room).abs() for frame in range(frames)]
    drawn = [opacity_of(digits, corner) for corner in corners]
    return torch.stack([background * (1 - opacity) + opacity for opacity in drawn], 2), labels[index]


def sigma_at(share: Tensor) -> Tensor:
    """The noise level when this share of the way is left, under the samplers' shift of 3."""
    return 3 * share / (1 + 2 * share)


def velocity(model: nn.Module, sample: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
    """The model's output for videos [n, 1, frames, size, size], whose frames are at noise levels sigma [n, frames]."""
    return model(
        hidden_states=sample,
        timestep=1000 * sigma,
        encoder_hidden_states=class_embeddings().to(sample)[labels],
        enable_diffusion_forcing=True,
        return_dict=False,
    )[0]


def loss(model: nn.Module, n: int, seed: int, device: str = "cpu") -> Tensor:
    """Mean squared error of the velocity in frames that are not clean, of n new videos.

    Levels rise by one slope from frame to frame, or are all one (a fifth of the videos).
    """
    generator = torch.Generator().manual_seed(seed)
    clean, labels = bouncing_digits(n, WINDOW, generator)
    labels = torch.where(torch.rand(n, generator=generator) < NULL_FRACTION, NULL_CLASS, labels)
    share = 2 * torch.rand(n, 1, generator=generator) - 1
    share = share + 0.5 * torch.rand(n, 1, generator=generator) * torch.arange(WINDOW)
    one = torch.rand(n, 1, generator=generator) < 0.2
    share = torch.where(one, torch.rand(n, 1, generator=generator), share).clamp(0, 1)
    sigma, noise = sigma_at(share), torch.randn(clean.shape, generator=generator)
    clean, noise, sigma, labels = (tensor.to(device) for tensor in (clean, noise, sigma, labels))
    level = sigma[:, None, :, None, None]
    error = velocity(model, (1 - level) * clean + level * noise, sigma, labels) - (noise - clean)
    noisy = (level > 0).float()
    return (error**2 * noisy).sum() / noisy.sum() / VIDEO_SIZE**2


@torch.no_grad()
def generate(
    model: nn.Module,
    labels: Sequence[int],
    seeds: Sequence[int],
    run: Any = None,
    streams: bool = False,
    frames: int = FRAMES,
    steps: int = STEPS,
    lag: int = LAG,
) -> Tensor:
    """Videos in [0, 1], [n, frames, 1, size, size], by Euler's method: video i is class labels[i] from seed seeds[i].

    The window holds one clean frame and six that are each `lag` steps behind the one before. run: a `dc.run` that is
    told of the steps, and with `streams` of the chunks.

    Raises:
        ConfigError: for more steps than frames in the window can be behind.
    """
    if steps > (WINDOW - 1) * lag:
        raise ConfigError(
            f"a frame is {WINDOW - 1} × {lag} steps in the window, which is fewer than {steps}: take a lag of at least "
            f"{-(-steps // (WINDOW - 1))}, or fewer steps"
        )
    draws = [torch.Generator().manual_seed(seed) for seed in seeds]
    shape = (1, frames + WINDOW, VIDEO_SIZE, VIDEO_SIZE)
    video, classes = torch.stack([torch.randn(shape, generator=draw) for draw in draws]), torch.tensor(labels)
    for call in range((frames - 1) * lag + steps):
        clean = max(0, (call - steps) // lag + 1)  # frames that are finished
        first = max(0, clean - 1)
        done = [min(max(call - frame * lag, 0), steps) for frame in range(first, first + WINDOW)]
        moved = [min(max(call + 1 - frame * lag, 0), steps) for frame in range(first, first + WINDOW)]
        sigma, after = (sigma_at(1 - torch.tensor(ages) / steps) for ages in (done, moved))
        held = video[:, :, first : first + WINDOW]
        if streams:
            run.chunks(range(first, first + WINDOW))
        given = velocity(model, held, sigma.expand(len(held), -1), classes)
        video[:, :, first : first + WINDOW] = held + (after - sigma)[:, None, None] * given
        if run is not None:
            run.next_step()
    return (video[:, :, :frames] / 2 + 0.5).clamp(0, 1).transpose(1, 2)


class Autoencoder(IdentityAutoencoder):
    """The identity, and no frames are compressed."""

    temperal_downsample = ()  # which the pipeline asks for


def pipeline(model: nn.Module | None = None) -> Any:
    """diffusers' pipeline around the trained denoiser, or around the given one; call it with `pipe(**inputs(…))`."""
    from diffusers import SkyReelsV2DiffusionForcingPipeline

    pipe: Any = SkyReelsV2DiffusionForcingPipeline(
        tokenizer=None,
        text_encoder=None,
        transformer=model or load(),
        vae=Autoencoder(),
        scheduler=scheduler(spec(BASE), "unipc"),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def inputs(labels: Sequence[int], seeds: Sequence[int], steps: int = STEPS, lag: int = LAG) -> dict[str, Any]:
    """Arguments of the pipeline's call for videos of WINDOW frames, each `lag` steps behind the one before."""
    table = class_embeddings()
    return dict(
        prompt=None,
        prompt_embeds=table[list(labels)],
        negative_prompt_embeds=table[[NULL_CLASS] * len(labels)],
        guidance_scale=2.0,
        height=VIDEO_SIZE,
        width=VIDEO_SIZE,
        num_frames=WINDOW,
        num_inference_steps=steps,
        ar_step=lag,
        causal_block_size=1,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="pt",
    )


@lru_cache(maxsize=1)
def classifier() -> Any:
    """A support-vector classifier of real digits, wherever they are in the frame."""
    from sklearn.svm import SVC

    videos, labels = bouncing_digits(6000, 1, torch.Generator().manual_seed(1))
    return SVC(C=10).fit(videos.flatten(1).numpy(), labels.numpy())


def recognised(model: nn.Module, samples: int = 200) -> float:
    """Share of a model's videos in whose last frame, when the window has moved, the classifier sees the class.

    Without guidance; all classes in turn, seeds from GATE_SEED on, GATE_STEPS steps.
    """
    right = 0
    for start in range(0, samples, GATE_BATCH):
        seeds = range(GATE_SEED + start, GATE_SEED + min(start + GATE_BATCH, samples))
        labels = [seed % 10 for seed in seeds]
        lag = LAG * GATE_STEPS // STEPS
        videos = generate(model, labels, seeds, frames=GATE_FRAMES, steps=GATE_STEPS, lag=lag)
        found = classifier().predict((2 * videos[:, -1] - 1).flatten(1).numpy())
        right += int((torch.from_numpy(found) == torch.tensor(labels)).sum())
    return right / samples
