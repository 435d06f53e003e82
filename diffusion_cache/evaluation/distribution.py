"""Distances between the distributions of generated and of real images: FID and KID, by torchmetrics.

For the shipped models the features are those of a small classifier of digits (`reference.features`) and the real images
those they were trained on. For other models they are Inception's, against a folder of images.

The Fréchet distance shrinks with the number of samples and means nothing where there are hardly more samples than
features, so it is only given from two images per feature on; compare values of equally many samples only. The kernel
distance has no such bias, only noise, and may be slightly negative.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import reference
from ..errors import ConfigError
from ..registry import check_options, suggest

REAL_SAMPLES = 2048
ROWS_PER_FEATURE = 2
KID_SUBSET, KID_SUBSETS = 1000, 100
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"
INCEPTION_LAYERS = (64, 192, 768, 2048)
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}
CHUNK = 256


@dataclass(frozen=True)
class Inception:
    """Settings of Inception features (`settings.inception`).

    real: folder of the real images. weights: torch-fidelity's file, by default in the cache of torch.hub; it is not
    downloaded. layer: number of features, 64, 192, 768 or 2048.
    """

    real: str | None = None
    weights: str | None = None
    layer: int = 2048


def fid(candidate: Tensor, real: Tensor) -> float:
    """Fréchet distance of two sets of features, float [n, d] and [m, d]; 0 for equal ones.

    Raises:
        ConfigError: if the features do not match, are not finite, or are fewer than two.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=_Given(_check(candidate, real)))
    metric.update(real.double(), real=True)
    metric.update(candidate.double(), real=False)
    return max(0.0, metric.compute().item())  # rounding may leave a little less


