"""`diffusion-cache evaluate` from its command line to finished runs: sweeps, interruptions, ranks, bad input."""

import copy
import functools
import io
import json
import os
import shutil
import signal
import socket
import sys
import time
import warnings
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import Mock

import psutil
import pyarrow.parquet as pq
import pytest
import torch
from accelerate import PartialState
from children import forked
from evaluation_profile import write_profile
from hydra import compose, initialize_config_module

from diffusion_cache.cli import evaluate as command
from diffusion_cache.cli import hydra_app
from diffusion_cache.engine import session_of
from diffusion_cache.engine.span_calls import SpanCalls
from diffusion_cache.errors import ConfigError, DiffusionCacheWarning
from diffusion_cache.evaluation import child, contenders, jobs, runner
from diffusion_cache.evaluation.accounting import Observed, StepWork
from diffusion_cache.evaluation.jobs import Team, run_job
from diffusion_cache.evaluation.prompts import Sample
from diffusion_cache.evaluation.runner import Job
from diffusion_cache.evaluation.speed import SpeedWorker
from diffusion_cache.evaluation.store import Store
from diffusion_cache.evaluation.subjects import device_of
from diffusion_cache.files import read_tensors, write_tensors
from diffusion_cache.plan import Plan
from diffusion_cache.profile import Profile
from diffusion_cache.schedule import Schedule

SMALL = ["steps=6", "prompts.n=3", "timing=none", "model=dit-digits"]
# by the launcher for several jobs at once where it is installed
ONE_BY_ONE = ["launcher=joblib", "hydra.launcher.n_jobs=1"] if find_spec("hydra_plugins.hydra_joblib_launcher") else []
TIMES = ("first_run_seconds", "cpu_seconds")


@functools.cache
def composed(*overrides):
    command.register_methods()
    with initialize_config_module(command.CONFIGS, version_base="1.3"):
        return command.resolved(compose("evaluate", [*SMALL, *overrides]))


def job(folder, *overrides):
    return Job(copy.deepcopy(composed(*overrides)), Path(folder))


def made(folder, *overrides):
    found = []
    for path in run_job(job(folder, *overrides), lambda *news: None, Team()):
        summary = json.loads((path / "summary.json").read_text())
        found.append({**{key: value for key, value in summary.items() if key not in TIMES}, "path": path})
    return found


def without_paths(summaries):
    return [{key: value for key, value in summary.items() if key != "path"} for summary in summaries]


def rows(summary):
    return pq.read_table(summary["path"] / "rows.parquet").to_pylist()


def run(*arguments):
    command.evaluate([*SMALL, *arguments])


def started(folder, *arguments, **environment):
    """The command, in a process of its own; what it tells is in the folder's `log`."""
    return forked(functools.partial(run, *arguments), folder / "log", **environment)


def ended(process, folder, seconds=300):
    """What an ended process has told."""
    process.join(seconds)
    told = (folder / "log").read_text()
    assert process.exitcode == 0, told
    return told


# what comes out


def test_a_run_says_what_was_made_and_what_it_took(tmp_path):
    (summary,) = made(tmp_path, "method=interval", "method.policy.every=3", "forecaster=reuse")
    assert summary["method"] == "interval, reuse"
    assert (summary["model"], summary["kind"], summary["n"], summary["steps"]) == ("dit-digits", "ours", 3, 6)
    assert summary["settings"] == {"every": 3, "forecaster": "reuse", "feature": "auto"}
    assert summary["correct"] is True
    assert summary["problem"] is None
    assert summary["nfe_ratio"] == pytest.approx(1 / 3)
    assert summary["nfe_ratio"] < summary["flops_ratio"] < 0.35
    assert summary["blocks_ratio"] == pytest.approx(1 / 3)
    assert summary["speed_ratio"] is None  # it was not timed
    assert summary["heatmap"]["computed"] == [[float(step % 3 == 0)] * 12 for step in range(6)]
    assert summary["cache_bytes"] > 0
    table = rows(summary)
    assert [row["seed"] for row in table] == [0, 1, 2]
    assert [row["prompt"] for row in table] == ["0", "1", "2"]
    psnr = [row["psnr"] for row in table]
    assert all(5 < value < 80 for value in psnr)
    assert summary["metrics"]["psnr"]["mean"] == pytest.approx(sum(psnr) / 3)
    assert summary["metrics"]["psnr"]["worst"] == pytest.approx(min(psnr))
    assert summary["metrics"]["psnr"]["worst_seed"] == psnr.index(min(psnr))
    assert json.loads((summary["path"] / "config.json").read_text())["contender"]["policy"]["every"] == 3
    assert json.loads((summary["path"] / "environment.json").read_text())["versions"]["torch"] == torch.__version__
    assert json.loads((summary["path"] / "summary.json").read_text())["cpu_seconds"] > 0


