"""How far a tensor is from another."""

import pytest
import torch
from diffusion_cache.kernels import relative_l1 as op
from diffusion_cache.kernels.tiles import start
from kernel_cases import cases, poisoned, random


@pytest.mark.parametrize(("shape", "dtype"), cases())
def test_equals_the_reference(shape, dtype):
    current, previous = random(*shape, dtype=dtype), random(*shape, dtype=dtype)
    for measure in op.MEASURES:
        expected, result = op.reference(current, previous, measure), op.launch(current, previous, measure)
        assert torch.allclose(result, expected, rtol=op.TOLERANCE[dtype], atol=1e-6)


def test_many_parts_sum_up_to_the_same_bits_every_time():
    current, previous = random(2, 40_000), random(2, 40_000)
    result = op.launch(current, previous)
    assert torch.allclose(result, op.reference(current, previous), rtol=1e-5)
    assert torch.equal(result, op.launch(current, previous))


@pytest.mark.parametrize("measure", op.MEASURES)
def test_more_parts_than_are_added_up_at_once(measure):
    """Inputs of real models, of millions of numbers, make as many."""
    partial = random(2, 2500, 3).abs()
    first, second, third = partial.sum(1).unbind(1)
    expected = {
        "l1": first / second,
        "l2": first.sqrt() / second.sqrt(),
        "cosine": first / (third.sqrt() * second.sqrt()),
    }
    result = poisoned(first)
    start(op.finish, 2, 4, result.device, result, partial, 2500, MEASURE=measure, WIDTH=1024)
    assert torch.allclose(result, expected[measure], rtol=1e-5)


def test_zeros_infinities_and_nan_show_in_their_rows():
    previous = torch.ones(5, 9, device=random(1).device)
    current = previous.clone()
    previous[1] = 0.0
    previous[2], current[2] = 0.0, 0.0
    current[3, 4] = float("nan")
    previous[4], current[4] = float("inf"), float("inf")
    for measure in ("l1", "l2"):
        result = op.launch(current, previous, measure).tolist()
        assert result[:3] == [0.0, float("inf"), 0.0]
        assert all(value != value for value in result[3:])


def test_strided_and_broadcast_rows():
    current, previous = random(3, 9, 7)[:, 4:], random(1, 5, 7).expand(3, 5, 7)
    assert torch.allclose(op.launch(current, previous), op.reference(current, previous), rtol=1e-5)
    form = torch.channels_last
    a, b = (random(2, 3, 4, 5).to(memory_format=form) for _ in range(2))
    assert torch.allclose(op.launch(a, b), op.reference(a, b), rtol=1e-5)
    assert torch.allclose(op.launch(a.contiguous(), b), op.reference(a, b), rtol=1e-5)


def test_an_unknown_measure_is_refused():
    with pytest.raises(ValueError, match="l1, l2, cosine"):
        op.launch(random(1, 2), random(1, 2), "l3")


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match="one shape"):
        op.launch(random(2, 3), random(2, 4))
