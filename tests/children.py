"""Processes that tests start."""

import signal


def interruptible():
    """Ctrl-C reaches the process even where it is ignored here, as in a shell's background job."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
