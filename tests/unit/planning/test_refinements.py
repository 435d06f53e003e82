"""What plans for language models state."""

from contextlib import nullcontext
from types import SimpleNamespace

import language_models
import pytest
import torch

from diffusion_cache.measure import PairedTiming
from diffusion_cache.plan import Plan
from diffusion_cache.planning import refinements
from diffusion_cache.schedule import Schedule


@pytest.mark.parametrize(
    ("device", "ratio"), [(torch.device("cpu"), 2.0), ("cpu", 2.0), (torch.device("cuda", 0), 4.0)]
)
def test_speed_is_cpu_time_only_where_the_cpu_does_the_work(monkeypatch, device, ratio):
    timing = PairedTiming(a_wall=(4.0, 8.0, 3.0), b_wall=(1.0, 2.0, 1.0), a_cpu=(2.0, 4.0, 1.0), b_cpu=(1.0, 2.0, 1.0))
    monkeypatch.setattr(refinements, "paired", lambda *given: timing)
    monkeypatch.setattr(refinements, "_same", lambda *given: torch.ones(1))
    plan = Plan("two", "block", None, "auto", Schedule.uniform([True, False]), ())
    found = refinements._measured(SimpleNamespace(device=device), plan, [{}], [torch.zeros(1, 4)])
    assert (found.speed.ratio, found.speed.device) == (ratio, str(device))


def test_the_schedule_that_scores_best_is_taken(monkeypatch):
    scores = {"sum": 0.5, "minimax": 0.9, "even": 0.2}
    schedule = Schedule.uniform([True, False])
    made = [Plan(name, "block", None, "auto", schedule, (), facts={"schedule": name}) for name in scores]
    monkeypatch.setattr(refinements, "candidates", lambda *given: made)
    monkeypatch.setattr(refinements, "_same", lambda pipe, plan, *given: torch.tensor([scores[plan.name]]))
    monkeypatch.setattr(refinements, "_measured", lambda pipe, plan, *given: plan)
    monkeypatch.setattr(refinements, "enabled", lambda *given: nullcontext())
    profile = SimpleNamespace(check=lambda *given: None, with_plans=list)
    pipe = type("Pipe", (), {"model": None, "__call__": lambda self: SimpleNamespace(sequences=None)})()
    (plan,) = refinements.planned(pipe, profile, [2], [{}], [{}])
    assert (plan.name, plan.facts["schedule"]) == ("nfe-2", "minimax")


@pytest.mark.parametrize(
    ("found", "expected", "share"),
    [
        ([3, 4, 9, 0, 0, 0], [3, 4, 9, 0, 0, 0], 1.0),
        ([3, 9, 0, 0, 0, 0], [3, 4, 5, 9, 0, 0], 1 / 4),  # what only one of them has is not alike
        ([3, 4, 5, 9, 0, 0], [3, 9, 0, 0, 0, 0], 1 / 4),
        ([9, 0, 0, 0, 0, 0], [3, 4, 5, 6, 9, 0], 0.0),  # nor are masks after the end
        ([3, 4, 5, 6, 7, 8], [3, 4, 9, 6, 7, 8], 1 / 3),
        ([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 7], 5 / 6),
    ],
)
def test_answers_end_where_they_say_so(found, expected, share):
    assert refinements.agreement(torch.tensor([found]), torch.tensor([expected]), 9).tolist() == pytest.approx([share])


def test_without_an_end_all_tokens_count():
    rows = refinements.agreement(torch.tensor([[1, 9, 0], [1, 2, 3]]), torch.tensor([[1, 9, 1], [1, 2, 3]]), None)
    assert rows.tolist() == pytest.approx([2 / 3, 1.0])


def test_plans_are_scored_up_to_the_end_of_each_answer():
    pipe = language_models.pipeline(language_models.model())
    call = language_models.call(samples=1, gen_length=64)
    free = pipe(**call).sequences[0].tolist()
    call["eos_token_id"] = free[4]
    expected = pipe(**call).sequences
    end = free.index(free[4]) + 1
    other = expected.clone()
    other[0, :end] += 1  # no token of the answer; what follows it stays
    plan = Plan("all", "layer", None, "residual", Schedule.uniform([True]), ())
    assert refinements._same(pipe, plan, [call], [expected]).tolist() == [1.0]
    assert refinements._same(pipe, plan, [call], [other]).tolist() == [0.0]
