"""The gate of the reference models: a classifier trained on the real digits must recognise what they generate."""

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import assemble, images, inputs, load
from .data import VIDEO_FRAMES, sample_digits, sample_moving_digits

GATE_SEED = 10_000
BATCH = 50


@lru_cache(maxsize=2)
def classifier(video: bool) -> Any:
    """A support-vector classifier of real digits: of 16×16 images, or of the middle frames of moving digits."""
    from sklearn.svm import SVC

    generator = torch.Generator().manual_seed(1)
    if video:
        samples, labels, _ = sample_moving_digits(6000, generator)
        samples = samples[:, :, VIDEO_FRAMES // 2]
    else:
        samples, labels = sample_digits(5000, generator)
    return SVC(C=10).fit(samples.flatten(1).numpy(), labels.numpy())


def recognised(samples: Tensor, labels: Tensor) -> Tensor:
    """Whether each sample's (middle frame's) class is the requested one, bool [n].

    samples: [n, frames, 1, height, width] in [0, 1], as `images` returns them; labels: [n].
    """
    middle = samples[:, samples.shape[1] // 2] * 2 - 1
    predicted = classifier(video=samples.shape[1] > 1).predict(middle.flatten(1).numpy())
    return torch.from_numpy(predicted) == labels


def class_accuracy(
    name: str,
    sampler: str | None = None,
    samples: int = 200,
    grid: Path | None = None,
    model: nn.Module | None = None,
) -> float:
    """Share of generated samples that the classifier recognises, over all classes in turn, seeds from 10,000 on.

    grid: where to write a picture of the first fifty samples, if given. model: in place of the shipped denoiser.
    """
    pipe: Any = load(name, sampler) if model is None else assemble(name, model, sampler)
    labels = torch.arange(samples) % 10
    batches = []
    for start in range(0, samples, BATCH):
        chosen = labels[start : start + BATCH].tolist()
        seeds = range(GATE_SEED + start, GATE_SEED + start + len(chosen))
        batches.append(images(name, pipe(**inputs(name, chosen, list(seeds)))))
    generated = torch.cat(batches)
    if grid is not None:
        save_grid(generated[:50], grid)
    return recognised(generated, labels).float().mean().item()


def save_grid(samples: Tensor, path: Path, columns: int = 10, zoom: int = 4) -> None:
    """Write samples [n, frames, 1, h, w] as a picture; videos as one row of frames each."""
    from PIL import Image

    if samples.shape[1] > 1:
        tiles = samples[:10].flatten(0, 1)[:, 0]
        columns = samples.shape[1]
    else:
        tiles = samples[:, 0, 0]
    tiles = torch.cat([tiles, tiles.new_zeros(-len(tiles) % columns, *tiles.shape[1:])])
    w = tiles.shape[-1]
    sheet = tiles.unflatten(0, (-1, columns)).permute(0, 2, 1, 3).reshape(-1, columns * w)
    picture = Image.fromarray((sheet.clamp(0, 1) * 255).round().byte().numpy())
    picture.resize((columns * w * zoom, sheet.shape[0] * zoom), Image.Resampling.NEAREST).save(path)
