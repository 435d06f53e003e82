"""Skipped blocks in groups that are moved to the device together: diffusers' `enable_group_offload`.

A group is loaded before its first block runs and offloaded after its last. Where the first is skipped, whichever runs
next takes the lead; where the last is, the group is offloaded in its place.
"""

from types import TracebackType
from typing import Any

from torch import nn

REGISTRY, HOOK = "_diffusers_hook", "group_offloading"  # diffusers' names


class Groups:
    """The groups whose first block was skipped in the call that is running, with that block."""

    def __init__(self) -> None:
        self._led: list[tuple[Any, nn.Module]] = []

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        while self._led:
            group, leader = self._led.pop()
            group.onload_leader = leader

    def skip(self, module: nn.Module) -> None:
        """A block is not run in this call."""
        registry = vars(module).get(REGISTRY)
        hook = None if registry is None else registry.get_hook(HOOK)
        if hook is None or len(hook.group.modules) < 2 or module not in hook.group.modules:
            return
        group = hook.group
        if group.onload_leader is module:
            self._led.append((group, module))
            group.onload_leader = None  # taken by the first block that runs
        if group.offload_leader is module and group.onload_leader is not None:
            group.offload_()
