"""Features made small: linear maps whose outputs have the inner products of the features, nearly."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import ops
from ..count_sketch import LARGEST
from ..errors import ConfigError

DEFAULT_WIDTH = 2**15


class Exact:
    """Keeps every element."""

    def __init__(self, width: int):
        self.width = width

    def __call__(self, leaves: Sequence[Tensor], first: int = 0) -> Tensor:
        return torch.cat([leaf.detach().flatten(1).float() for leaf in leaves], dim=1)


class CountSketch:
    """Adds each element, with a random sign, to one of `width` sums (`diffusion_cache.count_sketch`).

    The sketches x', y' of two features have E⟨x', y'⟩ = ⟨x, y⟩ (nearly: signs are hashed) with a standard deviation of
    at most √(2/width)·‖x‖‖y‖, and √n times less in the mean over n samples, as each sample has signs of its own: at the
    default width 0.78 % for one sample, 0.2 % for 16. Being linear, a sketch tells the error of any linear forecast
    to the same relative accuracy, however small that error is beside the features.

    width: a power of two. Raises ConfigError for another, or for features of more than 2³¹ elements.
    """

    def __init__(self, width: int = DEFAULT_WIDTH, seed: int = 0):
        if width < 2 or width & (width - 1):
            raise ConfigError(f"the width of a sketch must be a power of two, at least 2, not {width}")
        self.width = width
        self.seed = seed

    def __call__(self, leaves: Sequence[Tensor], first: int = 0) -> Tensor:
        sums = torch.zeros(len(leaves[0]), self.width, device=leaves[0].device)
        start = 0  # of the runs of `width` elements, over all leaves
        for leaf in leaves:
            flat = leaf.detach().flatten(1)
            count = -(-flat.shape[1] // self.width)
            if (start + count) * self.width > LARGEST:
                raise ConfigError(f"a feature of more than {LARGEST} elements cannot be sketched")
            ops.add_sketch(sums, flat, start, first, self.seed)
            start += count
        return sums


def make_sketch(
    elements: int, exact_below: int = DEFAULT_WIDTH, width: int = DEFAULT_WIDTH, seed: int = 0
) -> Exact | CountSketch:
    """A sketch for features of `elements` numbers a sample: every element where they are at most `exact_below`."""
    return Exact(elements) if elements <= exact_below else CountSketch(width, seed)
