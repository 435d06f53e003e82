"""Policies and guards as exact schedules, written by hand."""

import math
import random
import warnings
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
import pytest
import torch

from diffusion_cache.context import SCOPES, Needs, PassState, Past, Policy, Step, Verdict
from diffusion_cache.errors import ConfigError, DiffusionCacheWarning
from diffusion_cache.policies import FirstBlock, Guarded, Guards, Interval, Mask, Racer
from diffusion_cache.schedule import Schedule


@pytest.fixture
def silent():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def step(index, total=None):
    return Step(index, total, index, None, "0", (slice(None),))


def text(schedule, pass_index=0, span=0):
    """The decisions for one span; a row of length one stands for all spans."""
    rows = [schedule.row(i, pass_index) for i in range(schedule.total)]
    return "".join(str(int(row[span if len(row) > 1 else 0])) for row in rows)


def walked(guarded, steps, total):
    """The decisions of a run that asks step by step."""
    state, decisions = PassState(), ""
    for index in range(steps):
        compute = guarded.decide(step(index, total), None, state).compute
        state.update(index, compute)
        decisions += str(int(compute))
    return decisions


@pytest.mark.parametrize(
    ("every", "guards", "expected"),
    [
        (1, {}, "1111111111"),
        (2, {}, "1010101010"),
        (3, {}, "1001001001"),
        (100, {}, "1000000000"),
        (2, dict(warmup=3), "1110101010"),
        (3, dict(warmup=2), "1100100100"),
        (3, dict(last=2), "1001001011"),
        (3, dict(last=1, warmup=4), "1111001001"),
        (4, dict(start=0.3, end=0.7), "1110001111"),
        (9, dict(start=0.25, end=0.75), "1110000011"),  # from step 2.5 to 7.5, both rounded up
        (2, dict(start=0.5), "1111101010"),
        (2, dict(end=0.5), "1010111111"),
        (2, dict(start=0.5, end=0.5), "1111111111"),
        (2, dict(end=0.0), "1111111111"),
        (2, dict(start=1.0), "1111111111"),
        (5, dict(max_consecutive=2), "1001001001"),
        (5, dict(max_consecutive=0), "1111111111"),
        (5, dict(max_consecutive=4), "1000010000"),
        (2, dict(max_reused=3), "1010101111"),
        (4, dict(max_reused=0), "1111111111"),
        (4, dict(max_reused=4), "1000101111"),
        (4, dict(warmup=2, last=1, max_consecutive=2), "1100100101"),
        (4, dict(warmup=2, last=1, max_consecutive=2, max_reused=4), "1100100111"),
        (3, dict(warmup=20), "1111111111"),
        (3, dict(last=20), "1111111111"),
    ],
)
def test_interval_under_guards(every, guards, expected):
    guarded = Guarded(Interval(every), Guards(**guards))
    assert text(guarded.schedule(10)) == expected
    assert walked(guarded, 10, 10) == expected


@pytest.mark.parametrize(("fraction", "expected"), [(0.28, 14), (0.29, 15), (0.3, 15)])
def test_window_starts_and_ends_at_its_fraction(fraction, expected):
    """0.28 × 50 is 14 steps, though 14.000000000000002 in floating point."""
    after = text(Guarded(Interval(50), Guards(start=fraction)).schedule(50))
    assert after == "1" * expected + "0" * (50 - expected)
    before = text(Guarded(Interval(50), Guards(end=fraction)).schedule(50))
    assert before == "1" + "0" * (expected - 1) + "1" * (50 - expected)


SIGMAS = (1.0, 0.875, 0.75, 0.5, 0.25, 0.125)
LEVELS = [2 * math.log((1 - sigma) / sigma) if sigma < 1 else -math.inf for sigma in SIGMAS]


