"""Where a denoiser can be cached: its spans, found from its structure.

A span is a run of modules that is skipped as one: its first member's input goes in, its last member's output comes
out. What flows between, and which output belongs to which input, is read off the calls themselves
(`engine/structure.py`), so no table of model families is needed.
"""

from dataclasses import dataclass
from typing import Any

from torch import nn

from ..context import SCOPES
from ..errors import ConfigError, NoSpansError
from ..registry import unknown_name
from .denoisers import unwrap

MIN_PARAMETER_SHARE = 0.05


@dataclass(frozen=True, eq=False)
class Span:
    """One thing that is cached.

    kind: denoiser, stack, block or cut. members: the modules that are skipped, in the order they run; the last one's
    output is what the history holds. Residuals are stored unless the kind says that input and output differ in nature.
    """

    name: str
    kind: str
    members: tuple[nn.Module, ...]

    @property
    def stores_residual(self) -> bool:
        return self.kind in ("stack", "block")

    @property
    def parameters(self) -> int:
        return sum(p.numel() for member in self.members for p in member.parameters())


@dataclass(frozen=True, eq=False)
class Layout:
    """The spans of one denoiser at one scope; probe: the module whose input is where the probe blocks begin, if any."""

    scope: str
    spans: tuple[Span, ...]
    probe: nn.Module | None = None


def stacks(denoiser: nn.Module) -> dict[str, nn.ModuleList]:
    """The denoiser's ModuleLists of blocks: composite modules that hold a real share of its parameters."""
    total = sum(p.numel() for p in denoiser.parameters())
    found = {}
    for name, child in denoiser.named_children():
        if not isinstance(child, nn.ModuleList) or not len(child):
            continue
        composite = all(any(True for _ in block.children()) for block in child)
        share = sum(p.numel() for p in child.parameters()) / max(total, 1)
        if composite and share >= MIN_PARAMETER_SHARE:
            found[name] = child
    return found


def is_unet(denoiser: nn.Module) -> bool:
    return all(isinstance(getattr(denoiser, name, None), nn.ModuleList) for name in ("down_blocks", "up_blocks"))


def default_scope(denoiser: nn.Module) -> str:
    """cut for UNets, stack where there are stacks, else denoiser."""
    denoiser = unwrap(denoiser)
    if is_unet(denoiser):
        return "cut"
    return "stack" if stacks(denoiser) else "denoiser"


def find_layout(denoiser: nn.Module, scope: str, depth: int = 1, probe: int = 0, tail: int = 0) -> Layout:
    """The denoiser's spans at a scope.

    depth: for cuts, how many down and up blocks stay outside (1 skips most). probe, tail: for stacks, how many
    blocks at the front of the first and the end of the last stack stay outside.

    Raises:
        NoSpansError: if there is nothing to cache at this scope.
        ConfigError: for depth, probe or tail that leave nothing to skip.
    """
    inner = unwrap(denoiser)
    if scope not in SCOPES:
        raise unknown_name("scope", scope, SCOPES)
    if scope == "denoiser":
        return Layout(scope, (Span("denoiser", scope, (denoiser,)),))
    if is_unet(inner):
        if scope == "cut":
            return _cut_layout(inner, depth)
        if scope == "block":
            return Layout(scope, tuple(Span(name, scope, (block,)) for name, block in _unet_blocks(inner)))
        raise NoSpansError(f"{type(inner).__name__} is a UNet, which has no {scope}; use scope cut, block or denoiser")
    found = stacks(inner)
    if scope == "cut" or not found:
        others = "stack, block or denoiser" if found else "denoiser"
        raise NoSpansError(f"{type(inner).__name__} has no {scope} to cache; use scope {others}")
    if scope == "block":
        named = ((f"{name}.{i}", block) for name, stack in found.items() for i, block in enumerate(stack))
        return Layout(scope, tuple(Span(name, scope, (block,)) for name, block in named))
    return _stack_layout(inner, found, probe, tail)


def _stack_layout(denoiser: nn.Module, found: dict[str, nn.ModuleList], probe: int, tail: int) -> Layout:
    names = list(found)
    blocks = {name: list(stack) for name, stack in found.items()}
    sizes = ", ".join(f"{name}: {len(stack)}" for name, stack in found.items())
    total = sum(map(len, found.values()))
    if probe + tail >= total or probe > len(found[names[0]]) or tail > len(found[names[-1]]):
        raise ConfigError(
            f"front={probe} and back={tail} blocks cannot be kept out of {type(denoiser).__name__} ({sizes}): "
            f"front must fit in the first stack, back in the last, and at least one block must remain to be skipped"
        )
    first_block = blocks[names[0]][0]
    blocks[names[0]] = blocks[names[0]][probe:]
    blocks[names[-1]] = blocks[names[-1]][: len(blocks[names[-1]]) - tail]
    spans = tuple(Span(name, "stack", tuple(members)) for name, members in blocks.items() if members)
    return Layout("stack", spans, first_block if probe else None)


def _unet_blocks(unet: Any) -> list[tuple[str, nn.Module]]:
    blocks = [(f"down_blocks.{i}", block) for i, block in enumerate(unet.down_blocks)]
    if getattr(unet, "mid_block", None) is not None:
        blocks.append(("mid_block", unet.mid_block))
    return blocks + [(f"up_blocks.{i}", block) for i, block in enumerate(unet.up_blocks)]


def _cut_layout(unet: Any, depth: int) -> Layout:
    deepest = min(len(unet.down_blocks), len(unet.up_blocks))
    if getattr(unet, "mid_block", None) is None:
        deepest -= 1
    if not 1 <= depth <= deepest:
        raise ConfigError(f"depth must be between 1 and {deepest} for {type(unet).__name__}, not {depth}")
    named = _unet_blocks(unet)
    members = [block for _, block in named[depth : len(named) - depth]]
    return Layout("cut", (Span(f"cut.{depth}", "cut", tuple(members)),))
