"""Work that really ran: floating point operations and block executions."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

# torch has no formula for these two attention kernels, and a kernel without one counts as zero; the first is what
# scaled_dot_product_attention runs on the CPU.
_UNCOUNTED_ATTENTION = (
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu,
    torch.ops.aten._scaled_dot_product_fused_attention_overrideable,
)


def _attention_flops(
    query: torch.Size, key: torch.Size, value: torch.Size, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    """Both matrix products, 2·b·h·q·k·(d + d_v); the softmax is left out and masks save nothing, as in torch."""
    return int(sdpa_flop_count(query, key, value))


def flop_counter() -> FlopCounterMode:
    """torch's counter, with formulas for the attention kernels that it has none for."""
    return FlopCounterMode(display=False, custom_mapping=dict.fromkeys(_UNCOUNTED_ATTENTION, _attention_flops))


def executed_flops(fn: Callable[[], object]) -> int:
    """Call fn() and count the floating point operations of its matrix products, convolutions and attention.

    A multiplication and its addition count as two. Element-wise work is not counted. Whatever fn raises is raised.
    """
    with flop_counter() as counter:
        fn()
    return counter.get_total_flops()


class BlockCount:
    """How many times each block has executed; `per_block` follows the order in which the blocks were given."""

    def __init__(self, blocks: int):
        self.per_block = [0] * blocks

    @property
    def total(self) -> int:
        return sum(self.per_block)


@contextmanager
def count_blocks(modules: Iterable[nn.Module]) -> Iterator[BlockCount]:
    """Count the executions of each module inside the `with` block.

    A forward hook fires only when the module itself runs, so blocks that a cache stepped over are not counted.
    """
    modules = list(modules)
    count = BlockCount(len(modules))

    def counter(position: int) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            count.per_block[position] += 1

        return hook

    handles = [module.register_forward_hook(counter(position)) for position, module in enumerate(modules)]
    try:
        yield count
    finally:
        for handle in handles:
            handle.remove()
