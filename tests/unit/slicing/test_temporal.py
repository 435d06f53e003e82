"""Norms that span what is sliced: the statistics of all slices together."""

import pytest
import torch
from torch import nn

from diffusion_cache.slicing.temporal import Moments, frames, moments


def norm_of(channels, groups):
    norm = nn.GroupNorm(groups, channels, eps=1e-6)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(torch.randn(channels, generator=generator))
    return norm.requires_grad_(False)


def reference(norm, x):
    """In float64, on [b, c, f, p]."""
    exact = nn.functional.group_norm(
        x.double().transpose(1, 2), norm.num_groups, norm.weight.double(), norm.bias.double(), norm.eps
    )
    return exact.transpose(1, 2)


@pytest.mark.parametrize("positions", [1, 63, 100])
@pytest.mark.parametrize("offset", [0.0, 300.0])  # far from zero, sums of squares would cancel
@pytest.mark.parametrize("size", [1, 7, 1000])
def test_moments_of_slices_are_those_of_the_whole(positions, offset, size):
    norm = norm_of(12, 4)
    x = torch.randn(2, 3, 12, positions, generator=torch.Generator().manual_seed(0)) + offset
    collected = Moments(norm)
    for part in x.split(size, dim=3):
        collected.add(part)
    assert collected.count == 3 * 3 * positions
    for found in (collected, moments(norm, x)):
        output = torch.cat([found.normalise()(part) for part in x.split(size, dim=3)], dim=3)
        expected = reference(norm, x)
        assert (output - expected).norm() / expected.norm() < (1e-6 if offset == 0 else 1e-4)


def test_half_precision_is_normalised_in_float():
    norm = norm_of(8, 2).to(torch.bfloat16)
    x = (100 * torch.randn(1, 4, 8, 9, generator=torch.Generator().manual_seed(0))).to(torch.bfloat16)
    output = moments(norm, x).normalise()(x)
    assert output.dtype == torch.bfloat16
    expected = norm(x.transpose(1, 2)).transpose(1, 2)
    assert (output.float() - expected.float()).norm() / expected.float().norm() < 5e-3


def test_frames_are_taken_apart_without_a_copy():
    x = torch.arange(2 * 3 * 5 * 4 * 2.0).view(6, 5, 4, 2)
    apart = frames(x, 3)
    assert apart.shape == (2, 3, 5, 8)
    assert torch.equal(apart[1, 2, 4], x[5, 4].flatten())
    assert apart.data_ptr() == x.data_ptr()
