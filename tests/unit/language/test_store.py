"""What is kept of a window: keys and values by token, and how much of it is certainly exact."""

import pytest
import torch

from diffusion_cache.language.masks import additive, sees
from diffusion_cache.language.store import Store


def window(tokens, padding=None):
    tokens = torch.tensor(tokens)
    padding = torch.ones_like(tokens) if padding is None else torch.tensor(padding)
    return tokens, padding, torch.arange(tokens.shape[1]).expand_as(tokens)


@pytest.mark.parametrize(("reach", "settled"), [(None, 0), (1, 5), (2, 4), (3, 3)])
def test_settled_up_to_the_block_of_the_first_change(reach, settled):
    store = Store(2, torch.device("cpu"), reach)
    first = window([[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6]])
    assert store.settled(*first) == 0
    store.grow(6)
    store.refresh(*first)
    assert store.settled(*first) == 6
    assert store.settled(*window([[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 9]])) == settled
    # a longer window: what was all of it is settled as far as its blocks are whole
    longer = window([[1, 2, 3, 4, 5, 6, 7]] * 2)
    assert store.settled(*longer) == (6 if reach else 0)


def test_other_padding_or_positions_are_another_window():
    store = Store(1, torch.device("cpu"), 1)
    tokens, padding, positions = window([[1, 2, 3, 4]])
    store.grow(4)
    store.refresh(tokens, padding, positions)
    assert store.settled(*window([[1, 2, 3, 4]], [[0, 1, 1, 1]])) == 0
    assert store.settled(tokens, padding, positions + torch.tensor([0, 0, 0, 1])) == 3


def test_what_was_refreshed_is_kept_as_it_was():
    store = Store(1, torch.device("cpu"), 1)
    tokens, padding, positions = window([[1, 2, 3, 4]])
    store.grow(4)
    store.refresh(tokens, padding, positions)
    tokens[0, 2] = 9  # as the pipeline does
    assert store.settled(tokens, padding, positions) == 2


def test_keys_and_values_are_those_computed_last():
    store = Store(2, torch.device("cpu"), 1)
    assert store.grow(3)
    assert not store.grow(3)
    store.given(torch.tensor([[0, 1, 2], [0, 1, 2]]))
    rows = torch.arange(12.0).view(2, 1, 3, 2)
    keys, values = store.update(rows, -rows, 0)
    assert torch.equal(keys, rows)
    assert torch.equal(values, -rows)
    assert store.grow(4)
    store.given(torch.tensor([[1, 3], [3, 3]]))
    keys, values = store.update(torch.full((2, 1, 2, 2), 50.0), torch.full((2, 1, 2, 2), 60.0), 0)
    assert keys[:, 0, :, 0].tolist() == [[0, 50, 4, 50], [6, 8, 10, 50]]
    assert values[:, 0, :, 0].tolist() == [[0, 60, -4, 60], [-6, -8, -10, 60]]
    # tokens 2·4·8, masked 2·4, keys and values 2·(2·4·2)·4
    assert store.nbytes == 64 + 8 + 128


def test_who_sees_whom():
    places = torch.arange(4)
    assert sees(places, places, 2).int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]
    assert torch.equal(sees(places, places, 1), torch.ones(4, 4).tril().bool())
    assert sees(places[None, 2:], places, None).all()
    mask = additive(sees(places, places, 1), torch.float32)
    assert mask.shape == (1, 1, 4, 4)
    assert mask[0, 0, 1].tolist() == [0, 0, torch.finfo(torch.float32).min, torch.finfo(torch.float32).min]
    assert additive(sees(places, places, 1).expand(3, -1, -1), torch.float32).shape == (3, 1, 4, 4)
