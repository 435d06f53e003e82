"""What is enabled on one pipeline: how it is found there, bracketed, and taken off exactly."""

import itertools
import warnings
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from torch import nn

from ..errors import DiffusionCacheWarning
from . import patches
from .intercept import sessions_on
from .patches import ACTIVE

SESSION = "_diffusion_cache"

_tokens = itertools.count()


class Attached(ABC):
    """Base of the sessions; one that is enabled replaces the one that was.

    last_run: the run that ended last, if any. A subclass undoes in `_detach` whatever it has installed.
    """

    last_run: Any = None
    others_told = False

    def __init__(self) -> None:
        self.token = next(_tokens)
        self._owner: weakref.ref[Any] | None = None
        self._finalizer: weakref.finalize | None = None
        self._patched: list[tuple[type, str]] = []

    def __reduce__(self) -> tuple:
        # a copied or pickled pipeline comes out uncached: its modules carry no interceptors either
        return (type(None), ())

    @abstractmethod
    def begin(self, pipe: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Start a run of the pipeline, called with these arguments; None to run it uncached.

        Patches of classes look at a run's `session`, `pipe` (a weak reference), `any_scheduler`, `pass_name` and
        `has_part(pipe)`.
        """

    @abstractmethod
    def finish(self, run: Any) -> None:
        """The pipeline's call is over, or has raised."""

    def _settle(self, pipe: Any) -> None:
        """Everything is installed: be the pipeline's session, in place of the one it had."""
        previous = session_of(pipe)
        object.__setattr__(pipe, SESSION, self)
        self._owner = weakref.ref(pipe)
        # modules may be shared and outlive a pipeline that is dropped without disable
        self._finalizer = weakref.finalize(pipe, self._detach)
        self._finalizer.atexit = False
        if previous is not None:
            previous.detach_pipeline(pipe)

    def detach_pipeline(self, pipe: Any) -> None:
        """Undo the attaching: modules, classes and the pipeline itself are as before."""
        self._detach()
        if self._finalizer is not None:
            self._finalizer.detach()
        if vars(pipe).get(SESSION) is self:
            del vars(pipe)[SESSION]

    def _patch(self, cls: type, attribute: str, make: Callable[[Callable], Callable]) -> None:
        if (cls, attribute) not in self._patched:
            patches.acquire(cls, attribute, make)
            self._patched.append((cls, attribute))

    def _detach(self) -> None:
        while self._patched:
            patches.release(*self._patched.pop())


def session_of(pipe: Any) -> Any:
    """The session that is enabled on this very pipeline, or None; a shallow copy has none of its own."""
    session = getattr(pipe, "__dict__", {}).get(SESSION)
    return session if session is not None and session._owner is not None and session._owner() is pipe else None


def _tell_uncached(pipe: Any) -> None:
    """Tell once where a pipeline runs without the cache that is enabled on another one, whose modules it has."""
    shared = [session for part in vars(pipe).values() if isinstance(part, nn.Module) for session in sessions_on(part)]
    for session in [vars(pipe).get(SESSION), *shared]:
        owner = session._owner() if isinstance(session, Attached) and session._owner is not None else None
        if owner is None or owner is pipe or session_of(owner) is not session or session.others_told:
            continue
        session.others_told = True
        warnings.warn(
            f"this {type(pipe).__name__} has modules of a {type(owner).__name__} that a cache is enabled on, and runs "
            "without it: enable one on this pipeline too",
            DiffusionCacheWarning,
            stacklevel=4,
        )


def bracket(original: Callable) -> Callable:
    """A pipeline's `__call__` as a run, where this very pipeline has a session."""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        session = session_of(self)
        active = ACTIVE.get()
        if session is not None and active is not None and active.session is session:
            return original(self, *args, **kwargs)
        if session is not None:
            run = session.begin(self, args, kwargs)
        elif active is not None and active.has_part(self):
            run = active.session.begin_part(active, self, args, kwargs)
        else:
            # an uncached pipeline inside another's run (in a callback, say) has no part in it; inside dc.run it has
            run = active if active is not None and active.any_scheduler else None
            if run is None:
                _tell_uncached(self)
        token = ACTIVE.set(run)
        try:
            return original(self, *args, **kwargs)
        finally:
            ACTIVE.reset(token)
            if run is not None and run is not active:
                run.session.finish(run)

    return __call__
