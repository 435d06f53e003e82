"""Chunks of a call, the ladder of their levels, and what a bounded history keeps of them."""

import pytest
import torch

from diffusion_cache.chunks import ChunkHistory, Chunks, Ladder, Stream, continues
from diffusion_cache.errors import ConfigError


def call(numbers, levels, ladder=None, rows=1):
    return Chunks.of(torch.tensor([levels] * rows), rows, ladder or Ladder(), numbers)


def observe(history, numbers, levels):
    """Store the chunk's number plus its level as its feature."""
    features = torch.tensor([[[number + level] for number, level in zip(numbers, levels, strict=True)]])
    history.observe_chunks(call(numbers, levels), features, None)


def held(history, number, level=0.0):
    """The nodes of a chunk, None where it is not kept."""
    found = history.of(call([number], [level]))
    return None if found is None else [node for node, _ in found.lanes[0]]


def test_a_ladder_counts_the_levels_of_all_chunks():
    ladder = Ladder()
    ladder.add([1000.0, 1000.0, 400.0])
    assert [ladder.step(level) for level in (1000.0, 400.0)] == [0, 1]
    ladder.add([900.0, 0.0])
    ladder.add([1000.0, 900.0])
    assert [ladder.step(level) for level in (1000.0, 900.0, 400.0, 0.0)] == [0, 1, 2, 3]


@pytest.mark.parametrize("shape", [(2, 12, 5), (2, 5, 3, 2, 2)], ids=["tokens", "map"])
def test_chunks_are_taken_apart_and_put_together(shape):
    chunks = call([4, 5, 6], [1.0, 2.0, 3.0], rows=2)
    tensor = torch.arange(120.0)[: torch.Size(shape).numel()].reshape(shape)
    assert chunks.divides(tensor)
    apart = chunks.apart(tensor)
    assert len(apart) == 6
    expected = tensor[1, 4:8] if len(shape) == 3 else tensor[1, :, 1]
    assert torch.equal(apart[4], expected)  # row 1, chunk 5
    assert torch.equal(chunks.together(apart), tensor)
    assert not chunks.divides(tensor[:1])
    assert not chunks.divides(torch.zeros(2, 3))
    assert not chunks.divides(torch.zeros(2, 4, 1))


def test_features_are_found_by_chunk_wherever_it_is_in_the_call():
    history = ChunkHistory(2, Stream())
    observe(history, [0, 1, 2], [10.0, 20.0, 30.0])
    observe(history, [1, 2, 3], [10.0, 20.0, 30.0])
    found = history.of(call([2, 3, 1], [10.0, 30.0, 5.0]))
    assert [[node for node, _ in lane] for lane in found.lanes] == [[30.0, 20.0], [30.0], [20.0, 10.0]]
    stored = [[found.slots[slot][0][row].item() for _, slot in lane] for row, lane in enumerate(found.lanes)]
    assert stored == [[32.0, 22.0], [33.0], [21.0, 11.0]]


def test_a_chunk_that_rests_keeps_one_feature_of_its_level():
    history = ChunkHistory(2, Stream())
    for level in (1000.0, 900.0, 900.0, 900.0):
        observe(history, [0], [level])
    assert held(history, 0, 900.0) == [1000.0, 900.0]


def test_a_chunk_whose_levels_turn_round_begins_anew():
    history = ChunkHistory(2, Stream())
    observe(history, [0], [500.0])
    observe(history, [0], [400.0])
    assert held(history, 0, 300.0) == [500.0, 400.0]
    assert held(history, 0, 450.0) is None
    observe(history, [0], [1000.0])
    assert held(history, 0, 900.0) == [1000.0]
    assert continues([(0.1, 0), (0.2, 1)], 0.3)  # models whose time rises


def test_what_was_longest_in_no_call_is_dropped_and_sinks_never():
    history = ChunkHistory(1, Stream(capacity=4, sinks=1))
    for first in (0, 1, 2):
        observe(history, [first, first + 1], [100.0 - first, 100.0])
    assert [held(history, number) is not None for number in range(4)] == [True] * 4
    assert held(history, 1)  # in a call again, and so the youngest
    observe(history, [4], [100.0])
    assert [held(history, number) is not None for number in range(5)] == [True, True, False, True, True]
    for number in range(5, 50):
        observe(history, [number], [100.0])
    assert held(history, 0) == [100.0]
    assert history.nbytes == 4 * 4


def test_without_a_capacity_calls_and_sinks_are_kept():
    history = ChunkHistory(1, Stream(sinks=1))
    for first in range(9):
        observe(history, [first, first + 1], [50.0, 100.0])
    assert [held(history, number) is not None for number in range(10)] == [True, *[False] * 7, True, True]
    assert history.nbytes == 3 * 4


@pytest.mark.parametrize(("rows", "tokens"), [(2, 1), (1, 3)])
def test_another_number_of_rows_or_size_begins_anew(rows, tokens):
    history = ChunkHistory(1, Stream(sinks=3))
    observe(history, [0, 1], [50.0, 100.0])
    history.observe_chunks(call([0], [40.0], rows=rows), torch.zeros(rows, tokens, 1), None)
    assert held(history, 1) is None
    assert history.nbytes == rows * tokens * 4


@pytest.mark.parametrize("options", [dict(capacity=0), dict(capacity=2.0), dict(capacity=True), dict(sinks=-1)])
def test_bad_options_are_refused(options):
    with pytest.raises(ConfigError, match="stream: "):
        Stream(**options)
