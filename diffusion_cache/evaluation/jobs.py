"""Running jobs: which of their runs are still to be made, where, and the results put together."""

import contextlib
import gc
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from ..files import read_tensors
from ..plain import check_count
from ..processes import PATIENCE
from . import distribution, metrics
from .contenders import DEFAULT_SCOPE, contender
from .runner import Job, Maker, Progress, Ranks, Worker
from .runs import RATIOS, extremes
from .store import Store

ANY_STEPS = 100  # to look at settings with, before the model and so its number of steps is known
RESTART = "The same command goes on from there"


class Team:
    """The processes of an `accelerate launch`, or this one alone. The first decides, and puts results together."""

    def __init__(self) -> None:
        from accelerate import PartialState

        self._state = PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)
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
    _check_numbers(job.config)
    steps = job.config["steps"] or ANY_STEPS
    for node in nodes:  # settings that cannot work come to light before hours are spent on others
        contender(node, job.config["forecaster"], steps)
    configs = [job.run_config(node) for node in nodes]
    todo = team.told([node for node, config in zip(nodes, configs, strict=True) if not store.is_finished(config)])
    if todo:
        with ExitStack() as claims:
            if team.leads:
                for node in todo:
                    claims.enter_context(store.claimed(job.run_config(node)))
            # another sweep may have finished some of them before they were claimed
            todo = team.told([node for node in todo if not store.is_finished(job.run_config(node))])
            work = _work_apart if job.is_rival else _work_here
            refused = team.told(work(job, todo, store, progress, team)) if todo else {}
            left_out = [job.run_config(todo[place]) for place in refused]
            if team.leads:
                for config in left_out:
                    shutil.rmtree(store.partial(config))
            for reason in dict.fromkeys(refused.values()):
                progress(f"left out: {reason}", 0, 0)
            configs = [config for config in configs if config not in left_out]
    return [store.path(config) for config in configs]


def _check_numbers(config: Mapping[str, Any]) -> None:
    """ConfigError for numbers that cannot be."""
    given = {
        "steps": (config["steps"], 1, True),
        "batch": (config["batch"], 1, False),
        "threads": (config["threads"], 1, False),
        "timing.pairs": (config["timing"]["pairs"], 0, False),
        "prompts.first_seed": (config["prompts"]["first_seed"], 0, False),
    }
    for name, (value, least, optional) in given.items():
        if not (value is None and optional):
            check_count(name, value, least)
    names = config["metrics"]["names"]
    if not isinstance(names, list):
        raise ConfigError(f"metrics.names must be a list of metrics, not {names!r}")


def _worker(job: Job, store: Store, progress: Progress) -> Maker:
    if job.config["model"]["kind"] == "random":
        from .speed import SpeedWorker

        return SpeedWorker(job, store, progress)
    return Worker(job, store, progress)


def _work_here(
    job: Job, todo: Sequence[Mapping[str, Any]], store: Store, progress: Progress, team: Team
) -> dict[int, str]:
    """Make what can run; of the rest, by their places in `todo`, why they cannot."""
    worker = _worker(job, store, progress)
    refused = worker.refused(todo)
    for place, node in enumerate(todo):
        if place in refused:
            continue
        worker.make(node)
        team.meet()
        if team.leads:
            put_together(job, node, store)
        team.meet()
    return refused


def _work_apart(
    job: Job, todo: Sequence[Mapping[str, Any]], store: Store, progress: Progress, team: Team
) -> dict[int, str]:
    """In a process of its own: rivals change classes, and what one leaves behind must not reach the next."""
    task = {
        "config": job.config,
        "folder": str(job.folder),
        "ranks": [job.ranks.index, job.ranks.count],
        "todo": list(todo),
    }
    command = [sys.executable, "-m", f"{__package__}.child"]
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()  # the child needs it now
    # no multiprocessing: a launcher's workers may have set it up in ways of their own
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8")
    assert process.stdin is not None
    assert process.stdout is not None
    refused: dict[int, str] = {}
    try:
        with contextlib.suppress(BrokenPipeError):  # it could not even start: its exit code says so below
            json.dump(task, process.stdin)
            process.stdin.close()
        ended = False
        for line in process.stdout:
            try:
                kind, *content = json.loads(line)
            except ValueError:
                continue  # something printed before the child had taken its output for itself
            if kind == "progress":
                progress(*content)
            elif kind == "made":
                if team.ranks.count == 1:
                    put_together(job, todo[content[0]], store)
            elif kind == "refused":
                refused[content[0]] = content[1]
            elif kind == "error":
                raise ConfigError(content[0])
            else:
                ended = True
                break
        if not ended:
            raise ConfigError(
                f"the process that ran {job.config['method']['peer']} ended with code {process.wait()} and did not say "
                f"why. {RESTART}"
            )
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()
    team.meet()
    if team.ranks.count > 1:
        if team.leads:
            for place, node in enumerate(todo):
                if place not in refused:
                    put_together(job, node, store)
        team.meet()
    return refused


