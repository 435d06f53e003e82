"""Decisions of one run: planned ones, and those on each sample of a batch by what was measured."""

import math
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import pytest
import torch

from diffusion_cache.context import SCOPES, Needs, PassState, Policy, Step, Verdict
from diffusion_cache.engine.decisions import Decisions, samples_of
from diffusion_cache.engine.frame import Frame
from diffusion_cache.engine.session import Method
from diffusion_cache.errors import ConfigError
from diffusion_cache.forecasters import Reuse, Taylor
from diffusion_cache.policies import Accumulate, FirstBlock, Guarded, Guards, Interval, Mask
from diffusion_cache.schedule import Schedule

KEY = ("transformer", "0")
REUSED = object()  # stands for a span's visit


def step(index, total=None, groups=1, batch=1):
    size = batch // groups
    rows = tuple(slice(start, start + size) for start in range(0, batch, size)) if groups > 1 else (slice(None),)
    return Step(index, total, index, None, "0", rows)


@dataclass(frozen=True)
class Above(Policy):
    """Compute a sample whose signal is above the limit; the signal is taken as it is, or relative to the kept one."""

    limit: float = 0.5
    change: bool = False

    scopes = frozenset(SCOPES)

    @property
    def needs(self):
        return Needs(signals=("probe_residual",))

    def measure(self, signals, past):
        signal = signals["probe_residual"].flatten(1).mean(1)
        return signal - past.computed["probe_residual"].flatten(1).mean(1) if self.change else signal

    def decide(self, step, value, state):
        return Verdict(value is None or not value <= self.limit, f"value {value}")


@dataclass(frozen=True)
class Noted(Above):
    """What is combined at each decision."""

    noted: list = field(default_factory=list)

    @property
    def needs(self):
        return Needs(signals=("probe_residual",), guided=True)

    def combine(self, values, step):
        self.noted.append((step.index, *values))
        return max(values)


class Run:
    """Decisions, asked call by call as a run does."""

    def __init__(self, policy, agree=None, forecaster=None, granularity="sample", sync="immediate", **guards):
        self.told = []
        self.failures = []
        self.decisions = Decisions(
            Method(Guarded(policy, Guards(**guards)), forecaster or Reuse(), granularity=granularity, sync=sync),
            self.told.append,
            lambda what, error: self.failures.append((what, str(error))),
            agree,
        )

    def planned(self, index, total=None, position=0):
        """A call whose policy knows its decision at the start."""
        frame = Frame(step(index, total), KEY, (True,), 1)
        self.decisions.open(frame, position)
        self.close(frame)
        return frame

    def measured(self, index, values, groups=1, apart=True, key=KEY, width=2):
        """A call with one value for each batch row; gives the frame, after whatever was computed is remembered."""
        frame = self.open(index, values, groups, apart, key, width)
        self.close(frame)
        return frame

    def open(self, index, values, groups=1, apart=True, key=KEY, width=2):
        batch = len(values)
        frame = Frame(step(index, None, groups, batch), key, (True,), batch)
        self.decisions.open(frame, 0)
        assert frame.actions is None
        frame.signals = {"probe_residual": torch.tensor(values)[:, None].repeat(1, width)}
        self.decisions.after_probe(frame, apart)
        return frame

    def close(self, frame):
        frame.computed = int(frame.actions[0] or frame.rows is not None)
        frame.reused = [] if frame.actions[0] else [REUSED]
        self.decisions.close(frame)


def decided(frame):
    """ "all", "none", or the batch rows that are computed."""
    if frame.rows is not None:
        assert frame.actions == (False,)
        return frame.rows
    return "all" if frame.actions == (True,) else "none"


# samples


@pytest.mark.parametrize(
    ("groups", "batch", "expected"),
    [
        (1, 1, [[0]]),
        (1, 3, [[0], [1], [2]]),
        (2, 2, [[0, 1]]),
        (2, 6, [[0, 3], [1, 4], [2, 5]]),
        (3, 6, [[0, 2, 4], [1, 3, 5]]),
    ],
)
def test_samples_of(groups, batch, expected):
    assert samples_of(step(0, None, groups, batch), batch) == expected


# planned