def test_figures_are_shown(tmp_path):
    good, flawed, damaged = (made(tmp_path, f"steps={steps}", "method=interval")[0] for steps in (6, 5, 4))
    changed = json.loads((flawed["path"] / "summary.json").read_text()) | {"correct": False, "problem": "it is wrong"}
    (flawed["path"] / "summary.json").write_text(json.dumps(changed))
    (damaged["path"] / "summary.json").write_text("{")
    table = command.figures("dit-digits, interval", [one["path"] for one in (good, flawed, damaged)])
    cells = [[str(cell) for cell in column.cells] for column in table.columns]
    assert [str(column.header) for column in table.columns] == [
        "dit-digits, interval", "NFE", "speed", "PSNR", "5th pct.", "worst",
    ]  # fmt: skip
    settings, *figures = zip(*cells, strict=True)
    assert settings[0].startswith("interval, taylor, every=2")
    psnr = good["metrics"]["psnr"]
    assert list(settings[1:]) == ["50%", "–", *(f"{psnr[key]:.1f}" for key in ("mean", "p5", "worst"))]
    assert "(incorrect: it is wrong)" in figures[0][0]
    assert f"delete the folder {damaged['path']}" in figures[1][0]
    assert list(figures[1][1:]) == ["–"] * 5


def test_uncached_is_identical_to_itself(tmp_path):
    (summary,) = made(tmp_path, "method=uncached")
    assert summary["nfe_ratio"] == summary["flops_ratio"] == 1.0
    assert summary["metrics"]["psnr"]["identical"] == 3
    assert [row["latent_error"] for row in rows(summary)] == [0.0] * 3


def test_fewer_steps_spend_their_share(tmp_path):
    summaries = made(tmp_path, "method=fewer_steps")
    assert [summary["steps"] for summary in summaries] == [4, 3, 2, 2, 1]
    assert [summary["flops_ratio"] for summary in summaries] == pytest.approx([2 / 3, 1 / 2, 1 / 3, 1 / 3, 1 / 6])


def test_plans_are_compared_like_any_method(tmp_path):
    profile = tmp_path / "profile"
    write_profile(profile)
    plans = ["method=planned", f"method.profile='{profile}'", "method.grid={share: [0.5, 0.2]}"]
    half, fifth = made(tmp_path, *plans)
    assert (half["kind"], half["method"], half["scope"], half["correct"]) == ("ours", "plan", "stack", True)
    assert half["settings"] == {"nfe": 3, "plan": "three"}
    assert half["nfe_ratio"] == pytest.approx(1 / 2)
    assert half["heatmap"]["computed"] == [[float(step % 2 == 0)] * 12 for step in range(6)]
    assert (fifth["settings"], fifth["nfe_ratio"]) == ({"nfe": 1, "plan": "one"}, pytest.approx(1 / 6))
    # its weights repeat the last computed step's features, as the interval policy does
    (same,) = made(tmp_path, "method=interval", "method.policy.every=2", "forecaster=reuse", "method.scope=stack")
    assert [row["psnr"] for row in rows(half)] == pytest.approx([row["psnr"] for row in rows(same)], abs=1e-3)

    assert [summary["path"] for summary in made(tmp_path, *plans)] == [half["path"], fifth["path"]]
    write_profile(profile, facts={"note": "made again"})
    assert {summary["path"] for summary in made(tmp_path, *plans)}.isdisjoint({half["path"], fifth["path"]})
    config = json.loads((half["path"] / "config.json").read_text())["contender"]
    assert config["digest"] != json.loads((profile / "profile.json").read_text())["digest"]
    assert set(config) == {"kind", "label", "profile", "share", "digest"}


def test_a_profile_of_another_sampler_is_refused(tmp_path):
    write_profile(tmp_path / "profile", sampler="dpm++")
    with pytest.raises(ConfigError, match="this profile is not of this model and sampler"):
        made(tmp_path, "method=planned", f"method.profile='{tmp_path / 'profile'}'")
    assert not list((tmp_path / "runs").glob("*/summary.json"))


def test_timing_is_paired_and_told_with_its_spread(tmp_path):
    (summary,) = made(tmp_path, "method=interval", "timing.pairs=3")
    assert summary["speed_low"] <= summary["speed_ratio"] <= summary["speed_high"]
    assert min(summary[name] for name in ("speed_low", "seconds")) > 0


