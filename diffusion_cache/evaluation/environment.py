"""What the measurements ran on. Imports none of the packages it reports, and starts no GPU context."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path

from .. import __version__

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "triton", "torchmetrics", "cache-dit", "DeepCache")


def versions() -> dict[str, str | None]:
    """Versions of this package, Python and the packages that decide results; None where a package is not installed."""
    found: dict[str, str | None] = {"diffusion-cache": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def cpu_threads() -> int:
    """Hardware threads this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_name() -> str:
    """The processor's model, or its architecture where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def gpu_names() -> list[str]:
    """Names of the NVIDIA GPUs, as the driver's own tool lists them."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    try:
        listed = subprocess.run(
            [tool, "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in listed.stdout.splitlines() if line.strip()]


def git_commit() -> str | None:
    """The commit that this package's source is at, with "+" where files differ from it; None outside a checkout."""
    folder = Path(__file__).parents[2]
    if not (folder / ".git").exists() or shutil.which("git") is None:
        return None
    try:
        answers = [
            subprocess.run(["git", *command], cwd=folder, capture_output=True, text=True, timeout=20, check=True).stdout
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        ]
    except (OSError, subprocess.SubprocessError):
        return None
    return answers[0].strip()[:12] + ("+" if answers[1].strip() else "")
