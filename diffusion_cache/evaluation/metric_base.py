"""What a per-sample metric is, what it is given, and how it is found by name."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import ConfigError
from ..registry import Registry

RANGE_SLACK = 0.5  # how far decoder outputs may leave [0, 1] before they must be in other units


@dataclass(frozen=True, eq=False)
class Samples:
    """n outputs and their uncached references, from the same noise.

    candidate, reference: float [n, frames, c, h, w] in about [0, 1], neither rounded nor clamped; one frame for images.
    candidate_latents, reference_latents: float [n, ...], what the last `scheduler.step` gave, or None.
    prompts: n texts, or None. labels: n classes, or None.

    Raises:
        ConfigError: if shapes or lengths do not match, or the reference is in other units.
    """

    candidate: Tensor
    reference: Tensor
    candidate_latents: Tensor | None = None
    reference_latents: Tensor | None = None
    prompts: Sequence[str] | None = None
    labels: Sequence[int] | None = None

    def __post_init__(self) -> None:
        shape = self.reference.shape
        if len(shape) != 5 or self.candidate.shape != shape or not len(self.reference):
            raise ConfigError(
                "metrics compare float [n, frames, c, h, w] with another of that shape, got "
                f"{list(self.candidate.shape)} and {list(shape)}"
            )
        for name, x in (("candidate", self.candidate), ("reference", self.reference)):
            if not x.is_floating_point():
                raise ConfigError(f"the {name} is {x.dtype}; compare unquantised outputs (output_type='pt')")
        low, high = self.reference.min().item(), self.reference.max().item()
        if low < -RANGE_SLACK or high > 1 + RANGE_SLACK:
            raise ConfigError(f"the reference has values from {low:.3g} to {high:.3g}: images must be in [0, 1]")
        for name, values in (("prompts", self.prompts), ("labels", self.labels)):
            if values is not None and len(values) != len(self):
                raise ConfigError(f"{len(values)} {name} for {len(self)} samples: give one for each")

    def __len__(self) -> int:
        return len(self.reference)

    @property
    def is_video(self) -> bool:
        return self.reference.shape[1] > 1

    @property
    def side(self) -> int:
        """The shorter side of the images, in pixels."""
        return min(self.reference.shape[-2:])

    def clamped(self) -> tuple[Tensor, Tensor]:
        """Candidate and reference as they would be shown, in [0, 1]."""
        return self.candidate.clamp(0, 1), self.reference.clamp(0, 1)

    def missing(self) -> list[float | None]:
        """What a metric returns that does not apply to such samples."""
        return [None] * len(self)


@dataclass(frozen=True)
class PerSample(ABC):
    """A metric that gives each sample a number; its fields are its settings.

    A frozen dataclass registered under `metrics`, here or by another package through the entry point group
    `diffusion_cache.evaluation.metrics`.
    """

    name: ClassVar[str]
    higher_is_better: ClassVar[bool]

    def check(self, model: str | None) -> None:  # noqa: B027  (most metrics need nothing)
        """Prove that the metric can run; called before anything is generated.

        model: the name of a model that takes class labels, None for one that takes texts.

        Raises:
            ConfigError: if a network is missing, or the metric makes no sense for the model.
        """

    @abstractmethod
    def __call__(self, samples: Samples) -> Sequence[float | None]:
        """A number for each sample, None where it does not apply.

        Raises:
            ConfigError: for samples that are not finite or not of a kind that it can score.
        """


metrics: Registry[PerSample] = Registry("metric", "diffusion_cache.evaluation.metrics")


def needs_text(metric: PerSample, model: str | None) -> None:
    """ConfigError where prompts are classes, for a metric that reads them."""
    if model is not None:
        raise ConfigError(f"{metric.name} needs text prompts, but {model} takes class labels: leave it out")


def rgb(images: Tensor) -> Tensor:
    """Images [n, frames, c, h, w] as [n · frames, 3, h, w], grey ones with three equal channels.

    Raises:
        ConfigError: for other than 1 or 3 channels.
    """
    flat = images.flatten(0, 1)
    if flat.shape[1] not in (1, 3):
        raise ConfigError(f"this metric reads grey or RGB images, got {flat.shape[1]} channels")
    return flat.expand(-1, 3, -1, -1)


def frame_means(scores: Tensor, n: int) -> list[float | None]:
    """Scores of all frames, [n · frames], averaged over the frames of each of n samples."""
    return scores.detach().double().reshape(n, -1).mean(1).tolist()


def reason(error: Exception) -> str:
    """The first line of an error's text, or its kind where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def load_torchscript(path: Path, what: str) -> Any:
    """A network stored by `torch.jit.save`, on the CPU in eval mode; ConfigError where there is none."""
    try:
        return torch.jit.load(str(path), map_location="cpu").eval()
    except (RuntimeError, ValueError, OSError) as error:
        raise ConfigError(f"{what}: {path} is no TorchScript network ({reason(error)})") from error
