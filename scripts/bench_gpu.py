"""Step times, overheads, speed-ups and memory of full-size denoisers with random weights: ours and others' caches.

For each architecture, whole loops of denoiser calls (with guidance and an Euler step) take turns, uncached ones between
cached ones, so that each cached loop is compared with the uncached one beside it (U a b U c d U). Every cache computes
each N-th step and reuses the others, whatever it would decide by itself: adaptive ones pay for their decision and are
then overruled (a limit on consecutive reuse, or a threshold set step by step). A loop has as many steps as is usual for
the model, or fewer where the time does not allow it; `steps_timed` says how many.

ideal: the denoiser without the blocks that a reused step skips, measured in the same way.
overhead of a reused step: (reused − ideal) / uncached; of a computed one: (computed − uncached) / uncached.

A cache is timed only if it is correct, on a small input: told never to reuse, it must give the uncached output; with
the same input at every step a reused step must give it too; it must run at the steps it was asked to run at; and the
denoiser must be as before when it is taken off. Results are written after every model; models measured before are
kept.

Usage: python scripts/bench_gpu.py [--only sdxl …] [--budget-seconds 520] [--out results/gpu] [--device cpu --tiny]
"""

import argparse
import contextlib
import copy
import csv
import datetime
import functools
import gc
import itertools
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "error")

import torch
from torch import Tensor, nn

import diffusion_cache as dc
from diffusion_cache.errors import ConfigError
from diffusion_cache.evaluation.architectures import ARCHITECTURES, Architecture, Inputs, architecture
from diffusion_cache.evaluation.environment import cpu_name, git_commit, versions
from diffusion_cache.measure import executed_flops
from diffusion_cache.models import default_scope, find_layout
from diffusion_cache.summaries import Summary

# cheap ones first, so that the time they leave over goes to the expensive ones; and their shares of the time
SHARES = {"dit-xl-2": 1, "pixart-sigma": 1, "sdxl": 2, "sd-3.5-medium": 2, "flux-1-dev": 3, "wan-2.1-1.3b": 4}
EVERY = (2, 3)
UNIT = 6  # timed steps are a multiple of this, unless they are the usual number: both of EVERY come out even
ENOUGH_STEPS = 12  # before a second round is worth more than longer loops
CHECKED_STEPS, CHECKED_SIZE, CHECKED_FRAMES = 6, 32, 3
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # relative, of a reused step on an unchanged input
LEAST_SECONDS = 10.0  # with less than this left, no further model is begun

# of diffusers' TaylorSeer: what it forecasts, and what need not run as its output is not used then
TAYLOR_BRANCHES = [r"(transformer_blocks|blocks)\.\d+\.(attn\d?|ff|ffn|ff_context)", r"single_.*\.\d+\.proj_out"]
TAYLOR_UNUSED = [r"single_.*\.\d+\.(attn|proj_mlp)"]
HOOKS = ("fbc_leader_block_hook", "fbc_block_hook", "taylorseer_cache")  # the names diffusers gives them


class OutOfTime(Exception):
    """The budget is spent."""


@dataclass
class Cached:
    """A cache that is on. begin: called at the start of a step. call: a context for one denoiser call of a pass."""

    begin: Callable[[int], None] = lambda step: None
    call: Callable[[str], AbstractContextManager[None]] = lambda name: contextlib.nullcontext()
    summary: Callable[[], Summary] | None = None


Open = Callable[[nn.Module, int, int], AbstractContextManager[Cached]]


@dataclass(frozen=True)
class Variant:
    """One cache in one setting. open: (denoiser, steps, every) → a context in which it is on, computing each `every`-th
    step. front: blocks that a reused step runs to decide; None where reuse skips no whole blocks, so that there is no
    ideal. scope "denoiser": a reused step runs nothing at all. graphs: calls are captured and replayed, the former in
    steps before those that are timed."""

    name: str
    source: str
    scope: str
    every: int
    open: Open
    front: int | None = 0
    graphs: bool = False

    @property
    def warm_steps(self) -> int:
        """Before the timed ones, while it stays on: each way of calling is met, learned and captured in them."""
        return 2 * UNIT if self.graphs else 0


