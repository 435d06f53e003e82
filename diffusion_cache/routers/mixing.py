"""Generations whose spans give a mix of what they compute and what is forecast from the cache, by gates in [0, 1].

A span's feature F (as a history holds it: the residual of a block or stack, the output of a branch before its gate)
becomes r·F + (1 − r)·F̂, with F̂ the reuse or Taylor-1 forecast from the steps that were stored. Features are stored as
computed and detached: a run that reuses would have computed them so, and no gradient flows back through time.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..context import Query
from ..engine import session_of
from ..engine.intercept import intercept, release
from ..engine.patches import ACTIVE, wrapped_step
from ..engine.structure import Inputs, Template, flatten, tensor_inputs, unflatten
from ..errors import ConfigError
from ..forecasters import Taylor
from ..models import Span, find_denoisers
from ..profiling.generation import Batch, StepCall, state_of

Features = tuple[Tensor, ...]  # the leaves of one
Histories = dict[tuple[int, int, int], tuple["Stored", ...]]  # by call, span and visit


class Gates(NamedTuple):
    """Of one step. mix: [S], the share of what is computed in each span's output; store: [S], whether it is kept.

    keep: [S], 1 or 0 as `store`, for which later steps' outputs are to have a derivative: what they would be if the
    feature had not been kept, or had been; None for no such derivatives.
    """

    mix: Tensor
    store: Sequence[bool]
    keep: Tensor | None = None

    @classmethod
    def computing(cls, spans: int) -> "Gates":
        return cls(torch.ones(spans), (True,) * spans)


class Stored(NamedTuple):
    """A step's feature. keep: as in `Gates`, of this span."""

    step: int
    features: Features
    kept: bool
    keep: Tensor | None


Run = Callable[[Gates | None], Any]  # makes a denoiser call with gates; with None all is computed and nothing stored


class Conductor(Protocol):
    """Says what happens in each step of one generation."""

    def call(self, step: int, position: int, run: Run) -> Any:
        """What call number `position` of a step gives to the pipeline."""

    def stepped(self, step: int, given: StepCall) -> Any:
        """What the scheduler's step gives; `given.result(given.model_output)` is what it gives by itself."""


@dataclass
class _Call:
    """A denoiser call while it runs."""

    gates: Gates
    step: int
    position: int
    inputs: dict[int, Inputs] = field(default_factory=dict)
    visits: dict[int, int] = field(default_factory=dict)


