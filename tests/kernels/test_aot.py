"""The machine code of the kernels at the sizes that they are timed at, made ahead of time for GPUs that are not here.

Every vector of a feature is moved in the widest instructions there are, and nothing is kept in memory for want of
registers. PTX could show neither.
"""

from functools import partial

import pytest
import torch
from cubins import compiled
from diffusion_cache.kernels import count_sketch, forecast_residual, gated_residual, relative_l1, store_residual
from diffusion_cache.kernels.codes import DTYPES

ARCHITECTURES = (80, 90, 100)
DTYPE = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
VECTOR = {code: 64 for code in DTYPES} | {"": 128}  # bits that a thread must at least take at once of what is stored
ROWS = 16  # of a tile at most, of which a thread needs scales
QUICK = {("bf16", "e4m3", 90, "FLUX 1024²"), ("fp16", "", 80, "FLUX 1024²"), ("fp32", "", 100, "SDXL 64²")}


# one whose rows are tokens and one whose rows are short, where the sizes change little
TWO = {name: forecast_residual.SHAPES[name] for name in ("FLUX 1024²", "SDXL 64²")}


def cases(shapes, codes=("", *DTYPES), dtypes=DTYPE, quick=QUICK):
    return [
        pytest.param(
            dtype,
            code,
            architecture,
            shape,
            marks=() if (dtype, code, architecture, name) in quick else pytest.mark.full,
            id=f"{dtype}-{code or 'plain'}-sm_{architecture}-{name}",
        )
        for dtype in dtypes
        for code in codes
        for architecture in ARCHITECTURES
        for name, shape in shapes.items()
    ]


def meta(shape, dtype):
    return torch.empty(shape, dtype=dtype, device="meta")


def slots(shape, dtype, code, count):
    """Features and scales of so many slots."""
    features = [meta(shape, DTYPES.get(code, dtype)) for _ in range(count)]
    return features, [meta(shape[:-1], torch.float32) for _ in range(count)] if code else []


def assert_fast(machine, loads, stores, narrow):
    """loads, stores: how many instructions of which width in bits, or of wider ones, there must at least be.

    narrow: loads of up to 32 bits that weights, scales and the like may need.
    """
    assert (machine.stack, machine.local) == (0, 0)
    for found, wanted in ((machine.loads, loads), (machine.stores, stores)):
        for width, least in wanted.items():
            assert sum(count for wide, count in found.items() if wide >= width) >= least, machine
    assert sum(count for width, count in machine.loads.items() if width <= 32) <= narrow, machine
    assert machine.registers <= 128


@pytest.mark.parametrize(("dtype", "code", "architecture", "shape"), cases(forecast_residual.SHAPES))
def test_forecast_residual(dtype, code, architecture, shape):
    kind, count = DTYPE[dtype], 3
    features, scales = slots(shape, kind, code, count)
    weights, base = meta(count, torch.float32), meta(shape, kind)
    launch = partial(forecast_residual.launch, base, features, scales, weights, None, kind)
    (machine,) = compiled(forecast_residual, architecture, launch)
    tile = machine.stores[128]
    loads = {128: tile, 64: tile + count} if code else {128: tile * (count + 1)}
    assert_fast(machine, loads, {128: 1}, narrow=count * (1 + ROWS) if code else count)


@pytest.mark.parametrize(("dtype", "code", "architecture", "shape"), cases(TWO, quick=()))
def test_forecast_residual_of_eight_slots_with_corrected_channels(dtype, code, architecture, shape):
    kind, count = DTYPE[dtype], 8
    features, scales = slots(shape, kind, code, count)
    channels = shape[-1 if len(shape) == 3 else 1]
    weights, correction = meta((shape[0], count), torch.float32), meta((1, 2, channels), torch.float32)
    launch = partial(forecast_residual.launch, meta(shape, kind), features, scales, weights, correction, kind)
    (machine,) = compiled(forecast_residual, architecture, launch)
    assert_fast(machine, {VECTOR[code]: count, 128: 1}, {128: 1}, narrow=count * (1 + ROWS) + 4 * ROWS)


