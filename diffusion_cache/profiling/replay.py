"""Repeating the beginning of a generation, for others that differ from it only from some step on."""

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..engine import Method
from ..engine.intercept import clear_runner, runner_of, set_runner
from ..engine.patches import wrapped_step
from ..engine.structure import PassThrough, flatten, unflatten
from ..models import find_denoisers

LIMIT = 2 * 2**30  # bytes of outputs that are kept


class Place(NamedTuple):
    """A call of a module in a generation; call: its number in the step."""

    module: nn.Module
    step: int
    call: int


Compute = Callable[[], Any]


class Replay:
    """What the spans of a pipeline's generation gave at its computed steps.

    Another generation that goes the same way up to some step takes it from there in place of computing it. The cache is
    none the wiser: its histories fill as they would. Kept are the outputs of spans; of their inner modules, whose
    outputs nothing else reads, only the shapes.
    """

    def __init__(self, pipe: Any, method: Method, limit: int = LIMIT):
        """method: what is attached to the pipeline in each of the generations."""
        self._scheduler = pipe.scheduler
        spans = [span for denoiser in find_denoisers(pipe).values() for span in method.layout(denoiser).spans]
        self._ends = {span.members[-1] for span in spans}
        self._modules = list(dict.fromkeys(module for span in spans for module in span.members))
        if any(runner_of(module) is not None for module in self._modules):
            self._modules = []  # they run in slices: all is computed
        self._limit = limit
        self._kept: dict[Place, Callable[[], Any]] = {}  # what makes the output once more
        self._bytes, self._known = 0, 0  # of kept outputs; steps that are known from the first to the last call

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Note what is computed in the generation inside the block."""
        self._kept.clear()
        self._bytes, self._known = 0, 0

        def note(place: Place, compute: Compute) -> Any:
            output = compute()
            if self._bytes <= self._limit:
                self._kept[place] = self._copied(place.module, output)
                self._known = place.step + 1 if self._bytes <= self._limit else place.step
            return output

        with self._running(note):
            yield

    @contextmanager
    def until(self, step: int) -> Iterator[None]:
        """Before this step, what was noted in place of what would be computed, in the generation inside the block."""
        end = min(step, self._known)

        def give(place: Place, compute: Compute) -> Any:
            return self._kept[place]() if place.step < end else compute()

        with self._running(give):
            yield

    @contextmanager
    def _running(self, run: Callable[[Place, Compute], Any]) -> Iterator[None]:
        """Calls of the modules give what `run` does."""
        step = 0
        calls: Counter[nn.Module] = Counter()  # in this step

        def runner_for(module: nn.Module) -> Callable[..., Any]:
            def runner(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
                calls[module] += 1
                return run(Place(module, step, calls[module]), functools.partial(inner, *args, **kwargs))

            return runner

        def make(original: Callable) -> Callable:
            def stepping(scheduler: Any, *args: Any, **kwargs: Any) -> Any:
                nonlocal step
                step += 1
                calls.clear()
                return original(scheduler, *args, **kwargs)

            return stepping

        with ExitStack() as stack:
            stack.enter_context(wrapped_step(self._scheduler, make))
            for module in self._modules:
                set_runner(module, runner_for(module))
                stack.callback(clear_runner, module)
            yield

    def _copied(self, module: nn.Module, output: Any) -> Callable[[], Any]:
        """What makes an output like this one."""
        if module not in self._ends:
            return PassThrough.of(output).output
        flat, shape = flatten(output)
        kept = [leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in flat]
        self._bytes += sum(leaf.nbytes for leaf in kept if isinstance(leaf, Tensor))

        def again() -> Any:  # a copy, for a model may write into what its blocks return
            return unflatten([leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in kept], shape)

        return again