def kid(candidate: Tensor, real: Tensor) -> float:
    """Kernel distance (squared MMD, cubic kernel) of two sets of features, float [n, d] and [m, d].

    The mean over random subsets of up to 1,000 of each, the same ones every time.

    Raises:
        ConfigError: see `fid`.
    """
    from torchmetrics.image.kid import KernelInceptionDistance

    size = min(len(candidate), len(real), KID_SUBSET)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it keeps the features
        metric = KernelInceptionDistance(feature=_Given(_check(candidate, real)), subsets=KID_SUBSETS, subset_size=size)
    metric.update(real.double(), real=True)
    metric.update(candidate.double(), real=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return metric.compute()[0].item()


def check(model: str, settings: Mapping[str, Any] | None = None) -> None:
    """Prove that `features` and `scores` can be computed, before a long run starts.

    Raises:
        ConfigError: if features or real images are missing, or a setting is wrong.
    """
    if model in reference.MODELS:
        _digit_features()
        return
    options = _inception_options(settings)
    _inception(options.weights, options.layer)
    _real_files(options.real)


def features(model: str, images: Tensor, settings: Mapping[str, Any] | None = None) -> Tensor:
    """Features of each sample's middle frame: float [n, frames, c, h, w] in [0, 1] to float [n, d] on the CPU.

    One frame of each video, because frames of one are no independent samples: with all of them, a few real videos score
    as far from the real ones as anything.
    The digit features read the images unquantised. Inception is defined on 8 bit images, so they are rounded for it.

    Raises:
        ConfigError: if the features of that model need a file or package that is not there, or cannot read the images.
    """
    middle = images[:, images.shape[1] // 2].clamp(0, 1)
    if model in reference.MODELS:
        extract: Any = _digit_features()
    else:
        options = _inception_options(settings)
        network = _inception(options.weights, options.layer)

        def extract(part: Tensor) -> Tensor:
            return network((part.expand(-1, 3, -1, -1) * 255).round().byte())

    with torch.no_grad():
        return torch.cat([extract(part).float().cpu() for part in middle.split(CHUNK)])


def scores(model: str, candidate: Tensor, settings: Mapping[str, Any] | None = None) -> dict[str, float | None]:
    """FID and KID of a model's features against those of real images.

    candidate: float [n, d], from `features`. None where there are too few, and where there are no real images
    (`settings.inception.real` is not given for a model that is not a shipped one).

    Raises:
        ConfigError: see `features`.
    """
    if model in reference.MODELS:
        real = _real_digits(len(reference.spec(model).sample_shape) == 4)
    else:
        options = _inception_options(settings)
        if options.real is None:
            return {"fid": None, "kid": None}
        real = _real_images(options)
    rows = min(len(candidate), len(real))
    return {
        "fid": fid(candidate, real) if rows >= ROWS_PER_FEATURE * candidate.shape[1] else None,
        "kid": kid(candidate, real) if rows > 1 else None,
    }


class _Given(nn.Module):
    """Features that are there already, in place of a network that torchmetrics would run."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, x: Tensor) -> Tensor:
        return x


def _check(candidate: Tensor, real: Tensor) -> int:
    """The number of features; ConfigError unless both are float [n > 1, d] and finite."""
    for x in (candidate, real):
        if x.ndim != 2 or x.shape[1] != real.shape[-1] or len(x) < 2 or not x.is_floating_point():
            raise ConfigError(
                "distributions are compared by float features [n, d] of two samples or more, got "
                f"{candidate.dtype} {list(candidate.shape)} and {real.dtype} {list(real.shape)}"
            )
        if not torch.isfinite(x).all():
            raise ConfigError("features hold values that are not finite")
    return real.shape[1]


def _digit_features() -> nn.Module:
    from ..reference.features import digit_features

    return digit_features()


@lru_cache(maxsize=2)
def _real_digits(video: bool) -> Tensor:
    from ..reference.features import real_digits

    return features(next(iter(reference.MODELS)), real_digits(REAL_SAMPLES, video))


def _inception_options(settings: Mapping[str, Any] | None) -> Inception:
    options = dict((settings or {}).get("inception") or {})
    known = Inception.__dataclass_fields__
    for name in options:
        if name not in known:
            raise ConfigError(f"Inception features have no option {name!r}. {suggest(name, known)}")
    check_options("settings.inception", Inception, options)
    chosen = Inception(**options)
    if chosen.layer not in INCEPTION_LAYERS:
        raise ConfigError(f"settings.inception.layer must be one of {INCEPTION_LAYERS}, not {chosen.layer}")
    return chosen


@lru_cache(maxsize=1)
def _inception(weights: str | None, layer: int) -> Any:
    from torchmetrics.image.fid import NoTrainInceptionV3

    path = Path(weights).expanduser() if weights else Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
    if not path.is_file():
        raise ConfigError(
            f"FID and KID have no Inception weights: there is no {path}. Put {INCEPTION_URL} there, name its place as "
            "settings.inception.weights, or set distribution=false"
        )
    try:
        return NoTrainInceptionV3("inception-v3-compat", [str(layer)], str(path)).requires_grad_(False)
    except ImportError as error:
        raise ConfigError(
            f"FID and KID of this model need torch-fidelity ({error}): pip install 'diffusion-cache[eval]', or set "
            "distribution=false"
        ) from error
    except Exception as error:  # of unpickling, or of weights that do not fit
        raise ConfigError(f"{path} does not hold Inception's weights ({type(error).__name__}: {error})") from error


def _real_files(folder: str | None) -> Sequence[Path]:
    if folder is None:
        raise ConfigError(
            "FID and KID compare with real images: name their folder as settings.inception.real, or set "
            "distribution=false"
        )
    path = Path(folder).expanduser()
    found = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
    if len(found) < 2:
        raise ConfigError(f"settings.inception.real: fewer than two images in {path}")
    return found


@lru_cache(maxsize=1)
def _real_images(options: Inception) -> Tensor:
    """Features of the images in the folder, one by one, as they may differ in size."""
    import numpy as np
    from PIL import Image

    network = _inception(options.weights, options.layer)
    found = []
    with torch.no_grad():
        for file in _real_files(options.real):
            try:
                with Image.open(file) as image:
                    pixels = np.array(image.convert("RGB"))
            except OSError as error:
                raise ConfigError(f"settings.inception.real: {file} cannot be read ({error})") from error
            found.append(network(torch.from_numpy(pixels).permute(2, 0, 1)[None]).float().cpu())
    return torch.cat(found)
