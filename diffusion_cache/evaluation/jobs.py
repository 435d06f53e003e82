"""Running jobs: which of their runs are still to be made, where, and the results put together."""

import multiprocessing
import traceback
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from queue import Empty
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, DiffusionCacheError
from . import distribution, metrics
from .contenders import contender
from .runner import Job, Progress, Ranks, Worker
from .store import Store, read_tensors

POLL_SECONDS = 0.2
RATIOS = ("nfe_ratio", "flops_ratio", "blocks_ratio")
RESTART = "diffusion-cache evaluate continues where a sweep has stopped: give the same command again"


class Team:
    """The processes of an `accelerate launch`, or this one alone. The first decides, and puts results together."""

    def __init__(self) -> None:
        from accelerate import PartialState

        self._state = PartialState(cpu=not torch.cuda.is_available())
        self.ranks = Ranks(self._state.process_index, self._state.num_processes)

    @property
    def leads(self) -> bool:
        return self.ranks.index == 0

    def meet(self) -> None:
        if self.ranks.count > 1:
            self._state.wait_for_everyone()

    def told(self, value: Any) -> Any:
        """What the first process says."""
        if self.ranks.count == 1:
            return value
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([value])[0]


def run_job(job: Job, progress: Progress, team: Team) -> list[Path]:
    """Make the runs of a job that are not finished; returns the folders of all of them.

    Raises:
        ConfigError: for a configuration that cannot work, before anything is generated; if another process is at one
            of the runs; or as the job's process says.
    """
    store = Store(job.folder)
    nodes = job.nodes
    if job.is_rival and job.config["model"]["kind"] == "random":
        raise ConfigError("rivals are run on pipelines, which random weights have none of: see scripts/bench_gpu.py")
    steps = job.config["steps"] or 100
    for node in nodes:  # settings that cannot work come to light before hours are spent on others
        contender(node, job.config["forecaster"], steps)
    configs = [job.run_config(node) for node in nodes]
    todo = team.told([node for node, config in zip(nodes, configs, strict=True) if not store.is_finished(config)])
    if todo:
        with ExitStack() as claims:
            if team.leads:
                for node in todo:
                    claims.enter_context(store.claimed(job.run_config(node)))
            work = _work_apart if job.is_rival else _work_here
            refused = team.told(work(job, todo, store, progress, team))
            if refused is not None:
                progress(f"left out: {refused}", 0, 0)
                return []
    return [store.path(config) for config in configs]


def _worker(job: Job, store: Store, progress: Progress) -> Any:
    if job.config["model"]["kind"] == "random":
        from .speed import SpeedWorker

        return SpeedWorker(job, store, progress)
    return Worker(job, store, progress)


def _work_here(job: Job, todo: Sequence[Mapping[str, Any]], store: Store, progress: Progress, team: Team) -> str | None:
    make = _worker(job, store, progress).make
    for node in todo:
        make(node)
        team.meet()
        if team.leads:
            put_together(job, node, store)
        team.meet()
    return None


def _work_apart(
    job: Job, todo: Sequence[Mapping[str, Any]], store: Store, progress: Progress, team: Team
) -> str | None:
    """In a process of its own: rivals change classes, and what one leaves behind must not reach the next."""
    context = multiprocessing.get_context("spawn")
    messages: Any = context.Queue()
    process = context.Process(target=_child, args=(job, list(todo), messages), daemon=True)
    process.start()
    refused = None
    try:
        while True:
            try:
                kind, *content = messages.get(timeout=POLL_SECONDS)
            except Empty:
                if not process.is_alive() and messages.empty():
                    raise ConfigError(
                        f"the process that ran {job.config['method']['peer']} ended with code {process.exitcode} and "
                        f"said nothing. {RESTART}"
                    ) from None
                continue
            if kind == "progress":
                progress(*content)
            elif kind == "made":
                if team.ranks.count == 1:
                    put_together(job, todo[content[0]], store)
            elif kind == "refused":
                refused = content[0]
            elif kind == "error":
                raise ConfigError(content[0])
            else:
                break
        process.join()
    finally:
        if process.is_alive():
            process.terminate()
            process.join()
    team.meet()
    if refused is None and team.ranks.count > 1:
        if team.leads:
            for node in todo:
                put_together(job, node, store)
        team.meet()
    return refused