@pytest.mark.parametrize(
    ("guards", "expected"),
    [
        (dict(sigma_max=0.8), "110000"),
        (dict(sigma_max=0.75, sigma_min=0.25), "110001"),  # the ends are inside
        (dict(sigma_min=0.9), "111111"),
        (dict(sigma_min=0.4, warmup=3), "111011"),
        (dict(sigma_min=0.4, max_consecutive=2), "100111"),
        (dict(sigma_max=1.0, sigma_min=0.0), "100000"),
    ],
)
def test_window_in_noise(guards, expected):
    guarded = Guarded(Interval(50), Guards(**guards)).for_run(LEVELS)
    assert text(guarded.schedule(6)) == expected
    state, done = PassState(), ""
    for index, level in enumerate(LEVELS):
        verdict = guarded.decide(replace(step(index), noise_level=level), None, state)
        state.update(index, verdict.compute)
        done += str(int(verdict.compute))
    assert done == expected


def test_a_window_in_noise_needs_noise_levels():
    guarded = Guarded(Interval(50), Guards(sigma_max=0.8))
    for unknown in (guarded, guarded.for_run(LEVELS).for_run([])):
        with pytest.raises(ConfigError, match="need the sampler's noise levels"):
            unknown.schedule(6)
    assert Guarded(Interval(50)).for_run([]).schedule(6) is not None


@pytest.mark.parametrize(
    ("total", "guards", "expected"),
    [(1, {}, "1"), (1, dict(last=1), "1"), (2, {}, "10"), (3, dict(warmup=1, last=1), "101")],
)
def test_very_short_runs(total, guards, expected):
    assert text(Guarded(Interval(3), Guards(**guards)).schedule(total)) == expected


@pytest.mark.filterwarnings("ignore::diffusion_cache.errors.DiffusionCacheWarning")  # which some of them deserve
def test_schedule_equals_step_by_step_for_random_guards():
    rng = random.Random(0)
    for _ in range(300):
        total = rng.randint(1, 20)
        start, end = sorted(rng.choice([0.0, 0.2, 0.5, 0.8, 1.0]) for _ in range(2))
        guards = Guards(
            warmup=rng.randint(1, 4),
            last=rng.randint(0, 3),
            start=start,
            end=end,
            max_consecutive=rng.choice([None, 0, 1, 2, 5]),
            max_reused=rng.choice([None, 0, 1, 4, 9]),
        )
        mask = Mask("1" + "".join(rng.choice("01") for _ in range(rng.randint(0, 15))))
        for policy in (Interval(rng.randint(1, 6)), mask):
            guarded = Guarded(policy, guards)
            planned = text(guarded.schedule(total))
            assert planned == walked(guarded, total, total)
            runs = planned.split("1")
            assert guards.max_consecutive is None or max(map(len, runs)) <= guards.max_consecutive
            assert guards.max_reused is None or planned.count("0") <= guards.max_reused
            assert "0" not in planned[: guards.warmup] + planned[total - guards.last :]


def test_unknown_number_of_steps():
    assert walked(Guarded(Interval(3), Guards(warmup=2, max_consecutive=1)), 8, None) == "11010101"
    assert walked(Guarded(Interval(3), Guards(max_reused=3)), 8, None) == "10010111"
    for guards in (Guards(last=1), Guards(start=0.1), Guards(end=0.9)):
        with pytest.raises(ConfigError, match="num_steps"):
            walked(Guarded(Interval(3), guards), 8, None)
    with pytest.raises(ConfigError, match="num_steps"):
        walked(Guarded(Mask("101")), 3, None)


def test_steps_beyond_the_total_are_computed():
    assert walked(Guarded(Interval(5)), 8, 4) == "10001111"


def test_reasons():
    guards = Guards(warmup=2, last=2, start=0.3, end=0.8, max_consecutive=3, max_reused=5)
    guarded = Guarded(Interval(50), guards)

    def reason(index, **past):
        return guarded.decide(step(index, 10), None, PassState(last_computed=1, **past))[:2]

    assert reason(1) == (True, "warm-up")
    assert reason(2) == (True, "outside the window")
    assert reason(5) == (False, "interval")
    assert reason(5, consecutive=3) == (True, "max_consecutive")
    assert reason(5, reused=5) == (True, "max_reused")
    assert reason(8) == (True, "last steps")


