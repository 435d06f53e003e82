"""Writing what a command has made: tried before anything is measured, and whole or not at all."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile

from ..errors import ConfigError
from ..files import written


def check_writable(folder: Path, other: str) -> None:
    """Make a folder, and see that files can be written there. other: see `write`."""
    with _told(folder, other):
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass


def write(path: Path, data: bytes | str, other: str) -> None:
    """Write a file at once, text as UTF-8. other: what to choose where it cannot be, as in "folder with --out".

    Raises:
        ConfigError: where it cannot be written.
    """
    with _told(path, other), written(path) as draft:
        draft.write_bytes(data.encode() if isinstance(data, str) else data)


@contextmanager
def _told(path: Path, other: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"cannot write to {path}: {error.strerror or error}; choose another {other}") from error
