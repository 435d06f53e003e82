"""Reading finished runs, choosing among them, and the tables, on made-up runs whose answers are worked out by hand."""

import csv
import html.parser
import json
import math
import sys
import warnings
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from evaluation_runs import ENVIRONMENT, INJECTED_LABEL, INJECTED_PROMPT, write_experiment, write_run
from safetensors.numpy import load_file, save_file

from diffusion_cache.errors import ConfigError, DiffusionCacheWarning
from diffusion_cache.evaluation import report, report_page
from diffusion_cache.evaluation.report import write_report
from diffusion_cache.evaluation.runs import extremes, read_experiment


def same(value: float, n: int = 4) -> list[float]:
    return [value] * n


def csv_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def markdown_cells(text: str) -> list[list[str]]:
    """The cells of every table line."""
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line[:1] == "|"]


@pytest.fixture(scope="module")
def experiment(tmp_path_factory) -> Path:
    return write_experiment(tmp_path_factory.mktemp("made-up"), n=4, settings=3, side=8)


@pytest.fixture(scope="module")
def written(experiment) -> report.ReportPaths:
    pytest.importorskip("plotly")
    with warnings.catch_warnings():
        warnings.simplefilter("error", DiffusionCacheWarning)
        return write_report(experiment)


# choosing


def test_pareto_front_by_hand():
    #          on front  beaten by 0  on front   equal to 0  beaten (dearer, as good as 2)  beaten (same cost, worse)
    points = [(0.5, 50), (0.5, 49), (0.2, 30), (0.5, 50), (0.3, 30), (0.2, 29)]
    assert report.pareto_front(points) == [True, False, True, True, False, False]
    assert report.pareto_front([(1.0, math.inf), (0.5, math.inf), (0.4, 60.0)]) == [False, True, True]
    assert report.pareto_front([]) == []


def test_pareto_is_within_model_sampler_and_method(tmp_path):
    best = write_run(tmp_path, method="a", nfe=0.5, psnr=same(50), settings={"k": 1})
    beaten = write_run(tmp_path, method="a", nfe=0.6, psnr=same(45), settings={"k": 2})
    cheap = write_run(tmp_path, method="a", nfe=0.2, psnr=same(20), settings={"k": 3})
    other_method = write_run(tmp_path, method="b", nfe=0.6, psnr=same(40))
    other_kind = write_run(tmp_path, kind="rival", method="a", nfe=0.7, psnr=same(30))
    other_sampler = write_run(tmp_path, method="a", sampler="dpm++", nfe=0.6, psnr=same(45))
    wrong = write_run(tmp_path, method="a", nfe=0.1, psnr=same(90), correct=False, problem="broken", settings={"k": 4})
    random = write_run(tmp_path, method="a", model="big", nfe=0.5, psnr=same(50), random_weights=True)
    found = report.pareto_runs(read_experiment(tmp_path).runs)
    assert found == {best, cheap, other_method, other_kind, other_sampler}
    assert not {beaten, wrong, random} & found


def test_choice_for_a_budget(tmp_path):
    uncached = write_run(tmp_path, kind="baseline", method="uncached", nfe=0.1, psnr=same(math.inf))
    fits = write_run(tmp_path, method="a", nfe=0.53, psnr=same(40), settings={"k": 1})  # 1/2 × 1.06, just within
    write_run(tmp_path, method="a", nfe=0.54, psnr=same(60), settings={"k": 2})
    cheap = write_run(tmp_path, method="a", nfe=0.3, psnr=same(35), settings={"k": 3})
    steady = write_run(tmp_path, method="b", nfe=0.5, psnr=[49, 50, 51, 50], settings={"k": 1})
    write_run(tmp_path, method="b", nfe=0.5, psnr=[40, 60, 40, 60], settings={"k": 2})  # same mean, lower p5
    baseline = write_run(tmp_path, kind="baseline", method="fewer steps", nfe=0.5, psnr=same(30))
    write_run(
        tmp_path, kind="rival", method="c", nfe=0.4, psnr=same(70), correct=False, problem="no", settings={"k": 1}
    )
    right = write_run(tmp_path, kind="rival", method="c", nfe=0.4, psnr=same(33), settings={"k": 2})
    wrong = write_run(tmp_path, kind="rival", method="d", nfe=0.9, psnr=(), correct=False, problem="no")
    runs = read_experiment(tmp_path).runs
    folders = [run.folder for run in report.choose(runs, 1 / 2)]
    assert folders == [baseline, steady, fits, right, wrong]
    assert uncached not in folders
    assert [run.folder for run in report.choose(runs, 1 / 3)] == [cheap, wrong]
    best = report.best_of(report.choose(runs, 1 / 2))
    assert best is not None
    assert best.folder == steady
    assert report.best_of([run for run in runs if not run.correct]) is None


@pytest.mark.parametrize("steady", [2, 3])
def test_of_one_mean_the_better_tail(tmp_path, steady):
    for every in (2, 3):
        psnr = [49, 51, 50, 50] if every == steady else [40, 60, 50, 50]
        write_run(tmp_path, settings={"every": every}, psnr=psnr)
    (chosen,) = report.choose(read_experiment(tmp_path).runs, 0.5)
    assert chosen.settings == {"every": steady}