@pytest.mark.parametrize(
    "options",
    [
        dict(warmup=0),
        dict(last=-1),
        dict(start=-0.1),
        dict(end=1.1),
        dict(start=0.6, end=0.5),
        dict(start=float("nan")),
        dict(max_consecutive=-1),
        dict(max_reused=-2),
        dict(sigma_max=1.5),
        dict(sigma_min=-0.1),
        dict(sigma_min=0.6, sigma_max=0.5),
        dict(sigma_min=float("nan")),
    ],
)
def test_invalid_guards(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        Guards(**options)


@pytest.mark.parametrize("every", [0, -3])
def test_invalid_interval(every):
    with pytest.raises(ConfigError, match="every must be at least 1"):
        Interval(every)


def test_pass_state():
    state = PassState()
    for index, computed in enumerate([True, False, False, True, False]):
        state.update(index, computed)
    assert (state.last_computed, state.consecutive, state.reused) == (3, 1, 3)


# masks


@pytest.mark.parametrize(
    "mask",
    [
        "1001",
        [1, 0, 0, 1],
        (1, 0, 0, 1),
        [True, False, False, True],
        list(np.array([1, 0, 0, 1])),
        ["1", "0", "0", "1"],
    ],
)
def test_mask_parsing(mask):
    parsed = Mask(mask)
    assert parsed.mask == "1001"
    assert parsed == Mask("1001")
    assert hash(parsed) == hash(Mask("1001"))
    assert text(Guarded(parsed).schedule(4)) == "1001"


@pytest.mark.parametrize(
    "mask",
    [
        "",
        [],
        None,
        101,
        "10a1",
        "1 0",
        "12",
        [1, 2],
        [1.0, 0.5],
        [1, None],
        np.array([1, 0]),
        {0: 1},
        {1},
        [[1], [0]],
        [1, 10, 0],
    ],
    ids=repr,
)
def test_invalid_masks(mask):
    with pytest.raises(ConfigError, match="give a string or sequence of 0 and 1"):
        Mask(mask)


def test_mask_that_starts_with_reuse_computes_first_and_warns_once():
    with pytest.warns(DiffusionCacheWarning, match="starts with a reused step") as caught:
        mask = Mask("0010")
    assert len(caught) == 1
    assert mask.computed(4) == {0, 2}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert text(Guarded(mask).schedule(4)) == "1010"
        assert walked(Guarded(mask), 4, 4) == "1010"
        assert text(Guarded(Mask("1010")).schedule(8))


# Each entry of a mask of L stands for T/L of a run's T steps. Due before step s are the mask's ones up to s·L/T, times
# T/L; a step is computed where that, rounded up, grows.
@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        ("10010", "1100001100"),  # twice as long: every entry twice
        ("110011", "111100001111"),
        ("10", "110"),  # due 0, 1, 1.5, 1.5
        ("1001", "110001"),  # due 0, 1, 1.5, 1.5, 1.5, 2, 3
        ("11000", "1110000"),  # due 0, 1, 2, 2.8, …
        ("10101", "110"),  # due 0, 0.6, 1.2, 1.8
        ("10001", "101"),  # due 0, 0.6, 0.6, 1.2
        ("1100000000", "10000"),  # due 0, 1, 1, …
        ("100111", "101"),  # due 0, 0.5, 1, 2
        ("10101", "1"),
        ("11111", "11111111"),
        ("111", "11"),
        ("1", "1"),
        ("1", "111"),
    ],
)
def test_mask_rescaled(mask, expected):
    policy = Guarded(Mask(mask))
    assert text(policy.schedule(len(expected))) == expected
    assert walked(policy, len(expected), len(expected)) == expected


