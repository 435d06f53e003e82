"""Machine code of launches, made ahead of time: no GPU is needed, and no memory for what a launch would read.

A launch is called with tensors on the meta device. What it passes to its kernel is specialised as Triton's launcher
would: pointers and sizes that 16 divides are said to be so. The machine code is read with the tool that Triton brings.
"""

import os
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
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.uint8: "*u8",
    torch.int8: "*i8",
}
ALIGNED = [["tt.divisibility", 16]]


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


def compiled(module: Any, architecture: int, launch: Callable[[], Any]) -> list[Machine]:
    """The kernels that `launch` starts through the module's `start`, for compute capability `architecture` / 10."""
    machines = []

    def start(kernel: Any, programs: int, warps: int, device: torch.device, *arguments: Any, **constants: Any) -> None:
        assert 0 < programs < 2**31
        machines.append(_machine(kernel, architecture, warps, arguments, constants))

    with patch.object(module, "start", start):
        launch()
    return machines


def _machine(kernel: Any, architecture: int, warps: int, arguments: tuple, constants: dict[str, Any]) -> Machine:
    signature, fixed, attributes = {}, dict(constants), {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        value = arguments[place]
        if isinstance(value, tuple):
            signature[name] = tuple(TYPES[tensor.dtype] for tensor in value)
            attributes |= {(place, j): ALIGNED for j in range(len(value))}
        elif isinstance(value, Tensor):
            signature[name], attributes[place,] = TYPES[value.dtype], ALIGNED
        elif value is None or value == 1:
            signature[name], fixed[name] = "constexpr", value
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[place,] = ALIGNED
    source = ASTSource(kernel, signature, fixed, attributes)
    target = GPUTarget("cuda", architecture, 32)
    binary = triton.compile(source, target=target, options=dict(num_warps=warps, enable_fp_fusion=True))
    code = _dump(binary.asm["cubin"], "-sass")
    usage = _dump(binary.asm["cubin"], "-res-usage")
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
        path = os.path.join(folder, "kernel.cubin")
        Path(path).write_bytes(cubin)
        result = subprocess.run([tool, option, path], capture_output=True, text=True, check=True)
    return result.stdout + result.stderr