def test_a_known_total_gives_the_schedule():
    run = Run(Interval(2), forecaster=Reuse())
    frames = [run.planned(index, 5) for index in range(6)]
    assert [frame.actions for frame in frames] == [(True,), (False,), (True,), (False,), (True,), (True,)]
    assert [any(frame.stores) for frame in frames] == [True, False, True, False, False, False]
    assert {frame.reason for frame in frames} == {"schedule"}


def test_what_is_stored_depends_on_how_many_features_are_kept():
    run = Run(Mask("1110"), forecaster=Taylor(order=1))
    assert [any(run.planned(index, 4).stores) for index in range(4)] == [False, True, True, False]


def test_an_unknown_total_is_decided_step_by_step():
    run = Run(Interval(3), warmup=2)
    frames = [run.planned(index) for index in range(8)]
    assert [frame.actions[0] for frame in frames] == [True, True, False, False, True, False, False, True]
    assert [frame.reason for frame in frames[:3]] == ["warm-up", "warm-up", "interval"]
    assert all(all(frame.stores) for frame in frames)
    assert all(frame.rows is None for frame in frames)


def test_limits_count_what_was_reused_without_a_total():
    run = Run(Interval(10), max_consecutive=2, max_reused=3)
    frames = [run.planned(index) for index in range(7)]
    assert [frame.actions[0] for frame in frames] == [True, False, False, True, False, True, True]
    assert [frame.reason for frame in frames[3:]] == ["max_consecutive", "interval", "max_reused", "max_reused"]


@dataclass(frozen=True)
class OwnSchedule(Policy):
    rows: tuple = ()
    scopes = frozenset(SCOPES)

    def schedule(self, total):
        asked.append(total)
        if not self.rows:
            raise ZeroDivisionError("no rows")
        return Schedule(self.rows)

    def decide(self, step, value, state):
        raise AssertionError("not asked where there is a schedule")


asked = []


def test_a_schedule_decides_on_passes_and_spans():
    rows = (((True, True), (True, True)), ((True, False), (False, True)))
    run = Run(OwnSchedule(rows))
    asked.clear()
    assert run.planned(1, 2, position=0).actions == (True, False)
    assert run.planned(1, 2, position=1).actions == (False, True)
    assert asked == [2]  # once a length


def test_a_schedule_that_fails_computes_and_tells():
    run = Run(OwnSchedule())
    assert [run.planned(index, 3).actions for index in range(3)] == [(True,)] * 3
    assert run.failures == [("the policy", "no rows")]


def test_wrong_use_of_a_policy_is_an_error():
    masked, guarded = Run(Mask("101")), Run(Above(), last=1)
    masked.planned(0)  # warm-up, whatever the policy says
    guarded.open(0, [1.0])
    with pytest.raises(ConfigError, match="num_steps"):
        masked.planned(1)
    with pytest.raises(ConfigError, match="num_steps"):
        guarded.open(1, [1.0])


# measured


def test_nothing_is_decided_before_the_signals_are_there():
    run = Run(Above())
    frame = Frame(step(0, 10), KEY, (True,), 1)
    run.decisions.open(frame, 0)
    assert frame.actions is None
    assert run.decisions.schedule(10) is None


def test_every_sample_is_decided_on_by_its_own_value():
    run = Run(Above(0.5))
    assert decided(run.measured(0, [0.0, 0.0, 0.0])) == "all"
    assert decided(run.measured(1, [0.0, 0.9, 0.5])) == [1]
    assert decided(run.measured(2, [0.9, 0.0, 0.9])) == [0, 2]
    assert decided(run.measured(3, [0.0, 0.0, 0.0])) == "none"
    assert decided(run.measured(4, [0.9, 0.9, 0.9])) == "all"


def test_the_frame_tells_who_asks_and_why():
    run = Run(Above(0.5))
    assert run.measured(0, [0.0, 0.0]).reason == "warm-up"
    frame = run.measured(1, [0.0, 0.75])
    assert frame.asking == [False, True]
    assert frame.reason == "1 of 2 samples: value 0.75"
    frame = run.measured(2, [0.0, 0.25])
    assert (frame.asking, frame.reason) == ([False, False], "value 0.0")
    frame = run.measured(3, [0.75, 1.0])
    assert (frame.asking, frame.reason) == ([True, True], "value 0.75")