def test_random_weights_are_chosen_by_nearness_to_the_budget_then_speed(tmp_path):
    for every, nfe, speed in ((2, 0.3, 1.5), (3, 0.3, 1.9), (4, 0.3, 1.7), (5, 0.2, 4.0), (6, 0.5, 5.0)):
        write_run(tmp_path, nfe=nfe, psnr=(), speed=speed, random_weights=True, settings={"every": every})
    write_run(tmp_path, method="b", nfe=0.33, psnr=(), speed=1.8, random_weights=True)
    chosen = report.choose(read_experiment(tmp_path).runs, 1 / 3)
    assert [(run.method, run.settings.get("every")) for run in chosen] == [("interval", 3), ("b", None)]
    best = report.best_of(chosen)
    assert best is not None
    assert best.method == "interval"


# margins of plans


def write_plan(folder, **fields):
    return write_run(folder, **{"method": "plan", "settings": {"nfe": 10, "plan": "half"}, **fields})


def test_margins_by_hand(tmp_path):
    half = write_plan(tmp_path, nfe=0.5, psnr=[50, 52, 54, 56], speed=1.8)  # mean 53
    third = write_plan(
        tmp_path, nfe=0.32, psnr=[40, 44, 44, 48], speed=2.5, settings={"nfe": 6, "plan": "third"}
    )  # mean 44
    even = write_run(tmp_path, kind="rival", method="even", nfe=0.53, psnr=same(49), speed=1.5)  # within 6%
    high = write_run(tmp_path, kind="baseline", method="high", nfe=0.5, psnr=[30, 60, 60, 60], speed=1.9)  # mean 52.5
    dear = write_run(tmp_path, method="dear", nfe=0.7, psnr=same(70), speed=1.8)  # as fast as the plan, beyond 1/2
    cheap = write_run(tmp_path, method="spaced Taylor", nfe=0.3, psnr=same(45), speed=1.2)
    # none of these counts
    write_run(tmp_path, kind="rival", method="beyond", nfe=0.54, psnr=same(90), speed=1.0)
    write_run(tmp_path, kind="rival", method="wrong", nfe=0.2, psnr=same(90), speed=9.0, correct=False, problem="no")
    write_run(tmp_path, kind="rival", sampler="dpm++", method="elsewhere", nfe=0.2, psnr=same(90), speed=9.0)
    write_run(tmp_path, kind="baseline", method="uncached", nfe=1.0, psnr=same(math.inf), speed=1.0)
    write_run(tmp_path, kind="rival", method="untimed", nfe=0.9, psnr=same(90), quality_only=True)

    at_half, at_third, at_fifth = report.margins(
        read_experiment(tmp_path).runs, {"1/2": 0.5, "1/3": 1 / 3, "1/5": 1 / 5}
    )

    def others(margin):
        return {key: run and run.folder for key, run in margin.others.items()}

    assert (at_half.subject, at_half.budget, at_half.plan.folder) == (("dit-digits", "ddim"), "1/2", half)
    assert others(at_half) == {
        ("nfe", "mean"): high,
        ("nfe", "p5"): even,
        ("speed", "mean"): dear,
        ("speed", "p5"): dear,
    }
    assert [at_half.decibels(*key) for key in at_half.others] == [0.5, 1.0, -17.0, -20.0]
    assert at_third.plan.folder == third
    assert others(at_third) == {
        ("nfe", "mean"): cheap,
        ("nfe", "p5"): cheap,
        ("speed", "mean"): None,
        ("speed", "p5"): None,
    }
    assert [at_third.decibels(*key) for key in at_third.others] == [-1.0, -5.0, None, None]
    assert (at_fifth.plan, set(at_fifth.others.values())) == (None, {None})
    assert at_fifth.decibels("nfe", "mean") is None


def test_a_plan_must_not_spend_more_than_what_it_is_compared_with(tmp_path):
    dear = write_plan(tmp_path, nfe=0.51, psnr=same(60))
    kept = write_plan(tmp_path, nfe=0.4, psnr=same(40), settings={"nfe": 8, "plan": "p"})
    other = write_run(tmp_path, nfe=0.505, psnr=same(50))
    (margin,) = report.margins(read_experiment(tmp_path).runs, {"1/2": 0.5})
    assert (margin.plan.folder, margin.others["nfe", "mean"].folder) == (dear, other)
    assert margin.plans["nfe", "mean"].folder == kept
    assert margin.decibels("nfe", "mean") == -10.0


def test_a_plan_slower_than_the_uncached_run_has_that_beside_it(tmp_path):
    write_plan(tmp_path, nfe=0.5, psnr=same(60), speed=0.9)
    uncached = write_run(tmp_path, kind="baseline", method="uncached", nfe=1.0, psnr=same(math.inf), speed=1.0)
    (margin,) = report.margins(read_experiment(tmp_path).runs, {"1/2": 0.5})
    assert margin.others["speed", "mean"].folder == uncached
    assert margin.decibels("speed", "mean") == -math.inf
    assert margin.decibels("nfe", "mean") is None