def test_rescaling_keeps_the_first_step_the_share_and_its_own_length():
    rng = random.Random(0)
    for _ in range(200):
        length = rng.randint(2, 40)
        mask = "1" + "".join(rng.choice("01") for _ in range(length - 1))
        policy = Mask(mask)
        assert policy.computed(length) == {i for i in range(length) if mask[i] == "1"}
        for total in (1, 2, 7, length + 1, length + 13, 100):
            computed = policy.computed(total)
            assert {0} <= computed <= set(range(total))
            assert len(computed) == math.ceil(Fraction(mask.count("1") * total, length))


def test_a_run_goes_by_the_mask_of_its_length(silent):
    policy = Mask("1010", others=("100", [1, 1, 0, 0, 0]))
    assert policy.others == ("100", "11000")
    assert [text(Guarded(policy).schedule(total)) for total in (3, 4, 5, 8)] == ["100", "1010", "11000", "11001100"]
    assert hash(policy) == hash(Mask("1010", others=["100", "11000"]))
    for others in ("100", [1, 0], ["12"], 3):
        with pytest.raises(ConfigError, match="mask: "):
            Mask("1010", others=others)


def test_rescaling_keeps_where_steps_are_dense():
    assert Mask("11000011").computed(80) == {*range(20), *range(60, 80)}
    assert Mask("1110000000").computed(100) == set(range(30))


def test_shortened_interval_is_one():
    assert Mask("10" * 25).computed(25) == set(range(0, 25, 2))


def test_mask_under_guards():
    guards = Guards(warmup=2, last=1, max_consecutive=2)
    assert text(Guarded(Mask("1000000000"), guards).schedule(10)) == "1100100101"


@pytest.mark.parametrize("guards", [Guards(warmup=3, last=1), Guards(warmup=9), Guards(start=0.5, end=0.5)])
def test_guards_that_leave_nothing_to_reuse_are_told_of_once(guards):
    with pytest.warns(DiffusionCacheWarning, match="nothing is reused in a run of 4 steps: warmup=") as told:
        found = [Guarded(policy, guards).schedule(4) for policy in (Interval(4), FirstBlock())]
    assert len(told) == 1
    assert text(found[0]) == "1111"
    assert found[1] is None


def test_guards_that_leave_a_step_are_not_told_of(silent):
    assert text(Guarded(Interval(4), Guards(warmup=2, last=1)).schedule(4)) == "1101"
    # guards of its own: all that have the default ones tell of a length once together
    assert text(Guarded(Interval(4), Guards()).schedule(1)) == "1"


# schedules of a policy's own


@dataclass(frozen=True)
class Planned(Policy):
    """Has a schedule of its own: compute[step][pass][span]."""

    compute: tuple
    scopes = frozenset(SCOPES)

    def schedule(self, total):
        return Schedule(self.compute)

    def decide(self, step, value, state):
        raise AssertionError("not asked where there is a schedule")


def test_guards_over_a_policys_own_schedule():
    rows = ((True, True),), ((True, False),), ((False, False),), ((False, True),)
    schedule = Guarded(Planned(rows), Guards(last=1)).schedule(4)
    assert text(schedule, span=0) == "1101"
    assert text(schedule, span=1) == "1001"


@pytest.mark.parametrize(("guards", "expected"), [(dict(max_reused=1), "10111"), (dict(max_consecutive=1), "10101")])
def test_limits_hold_for_each_pass_of_a_policys_own_schedule(guards, expected):
    rows = (((True,), (True,)), *[((True,), (False,))] * 4)
    schedule = Guarded(Planned(rows), Guards(**guards)).schedule(5)
    assert text(schedule, pass_index=0) == "11111"
    assert text(schedule, pass_index=1) == expected


# first_block


def measure(current, kept):
    signals = {"probe_residual": torch.tensor(current)}
    return FirstBlock().measure(signals, Past({"probe_residual": torch.tensor(kept)}))


def test_first_block_measures_the_change_of_each_batch_row():
    current, kept = [[1.0, 1.5], [2.0, 2.0], [0.0, 1.0]], [[1.0, 1.0], [2.0, 2.0], [1.0, 1.0]]
    assert measure(current, kept).tolist() == [0.25, 0, 0.5]


