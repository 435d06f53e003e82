"""Forecasts of branches that are made where they are used.

A block takes what its attention or feed-forward gives, scales it by a gate and adds it to its stream, two more passes
over memory than the forecast itself. A branch's forecast is therefore handed over as a tensor that is not made yet:
multiplied by a gate it stays one that also holds the gate, and added to a stream it is `ops.gated_forecast`, or
`ops.forecast` where nothing scaled it, one pass in all. Whatever else is done with it makes it first, by the plain way,
and goes on with an ordinary tensor. No model's blocks need to be known for that.
"""

import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .. import ops

aten = torch.ops.aten


class Terms(NamedTuple):
    """What `ops.forecast` makes a branch's forecast of; and all tensors that stand for it, gated or not."""

    features: Sequence[Tensor | ops.Coded]
    weights: Sequence[float] | Tensor
    correction: Tensor | None
    given: "list[weakref.ref[Deferred]]"

    @property
    def like(self) -> Tensor | ops.Coded:
        return self.features[0]

    @property
    def shape(self) -> torch.Size:
        return self.like.codes.shape if isinstance(self.like, ops.Coded) else self.like.shape

    @property
    def device(self) -> torch.device:
        return self.like.codes.device if isinstance(self.like, ops.Coded) else self.like.device


class Deferred(Tensor):
    """gate · forecast in some dtype, [rows, tokens, channels], made when it is looked at.

    Features and gate must not be written into meanwhile: what is unmade at the end of a denoiser call is made there.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    _terms: Terms
    _gate: Tensor | None
    _made: Tensor | None

    @staticmethod
    def __new__(cls, terms: Terms, dtype: torch.dtype, gate: Tensor | None = None) -> "Deferred":
        self = Tensor._make_wrapper_subclass(cls, terms.shape, dtype=dtype, device=terms.device)
        self._terms, self._gate, self._made = terms, gate, None
        terms.given.append(weakref.ref(self))
        return self

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, operator: Any, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        fused = _FUSED.get(operator)
        result = None if fused is None else fused(*args, **(kwargs or {}))
        if result is not None:
            return result
        args, kwargs = pytree.tree_map_only(Deferred, Deferred.made, (args, kwargs or {}))
        return operator(*args, **kwargs)

    def made(self) -> Tensor:
        """The ordinary tensor, always the same one: it may have been written into."""
        if self._made is None:
            features, weights, correction, _ = self._terms
            plain = ops.forecast(None, features, weights, correction).to(self.dtype)
            self._made = plain if self._gate is None else self._gate * plain
        return self._made


def _made_first(name: str) -> Callable:
    def method(self: Deferred, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.made(), name)(*args, **kwargs)

    return method


# what reaches no operator; kernels that take addresses ask for `data_ptr`
for _name in ("data_ptr", "tolist", "numpy", "__repr__", "__deepcopy__", "__reduce_ex__"):
    setattr(Deferred, _name, _made_first(_name))


def _gated(a: Any, b: Any) -> Tensor | None:
    branch, gate = (a, b) if isinstance(a, Deferred) else (b, a)
    if not _is_open(branch, gate) or branch._gate is not None or gate.ndim > 3:
        return None
    if gate.ndim == 0:
        gate = gate.to(branch.dtype)  # one number is not what makes others wider
    if gate.ndim < 3:
        gate = gate[(None,) * (3 - gate.ndim)]
    if any(size not in (1, whole) for size, whole in zip(gate.shape, branch.shape, strict=True)):
        return None
    return Deferred(branch._terms, torch.promote_types(branch.dtype, gate.dtype), gate)


def _joined(a: Any, b: Any, alpha: Any = 1) -> Tensor | None:
    branch, stream = (a, b) if isinstance(a, Deferred) else (b, a)
    if not _is_open(branch, stream) or alpha != 1 or stream.shape != branch.shape:
        return None
    if torch.promote_types(stream.dtype, branch.dtype) != stream.dtype:
        return None
    features, weights, correction, _ = branch._terms
    if branch._gate is not None:
        return ops.gated_forecast(stream, branch._gate, features, weights, correction)
    if correction is None and branch._terms.like.dtype == stream.dtype:
        return ops.forecast(stream, features, weights)
    return None


def _cast(branch: Deferred, dtype: torch.dtype | None = None, *others: Any, **named: Any) -> Tensor | None:
    """A cast that loses nothing: Wan's blocks gate their feed-forward in float32."""
    if dtype is None or any(value not in (None, False) for value in (*others, *named.values())):
        return None
    if dtype == branch.dtype:
        return branch
    if branch._made is not None or branch._gate is not None or torch.promote_types(branch.dtype, dtype) != dtype:
        return None
    return Deferred(branch._terms, dtype)


def _dropped_out(branch: Deferred, share: float, train: bool | None) -> Tensor | None:
    return None if train else branch


def _is_open(branch: Any, other: Any) -> bool:
    """Whether a forecast can still take on what an ordinary tensor of numbers does to it."""
    return (
        branch._made is None
        and isinstance(other, Tensor)
        and not isinstance(other, Deferred)
        and other.is_floating_point()
        and other.device == branch.device
    )


_FUSED: dict[Any, Callable[..., Tensor | None]] = {
    aten.mul.Tensor: _gated,
    aten.add.Tensor: _joined,
    aten._to_copy.default: _cast,
    # in inference mode these are not taken apart before they come here
    aten.to.dtype: _cast,
    aten.dropout.default: _dropped_out,
}
