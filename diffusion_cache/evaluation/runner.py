"""Jobs: one contender on one model, with every choice of its settings, each a run of its own."""

import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from getpass import getuser
from pathlib import Path
from typing import Any

import torch
from filelock import ReadWriteLock
from torch import Tensor

from ..errors import ConfigError, DiffusionCacheError, DiffusionCacheWarning
from ..measure import PairedTiming, paired
from . import distribution, metrics
from .accounting import Accountant, Observed, StepWork
from .contenders import Contender, Ours, Uncached, contender, expand
from .prompts import Sample, samples
from .store import Store, read_tensors, write_tensors
from .subjects import Output, Subject, subject

Progress = Callable[[str, int, int], None]  # what runs, done, of how many
FEW_STEPS = 4  # enough to see whether a pipeline is as it was
KEYS = ("model", "sampler", "prompts", "metrics", "timing", "batch", "steps", "threads")


@dataclass(frozen=True)
class Ranks:
    """Which share of the samples this process makes."""

    index: int = 0
    count: int = 1

    def share(self, items: Sequence[Any]) -> list[Any]:
        return list(items[self.index :: self.count])


@dataclass(frozen=True)
class Job:
    """One contender on one model. config: resolved, with the groups model, sampler, prompts, method, … as dicts."""

    config: Mapping[str, Any]
    folder: Path
    ranks: Ranks = Ranks()

    @cached_property
    def nodes(self) -> list[dict[str, Any]]:
        """The `method` configuration once for each choice of settings."""
        return expand(self.config["method"], self.config["model"]["name"])

    @property
    def is_rival(self) -> bool:
        return bool(self.config["method"]["kind"] == "rival")

    def run_config(self, node: Mapping[str, Any]) -> dict[str, Any]:
        """What determines one run; its fingerprint names the run's folder."""
        config = {key: self.config[key] for key in KEYS}
        if node["kind"] != "rival" and "policy" in node and not node.get("forecaster"):
            node = {**node, "forecaster": self.config["forecaster"]}
        return {**config, "contender": dict(node)}

    def reference_key(self, steps: int) -> dict[str, Any]:
        """What determines the uncached outputs that this process compares with."""
        keys = ("model", "sampler", "prompts", "batch", "threads")
        return {
            **{key: self.config[key] for key in keys},
            "steps": steps,
            "share": [self.ranks.index, self.ranks.count],
        }


