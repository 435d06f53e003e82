"""What was found for a pipeline, kept in the user's cache folder, one small JSON file each.

That is the platform's folder for caches, or the one that DIFFUSION_CACHE_FOLDER names; where it is set to nothing,
nothing is read or stored.
"""

import json
import os
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigError, DiffusionCacheWarning
from ..files import written
from ..plain import Fields, integer, number, plain_json, text

VARIABLE = "DIFFUSION_CACHE_FOLDER"
FORMAT = "diffusion_cache tuned 1"


@dataclass(frozen=True)
class Tuned:
    """What a policy's tuned field was found to be. reuse: the share of the steps that it reuses; tried: values."""

    value: float
    reuse: float
    steps: int
    tried: int


def folder() -> Path | None:
    """Where such files are; None where they are switched off."""
    named = os.environ.get(VARIABLE)
    if named is not None:
        return Path(named).expanduser() if named else None
    if sys.platform == "darwin":
        base = Path("~/Library/Caches")
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or "~/AppData/Local")
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    return base.expanduser() / "diffusion_cache"


def kept(key: str) -> Tuned | None:
    """What was stored under a key. A file that cannot be read, or is of something else, is ignored with a warning."""
    place = folder()
    path = place / f"{key}.json" if place is not None else None
    if path is None or not path.is_file():
        return None
    try:
        fields = Fields(json.loads(path.read_text(encoding="utf-8")), path.name)
        if fields("format", text) != FORMAT:
            raise ConfigError("it is in another format")
        found = Tuned(
            fields("value", number), fields("reuse", number), fields("steps", integer), fields("tried", integer)
        )
        fields.end()
        if not (found.value >= 0 and 0 <= found.reuse <= 1 and found.steps > 0):
            raise ConfigError("its numbers cannot be")
        return found
    except (OSError, ValueError, RecursionError, ConfigError) as error:
        _warn(f"{path} is ignored, as it does not hold what was found for this pipeline: {error}")
        return None


def keep(key: str, found: Tuned) -> Path | None:
    """Store it, whole or not at all; where that cannot be done, warn and give None."""
    place = folder()
    if place is None:
        return None
    path = place / f"{key}.json"
    try:
        place.mkdir(parents=True, exist_ok=True)
        with written(path) as draft:
            draft.write_text(json.dumps({"format": FORMAT, **plain_json(vars(found))}), encoding="utf-8")
    except OSError as error:
        _warn(f"what was found cannot be kept for later: {error}. Name another folder in {VARIABLE}")
        return None
    return path


def _warn(message: str) -> None:
    warnings.warn(message, DiffusionCacheWarning, stacklevel=3)
