"""Files that are there whole or not at all, whenever a process is stopped."""

import json
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """A draft to write inside the block, which takes the path's place at its end.

    An exception leaves what was there before, and no draft.
    """
    draft = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        yield draft
        draft.replace(path)
    except BaseException:
        with suppress(OSError):
            draft.unlink()
        raise


def write_tensors(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any] | None = None) -> None:
    """Write tensors, and facts as JSON beside them (with infinity and NaN as Python writes them), at once."""
    metadata = None if facts is None else {"facts": json.dumps(facts)}
    data = save({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, metadata)
    with written(path) as draft:
        draft.write_bytes(data)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """What `write_tensors` wrote; None where there is nothing, or nothing that can be read."""
    try:
        with safe_open(path, "pt") as file:
            facts = json.loads((file.metadata() or {}).get("facts", "{}"))
        return load_file(path), facts
    except (OSError, SafetensorError, ValueError):
        return None
