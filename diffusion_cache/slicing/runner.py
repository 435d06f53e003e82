"""Running one module in slices: when, of what size, and putting the outputs together."""

import inspect
import math
import warnings
from collections.abc import Callable, Hashable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_iter

from ..engine.intercept import is_intercepted
from ..engine.patches import ACTIVE
from ..errors import DiffusionCacheError, DiffusionCacheWarning
from ..measure.memory import LiveBytes

# runs a module in slices: (its runner, how it is called whole, its arguments by name); gives None if it cannot
Forward = Callable[["Runner", Callable[..., Any], dict[str, Any]], Any]


@dataclass
class Frame:
    """One call of a sliced denoiser.

    max_bytes: what a slice may take. inside: a slice is being run, so that nothing in it is sliced again. least: the
    most bytes that a slice of one has taken. block: arguments of the block that is being run. done: the output of a
    group, on its way to the group's last module, which has run already.
    """

    max_bytes: int
    inside: bool = False
    least: int = 0
    block: Mapping[str, Any] = field(default_factory=dict)
    done: tuple[nn.Module, Tensor] | None = None

    def check_handed_over(self) -> None:
        """Raise if a group has run whose last module was never handed its output, and so may yet run twice."""
        if self.done is not None:
            raise DiffusionCacheError(
                f"a {type(self.done[0]).__name__} was sliced together with what stands before it in its block, but the "
                "block did not hand that on to it: call remove() on what slice_features returned, and run it whole"
            )


# None outside of calls of a sliced denoiser
FRAME: ContextVar[Frame | None] = ContextVar("diffusion_cache_slicing", default=None)


class Runner:
    """Carries one module out, in slices where it can: inside a sliced denoiser, and with no one watching its parts.

    follower: the module that takes this one's output next, is sliced alike, and so runs with it, slice by slice.
    """

    def __init__(self, name: str, module: nn.Module, forward: Forward):
        self.name, self.module, self.forward = name, module, forward
        self.follower: Runner | None = None
        self._signature = inspect.signature(module.forward)
        self._parts = tuple(module.modules())
        self._bytes_of_one: dict[Hashable, int] = {}
        self._told = False

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the module's arguments."""
        return tuple(self._signature.parameters)

    @property
    def frame(self) -> Frame:
        frame = FRAME.get()
        assert frame is not None
        return frame

    def __call__(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        frame = FRAME.get()
        if frame is None or frame.inside or not self.free():
            return inner(*args, **kwargs)
        arguments = self.bind(args, kwargs)
        output = None if arguments is None else self.forward(self, inner, arguments)
        return inner(*args, **kwargs) if output is None else output

    def bind(self, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
        """All arguments by name; None where the module would return more than tensors, or is given what it ignores."""
        arguments = self._signature.bind(*args, **kwargs)
        arguments.apply_defaults()
        named = dict(arguments.arguments)
        for name, parameter in self._signature.parameters.items():
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) and named.pop(name):
                return None
        return None if named.get("return_dict") else named

    def free(self) -> bool:
        """Whether the module may run in slices: its parts are no spans of the active cache, and nobody hooks them."""
        run = ACTIVE.get()
        if run is not None and any(is_intercepted(part, run.session) for part in self._parts[1:]):
            return False
        hooked = any(_hooked(part) for part in self._parts)
        if hooked and not self._told:
            self._told = True
            warnings.warn(
                f"{self.name} is run whole: it or a part of it has hooks or a replaced forward (offloading, for "
                "instance), which expect whole tensors",
                DiffusionCacheWarning,
                stacklevel=2,
            )
        return not hooked

    def sweep(
        self,
        stage: Hashable,
        like: Tensor,
        total: int,
        run: Callable[[slice], Tensor],
        dim: int = 0,
        into: Tensor | None = None,
        others: Any = (),
    ) -> Tensor:
        """run(part) for slices of range(total), put together along dim.

        Slices are of one size, the largest that fits. What one takes is measured on the first slice there is, which is
        then of size one; larger ones take at most in proportion.

        Args:
            stage: which of the module's sweeps this is. With the shapes and types of `like` and of the tensors in
                `others`, what a slice's bytes depend on.
            into: where to put the outputs; run must read no other slice of it than its own.
            others: whatever else run reads of what the module is given.
        """
        read = [tensor for tensor in tree_iter((like, others)) if isinstance(tensor, Tensor)]
        frame, key = self.frame, (stage, *((tensor.shape, tensor.dtype) for tensor in read))
        measured = None
        if key not in self._bytes_of_one:
            with LiveBytes() as made:
                measured = _inside(frame, run, slice(0, 1))
            self._bytes_of_one[key] = made.peak
        one = self._bytes_of_one[key]
        frame.least = max(frame.least, one)
        # where one does not fit, the call ends in an error that names the least that would, and takes no more than it
        size = max(frame.max_bytes, frame.least) // max(one, 1)
        for part in _parts(total, size, measured is not None):
            piece = _inside(frame, run, part) if measured is None else measured
            if part == slice(0, total):
                return piece
            if into is None:
                into = piece.new_empty([*piece.shape[:dim], total, *piece.shape[dim + 1 :]])
            into.narrow(dim, part.start, part.stop - part.start).copy_(piece)
            del piece  # before the next one is made
            measured = None
        assert into is not None
        return into


class Chain:
    """Carries out a block whose members run one another's followers: keeps its arguments for them."""

    def __init__(self, block: nn.Module):
        self._signature = inspect.signature(block.forward)

    def __call__(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        frame = FRAME.get()
        if frame is None:
            return inner(*args, **kwargs)
        before, frame.block = frame.block, self._signature.bind(*args, **kwargs).arguments
        try:
            output = inner(*args, **kwargs)
            frame.check_handed_over()
            return output
        finally:
            frame.block, frame.done = before, None


def _parts(total: int, size: int, one_first: bool) -> list[slice]:
    """range(total) in the fewest slices of at most size, as equal as can be; one_first: after one of size 1."""
    begin = int(one_first)
    count = math.ceil((total - begin) / size)
    bounds = [*range(begin), *(begin + (total - begin) * i // count for i in range(count)), total]
    return [slice(start, stop) for start, stop in pairwise(bounds)]


def _inside(frame: Frame, run: Callable[[slice], Tensor], part: slice) -> Tensor:
    frame.inside = True
    try:
        return run(part)
    finally:
        frame.inside = False


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))