@contextlib.contextmanager
def ours(
    policy: str, forecaster: str, scope: str, denoiser: nn.Module, steps: int, every: int, cuda_graphs: bool = False
) -> Iterator[Cached]:
    limits: dict[str, Any] = {"every": every, "cuda_graphs": cuda_graphs}
    if policy == "first_block":
        limits = {"threshold": math.inf, "max_consecutive": every - 1}
    # one sample: telling samples of a batch apart, which a first run tries out, is of no use
    limits["granularity"] = "batch"
    with dc.run(denoiser, policy, forecaster, scope=scope, num_steps=steps, **limits) as run:
        yield Cached(begin=lambda step: run.next_step(), summary=run.summary)


@contextlib.contextmanager
def _hooked(denoiser: nn.Module, apply: Callable[[], None]) -> Iterator[tuple[list[Any], Callable]]:
    """diffusers' hooks on the denoiser, for classes without `enable_cache` too: the hooks, and the call context."""
    from diffusers.hooks import HookRegistry
    from diffusers.hooks.hooks import CacheContext, _set_cache_context

    @contextlib.contextmanager
    def call(name: str) -> Iterator[None]:
        _set_cache_context(denoiser, CacheContext(name))
        try:
            yield
        finally:
            _set_cache_context(denoiser, None)

    registry = HookRegistry.check_if_exists_or_initialize(denoiser)
    try:
        apply()
        registry.invalidate_child_registries_cache()
        registries = [
            vars(module)["_diffusers_hook"] for module in denoiser.modules() if "_diffusers_hook" in vars(module)
        ]
        hooks = [found.hooks[name] for found in registries for name in HOOKS if name in found.hooks]
        if not hooks:
            raise RuntimeError(f"finds nothing to hook in {type(denoiser).__name__}")
        yield hooks, call
    finally:
        for name in HOOKS:
            registry.remove_hook(name, recurse=True)
        registry.invalidate_child_registries_cache()


@contextlib.contextmanager
def diffusers_first_block(denoiser: nn.Module, steps: int, every: int) -> Iterator[Cached]:
    from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache

    with _hooked(denoiser, lambda: apply_first_block_cache(denoiser, FirstBlockCacheConfig(math.inf))) as (hooks, call):
        leader = next(hook for hook in hooks if hasattr(hook, "threshold"))

        def begin(step: int) -> None:
            leader.threshold = math.inf if step % every else -1.0

        yield Cached(begin, call)


@contextlib.contextmanager
def diffusers_taylorseer(denoiser: nn.Module, steps: int, every: int) -> Iterator[Cached]:
    from diffusers.hooks import TaylorSeerCacheConfig, apply_taylorseer_cache

    config = TaylorSeerCacheConfig(
        cache_interval=every,
        disable_cache_before_step=-1,  # it computes where (step − this − 1) is a multiple of the interval
        max_order=1,
        taylor_factors_dtype=next(denoiser.parameters()).dtype,
        cache_identifiers=TAYLOR_BRANCHES,
        skip_predict_identifiers=TAYLOR_UNUSED,
    )
    with _hooked(denoiser, lambda: apply_taylorseer_cache(denoiser, config)) as (_, call):
        yield Cached(call=call)


@contextlib.contextmanager
def cache_dit(taylor: bool, separate_passes: bool, denoiser: nn.Module, steps: int, every: int) -> Iterator[Cached]:
    import cache_dit as package

    config = package.DBCacheConfig(
        Fn_compute_blocks=1,
        Bn_compute_blocks=0,
        max_warmup_steps=1,
        residual_diff_threshold=1e9 if every > 1 else 0.0,
        max_continuous_cached_steps=every - 1,
        enable_separate_cfg=separate_passes,
    )
    adapter: Any = denoiser
    sd3 = type(denoiser).__name__ == "SD3Transformer2DModel"
    calibrator = None
    if taylor:  # the last block of SD3 gives no text stream to forecast
        calibrator = package.TaylorSeerCalibratorConfig(taylorseer_order=1, enable_encoder_calibrator=not sd3)
    if sd3:  # known to it by the pipeline's name only
        adapter = package.BlockAdapter(
            transformer=denoiser,
            blocks=denoiser.transformer_blocks,
            forward_pattern=package.ForwardPattern.Pattern_1,
        )
    try:
        package.enable_cache(adapter, cache_config=config, calibrator_config=calibrator)
        yield Cached()
    finally:
        package.disable_cache(denoiser)


