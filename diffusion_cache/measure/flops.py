"""Work that really ran: floating point operations and block executions."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

# torch has no formula for these two attention kernels, and a kernel without one counts as zero; the first is what
# scaled_dot_product_attention runs on the CPU.
_UNCOUNTED_ATTENTION = (
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu,
    torch.ops.aten._scaled_dot_product_fused_attention_overrideable,
)


def _attention_flops(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> int:
    """Both matrix products, 2·b·h·q·k·(d + d_v); the softmax is left out and masks save nothing, as in torch."""
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))


class FlopCounter(TorchDispatchMode):
    """Counts floating point operations while it is entered; total: so far.

    By torch's formulas, and those for the attention kernels that it has none for. `FlopCounterMode` of torch follows
    every module to tell them apart as well, which takes longer than counting.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        self._formulas = {**flop_registry, **dict.fromkeys(_UNCOUNTED_ATTENTION, _attention_flops)}
        self._undivided: set[Any] = {torch.ops.prim.device.default}  # operators that are not made of others

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not isinstance(func, OpOverload):  # what it runs inside is not counted
            return func(*args, **kwargs)
        if func not in self._undivided:
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
            self._undivided.add(func)
        result = func(*args, **kwargs)
        formula = self._formulas.get(func.overloadpacket)
        if formula is not None:
            self.total += formula(*args, **kwargs, out_val=result)
        self._ran(func, args, result)
        return result

    def _ran(self, func: OpOverload, args: Any, result: Any) -> None:
        """An operator has run that is not made of others."""


def executed_flops(fn: Callable[[], object]) -> int:
    """Call fn() and count the floating point operations of its matrix products, convolutions and attention.

    A multiplication and its addition count as two. Element-wise work is not counted. Whatever fn raises is raised.
    """
    with FlopCounter() as counter:
        fn()
    return counter.total


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
