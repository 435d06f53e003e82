"""Progress of a job on the terminal."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .interrupts import raise_dropped


@contextmanager
def announcing(console: Console, title: str, remaining: bool = False) -> Iterator[Callable[[str, int, int], None]]:
    """A function to be told what runs, how much of it is done, and of how much; 0 of 0 for a remark that stays.

    remaining: tell the time that is left as well, where what is done advances evenly.
    """
    bars = (TextColumn("{task.fields[title]}"), BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn())
    left = (TextColumn("left"), TimeRemainingColumn()) if remaining else ()
    with Progress(*bars, *left, TextColumn("{task.description}"), console=console, transient=True) as progress:
        task = progress.add_task("starting", title=escape(title), total=None)

        def announce(what: str, done: int, of: int) -> None:
            raise_dropped()
            if of == 0:
                progress.console.print(escape(what), soft_wrap=True)
            else:
                progress.update(task, description=escape(what), completed=done, total=of)

        yield announce