def variants(model: Architecture, scope: str, graphs: bool = False) -> list[Variant]:
    """What is measured, the most telling first. scope: the denoiser's default one; graphs: CUDA graphs as well."""

    def planned(forecaster: str, scope: str, every: int, graphs: bool = False) -> Variant:
        name = f"interval, {forecaster}, {scope}" + ", CUDA graphs" * graphs
        opened = functools.partial(ours, "interval", forecaster, scope, cuda_graphs=graphs)
        return Variant(name, "ours", scope, every, opened, graphs=graphs)

    def first_block(every: int) -> Variant:
        opened = functools.partial(ours, "first_block", "taylor", scope)
        return Variant(f"first_block, taylor, {scope}", "ours", scope, every, opened, 1)

    def db_cache(every: int, taylor: bool) -> Variant:
        opened = functools.partial(cache_dit, taylor, len(model.passes) > 1)
        return Variant("DBCache + TaylorSeer" if taylor else "DBCache", "cache-dit", "stack", every, opened, 1)

    def builtin(every: int, taylor: bool) -> Variant:
        if taylor:
            return Variant("TaylorSeer", "diffusers", "branch", every, diffusers_taylorseer, None)
        return Variant("FirstBlock", "diffusers", "stack", every, diffusers_first_block, 1)

    two, three = EVERY
    return [
        planned("taylor", scope, two),
        *([planned("taylor", scope, two, graphs)] if graphs else []),
        first_block(two),
        db_cache(two, False),
        builtin(two, False),
        builtin(two, True),
        planned("reuse", scope, two),
        planned("taylor", "denoiser", two),
        planned("reuse", "denoiser", two),
        db_cache(two, True),
        planned("taylor", scope, three),
        first_block(three),
        db_cache(three, False),
        builtin(three, False),
        builtin(three, True),
    ]


