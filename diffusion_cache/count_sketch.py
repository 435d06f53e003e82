"""The arithmetic of count-sketches: which element goes to which sum, and with which sign.

Each element is added, with a random sign, to one of `width` sums (Charikar et al. 2002). Every run of `width` elements
is permuted at random among the sums, so no two of them meet: a gather instead of atomic additions, hence the same sums
in every run. Buckets and signs are hashes of the element's index, computed in chunks with integers only, so they are
the same on every device. Each sample has signs of its own.
"""

from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST = 2**31 - 1  # indices are hashed as 31-bit numbers: the lowest bits, which stay where int32 wraps around
SIGNS_PER_HASH = 24  # samples that take their signs from the bits of one hash
STAGES = 3  # of a permutation
CHUNK = 2**22  # elements of all batch rows that are hashed and gathered at once
Number = TypeVar("Number", int, Tensor)


class Keys(NamedTuple):
    """What a seed makes of the hashes. stages: multiplier and offset of each. signs: of each group of samples."""

    stages: list[int]
    signs: list[int]


def keys_of(seed: int, first: int, count: int) -> Keys:
    """For the samples numbered `first` to `first` + `count` − 1."""
    groups = range(first // SIGNS_PER_HASH, (first + count - 1) // SIGNS_PER_HASH + 1)
    stages = [_key(seed, number) for stage in range(STAGES) for number in (2 * stage, 2 * stage + 6)]
    return Keys(stages, [_key(seed, 2 * group + 1) for group in groups])


def add(sums: Tensor, flat: Tensor, run: int, first: int, stages: list[int], signs: list[int]) -> None:
    """Add [batch, elements] to the sums [batch, width].

    run: of the runs of the whole feature, the one that these elements begin with. first: the number of the first
    sample. stages, signs: `Keys` for it and so many.
    """
    batch, width = sums.shape
    block = width * max(1, CHUNK // (width * max(batch, 1)))
    for low in range(0, flat.shape[1], block):
        sums += _folded(flat[:, low : low + block], run + low // width, first, width, stages, signs)


def permutation(run: Tensor, width: int, stages: list[int]) -> Tensor:
    """For each run of elements [count, 1], int32, which of its elements each of the sums takes: [count, width]."""
    mask, half = width - 1, width.bit_length() // 2
    at = torch.arange(width, dtype=torch.int32, device=run.device)
    for multiplier, offset in zip(stages[::2], stages[1::2], strict=True):
        # each is a bijection: an odd multiplier, an offset, an xor with higher bits
        at = (at * ((mix(run, multiplier) & mask) | 1) + mix(run, offset)) & mask
        at = at ^ (at >> half)
    return at


def mix(value: Number, key: int) -> Number:
    """31 well-mixed bits of each number and the key, its lowest 31 bits: two rounds of multiply and xor-shift."""
    value = (value + key) & LARGEST
    value = ((value ^ (value >> 16)) * 0x2C1B3C6D) & LARGEST
    value = ((value ^ (value >> 12) ^ key ^ 0x5BD1E995) * 0x297A2D39) & LARGEST
    return value ^ (value >> 15)


def _folded(piece: Tensor, opening: int, first: int, width: int, stages: list[int], signs: list[int]) -> Tensor:
    """The sums [batch, width] of whole runs of elements and what is left of the last."""
    batch, device = len(piece), piece.device
    count = -(-piece.shape[1] // width)
    piece = F.pad(piece, (0, count * width - piece.shape[1]))
    run = torch.arange(opening, opening + count, dtype=torch.int32, device=device)[:, None]
    source = permutation(run, width, stages) + (run - opening) * width
    gathered = piece.index_select(1, source.flatten()).float().view(batch, count, width)
    index = run * width + torch.arange(width, dtype=torch.int32, device=device)
    for group, key in enumerate(signs, start=first // SIGNS_PER_HASH):
        low, high = max(first, group * SIGNS_PER_HASH), min(first + batch, (group + 1) * SIGNS_PER_HASH)
        shifts = torch.arange(low, high, dtype=torch.int32, device=device) % SIGNS_PER_HASH
        negative = (mix(index, key) >> shifts[:, None, None]) & 1
        gathered[low - first : high - first] *= 1 - 2 * negative
    return gathered.sum(1)


def _key(seed: int, number: int) -> int:
    return mix(mix(seed & LARGEST, 0x1B873593), number * 0x2545F491 & LARGEST)
