"""What a computed step stores."""

import pytest
import torch
from diffusion_cache.kernels import codes, forecast_residual, sums
from diffusion_cache.kernels import store_residual as op
from kernel_cases import DTYPES, FULL, cases, poisoned, random, same_bits

from diffusion_cache import ops


def check(current, base, code):
    expected, expected_scales = op.reference(current, base, code)
    feature, scales = poisoned(expected.contiguous()), poisoned(expected_scales.contiguous())
    op.launch(feature, scales, current, base)
    assert same_bits(feature, expected)
    assert same_bits(scales, expected_scales)
    in_pytorch = ops.encode_residual(current, base, {"e4m3": "fp8"}.get(code, code))
    assert same_bits(in_pytorch.codes, expected)
    assert same_bits(in_pytorch.scales, expected_scales)


@pytest.mark.parametrize("code", codes.DTYPES)
@pytest.mark.parametrize(("shape", "dtype"), cases())
def test_equals_the_reference(shape, dtype, code):
    check(random(*shape, dtype=dtype), random(*shape, dtype=dtype), code)
    check(random(*shape, dtype=dtype) * 1e3, None, code)


@pytest.mark.parametrize("code", codes.DTYPES)
@pytest.mark.parametrize("shape", [(2, 40, 100), (1, 3, 7, 1500)])
def test_more_rows_than_a_tile_holds(shape, code):
    check(random(*shape), random(*shape), code)


@pytest.mark.parametrize("code", ["e4m3", "int8"])
def test_strided_and_broadcast_inputs(code):
    check(random(3, 9, 7)[:, 4:], random(1, 5, 7).expand(3, 5, 7), code)
    check(random(3, 7, 5).mT, random(3, 5, 14)[..., ::2], code)


@pytest.mark.parametrize("code", ["e4m3", "int8"])
def test_rows_of_zeros_and_of_what_is_not_finite(code):
    current = random(6, 8)
    current[1] = 0.0
    current[2, 3], current[3, 3], current[4, 3] = float("nan"), float("inf"), -float("inf")
    current[5] *= 1e-37
    feature, scales = poisoned(current, codes.DTYPES[code]), poisoned(current[:, 0])
    op.launch(feature, scales, current, None)
    assert same_bits(scales, op.reference(current, None, code)[1])
    values = codes.decode_reference(feature, scales)
    assert scales.isfinite().tolist() == [True, True, False, False, False, True]
    assert not values[2:5].isfinite().any(1).all()
    assert torch.equal(values[1], torch.zeros_like(values[1]))
    assert values[5].abs().max() <= 1e-36
    error = (values[0] - current[0]).abs().max() / current[0].abs().max()
    assert error <= (1 / 16 if code == "e4m3" else 0.5 / 127) * 1.001


def every_16_bits(dtype):
    values = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).float()
    return values[values.isfinite()]


def encoded(values, code):
    """Codes of values that are taken as they are: a last column of `top` makes every scale 1."""
    count = -(-len(values) // 1023)
    table = torch.nn.functional.pad(values, (0, count * 1023 - len(values))).reshape(count, 1023)
    table = torch.cat([table, torch.full((count, 1), codes.TOP[code])], 1).to(random(1).device)
    feature, scales = poisoned(table, codes.DTYPES[code]), poisoned(table[:, 0])
    op.launch(feature, scales, table, None)
    assert (scales == 1).all()
    return feature[:, :-1].reshape(-1)[: len(values)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=FULL)], ids=str)
def test_e4m3_is_what_a_cast_gives_for_all_numbers_of_16_bits(dtype):
    values = every_16_bits(dtype)
    values = values[values.abs() <= 448]
    assert len(values) > 30_000
    assert same_bits(encoded(values, "e4m3").cpu(), values.to(torch.float8_e4m3fn))


def test_codes_of_random_float32_are_what_casts_give():
    exponents = torch.randint(-14, 9, (20_000,))
    values = (torch.randn(20_000) * 2.0**exponents).clamp(-448, 448)
    assert same_bits(encoded(values, "e4m3").cpu(), values.to(torch.float8_e4m3fn))
    values = values.clamp(-127, 127)
    assert same_bits(encoded(values, "int8").cpu(), values.round().to(torch.int8))


def test_all_e4m3_codes_are_read_exactly():
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).reshape(2, 128).to(random(1).device)
    ones = torch.ones(2, device=every.device)
    values = forecast_residual.launch(None, [every], [ones], ones[:1], None, torch.float32)
    assert torch.equal(values.nan_to_num(1e6), every.float().nan_to_num(1e6))
    assert values.isnan().sum() == 2


def test_rows_that_are_too_wide_are_refused():
    wide = torch.zeros(1, 2 * op.WIDEST_ROW, device=random(1).device)
    with pytest.raises(ValueError, match="16384 wide"):
        op.launch(poisoned(wide, torch.int8), wide[:, 0], wide, None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_offsets_beyond_32_bits(dtype):
    """Rows 2^31 elements apart, in memory that is reserved and mostly never touched."""
    stride = 2**31 + 64
    try:
        storage = torch.empty(stride + 1000, dtype=dtype, device=random(1).device)
    except RuntimeError:
        pytest.skip("no room for 8 GiB of address space")
    current = storage.as_strided((2, 1000), (stride, 1))
    current.copy_(random(2, 1000))
    check(current, None, "int8")


def test_other_shapes_are_refused():
    feature, scales = poisoned(random(2, 3), torch.int8), random(2)
    for given in ((scales, random(2, 4), None), (scales, random(2, 3), random(1, 3)), (random(3), random(2, 3), None)):
        with pytest.raises(ValueError, match="one shape"):
            op.launch(feature, *given)


def test_limits_are_those_that_are_gone_by():
    """`ops` knows them without importing Triton."""
    assert (ops._KERNEL_ROW, ops._KERNEL_SLOTS) == (op.WIDEST_ROW, sums.SLOTS)
    assert {code: ops._TOP[dtype] for code, dtype in codes.DTYPES.items()} == codes.TOP
    assert ops._FLOOR == codes.FLOOR