def test_guidance_rows_of_a_sample_are_computed_together():
    run = Run(Above(0.5))
    run.measured(0, [0.0] * 6, groups=2)
    frame = run.measured(1, [0.0, 0.9, 0.0, 0.0, 0.0, 0.9], groups=2)  # samples 0, 1, 2 of each branch
    assert frame.asking == [False, True, True]
    assert decided(frame) == [1, 2, 4, 5]


def test_frames_of_a_sample_lie_side_by_side():
    """Where a model folds them into the rows of its batch."""
    run = Run(Above(0.5))
    for index, values in enumerate(([0.0] * 4, [0.125, 0.75, 0.125, 0.125])):
        frame = Frame(step(index, None, 1, 2), KEY, (True,), 2)
        run.decisions.open(frame, 0)
        frame.signals = {"probe_residual": torch.tensor(values)[:, None].repeat(1, 2)}
        run.decisions.after_probe(frame, True)
        run.close(frame)
    assert decided(frame) == [0]


@pytest.mark.parametrize("branch", [0, 1, 2])
def test_the_largest_value_of_a_samples_branches_counts(branch):
    run = Run(Above(0.5))
    run.measured(0, [0.0] * 6, groups=3)
    values = [0.0] * 6
    values[2 * branch] = 0.9
    frame = run.measured(1, values, groups=3)
    assert decided(frame) == [0, 2, 4]
    assert frame.reason == f"1 of 2 samples: value {torch.tensor(0.9).item()}"


@pytest.mark.parametrize("place", [0, 2])
@pytest.mark.parametrize("other", [0.0, 0.9, math.inf])
def test_nan_counts_above_all(place, other):
    """A comparison with NaN is false, so that max may lose it behind another value."""
    run = Run(Above(math.inf))
    run.measured(0, [0.0] * 4, groups=2)
    values = [other, 0.0, other, 0.0]
    values[place] = math.nan
    frame = run.measured(1, values, groups=2)
    assert decided(frame) == [0, 2]
    assert frame.reason == "1 of 2 samples: value nan"


def test_samples_that_cannot_be_told_apart_are_computed_together():
    run = Run(Above(0.5))
    run.measured(0, [0.0, 0.0], apart=False)
    frame = run.measured(1, [0.0, 0.9], apart=False)
    assert decided(frame) == "all"
    assert frame.asking == [False, True]
    assert frame.reason == f"value {torch.tensor(0.9).item()}"
    assert decided(run.measured(2, [0.0, 0.5], apart=False)) == "none"
    assert len(run.told) == 1
    assert "samples of a batch cannot be told apart" in run.told[0]


@pytest.mark.parametrize(("batch", "granularity"), [(2, "sample"), (2, "batch"), (1, "sample")])
def test_numbers_of_rows_that_no_sample_has_are_told_of(batch, granularity):
    """Three numbers for two samples: which is whose cannot be known, and the largest is taken for both."""
    of_three = type("OfThree", (Above,), {"measure": lambda self, signals, past: torch.tensor([0.0, 0.9, 0.0])})
    run = Run(of_three(0.5), granularity=granularity)
    for index in range(2):
        frame = run.measured(index, [0.0] * batch)
    assert frame.asking == [True] * batch
    assert len(run.told) == (batch > 1 and granularity == "sample")


@pytest.mark.parametrize(
    ("values", "apart", "granularity"),
    [
        ([0.0, 0.9], True, "sample"),
        ([0.0, 0.9], False, "batch"),
        ([0.9, 0.9], False, "sample"),
        ([0.0, 0.0], False, "sample"),
        ([0.9], False, "sample"),
    ],
)
def test_samples_that_cannot_be_told_apart_are_not_told_of_where_it_does_not_matter(values, apart, granularity):
    run = Run(Above(0.5), granularity=granularity)
    run.measured(0, [0.0] * len(values), apart=apart)
    run.measured(1, values, apart=apart)
    assert run.told == []


def test_one_sample_is_never_partly_computed():
    run = Run(Above(0.5))
    run.measured(0, [0.0, 0.0], groups=2)
    assert decided(run.measured(1, [0.0, 0.9], groups=2)) == "all"
    assert decided(run.measured(2, [0.0, 0.0], groups=2)) == "none"


# guards


