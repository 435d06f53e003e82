"""Low frequencies of features over their tokens."""

import math

import torch

from diffusion_cache.signals.bands import low_pass


def wave(count, periods):
    """[1, count, 1]: a cosine over the tokens."""
    places = torch.arange(count, dtype=torch.float64) / count
    return torch.cos(2 * math.pi * periods * places).reshape(1, count, 1)


def test_a_square_of_tokens_has_two_axes():
    """A wave down the columns of 8 × 8 tokens is fast along the sequence, and low on the square."""
    down = wave(8, 1).expand(1, 8, 8).transpose(1, 2).reshape(1, 64, 1)
    torch.testing.assert_close(low_pass(down, 0.3), down)
    assert low_pass(down, 0.2).abs().max() < 1e-12
    both = wave(8, 1).reshape(1, 8, 1) * wave(8, 2).reshape(1, 1, 8)
    assert low_pass(both.reshape(1, 64, 1), 0.4).abs().max() < 1e-12
    torch.testing.assert_close(low_pass(both.reshape(1, 64, 1), 0.5).reshape(1, 8, 8), both)


def test_the_cutoffs_ends():
    feature = torch.randn(2, 3, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(low_pass(feature, 0.0), feature.mean((2, 3), keepdim=True).expand_as(feature))
    tokens = feature[0]
    torch.testing.assert_close(low_pass(tokens, 1.0), tokens)
    torch.testing.assert_close(low_pass(feature[0, 0], 0.0), feature[0, 0])  # no tokens: all is low
