"""What slicing saves and costs, as `evaluation/slicing.py` measures it, and write results/slicing.json.

Usage: python scripts/measure_slicing.py [--pairs 3] [--shares 4 8] [--device cpu] [--dtype float32] [--out FILE]
"""

import argparse
import json
from pathlib import Path
from typing import Any

import diffusers
import torch

from diffusion_cache.evaluation.environment import cpu_name, versions
from diffusion_cache.evaluation.slicing import SUBJECTS, measure


def shown(row: dict[str, Any]) -> str:
    limit, peak, sliced = (row[name] / 2**20 for name in ("max_bytes", "peak_bytes", "sliced_peak_bytes"))
    return (
        f"{row['model']:34} max {limit:6.1f} MiB  peak {peak:7.1f} -> {sliced:6.1f} MiB ({row['saved']:.0%} less)  "
        f"time x{row['time_ratio']:.3f}  error {row['error']:.1e}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--shares", type=int, nargs="+", default=[4, 8], help="max_bytes is the peak divided by each")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--out", type=Path, default=Path("results/slicing.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    diffusers.logging.set_verbosity_error()
    rows = []
    for subject in SUBJECTS:
        found = measure(subject, options.device, getattr(torch, options.dtype), options.pairs, options.shares)
        print(*map(shown, found), sep="\n", flush=True)
        rows += found
    report = {
        "device": cpu_name() if options.device == "cpu" else torch.cuda.get_device_name(),
        "dtype": options.dtype,
        "pairs": options.pairs,
        "clock": "process CPU time, one thread" if options.device == "cpu" else "wall time",
        "versions": {name: version for name, version in versions().items() if name in ("torch", "diffusers", "python")},
        "results": rows,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