class Mixture:
    """The spans of one pipeline's denoiser, mixed by gates.

    order: of the forecast, 0 for reuse or 1 for Taylor-1. feature: see `Forecaster`.
    """

    def __init__(self, pipe: Any, spans: Sequence[Span], order: int = 0, feature: str = "auto"):
        if session_of(pipe) is not None:
            raise ConfigError("a router is trained on a pipeline without a cache: call diffusion_cache.disable first")
        self.pipe, self.spans, self.order, self.feature = pipe, tuple(spans), order, feature
        self.histories: Histories = {}
        self._templates: dict[int, Template] = {}
        self._forecaster = Taylor(order)
        self._call: _Call | None = None

    def generate(self, batch: Batch, conductor: Conductor) -> Tensor:
        """Make the batch's samples as the conductor says; the state that the last step gave, [count, ...].

        Raises:
            ConfigError: if the denoiser or the scheduler is not called as it was when the spans were found.
        """
        self.histories = {}
        step, position = 0, 0
        state = None

        def root(_: Any, inner: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
            nonlocal position
            place, position = position, position + 1
            return conductor.call(step, place, lambda gates: self._run(gates, step, place, inner, args, kwargs))

        def make(original: Callable) -> Callable:
            def stepped(scheduler: Any, *args: Any, **kwargs: Any) -> Any:
                nonlocal step, position, state
                if not position:
                    raise ConfigError("the scheduler made a step for which the denoiser was not seen to be called")
                result = conductor.stepped(step, StepCall(original, scheduler, args, kwargs))
                step, position, state = step + 1, 0, state_of(result)
                return result

            return stepped

        with self._intercepted(root), wrapped_step(batch.pipe.scheduler, make):
            batch.call()
        if state is None:
            raise ConfigError(f"{type(batch.pipe).__name__}: no scheduler step was seen in a generation")
        return state[: batch.count].detach()

    @contextmanager
    def _intercepted(self, root: Callable) -> Iterator[None]:
        handlers: list[tuple[nn.Module, Callable]] = [(module, root) for module in find_denoisers(self.pipe).values()]
        for index, span in enumerate(self.spans):
            if span.kind != "denoiser":
                handlers += [(module, self._handler(index, place)) for place, module in enumerate(span.members)]
        with ExitStack() as stack:
            for module, handler in handlers:
                intercept(module, self, handler)
                stack.callback(release, module, self)
            token = ACTIVE.set(SimpleNamespace(session=self, any_scheduler=False, has_part=lambda pipe: False))
            stack.callback(ACTIVE.reset, token)
            yield

    def _run(
        self, gates: Gates | None, step: int, position: int, inner: Callable, args: tuple, kwargs: dict[str, Any]
    ) -> Any:
        if gates is None:
            return inner(*args, **kwargs)
        self._call = _Call(gates, step, position)
        try:
            if self.spans[0].kind == "denoiser":
                return self._member(0, 0, inner, args, kwargs)
            return inner(*args, **kwargs)
        finally:
            self._call = None

    def _handler(self, index: int, place: int) -> Callable:
        def handler(_: Any, inner: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
            return self._member(index, place, inner, args, kwargs)

        return handler

    def _member(self, index: int, place: int, inner: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        call = self._call
        if call is None:
            return inner(*args, **kwargs)
        if place == 0:
            call.inputs[index] = tensor_inputs(args, kwargs)
        output = inner(*args, **kwargs)
        return output if place < len(self.spans[index].members) - 1 else self._mixed(call, index, output)

    def _mixed(self, call: _Call, index: int, output: Any) -> Any:
        """A span's output as its gate mixes it."""
        inputs, template = call.inputs.pop(index), self._templates.get(index)
        tensors = template.split(output) if template is not None else None
        if template is None or tensors is None:
            residual = self.spans[index].stores_residual if self.feature == "auto" else self.feature == "residual"
            template = self._templates[index] = Template.of(output, inputs, residual)
            tensors = template.split(output)
            assert tensors is not None
        visit = call.visits[index] = call.visits.get(index, 0) + 1
        key = call.position, index, visit
        features = tuple(
            tensor if leaf.base is None else tensor - inputs[leaf.base]
            for tensor, leaf in zip(tensors, template.leaves, strict=True)
        )
        past = self.histories.get(key, ())
        if past and not all(_alike(*pair) for pair in zip(past[-1].features, features, strict=True)):
            past = ()  # of more rows, as before guidance ended
        if past:
            missing = 1 - call.gates.mix[index]
            tensors = [
                # exactly the tensor where it is all that counts
                tensor + _scaled(forecast - feature, missing) if tensor.is_floating_point() else tensor
                for tensor, feature, forecast in zip(tensors, features, self._forecast(past, call.step), strict=True)
            ]
        kept = call.gates.store[index] or not past  # what was never seen before is computed in any case
        if kept or call.gates.keep is not None:
            keep = None if call.gates.keep is None else call.gates.keep[index]
            newest = Stored(call.step, tuple(feature.detach() for feature in features), kept, keep)
            self.histories[key] = self._remembered((*past, newest))
        return template.join(tensors)

    def _remembered(self, past: Sequence[Stored]) -> tuple[Stored, ...]:
        """What forecasts can still depend on: the kept ones, one more to do without one, and what came after them."""
        kept = [place for place, stored in enumerate(past) if stored.kept]
        first = kept[max(len(kept) - self.order - 1 - (past[-1].keep is not None), 0)]
        return tuple(
            stored for place, stored in enumerate(past) if place >= kept[-1] or (place >= first and stored.kept)
        )

    def _forecast(self, past: Sequence[Stored], step: int) -> Features:
        """From what was kept; with the derivatives by what else might have been."""
        kept = [stored for stored in past if stored.kept]
        total = self._extrapolated(kept, step)
        for stored in past:
            others = [other for other in kept if other is not stored]
            if stored.keep is None or not others:
                continue
            other = self._extrapolated(others if stored.kept else [*kept, stored], step)
            moved = stored.keep - (1.0 if stored.kept else 0.0)  # zero, with a derivative
            with_it, without = (total, other) if stored.kept else (other, total)
            total = tuple(
                a + _scaled((b - c).detach(), moved) if a.is_floating_point() else a
                for a, b, c in zip(total, with_it, without, strict=True)
            )
        return total

    def _extrapolated(self, past: Sequence[Stored], step: int) -> Features:
        used = past[-self.order - 1 :]
        weights = self._forecaster.weights(Query([stored.step for stored in used], step))
        found = []
        for leaves in zip(*(stored.features for stored in used), strict=True):
            total = leaves[-1]
            if total.is_floating_point():
                total = leaves[0] * weights[0]
                for leaf, weight in zip(leaves[1:], weights[1:], strict=True):
                    total = total + leaf * weight
            found.append(total)
        return tuple(found)


def _scaled(feature: Tensor, gate: Tensor) -> Tensor:
    """A feature times a gate [], whose gradient is a sum over the whole feature and may exceed what 16 bits hold."""
    wide = feature.to(torch.promote_types(feature.dtype, torch.float32))
    return (gate.to(wide) * wide).to(feature.dtype)


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype


def detached(output: Any) -> Any:
    """What a denoiser call gives, without its graph."""
    leaves, shape = flatten(output)
    return unflatten([leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves], shape)


class Following:
    """A conductor that runs every step by these gates, with no gradient. gates(step): None computes all."""

    def __init__(self, gates: Callable[[int], Gates | None]):
        self.gates = gates

    def call(self, step: int, position: int, run: Run) -> Any:
        with torch.no_grad():
            return run(self.gates(step))

    def stepped(self, step: int, given: StepCall) -> Any:
        return given.result(given.model_output)
