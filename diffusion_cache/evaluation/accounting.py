"""What a generation really executed, step by step: modules, and floating point operations."""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..engine import StepRecord
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
    def kinds(self) -> list[Hashable]:
        """What kind of step each is, by its calls of modules."""
        return [work.pattern for work in self.steps]

    @property
    def facts(self) -> dict[str, Any]:
        """As plain values, for a file."""
        return {"reads": self.reads, "steps": [list(work) for work in self.steps]}

    @classmethod
    def of_facts(cls, facts: Mapping[str, Any]) -> "Observed":
        works = (StepWork(tuple(pattern), flops, tuple(blocks)) for pattern, flops, blocks in facts["steps"])
        return cls(list(works), facts["reads"])


def kinds_of(records: Sequence[StepRecord], samples: int) -> list[list[Hashable]] | None:
    """What kind of step each is of each sample in a batch that decides on each apart, as the engine has recorded it.

    A sample for which a step was computed only for its neighbours' sake shows a kind that it never has alone. None
    where the records do not tell the samples apart.
    """
    found: list[list[Hashable]] = [[] for _ in range(samples)]
    for _, group in groupby(records, key=lambda record: record.step):
        calls = list(group)
        for call in calls:
            if len(call.samples) != samples and len(set(call.samples)) > 1:
                return None
        for place, kinds in enumerate(found):
            kinds.append(tuple(_kind(call, place) for call in calls))
    return found


def _kind(call: StepRecord, place: int) -> Hashable:
    """Of one sample in one call; before the first scheduler step its rows may have been taken for others."""
    if not call.samples:
        return call.denoiser, call.pass_name, call.computed, call.spans_reused
    return call.denoiser, call.pass_name, call.samples[place if place < len(call.samples) else 0]


class Accountant:
    """Counts what one pipeline's denoisers execute.

    Counting operations slows a call, so it is done with one sample: calls of leaf modules (those with parameters and
    without children), which cost little to note, tell what kind of step another one is, and a kind that has been
    counted has a price. Where the samples of a batch are decided on apart, its calls do not tell what each of them
    had, and the engine's records do (`kinds_of`): a sample's work is then the sum of what its own kinds of step cost
    where a sample is alone, whatever was computed for others in the same call.

    compiled: whether denoisers run compiled. That shows no calls of modules, so that patterns are all alike, and
    operations are counted with what was compiled left out.
    """

    def __init__(
        self,
        denoisers: Mapping[str, nn.Module],
        blocks: Mapping[str, nn.Module],
        scheduler: Any,
        compiled: bool = False,
    ):
        self.denoisers, self.blocks, self.scheduler = list(denoisers.values()), dict(blocks), scheduler
        self.compiled = compiled
        self.leaves: list[nn.Module] = []
        for denoiser in self.denoisers:
            for module in denoiser.modules():
                if not any(True for _ in module.children()) and next(module.parameters(), None) is not None:
                    self.leaves.append(module)
        self._prices: dict[Hashable, StepWork] = {}

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
            handles = []
            if counter is not None or not self.compiled:  # hooks would be compiled with the rest, to no effect
                handles += [denoiser.register_forward_pre_hook(begin) for denoiser in self.denoisers]
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
            if self.compiled:
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            with counter.counting():
                yield found
            found.reads = counter.reads

    def price(self, kinds: Sequence[Hashable], counted: Observed) -> None:
        """Take what was counted of one sample's steps for what such kinds of step cost."""
        self._prices.update(zip(kinds, counted.steps, strict=True))

    def priced(self, kinds: Sequence[Hashable]) -> Observed | None:
        """A sample's work by the kinds of its steps; None where one has no price yet."""
        known = [self._prices[kind] for kind in kinds if kind in self._prices]
        return Observed(known) if len(known) == len(kinds) else None


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
