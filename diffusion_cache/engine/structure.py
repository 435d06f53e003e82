"""What a module received and returned, taken apart into tensors and put together again."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..history import Leaf

Inputs = dict[int | str, Tensor]
IMAGE_STREAM = ("hidden_states", "sample", "x")


class Shape(NamedTuple):
    """How leaves make up a value: "tensor", "tuple" of leaves, or whatever a pytree spec describes."""

    kind: str
    spec: Any = None


def flatten(value: Any) -> tuple[list[Any], Shape]:
    """A value's leaves and how to put them together again. Blocks return tensors or flat tuples: those are quick."""
    if isinstance(value, Tensor):
        return [value], Shape("tensor")
    if type(value) is tuple and all(leaf is None or isinstance(leaf, Tensor) for leaf in value):
        return list(value), Shape("tuple", len(value))
    leaves, spec = pytree.tree_flatten(value)
    return leaves, Shape("tree", spec)


def unflatten(leaves: list[Any], shape: Shape) -> Any:
    if shape.kind == "tensor":
        return leaves[0]
    return tuple(leaves) if shape.kind == "tuple" else pytree.tree_unflatten(leaves, shape.spec)


def tensor_inputs(args: tuple, kwargs: Mapping[str, Any]) -> Inputs:
    """The tensors among a call's arguments, by position or name."""
    found: Inputs = {i: value for i, value in enumerate(args) if isinstance(value, Tensor)}
    for name, value in kwargs.items():
        if isinstance(value, Tensor):
            found[name] = value
    return found


def image_stream(inputs: Inputs) -> Tensor:
    """The tensor that carries the sample: by its usual names, else the first."""
    for name in IMAGE_STREAM:
        if name in inputs:
            return inputs[name]
    return next(iter(inputs.values()))


def signature(inputs: Inputs) -> tuple:
    """What must be equal for a stored feature to fit a call: shapes, dtypes and devices of all tensor inputs."""
    return tuple((key, tensor.shape, tensor.dtype, tensor.device) for key, tensor in inputs.items())


def matching_input(out: Tensor, inputs: Inputs) -> int | str | None:
    """The input that an output continues: of its shape, dtype and device; the nearest in value where several are."""
    candidates = [
        key
        for key, tensor in inputs.items()
        if tensor.shape == out.shape and tensor.dtype == out.dtype and tensor.device == out.device
    ]
    if len(candidates) < 2:
        return candidates[0] if candidates else None
    # residual blocks change a stream little; unrelated streams differ by their own size
    return min(candidates, key=lambda key: float((out - inputs[key]).abs().float().mean()))


@dataclass(frozen=True)
class Template:
    """The structure of a span's output: its tensors among other leaves, and what the history keeps of each."""

    shape: Shape
    constants: tuple[Any, ...]
    tensors: list[int]
    leaves: tuple[Leaf, ...]

    @classmethod
    def of(cls, output: Any, inputs: Inputs, residual: bool) -> "Template":
        flat, shape = flatten(output)
        tensors = [i for i, leaf in enumerate(flat) if isinstance(leaf, Tensor)]
        leaves = tuple(
            Leaf(matching_input(flat[i], inputs) if residual and flat[i].is_floating_point() else None) for i in tensors
        )
        return cls(shape, tuple(None if isinstance(x, Tensor) else x for x in flat), tensors, leaves)

    def split(self, output: Any) -> list[Tensor] | None:
        """The output's tensors, or None if its structure is another."""
        flat, shape = flatten(output)
        if shape != self.shape or [i for i, leaf in enumerate(flat) if isinstance(leaf, Tensor)] != self.tensors:
            return None
        return [flat[i] for i in self.tensors]

    def join(self, tensors: list[Tensor]) -> Any:
        flat = list(self.constants)
        for i, tensor in zip(self.tensors, tensors, strict=True):
            flat[i] = tensor
        return unflatten(flat, self.shape)


class Like(NamedTuple):
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class PassThrough:
    """What a skipped member that is not its span's last returns: its inputs where shapes match, else empty tensors.

    Nothing of it reaches the output (the last member's forecast replaces it), but code between members may read its
    structure and add to it.
    """

    shape: Shape
    constants: tuple[Any, ...]
    sources: tuple[tuple[int, int | str | None, Like], ...]  # leaf, the input it takes, what it looks like

    @classmethod
    def of(cls, output: Any, inputs: Inputs) -> "PassThrough":
        flat, shape = flatten(output)
        sources = []
        for i, leaf in enumerate(flat):
            if isinstance(leaf, Tensor):
                same = (key for key, x in inputs.items() if x.shape == leaf.shape and x.dtype == leaf.dtype)
                sources.append((i, next(same, None), Like(leaf.shape, leaf.dtype, leaf.device)))
        return cls(shape, tuple(None if isinstance(x, Tensor) else x for x in flat), tuple(sources))

    def output(self, args: tuple, kwargs: Mapping[str, Any]) -> Any:
        flat = list(self.constants)
        for i, key, like in self.sources:
            if key is None:
                flat[i] = torch.empty(like.shape, dtype=like.dtype, device=like.device)
            else:
                flat[i] = args[key] if isinstance(key, int) else kwargs[key]
        return unflatten(flat, self.shape)
