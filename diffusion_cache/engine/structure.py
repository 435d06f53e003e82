"""What a module received and returned, taken apart into tensors and put together again."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import ConfigError
from ..history import Leaf
from ..models import unwrap

K = TypeVar("K")
V = TypeVar("V")
Inputs = dict[int | str, Tensor]
CONTAINERS = (list, tuple, dict)
LEARNED = 10_000  # entries kept, over all spans and all sizes, prompt lengths and batches they are called with
IMAGE_STREAM = ("hidden_states", "sample", "x", "gen_seq")  # the last of Cosmos3Omni's layers, after their text
SAMPLES = (
    *IMAGE_STREAM,
    "vision_tokens",
    "decoder_input_tokens",
)  # of Cosmos3Omni and T5FilmDecoder, among others' text


class Newest(dict[K, V]):
    """A dict of at most `limit` entries: of what can be learned again, the oldest goes."""

    def __init__(self, limit: int):
        super().__init__()
        self.limit = limit

    def __setitem__(self, key: K, value: V) -> None:
        super().__setitem__(key, value)
        while len(self) > self.limit:
            self.pop(next(iter(self)), None)

    def drop(self, unwanted: Callable[[K], bool]) -> None:
        """Take out the entries of unwanted keys."""
        for key in [key for key in self if unwanted(key)]:
            self.pop(key, None)


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


def first_tensor(output: Any) -> Tensor:
    """The model output in what a denoiser call gives."""
    return next(leaf for leaf in flatten(output)[0] if isinstance(leaf, Tensor))


def tensor_inputs(args: tuple, kwargs: Mapping[str, Any]) -> Inputs:
    """The tensors among a call's arguments, by position or name; those inside lists and dicts as "name.0"."""
    found: Inputs = {}
    for given in (enumerate(args), kwargs.items()) if args else (kwargs.items(),):
        for name, value in given:
            if isinstance(value, Tensor):
                found[name] = value
            elif isinstance(value, CONTAINERS) and value:
                _note_inside(name, value, found)
    return found


def _note_inside(key: int | str, value: list | tuple | dict, found: Inputs) -> None:
    for name, item in value.items() if isinstance(value, dict) else enumerate(value):
        if isinstance(item, Tensor):
            found[f"{key}.{name}"] = item
        elif isinstance(item, CONTAINERS):
            _note_inside(f"{key}.{name}", item, found)


def image_stream(inputs: Inputs, module: nn.Module | None = None) -> Tensor:
    """The tensor that carries the sample: by its usual names, else the first. module: what is called with these."""
    for name in IMAGE_STREAM:
        if name in inputs:
            return inputs[name]
    place = _stream_place(module)
    return inputs[place] if place in inputs else next(iter(inputs.values()))


def _stream_place(module: nn.Module | None) -> int:
    """Where a module takes the sample among what it is given by position: by its parameter's name, else first."""
    return 0 if module is None else _place_in(type(unwrap(module)).forward)


@functools.cache
def _place_in(forward: Callable) -> int:
    try:
        _, *names = inspect.signature(forward).parameters
    except (TypeError, ValueError):  # what is not written in Python
        return 0
    return next((names.index(name) for name in IMAGE_STREAM if name in names), 0)


def row_stream(inputs: Inputs, module: nn.Module | None = None) -> Tensor:
    """The same as [rows, ...] where a denoiser takes a list of single samples.

    Raises:
        ConfigError: where those are of different sizes.
    """
    for name in (*SAMPLES, _stream_place(module)):
        if name in inputs:
            return inputs[name]
        single = [tensor for key, tensor in inputs.items() if str(key).startswith(f"{name}.")]
        if len({tensor.shape for tensor in single}) > 1:
            raise ConfigError(
                "the samples of this call are of different sizes, which adaptive policies cannot compare as one: use a "
                "planned policy (interval), or equal sizes"
            )
        if single:
            return torch.stack(single)
    return image_stream(inputs, module)