def test_guards_hold_for_every_sample_apart():
    run = Run(Above(0.5), max_consecutive=2)
    run.measured(0, [0.0, 0.0])
    assert decided(run.measured(1, [0.9, 0.0])) == [0]
    assert decided(run.measured(2, [0.0, 0.0])) == "none"
    frame = run.measured(3, [0.0, 0.0])  # sample 1 was reused at steps 1 and 2, sample 0 at step 2
    assert decided(frame) == [1]
    assert frame.reason == "1 of 2 samples: max_consecutive"
    assert decided(run.measured(4, [0.0, 0.0])) == [0]
    assert decided(run.measured(5, [0.0, 0.0])) == "none"
    assert decided(run.measured(6, [0.0, 0.0])) == [1]


def test_max_reused_is_counted_for_every_sample():
    run = Run(Above(0.5), max_reused=2)
    run.measured(0, [0.0, 0.0])
    assert decided(run.measured(1, [0.9, 0.0])) == [0]
    assert decided(run.measured(2, [0.9, 0.0])) == [0]
    assert decided(run.measured(3, [0.0, 0.0])) == [1]
    assert decided(run.measured(4, [0.0, 0.0])) == [1]
    assert decided(run.measured(5, [0.0, 0.0])) == "all"


def test_samples_computed_for_others_count_as_computed():
    run = Run(Above(0.5), max_consecutive=1)
    run.measured(0, [0.0, 0.0], apart=False)
    assert decided(run.measured(1, [0.9, 0.0], apart=False)) == "all"
    assert decided(run.measured(2, [0.0, 0.0], apart=False)) == "none"
    assert decided(run.measured(3, [0.0, 0.0], apart=False)) == "all"


def test_a_call_in_which_nothing_could_be_reused_counts_as_computed():
    run = Run(Above(0.5), max_consecutive=1)
    run.measured(0, [0.0, 0.0])
    frame = run.open(1, [0.0, 0.9])
    assert decided(frame) == [1]
    frame.computed, frame.reused = 1, []  # the span had no history
    run.decisions.close(frame)
    assert decided(run.measured(2, [0.0, 0.0])) == "none"  # sample 0 has not been reused yet


def test_forced_samples_are_not_measured():
    measured = []

    @dataclass(frozen=True)
    class Counting(Above):
        def measure(self, signals, past):
            measured.append(len(signals["probe_residual"]))
            return super().measure(signals, past)

    run = Run(Counting(0.5), warmup=2, max_consecutive=1)
    for index in range(2):
        run.measured(index, [0.0, 0.0])
    assert measured == []
    run.measured(2, [0.0, 0.9])
    assert measured == [2]
    run.measured(3, [0.0, 0.0])  # sample 0 is forced, sample 1 is not
    assert measured == [2, 2]


# what is kept


def test_values_are_compared_with_the_last_computed_step():
    run = Run(Above(0.5, change=True))
    assert decided(run.measured(0, [1.0])) == "all"
    assert decided(run.measured(1, [1.4])) == "none"
    assert decided(run.measured(2, [1.6])) == "all"  # 0.6 from step 0, though 0.2 from step 1
    assert decided(run.measured(3, [2.0])) == "none"


def test_kept_values_are_those_of_every_rows_last_computed_step():
    run = Run(Above(0.5, change=True))
    run.measured(0, [1.0, 2.0, 3.0])
    assert decided(run.measured(1, [1.4, 2.9, 3.4])) == [1]
    # from 1.0, 2.9 and 3.0
    assert decided(run.measured(2, [1.6, 3.3, 3.4])) == [0]
    assert decided(run.measured(3, [2.0, 3.3, 3.6])) == [2]
    assert decided(run.measured(4, [2.2, 3.3, 4.2])) == [0, 2]
    kept = run.decisions._kept[KEY].computed["probe_residual"]
    assert torch.equal(kept, torch.tensor([[2.2, 2.2], [2.9, 2.9], [4.2, 4.2]]))


def test_kept_values_of_guidance_rows():
    run = Run(Above(0.5, change=True))
    run.measured(0, [1.0, 2.0, 3.0, 4.0], groups=2)
    assert decided(run.measured(1, [1.1, 2.0, 3.6, 4.4], groups=2)) == [0, 2]
    # sample 1 is compared with step 0, sample 0 with step 1, in both branches
    assert decided(run.measured(2, [1.5, 2.0, 4.0, 4.6], groups=2)) == [1, 3]
    kept = run.decisions._kept[KEY].computed["probe_residual"]
    assert torch.equal(kept[:, 0], torch.tensor([1.1, 2.0, 3.6, 4.6]))