class Marks:
    """Moments on the device: CUDA events, or the host's clock on a CPU."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._marks: list[Any] = []
        synchronize(device)

    def mark(self) -> None:
        if not self._cuda:
            self._marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append(event)

    def seconds(self) -> list[float]:
        """Between one mark and the next; waits for the device."""
        pairs = list(zip(self._marks, self._marks[1:], strict=False))
        if not self._cuda:
            return [after - before for before, after in pairs]
        torch.cuda.synchronize()
        return [before.elapsed_time(after) / 1e3 for before, after in pairs]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@dataclass(frozen=True)
class Loop:
    """One loop of denoiser calls. seconds: of each step. peak: most bytes allocated on the GPU, with the weights."""

    seconds: list[float]
    finite: bool
    peak: int | None
    cache_bytes: int | None = None
    computed: list[bool] | None = None  # each denoiser call, where the cache tells

    @property
    def total(self) -> float:
        return sum(self.seconds)


@dataclass
class Bench:
    """One denoiser at its usual size: what is timed, and everything its loops have in common."""

    model: Architecture
    denoiser: nn.Module
    device: torch.device
    calls: list[Inputs]
    small: list[Inputs]
    deadline: float  # of the whole script, on time.monotonic

    def subject(self, variant: "Variant") -> nn.Module:
        """What a variant is put on: the denoiser, or a fresh one that shares its weights for others' caches.

        They leave parts of themselves behind when they are taken off.
        """
        if variant.source == "ours":
            return self.denoiser
        tensors = itertools.chain(self.denoiser.parameters(), self.denoiser.buffers())
        return copy.deepcopy(self.denoiser, {id(tensor): tensor for tensor in tensors})

    def outputs(self, calls: Sequence[Inputs], cached: Cached, denoiser: nn.Module | None = None) -> list[Tensor]:
        found = []
        for names, call in zip(self.model.passes, calls, strict=True):
            with cached.call("+".join(names)):
                found.append((denoiser or self.denoiser)(**call)[0])
        return found

    def loop(
        self, steps: int, cached: Cached | None = None, denoiser: nn.Module | None = None, expected: float = 0.0
    ) -> Loop:
        """Time `steps` steps; expected: seconds it is likely to take.

        Raises:
            OutOfTime: if the budget ends before it would.
        """
        if time.monotonic() + expected > self.deadline:
            raise OutOfTime
        cached, calls = cached or Cached(), self.calls
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        before = len(cached.summary().records) if cached.summary else 0
        marks = Marks(self.device)
        marks.mark()
        for step in range(steps):
            cached.begin(step)
            calls = self.model.advance(calls, self.outputs(calls, cached, denoiser), step, steps)
            marks.mark()
        seconds = marks.seconds()
        peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None
        summary = cached.summary() if cached.summary else None
        return Loop(
            seconds=seconds,
            finite=bool(calls[0][self.model.sample].isfinite().all()),
            peak=peak,
            cache_bytes=summary.cache_bytes if summary else None,
            computed=[record.computed for record in summary.records[before:]] if summary else None,
        )

    def cached_loop(self, variant: Variant, steps: int, expected: float = 0.0) -> Loop:
        subject, warm = self.subject(variant), variant.warm_steps
        with variant.open(subject, warm + steps, variant.every) as cached:
            if warm:
                self.loop(warm, cached, subject, expected * warm / steps)
            return self.loop(steps, cached, subject, expected)

    @contextlib.contextmanager
    def without(self, front: int) -> Iterator[nn.Module]:
        """The denoiser less the blocks that are skipped when `front` are kept: their outputs are recorded ones."""
        layout = find_layout(self.denoiser, default_scope(self.denoiser), probe=front)
        skipped = {id(member) for span in layout.spans for member in span.members}
        outputs: dict[int, Any] = {}
        modules = [module for module in self.denoiser.modules() if id(module) in skipped]
        handles = [
            module.register_forward_hook(lambda module, args, output: outputs.update({id(module): output}))
            for module in modules
        ]
        try:
            self.outputs(self.calls, Cached())
        finally:
            for handle in handles:
                handle.remove()
        stand_ins = {id(module): Recorded(module, outputs[id(module)]) for module in modules}
        bare = copy.copy(self.denoiser)  # shares the weights
        bare._modules = {
            name: nn.ModuleList(stand_ins.get(id(block), block) for block in child)
            if isinstance(child, nn.ModuleList)
            else stand_ins.get(id(child), child)
            for name, child in self.denoiser._modules.items()
        }
        yield bare


class Recorded(nn.Module):
    """A block that returns what it once returned; the denoiser may look at its attributes as before."""

    def __init__(self, block: nn.Module, output: Any):
        super().__init__()
        self.block = block
        self.output = output

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.output


def difference(outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest relative L2 difference; NaN where a value is not finite."""
    ratios = []
    for output, target in zip(outputs, expected, strict=True):
        if torch.equal(output, target):
            ratios.append(0.0)
            continue
        ratios.append(float((output.double() - target.double()).norm() / target.double().norm()))
    return math.nan if any(math.isnan(ratio) for ratio in ratios) else max(ratios)


@dataclass(frozen=True)
class Check:
    """problem: why a variant is not correct, if it is not. flops: those of a reused step, of an uncached one's."""

    problem: str | None
    flops: float | None = None


@dataclass(frozen=True)
class Reference:
    """The uncached outputs for the small input, how far they differ when computed again, and what they cost."""

    outputs: list[Tensor]
    repeated: float
    flops: int

    @classmethod
    def of(cls, bench: Bench) -> "Reference":
        plain = Cached()
        outputs = bench.outputs(bench.small, plain)
        if any(not output.isfinite().all() for output in outputs):
            raise RuntimeError("the uncached output is not finite")
        repeated = difference(bench.outputs(bench.small, plain), outputs)
        return cls(outputs, repeated, executed_flops(lambda: bench.outputs(bench.small, plain)))


