"""DiCache: how differently the probe's input and output have moved, against its formula."""

import pytest
import torch

from diffusion_cache.context import Past
from diffusion_cache.errors import ConfigError
from diffusion_cache.policies import Accumulate, DiCache


def l1(now, before):
    return ((now - before).abs().mean() / before.abs().mean()).item()


def test_it_measures_by_how_much_the_output_has_moved_more_or_less_than_the_input():
    torch.manual_seed(0)
    x, x_before, x_computed, p, p_before, p_computed = torch.randn(6, 2, 4, 5)
    p[1] = p_before[1] + 0.1
    past = Past({"probe_input": x_computed, "input": p_computed}, {"probe_input": x_before, "input": p_before})
    got = DiCache().measure({"probe_input": x, "input": p}, past)
    expected = [l1(p[row], p_before[row]) - l1(x[row], x_before[row]) for row in range(2)]
    assert {value > 0 for value in expected} == {True, False}
    assert got.tolist() == pytest.approx([abs(value) for value in expected])


def test_it_is_a_sum_over_a_probe_of_so_many_blocks():
    assert issubclass(DiCache, Accumulate)
    assert DiCache(front=3).needs.probe == 3
    with pytest.raises(ConfigError, match="front must be at least 1"):
        DiCache(front=0)