def test_kept_values_of_samples_that_are_computed_together():
    run = Run(Above(0.5, change=True))
    run.measured(0, [1.0, 1.0], apart=False)
    assert decided(run.measured(1, [1.6, 1.4], apart=False)) == "all"
    assert decided(run.measured(2, [1.6, 1.7], apart=False)) == "none"  # 0.3 from step 1, 0.7 from step 0


def test_nothing_kept_is_compared_with_nothing():
    values = []

    @dataclass(frozen=True)
    class Noting(Above):
        def decide(self, step, value, state):
            values.append(value)
            return super().decide(step, value, state)

    run = Run(Noting(0.5))
    run.measured(0, [0.0, 0.0])
    assert values == []  # warm-up
    run.measured(1, [0.0, 0.25])
    assert values == [0.0, 0.25]
    assert decided(run.measured(2, [0.0, 0.25], width=3)) == "all"  # a signal of another shape
    assert values == [0.0, 0.25, None, None]
    assert decided(run.measured(3, [0.0, 0.25], width=3)) == "none"


def test_another_batch_is_compared_with_nothing_and_keeps_what_all_samples_share():
    run = Run(Above(0.5), max_reused=2)
    run.measured(0, [0.0, 0.0])
    assert decided(run.measured(1, [0.0, 0.0])) == "none"
    assert decided(run.measured(2, [0.0, 0.0, 0.0])) == "all"
    assert decided(run.measured(3, [0.0, 0.0, 0.0])) == "none"
    assert run.measured(4, [0.0, 0.0, 0.0]).reason == "max_reused"


def test_another_batch_forgets_what_its_samples_do_not_share():
    run = Run(Above(0.5), max_reused=1)
    run.measured(0, [0.0, 0.0])
    assert decided(run.measured(1, [0.0, 0.9])) == [1]
    assert run.measured(2, [0.0]).reason == "value None"
    assert decided(run.measured(3, [0.0])) == "none"
    assert run.measured(4, [0.0]).reason == "max_reused"


def test_rows_that_turn_out_to_be_guidance_branches_are_compared_with_what_was_kept():
    run = Run(Above(0.5, change=True))
    run.measured(0, [1.0, 2.0, 3.0, 4.0])
    frame = run.measured(1, [1.0, 2.0, 3.2, 4.9], groups=2)
    assert frame.asking == [False, True]
    assert decided(frame) == [1, 3]


def test_passes_do_not_share_their_past():
    run = Run(Above(0.5, change=True))
    other = ("transformer", "1")
    assert decided(run.measured(0, [1.0])) == "all"
    assert decided(run.measured(1, [1.0], key=other)) == "all"  # past its warm-up, but with nothing kept
    assert decided(run.measured(1, [1.1])) == "none"
    assert decided(run.measured(2, [1.1], key=other)) == "none"
    assert decided(run.measured(2, [1.6], key=other)) == "all"
    assert decided(run.measured(2, [1.4])) == "none"
    assert decided(run.measured(3, [1.6])) == "all"


def test_clear_forgets():
    run = Run(Above(0.5))
    run.measured(0, [0.0])
    assert decided(run.measured(1, [0.0])) == "none"
    run.decisions.clear()
    assert (run.decisions._states, run.decisions._kept) == ({}, {})
    assert decided(run.measured(2, [0.0])) == "all"


def test_clear_forgets_what_other_branches_measured():
    policy = Noted(0.5)
    run = Run(policy)
    keys = ("transformer", "uncond"), ("transformer", "cond")
    for index in range(3):
        for key, value in zip(keys, (0.25, 0.375), strict=True):
            run.measured(index, [value], key=key)
    run.decisions.clear()
    policy.noted.clear()
    for index in range(2):
        for key, value in zip(keys, (0.125, 0.5), strict=True):
            run.measured(index, [value], key=key)
    assert policy.noted == [(1, 0.125, 0.125), (1, 0.125, 0.5)]


# sums, memory and earlier steps


@dataclass(frozen=True)
class Sum(Accumulate):
    """Adds the signal as it is."""

    scopes = frozenset(SCOPES)

    @property
    def needs(self):
        return Needs(signals=("probe_residual",))

    def measure(self, signals, past):
        return signals["probe_residual"].flatten(1).mean(1)


