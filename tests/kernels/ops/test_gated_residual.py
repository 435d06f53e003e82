"""A reused branch that joins its block's stream."""

import pytest
from diffusion_cache.kernels import codes
from diffusion_cache.kernels import gated_residual as op
from kernel_cases import CODES, DTYPES, FULL, assert_close, poisoned, random

SHAPES = [(2, 5, 63), pytest.param((1, 1, 1), marks=FULL), pytest.param((3, 2, 1000), marks=FULL)]


def check(base, gate, features, scales, weights, correction):
    expected = op.reference(base, gate, features, scales, weights, correction)
    wide = op.reference(base.float(), gate, features, scales, weights, correction)
    result = op.launch(base, gate, features, scales, weights, correction, poisoned(wide.contiguous(), base.dtype))
    assert_close(result, expected, op.TOLERANCE[base.dtype], 10 + wide.abs().max().item())


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_reference(shape, dtype, code):
    batch, tokens, channels = shape
    if code:
        pairs = [codes.encode_reference(random(*shape), code) for _ in range(2)]
        features, scales = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    else:
        features, scales = [random(*shape, dtype=dtype) for _ in range(2)], []
    base = random(*shape, dtype=dtype)
    gates = [(batch, 1, channels), (1, tokens, 1), shape, (1, 1, 1)]
    corrections = [None, random(1, 2, channels), random(batch, 2, 1), None]
    for size, correction in zip(gates, corrections, strict=True):
        check(base, random(*size, dtype=dtype), features, scales, random(2), correction)
    check(base, random(batch, 1, channels), features, scales, random(batch, 2), None)


def test_a_gate_that_is_part_of_a_modulation():
    """As blocks cut it out of six in one projection."""
    modulation, feature = random(2, 6, 63), random(2, 5, 63)
    check(random(2, 5, 63), modulation[:, 2:3], [feature], [], random(1), None)
    check(random(2, 5, 63), modulation.chunk(6, 1)[5].expand(2, 5, 63), [feature], [], random(1), None)
    check(random(2, 5, 63), random(2, 63, 5).mT, [feature], [], random(1), None)
    check(random(2, 5, 63), random(2, 5, 4)[..., 1:2], [feature], [], random(1), None)


def test_other_axes_are_refused():
    with pytest.raises(ValueError, match="3 axes"):
        op.launch(random(2, 3), random(1, 1, 1), [random(2, 3)], [], random(1), None)
    with pytest.raises(ValueError, match="on each axis or 1"):
        op.launch(random(2, 3, 4), random(1, 1, 3), [random(2, 3, 4)], [], random(1), None)
