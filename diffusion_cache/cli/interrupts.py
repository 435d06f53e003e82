"""Ctrl-C while a command runs."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_pressed = False


@contextmanager
def kept_interrupts() -> Iterator[None]:
    """Remember a Ctrl-C until the block has ended by it.

    Python drops a KeyboardInterrupt that is raised within a destructor or a weak reference's callback, and says so on
    stderr; a long run would go on. What was dropped is raised again by `raise_dropped` and at the end of the block,
    also where the code that it tore has ended the block with an error of its own.
    """
    global _pressed
    if threading.current_thread() is not threading.main_thread() or (
        signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    ):
        yield
        return

    def pressed(number: int, frame: Any) -> None:
        global _pressed
        _pressed = True
        raise KeyboardInterrupt

    _pressed = False
    signal.signal(signal.SIGINT, pressed)
    try:
        yield
        raise_dropped()
    except (Exception, SystemExit) as error:
        if _pressed:
            raise KeyboardInterrupt from error
        raise
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _pressed = False


def raise_dropped() -> None:
    """Raise the KeyboardInterrupt that something has dropped, if any."""
    if _pressed:
        raise KeyboardInterrupt