def check(bench: Bench, variant: Variant, reference: Reference) -> Check:
    """Whether a variant does what it is asked to, on a small input that is the same at every step."""
    found: list[Tensor] = []

    def run() -> None:
        found[:] = bench.outputs(bench.small, cached, subject)

    subject = bench.subject(variant)
    with variant.open(subject, 2, 1) as cached:
        for step in range(2):
            cached.begin(step)
            run()
            wrong = difference(found, reference.outputs)
            if not wrong <= 2 * reference.repeated:
                return Check(f"told never to reuse, its output differs by {wrong:.2g}")
    cached = Cached()
    run()
    if not difference(found, reference.outputs) <= 2 * reference.repeated:
        return Check("the denoiser is not as before when the cache is taken off")
    tolerance = TOLERANCE[bench.small[0][bench.model.sample].dtype]
    flops = []
    subject = bench.subject(variant)
    with variant.open(subject, CHECKED_STEPS, variant.every) as cached:
        for step in range(CHECKED_STEPS):
            cached.begin(step)
            flops.append(executed_flops(run))
            wrong = difference(found, reference.outputs)
            if not wrong <= tolerance:
                return Check(f"with an unchanged input, step {step} differs by {wrong:.2g}")
    computed = [step for step, count in enumerate(flops) if count >= reference.flops]
    if variant.graphs and cached.summary:  # of which nothing can be counted that is replayed, nor that is captured
        summary = cached.summary()
        if not summary.replayed:
            return Check("no call was replayed")
        computed = sorted({record.step for record in summary.records if record.computed})
        flops = flops[:2]
    if computed != list(range(0, CHECKED_STEPS, variant.every)):
        return Check(f"computed the steps {computed} of {CHECKED_STEPS}, not each {variant.every}-th")
    if not difference(bench.outputs(bench.small, Cached()), reference.outputs) <= 2 * reference.repeated:
        return Check("it changed another denoiser than its own")
    reused = [count for step, count in enumerate(flops) if step not in computed]
    return Check(None, sum(reused) / len(reused) / reference.flops)


@dataclass
class Timing:
    """The loops of one variant, each with the uncached loop beside it and the ideal step time of its round."""

    loops: list[Loop] = field(default_factory=list)
    beside: list[Loop] = field(default_factory=list)
    ideal: list[float] = field(default_factory=list)


def steady(loop: Loop, picked: Callable[[int], bool] = lambda step: True) -> float:
    """Median seconds of the picked steps, but for the first where there are others."""
    chosen = [seconds for step, seconds in enumerate(loop.seconds) if picked(step)]
    return median(chosen[1:] or chosen)


def run_round(
    bench: Bench, pending: Sequence[Variant], steps: int, step_seconds: float, timings: dict[Variant, Timing]
) -> tuple[list[Loop], dict[Variant, str]]:
    """Uncached loops, and between them one of each variant: U a b U c d U. Failed variants come back with the reason.

    Raises:
        OutOfTime: the loops until then are in timings.
    """
    failed: dict[Variant, str] = {}
    ideals: dict[int, float] = {}
    for front in sorted({variant.front for variant in pending if variant.front is not None}):
        with bench.without(front) as bare:
            ideals[front] = steady(bench.loop(UNIT, denoiser=bare, expected=step_seconds))
        del bare  # and with it the recorded outputs
    release(bench.device)
    uncached = [bench.loop(steps, expected=steps * step_seconds)]

    def keep(variant: Variant, loop: Loop) -> None:
        timing = timings[variant]
        timing.loops.append(loop)
        timing.beside.append(uncached[-1])
        if variant.scope == "denoiser":
            timing.ideal.append(0.0)
        elif variant.front is not None:
            timing.ideal.append(ideals[variant.front])

    waiting: list[tuple[Variant, Loop]] = []
    try:
        for position, variant in enumerate(pending):
            try:
                loop = bench.cached_loop(variant, steps, steps * step_seconds)
            except OutOfTime:
                raise
            except Exception as error:
                failed[variant] = reason(error)
                release(bench.device)
            else:
                if position % 2:
                    waiting.append((variant, loop))
                else:
                    keep(variant, loop)
            if position % 2 or position == len(pending) - 1:
                uncached.append(bench.loop(steps, expected=steps * step_seconds))
                while waiting:
                    keep(*waiting.pop())
    finally:
        while waiting:  # out of time: compared with the uncached loop before
            keep(*waiting.pop())
    return uncached, failed


