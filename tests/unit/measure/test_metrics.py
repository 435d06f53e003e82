"""Quality metrics against values computed by hand or by another library."""

import json
import math

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from diffusion_cache.errors import ConfigError
from diffusion_cache.measure import latent_error, psnr, quality, ssim


def images(n=3, frames=None, channels=1, size=16, seed=0):
    shape = (n, channels, size, size) if frames is None else (n, frames, channels, size, size)
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def test_psnr_of_a_constant_offset():
    reference = images() * 0.5
    offsets = torch.tensor([0.1, 0.01, 0.25])
    expected = torch.tensor([20.0, 40.0, 20 * math.log10(4)], dtype=torch.float64)
    torch.testing.assert_close(psnr(reference + offsets[:, None, None, None], reference), expected, atol=1e-4, rtol=0)


def test_video_psnr_pools_the_error_of_all_frames():
    reference = torch.zeros(1, 2, 1, 8, 8)
    candidate = reference.clone()
    candidate[:, 1] = 0.1  # one frame is identical: a mean of per-frame values would be infinite
    assert psnr(candidate, reference).item() == pytest.approx(10 * math.log10(2 / 0.1**2), abs=1e-5)


def independent_ssim(a, b, sigma):
    """Per-pixel structural similarity with scipy's filters, mean over pixels and channels, [c, h, w] arrays."""

    def blur(x):
        # truncate gives the same window width; scipy calls reflection without the edge pixel "mirror"
        return gaussian_filter(x, sigma, truncate=3.5, mode="mirror")

    values = []
    for x, y in zip(a.astype(np.float64), b.astype(np.float64), strict=True):
        mx, my = blur(x), blur(y)
        vx, vy, vxy = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
        c1, c2 = 0.01**2, 0.03**2
        values.append(((2 * mx * my + c1) * (2 * vxy + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))).mean())
    return float(np.mean(values))


@pytest.mark.parametrize(("size", "sigma"), [(16, 0.8), (31, 0.8), (32, 1.5)])
@pytest.mark.parametrize("channels", [1, 3])
def test_ssim_equals_an_independent_formula_per_sample(size, sigma, channels):
    reference = images(channels=channels, size=size, seed=3)
    strength = torch.tensor([0.1, 0.5, 0.9])[:, None, None, None]
    candidate = torch.lerp(reference, images(channels=channels, size=size, seed=8), strength)
    expected = [independent_ssim(a.numpy(), b.numpy(), sigma) for a, b in zip(candidate, reference, strict=True)]
    assert ssim(candidate, reference).tolist() == pytest.approx(expected, abs=1e-6)


def test_video_ssim_is_the_mean_over_frames():
    a, b = images(n=2, frames=3, seed=4), images(n=2, frames=3, seed=5)
    per_frame = torch.stack([ssim(a[:, f], b[:, f]) for f in range(3)], dim=1)
    torch.testing.assert_close(ssim(a, b), per_frame.mean(1))


def test_long_videos_are_scored_in_chunks(monkeypatch):
    a, b = images(n=2, frames=5, seed=6), images(n=2, frames=5, seed=7)
    whole = ssim(a, b)
    monkeypatch.setattr("diffusion_cache.measure.metrics._SSIM_CHUNK", 3 * 16 * 16)
    torch.testing.assert_close(ssim(a, b), whole)


def test_latent_error_is_relative_and_per_sample():
    reference = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    candidate = torch.tensor([[3.0, 4.5], [0.0, 0.0]])
    assert latent_error(candidate, reference).tolist() == pytest.approx([0.1, 1.0])


def test_quality_reports_the_tail():
    reference = torch.zeros(40, 1, 8, 8)
    decibels = torch.arange(40) + 20.0  # 20 … 59 dB
    q = quality(reference + 10 ** (-decibels / 20)[:, None, None, None], reference)
    assert (q.n, q.identical) == (40, 0)
    assert q.psnr_mean == pytest.approx(39.5, abs=1e-4)
    assert q.psnr_p5 == pytest.approx(21, abs=1e-4)  # 39 of 40 samples, 97.5%, are at least as good
    assert q.psnr_worst == pytest.approx(20, abs=1e-4)
    assert q.ssim_worst <= q.ssim_p5 <= q.ssim_mean


def test_identical_samples_are_infinite_and_stay_in_the_mean():
    reference = images()
    candidate = reference.clone()
    candidate[0] = 1 - candidate[0]
    q = quality(candidate, reference)
    assert q.identical == 2
    assert q.psnr_mean == math.inf
    assert math.isfinite(q.psnr_worst)
    assert quality(reference, reference).psnr_worst == math.inf
    assert quality(reference, reference).ssim_mean == pytest.approx(1, abs=1e-12)
    stored = json.loads(json.dumps(q.to_json(), allow_nan=False))
    assert stored["psnr_mean"] is None
    assert stored["identical"] == 2


@pytest.mark.parametrize("metric", [psnr, ssim, latent_error, quality])
@pytest.mark.parametrize(
    ("candidate", "reference", "message"),
    [
        (torch.zeros(2, 1, 16, 16), torch.zeros(3, 1, 16, 16), "shape"),
        (torch.zeros(0, 1, 16, 16), torch.zeros(0, 1, 16, 16), "at least one sample"),
        (torch.zeros(2, 1, 16, 16, dtype=torch.uint8), torch.zeros(2, 1, 16, 16), "unquantised"),
        (torch.zeros(2, 1, 16, 16), torch.zeros(2, 1, 16, 16, dtype=torch.int64), "unquantised"),
        (torch.full((2, 1, 16, 16), math.nan), torch.zeros(2, 1, 16, 16), "candidate contains NaN"),
        (torch.zeros(2, 1, 16, 16), torch.full((2, 1, 16, 16), math.inf), "reference contains NaN or infinite"),
    ],
)
def test_unfit_tensors_are_refused(metric, candidate, reference, message):
    with pytest.raises(ConfigError, match=message):
        metric(candidate, reference)


def test_images_must_be_images_within_their_range():
    with pytest.raises(ConfigError, match=r"\[n, c, h, w\]"):
        psnr(torch.zeros(2, 16), torch.zeros(2, 16))
    with pytest.raises(ConfigError, match="at least 7 pixels"):
        ssim(torch.zeros(1, 1, 6, 16), torch.zeros(1, 1, 6, 16))
    with pytest.raises(ConfigError, match="spread over 2"):
        quality(images() * 2 - 1, torch.full((3, 1, 16, 16), -1.0).index_fill(0, torch.tensor([0]), 1.0))


def test_half_precision_outputs_are_scored_in_full_precision():
    reference = torch.zeros(1, 1, 8, 8, dtype=torch.float16)
    candidate = torch.full_like(reference, 1e-4)  # its square underflows in float16
    assert psnr(candidate, reference).item() == pytest.approx(80, abs=0.01)