class Worker:
    """A job at work in this process: one pipeline, its uncached outputs, and what every contender makes of it."""

    def __init__(self, job: Job, store: Store, progress: Progress):
        torch.set_num_threads(job.config["threads"])
        self.job, self.store, self.progress = job, store, progress
        self.subject: Subject = subject(job.config["model"], job.config["sampler"])
        self.steps = job.config["steps"] or self.subject.steps
        chosen = samples(job.config["prompts"], self.subject.classes, self.subject.video)
        self.first, self.samples = chosen[0], job.ranks.share(chosen)
        if not self.samples:
            raise ConfigError(f"there are {len(chosen)} samples for {job.ranks.count} processes: use fewer processes")
        self.accountant = Accountant(self.subject.denoisers, self.subject.blocks, self.subject.pipe.scheduler)
        self.names = list(job.config["metrics"]["names"])
        self.settings = dict(job.config["metrics"]["settings"])
        metrics.check(self.names, self.subject.name if self.subject.classes else None, self.settings)
        if job.config["metrics"]["distribution"]:
            distribution.check(self.subject.name, self.settings)
        self.lock = device_lock(self.subject.device)
        self._alone: dict[int, Tensor] = {}
        self._faults: dict[str, str | None] = {}
        for steps in (self.steps, FEW_STEPS):
            self.alone(steps)  # now, while nothing has touched the pipeline yet

    # generation

    def _generate(self, samples: Sequence[Sample], steps: int, flops: bool = False) -> tuple[Output, Observed]:
        with self.lock.read_lock(), self.accountant.observed(flops) as observed:
            output = self.subject.generate(samples, steps)
        return output, observed

    def generate(self, what: Contender, label: str) -> tuple[Output, list[Observed], dict[str, Any]]:
        """This share's outputs in order, the work of each sample, reads of the first one and bytes of the cache."""
        steps = what.steps(self.steps)
        size = self.job.config["batch"] if what.batchable else 1
        batches = [self.samples[i : i + size] for i in range(0, len(self.samples), size)]
        outputs, works = [], []
        with what.applied(self.subject, self.steps):
            _, counted = self._generate([self.first], steps, flops=True)
            for done, batch in enumerate(batches):
                self.progress(label, done, len(batches))
                output, observed = self._generate(batch, steps)
                priced = self.accountant.priced(observed)
                if priced is None and len(batch) == 1:  # a kind of step that the first sample had not
                    self._generate(batch, steps, flops=True)
                    priced = self.accountant.priced(observed)
                outputs.append(output)
                works += [priced or counted] * len(batch)
            facts = {"reads": counted.reads, "cache_bytes": what.cache_bytes(self.subject)}
        whole = Output(torch.cat([o.images for o in outputs]), torch.cat([o.latents for o in outputs]))
        return whole, works, facts

    @cached_property
    def plain(self) -> Observed:
        """What an uncached generation of one sample executes."""
        return self._generate([self.first], self.steps, flops=True)[1]

    @cached_property
    def uncached(self) -> Output:
        """This share's uncached outputs."""
        path = self.store.reference(self.job.reference_key(self.steps))
        found = read_tensors(path)
        if found is not None:
            return Output(found[0]["images"], found[0]["latents"])
        output = self.generate(Uncached("baseline", "uncached"), "uncached outputs")[0]
        write_tensors(path, output._asdict())
        return output

    # runs

    def make(self, node: Mapping[str, Any]) -> None:
        """One run's part: generate, compare, time, and leave the part in the run's partial folder."""
        config = self.job.run_config(node)
        path = self.part_path(config)
        if read_tensors(path) is not None:
            return
        what = contender(node, self.job.config["forecaster"], self.steps)
        label = " ".join([what.method, *(f"{key}={value}" for key, value in what.settings.items())])
        facts: dict[str, Any] = {
            "steps": what.steps(self.steps),
            "sampler": self.subject.sampler,
            "kind": what.kind,
            "method": what.method,
            "settings": dict(what.settings),
            "scope": what.scope,
            "problem": None,
            "rows": [],
        }
        images: dict[str, Tensor] = {}
        try:
            facts["problem"] = self.fault(what)
            images = self._fill(what, label, facts)
            if facts["problem"] is None and self.job.ranks.index == 0:
                facts |= self._timed(what, label)
        except DiffusionCacheError as error:
            if what.kind != "rival":
                raise
            facts["problem"] = f"cannot run: {error}"
        except Exception as error:
            # one setting that fails must not take the others with it, and must not go unseen
            facts["problem"] = f"failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        if facts["problem"]:
            warnings.warn(f"{self.subject.name}, {label}: {facts['problem']}", DiffusionCacheWarning, stacklevel=2)
        write_tensors(path, images or {"none": torch.zeros(0)}, facts)

    def part_path(self, config: Mapping[str, Any]) -> Path:
        ranks = self.job.ranks
        return self.store.partial(config) / f"part-{ranks.index}of{ranks.count}.safetensors"

    def fault(self, what: Contender) -> str | None:
        """What is wrong with a contender even where it reuses nothing, or after it is taken off."""
        key = json.dumps(what.control, sort_keys=True) if isinstance(what, Ours) else None
        if key is not None and key in self._faults:
            return self._faults[key]  # it is the same for many choices of settings
        control = what.never(self.subject, self.steps)
        found = None if control is None else self._fault(control)
        if key is not None:
            self._faults[key] = found
        return found

    def _fault(self, control: AbstractContextManager[Any]) -> str | None:
        first = [self.first]
        with self.lock.read_lock():
            with control:
                never = self.subject.generate(first, self.steps).images
            if not torch.equal(never, self.alone(self.steps)):
                return "reusing nothing, it still changes the output"
            if not torch.equal(self.subject.generate(first, FEW_STEPS).images, self.alone(FEW_STEPS)):
                return "it leaves a changed pipeline behind"
        return None

    def alone(self, steps: int) -> Tensor:
        """The first sample's uncached images, made by themselves, [1, …]."""
        if steps not in self._alone:
            self._alone[steps] = self.subject.generate([self.first], steps).images
        return self._alone[steps]

    def _fill(self, what: Contender, label: str, facts: dict[str, Any]) -> dict[str, Tensor]:
        """Rows, work and the images of this share."""
        uncached, plain = self.uncached, self.plain
        output, works, first = self.generate(what, label)
        finite = torch.isfinite(output.images).flatten(1).all(1)
        if not finite.all():
            facts["problem"] = f"{int((~finite).sum())} of {len(finite)} outputs hold values that are not finite"
            return {}
        rows = self._rows(uncached, output, works, plain)
        facts |= {
            "rows": rows,
            "cache_bytes": first["cache_bytes"],
            "host_reads": first["reads"] - (plain.reads or 0),
            "heatmap": self._heatmap(works, plain),
            "uncached_flops": _sum(plain.steps, "flops"),
            "uncached_block_flops": _sum(plain.steps, "block_flops"),
        }
        features = self._features(output)
        return {"candidate": output.images.half(), "reference": uncached.images.half(), **features}

    def _rows(
        self, uncached: Output, output: Output, works: Sequence[Observed], plain: Observed
    ) -> list[dict[str, Any]]:
        found = metrics.per_sample(
            self.names,
            output.images,
            uncached.images,
            candidate_latents=output.latents,
            reference_latents=uncached.latents,
            prompts=[str(sample.prompt) for sample in self.samples],
            labels=[sample.prompt for sample in self.samples] if self.subject.classes else None,
            settings=self.settings,
        )
        whole, whole_blocks = _sum(plain.steps, "flops"), _sum(plain.steps, "block_flops")
        rows = []
        for i, (sample, work) in enumerate(zip(self.samples, works, strict=True)):
            row = {"index": sample.index, "prompt": str(sample.prompt), "seed": sample.seed}
            row |= {name: values[i] for name, values in found.items()}
            flops, blocks = _sum(work.steps, "flops"), _sum(work.steps, "block_flops")
            row |= {"flops": flops, "flops_ratio": flops / whole, "nfe": self.steps * blocks / whole_blocks}
            row["nfe_ratio"] = blocks / whole_blocks
            row["blocks_ratio"] = sum(map(sum, map(self.accountant.executed, work.steps))) / sum(
                map(sum, map(self.accountant.executed, plain.steps))
            )
            rows.append(row)
        return rows

    def _features(self, output: Output) -> dict[str, Tensor]:
        if not self.job.config["metrics"]["distribution"]:
            return {}
        return {"features": distribution.features(self.subject.name, output.images, self.settings)}

    def _heatmap(self, works: Sequence[Observed], plain: Observed) -> dict[str, Any]:
        """Share of each block's work that was executed at each step, averaged over samples."""
        per_step = [self.accountant.executed(work) for work in plain.steps]
        usual = [statistics.mean(column) for column in zip(*per_step, strict=True)]
        steps = min(len(work.steps) for work in works)
        shares = []
        for step in range(steps):
            executed = [self.accountant.executed(work.steps[step]) for work in works]
            means = [statistics.mean(column) for column in zip(*executed, strict=True)]
            shares.append([round(mean / full, 4) if full else 0.0 for mean, full in zip(means, usual, strict=True)])
        return {"rows": list(self.subject.blocks), "computed": shares}

    def _timed(self, what: Contender, label: str) -> dict[str, Any]:
        """Paired timing of one sample's generation, with the device to itself; what never changes takes no time."""
        pairs = self.job.config["timing"]["pairs"]
        if not pairs or isinstance(what, Uncached):
            return {}
        first, peak = [self.first], None
        plain = partial(self.subject.call, first, self.steps)
        cached = partial(self.subject.call, first, what.steps(self.steps))
        setting = ExitStack()

        first_runs = []

        def put_on() -> None:
            setting.enter_context(what.applied(self.subject, self.steps))
            began = time.perf_counter()
            cached()  # what a cache learns, or compiles, in its first run is told apart
            first_runs.append(time.perf_counter() - began)

        self.progress(f"{label}: timing", 0, 1)
        with self.lock.write_lock(), setting:
            timing = paired(plain, cached, pairs, warmup=0, before_a=setting.close, before_b=put_on)
            if torch.cuda.is_initialized():
                torch.cuda.reset_peak_memory_stats()
                cached()
                peak = torch.cuda.max_memory_allocated()
        return {"timing": timing_facts(timing), "peak_memory": peak, "first_run_seconds": first_runs[0]}


def timing_facts(timing: PairedTiming) -> dict[str, Any]:
    """The ratios uncached / this of a summary."""
    ratios = sorted(timing.wall_ratios)
    return {
        "speed_ratio": timing.wall_ratio,
        "speed_low": ratios[0],
        "speed_high": ratios[-1],
        "cpu_ratio": timing.cpu_ratio,
        "seconds": timing.b_seconds,
        "uncached_seconds": timing.a_seconds,
    }


def _sum(steps: Sequence[StepWork], name: str) -> int:
    return sum(getattr(work, name) or 0 for work in steps)


def device_lock(device: torch.device | str) -> ReadWriteLock:
    """Shared while something is generated on a device, and one's own while something is timed on it."""
    name = str(device).replace(":", "")
    return ReadWriteLock(Path(tempfile.gettempdir()) / f"diffusion_cache-{getuser()}-{name}.lock")
