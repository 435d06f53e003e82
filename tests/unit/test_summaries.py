"""Summaries as they are shown."""

import io

import pytest
import small
import torch
from rich.console import Console

import diffusion_cache as dc
from diffusion_cache import reference
from diffusion_cache.plan import Plan
from diffusion_cache.schedule import Schedule
from diffusion_cache.summaries import Inspection, SpanInfo, Summary

TEXT = "a[b][/c]"
SHOWN = {
    "summary": Summary(TEXT, ("stack",), 1, None, (), 0, 0, (TEXT,), (TEXT,)),
    "inspection": Inspection(TEXT, (SpanInfo(TEXT, TEXT, TEXT, 1, 1, None),), 1),
}


@pytest.mark.parametrize(("name", "times"), [("summary", 3), ("inspection", 4)])
def test_brackets_are_no_markup(name, times):
    assert str(SHOWN[name]).count(TEXT) == times
    file = io.StringIO()
    Console(file=file, width=200).print(SHOWN[name])
    assert file.getvalue().count(TEXT) == times


@pytest.mark.filterwarnings("error::diffusion_cache.errors.DiffusionCacheWarning")
@pytest.mark.parametrize(
    ("steps", "options", "told"),
    [
        (4, {"policy": "interval", "every": 2}, True),
        (8, {"policy": "first_block", "threshold": 10.0}, True),
        (9, {"policy": "interval", "every": 2}, False),
        (4, {"policy": "interval", "every": 1}, False),  # nothing is reused
        (4, {"plan": Plan("second", "stack", None, "auto", Schedule.uniform([True, False] * 2), ())}, False),
    ],
)
def test_a_run_of_few_steps_says_what_recommend_says(steps, options, told):
    pipe = small.load("dit-digits")
    dc.enable(pipe, **options)
    pipe(**reference.inputs("dit-digits", labels=[3], seeds=[0], steps=steps))
    summary = dc.summary(pipe)
    assert len(summary.notes) == told
    assert (f"note: {steps} steps leave little to reuse" in " ".join(str(summary).split())) == told
    assert summary.warnings == ()
    if told:
        assert not dc.recommend(pipe, steps).cache


def test_a_loop_is_told_of_its_few_steps_where_it_says_how_many_there_are():
    model = small.load("dit-digits").transformer
    for steps, told in [(4, True), (None, False)]:
        with torch.no_grad(), dc.run(model, "interval", every=2, num_steps=steps) as run:
            for _ in range(4):
                model(torch.ones(1, 1, 16, 16), timestep=torch.tensor([5]), class_labels=torch.tensor([3]))
                run.next_step()
        assert run.summary().reused == 2
        assert bool(run.summary().notes) == told