def test_what_chooses_among_plans_is_no_other(tmp_path):
    write_plan(tmp_path, nfe=0.5, psnr=same(50))
    write_run(tmp_path, nfe=0.5, psnr=same(40))
    write_run(tmp_path, method="select", nfe=0.5, psnr=same(60))
    (margin,) = report.margins(read_experiment(tmp_path).runs, {"1/2": 0.5})
    assert margin.decibels("nfe", "mean") == 10.0


def test_margins_of_perfect_runs_and_of_none(tmp_path):
    write_plan(tmp_path, nfe=0.5, psnr=same(math.inf))
    write_run(tmp_path, nfe=0.5, psnr=same(math.inf))
    (margin,) = report.margins(read_experiment(tmp_path).runs, {"1/2": 0.5})
    assert margin.decibels("nfe", "p5") == 0.0
    write_plan(tmp_path, model="big", nfe=0.5, psnr=(), random_weights=True)
    write_run(tmp_path, model="other", nfe=0.5, psnr=same(50))
    found = report.margins(read_experiment(tmp_path).runs, {"1/2": 0.5})
    assert [margin.subject[0] for margin in found] == ["dit-digits"]  # neither random weights nor a model without plans
    assert report.margins([run for run in read_experiment(tmp_path).runs if not run.is_plan]) == []
    assert report.margins_table([]) == ""


def test_on_a_cpu_speeds_are_compared_by_its_time(tmp_path):
    """Wall time says how busy the machine was as well: here the rival, 1.65 times as fast in CPU time, is slower."""
    plan = {"nfe": 0.5, "speed": 1.8, "settings": {"nfe": 10, "plan": "half"}, "device": "cpu"}
    write_plan(tmp_path, psnr=same(50), **plan)
    rival = write_run(tmp_path, kind="rival", method="x", nfe=0.6, psnr=same(60), speed=2.4, device="cpu")
    summary = json.loads((rival / "summary.json").read_text())
    (rival / "summary.json").write_text(json.dumps({**summary, "cpu_ratio": 1.65}))
    runs = read_experiment(tmp_path).runs
    assert {run.method: run.speed for run in runs} == {"plan": pytest.approx(1.8 * 0.98), "x": 1.65}
    assert report.margins(runs)[0].others["speed", "mean"] is None
    # within what timing misses by
    (rival / "summary.json").write_text(json.dumps({**summary, "cpu_ratio": 1.7}))
    assert report.margins(read_experiment(tmp_path).runs)[0].others["speed", "mean"].folder == rival


def test_a_run_on_the_cpu_of_a_machine_with_a_gpu_is_compared_by_its_time(tmp_path):
    for device in ("cpu", "NVIDIA H100"):
        write_run(tmp_path / device, speed=2.0, device=device)
    assert ENVIRONMENT["gpu"]
    (run,) = read_experiment(tmp_path / "cpu").runs
    assert (run.on_gpu, run.speed, run.conditions["device"]) == (False, pytest.approx(2.0 * 0.98), "cpu")
    (run,) = read_experiment(tmp_path / "NVIDIA H100").runs
    assert (run.on_gpu, run.speed, run.conditions["device"]) == (True, 2.0, "NVIDIA H100")


def test_margins_in_the_report(tmp_path):
    pytest.importorskip("plotly")
    write_plan(tmp_path, nfe=0.5, psnr=[50, 52, 54, 56], speed=1.8, settings={"nfe": 10, "plan": "a|b"})
    write_run(tmp_path, kind="rival", method="x|y", nfe=0.5, psnr=same(49), speed=2.0)
    write_run(tmp_path, kind="baseline", method="fewer steps", nfe=0.5, psnr=[30, 60, 60, 60], speed=1.5)
    paths = write_report(tmp_path)
    text = paths.markdown.read_text(encoding="utf-8")
    assert (
        text.index("best setting within") < text.index("## Plans against the best other") < text.index("## dit-digits")
    )
    table = markdown_cells(text[text.index("## Plans") : text.index("## dit-digits")])
    first = ["dit-digits, ddim", "1/2", r"a\|b", "50%", "1.80×", "53.0 / 50.0"]
    first += [r"52.5 / 49.0: fewer steps 50%; x\|y 50%", "+0.5 / +1.0", r"49.0 / 49.0: x\|y 2.00×", "+4.0 / +1.0"]
    assert table[2] == first
    assert table[3] == ["dit-digits, ddim", "1/3", *["–"] * 4, "–", "– / –", "–", "– / –"]
    assert len(table) == 2 + 4

    rows = csv_rows(paths.margins)
    assert len(rows) == 4 * 4
    assert [(row["equal"], row["statistic"], row["margin"]) for row in rows[:4]] == [
        ("nfe", "mean", "0.5"),
        ("nfe", "p5", "1"),
        ("speed", "mean", "4"),
        ("speed", "p5", "1"),
    ]
    expected = {"model": "dit-digits", "budget": "1/2", "plan_psnr": "50", "plan_nfe_ratio": "0.5", "other_psnr": "49"}
    expected |= {"other_kind": "rival", "other_method": "x|y", "other_speed": "2", "plan_method": "plan"}
    expected |= {"plan_settings": '{"nfe": 10, "plan": "a|b"}', "other_settings": "{}"}
    assert {key: rows[1][key] for key in expected} == expected
    assert {rows[1][f"{side}_run"] for side in ("plan", "other")} < {
        path.name for path in (tmp_path / "runs").iterdir()
    }
    assert (rows[4]["budget"], rows[4]["plan_run"], rows[4]["margin"]) == ("1/3", "", "")


