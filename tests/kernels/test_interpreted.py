"""The kernels' tests, run by Triton's interpreter in a process of their own."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def pytest_of(*arguments, **environment):
    """How many tests of another process have passed; none may fail."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    result = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return int(re.search(r"(\d+) passed", result.stdout).group(1))


def test_kernels_equal_their_references(request):
    full = ["--full"] if request.config.getoption("--full") else []
    assert pytest_of("tests/kernels/ops", *full, TRITON_INTERPRET="1") >= (200 if full else 60)


def test_the_engine_gives_the_same_with_kernels():
    """Whole generations, and contract tests of one model with branches that are stacked and one without."""
    contracts = "tests/contracts/test_invariants.py"
    chosen = "same_output or (identical and (flux-digits-mask or wan-moving-digits-first_block))"
    modes = dict(TRITON_INTERPRET="1", DIFFUSION_CACHE_KERNELS="interpret")
    assert pytest_of("tests/kernels/engine", contracts, "-k", chosen, **modes) >= 6
