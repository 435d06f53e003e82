"""The kernels' tests, run by Triton's interpreter in a process of their own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def pytest_of(*arguments, **environment):
    """How many tests of another process have passed; none may fail or be skipped."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    result = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "skipped" not in result.stdout, result.stdout
    return int(re.search(r"(\d+) passed", result.stdout).group(1))


@pytest.mark.parametrize("share", ["not full", pytest.param("full", marks=pytest.mark.full)])
def test_kernels_equal_their_references(share):
    assert pytest_of("tests/kernels/ops", "-m", share, TRITON_INTERPRET="1") >= 60


def test_the_engine_gives_the_same_with_kernels():
    assert pytest_of("tests/kernels/engine", DIFFUSION_CACHE_KERNELS="interpret") >= 5