def test_samples_are_the_same_whether_they_were_timed_counted_or_in_a_batch(tmp_path):
    sweep = ["method=interval", "prompts.n=4", "steps=3"]
    (timed,) = made(tmp_path, *sweep, "timing.pairs=1")  # two by the timing, one counted, one alone in its batch
    (batched,) = made(tmp_path, *sweep)
    (alone,) = made(tmp_path, *sweep, "batch=1")
    for summary in (batched, alone):
        for name in ("psnr", "flops", "nfe"):
            values = [row[name] for row in rows(summary)]
            assert values == pytest.approx([row[name] for row in rows(timed)], abs=1e-2, rel=0), name
        assert summary["heatmap"] == timed["heatmap"]


def test_settings_that_reuse_nothing_in_the_same_way_are_checked_once(tmp_path, monkeypatch):
    checked = []
    original = runner.Worker._fault
    monkeypatch.setattr(
        runner.Worker,
        "_fault",
        lambda self, what: checked.append((what.scope, what.settings["every"])) or original(self, what),
    )
    made(
        tmp_path,
        "method=interval",
        "steps=2",
        "prompts.n=1",
        "+method.grid={policy.every: [2, 3], scope: [stack, denoiser]}",
    )
    assert checked == [("stack", 2), ("denoiser", 2)]


def test_a_profile_that_systems_need_is_measured_once(tmp_path, monkeypatch):
    monkeypatch.setattr(contenders, "PROFILED", 2)
    sweep = ["method=system/smooth_cache", "steps=2", "prompts.n=1"]
    first = made(tmp_path, *sweep, "method.points=[{system.alpha: 0.1, system.max_lag: 3}]")
    (measured,) = tmp_path.glob("profiles/*/branch-2/profile.json")
    written = measured.stat().st_mtime_ns
    second = made(tmp_path, *sweep, "method.points=[{system.alpha: 0.3, system.max_lag: 3}]")
    assert [summary["correct"] for summary in first + second] == [True, True]
    assert [path.stat().st_mtime_ns for path in tmp_path.glob("profiles/*/*/profile.json")] == [written]


def test_adaptive_methods_are_judged_sample_by_sample(tmp_path):
    (summary,) = made(tmp_path, "method=first_block", "method.policy.threshold=0.3", "steps=12")
    (alone,) = made(tmp_path, "method=first_block", "method.policy.threshold=0.3", "steps=12", "prompts.n=1")
    first, same = rows(summary)[0], rows(alone)[0]
    assert first["flops"] == same["flops"]
    assert first["psnr"] == pytest.approx(same["psnr"], abs=1e-3)  # uncached outputs are made in batches
    assert 0 < summary["flops_ratio"] < 1


def together_and_alone(folder, monkeypatch, model, policy, steps=8, n=5):
    """What is generated of an adaptive contender in batches and what of each sample by itself, and the batches' sizes.

    Of each: its latents, and the pattern, operations and blocks' operations of every step, counted where it is alone.
    """
    made = job(folder, f"model={model}", f"steps={steps}", f"prompts.n={n}")
    worker = runner.Worker(made, Store(made.folder), lambda *news: None)
    what = contenders.contender({**made.nodes[0], "policy": policy}, made.config["forecaster"], steps)
    sizes = []
    generate = runner.Subject.generate
    monkeypatch.setattr(
        runner.Subject,
        "generate",
        lambda self, samples, *rest: sizes.append(len(samples)) or generate(self, samples, *rest),
    )
    together = worker.generate(what, "")
    monkeypatch.undo()
    alone = []
    with what.applied(worker.subject, steps):
        worker.subject.generate(worker.samples[:1], steps)  # apart, for what is learned in it
        for sample in worker.samples:
            with worker.accountant.observed(flops=True) as counted:
                output = worker.subject.generate([sample], steps)
            alone.append((output.latents[0], counted.steps))
    return [*zip(together.output.latents, (work.steps for work in together.works), strict=True)], alone, sizes


def assert_alike(together, alone):
    for (latents, steps), (own_latents, own_steps) in zip(together, alone, strict=True):
        assert steps == own_steps
        assert (latents - own_latents).norm() <= 1e-4 * own_latents.norm()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "policy"),
    [
        ("flux-digits", {"name": "teacache", "threshold": 0.18}),
        ("flux-digits", {"name": "speca", "threshold": 0.06, "rollback": True}),
        ("dit-digits", {"name": "first_block", "threshold": 0.5}),
        ("wan-moving-digits", {"name": "easycache", "threshold": 0.2}),
    ],
)
def test_a_batch_says_of_each_adaptive_sample_what_it_says_alone(tmp_path, monkeypatch, model, policy):
    together, alone, sizes = together_and_alone(tmp_path, monkeypatch, model, policy)
    assert_alike(together, alone)
    assert len({tuple(work.flops for work in steps) for _, steps in alone}) > 1
    assert sizes[:3] == [1, 1, 4]
    assert sizes[3:] in ([], [1])  # one more where a sample has a kind of step that the counted one had not
    if "rollback" in policy:
        assert len({work.flops for _, steps in alone for work in steps}) == 3  # computed, reused, and both


