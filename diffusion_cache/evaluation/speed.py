"""Speed of full-size architectures with random weights, whose images would mean nothing: a bare denoiser in a loop."""

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from .. import api
from ..errors import ConfigError, DiffusionCacheError, DiffusionCacheWarning
from ..measure import elapsed, executed_flops, paired
from .architectures import architecture
from .contenders import Contender, FewerSteps, Ours, Uncached, contender
from .runner import Job, Progress, Spent, device_lock, is_of_the_machine, timing_facts
from .store import Store, environment_facts, read_tensors, write_tensors
from .subjects import DTYPES, device_name, device_of


class SpeedWorker:
    """As `runner.Worker`, without outputs: the sampler is an Euler loop over the architecture's own inputs."""

    def __init__(self, job: Job, store: Store, progress: Progress):
        self.spent = Spent()
        torch.set_num_threads(job.config["threads"])
        model = job.config["model"]
        if job.ranks.count > 1:
            raise ConfigError("random weights are for timing, which one process does alone: leave accelerate out")
        if model["dtype"] not in DTYPES:
            raise ConfigError(f"model.dtype must be one of {', '.join(DTYPES)}, not {model['dtype']!r}")
        self.job, self.store, self.progress = job, store, progress
        self.architecture = architecture(model["name"])
        self.steps: int = job.config["steps"] or self.architecture.steps
        self.options = {
            "device": device_of(model["device"]),
            "dtype": DTYPES[model["dtype"]],
            "tiny": model["tiny"],
        }
        progress("building the denoiser", 0, 1)
        self.denoiser: Any = self.architecture.build(**self.options)
        self.lock = device_lock(self.options["device"])

    def why_not(self, node: Mapping[str, Any]) -> str | None:
        if "system" in node:
            return "random weights have no pipeline, which published systems run on"
        return "random weights have no norms to be measured" if node.get("norms") else None

    @torch.no_grad()
    def loop(self, steps: int, between: Callable[[], object] | None = None) -> torch.Tensor:
        """One generation; the last step's output."""
        calls = self.architecture.calls(**self.options, batch=self.job.config["model"]["batch"])
        for step in range(steps):
            if between is not None:
                between()
            outputs = [self.denoiser(**call)[0] for call in calls]
            calls = self.architecture.advance(calls, outputs, step, steps)
        return outputs[0]

    def cached_loop(self, options: Mapping[str, Any], steps: int) -> tuple[torch.Tensor, api.Summary]:
        with api.run(self.denoiser, **options, num_steps=steps) as run:
            output = self.loop(steps, run.next_step)
            return output, run.summary()

    def make(self, node: Mapping[str, Any]) -> None:
        config = self.job.run_config(node)
        path = self.store.part(config, self.job.ranks.index, self.job.ranks.count)
        if read_tensors(path) is not None:
            return
        what = contender(node, self.job.config["forecaster"], self.steps)
        self.progress(f"{what.method}: timing", 0, 1)
        facts: dict[str, Any] = {
            "steps": what.steps(self.steps),
            "sampler": "Euler",
            "kind": what.kind,
            "method": what.method,
            "settings": dict(what.settings),
            "scope": what.scope,
            "rows": [],
            "problem": None,
            "random_weights": True,
            "device": device_name(self.options["device"]),
            "environment": environment_facts(),
        }
        try:
            facts |= self._measured(what)
        except DiffusionCacheError:
            raise
        except Exception as error:
            if is_of_the_machine(error):
                raise
            facts["problem"] = f"failed: {type(error).__name__}: {error}"
        if facts["problem"]:
            warnings.warn(
                f"{self.architecture.name}, {what.method}: {facts['problem']}", DiffusionCacheWarning, stacklevel=2
            )
        facts["cpu_seconds"] = self.spent()
        write_tensors(path, {"none": torch.zeros(0)}, facts)

    def _measured(self, what: Contender) -> dict[str, Any]:
        plain = partial(self.loop, self.steps)
        if isinstance(what, Uncached):
            return {"flops_ratio": 1.0, "nfe_ratio": 1.0}
        with self.lock.write_lock():
            if isinstance(what, FewerSteps):
                fewer = what.steps(self.steps)
                share = fewer / self.steps
                timing = paired(plain, partial(self.loop, fewer), self.job.config["timing"]["pairs"] or 1)
                return {"flops_ratio": share, "nfe_ratio": share, "timing": timing_facts(timing)}
            assert isinstance(what, Ours)
            if not torch.equal(self.cached_loop(what.control, self.steps)[0], plain()):
                return {"problem": "reusing nothing, it still changes the output"}
            whole = executed_flops(plain)
            cached = partial(self.cached_loop, what.options, self.steps)
            runs = []
            seconds, _ = elapsed(lambda: runs.append(cached()))
            output, summary = runs[0]
            if not torch.isfinite(output).all():
                return {"problem": "the output holds values that are not finite"}
            flops = executed_flops(cached)
            timing = paired(plain, cached, self.job.config["timing"]["pairs"] or 1)
        return {
            "timing": timing_facts(timing),
            "flops_ratio": flops / whole,
            "nfe_ratio": flops / whole,  # of the whole denoiser: its blocks are not counted apart here
            "cache_bytes": summary.cache_bytes,
            "first_run_seconds": seconds,
        }
