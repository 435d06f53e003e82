"""Features of digit images, for Fréchet and kernel distances where Inception features would mean nothing.

A small convolutional classifier, trained by `scripts/train_features.py` on four fifths of the real digits, as still
images and as frames of moving digits; its 32 penultimate activations are the features, all scaled by one factor so that
their mean square is 1 on those digits.
"""

import hashlib
import json
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..errors import ConfigError
from . import WEIGHTS
from .data import IMAGE_SIZE, VIDEO_FRAMES, digit_images, sample_digits, sample_moving_digits

FOLDER = WEIGHTS / "features"
NUM_FEATURES = 32
SEED, STEPS, BATCH, LEARNING_RATE = 0, 1500, 128, 3e-3
NOISE = 0.05  # in training: features of a slightly noisy digit should not be far off


class DigitFeatures(nn.Module):
    """Images, float [n, 1, 16, 16] in [0, 1] (neither scaled to 255 nor rounded), to features, float [n, 32]."""

    num_features = NUM_FEATURES
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64 * (IMAGE_SIZE // 4) ** 2, NUM_FEATURES),
            nn.SiLU(),  # rectified, some features were zero for every digit
        )
        self.register_buffer("scale", torch.ones(()))
        self.head = nn.Linear(NUM_FEATURES, 10)

    def forward(self, images: Tensor) -> Tensor:
        """ConfigError for integer images or images of another shape."""
        expected = (1, IMAGE_SIZE, IMAGE_SIZE)
        if images.shape[1:] != expected or not images.is_floating_point():
            raise ConfigError(
                f"digit features are of float images [n, {', '.join(map(str, expected))}] in [0, 1], got "
                f"{images.dtype} {list(images.shape)}: use other features for other models"
            )
        return self.layers(images.to(self.head.weight) * 2 - 1) * self.scale

    def classify(self, images: Tensor) -> Tensor:
        """The most likely class of each image, int64 [n]."""
        return self.head(self(images) / self.scale).argmax(1)


@lru_cache(maxsize=1)
def digit_features() -> DigitFeatures:
    """The trained network, on the CPU, in eval mode and without gradients; loaded once in a process.

    Raises:
        ConfigError: if the stored weights are missing or are not those that their card describes.
    """
    path = FOLDER / "model.safetensors"
    try:
        digest = json.loads((FOLDER / "card.json").read_text())["sha256"]
        intact = hashlib.sha256(path.read_bytes()).hexdigest() == digest
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"no digit features in {FOLDER} ({error}): run scripts/train_features.py") from error
    if not intact:
        raise ConfigError(f"{path} is not what its card.json describes: restore both, or run scripts/train_features.py")
    model = DigitFeatures()
    model.load_state_dict(load_file(path))
    return model.float().eval().requires_grad_(False)


def real_digits(n: int, video: bool = False, seed: int = 2) -> Tensor:
    """n real samples as the shipped models were trained on, float [n, frames, 1, 16, 16] in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    if video:
        samples = sample_moving_digits(n, generator).videos.transpose(1, 2)
    else:
        samples = sample_digits(n, generator)[0][:, None]
    return (samples + 1) / 2


def train(report: Callable[[int, float], None] | None = None) -> DigitFeatures:
    """Train from scratch; the same weights every time on one machine with one thread.

    report: called with the step and its loss after each step.
    """
    images, labels = _split(held_out=False)
    generator = torch.Generator().manual_seed(SEED)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = DigitFeatures()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.05)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=STEPS)
    for step in range(STEPS):
        index = torch.randint(len(images), (BATCH,), generator=generator)
        noise = NOISE * torch.randn(BATCH, *images.shape[1:], generator=generator)
        scores = model.head(model(images[index] + noise))
        loss = F.cross_entropy(scores, labels[index], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
        if report is not None:
            report(step, loss.item())
    model.eval().requires_grad_(False)
    model.scale /= model(images).square().mean().sqrt()
    return model


def accuracy(model: DigitFeatures) -> dict[str, float]:
    """Share of held-out digits classified rightly: still images ("image") and frames of videos ("video")."""
    images, labels = _split(held_out=True)
    right = (model.classify(images) == labels).float()
    stills = len(_stills(held_out=True)[1])
    return {"image": right[:stills].mean().item(), "video": right[stills:].mean().item()}


def save(model: DigitFeatures, entries: dict[str, Any]) -> None:
    """Store the weights in 16 bits, and a card with their hash and the entries."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / "model.safetensors"
    save_file({key: value.half().contiguous() for key, value in model.state_dict().items()}, path)
    card = {
        "name": "digit features",
        "parameters": sum(p.numel() for p in model.parameters()),
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        **entries,
    }
    (FOLDER / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    digit_features.cache_clear()


def _held_out(index: Tensor) -> Tensor:
    """Whether each of the 1,797 digits is kept from training: every fifth."""
    return index % 5 == 0


def _split(held_out: bool) -> tuple[Tensor, Tensor]:
    """Images [n, 1, 16, 16] in [0, 1] and labels [n]: still digits, then frames of moving ones."""
    parts = [_stills(held_out), _frames(held_out)]
    images, labels = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return (images + 1) / 2, labels


def _stills(held_out: bool, n: int = 12_000) -> tuple[Tensor, Tensor]:
    index, generator = _drawn(n, seed=3 + held_out)
    images, labels = sample_digits(n, generator)
    keep = _held_out(index) == held_out
    return images[keep], labels[keep]


def _frames(held_out: bool, n: int = 3_000) -> tuple[Tensor, Tensor]:
    """As `_stills`, of the middle three frames of each video: in later ones a digit may be cut off."""
    index, generator = _drawn(n, seed=5 + held_out)
    videos, labels, _ = sample_moving_digits(n, generator)
    keep = _held_out(index) == held_out
    middle = VIDEO_FRAMES // 2
    frames = videos[keep].transpose(1, 2)[:, middle - 1 : middle + 2]
    return frames.flatten(0, 1), labels[keep].repeat_interleave(3)


def _drawn(n: int, seed: int) -> tuple[Tensor, torch.Generator]:
    """Which digits the samplers of `data` draw for that seed (they draw them first), and a generator so seeded."""
    count = len(digit_images()[1])
    index = torch.randint(count, (n,), generator=torch.Generator().manual_seed(seed))
    return index, torch.Generator().manual_seed(seed)
