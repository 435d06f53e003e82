"""Schedules: shape, cost, and which features are worth storing."""

import pytest

from diffusion_cache.errors import ConfigError
from diffusion_cache.schedule import Schedule


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


@pytest.mark.parametrize("compute", [(), (((False,),),), (((True, False),), ((True, True),)), (((True,), (False,)),)])
def test_first_step_must_be_computed(compute):
    with pytest.raises(ConfigError):
        Schedule(compute)


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
    assert "".join(str(int(schedule.stores(i, 0, history))) for i in range(len(text))) == stored
    assert not schedule.stores(len(text), 0, history)


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
        assert {i for i in range(7) if schedule.stores(i, 0, history)} == reads(text, history)


@pytest.mark.parametrize("history", [1, 2])
def test_stores_covers_every_span(history):
    for bits in range(256):
        spans = ["1" + f"{bits >> 4:04b}", "1" + f"{bits & 15:04b}"]
        schedule = Schedule(tuple((tuple(text[i] == "1" for text in spans),) for i in range(5)))
        stored = {i for i in range(5) if schedule.stores(i, 0, history)}
        assert all(reads(text, history) <= stored for text in spans)


def test_stores_is_per_pass():
    both, first = ((True,), (True,)), ((False,), (True,))
    schedule = Schedule((both, both, first))
    assert [schedule.stores(i, 0, 1) for i in range(3)] == [False, True, False]
    assert [schedule.stores(i, 1, 1) for i in range(3)] == [False, False, False]
