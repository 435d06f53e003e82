"""Each element to one of the sums, with a sign."""

import pytest
import torch
from diffusion_cache.kernels import count_sketch as op
from kernel_cases import DEVICE, DTYPES, FULL, random

from diffusion_cache import count_sketch as plain

SIZES = [(1, 1, 64), (3, 63, 64), (2, 1000, 64), (1, 1300, 64), (2, 4097, 128), (1, 5000, 4096)]
QUICK = {(63, torch.float32), (1000, torch.bfloat16), (1300, torch.float32)}  # the last of more runs than PARTS
CASES = [
    pytest.param(*size, dtype, marks=() if (size[1], dtype) in QUICK else FULL) for size in SIZES for dtype in DTYPES
]


@pytest.mark.parametrize(("batch", "elements", "width", "dtype"), CASES)
def test_equals_the_reference(batch, elements, width, dtype):
    flat, before = random(batch, elements, dtype=dtype), random(batch, width)
    given = (flat, 5, 22, *plain.keys_of(7, 22, batch))  # samples 22 to 24 have signs of two hashes
    expected = op.reference(before, *given)
    for config in ((32, 1), *op.CONFIGS[:1]):
        sums = before.clone()
        op.launch(sums, *given, config)
        assert (sums.double() - expected).abs().max() <= op.TOLERANCE[dtype] * (1 + expected.abs().max())
    in_pytorch = before.clone()
    plain.add(in_pytorch, *given)
    assert torch.allclose(in_pytorch, sums, rtol=1e-5, atol=1e-4)


def test_rows_of_a_longer_tensor_and_the_same_bits_every_time():
    flat, width = random(2, 900)[:, 100:], 64
    given = (flat, 0, 0, *plain.keys_of(1, 0, 2))
    first, second = torch.zeros(2, 2, width, device=DEVICE)
    for sums in (first, second):
        op.launch(sums, *given)
    assert torch.equal(first, second)
    assert torch.allclose(first.double(), op.reference(torch.zeros_like(first), *given), atol=1e-4)


def test_other_numbers_of_samples_are_refused():
    with pytest.raises(ValueError, match="as many samples"):
        op.launch(random(2, 64), random(3, 64), 0, 0, *plain.keys_of(0, 0, 2))