def test_increments_add_up_until_the_sum_passes_the_threshold():
    run = Run(Sum(1.0))
    run.measured(0, [5.0])  # warm-up
    frames = [run.measured(index, [0.375]) for index in range(1, 8)]
    assert [decided(frame) for frame in frames] == ["none", "none", "all", "none", "none", "all", "none"]
    assert [frame.reason for frame in frames[:4]] == ["sum 0.375", "sum 0.75", "sum 1.12", "sum 0.375"]


def test_the_threshold_itself_computes_and_so_does_nan():
    run = Run(Sum(0.5))
    run.measured(0, [0.0])
    assert decided(run.measured(1, [0.5])) == "all"
    assert decided(run.measured(2, [math.nan])) == "all"
    assert decided(run.measured(3, [0.25])) == "none"
    assert decided(run.measured(4, [-0.25])) == "none"
    assert decided(run.measured(5, [0.25])) == "none"


def test_sums_are_each_samples_own():
    run = Run(Sum(1.0))
    run.measured(0, [0.0] * 4, groups=2)
    # the larger of each sample's branches is added
    assert decided(run.measured(1, [0.5, 0.25, 0.75, 0.0], groups=2)) == "none"
    assert decided(run.measured(2, [0.5, 0.25, 0.0, 0.5], groups=2)) == [0, 2]
    assert decided(run.measured(3, [0.5, 0.25, 0.0, 0.0], groups=2)) == [1, 3]
    assert decided(run.measured(4, [0.25, 0.5, 0.0, 0.0], groups=2)) == "none"
    assert decided(run.measured(5, [0.0, 0.5, 0.5, 0.0], groups=2)) == "all"


def test_whoever_computes_a_step_the_sum_begins_anew():
    run = Run(Sum(1.0), max_consecutive=2)
    run.measured(0, [0.0])
    run.measured(1, [0.375])
    run.measured(2, [0.375])
    assert run.measured(3, [0.375]).reason == "max_consecutive"
    assert run.measured(4, [0.375]).reason == "sum 0.375"
    together = Run(Sum(1.0))
    together.measured(0, [0.0, 0.0], apart=False)
    together.measured(1, [0.5, 0.75], apart=False)
    assert decided(together.measured(2, [0.125, 0.5], apart=False)) == "all"
    assert together.measured(3, [0.5, 0.125], apart=False).reason == "sum 0.5"  # computed for its neighbour's sake


def test_a_policy_may_combine_a_samples_branches_in_its_own_way():
    policy = type("Second", (Above,), {"combine": lambda self, values, step: values[1] - values[0]})(0.5)
    run = Run(policy)
    run.measured(0, [0.0] * 4, groups=2)
    assert decided(run.measured(1, [0.0, 0.5, 0.75, 0.5], groups=2)) == [0, 2]
    assert decided(run.measured(2, [0.75, 0.5, 0.0, 0.5], groups=2)) == "none"


@dataclass(frozen=True)
class Noting(Above):
    """Keeps what it was shown of the past."""

    seen: list = field(default_factory=list)
    previous: int = 2

    @property
    def needs(self):
        return Needs(signals=("probe_residual",), previous=self.previous)

    def measure(self, signals, past):
        def first(kept):
            return {name: tensor.flatten(1)[:, 0].tolist() for name, tensor in kept.items()}.get("probe_residual")

        memory = {name: tensor.tolist() for name, tensor in past.memory.items()}
        self.seen.append((first(past.computed), first(past.previous), [*map(first, past.earlier)], memory))
        return super().measure(signals, past)

    def remember(self, signals, past):
        value = signals["probe_residual"].flatten(1)[:, 0]
        return {"twice": 2 * value} if past.computed else {}


def test_a_policy_sees_the_steps_before_computed_or_not():
    policy = Noting(0.5)
    run = Run(policy)
    for index, value in enumerate([0.0, 0.25, 0.75, 0.125, 0.375]):
        run.measured(index, [value])
    assert policy.seen == [
        ([0.0], [0.0], [], {}),
        ([0.0], [0.25], [[0.0]], {}),
        ([0.75], [0.75], [[0.25]], {"twice": [1.5]}),
        ([0.75], [0.125], [[0.75]], {"twice": [1.5]}),
    ]