def test_samples_that_cannot_be_told_apart_are_evaluated_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(SpanCalls, "_apart", lambda *which: False)
    with pytest.warns(DiffusionCacheWarning, match="cannot be told apart"):
        together, alone, sizes = together_and_alone(
            tmp_path, monkeypatch, "flux-digits", {"name": "first_block", "threshold": 0.2}
        )
    assert_alike(together, alone)
    assert sizes[:3] == [1, 1, 4]
    assert sizes[3:]
    assert set(sizes[3:]) == {1}


def test_a_wrong_method_gets_no_speed(tmp_path, monkeypatch):
    monkeypatch.setattr(contenders.Ours, "never", contenders.Ours.applied)
    with pytest.warns(DiffusionCacheWarning, match="still changes the output"):
        (summary,) = made(tmp_path, "method=interval", "timing.pairs=1")
    assert summary["correct"] is False
    assert summary["problem"] == "reusing nothing, it still changes the output"
    assert summary["speed_ratio"] is None


def test_outputs_that_are_not_finite_get_no_figures(tmp_path, monkeypatch):
    generate = runner.Subject.generate

    def broken(self, samples, steps=None):
        output = generate(self, samples, steps)
        return output._replace(images=output.images / 0) if session_of(self.pipe) else output

    monkeypatch.setattr(runner.Subject, "generate", broken)
    monkeypatch.setattr(runner.Worker, "fault", lambda self, what: None)
    monkeypatch.setattr(runner.Worker, "_trace", lambda self: None)
    with pytest.warns(DiffusionCacheWarning, match="not finite"):
        (summary,) = made(tmp_path, "method=interval", "timing.pairs=1")
    assert summary["problem"] == "3 of 3 outputs hold values that are not finite"
    assert (summary["correct"], summary["speed_ratio"], summary["metrics"]) == (False, None, {})


def test_a_setting_that_fails_does_not_take_the_others_with_it(tmp_path, monkeypatch):
    original = runner.Worker.generate

    def generate(self, what, label, pairs=0):
        if what.settings.get("every") == 3:
            raise ZeroDivisionError("by chance")
        return original(self, what, label, pairs)

    monkeypatch.setattr(runner.Worker, "generate", generate)
    with pytest.warns(DiffusionCacheWarning, match="ZeroDivisionError: by chance"):
        summaries = made(tmp_path, "method=interval", "method.grid={policy.every: [2, 3, 4]}")
    assert [summary["correct"] for summary in summaries] == [True, False, True]
    assert summaries[1]["problem"] == "failed: ZeroDivisionError: by chance"


def test_a_fault_of_the_machine_is_not_the_methods(tmp_path, monkeypatch):
    def generate(self, what, label, pairs=0):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    task = job(tmp_path, "method=interval")
    runner.Worker(task, Store(tmp_path), lambda *news: None)  # leaves the uncached outputs
    with monkeypatch.context() as patched:
        patched.setattr(runner.Worker, "generate", generate)
        with pytest.raises(RuntimeError, match="illegal memory access"):
            run_job(task, lambda *news: None, Team())
    assert len(made(tmp_path, "method=interval")) == 1
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)
    assert runner.is_of_the_machine(caught.value)
    for told in (
        "mat1 and mat2 shapes cannot be multiplied",
        "CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling cublasGemmEx",
        "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED",
        "CUDA error: CUBLAS_STATUS_INVALID_VALUE when calling cublasSgemm",
        "CUDA error: invalid configuration argument",
        "CUDA error: invalid argument",
    ):
        assert not runner.is_of_the_machine(RuntimeError(told)), told


def test_random_weights_are_for_speed_only(tmp_path):
    options = ["model=random", "model.name=dit-xl-2", "model.tiny=true", "model.dtype=float32", "timing.pairs=1"]
    command.register_methods()
    with initialize_config_module(command.CONFIGS, version_base="1.3"):
        config = command.resolved(compose("evaluate", ["steps=6", "method=interval", *options]))
    (path,) = run_job(Job(config, tmp_path), lambda *news: None, Team())
    summary = json.loads((path / "summary.json").read_text())
    assert summary["random_weights"] is True
    assert summary["metrics"] == {}
    assert summary["n"] == 0
    assert summary["speed_ratio"] > 0
    assert summary["device"] == "cpu"
    assert 0.5 <= summary["flops_ratio"] < 0.6
    worker = SpeedWorker(Job(config, tmp_path), Store(tmp_path), lambda *news: None)
    assert (
        worker.why_not({"policy": {"name": "sencache"}, "norms": True}) == "random weights have no norms to be measured"
    )