def test_without_plans_there_are_no_margins(written):
    assert csv_rows(written.margins) == []
    assert written.margins.read_text().startswith("model,sampler,budget,equal,statistic,margin,plan_kind,")
    assert "Plans against" not in written.markdown.read_text(encoding="utf-8")


# CSV


def test_csv_values_and_order(tmp_path):
    pytest.importorskip("plotly")
    write_run(tmp_path, kind="rival", method="r", nfe=0.25, psnr=[30, 40, 50, 60], speed=3.0, settings={"b": 1, "a": 2})
    write_run(tmp_path, method="o", nfe=0.5, psnr=[30, math.inf, 50, 60], quality_only=True)
    write_run(tmp_path, kind="baseline", method="fewer steps", nfe=0.5, psnr=same(20))
    write_run(tmp_path, kind="baseline", method="uncached", nfe=1.0, psnr=same(math.inf), speed=1.0)
    write_run(tmp_path, kind="rival", method="w", nfe=0.4, psnr=(), speed=9.0, correct=False, problem="it is off")
    write_run(tmp_path, model="aaa", method="o", nfe=0.5, psnr=same(50), speed=2.0, random_weights=True)
    paths = write_report(tmp_path, tmp_path / "out" / "deep")
    rows = csv_rows(paths.csv)
    assert [row["method"] for row in rows] == ["uncached", "fewer steps", "o", "r", "w", "o"]  # random weights last
    uncached, _, ours, rival, wrong, random = rows
    assert [uncached[key] for key in ("psnr_mean", "psnr_p5", "psnr_min", "note")] == ["inf", "inf", "inf", ""]
    # one sample equal to its reference: the mean is infinite, the tail is not
    assert [ours[key] for key in ("psnr_mean", "psnr_p5", "psnr_min", "psnr_worst_seed")] == ["inf", "30", "30", "100"]
    assert (ours["speed_ratio"], ours["note"]) == ("", "quality only, not timed")
    assert rival["settings"] == '{"a": 2, "b": 1}'
    expected = {"nfe_ratio": "0.25", "flops_ratio": "0.26", "speed_ratio": "3", "speed_low": "2.88"}
    expected |= {"psnr_mean": "45", "n": "4", "correct": "true", "pareto": "true", "class_accuracy": "0.95", "fid": ""}
    expected |= {"ssim_mean": f"{1 - (10**-1.5 + 1e-2 + 10**-2.5 + 1e-3) / 4:.6g}"}
    assert {key: rival[key] for key in expected} == expected
    assert (wrong["correct"], wrong["problem"], wrong["speed_ratio"]) == ("false", "it is off", "")
    assert (random["random_weights"], random["psnr_mean"], random["speed_ratio"]) == ("true", "", "2")
    assert random["note"] == "random weights: speed only"


def test_what_else_was_measured_has_columns_at_the_end(tmp_path):
    first = write_run(tmp_path, settings={"k": 1})
    before = csv_rows_of(tmp_path)
    further = {"clip_score": {"mean": 0.31}, "lpips": {"mean": 0.1, "p5": 0.2, "worst": 0.3}, "elsewhere": {"mean": 7}}
    scores = json.loads((first / "summary.json").read_text())["metrics"] | further
    scores |= {"psnr_unclamped": {"mean": None, "identical": 1}, "class_correct": {"mean": 0.9}}
    replaced(first / "summary.json", metrics=scores)
    write_run(tmp_path, settings={"k": 2})
    measured, other = csv_rows_of(tmp_path)
    columns = ["clip_score_mean", "elsewhere_mean", "psnr_unclamped_mean", "lpips_p5", "lpips_worst"]
    assert list(measured) == list(before[0]) + columns  # `class_accuracy` is there already
    assert [measured[name] for name in columns] == ["0.31", "7", "inf", "0.2", "0.3"]
    assert [other[name] for name in columns] == [""] * 5
    data = report_page.page_data(read_experiment(tmp_path), {})
    assert data["runs"][0]["psnr_unclamped_mean"] == "inf"
    assert data["metrics"] == [  # without the one of which nobody here knows whether more of it is better
        {"key": "clip_score_mean", "name": "clip score, mean", "lower": False},
        {"key": "psnr_unclamped_mean", "name": "psnr unclamped, mean", "lower": False},
        {"key": "lpips_p5", "name": "lpips, p5", "lower": True},
        {"key": "lpips_worst", "name": "lpips, worst", "lower": True},
    ]


def csv_rows_of(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(report.csv_text(read_experiment(folder).runs).splitlines()))


def test_report_is_deterministic(experiment, written, tmp_path):
    again = write_report(experiment, tmp_path)
    for name in ("csv", "markdown", "environment", "margins"):
        assert getattr(again, name).read_bytes() == getattr(written, name).read_bytes()
    assert again.html.read_bytes() == written.html.read_bytes()
    assert len(csv_rows(written.csv)) == 3 * (1 + 8 * 3 + 1) + 3  # the unfinished run is not among them


# Markdown


