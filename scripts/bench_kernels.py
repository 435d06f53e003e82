"""Time the kernels against what the memory allows: a copy of the same bytes, measured in the same run.

For each op, shape, dtype and code: the median time of a launch with a cold L2 cache, the bytes that it must move, the
fraction of the copy's bandwidth that it reaches, and the times of the same in eager PyTorch and compiled by
`torch.compile`, empty where that fails. An op that hardly writes is compared with PyTorch's sum of as many bytes
(`baseline`: copy or read). Every tile configuration is timed; `ms` is of the one that launches take, `best_ms` of the
fastest. All are times of the device alone, which has something else to do while the host gets ready. Rows of a
results file that are not measured again stay in it.

An op whose output is wrong, compared with its reference in fresh numbers and poisoned memory, gets no speed, and the
exit status is 1. Without a CUDA device only `--tiny` works: small tensors through Triton's interpreter, which shows
that everything runs and is right, and gives no speed at all.

    python scripts/bench_kernels.py [--out kernels/results] [--budget-seconds 540] [--only forecast_residual]
    TRITON_INTERPRET=1 python scripts/bench_kernels.py --tiny
"""

import argparse
import csv
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from diffusion_cache import ops
from diffusion_cache.count_sketch import keys_of

ROOT = Path(__file__).parents[1]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
COLUMNS = (
    "device",
    "op",
    "shape",
    "sizes",
    "dtype",
    "code",
    "slots",
    "bytes",
    "correct",
    "ms",
    "baseline",
    "baseline_ms",
    "of_baseline",
    "eager_ms",
    "compiled_ms",
    "best_ms",
    "best_config",
    "torch",
    "triton",
)
L2_BYTES = 256 * 2**20  # more than any L2 cache holds
REPEATS = 30
AHEAD_CYCLES = 2_000_000  # of the device's clock, about a millisecond: what the host may take to launch one run


@dataclass
class Case:
    """One op at one size. run: a launch with a tile configuration; plain: the same in PyTorch, of `arguments`.

    reads: whether almost all of the bytes are read, and not half of them written.
    """

    op: str
    shape: str
    sizes: tuple[int, ...]
    dtype: str
    code: str
    slots: int
    bytes: int
    run: Callable[[tuple[int, int]], Any]
    plain: Callable[..., Any]
    arguments: tuple
    check: Callable[[], bool]
    configs: tuple[tuple[int, int], ...]
    reads: bool = False


def cases(device: torch.device, tiny: bool, only: Sequence[str]) -> Iterator[Case]:
    """Made one by one, as each holds its tensors."""
    for op, shapes in ((op, _kernel(op).SHAPES) for op in only):
        for name, full in shapes.items():
            sizes = (full[0], *(min(size, 24) for size in full[1:])) if tiny else full
            for dtype in DTYPES if name == "FLUX 1024²" else ("bf16",):
                for code, slots in MAKERS[op][1]:
                    yield MAKERS[op][0](name, sizes, dtype, code, slots, device)


def _kernel(op: str) -> Any:
    return ops._kernel(op)


def _features(sizes: tuple[int, ...], dtype: str, code: str, slots: int, device: torch.device) -> tuple[list, list]:
    """code: of all of them, or with "-delta" of all but the first."""
    values = [_random(sizes, dtype, device) for _ in range(slots)]
    plain = [] if code else values
    if code.endswith("-delta"):
        plain, values = values[:1], values[1:]
    pairs = [ops.encode_residual(value, None, code.removesuffix("-delta")) for value in values] if code else []
    return [*plain, *(pair.codes for pair in pairs)], [pair.scales for pair in pairs]


def _random(sizes: tuple[int, ...], dtype: str, device: torch.device) -> Tensor:
    return torch.randn(sizes, device=device, dtype=torch.float32).to(DTYPES[dtype])


