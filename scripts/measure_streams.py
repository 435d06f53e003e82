"""Measure caches where chunks of a call have noise levels of their own, and write results/streams.json.

Usage: python scripts/measure_streams.py [--settings window pipeline] [--samples 16] [--pairs 3] [--out FILE]

The model is the shipped rolling-digits. Two ways to generate:

window: a video of 24 frames passes through a window of 7, one clean and six each four steps behind the one before. The
    window moves on every four calls.
pipeline: diffusers' SkyReelsV2DiffusionForcingPipeline in its asynchronous mode, 7 frames each four steps behind.

For each: executed operations and PSNR against the uncached output of the same seeds (mean and worst) of a stream, of
the cache by steps, and of fewer sampler steps at the same number of denoiser calls; for streams, process CPU time of
one sample beside uncached runs in turns. Rows of settings that are not asked for stay as they are, if they were
measured alike. Prints the table of docs/streams.md.
"""

import argparse
import json
import platform
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

import diffusion_cache as dc
from diffusion_cache.evaluation.environment import cpu_name, versions
from diffusion_cache.measure import executed_flops, paired, quality
from diffusion_cache.reference import rolling
from diffusion_cache.reference.rolling import LAG, STEPS

FIRST_SEED = 70_000


def labels(samples: int) -> list[int]:
    return [row % 10 for row in range(samples)]


def seeds(samples: int) -> range:
    return range(FIRST_SEED, FIRST_SEED + samples)


def window(model: nn.Module, samples: int, run: Any = None, streams: bool = False, **pace: int) -> Tensor:
    """pace: steps and lag. run: told of steps, and of chunks if it streams."""
    return rolling.generate(model, labels(samples), seeds(samples), run, streams, **pace)


def window_cached(model: nn.Module, samples: int, stream: Any, **options: Any) -> tuple[Tensor, Any]:
    with dc.run(model, policy="interval", stream=stream, **options) as run:
        return window(model, samples, run, stream is not None), run.summary()


def asynchronous(pipe: Any, samples: int, **pace: int) -> Tensor:
    return pipe(**rolling.inputs(labels(samples), seeds(samples), **pace)).frames.float()


def asynchronous_cached(pipe: Any, samples: int, stream: Any, **options: Any) -> tuple[Tensor, Any]:
    with dc.cached(pipe, policy="interval", stream=stream, **options):
        return asynchronous(pipe, samples), dc.summary(pipe)


def measure(setting: str, samples: int, pairs: int, model: nn.Module) -> list[dict[str, Any]]:
    """A setting's rows."""
    plain, cached, everies, orders = SETTINGS[setting]
    subject = model if plain is window else rolling.pipeline(model)
    rows: list[dict[str, Any]] = []

    def note(method: str, every: int, expected: Tensor, whole: int, run: Callable[[int], Any], **more: Any) -> None:
        made: list[Any] = []
        flops = executed_flops(lambda: made.append(run(samples)))
        output, summary = made[0] if isinstance(made[0], tuple) else (made[0], None)
        found = quality(output, expected)
        row = {"setting": setting, "method": method, "every": every, "samples": samples}
        row["executed"] = round(flops / whole, 4)
        row |= {"psnr": round(found.psnr_mean, 2), "psnr_worst": round(found.psnr_worst, 2)}
        if summary is not None:
            row |= {"calls": len(summary.records), "computed": summary.computed}
            row |= {"cache_bytes_per_sample": summary.cache_bytes // samples}
        rows.append(row | more)
        print(rows[-1], flush=True)

    uncached: list[Tensor] = []
    whole = executed_flops(lambda: uncached.append(plain(subject, samples)))
    for every in everies:
        fewer = partial(plain, subject, steps=STEPS // every, lag=LAG // every)
        note("fewer steps", every, uncached[0], whole, fewer)
        for order in orders:
            options = {"every": every, "forecaster": "taylor", "order": order}
            note(
                f"by steps, order {order}", every, uncached[0], whole, partial(cached, subject, stream=None, **options)
            )
            stream = partial(cached, subject, stream=dc.Stream(), **options)
            timing = paired(partial(plain, subject, 1), partial(stream, 1), pairs)
            ratios = [round(ratio, 3) for ratio in sorted(timing.cpu_ratios)]
            more = {"faster": round(timing.cpu_ratio, 3), "faster_range": [ratios[0], ratios[-1]]}
            note(f"stream, order {order}", every, uncached[0], whole, stream, **more)
    return rows


# how to generate, without and with a cache; one call in how many is computed; orders of Taylor
SETTINGS: dict[str, tuple[Callable[..., Tensor], Callable[..., tuple[Tensor, Any]], Sequence[int], Sequence[int]]] = {
    "window": (window, window_cached, (2, 4), (0, 1)),
    "pipeline": (asynchronous, asynchronous_cached, (2,), (1,)),
}


def kept(path: Path, header: dict[str, Any], settings: Sequence[str], samples: int) -> list[dict[str, Any]]:
    """The rows that are there of other settings.

    Raises:
        SystemExit: where the header would say of them what is not so, or they are of other samples.
    """
    if not path.exists():
        return []
    before = json.loads(path.read_text())
    rows = [row for row in before["results"] if row["setting"] not in settings]
    changed = [name for name, value in header.items() if before.get(name) != value]
    changed += ["samples"] * any(row["samples"] != samples for row in rows)
    if rows and changed:
        raise SystemExit(f"{path} was measured with other {', '.join(changed)}: measure all, or choose an --out")
    return rows


def table(report: dict[str, Any]) -> list[str]:
    """Lines of docs/streams.md."""
    lines = ["| | | executed | PSNR, dB | worst | CPU time |", "| --- | --- | ---: | ---: | ---: | ---: |"]
    for row in report["results"]:
        time = ""
        if "faster" in row:
            low, high = row["faster_range"]
            time = f"{row['faster']:.2f}× ({low:.2f}–{high:.2f}) faster"
        numbers = f"{row['psnr']:.1f}", f"{row['psnr_worst']:.1f}"
        cells = f"{row['setting']}, 1 of {row['every']}", row["method"], f"{row['executed']:.0%}", *numbers, time
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", choices=tuple(SETTINGS), default=tuple(SETTINGS))
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("results/streams.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    diffusers.logging.set_verbosity_error()
    header = {
        "model": rolling.NAME,
        "first_seed": FIRST_SEED,
        "steps": STEPS,
        "lag": LAG,
        "pairs": options.pairs,
        "clock": "process CPU time, one thread",
        "hardware": f"CPU {platform.machine()}, {cpu_name()}",
        "versions": versions(),
    }
    rows = kept(options.out, header, options.settings, options.samples)
    model = rolling.load()
    for setting in options.settings:
        rows += measure(setting, options.samples, options.pairs, model)
    rows.sort(key=lambda row: list(SETTINGS).index(row["setting"]))
    report = {**header, "results": rows}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=2) + "\n")
    print("\n".join(table(report)))


if __name__ == "__main__":
    main()
