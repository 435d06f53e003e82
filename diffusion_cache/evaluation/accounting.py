"""What a generation really executed, step by step: modules, and floating point operations."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..engine.patches import wrapped_step
from ..measure import FlopCounter


class StepWork(NamedTuple):
    """One sampler step. pattern: how often each leaf module was called.

    flops: operations of the denoisers; block_flops: in each of their blocks. None where they were not counted.
    """

    pattern: tuple[int, ...]
    flops: int | None = None
    block_flops: tuple[int, ...] | None = None


@dataclass
class Observed:
    """One pipeline call, step by step. reads: how often a value was read back from a tensor, where it was counted."""

    steps: list[StepWork] = field(default_factory=list)
    reads: int | None = None

    @property
    def flops(self) -> int:
        return sum(work.flops or 0 for work in self.steps)

    @property
    def block_flops(self) -> int:
        return sum(sum(work.block_flops or ()) for work in self.steps)

    @property
    def facts(self) -> dict[str, Any]:
        """As plain values, for a file."""
        return {"reads": self.reads, "steps": [list(work) for work in self.steps]}

    @classmethod
    def of_facts(cls, facts: Mapping[str, Any]) -> "Observed":
        works = (StepWork(tuple(pattern), flops, tuple(blocks)) for pattern, flops, blocks in facts["steps"])
        return cls(list(works), facts["reads"])


class Accountant:
    """Counts what one pipeline's denoisers execute.

    Counting operations slows a call several times, so it is done with one sample: calls of leaf modules (those with
    parameters and without children), which cost little to note, tell what kind of step another one is, and a kind that
    has been counted has a price.
    """

    def __init__(self, denoisers: Mapping[str, nn.Module], blocks: Mapping[str, nn.Module], scheduler: Any):
        self.denoisers, self.blocks, self.scheduler = list(denoisers.values()), dict(blocks), scheduler
        self.leaves: list[nn.Module] = []
        for denoiser in self.denoisers:
            for module in denoiser.modules():
                if not any(True for _ in module.children()) and next(module.parameters(), None) is not None:
                    self.leaves.append(module)
        self._prices: dict[tuple[int, ...], StepWork] = {}

    def forget_prices(self) -> None:
        """Another cache is put on: under it, equal calls of modules may stand for other operations."""
        self._prices.clear()

    @contextmanager
    def observed(self, flops: bool = False) -> Iterator[Observed]:
        """Observe one pipeline call. flops: count operations too, for a call with one sample."""
        found = Observed()
        counts = [0] * len(self.leaves)
        inside = [0] * len(self.blocks)
        began = [0] * len(self.blocks)
        counter = _Counter() if flops else None
        base: list[int] = []  # operations before this step's; empty until a denoiser has been called

        def total() -> int:
            return counter.total if counter is not None else 0

        def begin(module: nn.Module, args: Any) -> None:
            if not base:  # text encoders have run before
                base.append(total())

        def count(place: int) -> Callable:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                counts[place] += 1

            return hook

        def enter(place: int) -> Callable:
            def hook(module: nn.Module, args: Any) -> None:
                began[place] = total()

            return hook

        def leave(place: int) -> Callable:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                inside[place] += total() - began[place]

            return hook

        def make(original: Callable) -> Callable:
            def step(scheduler: Any, *args: Any, **kwargs: Any) -> Any:
                work = StepWork(tuple(counts))
                if counter is not None:
                    work = work._replace(flops=total() - (base or [total()])[0], block_flops=tuple(inside))
                found.steps.append(work)
                counts[:], inside[:] = [0] * len(counts), [0] * len(inside)
                result = original(scheduler, *args, **kwargs)
                base[:] = [total()]  # samplers multiply matrices of their own
                return result

            return step

        with ExitStack() as stack:
            handles = [denoiser.register_forward_pre_hook(begin) for denoiser in self.denoisers]
            handles += [leaf.register_forward_hook(count(place)) for place, leaf in enumerate(self.leaves)]
            if counter is not None:
                for place, block in enumerate(self.blocks.values()):
                    handles.append(block.register_forward_pre_hook(enter(place)))
                    handles.append(block.register_forward_hook(leave(place)))
            for handle in handles:
                stack.callback(handle.remove)
            stack.enter_context(wrapped_step(self.scheduler, make))
            if counter is None:
                yield found
                return
            with counter.counting():
                yield found
            found.reads = counter.reads
            self._prices.update({work.pattern: work for work in found.steps})

    def priced(self, observed: Observed) -> Observed | None:
        """The same with the operations of one sample in every step; None where a kind of step has no price yet."""
        steps = [self._prices.get(work.pattern) for work in observed.steps]
        known = [work for work in steps if work is not None]
        return Observed(known, observed.reads) if len(known) == len(steps) else None


class _Counter(FlopCounter):
    """Counts operations, and values that are read back from tensors, each of which makes a host wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = 0

    @contextmanager
    def counting(self) -> Iterator[None]:
        original = Tensor.tolist

        def tolist(tensor: Tensor) -> Any:  # reads a host tensor without any operation
            self.reads += tensor.device.type == "cpu"
            return original(tensor)

        Tensor.tolist = tolist  # type: ignore[method-assign, assignment]
        try:
            with self:
                yield
        finally:
            Tensor.tolist = original  # type: ignore[method-assign]

    def _ran(self, func: Any, args: Any, result: Any) -> None:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.reads += 1
        elif func is torch.ops.aten._to_copy.default:
            self.reads += args[0].device.type != "cpu" and result.device.type == "cpu"
