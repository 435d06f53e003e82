"""Tiny models of every denoiser class that diffusers exports, and what their forward takes.

The tables, written from the constructors and forwards of the installed diffusers, are in zoo_joint.py, zoo_image.py,
zoo_video.py, zoo_audio.py and zoo_unets.py; here is what they share.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class Draw:
    """Seeded random tensors: draw(2, 4, 8) is float noise, draw.ints(10, 2, 3) integers below 10."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def ints(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self.generator)


@dataclass(frozen=True)
class Case:
    """One denoiser class in one configuration.

    name: class name in diffusers. config: its constructor's arguments. inputs: the forward's arguments for one call,
    as its pipeline gives them. variant: what is special, where a class has several cases ("controlnet"). chain: the
    ModuleLists (or ModuleDicts) of blocks that the sample runs through, and how many blocks each has in this config,
    in the order they run; read from the source, not from what diffusion_cache finds. branches: per entry of chain, the
    attribute names of attention and feed-forward modules in one block. levels: for UNets, down blocks.
    """

    name: str
    config: Mapping[str, Any]
    inputs: Callable[[Draw], dict[str, Any]]
    variant: str = ""
    chain: Mapping[str, int] = field(default_factory=dict)
    branches: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    levels: int = 0

    @property
    def id(self) -> str:
        return f"{self.name}-{self.variant}" if self.variant else self.name


class Zeroed(TorchFunctionMode):
    """Memory that constructors leave as it is becomes zero, to be randomised with the rest."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (torch.zeros if func is torch.empty else func)(*args, **(kwargs or {}))


def build(case: Case, seed: int = 0) -> nn.Module:
    """The model in float32 and eval mode, with no weight left at zero: a zero-initialised gate would hide any error."""
    import diffusers

    torch.manual_seed(seed)
    with Zeroed():
        model = getattr(diffusers, case.name)(**case.config).float().eval()
    randomise_zeros(model, seed)
    return model.requires_grad_(False)


def randomise_zeros(model: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and not parameter.any():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


def flat(output: Any) -> list[Tensor]:
    """The tensors of a forward's output, in order."""
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, (list, tuple)) else ()
    return [tensor for value in values for tensor in flat(value)]


PARTS = ("zoo_joint", "zoo_image", "zoo_video", "zoo_audio", "zoo_unets")


def cases() -> list[Case]:
    return [case for part in PARTS for case in importlib.import_module(part).CASES]


def unbuildable() -> dict[str, str]:
    """Classes that cannot be built or called here, with the reason."""
    return {name: why for part in PARTS for name, why in importlib.import_module(part).UNBUILDABLE.items()}
