"""What the cache layer itself costs, on the denoiser of flux-digits at stack scope.

Four kinds of calls alternate in one process: uncached; computed and stored; reused; and the model without its
stacks (the layers outside, which a reused call still runs). Reported are medians over rounds of the ratios within a
round, in process CPU time on one thread: storing = computed / uncached − 1, and reusing = (reused − outside) /
uncached. Outputs are checked first.

Usage: python scripts/bench_overhead.py [--rounds 400] [--out results/overhead.json]
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import diffusion_cache as dc
from diffusion_cache import reference

MODEL = "flux-digits"
STORING_LIMIT, REUSING_LIMIT = 0.02, 0.05


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


def timed(call: Callable[[], Any]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


@torch.no_grad()
def measure(batch: int, rounds: int, warmup: int = 20) -> dict[str, float]:
    denoiser, inputs = captured_inputs(batch)
    outside = without_stacks(denoiser)
    expected = denoiser(**inputs)[0]
    steps = 2 * (rounds + warmup)
    times: dict[str, list[float]] = {name: [] for name in ("uncached", "computed", "reused", "outside")}
    # an always-active run would also wrap the uncached calls: those go to a twin
    twin = type(denoiser).from_config(denoiser.config).eval()
    twin.load_state_dict(denoiser.state_dict())
    with dc.run(denoiser, "interval", "reuse", every=2, num_steps=steps, scope="stack") as run:
        for _ in range(2):
            run.next_step()
            output = denoiser(**inputs)[0]
            if not torch.allclose(output, expected, rtol=1e-4, atol=1e-5):
                raise SystemExit("the cached output is wrong: no timing")
        for _ in range(rounds + warmup - 1):
            times["uncached"].append(timed(lambda: twin(**inputs)))
            run.next_step()
            times["computed"].append(timed(lambda: denoiser(**inputs)))
            run.next_step()
            times["reused"].append(timed(lambda: denoiser(**inputs)))
            times["outside"].append(timed(lambda: outside(**inputs)))
        computed = [record.computed for record in run.summary().records]
        if computed != [True, False] * (rounds + warmup):
            raise SystemExit("steps were not computed and reused in turn: no timing")
    rows = list(zip(*(times[name][warmup:] for name in times), strict=True))
    return {
        "batch": batch,
        "uncached_ms": 1e3 * statistics.median(row[0] for row in rows),
        "storing": statistics.median(row[1] / row[0] for row in rows) - 1,
        "reusing": statistics.median((row[2] - row[3]) / row[0] for row in rows),
        "reused_over_computed": statistics.median(row[2] / row[1] for row in rows),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=400)
    parser.add_argument("--out", type=Path, default=Path("results/overhead.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [measure(batch, options.rounds) for batch in (1, 4, 16)]
    report = {
        "model": MODEL,
        "scope": "stack",
        "rounds": options.rounds,
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
