"""Features made small: linear maps whose outputs have the inner products of the features, nearly."""

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigError

DEFAULT_WIDTH = 2**15
LARGEST = 2**31 - 1  # indices are hashed as 31-bit numbers: products of two of them fit in int64
SIGNS_PER_HASH = 24
CHUNK = 2**22  # elements of all batch rows that are hashed and gathered at once


class Sketch(Protocol):
    """A linear map of features to rows of `width` numbers."""

    width: int

    def __call__(self, leaves: Sequence[Tensor], first: int = 0) -> Tensor:
        """Map a batch of features, one [B, ...] tensor per leaf, to [B, width] float32 on their device.

        first: number of the batch's first sample; samples of different numbers err independently.
        """
        ...


class Exact:
    """Keeps every element."""

    def __init__(self, width: int):
        self.width = width

    def __call__(self, leaves: Sequence[Tensor], first: int = 0) -> Tensor:
        return torch.cat([leaf.detach().flatten(1).float() for leaf in leaves], dim=1)


class CountSketch:
    """Adds each element, with a random sign, to one of `width` sums (count-sketch, Charikar et al. 2002).

    The sketches x', y' of two features have E⟨x', y'⟩ = ⟨x, y⟩ with a standard deviation of at most
    √(2/width)·‖x‖‖y‖, and √n times less in the mean over n samples, as each sample has signs of its own: at the
    default width 0.78 % for one sample, 0.2 % for 16. Being linear, a sketch tells the error of any linear forecast
    to the same relative accuracy, however small that error is beside the features.

    Every run of `width` elements is permuted at random among the sums, so no two of them meet: a gather instead of
    atomic additions, hence the same sums in every run. Buckets and signs are hashes of the element's index, computed
    in chunks with integers only, so they are the same on every device.

    width: a power of two. Raises ConfigError for another, or for features of more than 2³¹ elements.
    """

    def __init__(self, width: int = DEFAULT_WIDTH, seed: int = 0):
        if width < 2 or width & (width - 1):
            raise ConfigError(f"the width of a sketch must be a power of two, at least 2, not {width}")
        self.width = width
        self.seed = seed

    def __call__(self, leaves: Sequence[Tensor], first: int = 0) -> Tensor:
        batch, device = len(leaves[0]), leaves[0].device
        sums = torch.zeros(batch, self.width, device=device)
        block = self.width * max(1, CHUNK // (self.width * max(batch, 1)))
        start = 0  # of the runs of `width` elements, over all leaves
        for leaf in leaves:
            flat = leaf.detach().flatten(1)
            for low in range(0, flat.shape[1], block):
                piece = flat[:, low : low + block]
                count = -(-piece.shape[1] // self.width)
                if (start + count) * self.width > LARGEST:
                    raise ConfigError(f"a feature of more than {LARGEST} elements cannot be sketched")
                sums += self._fold(piece, start, count, first)
                start += count
        return sums

    def _fold(self, piece: Tensor, start: int, count: int, first: int) -> Tensor:
        """The sums [B, width] of `count` runs of elements, the first of them the `start`-th of the feature."""
        batch, device = len(piece), piece.device
        piece = F.pad(piece, (0, count * self.width - piece.shape[1]))
        run = torch.arange(start, start + count, device=device)[:, None]
        source = self._permutation(run) + (run - start) * self.width  # [count, width]
        gathered = piece.index_select(1, source.flatten()).float().view(batch, count, self.width)
        index = run * self.width + torch.arange(self.width, device=device)
        numbers = range(first, first + batch)
        for group in sorted({number // SIGNS_PER_HASH for number in numbers}):
            rows = [row for row, number in enumerate(numbers) if number // SIGNS_PER_HASH == group]
            bits = _mix(index, _key(self.seed, 2 * group + 1))
            shifts = torch.tensor([numbers[row] % SIGNS_PER_HASH for row in rows], device=device)
            signs = (bits >> shifts[:, None, None]).bitwise_and_(1).mul_(-2).add_(1)
            gathered[rows[0] : rows[-1] + 1] *= signs
        return gathered.sum(1)

    def _permutation(self, run: Tensor) -> Tensor:
        """For each run of elements [count, 1], which of its elements each of the sums takes: [count, width]."""
        mask, half = self.width - 1, self.width.bit_length() // 2
        at = torch.arange(self.width, device=run.device)
        for stage in range(3):  # each is a bijection: an odd multiplier, an offset, an xor with higher bits
            keys = _mix(run, _key(self.seed, 2 * stage)), _mix(run, _key(self.seed, 2 * stage + 6))
            at = (at * ((keys[0] & mask) | 1)).add_(keys[1]).bitwise_and_(mask)
            at.bitwise_xor_(at >> half)
        return at


def make_sketch(
    elements: int, exact_below: int = DEFAULT_WIDTH, width: int = DEFAULT_WIDTH, seed: int = 0
) -> Exact | CountSketch:
    """A sketch for features of `elements` numbers a sample: every element where they are at most `exact_below`."""
    return Exact(elements) if elements <= exact_below else CountSketch(width, seed)


def _mix(value: Tensor, key: int) -> Tensor:
    """31 well-mixed bits of each number (0 … 2³¹ − 1) and the key: two rounds of multiply and xor-shift."""
    value = (value + key).bitwise_and_(LARGEST)
    value.bitwise_xor_(value >> 16).mul_(0x2C1B3C6D).bitwise_and_(LARGEST)
    value.bitwise_xor_(value >> 12).bitwise_xor_(key ^ 0x5BD1E995).mul_(0x297A2D39).bitwise_and_(LARGEST)
    return value.bitwise_xor_(value >> 15)


def _key(seed: int, number: int) -> int:
    return int(_mix(_mix(torch.tensor([seed & LARGEST]), 0x1B873593), number * 0x2545F491 & LARGEST))
