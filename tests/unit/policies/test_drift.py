"""A guard's band, and what a run that leaves it does to its own schedule."""

import math

import pytest
import torch

from diffusion_cache.context import PassState, Past, Step
from diffusion_cache.errors import ConfigError
from diffusion_cache.plan import Band, Plan
from diffusion_cache.policies import Drift, Guarded, Guards, Planned
from diffusion_cache.schedule import Schedule

NAN = math.nan


def band(total, signal="input_turn", mean=1.0, spread=0.1):
    return Band(signal, (NAN, NAN, *[mean] * (total - 2)), (NAN, NAN, *[spread] * (total - 2)), 4)


def guarded(mask, strict=False, factor=2.0, **guards):
    schedule = Schedule.uniform(entry == "1" for entry in mask)
    plan = Plan("a", "stack", None, "auto", schedule, (), guard=band(len(mask)))
    return Guarded(Planned(plan), Guards(**guards), Drift(plan.guard, factor, strict))


def walk(policy, total, values):
    """What one sample does: its strip, and the reasons of computed steps. values: the signal by step, else in band."""
    state, done, reasons = PassState(), "", []
    for index in range(total):
        step = Step(index, total, index, None, "", (slice(None),))
        verdict = policy.decide(step, values.get(index, 1.0 if index > 1 else None), state)
        state.update(index, verdict.compute)
        if verdict.extra:
            state.extra += (index,)
        if verdict.compute:
            reasons.append(verdict.reason.split(" ")[0])
        done += str(int(verdict.compute))
    return done, reasons


def test_a_guarded_plan_decides_from_its_signal():
    policy = guarded("10010010")
    assert policy.needs.signals == ("input",)
    assert not policy.planned
    assert policy.schedule(8) is None
    assert Guarded(policy.policy).planned
    assert Guarded(policy.policy).schedule(8) == policy.policy.plan.schedule


def test_in_its_band_a_run_goes_by_the_plan():
    assert walk(guarded("10010010"), 8, {}) == ("10010010", ["warm-up", "schedule", "schedule"])
    just_inside = dict.fromkeys(range(2, 8), 1.199)
    assert walk(guarded("10010010"), 8, just_inside)[0] == "10010010"


@pytest.mark.parametrize(
    ("mask", "step", "expected"),
    [
        ("1000100010000001", 2, "1010000010000001"),
        ("1000100010000001", 7, "1000100100000001"),
        ("1000000000000001", 2, "1010000000000000"),
    ],
)
def test_an_extra_step_takes_the_place_of_the_next_planned_one(mask, step, expected):
    done, reasons = walk(guarded(mask), len(mask), {step: 1.3})
    assert done == expected
    assert done.count("1") == mask.count("1")
    assert reasons.count("guard") == 1


def test_strict_only_adds():
    assert walk(guarded("10001000", strict=True), 8, {2: 1.3, 6: 1.3})[0] == "10101010"


def test_with_no_step_left_to_drop_nothing_is_computed():
    assert walk(guarded("10001000"), 8, {6: 99.0})[0] == "10001000"


@pytest.mark.parametrize("mask", ["1000100010001000", "1001000000000000", "1000000000000000", "1111000010101010"])
def test_outside_its_band_all_along_a_run_computes_as_many_steps(mask):
    total = len(mask)
    done, _ = walk(guarded(mask), total, dict.fromkeys(range(1, total), 50.0))
    assert done.count("1") == mask.count("1")
    assert done[0] == "1"


def test_one_extra_step_between_two_planned_ones():
    done, _ = walk(guarded("10000100000", strict=True), 11, dict.fromkeys(range(1, 11), 50.0))
    assert done == "10100110000"


def test_nan_is_outside_and_nothing_measured_is_not():
    assert walk(guarded("10001000"), 8, {2: NAN})[0] == "10100000"
    assert walk(guarded("10001000"), 8, {1: NAN})[0] == "10001000"  # the band knows nothing of step 1


def test_other_guards_hold_and_their_steps_are_not_dropped():
    unguarded = Guarded(guarded("1000010000").policy, Guards(warmup=2, last=2))
    plain = "".join(str(int(row[0][0])) for row in unguarded.schedule(10).compute)
    policy = guarded("1000010000", warmup=2, last=2)
    assert walk(policy, 10, {})[0] == plain == "1100010011"
    assert walk(policy, 10, {3: 9.0})[0] == "1101000011"
    fixed = guarded("1000000001", last=1)
    assert walk(fixed, 10, {3: 9.0})[0] == "1000000001"


def test_the_schedule_of_another_run_is_the_plans_own():
    policy = guarded("10010010")
    assert policy.schedule(16).total == 16
    assert "the band of its guard, which is off" in policy.policy.departure(16)


def test_input_l1():
    drift = Drift(band(4, "input_l1"))
    assert drift.needs.previous == 1
    past = Past(previous={"input": torch.tensor([[2.0, -2.0], [1.0, 1.0]])})
    assert drift.measure({"input": torch.tensor([[3.0, -2.0], [1.0, 1.0]])}, past).tolist() == [0.25, 0.0]


def test_input_turn_compares_two_changes():
    drift = Drift(band(4))
    assert drift.needs.previous == 2
    first, second, third = ({"input": torch.full((1, 1, 4), value)} for value in (0.0, 2.0, 3.0))
    assert drift.measure(second, Past(previous=first)) is None
    assert drift.measure(third, Past(previous=second, earlier=(first,))).tolist() == [0.5]


def test_bad_options():
    for factor in (0.0, -1.0, NAN):
        with pytest.raises(ConfigError, match="guard_factor must be a number above 0"):
            Drift(band(4), factor)
