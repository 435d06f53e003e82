"""LPIPS: distance between the features that an image classifier has of two images.

Source: Zhang, Isola, Efros, Shechtman, Wang, "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric",
2018. The layer weights are those that torchmetrics ships. The backbone, torchvision's AlexNet or VGG16, is rebuilt here
from its published weights, so that neither torchvision nor a download is needed where the file is at hand.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import ConfigError
from ..registry import unknown_name
from .metric_base import PerSample, Samples, frame_means, load_torchscript, metrics, reason, rgb

CHUNK = 8  # frames at once
EPSILON = 1e-8
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of colours in [-1, 1], as the layers were fitted
WEIGHT_SUFFIXES = (".pth", ".safetensors")


class Backbone(NamedTuple):
    """file: of torchvision's ImageNet weights. taps: layers whose outputs are compared. min_side: pixels it needs."""

    file: str
    layers: Callable[[], list[nn.Module]]
    taps: tuple[int, ...]
    min_side: int


def _alexnet() -> list[nn.Module]:
    return [
        nn.Conv2d(3, 64, 11, stride=4, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(3, stride=2),
        nn.Conv2d(64, 192, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(3, stride=2),
        nn.Conv2d(192, 384, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1),
        nn.ReLU(),
    ]


def _vgg16() -> list[nn.Module]:
    layers: list[nn.Module] = []
    channels = 3
    for width, convolutions in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        layers += [nn.MaxPool2d(2)] if layers else []
        for _ in range(convolutions):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
    return layers


BACKBONES = {
    "alex": Backbone("alexnet-owt-7be5be79.pth", _alexnet, (1, 4, 7, 9, 11), 31),
    "vgg": Backbone("vgg16-397923af.pth", _vgg16, (3, 8, 15, 22, 29), 16),
}


class LpipsNetwork(nn.Module):
    """Two batches of images, float [n, 3, h, w] in [-1, 1], to their distances, float [n]."""

    shift: Tensor
    scale: Tensor

    def __init__(self, backbone: Backbone):
        super().__init__()
        layers = backbone.layers()
        self.features = nn.Sequential(*layers)
        self.taps = backbone.taps
        widths = [len(next(layers[tap - 1].parameters())) for tap in self.taps]
        self.weights = nn.ParameterList(torch.zeros(1, width, 1, 1) for width in widths)
        self.register_buffer("shift", torch.tensor(SHIFT).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE).view(1, 3, 1, 1), persistent=False)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        distance = a.new_zeros(len(a))
        for weight, x, y in zip(self.weights, self._directions(a), self._directions(b), strict=True):
            distance = distance + (weight * (x - y).square()).sum(1).mean((1, 2))
        return distance

    def _directions(self, images: Tensor) -> list[Tensor]:
        """The features of every tap, scaled to length 1 at each pixel."""
        found = []
        x = (images - self.shift) / self.scale
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index in self.taps:
                found.append(x / (EPSILON + x.square().sum(1, keepdim=True)).sqrt())
        return found


@metrics.register("lpips")
@dataclass(frozen=True)
class Lpips(PerSample):
    """LPIPS of what would be shown, a video's averaged over frames; None for images too small for the backbone.

    network: alex (at least 31 pixels a side) or vgg (16).
    backbone: where its ImageNet weights are: torchvision's file (`.pth`, or the same as `.safetensors`), or a folder
        that holds it. By default the cache of torch.hub, where torchvision puts it; it is not downloaded.
        Or a whole LPIPS network of your own as TorchScript (any other file): two batches [n, 3, h, w] in [-1, 1] to
        distances, n values; `network` then only says how small an image may be.
    device: where the network runs.
    """

    higher_is_better = False
    network: str = "alex"
    backbone: str | None = None
    device: str = "cpu"

    def check(self, model: str | None) -> None:
        self._loaded()

    def _loaded(self) -> Any:
        if self.network not in BACKBONES:
            raise unknown_name("LPIPS network", self.network, BACKBONES)
        return _load(self.network, self.backbone).to(self.device)

    def __call__(self, samples: Samples) -> Sequence[float | None]:
        network = self._loaded()
        if samples.side < BACKBONES[self.network].min_side:
            return samples.missing()
        scores = []
        candidate, reference = (rgb(x.float()) * 2 - 1 for x in samples.clamped())
        with torch.no_grad():
            for a, b in zip(candidate.split(CHUNK), reference.split(CHUNK), strict=True):
                scores.append(network(a.to(self.device), b.to(self.device)).reshape(len(a)).cpu())
        return frame_means(torch.cat(scores), len(samples))


@lru_cache(maxsize=2)
def _load(network: str, path: str | None) -> Any:
    backbone = BACKBONES[network]
    place = Path(torch.hub.get_dir()) / "checkpoints" if path is None else Path(path).expanduser()
    file = place / backbone.file if path is None or place.is_dir() else place
    if not file.is_file():
        raise ConfigError(
            f"lpips has no backbone: there is no {file}. Put torchvision's weights there "
            f"(https://download.pytorch.org/models/{backbone.file}), name their place as settings.lpips.backbone, or "
            "leave lpips out"
        )
    if file.suffix not in WEIGHT_SUFFIXES:
        return load_torchscript(file, "lpips")
    model = LpipsNetwork(backbone)
    try:
        if file.suffix == ".safetensors":
            state = load_file(file)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
        prefix = "features."
        state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        model.features.load_state_dict(state)
    except (RuntimeError, ValueError, UnpicklingError, SafetensorError, AttributeError, EOFError) as error:
        raise ConfigError(
            f"lpips: {file} does not hold torchvision's weights of {network!r} ({reason(error)})"
        ) from error
    fitted = files("torchmetrics.functional.image").joinpath("lpips_models", f"{network}.pth")
    with fitted.open("rb") as stream:
        layers = torch.load(stream, map_location="cpu", weights_only=True)
    for i, weight in enumerate(model.weights):
        weight.data.copy_(layers[f"lin{i}.model.1.weight"])
    return model.eval().requires_grad_(False)
