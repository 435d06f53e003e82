"""Machine code of launches, made ahead of time: no GPU is needed, and no memory for what a launch would read.

A launch is called with tensors on the meta device, and Triton's launcher specialises what it passes to its kernel as on
a GPU of the architecture asked for: pointers and sizes that 16 divides are known to be. The machine code is read with
the tool that Triton brings.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver


@dataclass(frozen=True)
class Machine:
    """What a kernel became on one architecture.

    loads, stores: widths in bits of those from and to global memory that are as wide as a vector of a thread, with
    their number; local: instructions that spill; stack: bytes.
    """

    loads: dict[int, int]
    stores: dict[int, int]
    local: int
    stack: int
    registers: int


class _Device:
    """The driver of a GPU that is not there. Its number is its architecture, so that each has its own kernels."""

    def __init__(self, architecture: int):
        self.architecture = architecture

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return self.architecture

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def compiled(module: Any, architecture: int, launch: Callable[[], Any]) -> list[Machine]:
    """The kernels that `launch` starts through the module's `start`, for compute capability `architecture` / 10."""
    machines = []

    def start(kernel: Any, programs: int, warps: int, device: torch.device, *arguments: Any, **constants: Any) -> None:
        assert 0 < programs < 2**31
        options = dict(num_warps=warps, enable_fp_fusion=True)
        binary = kernel.warmup(*arguments, grid=(programs,), **options, **constants)
        machines.append(_machine(binary.asm["cubin"]))

    # put in and taken out like this, as resetting the driver would look for a GPU
    with patch.object(driver, "_active", _Device(architecture)), patch.object(module, "start", start):
        launch()
    return machines


def _machine(cubin: bytes) -> Machine:
    code, usage = _dump(cubin, "-sass"), _dump(cubin, "-res-usage")
    return Machine(
        _widths("LDG", code),
        _widths("STG", code),
        len(re.findall(r"\b(?:LDL|STL)\b", code)),
        int(re.search(r"STACK:(\d+)", usage).group(1)),
        int(re.search(r"REG:(\d+)", usage).group(1)),
    )


def _widths(instruction: str, code: str) -> dict[int, int]:
    found = Counter()
    for modifiers in re.findall(rf"\b{instruction}((?:\.\w+)*)", code):
        width = re.search(r"\.(8|16|32|64|128|256)\b|\.[US](8|16)\b", modifiers)
        found[int(next(filter(None, width.groups()))) if width else 32] += 1
    return dict(found)


def _dump(cubin: bytes, option: str) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        result = subprocess.run([tool, option, path], capture_output=True, text=True, check=True)
    return result.stdout + result.stderr
