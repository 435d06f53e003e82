"""The kernels' tests, run by Triton's interpreter in a process of their own."""

import pytest
from children import pytest_of

pytestmark = pytest.mark.slow


def test_kernels_equal_their_references(request):
    full = ["--full"] if request.config.getoption("--full") else []
    assert pytest_of("tests/kernels/ops", *full, TRITON_INTERPRET="1") >= (200 if full else 60)
