"""Policies that look at a run while it goes on: what each measures and remembers, against its formula."""

import math

import pytest
import torch

from diffusion_cache.context import PassState, Past, Step
from diffusion_cache.errors import ConfigError
from diffusion_cache.policies import Accumulate, EasyCache, SeaCache, TeaCache
from diffusion_cache.signals import filtered_l1

STEP = Step(3, 10, 3, None, "0", (slice(None),))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def l1(now, before):
    return ((now - before).abs().mean() / before.abs().mean()).item()


@pytest.mark.parametrize("coefficients", [(1.0, 0.0), (3.0, -2.0, 0.5, 0.25), (0.125,)])
def test_teacache_measures_a_polynomial_of_the_change_since_the_step_before(coefficients):
    now, before, computed = torch.randn(3, 2, 4, 5)
    past = Past({"modulated_input": computed}, {"modulated_input": before})
    got = TeaCache(coefficients=coefficients).measure({"modulated_input": now}, past)
    expected = [
        sum(c * l1(now[row], before[row]) ** power for power, c in enumerate(reversed(coefficients))) for row in (0, 1)
    ]
    assert got.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("coefficients", [(), "12", (1.0, math.nan), (1.0, "a"), (math.inf,)])
def test_bad_coefficients(coefficients):
    with pytest.raises(ConfigError, match="coefficients must be finite numbers"):
        TeaCache(coefficients=coefficients)


def test_easycache_foretells_the_output_from_the_input():
    policy = EasyCache()
    x0, x1, x2, y0, y1 = torch.randn(5, 2, 3, 4)
    assert policy.remember({"input": x0, "output": y0}, Past()) == {}
    assert policy.measure({"input": x1}, Past({"input": x0, "output": y0}, {"input": x0})) is None
    remembered = policy.remember({"input": x1, "output": y1}, Past({"input": x0, "output": y0}))
    kappa = [((y1 - y0)[row].abs().mean() / (x1 - x0)[row].abs().mean()).item() for row in (0, 1)]
    assert remembered["kappa"].tolist() == pytest.approx(kappa)
    between = torch.randn(2, 3, 4)
    past = Past({"input": x1, "output": y1}, {"input": between}, remembered)
    expected = [kappa[row] * ((x2 - between)[row].abs().mean() / y1[row].abs().mean()).item() for row in range(2)]
    assert policy.measure({"input": x2}, past).tolist() == pytest.approx(expected)


def test_easycache_where_nothing_changes_and_where_all_is_nan():
    policy, same = EasyCache(), torch.ones(1, 2)
    still = policy.remember({"input": same, "output": same}, Past({"input": same, "output": same}))
    assert still["kappa"].tolist() == [0]
    assert policy.remember({"input": same, "output": 2 * same}, Past({"input": same, "output": same}))["kappa"].isinf()
    past = Past({"output": same}, {"input": same}, {"kappa": torch.tensor([math.nan])})
    assert policy.measure({"input": 2 * same}, past).isnan()


def test_seacache_measures_the_filtered_change_since_the_step_before():
    now, before = torch.randn(2, 2, 3, 5, 6)
    past = Past(previous={"input_map": before, "noise_level": torch.tensor([-2.0, -2.0])})
    got = SeaCache().measure({"input_map": now, "noise_level": torch.tensor([1.0, 1.0])}, past)
    assert got.tolist() == pytest.approx(filtered_l1(now, before, 1.0, -2.0).tolist())


@pytest.mark.parametrize("policy", [TeaCache(0.5), EasyCache(0.5), SeaCache(0.5)])
@pytest.mark.parametrize(
    ("before", "value", "compute", "reason"),
    [
        (0.0, None, True, "nothing to compare with"),
        (0.25, 0.125, False, "sum 0.375"),
        (0.25, 0.25, True, "sum 0.5"),
        (0.25, -0.5, False, "sum -0.25"),
        (0.25, math.nan, True, "sum nan"),
        (math.nan, 0.125, True, "sum nan"),
        (0.0, math.inf, True, "sum inf"),
    ],
)
def test_they_reuse_below_their_threshold(policy, before, value, compute, reason):
    verdict = policy.decide(STEP, value, PassState(accumulated=before))
    assert verdict[:2] == (compute, reason)
    if value is not None:
        assert verdict.accumulated == pytest.approx(before + value, nan_ok=True)


@pytest.mark.parametrize("cls", [TeaCache, EasyCache, SeaCache])
@pytest.mark.parametrize("threshold", [-0.1, math.nan])
def test_bad_thresholds(cls, threshold):
    assert issubclass(cls, Accumulate)
    with pytest.raises(ConfigError, match=f"{cls.name}: threshold must be a number"):
        cls(threshold=threshold)
