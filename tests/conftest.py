"""Shared fixtures: GPU tests skip without one, and every test runs on one thread unless it says otherwise."""

import os

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="the kernels' tests that `make test` leaves out as well")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--full"):
        left_out = [item for item in items if "full" in item.keywords]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if "full" not in item.keywords]
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


os.environ["DIFFUSION_CACHE_FOLDER"] = ""  # nothing is kept in, or read from, the cache folder of whoever runs this
torch.set_num_threads(1)  # workers of pytest-xdist share two cores