def test_model_table(tmp_path):
    write_run(tmp_path, kind="baseline", method="fewer steps", nfe=0.5, psnr=same(38.04), speed=2.0, scope="denoiser")
    settings = {"mask": "1010101010101010", "forecaster": "taylor"}
    write_run(tmp_path, method="mask", nfe=0.5, psnr=[40, 44, 48, 52], speed=1.8, settings=settings, scope="block")
    write_run(tmp_path, kind="rival", method="x", nfe=0.3, psnr=(), correct=False, problem="a | b", settings={"k": 1})
    write_run(tmp_path, kind="rival", method="x", nfe=0.2, psnr=(), correct=False, problem="a | b", settings={"k": 2})
    text = report.model_table(read_experiment(tmp_path).runs, {"1/2": 0.5})
    rows = markdown_cells(text)[2:]
    best = ["1/2", "mask", "ours", "scope=block, mask=8 of 16 steps, forecaster=taylor", "50%", "51%"]
    best += ["1.80× (1.73–1.89)", "46.0", "40.0", "40.0"]
    assert rows[1][:10] == [f"**{cell}**" for cell in best]
    assert rows[0][:10] == ["1/2", "fewer steps", "baseline", "–", "50%", "51%", "2.00× (1.92–2.10)", *["38.0"] * 3]
    assert rows[2][4:] == ["30%", "31%", "incorrect", "–", "–", "–", "–"]
    assert len(rows) == 3
    assert text.endswith("- x, 2 runs: incorrect: a \\| b")
    assert "## dit-digits, ddim, 20 steps\n\nn = 4.\n" in text


def test_overview_table(tmp_path):
    for model, samplers in (("m", ("s1", "s2")), ("v", ("s1",))):
        for sampler in samplers:
            write_run(tmp_path, model=model, sampler=sampler, method="good", nfe=0.3, psnr=[41, 43, 45, 47])
    write_run(tmp_path, model="v", sampler="s1", kind="baseline", method="fewer steps", nfe=0.5, psnr=same(math.inf))
    write_run(tmp_path, model="v", sampler="s1", kind="rival", method="bad", psnr=(), correct=False, problem="no")
    write_run(tmp_path, model="huge", sampler="s1", nfe=0.3, psnr=(), random_weights=True)
    rows = markdown_cells(report.overview_table(read_experiment(tmp_path).runs, {"1/2": 0.5, "1/3": 1 / 3}))
    assert rows[0] == ["method", "kind", "m s1, 1/2", "m s1, 1/3", "m s2, 1/2", "m s2, 1/3", "v, 1/2", "v, 1/3"]
    assert rows[2] == ["fewer steps", "baseline", "–", "–", "–", "–", "**∞ / ∞**", "–"]
    assert rows[3] == ["good", "ours", *["**44.0 / 41.0**"] * 4, "44.0 / 41.0", "**44.0 / 41.0**"]
    assert rows[4] == ["bad", "rival", "–", "–", "–", "–", "incorrect", "incorrect"]


def test_what_a_budget_admits_is_told(tmp_path):
    write_run(tmp_path, nfe=0.53)  # 1/2 × 1.06
    experiment = read_experiment(tmp_path)
    text = report.markdown(experiment)
    told = "a budget may be exceeded by up to 6%"
    assert f"best setting within the NFE budget; {told}." in text
    assert told in report.NOTES
    assert report_page.page_data(experiment, {})["budget_note"] == told


def test_random_weights_say_so(experiment, written):
    text = written.markdown.read_text(encoding="utf-8")
    section = text[text.index("## flux-dev") :]
    assert "\nrandom weights: speed only.\n" in section
    assert markdown_cells(section)[2][:3] == ["1", "uncached", "baseline"]
    assert [cell.strip("*") for cell in markdown_cells(section)[3][:3]] == ["1/2", "interval", "ours"]
    assert "flux-dev" not in text[: text.index("## dit-digits")]  # not in the overview of quality
    assert '"note":"random weights: speed only"' in written.html.read_text(encoding="utf-8")


def test_untrusted_text_in_markdown(written):
    text = written.markdown.read_text(encoding="utf-8")
    assert "&lt;b&gt;bold&lt;/b&gt; \\| label" in text
    assert "<b>" not in text
    assert report.markdown_text("a|b\n`c` *d* [e](f) <g> _h_ i_j") == (
        r"a\|b \`c\` \*d\* \[e\](f) &lt;g&gt; \_h\_ i_j"  # an underscore inside a word is none of Markdown's
    )


# the page


class Scripts(html.parser.HTMLParser):
    """Texts of the script elements, and everything that a page may load or run without one."""

    def __init__(self) -> None:
        super().__init__()
        self.scripts: list[str] = []
        self.suspicious: list[tuple[str, str, str | None]] = []
        self.inside = False

    def handle_starttag(self, tag, attrs):
        self.inside = tag == "script"
        if self.inside:
            self.scripts.append("")
        self.suspicious += [(tag, name, value) for name, value in attrs if name.startswith("on") or name == "src"]
        self.suspicious += [(tag, "", None)] if tag in ("link", "iframe", "img", "base") else []

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, data):
        if self.inside:
            self.scripts[-1] += data


