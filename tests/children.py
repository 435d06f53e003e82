"""Processes that tests start."""

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


def pytest_of(*arguments, **environment):
    """How many tests of another process have passed; none may fail."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    result = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return int(re.search(r"(\d+) passed", result.stdout).group(1))
