"""A rival's process: reads a job from its standard input, runs it, and says on its standard output how it goes."""

import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import DiffusionCacheError
from .runner import Job, Ranks, Worker
from .store import Store
from .subjects import quieten_libraries


def run(task: dict[str, Any], say: Callable[..., None]) -> None:
    """Make the runs of `task`; say(kind, …) is told of progress, of each run made or refused, and of the end."""
    job = Job(task["config"], Path(task["folder"]), Ranks(*task["ranks"]))
    try:
        worker = Worker(job, Store(job.folder), lambda *news: say("progress", *news))
        refused = worker.refused(task["todo"])
        for place, node in enumerate(task["todo"]):
            if place in refused:
                say("refused", place, refused[place])
            else:
                worker.make(node)
                say("made", place)
        say("done")
    except KeyboardInterrupt:
        say("error", "interrupted")
    except DiffusionCacheError as error:
        say("error", str(error))
    except Exception as error:
        say("error", f"{type(error).__name__}: {error}\n{traceback.format_exc()}")


def main() -> None:
    messages = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is not for the parent
    quieten_libraries()

    def say(*message: Any) -> None:
        try:
            print(json.dumps(message), file=messages, flush=True)
        except OSError:
            os._exit(1)  # nobody listens: the parent is gone, and its claim on the runs with it

    run(json.load(sys.stdin), say)


if __name__ == "__main__":
    main()