def test_page_is_one_file_and_escapes(written):
    text = written.html.read_text(encoding="utf-8")
    parser = Scripts()
    parser.feed(text)
    assert parser.suspicious == []
    assert len(parser.scripts) == 3  # data, plotly, the page's own: the injected </script> ended none of them
    data = json.loads(parser.scripts[0])
    assert INJECTED_PROMPT in data["samples"][0]["prompts"]
    assert INJECTED_LABEL in {run["method"] for run in data["runs"]}
    assert "<" not in parser.scripts[0]
    for script in parser.scripts[1:]:
        assert report_page._hash_source(script) in text  # the policy lets these two run and nothing else
    assert len(text) < 12_000_000


def test_title_is_escaped(tmp_path):
    pytest.importorskip("plotly")
    folder = tmp_path / "<i>x<!--"
    write_run(folder)
    text = write_report(folder).html.read_text(encoding="utf-8")
    assert "<title>&lt;i&gt;x&lt;!--: quality" in text
    assert "<i>" not in text[:2000]


def test_page_data(tmp_path):
    psnr = [30.004, math.inf, 50.0, 60.0]
    folder = write_run(tmp_path, nfe=0.5, psnr=psnr, steps=4, blocks=3, settings={"every": 2}, scope="block")
    write_run(tmp_path, nfe=0.5, psnr=same(20), steps=4, settings={"every": 3})
    experiment = read_experiment(tmp_path)
    data = report_page.page_data(experiment, {})
    first, second = data["runs"]
    assert (first["run"], first["psnr_mean"], first["psnr_p5"]) == (folder.name, "inf", 30.004)
    assert first["values"]["psnr"] == [30.0, "inf", 50.0, 60.0]
    assert "lpips" not in first["values"]  # no sample has one
    assert (first["text"], first["brief"]) == ("scope=block, every=2", "every=2")
    # reused, computed, reused, computed between blocks that are always computed
    assert first["heatmap"]["kinds"] == [[100, 0, 100], [100, 100, 100]]
    assert first["heatmap"]["steps"] == [0, 1, 0, 1]
    assert first["samples"] == second["samples"] == 0  # one list for both
    assert data["subjects"][0]["picks"] == {"1/2": [0], "1/3": [], "1/4": [], "1/5": []}
    assert data["choices"] == {"call": "call", "tables": []}  # of none of these it is known how to switch it on


def test_triplets_show_the_difference_as_much_stronger_as_they_say(tmp_path):
    folder = write_run(tmp_path, psnr=[50.0, 20.0, 40.0], side=8)
    reference = np.full((1, 1, 2, 2), 0.5, np.float32)
    candidate = reference + np.array([[0.0, 0.04], [-0.02, 0.0]], np.float32)
    pair = {"reference": reference, "candidate": candidate}
    same_pair = {"reference": reference, "candidate": reference}
    tensors = {f"median.{key}": value for key, value in pair.items()}
    save_file(tensors | {f"worst.{key}": value for key, value in same_pair.items()}, folder / "images.safetensors")
    median, worst = report_page.triplets(read_experiment(tmp_path).runs[0])
    assert (median["gain"], median["sample"], worst["sample"]) == (20, 2, 1)  # 20 × 0.04 ≤ 1 < 50 × 0.04
    assert pixels(median["sources"][2]).tolist() == [[0, 204], [102, 0]]  # 255 × 20 × (0.04, 0.02)
    assert pixels(median["sources"][0]).tolist() == [[128, 128], [128, 128]]
    assert worst["identical"]
    assert worst["sources"][0] == worst["sources"][1] == median["sources"][0]


def test_pictures_and_what_is_told_of_them_are_of_the_same_samples():
    assert extremes([50.0, 20.0, 40.0, 30.0]) == {"worst": 1, "median": 3}
    assert extremes([50.0, None, 40.0]) == {"worst": 2, "median": 0}  # None: nothing to compare with
    assert extremes([math.inf, 30.0]) == {"worst": 1, "median": 1}
    assert extremes([None]) == {"worst": 0, "median": 0}


def test_pictures_without_psnr_are_not_said_to_be_of_the_worst(tmp_path):
    folder = write_run(tmp_path)
    pq.write_table(pq.read_table(folder / "rows.parquet").drop_columns(["psnr"]), folder / "rows.parquet")
    found = report_page.triplets(read_experiment(tmp_path).runs[0])
    assert [(triplet["place"], triplet["sample"]) for triplet in found] == [("shown", 1), ("shown", 0)]


def test_frames_stand_side_by_side_and_long_videos_are_thinned(tmp_path):
    write_run(tmp_path, frames=20, channels=3, side=10)
    (median, _) = report_page.triplets(read_experiment(tmp_path).runs[0])
    assert median["frames"] == [0, 3, 5, 8, 11, 14, 16, 19]
    assert median["total"] == 20
    assert pixels(median["sources"][0]).shape == (10, 8 * 10 + 7, 3)


def pixels(source: str) -> np.ndarray:
    import base64
    import io

    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(base64.b64decode(source))))


