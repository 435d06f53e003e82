"""How a module's slices are sized and put together."""

import pytest
import torch
from torch import Tensor, nn

from diffusion_cache.errors import DiffusionCacheError
from diffusion_cache.measure import LiveBytes
from diffusion_cache.slicing.runner import FRAME, Chain, Frame, Runner, _parts


@pytest.mark.parametrize("total", [1, 2, 7, 63, 100])
@pytest.mark.parametrize("size", [1, 2, 7, 99, 100, 1000])
@pytest.mark.parametrize("one_first", [False, True])
def test_parts_cover_the_range_in_as_few_slices_as_fit(total, size, one_first):
    parts = _parts(total, size, one_first)
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(total))
    lengths = [part.stop - part.start for part in parts]
    if one_first:
        assert lengths.pop(0) == 1
    assert len(lengths) == -(-(total - one_first) // size)
    assert not lengths or (max(lengths) <= size and max(lengths) - min(lengths) <= 1)


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2


X = torch.randn(3, 10, 25, generator=torch.Generator().manual_seed(0))
ROW = 2 * 3 * 25 * 4  # bytes of x[:, i] twice: a temporary and its double


def swept(runner, frame, into=None, seen=None):
    def run(part):
        assert frame.inside
        if seen is not None:
            seen.append(part.stop - part.start)
        return (X[:, part] + 1) * 2

    token = FRAME.set(frame)
    try:
        return runner.sweep("stage", X, X.shape[1], run, dim=1, into=into)
    finally:
        FRAME.reset(token)
        assert not frame.inside


@pytest.mark.parametrize(
    ("max_bytes", "sizes"), [(ROW, [1] * 10), (3 * ROW, [2, 3, 2, 3]), (3 * ROW + 1, [2, 3, 2, 3]), (100 * ROW, [10])]
)
def test_slices_are_as_large_as_fits(max_bytes, sizes):
    runner, first, later = Runner("x", Doubled(), None), [], []
    frame = Frame(max_bytes)
    assert torch.equal(swept(runner, frame, seen=first), (X + 1) * 2)
    assert first[0] == 1  # measured
    assert torch.equal(swept(runner, frame, seen=later), (X + 1) * 2)
    assert later == sizes
    assert frame.least == ROW


@pytest.mark.parametrize("max_bytes", [ROW, 4 * ROW])
def test_a_sweep_takes_no_more_than_its_output_and_a_slice(max_bytes):
    runner, frame = Runner("x", Doubled(), None), Frame(max_bytes)
    swept(runner, frame)
    with LiveBytes() as made:
        output = swept(runner, frame)
    assert made.peak <= X.nbytes + max_bytes
    assert made.peak >= X.nbytes + max_bytes / 2
    kept = torch.full_like(X, torch.nan)
    with LiveBytes() as made:
        assert swept(runner, frame, into=kept) is kept
    assert torch.equal(kept, output)
    assert made.peak <= max_bytes


class Dropping(nn.Module):
    """A block that does not hand the output of a group on to the group's last module."""

    def forward(self, x: Tensor) -> Tensor:
        FRAME.get().done = self, x
        return x


def test_a_group_whose_output_is_not_handed_on_is_no_silent_error():
    block = Dropping()
    assert Chain(block)(lambda x: x, X) is X  # outside of a sliced denoiser
    token = FRAME.set(Frame(ROW))
    with pytest.raises(DiffusionCacheError, match="Dropping was sliced together"):
        Chain(block)(block.forward, X)
    assert FRAME.get().done is None
    assert Chain(block)(lambda x: x, X) is X
    FRAME.reset(token)


def test_an_error_in_a_slice_leaves_no_trace():
    frame, runner = Frame(ROW), Runner("x", Doubled(), None)

    def fail(part):
        raise RuntimeError("inside")

    token = FRAME.set(frame)
    with pytest.raises(RuntimeError, match="inside"):
        runner.sweep("stage", X, 3, fail)
    FRAME.reset(token)
    assert not frame.inside
    assert torch.equal(swept(runner, frame), (X + 1) * 2)
