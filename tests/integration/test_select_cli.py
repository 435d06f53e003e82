"""`diffusion-cache select`: from a profile with plans to one that chooses among refitted ones by the prompt."""

from dataclasses import replace

import numpy as np
import plans
import pytest
import torch
from typer.testing import CliRunner

import diffusion_cache as dc
from diffusion_cache import reference
from diffusion_cache.cli import app
from diffusion_cache.cli.select import _stated
from diffusion_cache.evaluation.prompts import FITTING_SEEDS
from diffusion_cache.plan import Plan
from diffusion_cache.planning.select import Seen
from diffusion_cache.planning.selector import Selector
from diffusion_cache.profile import Profile
from diffusion_cache.schedule import Schedule

NAME = "flux-digits"
SMALL = ("--fitting", 2, "--tuning", 1, "--held-out", 4, "--batch", 3)


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())


@pytest.fixture
def profile(tmp_path):
    """Of eight steps, with a plan that leaves every other one to Taylor."""
    found = plans.profile(NAME)
    schedule = Schedule.uniform(step % 2 == 0 for step in range(plans.STEPS))
    found = found.with_plans([Plan("nfe-4", "stack", None, "auto", schedule, found.noise_levels)])
    found.save(tmp_path / "profile")
    return tmp_path / "profile"


@pytest.mark.slow
def test_a_profile_learns_to_choose_among_plans_of_its_prompts(profile, tmp_path):
    output = run("select", profile, "--nfe", "4.5", "--keep", 3, *SMALL, "--out", tmp_path / "made")
    assert "By the prompt, one of 3 plans of 4 evaluations: " in output
    made = Profile.load(tmp_path / "made")
    (choice,) = Selector.of(made).choices
    names = [plan.name for plan in choice.plans]
    assert names[0] == "nfe-4"
    assert set(names) < {"nfe-4", *(f"nfe-4-for-{digit}" for digit in range(10))}
    assert [plan.facts.get("refitted_on") for plan in choice.plans] == [None, 2, 2]
    assert all(plan.schedule == choice.plans[0].schedule for plan in choice.plans)
    assert sorted(names) == sorted(plan.name for plan in made.plans)
    seeds = choice.held_out.seeds
    assert min(seeds) >= FITTING_SEEDS
    assert not set(seeds) & {seed for _, seed in made.samples}
    # what is stated of the choice is what a plan reaches that was measured on the same sample
    rows = zip(*(plan.quality.values for plan in choice.plans), strict=True)
    assert all(value in row for value, row in zip(choice.held_out.values, rows, strict=True))

    pipe = reference.load(NAME)
    for digit in (0, 1):
        with dc.cached(pipe, policy="select", profile=tmp_path / "made", nfe=4):
            images = reference.images(NAME, plans.batch(pipe, NAME, [(digit, 5)]).call())
            chosen = next(name for name in names if f"plan {name!r}" in dc.summary(pipe).method)
        with dc.cached(pipe, profile=made, plan=chosen):
            assert torch.equal(images, reference.images(NAME, plans.batch(pipe, NAME, [(digit, 5)]).call()))


@pytest.mark.parametrize("texts", [2, None])
def test_plans_state_of_how_many_texts_their_own_samples_are(profile, texts):
    (plan,) = Profile.load(profile).plans
    other = replace(plan, facts={"held_out_prompts": 60})
    (stated,) = _stated(Seen((other,), (), np.array([[30.0], [31.0]])), (1, 2), texts)
    assert (stated.quality.values, stated.held_out_prompts) == ((30.0, 31.0), texts)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--nfe", "3"), "no plan takes 3 denoiser evaluations or fewer"),
        (("--nfe", "4", "--keep", 1), "--keep must be at least 2"),
        (("--nfe", "4", "--held-out", 10_001), "must be 1 to 10000"),
        (("--nfe", "4", "--tuning", 1001), "10010 samples are more than the 10000 that there are seeds for"),
        (("--nfe", "4", "--device", "cuda:1"), "takes no --device"),
        (("--nfe", "four"), "numbers with commas between them"),
        (("--nfe", "4", "--threads", 0), "threads must be at least 1"),
    ],
)
def test_it_refuses_before_it_generates(options, message, profile, tmp_path, monkeypatch):
    monkeypatch.setattr("diffusion_cache.cli.select.teach", lambda batch: pytest.fail("generated"))
    assert message in run("select", profile, *options, "--out", tmp_path / "made", code=2)
    assert not (tmp_path / "made").exists()