def test_first_block_measures_nothing_finite_after_or_at_what_is_not():
    (change,) = measure([[1.0]], [[float("nan")]])
    assert change.isnan()
    (change,) = measure([[float("nan")]], [[1.0]])
    assert change.isnan()
    (change,) = measure([[1.0]], [[float("inf")]])
    assert change.isnan()
    assert measure([[float("inf")]], [[1.0]]).tolist() == [float("inf")]
    assert measure([[1.0]], [[0.0]]).tolist() == [float("inf")]
    assert measure([[0.0]], [[0.0]]).tolist() == [0]


@pytest.mark.parametrize(
    ("threshold", "value", "compute"),
    [
        (0.08, 0.0, False),
        (0.08, 0.07, False),
        (0.08, 0.09, True),
        (0.25, 0.25, False),  # the threshold itself is reused
        (0.0, 0.0, False),
        (0.0, 1e-6, True),
        (float("inf"), 1e30, False),
        (0.08, float("nan"), True),
        (float("inf"), float("nan"), True),
        (0.08, float("inf"), True),
    ],
)
def test_first_block_thresholds(threshold, value, compute):
    assert FirstBlock(threshold).decide(step(1, 10), value, PassState(last_computed=0)).compute is compute


def test_first_block_with_nothing_to_compare_with_computes():
    decided = FirstBlock(float("inf")).decide(step(1, 10), None, PassState(last_computed=0))
    assert decided == Verdict(True, "nothing to compare with")


def test_first_block_tells_what_it_measured():
    assert FirstBlock(0.1).decide(step(1), 0.051234, PassState()) == Verdict(False, "change 0.0512")


def test_guards_come_before_what_was_measured():
    guarded = Guarded(FirstBlock(0.1), Guards(warmup=2, max_consecutive=1))
    assert guarded.decide(step(1, 10), 0.0, PassState(last_computed=0)) == Verdict(True, "warm-up")
    assert guarded.decide(step(2, 10), 0.0, PassState(last_computed=1)) == Verdict(False, "change 0")
    assert guarded.decide(step(3, 10), 0.0, PassState(last_computed=1, consecutive=1)).reason == "max_consecutive"
    assert guarded.decide(step(4, 10), 0.5, PassState(last_computed=3)) == Verdict(True, "change 0.5")


def test_an_unconditional_step_that_is_spared_takes_the_place_of_no_planned_one():
    guarded = Guarded(Racer(every=3, threshold=0.5), Guards(unconditional_every=4))
    unconditional = Step(1, 10, 1, None, "", (slice(None),), 1)
    verdict = guarded.decide(unconditional, 9.0, PassState(last_computed=0))
    assert (verdict.compute, verdict.reason, verdict.extra) == (False, "unconditional", False)


@dataclass(frozen=True)
class Unmeasured(Policy):
    """Names a signal but does not say what to make of it."""

    scopes = frozenset(SCOPES)

    @property
    def needs(self):
        return Needs(signals=("probe_residual",))

    def decide(self, step, value, state):
        return Verdict(True, "")


def test_a_policy_that_names_signals_must_measure():
    with pytest.raises(NotImplementedError, match="'Unmeasured' names signals and so must define measure"):
        Unmeasured().measure({}, Past())


def test_first_block_needs_its_probe_and_has_no_schedule():
    policy = FirstBlock(front=2, back=3)
    assert (policy.needs.signals, policy.needs.probe, policy.needs.tail) == (("probe_residual",), 2, 3)
    guarded = Guarded(policy, Guards(warmup=3))
    assert guarded.schedule(10) is None
    assert not guarded.planned
    assert Guarded(Interval(2)).planned
    assert guarded.decide(step(2, 10), 0.0, PassState()) == Verdict(True, "warm-up")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(threshold=-0.1), "threshold"),
        (dict(threshold=float("nan")), "threshold"),
        (dict(front=0), "front"),
        (dict(back=-1), "back"),
    ],
)
def test_invalid_first_block(options, message):
    with pytest.raises(ConfigError, match=message):
        FirstBlock(**options)