def test_a_rival_runs_in_a_process_of_its_own(tmp_path):
    pytest.importorskip("DeepCache")
    points = "[{interval: 2, branch: 0}, {interval: 4, branch: 0}, {interval: 2, branch: 99}]"
    rival = "model=unet-digits", "method=peer/deepcache", "method.grid=null", f"+method.points={points}"
    summaries = made(tmp_path, *rival)
    assert [summary["kind"] for summary in summaries] == ["rival"] * 3
    assert [summary["method"] for summary in summaries] == ["deepcache"] * 3
    assert [summary["correct"] for summary in summaries] == [True, True, False]
    assert summaries[2]["problem"].startswith("cannot run: ")
    assert summaries[2]["speed_ratio"] is None
    assert 1 > summaries[0]["flops_ratio"] > summaries[1]["flops_ratio"] > 0.2
    assert summaries[0]["settings"] == {"interval": 2}
    assert made(tmp_path, *rival) == summaries


REFUSED = "deepcache on dit-digits: it serves UNets only"


def test_a_rival_that_does_not_serve_a_model_says_so(tmp_path):
    pytest.importorskip("DeepCache")
    task, told = job(tmp_path, "method=peer/deepcache"), []
    given = {"config": task.config, "folder": str(tmp_path), "ranks": [0, 1], "todo": task.nodes}
    child.run(given, lambda *message: told.append(message))
    refused = [("refused", place, REFUSED) for place in range(len(task.nodes))]
    assert [message for message in told if message[0] != "progress"] == [*refused, ("done",)]


def test_a_rival_that_does_not_serve_a_model_is_left_out(tmp_path, monkeypatch):
    pytest.importorskip("DeepCache")
    news, given = [], io.StringIO()
    given.close = lambda: None
    task = job(tmp_path, "method=peer/deepcache")
    lines = [f'["refused", {place}, "{REFUSED}"]\n' for place in range(len(task.nodes))]
    process = Mock(stdin=given, stdout=io.StringIO("".join([*lines, '["done"]\n'])))
    monkeypatch.setattr(jobs, "subprocess", Mock(Popen=lambda *how, **options: process))
    assert run_job(task, lambda *told: news.append(told), Team()) == []
    assert news == [(f"left out: {REFUSED}", 0, 0)]
    assert json.loads(given.getvalue())["todo"] == task.nodes
    assert list((tmp_path / "runs").iterdir()) == []


def test_only_settings_that_cannot_run_are_left_out(tmp_path, monkeypatch):
    """Whichever comes first; and each reason is told once."""
    monkeypatch.setattr(
        runner.Worker, "why_not", lambda worker, node: "it is odd" if node["policy"]["every"] % 2 else None
    )
    news = []
    task = job(tmp_path, "method=interval", "+method.grid={policy.every: [3, 2, 5]}")
    (path,) = run_job(task, lambda *told: news.append(told), Team())
    assert json.loads((path / "summary.json").read_text())["settings"]["every"] == 2
    assert [told for told in news if told[0].startswith("left out")] == [("left out: it is odd", 0, 0)]
    assert [folder.name for folder in (tmp_path / "runs").iterdir()] == [path.name]