def test_pictures_stop_at_the_limit(tmp_path):
    write_run(tmp_path, kind="baseline", method="fewer steps", nfe=0.5, psnr=same(20))
    write_run(tmp_path, method="best", nfe=0.5, psnr=same(40))
    write_run(tmp_path, method="best", nfe=0.6, psnr=same(30), settings={"k": 2})  # off the front
    runs = read_experiment(tmp_path)
    data = report_page.page_data(runs, {})
    report_page._embed_pictures(data, runs.runs, 10**6)
    baseline, off_front, best = (run["pictures"] for run in data["runs"])
    assert off_front is None
    assert [triplet["place"] for triplet in best] == ["median", "worst"]
    assert baseline[0]["sources"][0] == best[0]["sources"][0]  # the same uncached picture, embedded once
    assert len(data["images"]) == len(set(data["images"])) == 2 + 2 * 4
    spent = sum(len(data["images"][i]) + 8 for i in {i for triplet in baseline for i in triplet["sources"]})
    data = report_page.page_data(runs, {})
    report_page._embed_pictures(data, runs.runs, spent)
    assert [run["pictures"] for run in data["runs"][1:]] == [None, {"omitted": True}]
    assert len(data["images"]) == 6


# environment


def test_runs_under_other_conditions_are_not_compared(tmp_path):
    write_run(tmp_path, conditions={"steps": 50})
    write_run(tmp_path, conditions={"steps": 20, "sampler": {"name": "ddim", "eta": 0}})
    write_run(tmp_path, model="flux-digits", conditions={"steps": 20})
    found = read_experiment(tmp_path)
    assert found.subjects == [("dit-digits steps=20", "ddim"), ("dit-digits steps=50", "ddim"), ("flux-digits", "ddim")]
    assert [len(found.of(subject)) for subject in found.subjects] == [1, 1, 1]


def test_runs_of_other_threads_are_not_compared(tmp_path):
    write_run(tmp_path)
    write_run(tmp_path, conditions={"threads": 8})
    found = read_experiment(tmp_path)
    assert found.subjects == [("dit-digits threads=1", "ddim"), ("dit-digits threads=8", "ddim")]


def test_runs_of_other_options_are_not_compared(tmp_path):
    """Even where each names an option that the other leaves out."""
    hub = {"name": "dit-digits", "kind": "hub"}
    write_run(tmp_path, conditions={"model": {**hub, "call": None}})
    write_run(tmp_path, conditions={"model": {**hub, "call": {}}})
    write_run(tmp_path, conditions={"model": {**hub, "call": {"guidance_scale": 1.0}}})
    found = [model for model, _ in read_experiment(tmp_path).subjects]
    assert found == ["dit-digits model.call=null", 'dit-digits model.call={"guidance_scale": 1.0}']
    write_run(tmp_path / "other", conditions={"sampler": {"name": "ddim", "options": {"shift": 7}}})
    write_run(tmp_path / "other", conditions={"sampler": {"name": "ddim", "options": {"shift": 7, "a": 1}}})
    assert len(read_experiment(tmp_path / "other").subjects) == 2


def test_runs_of_other_metric_settings_are_not_compared(tmp_path):
    write_run(tmp_path)
    write_run(tmp_path, conditions={"metrics": {"names": ["lpips"], "settings": {"lpips": {"backbone": "vgg"}}}})
    vgg = 'dit-digits metrics.settings={"lpips": {"backbone": "vgg"}}'
    assert [model for model, _ in read_experiment(tmp_path).subjects] == [vgg, "dit-digits metrics.settings={}"]


def test_what_is_missing_or_mixed_is_told(tmp_path):
    write_run(tmp_path, method="interval")
    assert report.remarks(read_experiment(tmp_path)) == []
    write_run(tmp_path, kind="rival", method="x", environment={**ENVIRONMENT, "threads": 2})
    write_run(tmp_path, model="flux-digits", method="interval")
    (tmp_path / "runs" / "0123.partial").mkdir()
    experiment = read_experiment(tmp_path)
    told = [
        "1 run(s) are unfinished: the same command goes on with them.",
        "flux-digits, ddim: nothing of x (rival), which do not serve the model or were not run.",
        "Not all runs were made with the same threads: 2 with 1, 1 with 2.",
    ]
    assert report.remarks(experiment) == told
    text = report.markdown(experiment)
    assert all(report.markdown_text(remark) in text.partition("| method |")[0] for remark in told)


def test_environments_are_merged(tmp_path):
    write_run(tmp_path, settings={"k": 1})
    write_run(tmp_path, settings={"k": 2})
    changed = ENVIRONMENT | {"threads": 2, "git": None}
    write_run(tmp_path, settings={"k": 3}, environment=changed)
    found = report.merged_environments(read_experiment(tmp_path).runs)
    assert found["runs"] == 3
    assert found["environment"] == {key: ENVIRONMENT[key] for key in ("versions", "cpu", "gpu")}
    assert found["varies"]["threads"] == [{"value": 1, "runs": 2}, {"value": 2, "runs": 1}]
    assert found["varies"]["git.commit"] == [{"value": "0123abc", "runs": 2}]
    assert found["varies"]["git"] == [{"value": None, "runs": 1}]


def test_what_making_the_runs_took_is_told_where_all_of_them_say(tmp_path):
    write_run(tmp_path, settings={"k": 1})
    last = write_run(tmp_path, settings={"k": 2})
    assert report.merged_environments(read_experiment(tmp_path).runs)["cpu_minutes"] == 1.0
    summary = json.loads((last / "summary.json").read_text())
    del summary["cpu_seconds"]
    (last / "summary.json").write_text(json.dumps(summary))
    assert report.merged_environments(read_experiment(tmp_path).runs)["cpu_minutes"] is None


