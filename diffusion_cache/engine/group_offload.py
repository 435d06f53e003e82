"""Skipped blocks in groups that are moved to the device together: diffusers' `enable_group_offload`.

A group is loaded before its first block runs and offloaded after its last. Where the first is skipped, whichever runs
next takes the lead; where the last is, the group is offloaded in its place. With streams, a group of one module is
loaded while the one before it runs; where it is skipped then, it is offloaded.
"""

from itertools import chain
from typing import Any

from torch import nn

from ..models import Span

REGISTRY, HOOK = "_diffusers_hook", "group_offloading"  # diffusers' names


class Groups:
    """The groups of the call that is running whose first block was skipped, with that block, or only begun."""

    def __init__(self) -> None:
        self._led: list[tuple[Any, nn.Module]] = []
        self._begun: list[Any] = []
        self._hooked: dict[nn.Module, list[nn.Module]] = {}  # of each block, what has a group
        self._contained: dict[Span, bool] = {}

    def restore(self) -> None:
        """At the end of a call: groups are led by their first blocks again."""
        while self._led:
            group, leader = self._led.pop()
            group.onload_leader = leader
        self._begun.clear()

    def contain(self, span: Span) -> bool:
        """Whether any of a span's blocks, or of what is in them, has a group."""
        found = self._contained.get(span)
        if found is None:
            for block in span.members:
                self._hooked[block] = [part for part in block.modules() if hook_of(part, HOOK) is not None]
            found = self._contained[span] = any(self._hooked[block] for block in span.members)
        return found

    def begin(self, module: nn.Module) -> None:
        """A block was run, but not to its end: its group is loaded, if it is the first."""
        group = _group(module)
        if group is not None and group.onload_leader is module:
            self._begun.append(group)

    def skip(self, module: nn.Module) -> None:
        """A block of a span that groups `contain` is not run, or not to its end, in this call."""
        self._unload(module)
        group = _group(module)
        if group is None or len(group.modules) < 2:
            return
        begun = group in self._begun
        if group.onload_leader is module and not begun:
            self._led.append((group, module))
            group.onload_leader = None  # taken by the first block that runs
        if group.offload_leader is module and group.onload_leader is not None:
            group.offload_()

    def _unload(self, module: nn.Module) -> None:
        """Offload what is loaded of a block in groups of one module."""
        for part in self._hooked[module]:
            hook = hook_of(part, HOOK)
            if hook is not None and len(hook.group.modules) < 2 and _is_loaded(hook.group):
                hook.group.offload_()


def hook_of(module: nn.Module, name: str) -> Any | None:
    """diffusers' hook of that name on a module."""
    registry = vars(module).get(REGISTRY)
    return None if registry is None else registry.get_hook(name)


def _is_loaded(group: Any) -> bool:
    """Whether a group is elsewhere than where it is offloaded to."""
    of_modules = (tensors() for module in group.modules for tensors in (module.parameters, module.buffers))
    first = next(chain(group.parameters, group.buffers, *of_modules), None)
    return first is not None and first.device != group.offload_device


def _group(module: nn.Module) -> Any | None:
    """The group that a block is moved with."""
    hook = hook_of(module, HOOK)
    return hook.group if hook is not None and module in hook.group.modules else None