def row_output(outputs: list[Tensor], inputs: Inputs, module: nn.Module | None = None) -> Tensor:
    """Of what a module gave, the stream of the sample: of the shape that it had when it went in."""
    shape = row_stream(inputs, module).shape
    return next((tensor for tensor in outputs if tensor.shape == shape), outputs[0])


def sample_of(args: tuple, kwargs: dict[str, Any]) -> Any:
    """The argument that carries the sample: by its usual names, else the first."""
    for name in IMAGE_STREAM:
        if kwargs.get(name) is not None:
            return kwargs[name]
    return args[0] if args else next(iter(kwargs.values()), None)


def with_sample(args: tuple, kwargs: dict[str, Any], sample: Any) -> tuple[tuple, dict[str, Any]]:
    """The arguments with another value for the one that `sample_of` gives."""
    for name in IMAGE_STREAM:
        if kwargs.get(name) is not None:
            return args, {**kwargs, name: sample}
    if args:
        return (sample, *args[1:]), kwargs
    first = next(iter(kwargs))
    return args, {**kwargs, first: sample}


def signature(inputs: Inputs) -> tuple:
    """What must be equal for a stored feature to fit a call: shapes, dtypes and devices of all tensor inputs."""
    return tuple([(key, tensor.shape, tensor.dtype, tensor.device) for key, tensor in inputs.items()])


def matching_input(out: Tensor, inputs: Inputs) -> int | str | None:
    """The input that an output continues: of its shape, dtype and device; the nearest in value where several are."""
    candidates = [key for key, tensor in inputs.items() if _alike(out, tensor)]
    if len(candidates) < 2:
        return candidates[0] if candidates else None
    # residual blocks change a stream little; unrelated streams differ by their own size
    return min(candidates, key=lambda key: float((out - inputs[key]).abs().float().mean()))


def _by_position(output: Any, inputs: Inputs) -> list[str] | None:
    """The samples that the entries of a list of outputs continue, of a list of inputs as long and of the same sizes."""
    given = [*output.values()] if isinstance(output, Mapping) else [*output] if isinstance(output, tuple) else [output]
    if len(given) != 1 or not isinstance(given[0], list):
        return None
    outputs, keys = given[0], [str(key).rpartition(".") for key in inputs]
    lists = dict.fromkeys(name for name, _, place in keys if name and place.isdecimal())
    for name in sorted(lists, key=lambda name: name not in (*SAMPLES, "0")):
        entries = [f"{name}.{i}" for i in range(len(outputs))]
        if f"{name}.{len(outputs)}" not in inputs and all(
            isinstance(out, Tensor) and key in inputs and _alike(out, inputs[key])
            for out, key in zip(outputs, entries, strict=True)
        ):
            return entries
    return None


def _sample_input(out: Tensor, inputs: Inputs) -> int | str | None:
    """The input that a velocity is of, whose values are not near: the sample (`sample_of`), where it is like that."""
    key = next((name for name in (*IMAGE_STREAM, *inputs) if name in inputs and "." not in str(name)), None)
    return key if key is not None and _alike(out, inputs[key]) else matching_input(out, inputs)


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device


