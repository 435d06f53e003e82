"""Reference-counted patches of class attributes.

An instance's `__call__` is never reached by calling it, and an instance's own `step` breaks diffusers' signature
checks, so brackets go on classes. They route through the active run, so that a patched class behaves as before for
every other instance.
"""

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

# the CacheRun that the current thread or task is inside of
ACTIVE: ContextVar[Any] = ContextVar("diffusion_cache_active_run", default=None)

_lock = threading.RLock()
_patches: dict[tuple[type, str], "_Patch"] = {}


def active_runs() -> Iterator[Any]:
    """The runs that the current thread or task is inside of, the innermost first."""
    run = ACTIVE.get()
    while run is not None:
        yield run
        run = getattr(run, "outer", None)


class _Patch:
    def __init__(self, cls: type, attribute: str, make: Callable[[Callable], Callable]):
        self.cls, self.attribute, self.count = cls, attribute, 0
        self.own = attribute in vars(cls)
        self.original = getattr(cls, attribute)
        self.enabled = True
        inner = make(self.original)

        @functools.wraps(self.original)
        def patched(*args: Any, **kwargs: Any) -> Any:
            # someone may have wrapped us, so that we could not be taken out again
            return (inner if self.enabled else self.original)(*args, **kwargs)

        self.patched = patched
        setattr(cls, attribute, patched)

    def restore(self) -> None:
        self.enabled = False
        if vars(self.cls).get(self.attribute) is not self.patched:
            return
        if self.own:
            setattr(self.cls, self.attribute, self.original)
        else:
            delattr(self.cls, self.attribute)


def acquire(cls: type, attribute: str, make: Callable[[Callable], Callable]) -> None:
    """Patch cls.attribute with make(original), or count one more user of the patch that is there."""
    with _lock:
        if (cls, attribute) not in _patches:
            _patches[cls, attribute] = _Patch(cls, attribute, make)
        _patches[cls, attribute].count += 1


def release(cls: type, attribute: str) -> None:
    """Give up one use of a patch; the last one restores the class."""
    with _lock:
        patch = _patches[cls, attribute]
        patch.count -= 1
        if patch.count == 0:
            del _patches[cls, attribute]
            patch.restore()


@contextmanager
def patched(cls: type, name: str, make: Callable[[Callable], Callable]) -> Iterator[None]:
    """A method of a class is make(method) inside the block; blocks of one method must nest."""
    own, original = vars(cls).get(name), getattr(cls, name)
    setattr(cls, name, functools.wraps(original)(make(original)))
    try:
        yield
    finally:
        if own is not None:
            setattr(cls, name, own)
        else:
            delattr(cls, name)


@contextmanager
def wrapped_step(scheduler: Any, make: Callable[[Callable], Callable]) -> Iterator[None]:
    """`scheduler.step` is make(step) inside the block, and its class's for every other instance as before.

    On its class, for pipelines look at the signature of an instance's own.
    """

    def for_this(original: Callable) -> Callable:
        inner = make(original)

        def step(self: Any, *args: Any, **kwargs: Any) -> Any:
            return (inner if self is scheduler else original)(self, *args, **kwargs)

        return step

    with patched(type(scheduler), "step", for_this):
        yield