def test_what_is_remembered_is_of_each_rows_last_computed_step():
    policy = Noting(0.5, previous=0)
    run = Run(policy)
    run.measured(0, [0.0, 0.0, 0.0])
    run.measured(1, [0.25, 0.75, 0.25])
    run.measured(2, [0.75, 0.25, 0.25])
    run.measured(3, [0.0, 0.0, 0.0])
    computed, previous, earlier, memory = policy.seen[-1]
    assert (computed, previous, earlier) == ([0.75, 0.75, 0.0], None, [])
    assert memory["twice"][:2] == [1.5, 1.5]
    assert math.isnan(memory["twice"][2])  # never computed but at the first step, when there was nothing to remember


def test_of_another_batch_nothing_is_kept():
    policy = Noting(0.5)
    run = Run(policy)
    run.measured(0, [0.0])
    run.measured(1, [0.25])
    run.measured(2, [0.25, 0.25])
    run.measured(3, [0.0, 0.0])
    assert policy.seen[-1] == ([0.25, 0.25], [0.25, 0.25], [], {})


@pytest.mark.parametrize("sync", ["immediate", "lagged"])
@pytest.mark.parametrize("failing", ["remember", "measure"])
def test_what_fails_computes_and_tells(failing, sync):
    def fail(*args):
        raise ZeroDivisionError("nothing to keep")

    run = Run(type("Failing", (Above,), {failing: fail})(0.5), sync=sync)
    run.measured(0, [0.0])
    assert [decided(run.measured(index, [0.0])) for index in (1, 2, 3)] == ["all"] * 3
    assert set(run.failures) == {("the policy", "nothing to keep")}


# lagging


def test_lagged_decisions_go_by_the_number_of_the_step_before():
    run = Run(Above(0.5), sync="lagged")
    values = [0.9, 0.9, 0.0, 0.75, 0.0, 0.0]
    frames = [run.measured(index, [value]) for index, value in enumerate(values)]
    assert [decided(frame) for frame in frames] == ["all", "all", "all", "none", "all", "none"]
    assert [frame.reason for frame in frames[:4]] == [
        "warm-up",
        "value None",
        f"value {torch.tensor(0.9).item()}",
        "value 0.0",
    ]


def test_lagged_numbers_are_of_each_sample_and_of_forced_steps_too():
    run = Run(Above(0.5), sync="lagged", warmup=3)
    for index in range(3):
        run.measured(index, [0.0, 0.9])
    assert decided(run.measured(3, [0.9, 0.0])) == [1]
    assert decided(run.measured(4, [0.9, 0.0])) == [0]


def test_ranks_agree_on_lagged_numbers_as_well():
    run = Run(Above(0.5), agree=lambda measured: measured + 1, sync="lagged")
    frames = [run.measured(index, [0.0]) for index in range(3)]
    assert frames[2].reason == "value 1.0"


class Verified(Above):
    """Looks at what a call gave, at its end."""

    @property
    def needs(self):
        return Needs(signals=("tail_output",), verify=True)

    def measure(self, signals, past):
        return signals["tail_output"]

    def decide(self, step, value, state):
        return Verdict(value is not None and value > self.limit, f"value {value}")


def test_a_number_of_another_batch_is_not_gone_by():
    run = Run(Verified(0.5))
    found = []
    for index, values in enumerate(([0.0] * 4, [0.0, 0.0, 1.0, 1.0], [0.0, 0.0], [0.0, 0.0])):
        frame = Frame(step(index, None, 1, len(values)), KEY, (True,), len(values))
        frame.signals = {}
        run.decisions.after_probe(frame, True)
        found.append(frame.reason)
        frame.signals = {"tail_output": torch.tensor(values)}
        frame.reused = [REUSED]
        run.decisions.close(frame)
    assert found == ["warm-up", "value 0.0", "value None", "value 0.0"]


# together with others, and failures


def test_ranks_agree_on_the_values_before_anything_is_decided():
    seen = []

    def agree(measured):
        seen.append(measured.tolist())
        return torch.maximum(measured, torch.tensor([0.9, 0.0]))

    run = Run(Above(0.5), agree=agree)
    run.measured(0, [0.0, 0.0])
    assert seen == []
    assert decided(run.measured(1, [0.0, 0.25])) == [0]
    assert seen == [[0.0, 0.25]]