def _child(job: Job, todo: Sequence[Mapping[str, Any]], messages: Any) -> None:
    try:
        _quiet()
        worker = Worker(job, Store(job.folder), lambda *news: messages.put(("progress", *news)))
        reason = contender(todo[0], job.config["forecaster"], worker.steps).why_not(worker.subject)
        if reason is not None:
            messages.put(("refused", f"{job.config['method']['peer']} on {worker.subject.name}: {reason}"))
        else:
            for place, node in enumerate(todo):
                worker.make(node)
                messages.put(("made", place))
        messages.put(("done",))
    except KeyboardInterrupt:
        messages.put(("error", "interrupted"))
    except DiffusionCacheError as error:
        messages.put(("error", str(error)))
    except Exception as error:
        messages.put(("error", f"{type(error).__name__}: {error}\n{traceback.format_exc()}"))


def _quiet() -> None:
    """Leave out the libraries' remarks on optional packages and rounded sizes; errors still show."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()


def put_together(job: Job, node: Mapping[str, Any], store: Store) -> None:
    """Complete a run from the parts that all processes have made of it."""
    config = job.run_config(node)
    parts = []
    for index in range(job.ranks.count):
        path = store.partial(config) / f"part-{index}of{job.ranks.count}.safetensors"
        part = read_tensors(path)
        if part is None:
            raise ConfigError(f"{path} is missing or damaged. Delete {path.parent} and give the same command again")
        parts.append(part)
    facts = [part[1] for part in parts]
    rows: list[dict[str, Any]] = []
    places: list[tuple[int, int]] = []  # of each row, its part and its place in that
    for number, fact in enumerate(facts):
        places += [(number, i) for i in range(len(fact["rows"]))]
        rows += fact["rows"]
    order = sorted(range(len(rows)), key=lambda i: rows[i]["index"])
    rows, places = [rows[i] for i in order], [places[i] for i in order]
    problem = next((fact["problem"] for fact in facts if fact["problem"]), None)
    images = {}
    if problem is None and rows:
        images = _extremes(rows, [(parts[number][0], place) for number, place in places])
    store.finish(config, rows, _summary(job, config, facts, rows, problem, parts), images)


def _extremes(
    rows: Sequence[Mapping[str, Any]], found: Sequence[tuple[Mapping[str, Tensor], int]]
) -> dict[str, Tensor]:
    """The median and the worst sample by PSNR, as generated and uncached."""
    order = sorted(range(len(rows)), key=lambda i: (rows[i].get("psnr") is None, rows[i].get("psnr") or 0.0))
    chosen = {"worst": order[0], "median": order[len(order) // 2]}
    images = {}
    for name, i in chosen.items():
        tensors, place = found[i]
        for side in ("reference", "candidate"):
            images[f"{name}.{side}"] = tensors[side][place].float()
    return images


def _summary(
    job: Job,
    config: Mapping[str, Any],
    facts: Sequence[Mapping[str, Any]],
    rows: Sequence[Mapping[str, Any]],
    problem: str | None,
    parts: Sequence[tuple[Mapping[str, Tensor], Mapping[str, Any]]],
) -> dict[str, Any]:
    lead = facts[0]
    timing = lead.get("timing") or {}
    summary = {
        "model": config["model"]["name"],
        "sampler": lead["sampler"],
        "scope": lead["scope"] or "auto",
        "kind": lead["kind"],
        "method": lead["method"],
        "label": lead["method"],
        "settings": lead["settings"],
        "steps": lead["steps"],
        "n": len(rows),
        "correct": problem is None,
        "problem": problem,
        "random_weights": lead.get("random_weights", False),
        "quality_only": not timing,
        **{name: _mean([row[name] for row in rows]) for name in RATIOS},
        **{name: lead[name] for name in RATIOS if name in lead},
        "nfe": _mean([row["nfe"] for row in rows]),
        "speed_ratio": None,
        **timing,
        **{key: lead.get(key) for key in ("first_run_seconds", "cache_bytes", "host_reads", "peak_memory", "heatmap")},
        "metrics": {},
        "distribution": {},
    }
    if problem is not None:
        return summary
    if lead["method"] == "uncached":
        summary |= {"speed_ratio": 1.0, "cpu_ratio": 1.0}
    seeds = [row["seed"] for row in rows]
    for name in config["metrics"]["names"]:
        values = [row.get(name) for row in rows]
        if any(value is not None for value in values):
            summary["metrics"][name] = metrics.summarise(values, seeds, metrics.higher_is_better(name))
    features = [part[0]["features"] for part in parts if "features" in part[0]]
    if features:
        settings = config["metrics"]["settings"]
        summary["distribution"] = distribution.scores(config["model"]["name"], torch.cat(features), settings)
    summary["distribution"]["class_accuracy"] = summary["metrics"].get("class_correct", {}).get("mean")
    return summary


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