def test_blocks_that_run_in_a_part_of_the_steps_are_whole_there():
    worker = object.__new__(runner.Worker)
    worker.plain = Observed([StepWork((), 1, (4, 0)), StepWork((), 1, (4, 0)), StepWork((), 1, (0, 2))])
    assert worker._shares([worker.plain]) == [[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]


def test_prompts_that_a_profile_was_measured_on_are_told_once():
    worker = object.__new__(runner.Worker)
    worker.subject, worker._told = Mock(text=True), set()
    worker.samples = [Sample(0, "a cat", 0), Sample(1, "a dog", 1)]
    profile = Mock(spec=Profile, samples=[("a dog", 100_000), ("a cow", 100_001)], plans=())
    with pytest.warns(DiffusionCacheWarning, match="1 of the prompts evaluated are among"):
        worker._tell_of_fitted(Mock(profile=profile))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        worker._tell_of_fitted(Mock(profile=profile))
        worker._told.clear()
        worker.subject.text = False  # classes are few
        worker._tell_of_fitted(Mock(profile=profile))


def test_prompts_that_a_plan_was_fitted_on_are_told():
    worker = object.__new__(runner.Worker)
    worker.subject, worker._told = Mock(text=True), set()
    worker.samples = [Sample(0, "a cat", 0), Sample(1, "a dog", 1)]
    plan = Plan("p", "stack", None, "auto", Schedule.uniform([True, False]), ()).fitted_to(["a cat", "a dog"])
    profile = Mock(spec=Profile, samples=[("a cow", 100_001)], plans=(plan,))
    with pytest.warns(DiffusionCacheWarning, match="2 of the prompts evaluated are among"):
        worker._tell_of_fitted(Mock(profile=profile))


@pytest.mark.parametrize(
    ("name", "rank", "expected"), [("auto", "3", "cuda:3"), ("cuda", None, "cuda:0"), ("cuda:1", "3", "cuda:1")]
)
def test_each_process_has_a_gpu_of_its_own(name, rank, expected, monkeypatch):
    current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    assert device_of(name) == expected
    assert current == [int(expected[-1])]
    with pytest.raises(ConfigError, match="cuda:7 is not there: torch sees 4 GPUs"):
        device_of("cuda:7")


def test_processes_wait_longer_than_one_may_work_alone(monkeypatch):
    given = Mock()
    monkeypatch.setattr("accelerate.PartialState", given)
    Team()
    assert given.call_args.kwargs["timeout"].total_seconds() > 24 * 3600


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "killpg"), reason="POSIX signals")
def test_a_rival_ends_with_its_parent_and_nothing_is_taken_for_its_result(tmp_path):
    pytest.importorskip("DeepCache")
    rival = ["model=unet-digits", "method=peer/deepcache", "method.grid={interval: [2], branch: [0]}"]
    # small batches, after each of which the rival tells its parent of it
    size = "steps=20", "prompts.n=12", "batch=2"
    process = started(tmp_path, *rival, f"out={tmp_path}", "name=orphan", *size)
    folder, group = tmp_path / "orphan", process.pid
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.is_alive():
        if (folder / "references").is_dir() and any((folder / "references").iterdir()):
            break
        time.sleep(0.02)
    assert process.is_alive()
    assert any((folder / "references").iterdir())
    assert group in {os.getpgid(child.pid) for child in psutil.Process(process.pid).children()}
    process.kill()  # the parent alone
    process.join()
    deadline = time.monotonic() + 120  # however long it took to start
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            break
        time.sleep(0.1)
    else:
        os.killpg(group, signal.SIGKILL)
        pytest.fail("the rival's process went on without its parent")
    assert not list((folder / "runs").glob("*/part-*"))
    assert not list((folder / "runs").glob("*/summary.json"))


# again, and after an interruption


def test_what_is_finished_is_not_made_again(tmp_path, monkeypatch):
    before = made(tmp_path, "method=interval")
    monkeypatch.setattr(jobs, "Worker", None)  # nobody may work
    assert made(tmp_path, "method=interval") == before


@pytest.mark.slow
def test_stopping_at_any_write_and_going_on_gives_the_same(tmp_path, monkeypatch):
    sweep = ["method=interval", "method.grid={policy.every: [2, 3]}", "steps=3", "prompts.n=1"]
    whole = made(tmp_path / "whole", *sweep)
    stops = []

    def kept(original):
        def wrapper(self, target):
            stops.append(tmp_path / f"stopped-{len(stops)}")
            shutil.copytree(tmp_path / "going", stops[-1])
            return original(self, target)

        return wrapper

    with monkeypatch.context() as patched:
        for name in ("replace", "rename"):
            patched.setattr(Path, name, kept(getattr(Path, name)))
        made(tmp_path / "going", *sweep)
    assert len(stops) >= 10
    for stop in stops:
        again = made(stop, *sweep)
        assert without_paths(again) == without_paths(whole)
        assert [rows(summary) for summary in again] == [rows(summary) for summary in whole]


@pytest.mark.slow
def test_a_killed_sweep_goes_on(tmp_path):
    small = ["method=interval", "method.grid={policy.every: [2, 3]}", "steps=2", "prompts.n=1"]
    sweep = ["-m", *small, "forecaster=taylor,reuse", f"out={tmp_path}", "name=killed"]
    process = started(tmp_path, *sweep)
    runs = tmp_path / "killed" / "runs"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.is_alive():
        if runs.is_dir() and any(path.suffix == ".partial" for path in runs.iterdir()):
            break
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.join()
    finished = {path.name for path in runs.iterdir() if (path / "summary.json").is_file()}
    assert len(finished) < 4
    ended(started(tmp_path, *sweep, *ONE_BY_ONE), tmp_path)
    assert len([path for path in runs.iterdir() if (path / "summary.json").is_file()]) == 4
    assert not [path for path in runs.iterdir() if path.suffix == ".partial"]
    whole = made(tmp_path / "whole", *small, "forecaster=reuse")
    again = made(tmp_path / "killed", *small, "forecaster=reuse")
    assert without_paths(again) == without_paths(whole)


