"""scripts/bench_gpu.py at tiny size on the CPU."""

import contextlib
import csv
import dataclasses
import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from recorded_graph import RecordingCapturer

from diffusion_cache.engine import graphs

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench_gpu.py"
TINY = ("--tiny", "--device", "cpu", "--rounds", "1")


@pytest.fixture(scope="module")
def bench_gpu():
    spec = importlib.util.spec_from_file_location("bench_gpu", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_gpu"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["bench_gpu"]


@pytest.fixture(scope="module")
def chosen(bench_gpu, request):
    """All models with --full; else one with branches of one stream, one with two streams and the UNet."""
    return [*bench_gpu.ARCHITECTURES] if request.config.getoption("--full") else ["dit-xl-2", "sd-3.5-medium", "sdxl"]


@pytest.fixture(scope="module")
def measured(bench_gpu, chosen, tmp_path_factory):
    out = tmp_path_factory.mktemp("gpu")
    status = bench_gpu.main([*TINY, "--only", *chosen, "--out", str(out)])
    return status, json.loads((out / "cpu-tiny.json").read_text()), read(out / "cpu-tiny.csv")


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def rows(report):
    return [row for entry in report["models"] for row in entry["rows"]]


def test_every_architecture_is_measured(bench_gpu, chosen, measured):
    status, report, table = measured
    assert status == 0
    assert [entry["model"] for entry in report["models"]] == [m for m in bench_gpu.ARCHITECTURES if m in chosen]
    assert report["random_weights"] is True
    assert report["device"]
    for entry in report["models"]:
        assert entry["versions"]["torch"] == torch.__version__
        assert entry["parameters"] > 100_000
    assert [row["variant"] for row in table] == [row["variant"] for row in rows(report)]
    assert float(table[0]["uncached_ms"]) == rows(report)[0]["uncached_ms"]


def test_ours_are_correct_and_all_figures_are_possible(measured):
    _, report, _ = measured
    for row in rows(report):
        if row["source"] in ("ours", "baseline"):
            assert row["correct"], row
            assert row["problem"] is None
        if not row["correct"]:
            assert row["problem"]
            assert row["speedup"] is row["uncached_ms"] is row["reused_ms"] is row["computed_ms"] is None
            continue
        times = [row[name] for name in ("uncached_ms", "computed_ms", "reused_ms", "ideal_ms", "loop_seconds")]
        assert all(time >= 0 and math.isfinite(time) for time in times if time is not None)
        assert row["uncached_ms"] > 0
        assert row["computed_ms"] > 0
        assert row["peak_bytes"] is None  # of a GPU's memory only
        if row["source"] == "baseline":
            continue
        assert row["reused_ms"] > 0
        assert row["speedup_low"] <= row["speedup"] <= row["speedup_high"]
        assert 0 <= row["flops_reused"] < 0.5
        if row["scope"] == "branch":
            assert row["ideal_ms"] is None
        else:
            assert row["ideal_ms"] >= 0
            assert 0 < row["speedup_ideal"] < math.inf
        if row["scope"] == "denoiser":
            assert row["flops_reused"] == 0
        if row["source"] == "ours":
            assert row["cache_bytes"] > 0


def test_each_source_is_measured_wherever_it_can_be(measured):
    _, report, _ = measured
    correct = {(row["model"], row["variant"]) for row in rows(report) if row["correct"]}
    transformers = {entry["model"] for entry in report["models"]} - {"sdxl"}
    pytest.importorskip("cache_dit")
    for variant in ("DBCache", "DBCache + TaylorSeer", "TaylorSeer"):
        assert {model for model, name in correct if name == variant} == transformers, variant
    # diffusers' FirstBlock subtracts the text stream, which the last block of SD3 does not give
    assert {model for model, name in correct if name == "FirstBlock"} == transformers - {"sd-3.5-medium"}


def test_what_is_finished_is_kept(bench_gpu, tmp_path, monkeypatch):
    measure, variants = bench_gpu.measure, bench_gpu.variants
    monkeypatch.setattr(bench_gpu, "variants", lambda *args, **kwargs: variants(*args, **kwargs)[:1])

    def interrupted(model, *args):
        if model.name == "pixart-sigma":
            raise KeyboardInterrupt
        return measure(model, *args)

    monkeypatch.setattr(bench_gpu, "measure", interrupted)
    chosen = ["--only", "pixart-sigma", "dit-xl-2", "--out", str(tmp_path)]
    with pytest.raises(KeyboardInterrupt):
        bench_gpu.main([*TINY, *chosen])
    path = tmp_path / "cpu-tiny.json"
    first = json.loads(path.read_text())["models"]
    assert [entry["model"] for entry in first] == ["dit-xl-2"]
    assert {row["model"] for row in read(tmp_path / "cpu-tiny.csv")} == {"dit-xl-2"}

    monkeypatch.setattr(bench_gpu, "measure", measure)
    assert bench_gpu.main([*TINY, "--only", "pixart-sigma", "--out", str(tmp_path)]) == 0
    both = json.loads(path.read_text())["models"]
    assert [entry["model"] for entry in both] == ["pixart-sigma", "dit-xl-2"]
    assert both[1] == first[0]
    assert not list(tmp_path.glob("*.partial"))


def test_a_cache_that_is_wrong_gets_no_speed(bench_gpu):
    model = bench_gpu.architecture("dit-xl-2")
    denoiser = model.build("cpu", torch.float32, tiny=True)
    calls = model.calls("cpu", torch.float32, tiny=True)
    bench = bench_gpu.Bench(model, denoiser, torch.device("cpu"), calls, calls, math.inf)
    first = bench_gpu.variants(model, "stack")[0]
    block = denoiser.transformer_blocks[2]

    @contextlib.contextmanager
    def spoiled(subject, steps, every):
        with first.open(subject, steps, every) as cached:
            handle = block.register_forward_hook(lambda module, args, output: output * 1.01)
            yield cached
            handle.remove()

    @contextlib.contextmanager
    def idle(subject, steps, every):
        yield bench_gpu.Cached()

    with torch.no_grad():
        reference = bench_gpu.Reference.of(bench)
        right, wrong, lazy = (
            bench_gpu.check(bench, dataclasses.replace(first, open=opened), reference)
            for opened in (first.open, spoiled, idle)
        )
    assert right.problem is None
    assert "never to reuse" in wrong.problem
    assert "computed the steps [0, 1, 2, 3, 4, 5]" in lazy.problem
    row = bench_gpu.row(model, first, wrong, bench_gpu.Timing(), 6)
    assert row["correct"] is False
    assert row["speedup"] is None


def test_cuda_graphs_are_checked_by_what_was_replayed(bench_gpu, monkeypatch):
    """By a stand-in, as there are none on a CPU, where they are left out."""
    model = bench_gpu.architecture("dit-xl-2")
    (variant,) = [one for one in bench_gpu.variants(model, "stack", graphs=True) if one.graphs]
    assert variant not in bench_gpu.variants(model, "stack")
    denoiser = model.build("cpu", torch.float32, tiny=True)
    calls = model.calls("cpu", torch.float32, tiny=True)
    bench = bench_gpu.Bench(model, denoiser, torch.device("cpu"), calls, calls, math.inf)
    with torch.no_grad():
        reference = bench_gpu.Reference.of(bench)
        with pytest.raises(bench_gpu.ConfigError, match="stays on a CUDA device"):
            bench_gpu.check(bench, variant, reference)
        made = []
        monkeypatch.setattr(graphs, "capturer", lambda device: made.append(RecordingCapturer()) or made[-1])
        right = bench_gpu.check(bench, variant, reference)
        monkeypatch.setattr(graphs, "MAX_GRAPHS", 0)
        with pytest.warns(bench_gpu.dc.DiffusionCacheWarning, match="go without graphs"):
            none = bench_gpu.check(bench, variant, reference)
    assert right.problem is None
    assert 0 < right.flops < 0.5
    assert sum(capturer.replays for capturer in made) > 0
    assert none.problem == "no call was replayed"


def test_out_of_time(bench_gpu, tmp_path, capsys):
    assert bench_gpu.main([*TINY, "--budget-seconds", "0", "--out", str(tmp_path)]) == 1
    assert "dit-xl-2" in capsys.readouterr().err
    assert bench_gpu.timed_steps(50, 1000.0, 0.01, 14, tiny=False) == 50
    assert bench_gpu.timed_steps(50, 60.0, 0.1, 14, tiny=False) == 12  # one round of 33 would fit, or two of 16
    assert bench_gpu.timed_steps(50, 1.0, 1.0, 14, tiny=False) == 6


def test_bad_input(bench_gpu, tmp_path, capsys):
    with pytest.raises(SystemExit):
        bench_gpu.main([*TINY, "--only", "sdx", "--out", str(tmp_path)])
    assert "Did you mean 'sdxl'" in capsys.readouterr().err
    (tmp_path / "cpu-tiny.json").write_text("{")
    with pytest.raises(SystemExit, match="cannot be read"):
        bench_gpu.main([*TINY, "--only", "sdxl", "--out", str(tmp_path)])
    assert (tmp_path / "cpu-tiny.json").read_text() == "{"


def test_events_are_recorded_on_the_device_that_is_given(bench_gpu, tmp_path, monkeypatch):
    current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: current.append(device))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: sys.exit("enough"))
    with pytest.raises(SystemExit, match="enough"):
        bench_gpu.main(["--tiny", "--device", "cuda:1", "--out", str(tmp_path)])
    assert current == [torch.device("cuda:1")]


@pytest.mark.gpu
def test_on_a_gpu(bench_gpu, tmp_path):
    assert bench_gpu.main(["--tiny", "--rounds", "1", "--only", "dit-xl-2", "sdxl", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*-tiny.json")
    report = json.loads(path.read_text())
    assert report["device"] == torch.cuda.get_device_name()
    for row in rows(report):
        if row["correct"]:
            assert row["peak_bytes"] > 1_000_000
            assert 0 < row["uncached_ms"] < 1000