def _close(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Within the tolerance of the largest number; the interpreter truncates bfloat16, which is one ulp more."""
    size = 4 + expected.float().abs().max().item()
    return bool((found.float() - expected.float()).abs().max() <= 2 * tolerance * size)


def _bytes(*tensors: Tensor | None) -> int:
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def forecast_residual(name: str, sizes: tuple, dtype: str, code: str, slots: int, device: torch.device) -> Case:
    op, kind = _kernel("forecast_residual"), DTYPES[dtype]
    features, scales = _features(sizes, dtype, code, slots, device)
    base, weights = _random(sizes, dtype, device), torch.randn(slots, device=device)
    given = (base, features, scales, weights, None, kind)
    out = torch.full_like(base, float("nan"))

    def check() -> bool:
        return _close(op.launch(*given, out), op.reference(*given), op.TOLERANCE[kind])

    return Case(
        "forecast_residual",
        name,
        sizes,
        dtype,
        code,
        slots,
        _bytes(base, out, *features, *scales),
        lambda config: op.launch(*given, out, config),
        ops._forecast,
        given,
        check,
        op.CONFIGS,
    )


def gated_residual(name: str, sizes: tuple, dtype: str, code: str, slots: int, device: torch.device) -> Case:
    op, kind = _kernel("gated_residual"), DTYPES[dtype]
    features, scales = _features(sizes, dtype, code, slots, device)
    base, weights = _random(sizes, dtype, device), torch.randn(slots, device=device)
    gate = _random((sizes[0], 1, sizes[2]), dtype, device)
    given = (base, gate, features, scales, weights, None)
    out = torch.full_like(base, float("nan"))

    def check() -> bool:
        return _close(op.launch(*given, out), op.reference(*given), op.TOLERANCE[kind])

    return Case(
        "gated_residual",
        name,
        sizes,
        dtype,
        code,
        slots,
        _bytes(base, out, gate, *features, *scales),
        lambda config: op.launch(*given, out, config),
        ops._gated,
        given,
        check,
        op.CONFIGS,
    )


def store_residual(name: str, sizes: tuple, dtype: str, code: str, slots: int, device: torch.device) -> Case:
    op = _kernel("store_residual")
    out, base = _random(sizes, dtype, device), _random(sizes, dtype, device)
    codes = torch.empty(sizes, dtype=ops.CODES[code], device=device)
    scales = torch.full(sizes[:-1], float("nan"), device=device)
    given = (codes, scales, out, base)

    def check() -> bool:
        op.launch(*given)
        expected = op.reference(out, base, "e4m3" if code == "fp8" else code)
        return torch.equal(codes.view(torch.uint8), expected[0].view(torch.uint8)) and torch.equal(scales, expected[1])

    return Case(
        "store_residual",
        name,
        sizes,
        dtype,
        code,
        slots,
        _bytes(*given),
        lambda config: op.launch(*given),
        ops._store,
        given,
        check,
        (op.config_for(math.prod(sizes[1:-1]), sizes[-1]),),
    )


def relative_l1(name: str, sizes: tuple, dtype: str, code: str, slots: int, device: torch.device) -> Case:
    op = _kernel("relative_l1")
    given = (_random(sizes, dtype, device), _random(sizes, dtype, device), "l1")

    def check() -> bool:
        return torch.allclose(op.launch(*given), op.reference(*given), rtol=1e-4)

    return Case(
        "relative_l1",
        name,
        sizes,
        dtype,
        code,
        slots,
        _bytes(*given[:2]),
        lambda config: op.launch(*given, config),
        ops._relative,
        given,
        check,
        op.CONFIGS,
        reads=True,
    )


def count_sketch(name: str, sizes: tuple, dtype: str, code: str, slots: int, device: torch.device) -> Case:
    op = _kernel("count_sketch")
    flat = _random(sizes, dtype, device).flatten(1)
    sums = torch.randn(len(flat), op.WIDTH, device=device)
    given = (flat, 3, 20, *keys_of(0, 20, len(flat)))

    def check() -> bool:
        found = sums.clone()
        op.launch(found, *given)
        return _close(found, op.reference(sums, *given), op.TOLERANCE[DTYPES[dtype]])

    return Case(
        "count_sketch",
        name,
        sizes,
        dtype,
        code,
        slots,
        _bytes(flat, sums),
        lambda config: op.launch(sums, *given, config),
        ops.count_sketch.add,
        (sums, *given),
        check,
        op.CONFIGS,
        reads=True,
    )


# what makes an op's cases, and the codes and numbers of slots that it is timed with
MAKERS: dict[str, tuple[Callable[..., Case], tuple[tuple[str, int], ...]]] = {
    "forecast_residual": (forecast_residual, (("", 1), ("", 3), ("fp8", 3), ("int8", 3), ("int8-delta", 3), ("", 8))),
    "store_residual": (store_residual, (("fp8", 1), ("int8", 1))),
    "relative_l1": (relative_l1, (("", 0),)),
    "gated_residual": (gated_residual, (("", 1), ("", 3), ("fp8", 3))),
    "count_sketch": (count_sketch, (("", 0),)),
}


def timed(run: Callable[[], Any], flush: Tensor) -> float:
    """Milliseconds on the device, the median over runs before each of which L2 was filled with something else.

    By reading: what is written there would be written back during the run.
    """
    for _ in range(3):
        run()
    pairs = []
    for _ in range(REPEATS):
        flush.sum()
        torch.cuda._sleep(AHEAD_CYCLES)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        pairs.append((begin, end))
    torch.cuda.synchronize()
    return median(begin.elapsed_time(end) for begin, end in pairs)


def baseline(case: Case, device: torch.device) -> Callable[[], Any]:
    """What moves the bytes of a case and does nothing else."""
    if case.reads:
        return torch.zeros(case.bytes // 4, device=device).sum
    source, target = torch.empty(2, case.bytes // 2, dtype=torch.uint8, device=device)
    return partial(target.copy_, source)


def compiled_ms(case: Case, flush: Tensor) -> float | str:
    """The time of the case's PyTorch compiled; "" where that fails, which is said."""
    torch._dynamo.reset()  # or the shapes before would count as recompilations
    compiled = torch.compile(case.plain, fullgraph=True, dynamic=False)
    try:
        return timed(partial(compiled, *case.arguments), flush)
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        print(f"{case.op} {case.shape}: not compiled: {type(error).__name__}: {reason}", file=sys.stderr)
        return ""


def measured(case: Case, flush: Tensor) -> dict[str, Any]:
    """The times of one case, all taken now."""
    by_config = {config: timed(partial(case.run, config), flush) for config in case.configs}
    best = min(by_config, key=by_config.__getitem__)
    taken, moved = by_config[case.configs[0]], timed(baseline(case, flush.device), flush)
    return {
        "ms": taken,
        "baseline": "read" if case.reads else "copy",
        "baseline_ms": moved,
        "of_baseline": moved / taken,
        "eager_ms": timed(partial(case.plain, *case.arguments), flush),
        "compiled_ms": compiled_ms(case, flush),
        "best_ms": by_config[best],
        "best_config": "×".join(map(str, best)),
    }


def row(case: Case, device: str, flush: Tensor | None) -> dict[str, Any]:
    """What is said about one case: nothing of its speed unless it is right, and measured on a GPU (flush)."""
    import triton

    entry = dict.fromkeys(COLUMNS, "") | {
        "device": device,
        "op": case.op,
        "shape": case.shape,
        "sizes": "×".join(map(str, case.sizes)),
        "dtype": case.dtype,
        "code": case.code,
        "slots": case.slots,
        "bytes": case.bytes,
        "correct": case.check(),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
    return entry | measured(case, flush) if entry["correct"] and flush is not None else entry


def write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".partial")
    with unfinished.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    os.replace(unfinished, path)


def stored(path: Path) -> dict[tuple[str, ...], dict[str, Any]]:
    """The rows of a results file, by what they are of."""
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        return {key_of(entry): entry for entry in csv.DictReader(file)}


def key_of(entry: dict[str, Any]) -> tuple[str, ...]:
    return tuple(str(entry[name]) for name in ("op", "shape", "dtype", "code", "slots"))


def shown(entry: dict[str, Any]) -> str:
    name = f"{entry['op']:<18}{entry['shape']:<12}{entry['dtype']:<5}{entry['code'] or 'plain':<6}×{entry['slots']}"
    if not entry["correct"]:
        return f"{name}  WRONG: not timed"
    if entry["ms"] == "":
        return f"{name}  right"
    eager, compiled = (
        "not" if entry[key] == "" else f"{entry[key] / entry['ms']:.2f}×" for key in ("eager_ms", "compiled_ms")
    )
    return (
        f"{name}  {entry['ms']:.4f} ms, {entry['of_baseline']:.1%} of the {entry['baseline']}, eager {eager}, "
        f"compiled {compiled}, best {entry['best_ms']:.4f} ms at {entry['best_config']}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 1 if an op is wrong or the time did not suffice."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(MAKERS), choices=list(MAKERS))
    parser.add_argument("--tiny", action="store_true", help="small tensors, and no speed")
    parser.add_argument("--budget-seconds", type=float, default=540.0)
    parser.add_argument("--out", type=Path, default=ROOT / "kernels" / "results")
    options = parser.parse_args(arguments)
    started = time.monotonic()
    cuda = torch.cuda.is_available()
    if not cuda and not (options.tiny and os.environ.get("TRITON_INTERPRET") == "1"):
        parser.error("there is no CUDA device; TRITON_INTERPRET=1 and --tiny check the ops without one")
    device = torch.device("cuda" if cuda else "cpu")
    name = torch.cuda.get_device_name() if cuda else "interpreter"
    flush = torch.zeros(L2_BYTES // 4, device=device) if cuda and not options.tiny else None
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") + ("-tiny" if options.tiny else "")
    path = options.out / f"{slug}.csv"
    table, rows = stored(path), []
    complete = True
    for case in cases(device, options.tiny, options.only):
        if time.monotonic() - started > options.budget_seconds:
            print("out of time: the rest is not measured", file=sys.stderr)
            complete = False
            break
        rows.append(row(case, name, flush))
        print(shown(rows[-1]), flush=True)
        table[key_of(rows[-1])] = rows[-1]
        write(path, list(table.values()))
    return 0 if complete and all(entry["correct"] for entry in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
