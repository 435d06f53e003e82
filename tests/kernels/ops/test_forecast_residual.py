"""The output of a reused span."""

import pytest
import torch
from diffusion_cache.kernels import codes
from diffusion_cache.kernels import forecast_residual as op
from kernel_cases import CODES, DTYPES, FULL, assert_close, cases, poisoned, random


def features_of(shape, dtype, code, count):
    """Features and their scales."""
    if not code:
        return [random(*shape, dtype=dtype) for _ in range(count)], []
    pairs = [codes.encode_reference(random(*shape), code) for _ in range(count)]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def check(base, features, scales, weights, correction, dtype):
    expected = op.reference(base, features, scales, weights, correction, dtype)
    wide = op.reference(base, features, scales, weights, correction, torch.float32)
    out = poisoned(features[-1 if scales else 0], dtype)
    result = op.launch(base, features, scales, weights, correction, dtype, out)
    assert_close(result, expected, op.TOLERANCE[dtype], 4 + wide.abs().max().item())


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize(("shape", "dtype"), cases())
def test_equals_the_reference(shape, dtype, code):
    rows, channels = shape[0], shape[-1 if len(shape) <= 3 else 1]
    features, scales = features_of(shape, dtype, code, 3)
    base = random(*shape, dtype=dtype)
    check(base, features, scales, random(3), None, dtype)
    check(None, features, scales, random(rows, 3), random(rows, 2, 1), dtype)
    check(base, features, scales, random(3), random(1, 2, channels), dtype)
    check(base, features, scales, random(rows, 3), random(rows, 2, channels), dtype)


@pytest.mark.parametrize("code", [code for code in CODES if code])
@pytest.mark.parametrize(("shape", "dtype"), cases())
def test_numbers_before_codes(shape, dtype, code):
    """A newest feature and differences: what `cache_dtype="int8-delta"` keeps."""
    rows, channels = shape[0], shape[-1 if len(shape) <= 3 else 1]
    coded, scales = features_of(shape, dtype, code, 2)
    features = [random(*shape, dtype=dtype), *coded]
    check(random(*shape, dtype=dtype), features, scales, random(3), random(rows, 2, channels), dtype)
    check(None, features, scales, random(rows, 3), None, dtype)


def test_a_newest_feature_may_be_laid_out_in_another_way_than_codes():
    coded, scales = features_of((2, 3, 5, 8), torch.float32, "int8", 1)
    newest = random(2, 3, 5, 8).to(memory_format=torch.channels_last)
    check(newest, [newest, *coded], scales, random(2), random(1, 2, 3), torch.float32)
    result = op.launch(newest, [newest, *coded], scales, random(2), None, torch.float32)
    assert result.is_contiguous()


@pytest.mark.parametrize("order", [(1, 0), (0, 1, 2)])
def test_codes_elsewhere_than_last_are_refused(order):
    (code,), scales = features_of((2, 3, 5), torch.float32, "int8", 1)
    (other,), _ = features_of((2, 3, 5), torch.float32, "e4m3", 1)
    features = [[random(2, 3, 5), code, other][j] for j in order]
    with pytest.raises(ValueError, match="in one code come last"):
        op.launch(None, features, scales * (len(order) - 1), random(len(order)), None, torch.float32)


@pytest.mark.parametrize("count", [1, 2, pytest.param(5, marks=FULL), 8])
def test_any_number_of_slots(count):
    features, _ = features_of((2, 70), torch.float32, "", count)
    check(random(2, 70), features, [], random(count), None, torch.float32)


def test_slots_of_weight_zero_do_not_count():
    """Fixed slots, the unused of which hold zeros, give what the used ones give."""
    base, used = random(2, 1000), random(2, 1000)
    empty = torch.zeros_like(used)
    weights = torch.tensor([0.0, 1.5, 0.0], device=used.device)
    result = op.launch(base, [empty, used, empty], [], weights, None, torch.float32)
    assert torch.equal(result, op.launch(base, [used], [], weights[1:2], None, torch.float32))