# bad input


def test_no_folder_and_no_runs(tmp_path):
    with pytest.raises(ConfigError, match=r"missing is not a folder: give one that `diffusion-cache evaluate` wrote"):
        write_report(tmp_path / "missing")
    with pytest.raises(ConfigError, match=r"holds no finished runs .* run `diffusion-cache evaluate` first"):
        write_report(tmp_path)
    (tmp_path / "runs" / "abc.partial").mkdir(parents=True)
    with pytest.raises(ConfigError, match="holds no finished runs"):
        write_report(tmp_path)
    assert not (tmp_path / "summary.csv").exists()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def without(path: Path, key: str) -> None:
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != key}))


def replaced(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def without_worst(path: Path) -> None:
    save_file({key: value for key, value in load_file(path).items() if "worst" not in key}, path)


DAMAGE = {
    "cut summary": ("summary.json", cut, "summary.json is damaged"),
    "summary of another kind": ("summary.json", lambda path: path.write_text("[]"), "summary.json is damaged"),
    "no summary": ("summary.json", Path.unlink, "summary.json cannot be read"),
    "missing key": ("summary.json", lambda path: without(path, "nfe_ratio"), "summary.json lacks 'nfe_ratio'"),
    "text for a number": ("summary.json", lambda path: replaced(path, nfe_ratio="half"), "'half' is not a number"),
    "null metrics": ("summary.json", lambda path: replaced(path, metrics=None), "summary.json is damaged"),
    "unknown kind": ("summary.json", lambda path: replaced(path, kind="theirs"), "kind is 'theirs', not one of"),
    "uneven heat map": (
        "summary.json",
        lambda path: replaced(path, heatmap={"rows": ["a", "b"], "computed": [[1.0]]}),
        "heatmap has not one value for each block",
    ),
    "cut config": ("config.json", cut, "config.json is damaged"),
    "no contender": ("config.json", lambda path: without(path, "contender"), "config.json lacks 'contender'"),
    "a contender that is none": ("config.json", lambda path: replaced(path, contender=[]), "config.json is damaged"),
    "no device": ("summary.json", lambda path: without(path, "device"), "summary.json lacks 'device'"),
    "not UTF-8": ("environment.json", lambda path: path.write_bytes(b'{"a": "\xff"}'), "environment.json is damaged"),
    "cut rows": ("rows.parquet", cut, "rows.parquet is damaged or missing"),
    "no rows": ("rows.parquet", Path.unlink, "rows.parquet is damaged or missing"),
    "cut images": ("images.safetensors", cut, "images.safetensors is damaged"),
    "half the images": ("images.safetensors", without_worst, "images of the worst sample are missing"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_run_is_left_out(tmp_path, case):
    name, damage, message = DAMAGE[case]
    write_run(tmp_path, method="whole", psnr=same(50))
    broken = write_run(tmp_path, method="broken", psnr=same(60))
    damage(broken / name)
    with pytest.warns(DiffusionCacheWarning) as caught:
        experiment = read_experiment(tmp_path)
    assert [run.method for run in experiment.runs] == ["whole"]
    (warning,) = caught
    assert str(broken / name) in str(warning.message)
    assert message in str(warning.message)
    assert f"delete the folder {broken} and run the same sweep again" in str(warning.message)
    text = report.markdown(experiment)
    assert "Left out, 1 run(s) that cannot be read:" in text
    assert broken.name in text


@pytest.mark.filterwarnings("ignore::diffusion_cache.errors.DiffusionCacheWarning")
def test_all_runs_damaged(tmp_path):
    for method in ("a", "b"):
        cut(write_run(tmp_path, method=method) / "summary.json")
    with pytest.raises(
        ConfigError, match=r"none of the 2 runs in .* can be read\. The first: .*summary\.json is damaged"
    ):
        write_report(tmp_path)


def test_pictures_that_are_not_finite_are_told_of(tmp_path):
    pytest.importorskip("plotly")
    folder = write_run(tmp_path)
    tensors = load_file(folder / "images.safetensors")
    tensors["median.candidate"][0, 0, 0, 0] = np.nan
    save_file(tensors, folder / "images.safetensors")
    with pytest.warns(DiffusionCacheWarning, match=r"images\.safetensors: the images of the median sample hold values"):
        write_report(tmp_path)


def test_missing_plotly_leaves_the_tables(tmp_path, monkeypatch):
    write_run(tmp_path)
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(ConfigError, match=r"pip install 'diffusion-cache\[report\]'"):
        write_report(tmp_path)
    assert len(csv_rows(tmp_path / "summary.csv")) == 1
    assert "## dit-digits" in (tmp_path / "report.md").read_text()
    assert json.loads((tmp_path / "environment.json").read_text())["runs"] == 1
    assert not (tmp_path / "report.html").exists()


def test_output_that_cannot_be_written(tmp_path):
    write_run(tmp_path)
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(ConfigError, match=r"cannot write the report to .*taken: .*choose another folder"):
        write_report(tmp_path, tmp_path / "taken")
