"""Operations on the cached path against float64 references."""

import pytest
import torch

from diffusion_cache import ops

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(3, 63), (1000,), (2, 5, 7), ()]
WEIGHTS = [(1.0,), (-0.7,), (-1.0, 2.0), (3.0, -8.0, 6.0), (0.0, 1.0), (0.5, 0.0, -0.25)]


def random(shape, dtype, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def assert_is_the_sum(result, base, features, weights):
    """Against the sum in float64; weights: numbers, or float64 tensors that broadcast over the features."""
    dtype = features[0].dtype
    expected = sum(weight * feature.double() for weight, feature in zip(weights, features, strict=True))
    magnitude = sum(abs(weight) * feature.double().abs() for weight, feature in zip(weights, features, strict=True))
    if base is not None:
        expected, magnitude = expected + base.double(), magnitude + base.double().abs()
    assert result.dtype == dtype
    assert result.shape == features[0].shape
    # one rounding to the result's dtype, and float32 sums beneath it
    accumulate = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    bound = torch.finfo(dtype).eps / 2 * expected.abs() * 1.001 + 8 * accumulate * magnitude + torch.finfo(dtype).tiny
    assert bool(((result.double() - expected).abs() <= bound).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("with_base", [True, False])
def test_forecast_equals_the_sum_in_float64(dtype, shape, weights, with_base):
    features = [random(shape, dtype, seed) for seed in range(len(weights))]
    base = random(shape, dtype, 99) if with_base else None
    assert_is_the_sum(ops.forecast(base, features, weights), base, features, weights)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("with_base", [True, False])
def test_a_tensor_of_weights_gives_the_same_sum(dtype, shape, weights, with_base):
    features = [random(shape, dtype, seed) for seed in range(len(weights))]
    base = random(shape, dtype, 99) if with_base else None
    given = torch.tensor(weights, dtype=torch.float64)
    assert_is_the_sum(ops.forecast(base, features, given), base, features, weights)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3,), (3, 63), (3, 5, 7), (3, 2, 4, 4)])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("with_base", [True, False])
def test_each_row_has_its_own_weights(dtype, shape, count, with_base):
    features = [random(shape, dtype, seed) for seed in range(count)]
    base = random(shape, dtype, 99) if with_base else None
    table = torch.tensor([[1.0, 0.0, 0.0], [-1.0, 2.0, 0.0], [3.0, -8.3, 6.7]], dtype=torch.float64)[:, :count]
    weights = [column.reshape(3, *[1] * (len(shape) - 1)) for column in table.unbind(1)]
    assert_is_the_sum(ops.forecast(base, features, table), base, features, weights)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "axis"), [((3, 63), 1), ((3, 5, 7), 2), ((3, 2, 4, 4), 1), ((3, 2, 5, 4, 4), 1)])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize(
    "weights", [(0.5, -0.25), (0.0, 0.0), torch.tensor([0.5, -0.25])], ids=["some", "none", "tensor"]
)
def test_corrections(dtype, shape, axis, rows, alike, weights):
    """scale·y + bias of each channel, or of all alike, rounded once."""
    features, base = [random(shape, dtype, seed) for seed in range(2)], random(shape, dtype, 9)
    count = shape[axis]
    correction = random((rows, 2, 1 if alike else count), torch.float64, 3)
    spread = [1] * len(shape)
    spread[0], spread[axis] = rows, count
    scale, bias = (part.expand(rows, count).reshape(spread) for part in correction.unbind(1))
    result = ops.forecast(base, features, weights, correction)
    # the same sum, of inputs that are scaled already
    scaled = [tensor.double() * scale for tensor in (*features, base)]
    expected = sum(float(w) * tensor for w, tensor in zip([*weights, 1.0], scaled, strict=True)) + bias
    magnitude = sum(tensor.abs() for tensor in scaled) + bias.abs()
    accumulate = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    assert (result.dtype, result.shape) == (dtype, shape)
    bound = torch.finfo(dtype).eps / 2 * expected.abs() * 1.001 + 8 * accumulate * magnitude + torch.finfo(dtype).tiny
    assert bool(((result.double() - expected).abs() <= bound).all())
    assert ops.channels(result) == count


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_with_equal_weights_are_one_forecast(dtype):
    """As many rows as features, so that rows and columns of the weights could be confused."""
    features = [random((2, 5), dtype, seed) for seed in range(2)]
    weights = torch.tensor([-1.0, 2.0])
    expected = ops.forecast(None, features, weights)
    assert torch.equal(ops.forecast(None, features, weights.expand(2, 2)), expected)
    swapped = torch.stack([weights, weights.flip(0)])
    assert torch.equal(ops.forecast(None, features, swapped)[0], expected[0])
    assert torch.equal(ops.forecast(None, features, swapped)[1], ops.forecast(None, features, weights.flip(0))[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_rows_that_reuse_one_feature_get_exactly_that(dtype):
    features = [random((2, 50), dtype, seed) for seed in range(2)]
    base = random((2, 50), dtype, 9)
    picked = ops.forecast(None, features, torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    assert torch.equal(picked, torch.stack([features[1][0], features[0][1]]))
    added = ops.forecast(base, features, torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    assert torch.equal(added, torch.stack([(base[0] + features[1][0]), (base[1] + features[0][1])]))


def in_numbers(weights, rows):
    return weights


def in_a_tensor(weights, rows):
    return torch.tensor(weights)


def by_rows(weights, rows):
    return torch.tensor(weights).repeat(rows, 1)


FORMS = pytest.mark.parametrize("form", [in_numbers, in_a_tensor, by_rows], ids=lambda form: form.__name__)


@FORMS
def test_low_precision_accumulates_in_float32(form):
    """2048 + 1 + 1 − 2048 is 2; sums rounded to float16 at each step would give 0."""
    base = torch.tensor([2048.0], dtype=torch.float16)
    one = torch.tensor([1.0], dtype=torch.float16)
    assert ops.forecast(base, [one, one, base], form((1.0, 1.0, -1.0), 1)).item() == 2.0
    big = torch.tensor([60000.0], dtype=torch.float16)  # twice this overflows float16
    assert ops.forecast(None, [big, big], form((2.0, -1.0), 1)).item() == 60000.0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weights", [(1.0,), (0.0,), (2.0,), (0.0, 1.0), (-1.0, 2.0)])
@pytest.mark.parametrize("with_base", [True, False])
@FORMS
def test_result_is_new_and_the_inputs_stay(dtype, weights, with_base, form):
    features = [random((4, 5), dtype, seed) for seed in range(len(weights))]
    inputs = [*features, random((4, 5), dtype, 9)] if with_base else features
    before = [tensor.clone() for tensor in inputs]
    result = ops.forecast(inputs[-1] if with_base else None, features, form(weights, 4))
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


def test_integers_are_not_corrected():
    corrected = ops.forecast(None, [torch.arange(4).reshape(2, 2)], (1.0,), torch.full((1, 2, 1), 0.5))
    assert torch.equal(corrected, torch.arange(4).reshape(2, 2))


def test_integers_of_rows_are_reused_as_they_are():
    features = [torch.tensor([[1, 2], [3, 4]]), torch.tensor([[5, 6], [7, 2**40]])]
    picked = ops.forecast(None, features, torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    assert torch.equal(picked, torch.tensor([[1, 2], [7, 2**40]]))


def test_another_number_of_weights_is_an_error():
    with pytest.raises(ValueError):
        ops.forecast(None, [torch.ones(1)], (1.0, 2.0))
