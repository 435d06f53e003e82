"""The kernels on a GPU, beside their tests in tests/kernels/ops, which run there as well."""

import pytest
import torch

from diffusion_cache import ops

pytestmark = pytest.mark.gpu

SHAPE = (2, 4096, 1536)


@pytest.fixture
def plain(monkeypatch):
    """Calls a function with PyTorch in place of the kernels."""

    def call(function, *arguments, **options):
        with monkeypatch.context() as patch:
            patch.setattr(ops, "_MODE", "off")
            return function(*arguments, **options)

    return call


def random(*shape, dtype=torch.bfloat16):
    return torch.randn(shape, device="cuda", dtype=dtype)


def test_kernels_run():
    assert ops._kernels_run(torch.device("cuda", torch.cuda.current_device()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "weights", [(0.5, 0.0, -1.5), torch.randn(3), torch.randn(2, 3)], ids=["numbers", "one", "rows"]
)
def test_forecasts_are_those_of_pytorch(dtype, weights, plain):
    base, features = random(*SHAPE, dtype=dtype), [random(*SHAPE, dtype=dtype) for _ in range(3)]
    weights = weights.cuda() if isinstance(weights, torch.Tensor) else weights
    given = base, features, weights, random(1, 2, SHAPE[-1], dtype=torch.float32)
    found, expected = ops.forecast(*given), plain(ops.forecast, *given)
    assert (found.float() - expected.float()).abs().max() <= 16 * torch.finfo(dtype).eps * expected.float().abs().max()


@pytest.mark.parametrize("code", list(ops.CODES))
def test_codes_are_the_same_bits_as_those_of_pytorch(code, plain):
    """Which casts to e4m3 with the GPU's own instructions where it has them."""
    out, base = random(*SHAPE), random(*SHAPE)
    found, expected = ops.encode_residual(out, base, code), plain(ops.encode_residual, out, base, code)
    assert torch.equal(found.codes.view(torch.uint8), expected.codes.view(torch.uint8))
    assert torch.equal(found.scales, expected.scales)
    read = ops.forecast(base, [found], (1.0,))
    assert torch.allclose(read, plain(ops.forecast, base, [found], (1.0,)), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("measure", ["l1", "l2", "cosine"])
def test_changes_are_those_of_pytorch(measure, plain):
    current, previous = random(*SHAPE), random(*SHAPE)
    found = ops.relative_change(current, previous, measure)
    assert torch.allclose(found, plain(ops.relative_change, current, previous, measure), rtol=1e-4, atol=1e-4)


def test_nothing_waits_for_the_device(plain):
    base, features = random(*SHAPE), [random(*SHAPE) for _ in range(2)]
    gate, sums = random(SHAPE[0], 1, SHAPE[2]), torch.zeros(SHAPE[0], 1024, device="cuda")

    def everything(weights, seed):
        ops.forecast(base, features, weights)
        ops.gated_forecast(base, gate, features, weights)
        ops.relative_change(base, features[0])
        ops.encode_residual(base, features[0], "int8")
        ops.add_sketch(sums, base.flatten(1), 0, 23, seed)
        ops.shared((0, 1), base.device, torch.int64)

    for way in (lambda *given: everything(*given), lambda *given: plain(everything, *given)):
        way((0.25, 0.5), 1)  # the first call compiles
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            way((0.5, 0.25), 2)  # with numbers that are not on the device yet
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_more_than_two_to_the_31_elements():
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free device memory")
    feature = torch.ones(3, 2**29, 2, device="cuda", dtype=torch.float16)
    base = torch.zeros_like(feature)
    base[2, -1] = 5.0
    result = ops.forecast(base, [feature], (2.0,))
    assert result[2, -1].tolist() == [7.0, 7.0]
    assert result[0, 0].tolist() == [2.0, 2.0]
    assert ops.relative_change(result, feature)[0].item() == 1.0
