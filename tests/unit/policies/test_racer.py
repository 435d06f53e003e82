"""RACER: early refreshes in exchange for later computed steps."""

import math

import pytest
import torch

from diffusion_cache.context import PassState, Past, Step
from diffusion_cache.errors import ConfigError
from diffusion_cache.policies import Guarded, Guards, Racer


def walk(policy, total, risks, **guards):
    """What one sample does if its risks are these at some steps, else 0: a strip, and the reasons of computed steps."""
    guarded, state, done, reasons = Guarded(policy, Guards(**guards)), PassState(), "", []
    for index in range(total):
        step = Step(index, total, index, None, "", (slice(None),))
        verdict = guarded.decide(step, risks.get(index, 0.0), state)
        state.update(index, verdict.compute)
        state.extra += (index,) if verdict.extra else ()
        reasons += [verdict.reason] if verdict.compute else []
        done += str(int(verdict.compute))
    return done, reasons


def test_without_risk_it_goes_by_its_schedule():
    assert walk(Racer(every=3), 10, {})[0] == "1001001001"
    assert walk(Racer(mask="11000010"), 8, {})[0] == "11000010"
    assert walk(Racer(mask="10"), 4, {})[0] == "1100"  # stretched to the length of the run
    assert walk(Racer(every=3, threshold=0.5), 10, {4: 0.5})[0] == "1001001001"
    policy = Racer(mask="11000010")
    assert policy.schedule(8) is policy.schedule(8)  # asked for at every step, for every sample


@pytest.mark.parametrize(
    ("risks", "expected"),
    [
        ({4: 0.6}, "1001100001"),
        ({5: 0.6}, "1001010001"),
        ({4: 0.6, 5: 0.6}, "1001100001"),  # one in exchange for step 6; the next is due at 9
        ({1: math.nan}, "1100001001"),
        ({2: 0.6, 8: 0.6}, "1010001010"),
        ({index: 9.0 for index in range(10)}, "1100001100"),
    ],
)
def test_a_step_at_risk_takes_the_place_of_the_next_computed_one(risks, expected):
    done, reasons = walk(Racer(every=3, threshold=0.5), 10, risks)
    assert done == expected
    assert done.count("1") == 4
    assert any(reason.startswith("risk") for reason in reasons)


def test_with_none_left_to_drop_it_goes_on():
    assert walk(Racer(mask="1001000000", threshold=0.5), 10, {5: 9.0})[0] == "1001000000"


def test_steps_that_guards_compute_are_not_dropped():
    assert walk(Racer(mask="1000000001", threshold=0.5), 10, {4: 9.0}, last=1)[0] == "1000000001"
    assert walk(Racer(mask="1000010001", threshold=0.5), 10, {3: 9.0}, last=1)[0] == "1001000001"


def test_what_it_measures_is_the_disagreement_of_as_many_features_as_it_keeps():
    assert Racer(risk_history=4).needs.history == 4
    disagreement = torch.tensor([0.25, 0.5])
    assert Racer().measure({"disagreement": disagreement}, Past()) is disagreement


@pytest.mark.parametrize(
    "options", [dict(every=0), dict(threshold=-1.0), dict(threshold=math.nan), dict(risk_history=2)]
)
def test_bad_options(options):
    with pytest.raises(ConfigError, match=f"racer: {next(iter(options))} must be"):
        Racer(**options)
    with pytest.raises(ConfigError, match="num_steps"):
        Guarded(Racer()).decide(Step(3, None, 3, None, "", (slice(None),)), 0.5, PassState())