def test_another_layout_of_the_result_is_refused():
    with pytest.raises(ValueError, match="contiguous"):
        op.launch(None, [random(3, 5)], [], random(1), None, torch.float32, out=random(5, 3).mT)


def test_the_layout_of_the_first_feature_is_not_inherited():
    feature = random(2, 5, 3).mT
    assert op.launch(None, [feature], [], random(1), None, torch.float32).is_contiguous()


def test_too_many_slots_or_weights_are_refused():
    one = random(2, 3)
    with pytest.raises(ValueError, match="1 to 8 features"):
        op.launch(None, [one] * 9, [], random(9), None, torch.float32)
    with pytest.raises(ValueError, match="2 weights for 1 features"):
        op.launch(None, [one], [], random(2), None, torch.float32)


@pytest.mark.parametrize(
    ("base", "features", "weights", "correction", "message"),
    [
        ((1, 4, 6), [(3, 4, 6)], (1,), None, "base and features have one shape"),
        (None, [(3, 4, 6), (3, 4, 5)], (2,), None, "features have one shape"),
        (None, [(3, 4, 6)], (2, 1), None, "weights for 2 rows, of which there are 3"),
        (None, [(3, 4, 6)], (1,), (2, 2, 6), r"a correction is .*, not \[2, 2, 6\]"),
        (None, [(3, 4, 6)], (1,), (1, 2, 5), r"a correction is .*, not \[1, 2, 5\]"),
    ],
)
def test_what_would_read_beyond_a_tensor_is_refused(base, features, weights, correction, message):
    given = [random(*shape) for shape in features]
    base, correction = (None if shape is None else random(*shape) for shape in (base, correction))
    with pytest.raises(ValueError, match=message):
        op.launch(base, given, [], random(*weights), correction, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_place(dtype):
    base, (features, scales) = random(2, 5, 63, dtype=dtype), features_of((2, 5, 63), dtype, "", 2)
    weights, before = random(2), base.clone()
    result = op.launch(base, features, scales, weights, None, dtype, out=base)
    assert result is base
    assert torch.equal(base, op.launch(before, features, scales, weights, None, dtype))


def test_bases_that_are_not_contiguous():
    features, weights = [random(3, 5, 7)], random(1)
    text_and_image = random(3, 9, 7)
    for base in (
        text_and_image[:, 4:],
        random(1, 5, 7).expand(3, 5, 7),
        random(3, 7, 5).mT,
        random(3, 5, 14)[..., ::2],
    ):
        assert not base.is_contiguous()
        check(base, features, [], weights, None, torch.float32)


@pytest.mark.parametrize("shape", [(2, 3, 5, 8), (2, 3, 2, 5, 4)])
def test_channels_innermost(shape):
    form = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    base, feature = (random(*shape).to(memory_format=form) for _ in range(2))
    for correction in (None, random(2, 2, 3)):
        check(base, [feature], [], random(1), correction, torch.float32)
        check(random(*shape), [feature], [], random(1), correction, torch.float32)
        check(base, [random(*shape)], [], random(1), correction, torch.float32)
    result = op.launch(base, [feature], [], random(1), None, torch.float32)
    assert result.is_contiguous(memory_format=form)


def test_features_of_another_layout_than_the_first():
    features = [random(2, 3, 5, 8), random(2, 3, 5, 8).to(memory_format=torch.channels_last)]
    check(None, features, [], random(2), random(1, 2, 3), torch.float32)
    check(None, features[::-1], [], random(2), random(1, 2, 3), torch.float32)


def test_offsets_beyond_32_bits():
    """A base whose rows lie 2^31 elements apart, in memory that is reserved and mostly never touched."""
    stride = 2**31 + 64
    try:
        storage = torch.empty(stride + 1000, dtype=torch.float16, device=random(1).device)
    except RuntimeError:
        pytest.skip("no room for 4 GiB of address space")
    base = storage.as_strided((2, 1000), (stride, 1))
    base.copy_(random(2, 1000))
    check(base, [random(2, 1000, dtype=torch.float16)], [], random(1), None, torch.float16)
