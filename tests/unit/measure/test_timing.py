"""Paired timing on a clock that the test advances."""

import math

import pytest

from diffusion_cache.errors import ConfigError
from diffusion_cache.measure import paired, timing


class Clock:
    """Stands in for the wall and CPU clocks; `spend` lets a run take time."""

    def __init__(self, monkeypatch):
        self.wall = self.cpu = 0.0
        self.calls = ""
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.wall)
        monkeypatch.setattr(timing.time, "process_time", lambda: self.cpu)

    def run(self, name, seconds):
        remaining = iter(seconds)

        def fn():
            self.calls += name
            spent = next(remaining)
            self.wall += spent
            self.cpu += 2 * spent

        return fn


def test_runs_take_turns_and_ratios_are_per_pair(monkeypatch):
    clock = Clock(monkeypatch)
    result = paired(clock.run("a", [9, 4, 6, 30]), clock.run("b", [9, 2, 2, 20]), pairs=3, warmup=1)
    assert clock.calls == "abababab"
    assert (result.a_wall, result.b_wall) == ((4, 6, 30), (2, 2, 20))
    assert result.wall_ratios == (2, 3, 1.5)
    assert result.wall_ratio == 2  # the median; the ratio of medians would be 3
    assert (result.a_seconds, result.b_seconds) == (6, 2)
    assert result.a_cpu == (8, 12, 60)
    assert result.cpu_ratio == 2


def test_a_clock_too_coarse_for_the_run_gives_infinity(monkeypatch):
    clock = Clock(monkeypatch)
    assert paired(clock.run("a", [1]), clock.run("b", [0]), pairs=1, warmup=0).wall_ratio == math.inf


def test_the_device_is_awaited_before_and_after_each_run(monkeypatch):
    events = []
    monkeypatch.setattr(timing.torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(timing.torch.cuda, "synchronize", lambda: events.append("sync"))
    paired(lambda: events.append("a"), lambda: events.append("b"), pairs=1, warmup=0)
    assert events == ["sync", "a", "sync", "sync", "b", "sync"]


def test_a_run_without_cuda_leaves_it_alone(monkeypatch):
    monkeypatch.setattr(timing.torch.cuda, "synchronize", lambda: pytest.fail("initialised CUDA"))
    paired(lambda: None, lambda: None, pairs=1)


@pytest.mark.parametrize(("pairs", "warmup"), [(0, 1), (1, -1)])
def test_counts_are_checked(pairs, warmup):
    with pytest.raises(ConfigError, match="pairs"):
        paired(lambda: None, lambda: None, pairs=pairs, warmup=warmup)
