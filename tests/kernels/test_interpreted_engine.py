"""The engine with its kernels, run by Triton's interpreter in a process of their own."""

import pytest
from children import ROOT, pytest_of

pytestmark = pytest.mark.slow

MODES = dict(TRITON_INTERPRET="1", DIFFUSION_CACHE_KERNELS="interpret")
# of one model with branches that are stacked and one without
CASES = "flux-digits-mask-taylor-branch", "wan-moving-digits-first_block-reuse-stack"
OF_ALL = dict(DIFFUSION_CACHE_ALL_CASES="1", DIFFUSION_CACHE_CASES=",".join(CASES))


def test_the_engine_gives_the_same_with_kernels_and_contracts_hold():
    """Together, for a process takes long to start."""
    own = " or ".join(path.stem for path in (ROOT / "tests" / "kernels" / "engine").glob("test_*.py"))
    chosen = f"{own} or identical and ({' or '.join(CASES)})"
    paths = "tests/kernels/engine", "tests/contracts/test_invariants.py"
    assert pytest_of(*paths, "-k", chosen, **OF_ALL, **MODES) == 6 + 2
