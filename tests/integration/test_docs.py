"""The code of docs/, CONTRIBUTING.md and README.md's start runs; README.md's tables are those of committed results."""

import csv
import itertools
import json
import re
from pathlib import Path

import language_models
import pytest
import small
import torch

import diffusion_cache as dc
from diffusion_cache import reference, registry
from diffusion_cache.planning.choose import choose

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)


@pytest.mark.parametrize(
    ("page", "printed"),
    [
        ("memory.md", "int8-delta "),
        ("slicing.md", "the least that works is max_bytes="),
        ("streams.md", "6 calls computed and 5 reused"),
    ],
)
def test_every_line_of_code_runs(page, printed, capsys):
    blocks = BLOCK.findall((ROOT / "docs" / page).read_text())
    assert blocks
    names = {}
    for block in blocks:
        exec(compile(block, page, "exec"), names)
    assert printed in capsys.readouterr().out


def test_the_first_lines_of_readme_run(capsys):
    first, _, profiled = BLOCK.findall((ROOT / "README.md").read_text())[:3]  # the second is of a released model
    names = {}
    exec(compile(first, "README.md", "exec"), names)
    assert "20 calls computed and 20 reused" in capsys.readouterr().out
    exec(compile(profiled, "README.md", "exec"), names)
    pipe = names["pipe"]
    pipe(**reference.inputs("flux-digits", [3], [0]))
    summary = dc.summary(pipe)
    assert summary.computed + summary.reused == 40
    assert 17 <= summary.computed <= 20  # the best plan that was measured to be twice as fast