@dataclass(frozen=True)
class Template:
    """The structure of a span's output: its tensors among other leaves, and what the history keeps of each."""

    shape: Shape
    constants: tuple[Any, ...]
    tensors: list[int]
    leaves: tuple[Leaf, ...]

    @classmethod
    def of(cls, output: Any, inputs: Inputs, residual: bool, keeps_inputs: bool = False) -> "Template":
        """Raises ConfigError where inputs are to be kept, and an output continues none of them."""
        flat, shape = flatten(output)
        tensors = [i for i, leaf in enumerate(flat) if isinstance(leaf, Tensor)]
        listed: Sequence[str | None] = _by_position(output, inputs) or [None] * len(tensors)
        leaves = []
        for leaf, place in zip((flat[i] for i in tensors), listed, strict=True):
            base = kept = None
            if leaf.is_floating_point():
                base = place or matching_input(leaf, inputs) if residual else None
                kept = place or _sample_input(leaf, inputs) if keeps_inputs else None
            if keeps_inputs and kept is None:
                raise ConfigError(
                    f"the forecaster goes by what a span is given, and none of its inputs has the shape of its output "
                    f"{tuple(leaf.shape)}: take another, forecaster='taylor'"
                )
            leaves.append(Leaf(base, kept))
        return cls(shape, tuple(None if isinstance(x, Tensor) else x for x in flat), tensors, tuple(leaves))

    def split(self, output: Any) -> list[Tensor] | None:
        """The output's tensors, or None if its structure is another."""
        if self.shape.kind == "tensor":
            return [output] if isinstance(output, Tensor) else None
        if type(output) is tuple and self.shape.kind == "tuple" and len(self.tensors) == len(self.constants):
            # what most blocks return, the quick way
            fits = len(output) == len(self.tensors) and all([isinstance(leaf, Tensor) for leaf in output])
            return list(output) if fits else None
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
    """What a skipped member that is not its span's last returns: tensors of the right shapes, with any content.

    Nothing of it reaches the output (the last member's forecast replaces it), but code between members may read its
    structure and add to it. That code may also write into them, so they are nobody else's.
    """

    shape: Shape
    constants: tuple[Any, ...]
    tensors: tuple[tuple[int, Like], ...]

    @classmethod
    def of(cls, output: Any) -> "PassThrough":
        flat, shape = flatten(output)
        tensors = [(i, Like(x.shape, x.dtype, x.device)) for i, x in enumerate(flat) if isinstance(x, Tensor)]
        return cls(shape, tuple(None if isinstance(x, Tensor) else x for x in flat), tuple(tensors))

    def output(self, poisoned: bool = False) -> Any:
        """poisoned: filled with NaN, which shows up in whatever depends on it."""
        flat = list(self.constants)
        for i, like in self.tensors:
            flat[i] = torch.empty(like.shape, dtype=like.dtype, device=like.device)
            if poisoned and like.dtype.is_floating_point:
                flat[i].fill_(float("nan"))
        return unflatten(flat, self.shape)

    @property
    def shareable(self) -> bool:
        """Whether an output can be given in several places of a call: tensors in nothing that can be changed."""
        return self.shape.kind in ("tensor", "tuple") and all(constant is None for constant in self.constants)

    def serves(self, other: "PassThrough") -> bool:
        """Whether an output of this can be given for one of the other as well."""
        return self.shareable and (self.shape, self.tensors) == (other.shape, other.tensors)

    def spread(self, output: Any, rows: Tensor) -> Any:
        """An output of some batch rows as part of one of the whole batch; the other rows are zero."""
        flat, _ = flatten(output)
        for i, like in self.tensors:
            if flat[i].shape != like.shape:
                whole = torch.zeros(like.shape, dtype=like.dtype, device=like.device)
                flat[i] = whole.index_copy_(0, rows, flat[i])
        return unflatten(flat, self.shape)


def select_rows(value: Any, batch: int, rows: Tensor) -> Any:
    """The value with only some rows of the tensors in it whose first axis is the batch."""
    if isinstance(value, Tensor):
        return value.index_select(0, rows) if value.ndim and len(value) == batch else value
    if isinstance(value, dict):
        return {name: select_rows(item, batch, rows) for name, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(select_rows(item, batch, rows) for item in value)
    return value


def copied(value: Any) -> Any:
    """The value with tensors, lists and dicts of its own: some forwards write into those they are given."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {name: copied(item) for name, item in value.items()}
    return type(value)(map(copied, value)) if type(value) in (list, tuple) else value


def unshared(value: Any) -> Any:
    """The value with lists and dicts of its own around the same items: some forwards take items out of theirs."""
    if type(value) is dict:
        return {name: unshared(item) if isinstance(item, CONTAINERS) else item for name, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)([unshared(item) if isinstance(item, CONTAINERS) else item for item in value])
    return value


def forked_rng() -> Any:
    """A context after which torch's random numbers go on as if nothing had been drawn in it."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    return torch.random.fork_rng(devices=list(devices))
