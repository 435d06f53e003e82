"""Made-up finished runs, in the format that the evaluation stores, for the tests of the report."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import save_file

INJECTED_PROMPT = "</script><img src=x onerror=alert(1)>"
INJECTED_LABEL = "<b>bold</b> | label"
ENVIRONMENT = {
    "versions": {"python": "3.11.7", "torch": "2.13.0"},
    "cpu": "A processor",
    "gpu": ["An accelerator"],
    "git": {"commit": "0123abc", "dirty": False},
    "threads": 1,
}
PROMPTS = (INJECTED_PROMPT, "zero", "one", "two", "three", "four", "five", "six")


def write_run(
    experiment: Path,
    *,
    model: str = "dit-digits",
    sampler: str = "ddim",
    kind: str = "ours",
    method: str = "interval",
    scope: str = "stack",
    settings: Mapping[str, Any] | None = None,
    steps: int = 20,
    nfe: float | None = 0.5,
    psnr: Sequence[float] = (40.0, 42.0, 44.0, 46.0),
    speed: float | None = 1.8,
    correct: bool = True,
    problem: str | None = None,
    quality_only: bool = False,
    random_weights: bool = False,
    prompts: Sequence[str] = PROMPTS,
    frames: int = 1,
    channels: int = 1,
    side: int = 16,
    blocks: int = 4,
    environment: Mapping[str, Any] = ENVIRONMENT,
    device: str = "An accelerator",
    contender: Mapping[str, Any] | None = None,
    conditions: Mapping[str, Any] | None = None,
) -> Path:
    """Write one finished run and return its folder.

    psnr: of each sample, in dB (may be infinite); none: speed only. contender: what its configuration says of a method
    that the package really has. conditions: parts of its configuration that runs which are compared have in common.
    """
    settings = dict(settings or {})
    config = {
        "model": {"name": model},
        "sampler": {"name": sampler},
        "steps": None,
        "threads": 1,
        "prompts": {"kind": "classes", "n": None},
        "metrics": {"names": ["psnr", "ssim"], "distribution": False, "settings": {}},
        **(conditions or {}),
        "contender": {"kind": kind, "method": method, "scope": scope, "label": method, "settings": settings}
        | dict(contender or {}),
        "timing": {"pairs": 0 if quality_only else 3},
        "batch": len(psnr),  # so that runs with other samples or steps have folders of their own
        "of": steps,
    }
    text = json.dumps(config, sort_keys=True)
    folder = experiment / "runs" / hashlib.sha1(text.encode()).hexdigest()[:12]
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(text, encoding="utf-8")
    (folder / "environment.json").write_text(json.dumps(environment), encoding="utf-8")

    n = len(psnr)
    ssim = [1.0 if math.isinf(value) else 1 - 10 ** (-value / 20) for value in psnr]
    latent = [0.0 if math.isinf(value) else 10 ** (-value / 20) for value in psnr]
    columns = {
        "index": pa.array(range(n), pa.int64()),
        "prompt": pa.array([prompts[i % len(prompts)] for i in range(n)], pa.string()),
        "seed": pa.array([100 + i for i in range(n)], pa.int64()),
        "psnr": pa.array(list(psnr), pa.float64()),
        "ssim": pa.array(ssim, pa.float64()),
        "latent_error": pa.array(latent, pa.float64()),
        "lpips": pa.array([None] * n, pa.float64()),
        "nfe": pa.array([None if nfe is None else nfe * steps] * n, pa.float64()),
    }
    pq.write_table(pa.table(columns), folder / "rows.parquet")

    timed = speed is not None and not quality_only
    summary = {
        "model": model,
        "sampler": sampler,
        "scope": scope,
        "kind": kind,
        "method": method,
        "settings": settings,
        "steps": steps,
        "n": n,
        "correct": correct,
        "problem": problem,
        "quality_only": quality_only,
        "device": device,
        "random_weights": random_weights,
        "nfe_ratio": nfe,
        "flops_ratio": None if nfe is None else round(nfe + 0.01 * (nfe < 1), 6),
        "blocks_ratio": nfe,
        "speed_ratio": speed if timed else None,
        "speed_low": speed * 0.96 if timed else None,
        "speed_high": speed * 1.05 if timed else None,
        "cpu_ratio": speed * 0.98 if timed else None,
        "seconds": 1 / speed if timed else None,
        "uncached_seconds": 1.0 if timed else None,
        "first_run_seconds": 2.0 if timed else None,
        "peak_memory": None,
        "cache_bytes": 1 << 16,
        "host_syncs": 0,
        "cpu_seconds": 30.0,
        "metrics": {"psnr": _score(psnr), "ssim": _score(ssim), "latent_error": _score(latent, worst=max)} if n else {},
        "distribution": {"fid": None, "kid": None, "class_accuracy": 0.95 if n else None},
        "heatmap": _heatmap(steps, blocks, 1.0 if nfe is None else nfe),
    }
    (folder / "summary.json").write_text(json.dumps(summary, allow_nan=False), encoding="utf-8")
    if n and correct and not random_weights:
        save_file(_images(psnr, frames, channels, side), folder / "images.safetensors")
    return folder


def _score(values: Sequence[float], worst: Any = min) -> dict[str, Any]:
    """Mean, p5 and worst of the samples as the runs store them; what is infinite becomes null."""
    ordered = sorted(values, reverse=worst is max)
    figures = {"mean": sum(values) / len(values), "p5": ordered[int(0.05 * len(values))], "worst": ordered[0]}
    figures = {key: value if math.isfinite(value) else None for key, value in figures.items()}
    worst_seed = 100 + list(values).index(ordered[0])
    return {**figures, "se": None, "worst_seed": worst_seed, "identical": sum(map(math.isinf, values))}


def _heatmap(steps: int, blocks: int, share: float) -> dict[str, Any]:
    """The first and the last block always computed, the ones between them evenly spread over the steps."""
    computed = [int((step + 1) * share + 1e-9) > int(step * share + 1e-9) for step in range(steps)]
    inner = [[1.0 if block in (0, blocks - 1) else float(c) for block in range(blocks)] for c in computed]
    return {"rows": [f"transformer_blocks.{block}" for block in range(blocks)], "computed": inner}


def _images(psnr: Sequence[float], frames: int, channels: int, side: int) -> dict[str, np.ndarray]:
    """Blurred blobs [frames, channels, side, side], and the same with noise of the median and the worst PSNR."""
    grid = np.linspace(-1, 1, side)
    found = {}
    ordered = sorted(psnr)
    for place, value in (("median", ordered[len(ordered) // 2]), ("worst", ordered[0])):
        rng = np.random.default_rng(len(place))
        reference = np.zeros((frames, channels, side, side))
        for frame in range(frames):
            for turn in np.linspace(0, 4.5, 24):
                angle = turn + 0.25 * frame + 0.5 * len(place)
                y, x = 0.55 * np.sin(angle), 0.4 * np.cos(angle) * (1 - turn / 9)
                blob = np.exp(-((grid[:, None] - y) ** 2 + (grid[None] - x) ** 2) / 0.03)
                reference[frame] = np.maximum(reference[frame], blob)
        noise = rng.standard_normal(reference.shape) * 10 ** (-value / 20)
        candidate = np.clip(reference + noise * (0.2 + 2 * reference), 0, 1)
        found[f"{place}.reference"] = reference.astype(np.float32)
        found[f"{place}.candidate"] = candidate.astype(np.float32)
    return found


def sample_psnr(mean: float, n: int, seed: int) -> list[float]:
    return [round(value, 3) for value in np.random.default_rng(seed).normal(mean, 2.5, n).tolist()]


def write_experiment(folder: Path, n: int = 16, settings: int = 6, side: int = 28) -> Path:
    """Three models (one of them video, one with random weights) × eight methods × settings, and an unfinished run."""
    shares = np.geomspace(0.62, 0.19, settings).round(4).tolist()
    # per method: kind, PSNR of it at half the work, dB lost when the work halves, overhead in time, settings
    methods = {
        "fewer steps": ("baseline", 39.0, 7.0, 0.0),
        "uniform, reuse": ("baseline", 42.0, 9.0, 0.02),
        "uniform, Taylor": ("baseline", 51.0, 13.0, 0.02),
        "first_block": ("ours", 48.0, 10.0, 0.06),
        "planned": ("ours", 56.0, 9.0, 0.02),
        "cache-dit DBCache": ("rival", 47.0, 12.0, 0.09),
        "diffusers TaylorSeer": ("rival", 52.0, 12.0, 0.05),
        INJECTED_LABEL: ("rival", 36.0, 5.0, 0.04),
    }
    subjects = (
        ("dit-digits", "ddim", 1, 0.0),
        ("dit-digits", "dpm++", 1, -4.0),
        ("wan-moving-digits", "unipc", 7, 2.0),
    )
    for m, (model, sampler, frames, shift) in enumerate(subjects):
        common: dict[str, Any] = {"model": model, "sampler": sampler, "frames": frames, "side": side, "blocks": 10}
        exact = {"nfe": 1.0, "psnr": [math.inf] * n, "speed": 1.0}
        write_run(folder, kind="baseline", method="uncached", **exact, **common)
        for k, (method, (kind, half, slope, overhead)) in enumerate(methods.items()):
            for j, share in enumerate(shares):
                mean = half + shift + slope * math.log2(share / 0.5) + 1.5 * math.sin(3 * k + 2 * j)
                psnr = sample_psnr(max(mean, 12.0), n, 1000 * m + 10 * k + j)
                if method == "first_block" and j == 0:
                    psnr[0] = math.inf
                even = {"policy": {"name": "interval", "every": j + 2}, "forecaster": {"name": "taylor", "order": 1}}
                write_run(
                    folder,
                    kind=kind,
                    method=method,
                    contender=even if method == "uniform, Taylor" else None,
                    scope="denoiser" if method == "fewer steps" else "stack",
                    settings={"threshold": round(0.02 * 2**j, 3)} if "lock" in method else {"every": j + 2, "order": 1},
                    nfe=share,
                    psnr=psnr,
                    speed=1 / (share + 0.08 + overhead),
                    quality_only=method == "planned" and j == 1,
                    **common,
                )
        write_run(
            folder,
            kind="rival",
            method="DeepCache",
            scope="cut",
            settings={"interval": 3},
            nfe=0.4,
            psnr=(),
            correct=False,
            problem="with its threshold at never, the output differs from the uncached one by 0.02",
            **common,
        )
    for j, share in enumerate((1.0, 0.5, 0.34)):
        method, kind = ("uncached", "baseline") if share == 1 else ("interval", "ours")
        options: dict[str, Any] = {"settings": {"every": j + 1}, "nfe": share, "psnr": (), "speed": 0.98 / share}
        write_run(
            folder, model="flux-dev", sampler="flow-euler", kind=kind, method=method, random_weights=True, **options
        )
    unfinished = folder / "runs" / "ffffffffffff.partial"
    unfinished.mkdir()
    (unfinished / "config.json").write_text("{", encoding="utf-8")
    return folder