@pytest.mark.parametrize("failing", ["measure", "decide"])
def test_a_policy_that_fails_computes_and_tells(failing):
    def fail(*args):
        raise ZeroDivisionError("no value")

    policy = type("Failing", (Above,), {failing: fail})(0.5)
    run = Run(policy)
    run.measured(0, [0.0, 0.0])
    assert run.failures == []
    frame = run.measured(1, [0.0, 0.0])
    assert (decided(frame), frame.reason, frame.asking) == ("all", "failure", [True, True])
    assert run.failures == [("the policy", "no value")]


def test_a_policy_without_measure_computes_and_tells():
    policy = type("Unmeasured", (Above,), {"measure": Policy.measure})()
    run = Run(policy)
    run.measured(0, [0.0])
    assert decided(run.measured(1, [0.0])) == "all"
    assert run.failures == [("the policy", "policy 'Unmeasured' names signals and so must define measure")]


def test_wrong_use_while_measuring_is_an_error():
    def refuse(self, step, value, state):
        raise ConfigError("give something else")

    run = Run(type("Refusing", (Above,), {"decide": refuse})())
    run.measured(0, [0.0])
    with pytest.raises(ConfigError, match="give something else"):
        run.measured(1, [0.0])


def test_first_block_decides_on_samples_by_their_relative_change():
    run = Run(FirstBlock(0.1))
    run.measured(0, [1.0, 10.0])
    assert decided(run.measured(1, [1.2, 10.2])) == [0]
    assert decided(run.measured(2, [1.2, 11.5])) == [1]
    assert decided(run.measured(3, [1.25, 12.0])) == "none"
    assert decided(run.measured(4, [math.nan, 12.0])) == [0]
    assert decided(run.measured(5, [1.25, 12.0])) == [0]  # nothing is near what was not a number


def test_policies_get_the_state_of_their_sample():
    states = []

    @dataclass(frozen=True)
    class Noting(Above):
        def decide(self, step, value, state):
            states.append(PassState(state.last_computed, state.consecutive, state.reused))
            return super().decide(step, value, state)

    run = Run(Noting(0.5))
    run.measured(0, [0.0, 0.0])
    run.measured(1, [0.9, 0.0])
    run.measured(2, [0.0, 0.0])
    states.clear()
    run.measured(3, [0.0, 0.0])
    assert states == [PassState(1, 1, 1), PassState(0, 2, 2)]


# guidance branches


def test_a_branch_that_is_no_longer_called_is_not_combined():
    policy = Noted()
    run = Run(policy)
    for index in range(6):
        run.measured(index, [index + 0.25], key=("transformer", "cond"))
        if index < 3 or index == 5:
            run.measured(index, [index + 0.75], key=("transformer", "uncond"))
    assert policy.noted == [
        (1, 1.25, 1.25),  # the other one has measured nothing yet
        (1, 1.75, 1.25),
        (2, 1.75, 2.25),
        (2, 2.75, 2.25),
        (3, 2.75, 3.25),
        (4, 4.25),
        (5, 5.25),
        (5, 5.75, 5.25),
    ]


def test_what_a_branch_measured_before_steps_that_a_guard_computed_is_not_combined():
    policy = Noted()
    run = Run(policy, max_consecutive=1)
    for index in range(4):
        run.measured(index, [index / 8], key=("transformer", "cond"))
        run.measured(index, [index / 8 + 1 / 16], key=("transformer", "uncond"))
    assert policy.noted == [(1, 0.125, 0.125), (1, 0.1875, 0.125), (3, 0.375, 0.375), (3, 0.4375, 0.375)]


def test_branches_of_other_numbers_of_samples_are_not_combined():
    policy = Noted()
    run = Run(policy)
    for index in range(3):
        run.measured(index, [0.25, 0.125], key=("transformer", "uncond"))
        run.measured(index, [0.5], key=("transformer", "cond"))
    assert run.failures == []
    assert policy.noted[-1] == (2, 0.5, 0.5)


def test_a_pass_named_after_both_branches_stacks_them():
    run = Run(Interval(2), unconditional_every=2)
    for index, refused in ((0, nullcontext()), (1, pytest.raises(ConfigError, match="stacks 2 in the rows"))):
        both = replace(step(index, 4, 2, 2), pass_name="cond_uncond")
        with refused:
            run.decisions.open(Frame(both, ("transformer", "cond_uncond"), (True,), 2), 0)
