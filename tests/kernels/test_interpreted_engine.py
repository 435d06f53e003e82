"""The engine with its kernels, run by Triton's interpreter in processes of their own."""

from children import pytest_of

MODES = dict(TRITON_INTERPRET="1", DIFFUSION_CACHE_KERNELS="interpret")


def test_the_engine_gives_the_same_with_kernels():
    assert pytest_of("tests/kernels/engine", **MODES) >= 6


def test_contracts_hold_with_kernels():
    """Of one model with branches that are stacked and one without."""
    chosen = "identical and (flux-digits-mask-taylor-branch or wan-moving-digits-first_block-reuse-stack)"
    of_all = dict(DIFFUSION_CACHE_ALL_CASES="1")
    assert pytest_of("tests/contracts/test_invariants.py", "-k", chosen, **of_all, **MODES) == 2
