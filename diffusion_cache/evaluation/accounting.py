"""What a generation really executed, step by step: modules, and floating point operations."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..measure import flop_counter
from .subjects import wrapped_step


class StepWork(NamedTuple):
    """One sampler step. pattern: how often each leaf module ran; flops of the denoisers, and those in their blocks.

    flops and block_flops are None where they were not counted.
    """

    pattern: tuple[int, ...]
    flops: int | None
    block_flops: int | None


@dataclass
class Observed:
    """One pipeline call, step by step. reads: how often a value was read back from a tensor."""

    steps: list[StepWork] = field(default_factory=list)
    reads: int | None = None


class Accountant:
    """Counts what one pipeline's denoisers execute.

    Leaf modules (those with parameters and without children) are counted by forward hooks, which fire only where a
    module really runs, whoever skips it. As a step's operations follow from which of them ran, they are counted once
    per pattern, with one sample, and looked up from then on.
    """

    def __init__(self, denoisers: Mapping[str, nn.Module], blocks: Mapping[str, nn.Module], scheduler: Any):
        self.denoisers, self.blocks, self.scheduler = list(denoisers.values()), dict(blocks), scheduler
        places = {module: i for i, block in enumerate(self.blocks.values()) for module in block.modules()}
        self.leaves: list[nn.Module] = []
        for denoiser in self.denoisers:
            for module in denoiser.modules():
                if not any(True for _ in module.children()) and next(module.parameters(), None) is not None:
                    self.leaves.append(module)
        self._block_of = [places.get(leaf, -1) for leaf in self.leaves]
        self._sizes: list[float] = [0.0] * len(self.leaves)  # multiplications in one call of each, for one sample
        self._known: dict[tuple[int, ...], tuple[int, int]] = {}

    @contextmanager
    def observed(self, flops: bool = False) -> Iterator[Observed]:
        """Observe one pipeline call. flops: count operations too, for a call with one sample; it slows the call."""
        found = Observed()
        counts = [0] * len(self.leaves)
        handles = []
        counter = flop_counter() if flops else None
        reads = _Reads() if flops else None
        seen = {"total": 0, "inside": 0, "began": False}
        in_block = [0]

        def total() -> int:
            return counter.get_total_flops() if counter is not None else 0

        def begin(module: nn.Module, args: Any) -> None:
            if not seen["began"]:  # text encoders have run before
                seen["began"], seen["total"] = True, total()

        def count(place: int) -> Any:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                counts[place] += 1
                if flops:
                    self._sizes[place] = _multiplications(module, output)

            return hook

        def enter(module: nn.Module, args: Any) -> None:
            in_block[0] = total()

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            seen["inside"] += total() - in_block[0]

        def make(original: Any) -> Any:
            def step(scheduler: Any, *args: Any, **kwargs: Any) -> Any:
                spent = (total() - seen["total"], seen["inside"]) if counter is not None else (None, None)
                found.steps.append(StepWork(tuple(counts), *spent))
                counts[:] = [0] * len(counts)
                result = original(scheduler, *args, **kwargs)
                seen["total"], seen["inside"] = total(), 0
                return result

            return step

        for denoiser in self.denoisers:
            handles.append(denoiser.register_forward_pre_hook(begin))
        for place, leaf in enumerate(self.leaves):
            handles.append(leaf.register_forward_hook(count(place)))
        if counter is not None:
            for block in self.blocks.values():
                handles.append(block.register_forward_pre_hook(enter))
                handles.append(block.register_forward_hook(leave))
        try:
            with wrapped_step(self.scheduler, make):
                if counter is None or reads is None:
                    yield found
                else:
                    with counter, reads:
                        yield found
                    found.reads = reads.count
                    for work in found.steps:
                        self._known[work.pattern] = (work.flops or 0, work.block_flops or 0)
        finally:
            for handle in handles:
                handle.remove()

    def priced(self, observed: Observed) -> Observed | None:
        """The same with the operations of one sample in every step; None where a step is of a kind not yet counted."""
        steps = []
        for work in observed.steps:
            if work.pattern not in self._known:
                return None
            steps.append(StepWork(work.pattern, *self._known[work.pattern]))
        return Observed(steps, observed.reads)

    def executed(self, work: StepWork) -> list[float]:
        """Of each block, the multiplications by its parameters that ran in a step, for one sample, [blocks].

        Modules that have run in no counted call yet weigh nothing.
        """
        totals = [0.0] * len(self.blocks)
        for count, block, size in zip(work.pattern, self._block_of, self._sizes, strict=True):
            if block >= 0:
                totals[block] += count * size
        return totals


def _multiplications(module: nn.Module, output: Any) -> float:
    """By a leaf module's weights in one call: each is used once for every position of the output."""
    weight = next((p for p in module.parameters() if p.ndim > 1), None)
    if weight is None or not isinstance(output, Tensor):
        return float(sum(p.numel() for p in module.parameters()))
    return weight.numel() * output.numel() / weight.shape[0]


class _Reads(TorchDispatchMode):
    """Counts values that are read back from tensors, each of which makes a host wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            self.count += 1
        return func(*args, **(kwargs or {}))