def test_plans_for_a_loop_of_ones_own(tmp_path, monkeypatch):
    """With fewer samples, steps and tries than the page takes."""
    section = (ROOT / "docs" / "plans.md").read_text().split("\n## A loop of your own\n")[1]
    example = BLOCK.search(section).group(1)
    for given, fewer in [
        ("range(8)", "range(2)"),
        ("batch(100, 16)", "batch(100, 2)"),
        ("batch(200, 8)", "batch(200, 2)"),
        ("batch(300, 64)", "batch(300, 2)"),
        ("range(300, 364)", "range(300, 302)"),
        ("runs=20", "runs=2"),
        ("planner.plan(20)", "planner.plan(3)"),
    ]:
        assert given in example
        example = example.replace(given, fewer)
    pipe, steps = small.load("dit-digits"), 6

    def my_loop(seeds, next_step=lambda: None):
        pipe.scheduler.set_timesteps(steps)
        sample = torch.stack([torch.randn(1, 16, 16, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
        labels = torch.tensor([seed % 10 for seed in seeds])
        for t in pipe.scheduler.timesteps:
            next_step()
            output = pipe.transformer(sample, timestep=t.expand(len(seeds)), class_labels=labels).sample[:, :1]
            sample = pipe.scheduler.step(output, t, sample).prev_sample
        return sample / 2 + 0.5

    monkeypatch.chdir(tmp_path)
    with torch.no_grad():
        exec(example, {"transformer": pipe.transformer, "scheduler": pipe.scheduler, "my_loop": my_loop})
        with dc.run(pipe.transformer, profile="./my-loop", nfe=3, num_steps=steps) as run:
            assert my_loop([7], run.next_step).isfinite().all()
    assert [record.computed for record in run.summary().records].count(True) == 3


@pytest.fixture
def examples():
    """Of CONTRIBUTING.md, as modules of the packages that they are written for."""
    kinds = {
        "policies": (registry.policies, "powers"),
        "forecasters": (registry.forecasters, "mean"),
        "systems": (registry.systems, "turns"),
        "language": (registry.languages, "masked"),
    }
    packages = []
    for section in (ROOT / "CONTRIBUTING.md").read_text().split("\n## "):
        for block in BLOCK.findall(section):
            packages.append(re.search(r"`diffusion_cache/(\w+)/", section).group(1))
            exec(compile(block, section, "exec"), {"__name__": f"diffusion_cache.{packages[-1]}._example"})
    assert packages == [*kinds]
    yield
    for kind, name in kinds.values():
        kind.unregister(name)


def test_the_examples_of_contributing_work(examples):
    pipe = reference.load("dit-digits")
    with dc.cached(pipe, "powers", "mean"):
        pipe(**reference.inputs("dit-digits", [3], [5], steps=6))
        assert [record.step for record in dc.summary(pipe).records if record.computed] == [0, 1, 2, 4]
    with pytest.raises(dc.ConfigError, match="turns plans from measurements"):
        dc.enable(pipe, method="turns")
    pipe = language_models.pipeline(language_models.model())
    with dc.cached(pipe, method="masked"):
        pipe(**language_models.call())
        assert dc.summary(pipe).executed < dc.summary(pipe).tokens


def test_the_demo_in_readme_is_the_committed_one():
    table = (ROOT / "docs" / "demo.md").read_text().partition("\n\n")[0]
    assert table.count("\n") == 9
    assert table in (ROOT / "README.md").read_text()


def test_the_plans_in_readme_are_those_that_ship():
    """Mean and 5th percentile as evaluated, with the worst of the plan's own held-out samples."""
    rows = list(csv.DictReader((ROOT / "results" / "reference_grid" / "summary.csv").open()))
    found = {
        (row["model"], row["sampler"], json.loads(row["settings"])["plan"]): (row["psnr_mean"], row["psnr_p5"])
        for row in rows
        if row["method"] == "plan"
    }
    readme = (ROOT / "README.md").read_text()
    for model, sampler in dict.fromkeys(key[:2] for key in found):
        profile = dc.Profile.from_pretrained(f"{model}-{sampler}")
        plans = [choose(profile.plans, nfe=profile.total / part) for part in (2, 3, 4, 5)]
        figures = [(*map(float, found[model, sampler, plan.name]), plan.quality.worst) for plan in plans]
        cells = " | ".join(f"{mean:.1f} / {p5:.1f} ({worst:.1f})" for mean, p5, worst in figures)
        assert f"| {model}, {sampler} | {cells} |" in readme


def test_what_differences_cost_is_what_was_evaluated():
    evaluated = {}
    for row in csv.DictReader((ROOT / "results" / "reference_grid" / "summary.csv").open()):
        settings = json.loads(row["settings"])
        if row["method"] in ("plan", "plan, coded"):
            evaluated[row["model"], row["sampler"], settings["plan"], settings.get("cache_dtype", "model")] = row
    page = (ROOT / "docs" / "memory.md").read_text()
    plans = [key[:3] for key in evaluated if key[3] == "int8-delta"]
    assert len(plans) == 24
    losses = []
    for plan in plans:
        kept, *coded = (evaluated[(*plan, dtype)] for dtype in ("model", "int8-delta", "int8", "fp8"))
        change = [float(row["psnr_mean"]) - float(kept["psnr_mean"]) for row in coded]
        losses.append([-one for one in change])
        cells = [f"{one:+.2f}".replace("-", "−") for one in change]
        cells += [f"{int(row['cache_bytes']) / int(kept['cache_bytes']):.2f}" for row in coded[:2]]
        name = f"{plan[0]}, {plan[1]}, {plan[2].removeprefix('nfe-')} of {kept['steps']}, {kept['scope']}"
        assert f"| {name} | {float(kept['psnr_mean']):.2f} | {' | '.join(cells)} |" in page
    differences, int8, fp8 = map(max, zip(*losses, strict=True))
    assert f"it lost at most {differences:.2f} dB, `int8` up to {int8:.1f} and `fp8` up to {fp8:.1f}." in page


def test_what_the_cache_costs_is_what_was_measured():
    rows = json.loads((ROOT / "results" / "overhead.json").read_text())["results"]
    readme = (ROOT / "README.md").read_text()
    assert [row["batch"] for row in rows] == [1, 4, 16]
    for row in rows:
        storing = "{:.1%} ({:.1%} to {:.1%})".format(row["storing"], *row["storing_range"])
        assert f"| {row['batch']} | {row['uncached_ms']:.1f} ms | {storing} | {row['reusing']:.1%} |" in readme
    assert f"what the cache adds {rows[0]['uncached_ms'] * rows[0]['storing']:.2f} ms" in readme


def test_the_margins_in_readme_are_those_of_finals():
    def table(path):
        lines = (ROOT / path).read_text().splitlines()
        begin = next(place for place, line in enumerate(lines) if line.startswith("| model | budget | plan |"))
        return list(itertools.takewhile(lambda line: line.startswith("|"), lines[begin:]))

    assert table("README.md") == table("results/finals/report.md")
    rows = list(csv.DictReader((ROOT / "results" / "finals" / "margins.csv").open()))
    short = {
        equal: sum(float(row["margin"]) < (2 if row["budget"] == "1/2" else 4) for row in rows if row["equal"] == equal)
        for equal in ("nfe", "speed")
    }
    assert (len(rows), short) == (96, {"nfe": 8, "speed": 10})
