"""The wheel holds what the tree holds, and importing the package stays cheap."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from setuptools.config.pyprojecttoml import read_configuration

ROOT = Path(__file__).parents[2]
FOLDERS = {  # folder in the tree -> folder in the wheel
    "diffusion_cache": "diffusion_cache",
    "kernels/ops": "diffusion_cache/kernels",
    "configs": "diffusion_cache/configs",
    "profiles": "diffusion_cache/profiles",
}
SUFFIXES = {".py", ".yaml", ".json", ".safetensors", ".css", ".js"}
IMPORT_SECONDS = 0.3
HEAVY_MODULES = ("triton", "torchmetrics", "transformers", "hydra", "matplotlib")


@pytest.fixture(scope="module")
def wheel_files(tmp_path_factory) -> set[str]:
    """Names of the files in a wheel built from a copy of the tree, without its metadata."""
    copy = tmp_path_factory.mktemp("copy")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "dist"]
    result = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = (copy / "dist").glob("*.whl")
    return {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}


def test_wheel_holds_exactly_the_files_of_the_tree(wheel_files):
    expected = {
        f"{target}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, target in FOLDERS.items()
        for path in (ROOT / folder).rglob("*")
        if path.suffix in SUFFIXES or path.name == "py.typed"
    }
    assert wheel_files == expected


def test_every_subpackage_is_listed():
    found = {
        ".".join((target, *path.parent.relative_to(ROOT / folder).parts)).replace("/", ".")
        for folder, target in FOLDERS.items()
        for path in (ROOT / folder).rglob("*.py")
    }
    assert set(read_configuration(ROOT / "pyproject.toml")["tool"]["setuptools"]["packages"]) == found


IMPORT_PROBE = f"""
import gc, json, sys, time
import torch, diffusers
gc.disable()  # a pass over what torch and diffusers have made takes as long as all of ours
before = set(sys.modules)
start = time.process_time()  # of this process alone: the machine may be busy
import diffusion_cache
names = list(diffusion_cache.registry.policies.names())  # before anything else has imported them
diffusion_cache.enable
seconds = time.process_time() - start
loaded = [name for name in {HEAVY_MODULES} if name in sys.modules and name not in before]
print(json.dumps(dict(seconds=seconds, loaded=loaded, names=names, cuda=torch.cuda.is_initialized())))
"""


@pytest.mark.slow
def test_import_is_cheap():
    """Measured beyond torch and diffusers; the best of three processes, the first of which may write the bytecode."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    seconds = []
    while len(seconds) < 3 and min(seconds, default=IMPORT_SECONDS) >= IMPORT_SECONDS:
        result = subprocess.run(
            [sys.executable, "-c", IMPORT_PROBE], capture_output=True, text=True, check=True, env=environment
        )
        report = json.loads(result.stdout.splitlines()[-1])
        assert report["loaded"] == []
        assert not report["cuda"]
        assert "interval" in report["names"]
        seconds.append(report["seconds"])
    assert min(seconds) < IMPORT_SECONDS


def test_no_package_file_where_it_would_shadow_another():
    assert not (ROOT / "kernels/__init__.py").exists()  # diffusers imports the Hub's package of that name
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_only_ops_imports_the_kernels():
    """What the layer contract cannot see, as the kernels live outside the package folder."""
    pattern = re.compile(r"^\s*(from|import) (diffusion_cache|\.+)(\.?kernels\b| import .*\bkernels\b)", re.MULTILINE)
    files = (ROOT / "diffusion_cache").rglob("*.py")
    importers = {path.relative_to(ROOT).as_posix() for path in files if pattern.search(path.read_text())}
    assert importers <= {"diffusion_cache/ops.py"}
