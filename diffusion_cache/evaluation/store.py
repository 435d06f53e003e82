"""Where runs are kept: one folder per run, named by its configuration's hash, complete or not there at all."""

import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from .. import __version__
from ..errors import ConfigError
from ..files import write_tensors, written
from ..plain import digest
from . import environment

SUMMARY, CONFIG, ROWS, IMAGES, ENVIRONMENT = (
    "summary.json",
    "config.json",
    "rows.parquet",
    "images.safetensors",
    "environment.json",
)


def fingerprint(config: Mapping[str, Any]) -> str:
    """16 hex digits that a configuration and the version of this package determine.

    Raises:
        ConfigError: for a value that JSON cannot hold.
    """
    try:
        return digest({**config, "version": __version__})
    except TypeError as error:
        raise ConfigError(f"the configuration holds a value that cannot be stored as JSON: {error}") from error


def json_safe(value: Any) -> Any:
    """The value with what JSON cannot hold (infinity, NaN) as None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): json_safe(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_safe(item) for item in value]
    return value


def write_json(path: Path, value: Any) -> None:
    """Write at once: a reader, or a process that takes over, sees all of it or the file that was there before."""
    with written(path) as draft:
        draft.write_text(json.dumps(json_safe(value), indent=1) + "\n", encoding="utf-8")


def environment_facts() -> dict[str, Any]:
    """What a result depends on beside its configuration: versions, hardware, threads, commit."""
    return {
        "versions": environment.versions(),
        "cpu": environment.cpu_name(),
        "gpu": environment.gpu_names(),
        "threads": torch.get_num_threads(),
        "git": environment.git_commit(),
    }


class Store:
    """The folder of one experiment.

    A run is made in `runs/<hash>.partial` and gets its name when it is complete, so killing a process at any point
    leaves nothing that could be taken for a result; what a partial folder holds is used by whoever goes on.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.runs = folder / "runs"
        self.references = folder / "references"
        self.measured = folder / "profiles"
        self.locks = folder / ".locks"
        for path in (self.runs, self.references, self.measured, self.locks):
            try:
                path.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ConfigError(f"cannot write to {folder}: {error.strerror}; choose another with out=…") from error

    def path(self, config: Mapping[str, Any]) -> Path:
        return self.runs / fingerprint(config)

    def is_finished(self, config: Mapping[str, Any]) -> bool:
        return (self.path(config) / SUMMARY).is_file()

    def partial(self, config: Mapping[str, Any]) -> Path:
        """The folder that a run is made in."""
        folder = self.path(config).with_suffix(".partial")
        folder.mkdir(exist_ok=True)
        return folder

    def part(self, config: Mapping[str, Any], index: int, count: int) -> Path:
        """The file that one of `count` processes leaves its share of a run in."""
        return self.partial(config) / f"part-{index}of{count}.safetensors"

    @contextmanager
    def claimed(self, config: Mapping[str, Any]) -> Iterator[Path]:
        """The run's partial folder, for this process alone.

        Raises:
            ConfigError: if another process is at this very run.
        """
        lock = FileLock(self.locks / fingerprint(config))
        try:
            with lock.acquire(blocking=False):
                yield self.partial(config)
        except Timeout:
            raise ConfigError(
                f"another process is making run {fingerprint(config)} in {self.folder}: two sweeps share this folder. "
                "Wait for the other one, or give this one a folder of its own with out=…"
            ) from None

    def finish(
        self,
        config: Mapping[str, Any],
        rows: Sequence[Mapping[str, Any]],
        summary: Mapping[str, Any],
        images: Mapping[str, Tensor],
        environment: Mapping[str, Any],
    ) -> None:
        """Complete a run; the parts that it was made of are deleted."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        folder = self.partial(config)
        pq.write_table(pa.Table.from_pylist([dict(row) for row in rows]), folder / ROWS)
        write_json(folder / CONFIG, config)
        write_json(folder / ENVIRONMENT, environment)
        if images:
            write_tensors(folder / IMAGES, images)
        write_json(folder / SUMMARY, summary)
        final = self.path(config)
        if final.exists():  # damaged, or its summary was deleted to have the run made again
            shutil.rmtree(final)
        folder.rename(final)
        for part in final.glob("part-*"):
            part.unlink()

    def reference(self, key: Mapping[str, Any]) -> Path:
        """The file that a model's uncached outputs are kept in."""
        return self.references / f"{fingerprint(key)}.safetensors"

    def profiles(self, key: Mapping[str, Any]) -> Path:
        """The folder that profiles are kept in which published systems had measured of a model."""
        return self.measured / fingerprint(key)
