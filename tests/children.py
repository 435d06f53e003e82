"""Processes that tests start."""

import multiprocessing
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def interruptible():
    """Ctrl-C reaches the process even where it is ignored here, as in a shell's background job."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def forked(call, log, **environment):
    """A process that makes the call, in a group of its own; it has all that is imported here."""
    process = multiprocessing.get_context("fork").Process(target=_forked, args=(call, log, environment))
    process.start()
    return process


def _forked(call, log, environment):
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", **environment}
    sys.stdout = sys.stderr = open(log, "w", buffering=1)  # noqa: SIM115
    for stream in (1, 2):
        os.dup2(sys.stdout.fileno(), stream)
    call()


def pytest_of(*arguments, **environment):
    """How many tests of another process have passed; none may fail."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    result = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return int(re.search(r"(\d+) passed", result.stdout).group(1))