def reason(error: Exception) -> str:
    """An error on one line, without the paths and addresses that differ from machine to machine."""
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {re.sub(r'0x[0-9a-f]+', '…', first)[:200]}"


def timed_steps(usual: int, seconds: float, step_seconds: float, cached: int, tiny: bool) -> int:
    """How many steps a loop may have, so that two rounds, or one where that leaves too few steps, fit the time."""
    if tiny:
        return UNIT
    # half a loop uncached beside each cached one, which takes a little over half as long
    loops = cached * (0.5 + 0.65) + 2
    fits = [int(seconds / rounds / (step_seconds * loops)) for rounds in (2, 1)]
    steps = fits[0] if fits[0] >= ENOUGH_STEPS else min(ENOUGH_STEPS, fits[1])
    return usual if steps >= usual else max(UNIT, steps // UNIT * UNIT)


def small_latent(model: Architecture, tiny: bool) -> tuple[int, ...]:
    channels, *sizes = model.tiny_latent if tiny else model.latent
    limits = [CHECKED_SIZE] * len(sizes)
    if len(sizes) == 3:
        limits[0] = CHECKED_FRAMES
    return (channels, *map(min, sizes, limits))


def measure(
    model: Architecture,
    device: torch.device,
    dtype: torch.dtype,
    tiny: bool,
    rounds: int,
    share: float,
    deadline: float,
) -> dict[str, Any]:
    """Everything about one architecture, in at most `share` seconds if that is enough for one round."""
    started = time.monotonic()
    torch.manual_seed(0)
    denoiser = model.build(device, dtype, tiny)
    bench = Bench(
        model,
        denoiser,
        device,
        model.calls(device, dtype, tiny=tiny),
        model.calls(device, dtype, tiny=tiny, latent=small_latent(model, tiny)),
        deadline,
    )
    synchronize(device)
    entry: dict[str, Any] = {
        "model": model.name,
        "denoiser": model.denoiser,
        "parameters": sum(parameter.numel() for parameter in denoiser.parameters()),
        "latent": list(model.tiny_latent if tiny else model.latent),
        "passes": [list(names) for names in model.passes],
        "dtype": str(dtype).removeprefix("torch."),
        "build_seconds": time.monotonic() - started,
    }
    todo = variants(model, default_scope(denoiser), graphs=device.type == "cuda")
    reference = Reference.of(bench)
    checks: dict[Variant, Check] = {}
    for variant in todo:
        try:
            checks[variant] = check(bench, variant, reference)
        except Exception as error:
            checks[variant] = Check(reason(error))
    release(device)
    warm = bench.loop(3)
    step_seconds = min(warm.seconds)
    pending = [variant for variant in todo if checks[variant].problem is None]
    left = min(started + share, deadline) - time.monotonic()
    steps = timed_steps(model.steps, left, step_seconds, len(pending), tiny)
    timings = {variant: Timing() for variant in todo}
    uncached: list[Loop] = []
    done = 0
    try:
        for variant in list(pending):
            if step_seconds < 0.3:  # of longer ones, what a first call does once is a small part
                try:
                    bench.cached_loop(variant, 3, 3 * step_seconds)
                except OutOfTime:
                    raise
                except Exception as error:
                    checks[variant] = Check(reason(error))
                    pending.remove(variant)
        while done < rounds:
            begun = time.monotonic()
            loops, failed = run_round(bench, pending, steps, step_seconds, timings)
            uncached += loops
            done += 1
            for variant, problem in failed.items():
                checks[variant] = Check(problem)
                pending.remove(variant)
            now = time.monotonic()
            if now + (now - begun) > min(started + share, deadline):
                break
    except OutOfTime:
        entry["cut"] = "out of time"
    uncached = uncached or [loop for timing in timings.values() for loop in timing.beside] or [warm]
    rows = [uncached_row(model, uncached, steps)]
    rows += [row(model, variant, checks[variant], timings[variant], steps) for variant in todo]
    return {**entry, "rounds": done, "seconds": time.monotonic() - started, "rows": rows}


def uncached_row(model: Architecture, loops: Sequence[Loop], steps: int) -> dict[str, Any]:
    step = 1e3 * median(steady(loop) for loop in loops)
    return {
        **named(model, "uncached", "baseline", "", 1, steps),
        "loops": len(loops),
        "uncached_ms": step,
        "computed_ms": step,
        "loop_seconds": median(loop.total for loop in loops),
        "speedup": 1.0,
        "peak_bytes": peak(loops),
        "correct": all(loop.finite for loop in loops),
        "problem": None if all(loop.finite for loop in loops) else "the output is not finite",
    }


def row(model: Architecture, variant: Variant, checked: Check, timing: Timing, steps: int) -> dict[str, Any]:
    """What is said about one variant; nothing about its speed unless it is correct."""
    entry = named(model, variant.name, variant.source, variant.scope, variant.every, steps)
    problem = checked.problem
    due = [step % variant.every == 0 for step in range(steps) for _ in model.passes]
    if problem is None and not all(loop.finite for loop in timing.loops):
        problem = "the output is not finite"
    if problem is None and any(loop.computed not in (None, due) for loop in timing.loops):
        problem = f"did not compute each {variant.every}-th step"
    if problem is not None:
        return {**entry, "correct": False, "problem": problem}
    entry |= {"correct": True, "flops_reused": checked.flops}
    if not timing.loops:
        return {**entry, "problem": "not timed: out of time"}
    pairs = list(zip(timing.loops, timing.beside, strict=True))
    computed = [steady(loop, lambda step: step % variant.every == 0) for loop in timing.loops]
    reused = [steady(loop, lambda step: step % variant.every > 0) for loop in timing.loops]
    uncached = [steady(loop) for loop in timing.beside]
    speedups = [beside.total / loop.total for loop, beside in pairs]
    entry |= {
        "loops": len(pairs),
        "uncached_ms": 1e3 * median(uncached),
        "computed_ms": 1e3 * median(computed),
        "reused_ms": 1e3 * median(reused),
        "overhead_computed": median(c / u for c, u in zip(computed, uncached, strict=True)) - 1,
        "loop_seconds": median(loop.total for loop in timing.loops),
        "speedup": median(speedups),
        "speedup_low": min(speedups),
        "speedup_high": max(speedups),
        "peak_bytes": peak(timing.loops),
        "cache_bytes": timing.loops[-1].cache_bytes,
    }
    if timing.ideal:
        fresh = math.ceil(steps / variant.every)
        shares = [ideal / u for ideal, u in zip(timing.ideal, uncached, strict=True)]
        overheads = [(r - i) / u for r, i, u in zip(reused, timing.ideal, uncached, strict=True)]
        entry |= {
            "ideal_ms": 1e3 * median(timing.ideal),
            "overhead_reused": median(overheads),
            "speedup_ideal": steps / (fresh + (steps - fresh) * median(shares)),
        }
    return entry


COLUMNS = (
    "model",
    "variant",
    "source",
    "scope",
    "every",
    "steps_usual",
    "steps_timed",
    "loops",
    "uncached_ms",
    "computed_ms",
    "reused_ms",
    "ideal_ms",
    "overhead_computed",
    "overhead_reused",
    "loop_seconds",
    "speedup",
    "speedup_low",
    "speedup_high",
    "speedup_ideal",
    "flops_reused",
    "peak_bytes",
    "cache_bytes",
    "correct",
    "problem",
)


def named(model: Architecture, variant: str, source: str, scope: str, every: int, steps: int) -> dict[str, Any]:
    """A row of which only this is known yet."""
    known = {
        "model": model.name,
        "variant": variant,
        "source": source,
        "scope": scope,
        "every": every,
        "steps_usual": model.steps,
        "steps_timed": steps,
    }
    return {**dict.fromkeys(COLUMNS), **known}


def peak(loops: Sequence[Loop]) -> int | None:
    known = [loop.peak for loop in loops if loop.peak is not None]
    return max(known, default=None)


def load(path: Path) -> dict[str, Any]:
    """The models of an earlier run, by name.

    Raises:
        SystemExit: if the file is none of ours.
    """
    if not path.exists():
        return {}
    try:
        return {entry["model"]: entry for entry in json.loads(path.read_text())["models"]}
    except (ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"{path} cannot be read ({error}): move it away, or choose another --out") from error


def write(path: Path, head: dict[str, Any], models: dict[str, Any]) -> None:
    """JSON, and beside it one CSV row for each model and variant; each file is replaced as a whole."""
    ordered = [models[name] for name in ARCHITECTURES if name in models]
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".json.partial")
    unfinished.write_text(json.dumps({**head, "models": ordered}, indent=1, allow_nan=False) + "\n")
    table = path.with_suffix(".csv.partial")
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["device", *COLUMNS])
        writer.writeheader()
        writer.writerows({"device": head["device"], **line} for entry in ordered for line in entry["rows"])
    os.replace(unfinished, path)
    os.replace(table, path.with_suffix(".csv"))


