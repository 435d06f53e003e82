"""Measure the caches for language models on the shipped one, and write results/language.json.

Usage: python scripts/measure_language.py [--methods dkv planned …] [--samples 200] [--pairs 5] [--out FILE]

For every method: decoded tokens per second of process CPU time, with and without it in turns; tokens run through the
model; the share of problems solved in every digit, and of answers that are those of no cache. "planned" are schedules
of COUNTS refinements from a profile, and as many evenly spaced ones, where a refinement decodes one token. The problems
are none that the model was trained or judged on, and none that were profiled. Rows of methods that are not asked for
stay as they are, if they were measured alike. Prints the table of docs/language.md.
"""

import argparse
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

import diffusion_cache as dc
from diffusion_cache.evaluation.environment import cpu_name, versions
from diffusion_cache.evaluation.prompts import FITTING_SEEDS
from diffusion_cache.language import LanguageCache, Planned
from diffusion_cache.measure.timing import paired
from diffusion_cache.planning.refinements import candidates
from diffusion_cache.profiling import refinements
from diffusion_cache.reference import fill_forward

FIRST_SEED = 70_000
BATCH = 20
METHODS = ("prefix", "dkv", "sub_block", "elastic")
DECODING = {"one token a refinement": 2.0, "all above 0.9": 0.9}  # thresholds
COUNTS, CANDIDATES = (6, 4), ("sum", "even")  # of plans: computed refinements of a block's eight, and schedules
PROFILED = range(FITTING_SEEDS + 70_000, FITTING_SEEDS + 70_000 + 2 * BATCH)


def wanted(methods: Sequence[str]) -> list[tuple[str | LanguageCache, str]]:
    """The methods asked for, each with how it decodes."""
    found: list[tuple[str | LanguageCache, str]] = [
        (method, decoding) for decoding in DECODING for method in METHODS if method in methods
    ]
    return found + [(plan, next(iter(DECODING))) for plan in (plans() if "planned" in methods else [])]


def plans() -> list[LanguageCache]:
    profile = refinements.measure(fill_forward.pipeline(), [fill_forward.inputs(list(PROFILED))])
    made = [plan for count in COUNTS for plan in candidates(profile, count)]
    return [Planned(plan) for plan in made if plan.name in CANDIDATES]


def measure(method: str | LanguageCache, decoding: str, samples: int, pairs: int) -> dict[str, Any]:
    """One method's row: the same problems without it, with it, and with it again in timed pairs."""

    def generate(pipe: Any, seeds: list[int]) -> torch.Tensor:
        return pipe(**fill_forward.inputs(seeds, DECODING[decoding])).sequences

    uncached, cached = (fill_forward.pipeline(fill_forward.load()) for _ in range(2))
    dc.enable(cached, method=method)
    batches = [
        list(range(start, min(start + BATCH, FIRST_SEED + samples)))
        for start in range(FIRST_SEED, FIRST_SEED + samples, BATCH)
    ]
    solved, solved_uncached, same = [], [], []
    executed = computed = refinements = 0.0
    for seeds in batches:
        expected, found = generate(uncached, seeds), generate(cached, seeds)
        solved.append(fill_forward.exact(seeds, found))
        solved_uncached.append(fill_forward.exact(seeds, expected))
        same.append((found == expected).all(dim=1))
        summary = dc.summary(cached)
        executed, computed = executed + summary.executed, computed + summary.tokens
        refinements += len(summary.records)
    timing = paired(lambda: generate(uncached, batches[0]), lambda: generate(cached, batches[0]), pairs, warmup=1)
    tokens = len(batches[0]) * fill_forward.DIGITS
    ratios = sorted(timing.cpu_ratios)
    return {
        "method": dc.summary(cached).method,
        "decoding": decoding,
        "tokens_per_second": round(tokens / median(timing.b_cpu)),
        "uncached_tokens_per_second": round(tokens / median(timing.a_cpu)),
        "speedup": round(timing.cpu_ratio, 3),
        "speedup_range": [round(ratios[0], 3), round(ratios[-1], 3)],
        "executed_tokens": round(executed),
        "executed_share": round(executed / computed, 4),
        "refinements": int(refinements),
        "exact_match": round(torch.cat(solved).float().mean().item(), 4),
        "uncached_exact_match": round(torch.cat(solved_uncached).float().mean().item(), 4),
        "same_answers": round(torch.cat(same).float().mean().item(), 4),
        "cache_bytes": dc.summary(cached).cache_bytes,
    }


def kept(path: Path, header: dict[str, Any], methods: Sequence[str]) -> list[dict[str, Any]]:
    """The rows that are there of other methods.

    Raises:
        SystemExit: where the header would say of them what is not so.
    """
    if not path.exists():
        return []
    before = json.loads(path.read_text())
    rows = [row for row in before["results"] if row["method"].partition("(")[0] not in methods]
    changed = [name for name, value in header.items() if before.get(name) != value]
    if rows and changed:
        raise SystemExit(f"{path} was measured with other {', '.join(changed)}: measure all, or choose an --out")
    return rows


def table(report: dict[str, Any]) -> list[str]:
    """Lines of docs/language.md."""
    lines = [
        "| decoded | method | tokens/s (none) | faster | tokens run | solved (none) | same answers |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in report["results"]:
        low, high = row["speedup_range"]
        cells = (
            row["decoding"],
            f"`{row['method']}`",
            f"{row['tokens_per_second']} ({row['uncached_tokens_per_second']})",
            f"{row['speedup']:.2f}× ({low:.2f}–{high:.2f})",
            f"{row['executed_share']:.1%}",
            f"{row['exact_match']:.1%} ({row['uncached_exact_match']:.1%})",
            f"{row['same_answers']:.1%}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = (*METHODS, "planned")
    parser.add_argument("--methods", nargs="+", choices=names, default=names)
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("results/language.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    header = {
        "model": fill_forward.NAME,
        "pipeline": "LLaDA2Pipeline",
        "samples": options.samples,
        "first_seed": FIRST_SEED,
        "batch": BATCH,
        "pairs": options.pairs,
        "clock": "process CPU time, one thread",
        "hardware": f"CPU {platform.machine()}, {cpu_name()}",
        "versions": versions(),
    }
    others = kept(options.out, header, options.methods)
    rows = others + [measure(*each, options.samples, options.pairs) for each in wanted(options.methods)]
    rows.sort(key=lambda row: (list(DECODING).index(row["decoding"]), names.index(row["method"].partition("(")[0])))
    report = {**header, "results": rows}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=2) + "\n")
    print("\n".join(table(report)))


if __name__ == "__main__":
    main()
