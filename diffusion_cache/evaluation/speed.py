"""Speed of full-size architectures with random weights, whose images would mean nothing: a bare denoiser in a loop."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from .. import api
from ..errors import ConfigError
from ..measure import elapsed, executed_flops, paired
from .architectures import architecture
from .contenders import Contender, FewerSteps, Ours, Uncached
from .runner import Job, Maker, Progress, Setting, device_lock, timing_facts
from .store import Store
from .subjects import DTYPES, device_of


class SpeedWorker(Maker):
    """As `runner.Worker`, without outputs: the sampler is an Euler loop over the architecture's own inputs."""

    def __init__(self, job: Job, store: Store, progress: Progress):
        super().__init__(job, store, progress)
        model = job.config["model"]
        if job.ranks.count > 1:
            raise ConfigError("random weights are for timing, which one process does alone: leave accelerate out")
        if model["dtype"] not in DTYPES:
            raise ConfigError(f"model.dtype must be one of {', '.join(DTYPES)}, not {model['dtype']!r}")
        self.architecture = architecture(model["name"])
        self.steps = job.config["steps"] or self.architecture.steps
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

    @property
    def setting(self) -> Setting:
        return Setting(self.architecture.name, "Euler", self.options["device"])

    def made(self, what: Contender, label: str, facts: dict[str, Any]) -> dict[str, torch.Tensor]:
        self.progress(f"{label}: timing", 0, 1)
        facts["random_weights"] = True
        facts |= self._measured(what)
        return {}

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