def test_ctrl_c_keeps_what_is_done(tmp_path, monkeypatch, capfd):
    small = ["method=interval", "steps=2", "prompts.n=1"]

    def press(*given):
        put_together(*given)
        signal.raise_signal(signal.SIGINT)

    put_together, before = jobs.put_together, signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setattr(jobs, "put_together", press)
    try:
        with pytest.raises(SystemExit) as stopped:
            run("-m", *small, "forecaster=reuse,taylor", f"out={tmp_path}", "name=stopped")
    finally:
        signal.signal(signal.SIGINT, before)
    monkeypatch.undo()
    assert stopped.value.code == 130
    assert "goes on from there" in capfd.readouterr().err
    finished = [path.parent for path in (tmp_path / "stopped").glob("runs/*/summary.json")]
    assert len(finished) == 1
    monkeypatch.setattr(jobs, "Worker", None)  # nobody may work
    assert [summary["path"] for summary in made(tmp_path / "stopped", *small, "forecaster=reuse")] == finished


def test_a_sweep_goes_on_after_a_job_that_cannot_work(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", [])
    with pytest.raises(SystemExit) as failed:
        run(
            "-m",
            "model=unet-digits,dit-digits",
            "sampler=dpmpp",
            "method=interval",
            "steps=2",
            f"out={tmp_path}",
            "name=some",
        )
    assert failed.value.code == 1
    told = "".join(capfd.readouterr())
    assert "unet-digits has the samplers ddim, not 'dpm++'" in told.replace("\n", " ")
    assert "Traceback" not in told
    assert len(list((tmp_path / "some" / "runs").glob("*/summary.json"))) == 1


# several processes


@pytest.mark.slow
def test_two_processes_give_the_table_of_one(tmp_path):
    """With what `accelerate launch` tells each; the launcher itself starts those of test_profile_cli.py."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}

    def one(rank):
        PartialState._reset_state()  # which may be known from before the fork
        run("method=first_block", f"out={tmp_path}", "name=two", "batch=1")
        (tmp_path / f"{rank}.done").touch()
        while len([*tmp_path.glob("*.done")]) < 2:  # the other may still be reading what this one sent
            time.sleep(0.02)

    logs = [tmp_path / str(rank) for rank in range(2)]
    processes = []
    for rank, log in enumerate(logs):
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        processes.append(forked(functools.partial(one, rank), log, **ranks, **address))
    for process, log in zip(processes, logs, strict=True):
        process.join(120)
        assert process.exitcode == 0, log.read_text()
    two = made(tmp_path / "two", "method=first_block", "batch=1")
    one_alone = made(tmp_path / "one", "method=first_block", "batch=1")
    assert without_paths(two) == without_paths(one_alone)
    assert rows(two[0]) == rows(one_alone[0])


# bad input


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("methd=interval", "Did you mean 'method'"),
        ("method=intervl", "Did you mean 'interval'"),
        ("method.policy.thresold=0.1", "Did you mean 'method.policy.threshold'"),
        ("prompts.nn=3", "Did you mean 'prompts.n'"),
        ("model=dit-digits,unet-digts", "Did you mean 'unet-digits'"),
        ("method=interval,uniform_resue", "Did you mean 'uniform_reuse'"),
        ("prompts.n=[1", "mismatched|missing|no viable|extraneous"),
        ("method=glob(system/*)", r"glob\(system/\*\) is a sweep over nothing\. Its options are bac, "),
        ("steps=interval(1, 9)", "Cannot|sweep|Non-discrete|nterval"),
    ],
)
def test_misspelled_keys_are_told_with_a_suggestion(override, message):
    command.register_methods()
    with pytest.raises(ConfigError, match=message):
        hydra_app.check("evaluate", [override, "-m"], command.GROUPS)


def test_a_glob_stands_for_the_names_it_matches(monkeypatch):
    composed = []
    monkeypatch.setattr(hydra_app, "_compose", lambda name, overrides, groups: composed.extend(overrides))
    hydra_app.check("evaluate", ["method=glob(uniform_*)", "-m"], command.GROUPS)
    assert composed == ["method=uniform_reuse", "method=uniform_taylor"]


def test_what_must_be_given(tmp_path):
    with pytest.raises(ConfigError, match=r"policy\.mask must be given"):
        job(tmp_path, "method=mask")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method=interval", "method.policy.every=0"], "at least 1"),
        (["method=interval", "method.grid={policy.evry: [2]}"], "has no option 'evry'. Did you mean 'every'"),
        (["metrics.names=[psnrr]"], "Did you mean 'psnr'"),
        (["prompts=builtin"], "takes class labels"),
        (["prompts=file", "prompts.path=/nowhere.txt"], "takes class labels"),
        (["sampler=unipc"], "has the samplers"),
        (["model=hub", "model.repository=/nowhere/at/all", "prompts=builtin"], "cannot be loaded"),
        (["method=first_block", "method.scope=block"], "scope"),
        (["batch=0"], "batch must be a whole number of at least 1"),
        (["steps=0"], "steps must be a whole number of at least 1"),
        (["threads=0"], "threads must be a whole number of at least 1"),
        (["timing.pairs=two"], r"timing\.pairs must be a whole number of at least 0"),
        (["prompts.first_seed=abc"], "first_seed must be a whole number"),
        (["metrics.names=null"], r"metrics\.names must be a list"),
        (["method=planned", "method.profile=/nowhere"], "there is no profile '/nowhere'.*diffusion-cache profile"),
    ],
)
def test_what_cannot_work_is_told_before_anything_is_made(tmp_path, overrides, message):
    with pytest.raises(ConfigError, match=message):
        made(tmp_path, *overrides)
    assert not [path for path in (tmp_path / "runs").iterdir() if (path / "summary.json").is_file()]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["peer=deepcache", "method=interval"], "peer=deepcache and method=interval both say what to evaluate"),
        (["method=uniform_taylor", "forecaster=reuse"], r"brings a forecaster of its own. Write method\.forecaster"),
        (["method=planned", "corrector=shrink"], "goes with a policy, and method=planned has none"),
        (["method=system/fora", "forecaster=reuse"], "goes with a policy, and method=system/fora has none"),
    ],
)
def test_what_would_have_no_effect_is_told(overrides, message):
    command.register_methods()
    with initialize_config_module(command.CONFIGS, version_base="1.3"):
        choices = compose("evaluate", [*SMALL, *overrides], return_hydra_config=True).hydra.runtime.choices
    with pytest.raises(ConfigError, match=message):
        command.check_used(composed(*overrides)["method"], choices, overrides)


def test_what_a_method_uses_may_be_given():
    for overrides in (
        ["method=interval", "forecaster=reuse"],
        ["peer=deepcache"],
        ["method=uncached", "corrector=none"],
    ):
        with initialize_config_module(command.CONFIGS, version_base="1.3"):
            choices = compose("evaluate", [*SMALL, *overrides], return_hydra_config=True).hydra.runtime.choices
        command.check_used(composed(*overrides)["method"], choices, overrides)


def test_two_sweeps_in_one_folder(tmp_path):
    task = job(tmp_path, "method=interval")
    store = Store(tmp_path)
    with (
        store.claimed(task.run_config(task.nodes[0])),
        pytest.raises(ConfigError, match="two sweeps share this folder"),
    ):
        made(tmp_path, "method=interval")
    assert len(made(tmp_path, "method=interval")) == 1


def test_a_damaged_part_is_made_again(tmp_path):
    task = job(tmp_path, "method=interval")
    folder = Store(tmp_path).partial(task.run_config(task.nodes[0]))
    (folder / "part-0of1.safetensors").write_bytes(b"half of it")
    (summary,) = made(tmp_path, "method=interval")
    assert summary["correct"] is True


def test_a_damaged_reference_is_made_again(tmp_path):
    (before,) = made(tmp_path, "method=interval")
    (reference,) = (tmp_path / "references").iterdir()
    reference.write_bytes(reference.read_bytes()[:100])
    (summary,) = made(tmp_path, "method=interval", "forecaster=reuse")
    assert summary["correct"] is True
    assert summary["metrics"]["psnr"]["mean"] != before["metrics"]["psnr"]["mean"]


def test_uncached_outputs_that_are_not_finite_are_refused(tmp_path, monkeypatch):
    """New or stored, and not as another pipeline's."""
    plain = runner.Worker.generate

    def broken(self, what, label, pairs=0):
        found = plain(self, what, label, pairs)
        found.output.images[0, 0] = float("nan")
        return found

    with monkeypatch.context() as patched:
        patched.setattr(runner.Worker, "generate", broken)
        with pytest.raises(ConfigError, match=r"dit-digits makes 1 of 3 uncached outputs .* not finite"):
            made(tmp_path, "method=interval")
    assert not list((tmp_path / "references").glob("*"))
    made(tmp_path, "method=interval")
    (path,) = (tmp_path / "references").iterdir()
    tensors, facts = read_tensors(path)
    write_tensors(path, {**tensors, "images": tensors["images"] * float("nan")}, facts)
    with pytest.raises(ConfigError, match="dit-digits makes 3 of 3 uncached outputs"):
        made(tmp_path, "method=interval", "forecaster=reuse")


def test_references_of_other_weights_are_refused(tmp_path):
    made(tmp_path, "method=interval")
    (path,) = (tmp_path / "references").iterdir()
    tensors, facts = read_tensors(path)
    write_tensors(path, {**tensors, "images": tensors["images"].flip(0)}, facts)
    with pytest.raises(ConfigError, match="holds uncached outputs that dit-digits does not make"):
        made(tmp_path, "method=interval", "forecaster=reuse")
    assert len(made(tmp_path, "method=interval")) == 1  # what is finished stays
