"""What the cache layer itself costs, on the denoiser of flux-digits at stack scope.

Four kinds of calls take turns in one process: uncached; computed and stored; reused; and the model without its
stacks (the layers outside, which a reused call still runs). Reported are medians over rounds of the ratios within a
round, in process CPU time on one thread: storing = computed / uncached − 1, and reusing = (reused − outside) /
uncached, of the last calls of a run; and of these the medians over processes. Outputs are checked on the way.

Usage: python scripts/bench_overhead.py [--rounds 60] [--processes 5] [--out results/overhead.json]
"""

import argparse
import ctypes
import json
import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import diffusion_cache as dc
from diffusion_cache import reference

MODEL = "flux-digits"
STORING_LIMIT, REUSING_LIMIT = 0.02, 0.05
STEPS = 8  # of a round; the last two are reported, when a run has found its memory


def captured_inputs(batch: int) -> tuple[nn.Module, dict[str, Any]]:
    """The denoiser and the arguments of its call in the middle of a real generation."""
    pipe = reference.load(MODEL)
    calls: list[dict[str, Any]] = []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True
    )
    pipe(**reference.inputs(MODEL, [i % 10 for i in range(batch)], list(range(batch)), steps=4))
    hook.remove()
    return pipe.transformer, calls[2]


def without_stacks(denoiser: nn.Module) -> nn.Module:
    """The same modules, less the stacks."""
    bare = type(denoiser).from_config(denoiser.config, num_layers=0, num_single_layers=0).eval()
    bare.load_state_dict(denoiser.state_dict(), strict=False)
    return bare


def keep_freed_memory() -> None:
    """Have the C library keep what is freed: else large tensors begin with page faults in some calls and not in others,
    cached or not.
    """
    allocator = ctypes.CDLL(None)
    if hasattr(allocator, "mallopt"):  # glibc
        mapped_at_most, trimmed_from = -4, -1  # M_MMAP_MAX, M_TRIM_THRESHOLD
        allocator.mallopt(mapped_at_most, 0)
        allocator.mallopt(trimmed_from, 2**31 - 1)


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    result = call()
    return time.process_time() - start, result


def check(output: Tensor, expected: Tensor) -> None:
    if not torch.allclose(output, expected, rtol=1e-4, atol=1e-5):
        raise SystemExit("the output is wrong: no timing")


def measure_in_processes(batch: int, rounds: int, processes: int) -> dict[str, Any]:
    """Medians over processes, as where a process has its memory shifts all ratios of it; and the range of storing."""
    spawned = multiprocessing.get_context("spawn")
    found = []
    for _ in range(processes):
        with ProcessPoolExecutor(1, spawned) as pool:
            found.append(pool.submit(measure, batch, rounds).result())
    stored = [one["storing"] for one in found]
    medians = {name: statistics.median(one[name] for one in found) for name in found[0]}
    return {"batch": batch, **medians, "storing_range": [min(stored), max(stored)]}


@torch.no_grad()
def measure(batch: int, rounds: int, warmup: int = 10) -> dict[str, float]:
    torch.set_num_threads(1)
    keep_freed_memory()
    denoiser, inputs = captured_inputs(batch)
    outside = without_stacks(denoiser)
    expected, without = denoiser(**inputs)[0], outside(**inputs)[0]
    rows = []
    for round_index in range(warmup + rounds):
        row: dict[str, float] = {}
        # which kind goes first alternates, so that neither always finds the other's memory warm
        for kind in ("uncached", "cached") if round_index % 2 else ("cached", "uncached"):
            if kind == "uncached":
                # the same calls in the same order as when cached: what a call leaves in processor caches counts too
                for _ in range(STEPS // 2):
                    row["uncached"], output = timed(lambda: denoiser(**inputs)[0])
                    check(output, expected)
                    row["outside"], output = timed(lambda: outside(**inputs)[0])
                    check(output, without)
                continue
            with dc.run(denoiser, "interval", "reuse", every=2, num_steps=STEPS, scope="stack") as run:
                for step in range(STEPS):
                    run.next_step()
                    row["reused" if step % 2 else "computed"], output = timed(lambda: denoiser(**inputs)[0])
                    check(output, expected)
                if [record.computed for record in run.summary().records] != [True, False] * (STEPS // 2):
                    raise SystemExit("steps were not computed and reused in turn: no timing")
        rows.append(row)
    rows = rows[warmup:]
    return {
        "uncached_ms": 1e3 * statistics.median(row["uncached"] for row in rows),
        "storing": statistics.median(row["computed"] / row["uncached"] for row in rows) - 1,
        "reusing": statistics.median((row["reused"] - row["outside"]) / row["uncached"] for row in rows),
        "reused_over_computed": statistics.median(row["reused"] / row["computed"] for row in rows),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60, help="of each process")
    parser.add_argument("--processes", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("results/overhead.json"))
    options = parser.parse_args()
    rows = [measure_in_processes(batch, options.rounds, options.processes) for batch in (1, 4, 16)]
    report = {
        "model": MODEL,
        "scope": "stack",
        "rounds": options.rounds,
        "processes": options.processes,
        "clock": "process CPU time, one thread",
        "hardware": f"CPU {platform.machine()}",
        "torch": torch.__version__,
        "limits": {"storing": STORING_LIMIT, "reusing": REUSING_LIMIT},
        "results": rows,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=2) + "\n")
    print(f"{'batch':>5} {'uncached ms':>12} {'storing':>9} {'reusing':>9} {'reused/computed':>16}")
    for row in rows:
        print(
            f"{row['batch']:>5} {row['uncached_ms']:>12.2f} {row['storing']:>9.2%} {row['reusing']:>9.2%} "
            f"{row['reused_over_computed']:>16.3f}"
        )


if __name__ == "__main__":
    main()
