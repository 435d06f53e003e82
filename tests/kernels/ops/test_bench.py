"""scripts/bench_kernels.py at tiny size, where nothing is fast and nothing is said of speed."""

import csv
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from kernel_cases import DEVICE, INTERPRETED

SCRIPT = Path(__file__).parents[3] / "scripts" / "bench_kernels.py"
OPS = ("forecast_residual", "store_residual", "relative_l1", "gated_residual", "count_sketch")


@pytest.fixture
def bench():
    spec = importlib.util.spec_from_file_location("bench_kernels", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_kernels"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["bench_kernels"]


def table(folder):
    (path,) = folder.glob("*-tiny.csv")
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.skipif(not INTERPRETED, reason="gives speeds on a GPU")
def test_every_op_is_checked_and_none_is_timed(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "MAKERS", {op: (make, kinds[-2:]) for op, (make, kinds) in bench.MAKERS.items()})
    assert bench.main(["--tiny", "--out", str(tmp_path)]) == 0
    rows = table(tmp_path)
    assert {row["op"] for row in rows} == set(OPS)
    assert {row["correct"] for row in rows} == {"True"}
    assert {row[column] for row in rows for column in ("ms", "baseline_ms", "of_baseline", "best_ms")} == {""}
    by_hand = next(
        row for row in rows if (row["op"], row["shape"], row["dtype"]) == ("relative_l1", "SDXL 64²", "bf16")
    )
    assert int(by_hand["bytes"]) == 2 * 2 * 2 * 24**3


def test_what_is_wrong_has_no_speed(bench, tmp_path, monkeypatch, capsys):
    op = bench._kernel("relative_l1")
    monkeypatch.setattr(op, "reference", lambda current, previous, measure: current.new_zeros(len(current)).float())
    monkeypatch.setattr(bench, "measured", lambda *_: pytest.fail("was timed"))
    assert bench.main(["--tiny", "--only", "relative_l1", "--out", str(tmp_path)]) == 1
    assert {row["correct"] for row in table(tmp_path)} == {"False"}
    assert "WRONG" in capsys.readouterr().out


def test_rows_that_are_not_measured_again_stay(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "cases", lambda device, tiny, only: iter(only))
    monkeypatch.setattr(bench, "shown", str)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for version, *only in (("2", "relative_l1", "count_sketch"), ("3", "count_sketch")):
        entry = dict.fromkeys(bench.COLUMNS, "") | {"slots": 3, "correct": True, "torch": version}
        monkeypatch.setattr(bench, "row", lambda op, device, flush, entry=entry: entry | {"op": op})
        assert bench.main(["--tiny", "--only", *only, "--out", str(tmp_path)]) == 0
    assert [(row["op"], row["torch"]) for row in table(tmp_path)] == [("relative_l1", "2"), ("count_sketch", "3")]


def test_out_of_time(bench, tmp_path, capsys):
    assert bench.main(["--tiny", "--only", "relative_l1", "--budget-seconds", "-1", "--out", str(tmp_path)]) == 1
    assert "out of time" in capsys.readouterr().err


def test_a_case_is_timed_beside_what_moves_its_bytes(bench, monkeypatch):
    """The plumbing of the measurement, with a clock that stands still."""
    monkeypatch.setattr(bench, "timed", lambda run, flush: (run(), 10.0)[1])
    monkeypatch.setattr(bench.torch, "compile", lambda function, **_: function)
    found = {}
    for op in ("forecast_residual", "relative_l1"):
        (case, *_) = bench.cases(torch.device(DEVICE), True, [op])
        found[op] = bench.measured(case, torch.empty(1, device=DEVICE))
    for times in found.values():
        assert times["of_baseline"] == 1.0
        assert times["ms"] == times["baseline_ms"] == times["eager_ms"] == times["compiled_ms"] == 10.0
    assert [times["baseline"] for times in found.values()] == ["copy", "read"]
    assert found["forecast_residual"]["best_config"] == "2048×4"


def test_what_a_store_ran_with_is_said(bench, monkeypatch):
    op, ran = bench._kernel("store_residual"), []
    monkeypatch.setattr(op, "start", lambda *given, **constants: ran.append((given[2], constants)))
    (case, *_) = bench.cases(torch.device(DEVICE), True, ["store_residual"])
    case.run(case.configs[0])
    ((warps, constants),) = ran
    assert case.configs == ((constants["TILE_ROWS"] * constants["TILE_COLUMNS"], warps),)


def test_what_does_not_compile_is_said_and_the_rest_is_timed(bench, monkeypatch, capsys):
    def broken(*_, **__):
        raise RuntimeError("no such thing\nin many lines")

    monkeypatch.setattr(bench, "timed", lambda run, flush: (run(), 10.0)[1])
    monkeypatch.setattr(bench.torch, "compile", lambda function, **_: broken)
    (case, *_) = bench.cases(torch.device(DEVICE), True, ["relative_l1"])
    entry = bench.row(case, "a device", torch.empty(1, device=DEVICE))
    assert (entry["compiled_ms"], entry["eager_ms"]) == ("", 10.0)
    assert "relative_l1 FLUX 1024²: not compiled: RuntimeError: no such thing\n" in capsys.readouterr().err
    assert "compiled not, best 10.0000 ms" in bench.shown(entry)


@pytest.mark.skipif(not INTERPRETED, reason="takes times on a GPU")
def test_the_device_is_kept_busy_until_a_run_is_launched(bench, monkeypatch):
    """Or what the host takes to launch would count as the run's own."""
    done = []

    class Event:
        def __init__(self, enable_timing):
            pass

        def record(self):
            done.append("event")

        def elapsed_time(self, end):
            return 1.0

    for name, fake in dict(Event=Event, _sleep=lambda cycles: done.append("busy"), synchronize=lambda: None).items():
        monkeypatch.setattr(bench.torch.cuda, name, fake)
    flush = type("Flush", (), {"sum": lambda self: done.append("read")})()
    assert bench.timed(lambda: done.append("run"), flush) == 1.0
    assert done == ["run"] * 3 + ["read", "busy", "event", "run", "event"] * bench.REPEATS
