"""Full-reference quality of a batch of outputs against the uncached outputs of the same seeds.

Everything is computed per sample in float64 on unquantised tensors. Integer tensors are refused: a difference of two
uint8 images wraps around, and unrelated images then score about 28 dB.
"""

import math
from dataclasses import asdict, dataclass
from typing import cast

import torch
from torch import Tensor

from ..errors import ConfigError
from ..ops import double

# Structural similarity averages over a Gaussian window of 7 σ pixels. The usual σ = 1.5 (11 pixels) would cover most of
# a very small image, so those get σ = 0.8 (7 pixels). Scores under different windows are not comparable.
SSIM_SIGMA, SSIM_SIGMA_SMALL, SSIM_SMALL_SIDE, SSIM_MIN_SIDE = 1.5, 0.8, 32, 7
_SSIM_CHUNK = 1 << 24  # elements compared at once; bounds the memory that long videos take


@dataclass(frozen=True)
class Quality:
    """Quality of n samples against their references. PSNR in dB; p5 is the 5th percentile, worst the minimum.

    p5 is the order statistic at or below the 5% rank, so at least 95% of the samples score p5 or better; up to 20
    samples it is the worst one. Samples equal to their reference have infinite PSNR and stay in the mean, which then
    is infinite too: `identical` counts them.
    """

    n: int
    identical: int
    psnr_mean: float
    psnr_p5: float
    psnr_worst: float
    ssim_mean: float
    ssim_p5: float
    ssim_worst: float

    def to_json(self) -> dict[str, int | float | None]:
        """The fields as JSON values; JSON has no infinity, so an infinite PSNR becomes null (see `identical`)."""
        return {key: None if math.isinf(value) else value for key, value in asdict(self).items()}


def psnr(candidate: Tensor, reference: Tensor, check_range: bool = True) -> Tensor:
    """Peak signal-to-noise ratio in dB of each sample, from its mean squared error over all pixels and frames.

    Args:
        candidate, reference: floating point, [n, c, h, w] or [n, frames, c, h, w], values from 0 to 1.
        check_range: whether values spread over more than 1 are an error; not for decoder outputs before clamping.

    Returns:
        float64 [n]; infinite where a sample equals its reference.

    Raises:
        ConfigError: if the tensors are not such a pair, are not finite, or spread over more than 1.
    """
    from torchmetrics.functional.regression import mean_squared_error

    candidate, reference = _images(candidate, reference, check_range)
    # torchmetrics' own PSNR takes its logarithms of constants in float32, which is up to 1e-6 dB off
    error = mean_squared_error(candidate.flatten(1).T, reference.flatten(1).T, num_outputs=len(reference))
    return -10 * torch.log10(error.reshape(-1))  # of one sample, the error is a scalar


def ssim(candidate: Tensor, reference: Tensor) -> Tensor:
    """Structural similarity of each sample, averaged over the frames of a video.

    The Gaussian window has σ = 1.5 pixels (11 wide); for images with a side under 32 pixels, σ = 0.8 (7 wide).

    Args:
        candidate, reference: floating point, [n, c, h, w] or [n, frames, c, h, w], sides of at least 7 pixels,
            values from 0 to 1.

    Returns:
        float64 [n], at most 1.

    Raises:
        ConfigError: if the tensors are not such a pair, are not finite, or spread over more than 1.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    candidate, reference = _images(candidate, reference)
    side = min(reference.shape[-2:])
    if side < SSIM_MIN_SIDE:
        raise ConfigError(f"structural similarity needs sides of at least {SSIM_MIN_SIDE} pixels, got {side}")
    sigma = SSIM_SIGMA_SMALL if side < SSIM_SMALL_SIDE else SSIM_SIGMA
    n = len(reference)
    candidate, reference = (x.reshape(-1, *x.shape[-3:]) for x in (candidate, reference))  # [n * frames, c, h, w]
    frames = max(1, _SSIM_CHUNK // reference[0].numel())
    scores = []
    for a, b in zip(candidate.split(frames), reference.split(frames), strict=True):
        score = structural_similarity_index_measure(a, b, sigma=sigma, data_range=1.0, reduction="none")
        scores.append(cast(Tensor, score).reshape(-1))
    return torch.cat(scores).reshape(n, -1).mean(1)


def latent_error(candidate: Tensor, reference: Tensor) -> Tensor:
    """Relative L2 error ‖candidate − reference‖ / ‖reference‖ of each sample, as float64 [n].

    Args:
        candidate, reference: floating point, [n, ...]. A zero reference gives infinity, or NaN if both are zero.

    Raises:
        ConfigError: if the tensors differ in shape, are not floating point or not finite.
    """
    candidate, reference = _pair(candidate, reference)
    return (_mean_square(candidate - reference) / _mean_square(reference)).sqrt()


def quality(candidate: Tensor, reference: Tensor) -> Quality:
    """PSNR and structural similarity of a batch, with the tail as well as the mean.

    Args:
        candidate, reference: floating point, [n, c, h, w] or [n, frames, c, h, w], values from 0 to 1.

    Raises:
        ConfigError: see `psnr` and `ssim`.
    """
    decibels = psnr(candidate, reference)
    similarity = ssim(candidate, reference)
    return Quality(
        n=len(decibels),
        identical=int(decibels.isinf().sum()),
        psnr_mean=decibels.mean().item(),
        psnr_p5=_percentile_5(decibels),
        psnr_worst=decibels.min().item(),
        ssim_mean=similarity.mean().item(),
        ssim_p5=_percentile_5(similarity),
        ssim_worst=similarity.min().item(),
    )


def _percentile_5(values: Tensor) -> float:
    # no interpolation: it would be undefined between infinities
    return values.sort().values[(len(values) - 1) // 20].item()


def _mean_square(x: Tensor) -> Tensor:
    return x.square().flatten(1).mean(1)


def _pair(candidate: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Both as float64 on the reference's device, or on the CPU where that has none, after checks."""
    if candidate.shape != reference.shape:
        raise ConfigError(f"outputs differ in shape: {tuple(candidate.shape)} and {tuple(reference.shape)}")
    if reference.ndim < 2 or reference.numel() == 0:
        raise ConfigError(f"outputs must be a batch [n, ...] of at least one sample, got {tuple(reference.shape)}")
    for name, x in (("candidate", candidate), ("reference", reference)):
        if not x.is_floating_point():
            raise ConfigError(f"the {name} is {x.dtype}; compare unquantised floating point outputs (output_type='pt')")
        if not torch.isfinite(x).all():
            raise ConfigError(f"the {name} contains NaN or infinite values")
    return double(candidate.detach().to(reference.device)), double(reference.detach())


def _images(candidate: Tensor, reference: Tensor, check_range: bool = True) -> tuple[Tensor, Tensor]:
    """As `_pair`, for [n, c, h, w] or [n, frames, c, h, w] of values from 0 to 1."""
    candidate, reference = _pair(candidate, reference)
    if reference.ndim not in (4, 5):
        raise ConfigError(f"expected [n, c, h, w] or [n, frames, c, h, w], got {tuple(reference.shape)}")
    spread = float(max(candidate.max(), reference.max()) - min(candidate.min(), reference.min()))
    if check_range and spread > 1 + 1e-4:
        raise ConfigError(f"values spread over {spread:.4g}: scale them to lie from 0 to 1")
    return candidate, reference
