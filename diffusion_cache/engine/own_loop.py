"""Runs of a user's own loop: of several denoisers at a time, in generators, left in any order."""

import sys
from typing import TYPE_CHECKING

from torch import nn

from .intercept import is_intercepted
from .patches import ACTIVE, active_runs

if TYPE_CHECKING:
    from .cache_run import CacheRun


def enter(run: "CacheRun") -> None:
    """Be the innermost run of this thread or task; calls of other denoisers go on to those around it."""
    run.around = ACTIVE.get()
    ACTIVE.set(run)


def leave(run: "CacheRun", denoiser: nn.Module) -> None:
    """Take a run out from among the active ones, telling where calls of its denoiser may have gone elsewhere."""
    within = []
    for active in active_runs():
        if active is run:
            break
        within.append(active)
    else:
        run.warn(
            "this run was left in another thread or task than it was entered in (a generator whose steps are made in "
            "different ones, say): what was called there ran without the cache. Make all calls in one"
        )
        return
    if within:
        within[-1].around = run.around
    else:
        ACTIVE.set(run.around)
    if any(is_intercepted(denoiser, active.session) for active in within):
        run.warn(
            "two runs of one denoiser took turns in one thread, so that calls of one were taken for the other's: give "
            "each a thread or task of its own, or end one before the next begins"
        )
    elif not run.records and sys.exc_info()[0] is None:
        run.warn("the denoiser was not called in this run: calls in another thread or task run without the cache")
