"""Modules whose output's rows depend on the same rows of some of their arguments alone: exact in slices of rows."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_iter, tree_map_only

from .runner import Runner


@dataclass(frozen=True)
class Rows:
    """The named arguments and the output are sliced alike, by batch·frames; all other arguments must hold no tensor.

    names: of the arguments, the first one the sample's.
    """

    names: tuple[str, ...]

    def __call__(self, runner: Runner, inner: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        frame, sample = runner.frame, arguments[self.names[0]]
        if frame.done is not None and frame.done[0] is runner.module and frame.done[1] is sample:
            frame.done = None  # the group has run
            return (sample,)
        rows = len(sample)
        if not rows or not self._fits(arguments, rows):
            return None
        unpacks = "return_dict" in arguments

        def run(part: slice) -> Tensor:
            output = inner(**self._cut(arguments, part, rows))
            return output[0] if unpacks else output

        follower = runner.follower
        # with gradients on, blocks may call their members through checkpoints
        if follower is not None and frame.block and follower.free() and not torch.is_grad_enabled():
            rule = cast(Rows, follower.forward)
            more = {name: frame.block[name] for name in follower.parameters if name in frame.block}
            more.pop(rule.names[0], None)
            if rule._fits(more, rows):
                frame.check_handed_over()

                def both(part: slice) -> Tensor:
                    return follower.module(run(part), **rule._cut(more, part, rows), return_dict=False)[0]

                output = runner.sweep("with its follower", sample, rows, both, others=(arguments, more))
                frame.done = follower.module, output
                return output
        output = runner.sweep("alone", sample, rows, run, others=arguments)
        return (output,) if unpacks else output

    def _fits(self, arguments: Mapping[str, Any], rows: int) -> bool:
        named = [arguments.get(name) for name in self.names]
        others = [value for name, value in arguments.items() if name not in self.names]
        return all(t.ndim and len(t) in (rows, 1) for t in _tensors(named)) and not any(_tensors(others))

    def _cut(self, arguments: Mapping[str, Any], part: slice, rows: int) -> dict[str, Any]:
        def cut(tensor: Tensor) -> Tensor:
            return tensor[part] if len(tensor) == rows else tensor  # or one row for all

        return {k: tree_map_only(Tensor, cut, v) if k in self.names else v for k, v in arguments.items()}


def tokens(runner: Runner, inner: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """A module of one argument that treats every token of [..., c] by itself."""
    sample = arguments["hidden_states"]
    rows = sample.flatten(0, -2)
    if not len(rows):
        return None
    return runner.sweep("tokens", rows, len(rows), lambda part: inner(rows[part])).unflatten(0, sample.shape[:-1])


def _tensors(values: Any) -> Iterable[Tensor]:
    return [value for value in tree_iter(values) if isinstance(value, Tensor)]
