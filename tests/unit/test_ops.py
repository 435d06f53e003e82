"""Operations on the cached path against float64 references."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from recorded_graph import RecordedGraph

from diffusion_cache import count_sketch, ops
from diffusion_cache.count_sketch import keys_of
from diffusion_cache.errors import ConfigError

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


@pytest.mark.parametrize("weights", [(1.0, 2.0), torch.ones(2), torch.ones(3, 2)], ids=["numbers", "tensor", "rows"])
def test_another_number_of_weights_is_an_error(weights):
    with pytest.raises(ValueError, match="each feature needs a weight"):
        ops.forecast(None, [torch.ones(3, 5)], weights)


def test_modes_of_the_kernels():
    assert ops._mode({}) == "auto"
    assert ops._mode({"DIFFUSION_CACHE_KERNELS": "off"}) == "off"
    assert ops._mode({"DIFFUSION_CACHE_KERNELS": "interpret", "TRITON_INTERPRET": "1"}) == "interpret"
    with pytest.raises(ConfigError, match="auto, interpret, off, not 'fast'"):
        ops._mode({"DIFFUSION_CACHE_KERNELS": "fast"})
    with pytest.raises(ConfigError, match="needs TRITON_INTERPRET=1"):
        ops._mode({"DIFFUSION_CACHE_KERNELS": "interpret"})


def test_numbers_that_come_again_are_shared():
    with torch.inference_mode():
        first = ops.shared((1.0, 2.0), CPU)
    assert ops.shared((1.0, 2.0), CPU) is first
    assert ops.shared((1.0, 2.0), CPU, torch.int64).dtype == torch.int64
    assert ops.on_device((1.0, 2.0), CPU) is not ops.on_device((1.0, 2.0), CPU)
    scaled = torch.ones(2, requires_grad=True) * first  # which is of use outside of the mode that it was made in
    scaled.sum().backward()


def test_numbers_of_the_host_are_made_there_whatever_the_default_device():
    with torch.device("meta"):
        assert ops.on_device((1.0, 2.0), CPU).tolist() == [1.0, 2.0]


CPU, CUDA = torch.device("cpu"), torch.device("cuda", 7)  # the second one is not there


@pytest.fixture
def capturing(monkeypatch):
    """Says whether a capture is under way on a device whose kernels nothing is known of yet; returns a switch."""
    state = SimpleNamespace(on=True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=1))
    monkeypatch.setattr(ops, "on_device", lambda *_: torch.ones(1))
    yield state
    ops._WORKS.pop(CUDA, None)
    ops._shared.cache_clear()


def test_nothing_is_tried_or_kept_in_a_capture(monkeypatch, capturing):
    tried = []
    monkeypatch.setattr(ops, "_try_kernel", lambda device: tried.append(device) or True)
    assert not ops._kernels_run(CUDA)
    assert ops.shared((1.0,), CUDA) is not ops.shared((1.0,), CUDA)
    capturing.on = False
    assert tried == []
    assert ops._kernels_run(CUDA)
    assert ops._kernels_run(CUDA)
    assert tried == [CUDA]
    kept = ops.shared((1.0,), CUDA)
    assert ops.shared((1.0,), CUDA) is kept
    capturing.on = True
    assert ops._kernels_run(CUDA)
    assert ops.shared((1.0,), CUDA) is not kept


def test_want_of_memory_says_nothing_of_kernels(monkeypatch, capturing):
    capturing.on = False
    for error, known in ((torch.OutOfMemoryError("full"), {}), (RuntimeError("no compiler"), {CUDA: False})):

        def fail(*_, error=error, **__):
            raise error

        with monkeypatch.context() as patch, warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            patch.setattr(torch, "ones", fail)
            assert not ops._kernels_run(CUDA)
        assert {device: runs for device, runs in ops._WORKS.items() if device == CUDA} == known
        assert len(told) == len(known)


class Subclass(torch.Tensor):
    """What makes its own of operations."""


def test_kernels_take_plain_tensors_and_are_launched_right_away_unless_operations_are_watched(monkeypatch):
    launched = []
    kernel = SimpleNamespace(launch=lambda base, *_: launched.append(base) or base)
    monkeypatch.setattr(ops, "_MODE", "interpret")
    monkeypatch.setattr(ops, "_kernels_run", lambda device: True)
    monkeypatch.setattr(ops, "_kernel", lambda name: kernel)
    base, features = random((2, 5, 8), torch.float32, 1), [random((2, 5, 8), torch.float32, 2)]
    expected = base + 0.5 * features[0]
    assert ops.forecast(base, features, (0.5,)) is base
    of_others = ops.forecast(base.as_subclass(Subclass), features, (0.5,))
    assert torch.equal(of_others.as_subclass(torch.Tensor), expected)
    with RecordedGraph([]) as graph:
        found = ops.forecast(base, features, (0.5,))
    assert torch.equal(found, expected)
    assert [operator for operator, *_ in graph.operations] == [torch.ops.diffusion_cache.forecast_residual.default]
    assert len(launched) == 1


def coded(shape, code, seed):
    return ops.encode_residual(random(shape, torch.float32, seed), None, code)


def operator_calls():
    """Every operator with arguments of each kind."""
    shape, features = (2, 5, 8), [random((2, 5, 8), torch.float32, seed) for seed in range(2)]
    pairs = [coded(shape, "int8", seed) for seed in range(2)]
    codes, scales = [pair.codes for pair in pairs], [pair.scales for pair in pairs]
    image = random((2, 3, 4, 5), torch.float32, 3).to(memory_format=torch.channels_last)
    table, correction = torch.randn(2, 2), torch.randn(1, 2, 8)
    yield ops._forecast_residual, (features[0], features, [], table[0], None, torch.float32)
    yield ops._forecast_residual, (None, codes, scales, table, correction, torch.bfloat16)
    mixed = [image, torch.ones(image.shape, dtype=torch.int8)]
    yield ops._forecast_residual, (image, mixed, [torch.ones(image.shape[:-1])], table[0], None, torch.float32)
    yield ops._forecast_residual, (image, [image + 1], [], torch.ones(1), None, torch.float32)
    yield ops._gated_residual, (features[0], features[1][:, :1], features, [], table[0], None)
    yield ops._store_residual, (codes[0].clone(), scales[0].clone(), features[0], features[1])
    yield ops._relative_l1, (features[0], features[1], "l2")
    yield ops._count_sketch, (torch.zeros(2, 16), features[0].flatten(1), 3, 23, *keys_of(5, 23, 2))


@pytest.mark.parametrize(("operator", "arguments"), list(operator_calls()))
def test_operators_are_registered_as_they_behave(operator, arguments):
    torch.library.opcheck(operator, arguments)


@pytest.mark.parametrize(("code", "error"), [("fp8", 1 / 16), ("int8", 0.5 / 127)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_codes_hold_a_residual_to_their_precision(code, error, dtype):
    out, base = random((3, 5, 64), dtype, 1) * 100, random((3, 5, 64), dtype, 2)
    residual = out.float() - base.float()
    encoded = ops.encode_residual(out, base, code)
    assert (encoded.codes.dtype, encoded.scales.shape) == (ops.CODES[code], (3, 5))
    assert encoded.dtype == dtype
    read = ops.forecast(None, [encoded._replace(dtype=torch.float32)], (1.0,))
    largest = residual.abs().amax(-1, keepdim=True)
    # e4m3 rounds in proportion to a number, down to its smallest steps; int8 to steps of the row's largest
    bound = error * residual.abs() + largest / 448 / 2**10 if code == "fp8" else error * largest
    assert ((read - residual).abs() <= 1.001 * bound).all()
    into = ops.Coded(torch.empty_like(encoded.codes), torch.empty_like(encoded.scales), dtype)
    assert ops.encode_residual(out, base, code, into) is into
    assert torch.equal(into.codes.view(torch.uint8), encoded.codes.view(torch.uint8))


@pytest.mark.parametrize(
    "weights",
    [(0.5, -2.0), (0.0, 1.0), torch.tensor([0.5, -2.0]), torch.tensor([[-1.0, -1.2], [1.0, 0.4]])],
    ids=["numbers", "one of them zero", "a tensor", "of rows"],
)
@pytest.mark.parametrize("code", list(ops.CODES))
def test_forecasts_from_codes(code, weights):
    pairs = [coded((2, 5, 8), code, seed)._replace(dtype=torch.bfloat16) for seed in range(2)]
    base, correction = random((2, 5, 8), torch.bfloat16, 5), torch.randn(1, 2, 8)
    result = ops.forecast(base, pairs, weights, correction)
    values = [pair.codes.float() * pair.scales[..., None] for pair in pairs]
    expected = ops.forecast(base.float(), values, weights, correction)
    assert result.dtype == torch.bfloat16
    assert torch.equal(result, expected.bfloat16())


def test_codes_of_what_is_not_finite_show_in_the_scales():
    out = torch.ones(4, 8)
    out[1, 2], out[2, 2], out[3] = float("nan"), float("inf"), 0.0
    for code in ops.CODES:
        encoded = ops.encode_residual(out, None, code)
        assert encoded.scales.isfinite().tolist() == [True, False, False, True]
        read = ops.forecast(None, [encoded], (1.0,))
        assert torch.equal(read[3], out[3])
        assert read[1].isnan().all()


@pytest.mark.parametrize("code", list(ops.CODES))
@pytest.mark.parametrize("with_base", [True, False])
def test_what_is_encoded_stays(code, with_base):
    out, base = random((2, 5, 8), torch.float32, 1), random((2, 5, 8), torch.float32, 2) if with_base else None
    before = [tensor.clone() for tensor in (out, base) if tensor is not None]
    ops.encode_residual(out, base, code)
    assert all(torch.equal(now, was) for now, was in zip((out, base), before, strict=False))


def test_gated_forecast():
    base, features = random((2, 5, 8), torch.float16, 1), [random((2, 5, 8), torch.float16, seed) for seed in (2, 3)]
    gate, weights, correction = random((2, 1, 8), torch.float16, 4), torch.tensor([0.5, -1.0]), torch.randn(2, 2, 8)
    result = ops.gated_forecast(base, gate, features, weights, correction)
    branch = ops.forecast(None, [feature.float() for feature in features], weights, correction)
    assert result.dtype == torch.float16
    assert torch.equal(result, (base.float() + gate.float() * branch).half())


@pytest.mark.parametrize("measure", ["l1", "l2", "cosine"])
def test_relative_change_in_float64(measure):
    a, b = (random((3, 4, 50), torch.float64, seed) for seed in range(2))
    wide = [x.flatten(1) for x in (a, b)]
    expected = {
        "l1": (wide[0] - wide[1]).abs().mean(1) / wide[1].abs().mean(1),
        "l2": (wide[0] - wide[1]).norm(dim=1) / wide[1].norm(dim=1),
        "cosine": torch.cosine_similarity(*wide),
    }
    found = ops.relative_change(a.float(), b.float(), measure)
    assert torch.allclose(found.double(), expected[measure], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("key", keys_of(7, 20, 30).stages)
def test_hashes_are_the_same_in_32_bits(key):
    numbers = [0, 1, 5, 2**31 - 1, 2**31 + 5, 2**40 + 3]
    narrow = torch.tensor(numbers).to(torch.int32)
    assert count_sketch.mix(narrow, key).tolist() == [count_sketch.mix(number, key) for number in numbers]


def test_a_sketch_waits_for_nothing():
    """Of samples whose signs are those of two hashes, in runs so late that their indices take more than 32 bits."""
    flat, sums = random((3, 300), torch.float32, 1), torch.zeros(3, 64)
    with RecordedGraph([]):
        ops.add_sketch(sums, flat, 2**29, 22, 5)
    expected = torch.zeros(3, 64)
    for sample in range(3):
        ops.add_sketch(expected[sample : sample + 1], flat[sample : sample + 1], 2**29, 22 + sample, 5)
    assert torch.equal(sums, expected)