@pytest.mark.parametrize(("dtype", "code", "architecture", "shape"), cases(TWO, DTYPES, ("bf16", "fp32")))
def test_forecast_residual_of_a_feature_and_differences_in_codes(dtype, code, architecture, shape):
    kind, count = DTYPE[dtype], 3
    features, scales = slots(shape, kind, code, count)
    features[0] = meta(shape, kind)
    weights, base = meta(count, torch.float32), meta(shape, kind)
    launch = partial(forecast_residual.launch, base, features, scales[1:], weights, None, kind)
    (machine,) = compiled(forecast_residual, architecture, launch)
    tile = machine.stores[128]
    assert_fast(machine, {128: 2 * tile, 64: 2 * tile + count - 1}, {128: 1}, narrow=count * (1 + ROWS))


@pytest.mark.parametrize(("dtype", "code", "architecture", "shape"), cases(gated_residual.SHAPES, quick=()))
def test_gated_residual(dtype, code, architecture, shape):
    kind = DTYPE[dtype]
    features, scales = slots(shape, kind, code, 2)
    gate, weights = meta((shape[0], 1, shape[2]), kind), meta(2, torch.float32)
    launch = partial(gated_residual.launch, meta(shape, kind), gate, features, scales, weights, None)
    (machine,) = compiled(gated_residual, architecture, launch)
    assert_fast(machine, {VECTOR[code]: 2, 128: 2}, {128: 1}, narrow=2 * (1 + ROWS))


@pytest.mark.parametrize(("dtype", "code", "architecture", "shape"), cases(store_residual.SHAPES, DTYPES))
def test_store_residual(dtype, code, architecture, shape):
    kind = DTYPE[dtype]
    (feature,), (scales,) = slots(shape, kind, code, 1)
    given = (feature, scales, meta(shape, kind), meta(shape, kind))
    (machine,) = compiled(store_residual, architecture, partial(store_residual.launch, *given))
    assert_fast(machine, {128: 2}, {VECTOR[code]: 1}, narrow=0)


@pytest.mark.parametrize(("dtype", "code", "architecture", "shape"), cases(TWO, codes=("",)))
def test_relative_l1(dtype, code, architecture, shape):
    given = meta(shape, DTYPE[dtype]), meta(shape, DTYPE[dtype])
    for measure in relative_l1.MEASURES:
        machine, end = compiled(relative_l1, architecture, partial(relative_l1.launch, *given, measure))
        assert_fast(machine, {128: 2 * relative_l1.PARTS}, {32: 2}, narrow=0)
        assert (end.stack, end.local) == (0, 0)


@pytest.mark.parametrize(("dtype", "code", "architecture", "shape"), cases(count_sketch.SHAPES, codes=("",)))
def test_count_sketch(dtype, code, architecture, shape):
    """Its loads are of one element each, for it gathers."""
    flat, sums = (
        meta((shape[0], shape[1] * shape[2]), DTYPE[dtype]),
        meta((shape[0], count_sketch.WIDTH), torch.float32),
    )
    (machine,) = compiled(count_sketch, architecture, partial(count_sketch.launch, sums, flat, 3, 0, [1] * 6, [1]))
    assert_fast(machine, {}, {128: 1}, narrow=count_sketch.CONFIGS[0][0])


def test_narrow_loads_would_be_seen():
    """Rows of an odd number of values, which cannot be moved in wide vectors."""
    shape = (1, 4608, 3071)
    given = meta(shape, torch.int8), meta(shape[:-1], torch.float32), meta(shape, torch.bfloat16), None
    (machine,) = compiled(store_residual, 90, partial(store_residual.launch, *given))
    assert machine.loads.get(128, 0) == machine.stores.get(64, 0) == 0
    with pytest.raises(AssertionError):
        assert_fast(machine, {128: 1}, {64: 1}, narrow=0)
