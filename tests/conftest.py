"""Shared fixtures: GPU tests skip without one, and every test runs on one thread unless it says otherwise."""

import os

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="what `make test` leaves out as well")


# modules that take minutes, which are handed out first
LONG = (
    "test_invariants",
    "test_pipeline_zoo",
    "test_accidents_more",
    "test_accidents",
    "test_evaluate",
    "test_interpreted_engine",
    "test_interpreted",
    "test_compile",
    "test_graphs",
    "test_loops",
    "test_pipelines",
    "test_bench_gpu",
)


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))
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


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


os.environ["DIFFUSION_CACHE_FOLDER"] = ""  # nothing is kept in, or read from, the cache folder of whoever runs this
torch.set_num_threads(1)  # workers of pytest-xdist share two cores
