"""SpeCa: its error and its bound, by hand."""

import math

import pytest
import torch

from diffusion_cache.context import PassState, Past, Step
from diffusion_cache.errors import ConfigError
from diffusion_cache.policies import SpeCa


def step(index, total=10):
    return Step(index, total, index, None, "0", (slice(None),))


REUSED = PassState(consecutive=2)


def test_the_error_is_relative_to_what_the_last_block_really_gave():
    forecast, real = torch.tensor([[1.0, -3.0], [2.0, 2.0]]), torch.tensor([[2.0, -2.0], [2.0, 6.0]])
    got = SpeCa().measure({"tail_forecast": forecast, "tail_output": real}, Past())
    assert got.tolist() == [0.5, 0.5]
    assert SpeCa().measure({"tail_forecast": forecast * math.nan, "tail_output": real}, Past()).isnan().all()


def test_it_reuses_after_a_computed_step_and_verifies_before_it_reuses_again():
    assert SpeCa().decide(step(3), None, PassState())[:2] == (False, "draft")
    assert SpeCa().decide(step(3), None, REUSED)[:2] == (True, "not verified")
    assert not SpeCa(rollback=True).decide(step(3), None, REUSED).compute  # asked again once it is known


@pytest.mark.parametrize(
    ("options", "index", "bound"),
    [
        (dict(threshold=0.4, decay=0.25), 6, 0.2),  # of step 5: halfway
        (dict(threshold=0.4, decay=0.25, rollback=True), 5, 0.2),
        (dict(threshold=0.4, decay=0.25, rollback=True), 0, 0.4),
        (dict(threshold=0.4, decay=1.0), 9, 0.4),
        (dict(threshold=0.0), 5, 0.01),
        (dict(threshold=0.4, decay=1e-6), 9, 0.01),
    ],
)
def test_the_bound_falls_over_the_run_to_its_floor(options, index, bound):
    policy = SpeCa(**options)
    assert not policy.decide(step(index), 0.999 * bound, REUSED).compute
    assert policy.decide(step(index), 1.001 * bound, REUSED).compute
    assert policy.decide(step(index), math.nan, REUSED).compute


def test_without_the_number_of_steps_the_bound_may_not_fall():
    with pytest.raises(ConfigError, match="num_steps"):
        SpeCa().decide(step(3, None), 0.1, REUSED)
    assert SpeCa(threshold=0.2, decay=1.0).decide(step(3, None), 0.3, REUSED).compute


@pytest.mark.parametrize("options", [dict(threshold=-1.0), dict(threshold=math.nan), dict(decay=0.0), dict(decay=1.5)])
def test_bad_options(options):
    with pytest.raises(ConfigError, match=f"speca: {next(iter(options))} must be"):
        SpeCa(**options)
