"""RA-CFG: the risk to the guided output, by hand."""

import math

import pytest
import torch

from diffusion_cache.context import PassState, Past, Step
from diffusion_cache.errors import ConfigError
from diffusion_cache.policies import RaCfg


def step(index=3, total=10, guidance=None):
    return Step(index, total, index, None, "0", (slice(None),), guidance=guidance)


@pytest.mark.parametrize("correlation", [-1.0, -0.5, 0.0, 0.7, 1.0])
def test_the_risk_is_the_standard_deviation_of_the_guided_error(correlation):
    """Of two errors of these sizes that are correlated, guided as outputs are."""
    covariance = torch.tensor([[0.04, correlation * 0.2 * 0.3], [correlation * 0.2 * 0.3, 0.09]], dtype=torch.float64)
    weights = torch.tensor([1 - 2.5, 2.5], dtype=torch.float64)
    expected = (weights @ covariance @ weights).clamp_min(0).sqrt().item()
    assert RaCfg(correlation=correlation).combine([0.2, 0.3], step(guidance=2.5)) == pytest.approx(expected, abs=1e-12)


def test_the_scale_is_that_of_the_call_unless_it_is_given():
    assert RaCfg().combine([0.2, 0.3], step(guidance=1.0)) == pytest.approx(0.3)
    assert RaCfg(guidance=0.0).combine([0.2, 0.3], step(guidance=1.0)) == pytest.approx(0.2)
    assert RaCfg().combine([0.25], step()) == 0.25
    assert math.isnan(RaCfg(guidance=2.0).combine([0.2, math.nan], step()))
    assert math.isnan(RaCfg(guidance=2.0).combine([math.nan, 0.2], step()))


def test_errors_that_cancel_leave_no_risk():
    """Whatever rounding makes of the difference."""
    policy = RaCfg(correlation=1.0)
    values = torch.rand(2000, generator=torch.Generator().manual_seed(0)).tolist()
    risks = [policy.combine([3 * value * (1 + 1e-9), value], step(guidance=1.5)) for value in values]
    assert max(risks) < 1e-6


@pytest.mark.parametrize(
    ("values", "guidance", "words"), [([0.1, 0.2], None, "give guidance=…"), ([0.1, 0.2, 0.3], 2.0, "3 branches")]
)
def test_what_it_cannot_combine(values, guidance, words):
    with pytest.raises(ConfigError, match=words):
        RaCfg().combine(values, step(guidance=guidance))


def test_risks_are_weighted_by_what_is_left_of_the_run_and_added_up():
    policy = RaCfg(threshold=1.0, weight=2.0, power=3.0, floor=0.25)
    verdict = policy.decide(step(4, 10), 0.5, PassState(accumulated=0.125))
    expected = 0.125 + 0.5 * (2.0 * 0.6**3 + 0.25)
    assert verdict.accumulated == pytest.approx(expected)
    assert not verdict.compute
    assert policy.decide(step(4, 10), 0.5, PassState(accumulated=1 - 0.5 * (2.0 * 0.6**3 + 0.25))).compute
    assert policy.decide(step(4, 10), math.nan, PassState()).compute
    assert policy.decide(step(4, 10), None, PassState()).compute
    with pytest.raises(ConfigError, match="num_steps"):
        policy.decide(step(4, None), 0.5, PassState())


def test_a_branch_is_at_risk_by_the_change_of_the_first_blocks_residual():
    now, before, computed = torch.randn(3, 2, 4)
    past = Past({"probe_residual": computed}, {"probe_residual": before})
    expected = (now - before).abs().mean(1) / before.abs().mean(1)
    assert torch.allclose(RaCfg().measure({"probe_residual": now}, past), expected)


@pytest.mark.parametrize(
    "options",
    [dict(correlation=1.5), dict(correlation=math.nan), dict(weight=-1.0), dict(power=math.inf), dict(floor=-1)],
)
def test_bad_options(options):
    with pytest.raises(ConfigError, match=f"ra_cfg: {next(iter(options))} must be"):
        RaCfg(**options)
