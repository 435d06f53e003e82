"""SeaCache's filter and the distance of what it leaves, against the formulas and full transforms in float64."""

import math

import pytest
import torch

from diffusion_cache.signals import filtered as module
from diffusion_cache.signals import filtered_l1
from diffusion_cache.signals.filtered import axis_filter


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def l1(now, before):
    return ((now - before).abs().mean() / before.abs().mean()).item()


@pytest.mark.parametrize("level", [-math.inf, -30.0, -2.0, 0.0, 3.0, math.inf])
@pytest.mark.parametrize("size", [1, 2, 7, 16])
def test_axis_filter_is_the_published_formula_at_mean_one(size, level):
    gain = axis_filter(size, level, 2)
    assert gain.shape == (size,)
    assert gain.isfinite().all()
    assert gain.mean().item() == pytest.approx(1)
    frequency = torch.fft.fftfreq(size, dtype=torch.float64).abs().clamp(min=1 / size)
    if size > 1 and -20 < level < 20:
        sigma = 1 / (1 + math.exp(level / 2))  # of flow matching, x = (1 − σ)·x0 + σ·noise
        alpha = 1 / (1 + math.exp(-level))  # ᾱ of the variance-preserving process
        power = frequency**-2
        for a, b in ((1 - sigma, sigma), (math.sqrt(alpha), math.sqrt(1 - alpha))):
            formula = a * power / (a**2 * power + b**2)
            torch.testing.assert_close(gain, formula / formula.mean())
    if level == math.inf:
        assert torch.equal(gain, torch.ones(size, dtype=torch.float64))
    order = frequency.argsort()
    assert (gain[order].diff() <= 1e-12).all()


@pytest.mark.parametrize("sizes", [(6, 8), (5, 7), (3, 4, 6), (2, 5, 5)])
def test_filtered_l1_against_full_transforms(sizes, monkeypatch):
    now, before = torch.randn(2, 2, 3, *sizes)
    levels = (0.5, -1.5)
    exponent, axes = len(sizes), tuple(range(1, 1 + len(sizes)))

    def filtered(x, level):
        gain = torch.ones(sizes, dtype=torch.float64)
        for axis, size in enumerate(sizes):
            gain = gain * axis_filter(size, level, exponent).view([-1 if i == axis else 1 for i in range(len(sizes))])
        assert gain.mean().item() == pytest.approx(1)
        return torch.fft.ifftn(torch.fft.fftn(x.double(), dim=axes) * gain, dim=axes).real

    expected = [l1(filtered(now[row], levels[0]), filtered(before[row], levels[1])) for row in range(2)]
    got = filtered_l1(now, before, *levels)
    torch.testing.assert_close(got, torch.tensor(expected), rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(module, "CHUNK", 1)  # a channel at a time
    torch.testing.assert_close(filtered_l1(now, before, *levels), got)


def test_a_video_of_one_frame_is_an_image():
    now, before = torch.randn(2, 2, 3, 6, 8)
    image = filtered_l1(now, before, 0.5, -1.5)
    torch.testing.assert_close(filtered_l1(now[:, :, None], before[:, :, None], 0.5, -1.5), image)


def test_each_row_may_have_a_noise_level_of_its_own():
    now, before = torch.randn(2, 2, 3, 5, 7)
    levels, levels_before = torch.tensor([0.5, -2.0]), torch.tensor([-math.inf, 3.0])
    got = filtered_l1(now, before, levels, levels_before)
    for row in range(2):
        pair = now[row : row + 1], before[row : row + 1]
        assert got[row].item() == pytest.approx(
            filtered_l1(*pair, levels[row].item(), levels_before[row].item()).item()
        )
