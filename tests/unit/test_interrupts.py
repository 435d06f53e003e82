import contextlib
import io
import signal
import warnings
import weakref

import pytest
from rich.console import Console

from diffusion_cache.cli.interrupts import kept_interrupts, raise_dropped
from diffusion_cache.cli.progress import announcing


class Thing:
    pass


@pytest.fixture(autouse=True)
def default_handler():
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


def drop_an_interrupt():
    """Where Python cannot raise: in the callback of a weak reference."""
    thing = Thing()
    reference = weakref.ref(thing, lambda _: signal.raise_signal(signal.SIGINT))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pytest's, of an exception that nobody could catch
        del thing
    assert reference() is None


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_that_python_drops_ends_the_block():
    reached = []

    def block():
        with kept_interrupts():
            drop_an_interrupt()
            reached.append(True)

    with pytest.raises(KeyboardInterrupt):
        block()
    assert reached == [True]
    raise_dropped()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_it_is_raised_again_at_the_next_progress():
    announced = []

    def job():
        with kept_interrupts(), announcing(Console(file=io.StringIO()), "title") as progress:
            progress("one", 1, 3)
            announced.append(1)
            drop_an_interrupt()
            progress("two", 2, 3)
            announced.append(2)

    with pytest.raises(KeyboardInterrupt):
        job()
    assert announced == [1]


def test_an_interrupt_that_arrives_is_raised_once():
    with pytest.raises(KeyboardInterrupt), kept_interrupts():
        signal.raise_signal(signal.SIGINT)
    with kept_interrupts():
        raise_dropped()


def test_anothers_handler_is_left_alone():
    seen = []
    signal.signal(signal.SIGINT, lambda *_: seen.append(True))
    with kept_interrupts():
        signal.raise_signal(signal.SIGINT)
        raise_dropped()
    assert seen == [True]


@pytest.mark.parametrize("error", [AttributeError("torn"), SystemExit(1)], ids=["an error", "an exit"])
def test_an_interrupt_may_come_out_as_an_error_of_what_it_tore(error):
    def block(interrupted):
        with kept_interrupts():
            if interrupted:
                with contextlib.suppress(KeyboardInterrupt):
                    signal.raise_signal(signal.SIGINT)
            raise error

    with pytest.raises(KeyboardInterrupt):
        block(True)
    with pytest.raises(type(error)):
        block(False)
