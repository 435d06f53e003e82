"""Paired timing: two variants take turns in one process, so that a busy machine slows both alike."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch

from ..errors import ConfigError


@dataclass(frozen=True)
class PairedTiming:
    """Seconds of each run of a and b, in the order they ran; entry i of every tuple belongs to pair i.

    Wall time is what a user waits for; CPU time is what this process's threads spent, and moves less when other
    processes compete for the cores.
    """

    a_wall: tuple[float, ...]
    b_wall: tuple[float, ...]
    a_cpu: tuple[float, ...]
    b_cpu: tuple[float, ...]

    @property
    def wall_ratios(self) -> tuple[float, ...]:
        """Wall time of a over that of b, per pair: above 1 where b is faster."""
        return _ratios(self.a_wall, self.b_wall)

    @property
    def cpu_ratios(self) -> tuple[float, ...]:
        """CPU time of a over that of b, per pair."""
        return _ratios(self.a_cpu, self.b_cpu)

    @property
    def wall_ratio(self) -> float:
        return median(self.wall_ratios)

    @property
    def cpu_ratio(self) -> float:
        return median(self.cpu_ratios)

    @property
    def a_seconds(self) -> float:
        """Median wall time of a."""
        return median(self.a_wall)

    @property
    def b_seconds(self) -> float:
        """Median wall time of b."""
        return median(self.b_wall)


def paired(
    a: Callable[[], object],
    b: Callable[[], object],
    pairs: int = 5,
    warmup: int = 1,
    before_a: Callable[[], object] | None = None,
    before_b: Callable[[], object] | None = None,
) -> PairedTiming:
    """Run a, b, a, b, … and time every run; where CUDA is in use, a run ends when the device has finished.

    Args:
        a: the baseline.
        b: what is compared with it.
        pairs: number of timed pairs, at least 1.
        warmup: untimed pairs that run first.
        before_a, before_b: run untimed before every a or b, to set up what it is to find.

    Raises:
        ConfigError: for pairs < 1 or warmup < 0.
    """
    if pairs < 1 or warmup < 0:
        raise ConfigError(f"need pairs >= 1 and warmup >= 0, got pairs={pairs}, warmup={warmup}")
    for _ in range(warmup):
        elapsed(a, before_a)
        elapsed(b, before_b)
    runs = [(elapsed(a, before_a), elapsed(b, before_b)) for _ in range(pairs)]
    return PairedTiming(
        a_wall=tuple(first[0] for first, _ in runs),
        b_wall=tuple(second[0] for _, second in runs),
        a_cpu=tuple(first[1] for first, _ in runs),
        b_cpu=tuple(second[1] for _, second in runs),
    )


def _ratios(a: tuple[float, ...], b: tuple[float, ...]) -> tuple[float, ...]:
    # a coarse CPU clock may see no time pass
    return tuple(x / y if y else math.inf for x, y in zip(a, b, strict=True))


def elapsed(fn: Callable[[], object], before: Callable[[], object] | None = None) -> tuple[float, float]:
    """Wall and CPU seconds of one call, until the device has finished; before: run untimed, first."""
    if before is not None:
        before()
    _synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    fn()
    _synchronize()
    return time.perf_counter() - wall, time.process_time() - cpu


def _synchronize() -> None:
    if torch.cuda.is_initialized():  # never initialises CUDA itself
        torch.cuda.synchronize()
