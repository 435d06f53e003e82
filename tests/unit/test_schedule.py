"""Schedules: shape, cost, and which features are worth storing."""

import numpy as np
import pytest

from diffusion_cache.errors import ConfigError
from diffusion_cache.schedule import Schedule, spaced


def uniform(text):
    return Schedule.uniform(character == "1" for character in text)


@pytest.mark.parametrize(("text", "nfe"), [("1", 1), ("1111", 4), ("1000", 1), ("10101", 3)])
def test_nfe_of_uniform_schedules(text, nfe):
    schedule = uniform(text)
    assert schedule.nfe == nfe
    assert schedule.total == len(text)
    assert schedule == uniform(text)
    assert hash(schedule) == hash(uniform(text))


def test_uniform_makes_bools():
    assert Schedule.uniform([1, 0]).compute == (((True,),), ((False,),))


def test_nfe_averages_passes_and_spans():
    schedule = Schedule(
        (
            ((True, True), (True, True)),
            ((True, False), (False, False)),  # 1 of 4
            ((True, True), (False, False)),  # 2 of 4
        )
    )
    assert schedule.nfe == 1.75


def test_nfe_where_one_entry_stands_for_all_spans_of_a_pass():
    schedule = Schedule((((True,), (True, True, True)), ((True,), (False, False, False))))
    assert schedule.nfe == 1.5  # step 1: pass 0 computes everything, pass 1 nothing


@pytest.mark.parametrize("compute", [(((False,),),), (((True, False),), ((True, True),)), (((True,), (False,)),)])
def test_first_step_must_be_computed(compute):
    with pytest.raises(ConfigError, match="must compute its first step"):
        Schedule(compute)


def test_no_steps():
    with pytest.raises(ConfigError, match="needs at least one step"):
        Schedule(())


def test_rows():
    schedule = Schedule((((True, True), (True, True)), ((True, False), (False, True))))
    assert schedule.row(1, 0) == (True, False)
    assert schedule.row(1, 1) == (False, True)
    assert schedule.row(1, 7) == (False, True)  # passes beyond the schedule's follow its last
    assert schedule.row(2, 0) == schedule.row(99, 1) == (True,)  # steps beyond it are computed
    assert uniform("10").row(1, 5) == (False,)


@pytest.mark.parametrize(
    ("text", "history", "stored"),
    [
        ("1111", 1, "0000"),  # nothing is ever reused
        ("1000", 1, "1000"),
        ("11101", 1, "00100"),  # only the newest before the reuse; the last one serves nothing
        ("11101", 2, "01100"),
        ("11101", 3, "11100"),
        ("11101", 9, "11100"),
        ("1010101", 2, "1010100"),
        ("1101111", 2, "1100000"),
        ("1110111010", 2, "0110011010"),
    ],
)
def test_stores_what_a_later_reuse_reads(text, history, stored):
    schedule = uniform(text)
    assert "".join(str(int(*schedule.stores(i, 0, history))) for i in range(len(text))) == stored
    assert schedule.stores(len(text), 0, history) == (False,)


def reads(text, history):
    """Steps whose features a reuse reads, by brute force: the last `history` computed ones before it."""
    read = set()
    for step, entry in enumerate(text):
        if entry == "0":
            computed = [i for i in range(step) if text[i] == "1"]
            read |= set(computed[-history:])
    return read


@pytest.mark.parametrize("history", [1, 2, 3])
def test_stores_equals_brute_force_on_every_schedule_of_seven_steps(history):
    for bits in range(64):
        text = "1" + f"{bits:06b}"
        schedule = uniform(text)
        assert {i for i in range(7) if schedule.stores(i, 0, history)[0]} == reads(text, history)


@pytest.mark.parametrize("history", [1, 2])
def test_stores_of_each_span_what_it_reads_itself(history):
    for bits in range(256):
        spans = ["1" + f"{bits >> 4:04b}", "1" + f"{bits & 15:04b}"]
        schedule = Schedule(tuple((tuple(text[i] == "1" for text in spans),) for i in range(5)))
        for span, text in enumerate(spans):
            assert {i for i in range(5) if schedule.stores(i, 0, history)[span]} == reads(text, history)


def test_stores_where_one_entry_of_a_step_stands_for_all_spans():
    schedule = Schedule((((True,),), ((True, False),), ((False,),)))
    assert [schedule.stores(i, 0, 1) for i in range(3)] == [(False, True), (True, False), (False, False)]


def test_stores_is_per_pass():
    both, first = ((True,), (True,)), ((False,), (True,))
    schedule = Schedule((both, both, first))
    assert [schedule.stores(i, 0, 1) for i in range(3)] == [(False,), (True,), (False,)]
    assert [schedule.stores(i, 1, 1) for i in range(3)] == [(False,)] * 3


# spaced schedules


@pytest.mark.parametrize("steps", [5, 20, 50])
@pytest.mark.parametrize("exponent", [0.3, 0.5, 0.99, 1.0, 1.5, 2.0, 4.0])
@pytest.mark.parametrize("last", [0, 1, 2])
def test_spaced_schedules_are_schedules(steps, exponent, last):
    for computed in range(1 + last, steps + 1):
        places = spaced(steps, computed, exponent, last)
        assert len(places) == computed
        assert places[0] == 0
        assert places == tuple(sorted(set(places)))
        assert set(range(steps - last, steps)) <= set(places) <= set(range(steps))


def test_exponent_one_is_even():
    """All of them: 98 · (1/49) is a little less than 2 in floating point."""
    for steps in range(1, 101):
        for computed in range(1, steps + 1):
            assert spaced(steps, computed, 1.0) == tuple(steps * j // computed for j in range(computed))


def test_what_exponents_mean():
    assert spaced(50, 5, 2.0) == (0, 2, 8, 18, 32)
    assert spaced(50, 5, 0.5) == (0, 18, 32, 42, 48)  # 50 · (1 − (1 − j/5)²)
    assert spaced(52, 7, 2.0, last=2) == (0, 2, 8, 18, 32, 50, 51)
    early = [sum(spaced(50, 10, exponent)) for exponent in (0.25, 0.5, 1.0, 2.0, 4.0)]
    assert early == sorted(early, reverse=True)
    assert len(set(early)) == 5


def test_below_one_is_the_mirror_of_above():
    """Gaps grow with exponent e where they shrink with 1/e."""
    for exponent in (1.5, 2.0, 3.0):
        above, below = spaced(1000, 10, exponent), spaced(1000, 10, 1 / exponent)
        gaps = np.diff([*above, 1000]), np.diff([*below, 1000])
        assert np.abs(gaps[0] - gaps[1][::-1]).max() <= 1


@pytest.mark.parametrize(("steps", "computed", "last"), [(5, 6, 0), (5, 0, 0), (5, 2, 2), (5, 3, 3)])
def test_numbers_that_cannot_be(steps, computed, last):
    with pytest.raises(ConfigError, match="no schedule"):
        spaced(steps, computed, 1.0, last)


@pytest.mark.parametrize("exponent", [0, -1.0, float("nan")])
def test_exponents_that_cannot_be(exponent):
    with pytest.raises(ConfigError, match="exponent"):
        spaced(10, 4, exponent)


def test_a_length_that_makes_exponent_one_every_nth_step():
    assert spaced(10, 4, 1.0, length=12) == (0, 3, 6, 9)
    assert spaced(9, 4, 1.0, length=12) == (0, 3, 6, 8)