def test_other_plans_are_not_written_over(profile, tmp_path):
    before = (profile / "profile.json").read_bytes()
    assert "the profile's own folder" in run("select", profile, "--nfe", "4", *SMALL, "--out", profile, code=2)
    assert (profile / "profile.json").read_bytes() == before
    plans.profile("dit-digits").save(tmp_path / "other")
    told = run("select", profile, "--nfe", "4", *SMALL, "--out", tmp_path / "other", code=2)
    assert "holds a profile of something else" in told


@pytest.mark.parametrize("command", ["select", "plan"])
def test_a_profile_that_was_measured_otherwise_is_not_written_over(command, profile, tmp_path, monkeypatch):
    monkeypatch.setattr("diffusion_cache.cli.plan.teach", lambda batch: pytest.fail("generated"))
    found = Profile.load(profile)
    replace(found, samples=(*found.samples, ("3", FITTING_SEEDS + 999)), plans=()).save(tmp_path / "other")
    before = (tmp_path / "other" / "profile.json").read_bytes()
    told = run(command, profile, "--nfe", "4", *SMALL, "--held-out", 60, "--out", tmp_path / "other", code=2)
    assert "measured otherwise (scope, samples or options)" in told
    assert (tmp_path / "other" / "profile.json").read_bytes() == before


def test_an_earlier_selection_alone_is_written_over(profile, tmp_path, monkeypatch):
    class Began(Exception):
        pass

    def begin(*given):
        raise Began

    monkeypatch.setattr("diffusion_cache.cli.select._taught", begin)
    made, out = Profile.load(profile), tmp_path / "made"
    made.save(out)
    told = run("select", profile, "--nfe", "4", *SMALL, "--out", out, code=2)
    assert "holds plans that were made otherwise, and would be lost: give --out another folder" in told
    replace(made, facts={**made.facts, "select": {}}).save(out)
    asked = ["select", profile, "--nfe", "4", *SMALL, "--out", out]
    with pytest.raises(Began):
        CliRunner().invoke(app, [str(argument) for argument in asked], catch_exceptions=False)


def test_other_plans_leave_a_selection_alone(profile, tmp_path, monkeypatch):
    monkeypatch.setattr("diffusion_cache.cli.plan.teach", lambda batch: pytest.fail("generated"))
    made = Profile.load(profile)
    replace(made, facts={**made.facts, "select": {}}).save(tmp_path / "made")
    before = (tmp_path / "made" / "profile.json").read_bytes()
    told = run("plan", profile, "--nfe", "4", "--out", tmp_path / "made", code=2)
    assert "what `diffusion-cache select` has learned, which would be lost: give --out another folder" in told
    assert (tmp_path / "made" / "profile.json").read_bytes() == before


def test_plans_that_are_best_for_every_prompt_are_told(profile, tmp_path, monkeypatch):
    """A refit that changes nothing gains nothing."""
    monkeypatch.setattr(
        "diffusion_cache.cli.select.refitted", lambda start, teacher, name: replace(start, name=name, quality=None)
    )
    output = run("select", profile, "--nfe", "4", *SMALL, "--out", tmp_path / "made", code=2)
    assert "nfe-4: best for each of the prompts as it is, so that there is nothing to choose" in output
    assert not (tmp_path / "made").exists()
