"""Operations on the cached path against float64 references."""

import pytest
import torch

from diffusion_cache import ops

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(3, 63), (1000,), (2, 5, 7), ()]


def random(shape, dtype, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weights", [(1.0,), (-0.7,), (-1.0, 2.0), (3.0, -8.0, 6.0), (0.0, 1.0), (0.5, 0.0, -0.25)])
@pytest.mark.parametrize("with_base", [True, False])
def test_forecast_equals_the_sum_in_float64(dtype, shape, weights, with_base):
    features = [random(shape, dtype, seed) for seed in range(len(weights))]
    base = random(shape, dtype, 99) if with_base else None
    expected = sum(weight * feature.double() for weight, feature in zip(weights, features, strict=True))
    magnitude = sum(abs(weight) * feature.double().abs() for weight, feature in zip(weights, features, strict=True))
    if base is not None:
        expected, magnitude = expected + base.double(), magnitude + base.double().abs()

    result = ops.forecast(base, features, weights)

    assert result.dtype == dtype
    assert result.shape == shape
    # one rounding to the result's dtype, and float32 sums beneath it
    accumulate = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    bound = torch.finfo(dtype).eps / 2 * expected.abs() * 1.001 + 8 * accumulate * magnitude + torch.finfo(dtype).tiny
    assert bool(((result.double() - expected).abs() <= bound).all())


def test_low_precision_accumulates_in_float32():
    """2048 + 1 + 1 − 2048 is 2; sums rounded to float16 at each step would give 0."""
    base = torch.tensor([2048.0], dtype=torch.float16)
    one = torch.tensor([1.0], dtype=torch.float16)
    assert ops.forecast(base, [one, one, base], (1.0, 1.0, -1.0)).item() == 2.0
    big = torch.tensor([60000.0], dtype=torch.float16)  # twice this overflows float16
    assert ops.forecast(None, [big, big], (2.0, -1.0)).item() == 60000.0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weights", [(1.0,), (0.0,), (2.0,), (0.0, 1.0), (-1.0, 2.0)])
@pytest.mark.parametrize("with_base", [True, False])
def test_result_is_new_and_the_inputs_stay(dtype, weights, with_base):
    features = [random((4, 5), dtype, seed) for seed in range(len(weights))]
    inputs = [*features, random((4, 5), dtype, 9)] if with_base else features
    before = [tensor.clone() for tensor in inputs]
    result = ops.forecast(inputs[-1] if with_base else None, features, weights)
    assert result.untyped_storage().data_ptr() not in {tensor.untyped_storage().data_ptr() for tensor in inputs}
    result.fill_(123)
    assert all(torch.equal(tensor, old) for tensor, old in zip(inputs, before, strict=True))


def test_zero_weights():
    broken, good, base = torch.full((3,), float("nan")), torch.ones(3), torch.full((3,), 5.0)
    assert torch.equal(ops.forecast(base, [broken], (0.0,)), base)
    assert torch.equal(ops.forecast(None, [broken], (0.0,)), torch.zeros(3))
    assert torch.equal(ops.forecast(base, [broken, good], (0.0, 2.0)), torch.full((3,), 7.0))


def test_integers_are_reused_as_they_are():
    assert torch.equal(ops.forecast(None, [torch.arange(3)], (1.0,)), torch.arange(3))


def test_another_number_of_weights_is_an_error():
    with pytest.raises(ValueError):
        ops.forecast(None, [torch.ones(1)], (1.0, 2.0))
