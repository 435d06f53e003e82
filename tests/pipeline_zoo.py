"""Tiny instances of many pipeline classes, for running them cached. Tables: pipelines_unet.py, _image.py, _video.py."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class PipelineCase:
    """One pipeline class and one way to call it.

    name: class name in diffusers. build: a new tiny pipeline on the CPU in float32, seeded, progress bar off. call:
    arguments of one call, with a fresh seeded generator, returning tensors or numpy arrays (latents where it can).
    iterations: denoising loop iterations of that call. calls: denoiser calls in each iteration, in order. variant:
    what is special, where a class has several cases.
    """

    name: str
    build: Callable[[], Any]
    call: Callable[[], dict[str, Any]]
    iterations: int
    calls: int = 1
    variant: str = ""

    @property
    def id(self) -> str:
        return f"{self.name}-{self.variant}" if self.variant else self.name


def cases() -> list[PipelineCase]:
    parts = ("pipelines_unet", "pipelines_image", "pipelines_video")
    return [case for part in parts for case in importlib.import_module(part).CASES]


def tensors(output: Any) -> list[Tensor]:
    """The images, latents or sounds of a pipeline's output, in order."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, np.ndarray):
        return [torch.from_numpy(output)]
    if isinstance(output, dict):
        output = list(output.values())
    if isinstance(output, (list, tuple)):
        return [tensor for item in output for tensor in tensors(item)]
    if hasattr(output, "getdata"):
        return [torch.from_numpy(np.array(output))]
    return []


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) > 0 and all(map(torch.equal, a, b))
