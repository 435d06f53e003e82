"""How far two maps are apart in what their noise leaves to be seen of them: SeaCache's signal."""

import torch
from torch import Tensor

from ..ops import double

CHUNK = 2**22  # elements of a batch that are filtered at once
LIMIT = 60.0  # beyond, a noise level (log-SNR) changes nothing in float64


def filtered_l1(now: Tensor, before: Tensor, level: float | Tensor, level_before: float | Tensor) -> Tensor:
    """L1r of two maps [B, C, (F,) H, W], each filtered for its own noise level (log-SNR, or [B] of them): [B] float32.

    Along each axis by `axis_filter`, exponent 3 with several frames and 2 with one. 0/0 is NaN and x/0 infinite.
    """
    batch, count = now.shape[:2]
    step = max(1, CHUNK // max(1, now[:, 0].numel()))
    difference = scale = torch.zeros(batch, device=now.device)
    for low in range(0, count, step):  # transforms are several times the size of what they transform
        new, old = (
            _filtered(x[:, low : low + step].float(), noise_level)
            for x, noise_level in ((now, level), (before, level_before))
        )
        difference = difference + (new - old).abs().flatten(1).sum(1)
        scale = scale + old.abs().flatten(1).sum(1)
    return difference / scale


def axis_filter(size: int, noise_level: float | Tensor, exponent: float) -> Tensor:
    """The gain of each frequency (in `fft.fftfreq` order) along one axis, with mean 1: [..., size] float64.

    SeaCache's G = aS/(a²S + b²) for signals of power S = |f|^−exponent, f in cycles per position: what of a
    frequency a noisy x = a·signal + b·noise still shows. Only a²/b², the SNR, is left when G is scaled to mean 1,
    so the formula is the same for flow matching and variance-preserving models. The zero frequency, whose power
    would be infinite, gets that of the lowest other one (our choice). noise_level: log-SNR, or [...] of them.
    """
    given = noise_level if isinstance(noise_level, Tensor) else torch.tensor(noise_level, dtype=torch.float64)
    level = double(given)[..., None].clamp(-LIMIT, LIMIT)
    frequency = torch.fft.fftfreq(size, dtype=torch.float64, device=level.device).abs()
    frequency[0] = frequency[min(1, size - 1)]
    gain = 1 / (1 + torch.exp(-level) * frequency**exponent)
    return gain / gain.mean(-1, keepdim=True)


def _filtered(x: Tensor, noise_level: float | Tensor) -> Tensor:
    """[B, C, (F,) H, W] filtered along all axes but the first two."""
    sizes = x.shape[2:]
    axes = tuple(range(2, x.ndim))
    exponent = 3 if len(sizes) == 3 and sizes[0] > 1 else 2
    spectrum = torch.fft.rfftn(x, dim=axes)
    for axis, size in zip(axes, sizes, strict=True):
        gain = axis_filter(size, noise_level, exponent).to(x)
        gain = gain[..., : spectrum.shape[axis]]  # of the last axis only half is there
        spectrum *= gain.view(*gain.shape[:-1], *[-1 if dim == axis else 1 for dim in range(gain.ndim - 1, x.ndim)])
    return torch.fft.irfftn(spectrum, s=sizes, dim=axes)
