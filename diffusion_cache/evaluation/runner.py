"""Jobs: one contender on one model, with every choice of its settings, each a run of its own."""

import dataclasses
import hashlib
import os
import re
import tempfile
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import cached_property
from getpass import getuser
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from filelock import ReadWriteLock
from torch import Tensor

from .. import reference
from ..errors import ConfigError, DiffusionCacheError, DiffusionCacheWarning
from ..files import read_tensors, write_tensors
from ..measure import PairedTiming, elapsed, paired
from ..plain import numbers
from ..profile import Profile
from ..profiling.generation import device_name
from . import distribution, environment, metrics
from .accounting import Accountant, Observed
from .contenders import Contender, Uncached, contender, expand
from .finalists import finalists, keeps
from .prompts import Sample, samples
from .store import Store, environment_facts
from .subjects import Output, Subject, subject

Progress = Callable[[str, int, int], None]  # what runs, done, of how many
SAME_OUTPUT = 1e-3  # root-mean-square difference, of images in [0, 1]
# torch raises bare RuntimeErrors of these
MACHINE = re.compile(r"CUDA error|CUBLAS_STATUS|CUDNN_STATUS|NCCL|out of memory|can't allocate memory", re.IGNORECASE)
# but for those that say what a method asks of them
UNSERVED = re.compile(r"_(NOT_SUPPORTED|INVALID_VALUE|BAD_PARAM)|invalid (configuration )?argument", re.IGNORECASE)
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
        nodes = expand(self.config["method"], self.config["model"]["name"], self.sampler)
        corrector = self.config.get("corrector") or {}
        if corrector.get("name"):  # runs are kept by their nodes: one without a corrector names none
            nodes = [{"corrector": corrector, **node} if "policy" in node else node for node in nodes]
        return self._finalists(nodes)

    def _finalists(self, nodes: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Of the settings, those that were near the best in a comparison before, where one is named."""
        given = self.config.get("finalists") or {}
        if not given.get("of"):
            return nodes
        name = self.config["model"]["name"]
        steps = self.config["steps"] or (reference.spec(name).steps if name in reference.MODELS else None)
        if steps is None:
            raise ConfigError(
                "finalists are told by their settings, which may depend on the number of steps: add steps=…"
            )
        (within,) = numbers("finalists.within must be a number of dB, 0 or more", given["within"], lambda one: one >= 0)
        if not isinstance(given["each"], bool):
            raise ConfigError(f"finalists.each must be true or false, not {given['each']!r}")
        if not self.sampler:
            raise ConfigError(
                "finalists are told by the sampler's name: add sampler=scheduler sampler.name=…, the class of the "
                "model's own as the report has it"
            )
        found = finalists(Path(given["of"]), name, self.sampler, within, given["each"])
        return [node for node in nodes if keeps(found, contender(node, self.config["forecaster"], steps))]

    @property
    def sampler(self) -> str:
        """The sampler's name; of a shipped model that is run with its own, that one's."""
        given, model = self.config["sampler"]["name"], self.config["model"]["name"]
        spec = reference.MODELS.get(model)
        return given or (spec.samplers[0] if spec else "")

    @property
    def is_rival(self) -> bool:
        return bool(self.config["method"]["kind"] == "rival")

    def run_config(self, node: Mapping[str, Any]) -> dict[str, Any]:
        """What determines one run; its fingerprint names the run's folder."""
        config = {key: self.config[key] for key in KEYS}
        config["prompts"] = self._prompts
        if node["kind"] != "rival" and "policy" in node and not node.get("forecaster"):
            node = {**node, "forecaster": self.config["forecaster"]}
        return {**config, "contender": dict(node)}

    @cached_property
    def _prompts(self) -> dict[str, Any]:
        """The `prompts` configuration, and what a file that it names holds now."""
        prompts = dict(self.config["prompts"])
        if prompts["kind"] == "file" and Path(prompts["path"]).is_file():
            prompts["sha256"] = hashlib.sha256(Path(prompts["path"]).read_bytes()).hexdigest()
        return prompts

    @property
    def subject_key(self) -> dict[str, Any]:
        """What determines the pipeline, and what it makes of a sample."""
        keys = ("model", "sampler", "threads")
        return {**{key: self.config[key] for key in keys}, "versions": environment.versions()}

    def reference_key(self, steps: int) -> dict[str, Any]:
        """What determines the uncached outputs that this process compares with."""
        return {
            **self.subject_key,
            "batch": self.config["batch"],
            "prompts": self._prompts,
            "steps": steps,
            "share": [self.ranks.index, self.ranks.count],
        }


def is_of_the_machine(error: Exception) -> bool:
    """Whether a failure says nothing of the method that ran: no memory, no disk, a device that is lost."""
    if isinstance(error, (OSError, MemoryError, torch.OutOfMemoryError)):
        return True
    told = str(error)
    return isinstance(error, RuntimeError) and bool(MACHINE.search(told)) and not UNSERVED.search(told)


class Generated(NamedTuple):
    """works: of each sample. cache_bytes: of features, for one sample, if known. timed: facts of the timing."""

    output: Output
    works: list[Observed]
    cache_bytes: int | None
    reads: int  # values read back from tensors for one sample
    timed: dict[str, Any]


class Spent:
    """Called, the CPU seconds of this process since the last call, or since it was made: of a worker's first run, and
    of getting ready for it.
    """

    def __init__(self) -> None:
        self._since = time.process_time()

    def __call__(self) -> float:
        before, self._since = self._since, time.process_time()
        return self._since - before


class Setting(NamedTuple):
    """What contenders run on: the model's name, sampler and device."""

    name: str
    sampler: str
    device: str


class Maker(ABC):
    """A job at work in this process, which makes a part of each run."""

    def __init__(self, job: Job, store: Store, progress: Progress):
        self.spent = Spent()
        torch.set_num_threads(job.config["threads"])
        self.job, self.store, self.progress = job, store, progress
        self.steps: int

    @property
    @abstractmethod
    def setting(self) -> Setting: ...

    @abstractmethod
    def why_not(self, node: Mapping[str, Any]) -> str | None:
        """Why a contender cannot run here at all, if so."""

    def refused(self, nodes: Sequence[Mapping[str, Any]]) -> dict[int, str]:
        """Of those contenders that cannot run here, by their places, why not."""
        reasons = {place: self.why_not(node) for place, node in enumerate(nodes)}
        return {place: reason for place, reason in reasons.items() if reason is not None}

    @abstractmethod
    def made(self, what: Contender, label: str, facts: dict[str, Any]) -> dict[str, Tensor]:
        """What is stored of a contender's run as tensors. facts: are added to, with "problem" for what is wrong."""

    def make(self, node: Mapping[str, Any]) -> None:
        """One run's part: generate, compare, time, and leave the part in the run's partial folder."""
        config = self.job.run_config(node)
        path = self.store.part(config, self.job.ranks.index, self.job.ranks.count)
        if read_tensors(path) is not None:
            return
        what = contender(node, self.job.config["forecaster"], self.steps)
        label = " ".join([what.method, *(f"{key}={value}" for key, value in what.settings.items())])
        facts: dict[str, Any] = {
            "steps": what.steps(self.steps),
            "sampler": self.setting.sampler,
            "kind": what.kind,
            "method": what.method,
            "settings": dict(what.settings),
            "scope": what.scope,
            "problem": None,
            "rows": [],
            "device": device_name(self.setting.device),
            "environment": environment_facts(),
        }
        tensors: dict[str, Tensor] = {}
        try:
            tensors = self.made(what, label, facts)
        except DiffusionCacheError as error:
            if what.kind != "rival":
                raise
            facts["problem"] = f"cannot run: {error}"
        except Exception as error:
            if is_of_the_machine(error):
                raise  # to be tried again
            # one setting that fails must not take the others with it, and must not go unseen
            facts["problem"] = f"failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        if facts["problem"]:
            warnings.warn(f"{self.setting.name}, {label}: {facts['problem']}", DiffusionCacheWarning, stacklevel=2)
        facts["cpu_seconds"] = self.spent()
        write_tensors(path, tensors or {"none": torch.zeros(0)}, facts)


class Worker(Maker):
    """A job at work in this process: one pipeline, its uncached outputs, and what every contender makes of it."""

    def __init__(self, job: Job, store: Store, progress: Progress):
        super().__init__(job, store, progress)
        self.subject: Subject = subject(job.config["model"], job.config["sampler"])
        self.subject.profiles = store.profiles(job.subject_key)
        self.steps = job.config["steps"] or self.subject.steps
        chosen = samples(job.config["prompts"], self.subject.classes, self.subject.video)
        self.first, self.samples = chosen[0], job.ranks.share(chosen)
        if not self.samples:
            raise ConfigError(f"there are {len(chosen)} samples for {job.ranks.count} processes: use fewer processes")
        found = self.subject
        self.accountant = Accountant(found.denoisers, found.blocks, found.pipe.scheduler, found.compiled)
        self.names = list(job.config["metrics"]["names"])
        self.settings = dict(job.config["metrics"]["settings"])
        self.lock = device_lock(self.subject.device)
        metrics.check(self.names, self.subject.name if self.subject.classes else None, self.settings)
        if job.config["metrics"]["distribution"]:
            distribution.check(self.subject.name, self.settings)
        # now, while nothing has touched the pipeline yet
        self.alone = {steps: self._generate([self.first], steps)[0].images for steps in (self.steps, FEW_STEPS)}
        self.uncached, self.plain = self._uncached()
        self._faults: dict[Hashable, str | None] = {}
        self._told: set[str] = set()

    def why_not(self, node: Mapping[str, Any]) -> str | None:
        what = contender(node, self.job.config["forecaster"], self.steps)
        reason = what.why_not(self.subject)
        return None if reason is None else f"{what.method} on {self.subject.name}: {reason}"

    # generation

    def _generate(self, samples: Sequence[Sample], steps: int, flops: bool = False) -> tuple[Output, Observed]:
        with self.lock.read_lock(), self.accountant.observed(flops) as observed:
            output = self.subject.generate(samples, steps)
        return output, observed

    def generate(self, what: Contender, label: str, pairs: int = 0) -> Generated:
        """This share's outputs, in order, and what that many timed pairs of runs tell.

        Samples are generated one by one for the timing and for counting operations, and the others in batches. One
        whose work a batch does not tell, for it has a kind of step that no sample before had or was computed for its
        neighbours' sake, is generated again by itself.
        """
        size = self.job.config["batch"] if what.batchable else 1
        self.accountant.forget_prices()
        with ExitStack() as setting:
            timed, outputs = self._timed(what, setting, pairs, label)
            places = [place for place in range(len(self.samples)) if place not in outputs] or [0]
            outputs[places[0]], counted = self._counted(what, self.samples[places[0]])
            bytes_ = what.cache_bytes(self.subject)
            works = dict.fromkeys(outputs, counted)
            batches = [places[i : i + size] for i in range(1, len(places), size)]
            for done, batch in enumerate(batches):
                self.progress(label, done, len(batches))
                chosen = [self.samples[place] for place in batch]
                output, observed = self._generate(chosen, what.steps(self.steps))
                kinds = self._kinds(what, observed, len(batch))
                for place, made, known in zip(batch, output.each(), kinds, strict=True):
                    work = None if known is None else self.accountant.priced(known)
                    if work is None:
                        made, work = self._counted(what, self.samples[place])
                    outputs[place], works[place] = made, work
        ordered = [outputs[place] for place in range(len(self.samples))]
        whole = Output(torch.cat([o.images for o in ordered]), torch.cat([o.latents for o in ordered]))
        return Generated(whole, [works[place] for place in range(len(ordered))], bytes_, counted.reads or 0, timed)

    def _counted(self, what: Contender, sample: Sample) -> tuple[Output, Observed]:
        """One sample by itself, and what was counted of it, which tells what its kinds of step cost."""
        output, counted = self._generate([sample], what.steps(self.steps), flops=True)
        (kinds,) = self._kinds(what, counted, 1)
        if kinds is not None:
            self.accountant.price(kinds, counted)
        if self.subject.compiled:  # and was not while it was counted
            output = self._generate([sample], what.steps(self.steps))[0]
        return output, counted

    def _kinds(self, what: Contender, observed: Observed, samples: int) -> Sequence[list[Hashable] | None]:
        """Of each sample of the generation that was observed, what kind of step each was, if that is known."""
        if what.uniform and self.subject.compiled:  # then calls of modules tell nothing
            return [list(range(len(observed.steps))) if what.batchable else None] * samples
        if what.uniform:
            return [observed.kinds] * samples
        found = what.kinds(self.subject, samples)
        return found if found is not None and len(found[0]) == len(observed.steps) else [None] * samples

    def _uncached(self) -> tuple[Output, Observed]:
        """This share's uncached outputs, and the work of one of them.

        Raises:
            ConfigError: for outputs that are not finite, or stored ones that are another pipeline's.
        """
        path = self.store.reference(self.job.reference_key(self.steps))
        found = read_tensors(path)
        if found is not None and found[1]:
            self._check_finite(found[0]["images"])
            self._check_reference(found[0]["images"], path)
            return Output(found[0]["images"], found[0]["latents"]), Observed.of_facts(found[1])
        made = self.generate(Uncached("baseline", "uncached"), "uncached outputs")
        self._check_finite(made.output.images)
        plain = dataclasses.replace(made.works[0], reads=made.reads)
        write_tensors(path, made.output._asdict(), plain.facts)
        return made.output, plain

    def _check_finite(self, images: Tensor) -> None:
        wrong = int((~finite_samples(images)).sum())
        if wrong:
            raise ConfigError(
                f"{self.subject.name} makes {wrong} of {len(images)} uncached outputs that hold values that are not "
                "finite, which nothing can be compared with: take another dtype, sampler or size"
            )

    def _check_reference(self, images: Tensor, path: Path) -> None:
        """That the stored uncached outputs are this pipeline's, by the first sample of all.

        Raises:
            ConfigError: if they are another's.
        """
        first = self.alone[self.steps]
        if self.job.ranks.index:
            return  # whose samples are others
        if images[:1].shape == first.shape and (images[:1] - first).square().mean().sqrt() <= SAME_OUTPUT:
            return
        raise ConfigError(
            f"{path} holds uncached outputs that {self.subject.name} does not make: its weights have changed since, or "
            "another device made them. Evaluate into another folder (out=…), or delete this one's runs and references"
        )

    # runs

    @property
    def setting(self) -> Setting:
        return Setting(self.subject.name, self.subject.sampler, self.subject.device)

    def made(self, what: Contender, label: str, facts: dict[str, Any]) -> dict[str, Tensor]:
        self._tell_of_fitted(what)
        facts["problem"] = self.fault(what)
        return self._fill(what, label, facts)

    def _tell_of_fitted(self, what: Contender) -> None:
        """Warn, once, of prompts that a contender's profile was measured or its plans fitted on.

        Classes are few, and told by seeds.
        """
        profile = getattr(what, "profile", None) or getattr(what, "options", {}).get("profile")
        if not self.subject.text or not isinstance(profile, Profile):
            return
        measured = {prompt for prompt, _ in profile.samples}
        asked = {str(sample.prompt) for sample in self.samples}
        fitted = {one for one in asked if one in measured or any(plan.is_fitted_to(one) for plan in profile.plans)}
        message = (
            f"{len(fitted)} of the prompts evaluated are among those that the profile was measured or its plans fitted "
            "on, which flatters them: profile and plan with other prompts, or evaluate on others"
        )
        if fitted and message not in self._told:
            self._told.add(message)
            warnings.warn(message, DiffusionCacheWarning, stacklevel=2)

    def fault(self, what: Contender) -> str | None:
        """What is wrong with a contender even where it reuses nothing, or after it is taken off.

        Found out once for all settings that reuse nothing in the same way.
        """
        if what.control_key not in self._faults:
            self._faults[what.control_key] = self._fault(what)
        return self._faults[what.control_key]

    def _fault(self, what: Contender) -> str | None:
        control = what.never(self.subject, self.steps)
        if control is None:
            return None
        first = [self.first]
        with self.lock.read_lock(), control:
            never = self.subject.generate(first, self.steps).images
        if not torch.equal(never, self.alone[self.steps]):
            return "reusing nothing, it still changes the output"
        return self._trace()

    def _trace(self) -> str | None:
        """What is wrong with the pipeline, now that nothing is on it."""
        output = self._generate([self.first], FEW_STEPS)[0]
        return None if torch.equal(output.images, self.alone[FEW_STEPS]) else "it leaves a changed pipeline behind"

    def _fill(self, what: Contender, label: str, facts: dict[str, Any]) -> dict[str, Tensor]:
        """Rows, work and the images of this share."""
        leads = facts["problem"] is None and self.job.ranks.index == 0
        pairs = self.job.config["timing"]["pairs"] if leads else 0
        if pairs and isinstance(what, Uncached):
            pairs = 0
            with self.timing_lock():
                facts["peak_memory"] = peak_memory(lambda: self.subject.generate([self.first], self.steps))
        output, works, bytes_, reads, timed = self.generate(what, label, pairs)
        trace = self._trace()
        if trace is not None:
            facts["problem"] = trace
            return {}
        finite = finite_samples(output.images)
        if not finite.all():
            facts["problem"] = f"{int((~finite).sum())} of {len(finite)} outputs hold values that are not finite"
            return {}
        facts |= {
            "rows": self._rows(output, works),
            "cache_bytes": bytes_,
            "host_syncs": reads - (self.plain.reads or 0),
            "heatmap": self._heatmap(works),
            **timed,
        }
        images = {"candidate": output.images.half(), "reference": self.uncached.images.half()}
        return images | self._features(output)

    def _rows(self, output: Output, works: Sequence[Observed]) -> list[dict[str, Any]]:
        found = metrics.per_sample(
            self.names,
            output.images,
            self.uncached.images,
            candidate_latents=output.latents,
            reference_latents=self.uncached.latents,
            prompts=[str(sample.prompt) for sample in self.samples],
            labels=[sample.prompt for sample in self.samples] if self.subject.classes else None,
            settings=self.settings,
        )
        rows = []
        whole = sum(map(sum, self._shares([self.plain])))
        for i, (sample, work) in enumerate(zip(self.samples, works, strict=True)):
            row = {"index": sample.index, "prompt": str(sample.prompt), "seed": sample.seed}
            row |= {name: values[i] for name, values in found.items()}
            nfe_ratio = work.block_flops / self.plain.block_flops
            row |= {"flops": work.flops, "flops_ratio": work.flops / self.plain.flops}
            row |= {"nfe": self.steps * nfe_ratio, "nfe_ratio": nfe_ratio}
            row["blocks_ratio"] = sum(map(sum, self._shares([work]))) / whole
            rows.append(row)
        return rows

    def _features(self, output: Output) -> dict[str, Tensor]:
        if not self.job.config["metrics"]["distribution"]:
            return {}
        return {"features": distribution.features(self.subject.name, output.images, self.settings)}

    def _shares(self, works: Sequence[Observed]) -> list[list[float]]:
        """Share of each block's usual operations that each step executed, [steps][blocks], a mean over samples.

        Usual is the most of any uncached step, for some blocks run in a part of them only.
        """
        usual = [max(column) for column in zip(*(work.block_flops or () for work in self.plain.steps), strict=True)]
        shares = []
        for step in range(min(len(work.steps) for work in works)):
            executed = zip(*(work.steps[step].block_flops or () for work in works), strict=True)
            shares.append([fmean(column) / full if full else 0.0 for column, full in zip(executed, usual, strict=True)])
        return shares

    def _heatmap(self, works: Sequence[Observed]) -> dict[str, Any]:
        computed = [[round(share, 4) for share in shares] for shares in self._shares(works)]
        return {"rows": list(self.subject.blocks), "computed": computed}

    def _timed(
        self, what: Contender, setting: ExitStack, pairs: int, label: str
    ) -> tuple[dict[str, Any], dict[int, Output]]:
        """Facts of paired timing of single samples' generations, and outputs of it by the sample's place.

        The cache is put on anew for every pair, and left on after the last. Before each timed run goes an untimed one:
        a few steps uncached, and with the cache another sample, for what it learns or compiles in its first run is told
        apart. Outputs are those of contenders whose work is the same for all samples: nothing is counted here. Without
        pairs the cache is put on for one such first run.
        """
        if not pairs:
            setting.enter_context(what.applied(self.subject, self.steps))
            first = self._generate([self.samples[0]], what.steps(self.steps))[0]
            return {}, {0: first} if what.batchable and what.uniform else {}
        first_runs: list[float] = []
        outputs: dict[int, Output] = {}
        place = 0

        def plain() -> None:
            self.subject.generate([self.samples[place]], self.steps)

        def cached() -> None:
            outputs[place] = self.subject.generate([self.samples[place]], what.steps(self.steps))

        def take_off() -> None:
            nonlocal place
            setting.close()
            self.subject.generate([self.first], FEW_STEPS)
            place = (2 * len(first_runs)) % len(self.samples)

        def put_on() -> None:
            nonlocal place
            timed, place = place, (place + 1) % len(self.samples)
            setting.enter_context(what.applied(self.subject, self.steps))
            first_runs.append(elapsed(cached)[0])
            place = timed

        self.progress(f"{label}: timing", 0, 1)
        with self.timing_lock():
            timing = paired(plain, cached, pairs, warmup=0, before_a=take_off, before_b=put_on)
            peak = peak_memory(cached)
        facts = {"timing": timing_facts(timing), "peak_memory": peak, "first_run_seconds": first_runs[0]}
        return facts, outputs if what.batchable and what.uniform else {}

    def timing_lock(self) -> AbstractContextManager[Any]:
        """The device for this process alone; processes that share a CPU have a core each, and compare its time."""
        return self.lock.read_lock() if self.subject.device == "cpu" else self.lock.write_lock()


def finite_samples(images: Tensor) -> Tensor:
    """Whether all values of each sample are finite, [n]."""
    return torch.isfinite(images).flatten(1).all(1)


def peak_memory(call: Callable[[], object]) -> int | None:
    """The most bytes that are allocated on the GPU while call() runs, weights included; None where none is in use."""
    if not torch.cuda.is_initialized():
        return None
    torch.cuda.reset_peak_memory_stats()
    call()
    return torch.cuda.max_memory_allocated()


def timing_facts(timing: PairedTiming) -> dict[str, Any]:
    """The ratios uncached / this of a summary."""
    ratios = sorted(timing.wall_ratios)
    return {
        "speed_ratio": timing.wall_ratio,
        "speed_low": ratios[0],
        "speed_high": ratios[-1],
        "cpu_ratio": timing.cpu_ratio,
        "seconds": timing.b_seconds,
    }


def device_lock(device: torch.device | str) -> ReadWriteLock:
    """Shared while something is generated on a device, and one's own while something is timed on it."""
    kind, _, index = str(device).partition(":")
    user = os.getuid() if hasattr(os, "getuid") else getuser()
    return ReadWriteLock(Path(tempfile.gettempdir()) / f"diffusion_cache-{user}-{kind}{index or 0}.lock")
