"""Direction and scale apart, and frequencies apart, on features made for it."""

import math

import pytest
import torch

from diffusion_cache.context import Query
from diffusion_cache.errors import ConfigError
from diffusion_cache.forecasters import RFC, Frequency, Taylor


def turning(angle, size):
    """One row of two tokens, the second turned the other way and twice as large."""
    first = [size * math.cos(angle), size * math.sin(angle)]
    return torch.tensor([[first, [2 * first[0], -2 * first[1]]]], dtype=torch.float64)


def test_what_turns_keeps_its_size():
    """From 0° to 60°, growing from 1 to 3: the line through the directions, made as long as the line of the norms."""
    features = [turning(0.0, 1.0), turning(math.pi / 3, 3.0)]
    found = RFC().forecast(Query([0, 2], 3), features)
    direction = 1.5 * turning(math.pi / 3, 1.0) - 0.5 * turning(0.0, 1.0)
    expected = 4.0 * direction / torch.tensor([[[1.0], [2.0]]]) / (direction[0, 0].norm())
    torch.testing.assert_close(found, expected * torch.tensor([[[1.0], [2.0]]]), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.norm(dim=-1)[0], torch.tensor([4.0, 8.0], dtype=torch.float64))


def test_a_scale_below_zero_is_zero_and_zero_features_stay():
    shrinking = [turning(0.3, 4.0), turning(0.3, 1.0)]
    assert RFC().forecast(Query([0, 1], 3), shrinking).abs().max() == 0
    zero = torch.zeros(1, 3, 4)
    assert torch.equal(RFC().forecast(Query([0, 1], 3), [zero, zero]), zero)


def test_images_are_split_by_their_channels():
    features = [torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    found = RFC().forecast(Query([0, 1], 2), features)
    norms = [feature.norm(dim=1) for feature in features]
    torch.testing.assert_close(found.norm(dim=1), (2 * norms[1] - norms[0]).clamp_min(0))


def wave(count, periods):
    """[1, count, 1]: a cosine over the tokens."""
    places = torch.arange(count, dtype=torch.float64) / count
    return torch.cos(2 * math.pi * periods * places).reshape(1, count, 1)


def test_low_waves_are_reused_and_high_ones_extrapolated():
    """Along the tokens of a line of 14: 1 of at most 7 periods is low, 6 are high."""
    low, high = wave(14, 1), wave(14, 6)
    features = [1.0 * low + 1.0 * high, 2.0 * low + 4.0 * high, 3.0 * low + 9.0 * high]
    found = Frequency(low=0, high=2, cutoff=0.5).forecast(Query([1, 2, 3], 4), features)
    torch.testing.assert_close(found, 3.0 * low + 16.0 * high, rtol=1e-9, atol=1e-9)
    found = Frequency(low=1, high=0, cutoff=0.5).forecast(Query([1, 2, 3], 4), features)
    torch.testing.assert_close(found, 4.0 * low + 9.0 * high, rtol=1e-9, atol=1e-9)


def test_equal_orders_are_taylor():
    features = [torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in range(3)]
    query = Query([0, 1, 4], 6)
    weights = Taylor(2).weights(query)
    expected = sum(weight * feature for weight, feature in zip(weights, features, strict=True))
    torch.testing.assert_close(Frequency(2, 2).forecast(query, features), expected)


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (RFC, {"order": -1}),
        (RFC, {"order": 8}),
        (Frequency, {"low": 8}),
        (Frequency, {"high": -1}),
        (Frequency, {"cutoff": 1.1}),
    ],
)
def test_bad_options(cls, options):
    with pytest.raises(ConfigError, match=f"^{cls.name}: {next(iter(options))} must be"):
        cls(**options)