def shown(entry: dict[str, Any]) -> str:
    def number(value: float | None, form: str) -> str:
        return "–" if value is None else format(value, form)

    lines = [f"{entry['model']}: {entry['parameters']:,} parameters, {entry.get('rounds')} round(s)"]
    for line in entry["rows"]:
        lines.append(
            f"  {line['variant'][:32]:<32} 1/{line['every']} step {number(line['uncached_ms'], '8.2f')} "
            f"computed {number(line['computed_ms'], '8.2f')} reused {number(line['reused_ms'], '8.2f')} "
            f"ideal {number(line['ideal_ms'], '8.2f')} ms, overhead {number(line['overhead_computed'], '+.1%')} "
            f"{number(line['overhead_reused'], '+.1%')}, {number(line['speedup'], '.2f')}×"
            + (f"  [{line['problem']}]" if line["problem"] else "")
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 1 if a model could not be measured or one of our own variants is not correct."""
    started = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(SHARES), metavar="MODEL", help=", ".join(SHARES))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small models of the same structure, in float32")
    parser.add_argument("--rounds", type=int, default=3, help="at most this many loops of each variant")
    parser.add_argument("--budget-seconds", type=float, default=520.0)
    parser.add_argument("--out", type=Path, default=Path("results/gpu"))
    options = parser.parse_args(arguments)
    try:
        chosen = [architecture(name) for name in dict.fromkeys(options.only)]
    except ConfigError as error:
        parser.error(str(error))
    if options.rounds < 1:
        parser.error(f"--rounds must be at least 1, not {options.rounds}")
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --device cpu --tiny runs small models on the CPU")
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # where events are recorded
    dtype = torch.float32 if options.tiny else torch.bfloat16
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    label = name if device.type == "cuda" else "cpu"
    slug = re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-") + ("-tiny" if options.tiny else "")
    path = options.out / f"{slug}.json"
    models = load(path)
    head = {"device": name, "random_weights": True, "tiny": options.tiny}
    if device.type != "cuda":
        print(f"CUDA graphs are left out: there are none on {device}", file=sys.stderr)
    settings = {
        "versions": versions(),
        "cuda": torch.version.cuda,
        "commit": git_commit(),
        "rounds_wanted": options.rounds,
        "budget_seconds": options.budget_seconds,
    }
    deadline = started + options.budget_seconds
    waiting = sorted(chosen, key=lambda model: list(SHARES).index(model.name))
    status = 0
    while waiting:
        left = deadline - time.monotonic()
        if left < min(LEAST_SECONDS, options.budget_seconds):
            print(f"out of time: {', '.join(model.name for model in waiting)} not measured", file=sys.stderr)
            return 1
        share = left * SHARES[waiting[0].name] / sum(SHARES[model.name] for model in waiting)
        model = waiting.pop(0)
        try:
            with torch.no_grad():
                entry = measure(model, device, dtype, options.tiny, options.rounds, share, deadline)
        except OutOfTime:
            print(f"{model.name}: out of time", file=sys.stderr)
            status = 1
        except Exception as error:  # an architecture that fails must not cost the others
            print(f"{model.name}: {reason(error)}", file=sys.stderr)
            status = 1
        else:
            now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
            models[model.name] = {**entry, **settings, "measured": now}
            write(path, head, models)
            print(shown(entry), flush=True)
            if not all(line["correct"] for line in entry["rows"] if line["source"] in ("ours", "baseline")):
                status = 1
            del entry
        release(device)
    return status


if __name__ == "__main__":
    sys.exit(main())