def put_together(job: Job, node: Mapping[str, Any], store: Store) -> None:
    """Complete a run from the parts that all processes have made of it."""
    config = job.run_config(node)
    parts = []
    for index in range(job.ranks.count):
        path = store.part(config, index, job.ranks.count)
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
    ordered = [(parts[number][0], place) for number, place in places]
    problem = next((fact["problem"] for fact in facts if fact["problem"]), None)
    images = {}
    if problem is None and rows:
        images = _extremes(rows, ordered)
    store.finish(config, rows, _summary(config, facts, rows, problem, ordered), images, facts[0]["environment"])


def _extremes(
    rows: Sequence[Mapping[str, Any]], found: Sequence[tuple[Mapping[str, Tensor], int]]
) -> dict[str, Tensor]:
    """The median and the worst sample by PSNR, as generated and uncached."""
    images = {}
    for name, i in extremes([row.get("psnr") for row in rows]).items():
        tensors, place = found[i]
        for side in ("reference", "candidate"):
            images[f"{name}.{side}"] = tensors[side][place].float()
    return images


def _mean_heatmap(facts: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Over all processes, each with its share of the samples."""
    found = [(len(fact["rows"]), fact["heatmap"]) for fact in facts if fact.get("heatmap")]
    if not found:
        return None
    count = sum(rows for rows, _ in found)
    steps = zip(*(heatmap["computed"] for _, heatmap in found), strict=True)
    weights = [rows / count for rows, _ in found]
    computed = [
        [round(sum(w * x for w, x in zip(weights, shares, strict=True)), 4) for shares in zip(*step, strict=True)]
        for step in steps
    ]
    return {"rows": found[0][1]["rows"], "computed": computed}


def _summary(
    config: Mapping[str, Any],
    facts: Sequence[Mapping[str, Any]],
    rows: Sequence[Mapping[str, Any]],
    problem: str | None,
    ordered: Sequence[tuple[Mapping[str, Tensor], int]],
) -> dict[str, Any]:
    lead = facts[0]
    timing = lead.get("timing") or {}
    summary = {
        "model": config["model"]["name"] + (" (tiny)" if config["model"].get("tiny") else ""),
        "sampler": lead["sampler"],
        "scope": lead["scope"] or DEFAULT_SCOPE,
        "kind": lead["kind"],
        "method": lead["method"],
        "settings": lead["settings"],
        "steps": lead["steps"],
        "n": len(rows),
        "correct": problem is None,
        "problem": problem,
        "random_weights": lead.get("random_weights", False),
        "quality_only": not timing,
        "device": lead.get("device"),
        **{name: _mean([row[name] for row in rows]) for name in RATIOS},
        **{name: lead[name] for name in RATIOS if name in lead},
        "nfe": _mean([row["nfe"] for row in rows]),
        "speed_ratio": None,
        **timing,
        **{key: lead.get(key) for key in ("first_run_seconds", "cache_bytes", "host_syncs", "peak_memory")},
        "cpu_seconds": sum(fact["cpu_seconds"] for fact in facts),  # that making it took
        "heatmap": _mean_heatmap(facts),
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
    if ordered and "features" in ordered[0][0]:
        features = torch.stack([tensors["features"][place] for tensors, place in ordered])
        summary["distribution"] = distribution.scores(config["model"]["name"], features, config["metrics"]["settings"])
    summary["distribution"]["class_accuracy"] = summary["metrics"].get("class_correct", {}).get("mean")
    return summary


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
