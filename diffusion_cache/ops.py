"""Tensor operations on the cached path. Only this module may import `diffusion_cache.kernels`.

Each has one meaning and two ways: a Triton kernel for tensors on a CUDA device, and plain PyTorch everywhere else, also
where gradients are wanted and in code that is being compiled, which Inductor can fuse. DIFFUSION_CACHE_KERNELS in the
environment chooses: "auto" as above, "off" for PyTorch always, "interpret" for the kernels on the CPU as well, run by
Triton's interpreter (slow: to check them without a GPU).
"""

import functools
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import count_sketch
from .errors import ConfigError, DiffusionCacheWarning

WITHOUT_FLOAT64 = frozenset({"mps"})  # devices
LOW_PRECISION = (torch.float16, torch.bfloat16)
CODES = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
_TOP = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
_FLOOR = 2.0**-96  # the largest number of a row counts as no less: a row of zeros divides nothing
_KERNEL_DTYPES = (torch.float32, *LOW_PRECISION)
_KERNEL_SLOTS = 8
_KERNEL_ROW = 16384  # columns of a row that is encoded
_MODES = ("auto", "interpret", "off")


def _mode(environment: Mapping[str, str]) -> str:
    """What DIFFUSION_CACHE_KERNELS says.

    Raises:
        ConfigError: if it is not known, or cannot be.
    """
    mode = environment.get("DIFFUSION_CACHE_KERNELS", "auto")
    if mode not in _MODES:
        raise ConfigError(f"DIFFUSION_CACHE_KERNELS must be one of {', '.join(_MODES)}, not {mode!r}")
    if mode == "interpret" and environment.get("TRITON_INTERPRET") != "1":
        raise ConfigError(
            "DIFFUSION_CACHE_KERNELS=interpret needs TRITON_INTERPRET=1 beside it, which Triton reads at its import"
        )
    return mode


_MODE = _mode(os.environ)


class Coded(NamedTuple):
    """A tensor in one-byte codes: its values are codes · scales, and were of `dtype`.

    codes: [..., D] of a dtype of CODES; scales: [...], float32.
    """

    codes: Tensor
    scales: Tensor
    dtype: torch.dtype


def forecast(
    base: Tensor | None,
    features: Sequence[Tensor | Coded],
    weights: Sequence[float] | Tensor,
    correction: Tensor | None = None,
) -> Tensor:
    """scale · (base + Σ_j weights[j] · features[j]) + bias, accumulated in at least float32; always a new tensor.

    base and every feature have one shape and dtype, which the result keeps. base None stands for zero. weights: one
    number per feature, or a tensor [K] or [rows, K] for K features [rows, ...], each row with its own; features with
    zero weight must be finite then. correction: scale and bias, [rows or 1, 2, channels or 1]. None for 1 and 0.
    """
    if not isinstance(weights, Tensor) and len(weights) != len(features):
        raise ValueError(f"each feature needs a weight, and {len(weights)} are another number of them")
    features, weights = _codes_last(features, weights)
    if isinstance(weights, Tensor):
        values, scales, dtype = _split(features)
        if len(values) <= _KERNEL_SLOTS and _has_kernel(dtype, values[0], base, *values, weights, correction):
            return _run("forecast_residual", base, values, scales, weights, correction, dtype)
    else:
        if not all(weights):
            used = [j for j, weight in enumerate(weights) if weight != 0.0] or [0]
            features, weights = [features[j] for j in used], [weights[j] for j in used]
        values, scales, dtype = _split(features)
        if any(weights) and len(values) <= _KERNEL_SLOTS and _has_kernel(dtype, values[0], base, *values, correction):
            known = shared(tuple(weights), values[0].device)
            return _run("forecast_residual", base, values, scales, known, correction, dtype)
    return _forecast(base, values, scales, weights, correction, dtype)


def _codes_last(
    features: Sequence[Tensor | Coded], weights: Sequence[float] | Tensor
) -> tuple[Sequence[Tensor | Coded], Sequence[float] | Tensor]:
    """Both in the order in which kernels take them."""
    coded = [isinstance(feature, Coded) for feature in features]
    if coded == sorted(coded):
        return features, weights
    order = sorted(range(len(features)), key=coded.__getitem__)
    if isinstance(weights, Tensor):
        # not indexed by the list, which would be copied to the device
        weights = torch.stack([weights[..., j] for j in order], dim=-1)
    else:
        weights = [weights[j] for j in order]
    return [features[j] for j in order], weights


def gated_forecast(
    base: Tensor,
    gate: Tensor,
    features: Sequence[Tensor | Coded],
    weights: Sequence[float] | Tensor,
    correction: Tensor | None = None,
) -> Tensor:
    """base + gate · forecast(None, features, weights, correction), a branch that joins its block's stream; like base.

    base, features: [rows, tokens, channels]; gate: [rows or 1, tokens or 1, channels or 1]; weights: as for `forecast`.
    """
    features, weights = _codes_last(features, weights)
    used = [j for j in range(len(features)) if isinstance(weights, Tensor) or weights[j] != 0.0] or [0]
    values, scales, _ = _split([features[j] for j in used])
    if isinstance(weights, Tensor):
        table = weights
    else:
        table = shared(tuple(weights[j] for j in used), values[0].device)
    if len(values) <= _KERNEL_SLOTS and _has_kernel(base.dtype, base, gate, *values, table, correction):
        return _run("gated_residual", base, gate, values, scales, table, correction)
    return _gated(base, gate, values, scales, table, correction)


def fuses(features: Sequence[Tensor | Coded]) -> bool:
    """Whether a sum of such features is better left to the operation that takes it further: both are one kernel."""
    values, _, dtype = _split(features)
    return values[0].ndim == 3 and len(values) <= _KERNEL_SLOTS and _has_kernel(dtype, *values)


def _split(features: Sequence[Tensor | Coded]) -> tuple[list[Tensor], list[Tensor], torch.dtype]:
    """Numbers or codes, the scales of those that are codes, and the dtype of the features."""
    values = [feature.codes if isinstance(feature, Coded) else feature for feature in features]
    return values, [feature.scales for feature in features if isinstance(feature, Coded)], features[0].dtype


def decoded(feature: Tensor | Coded) -> Tensor:
    """The feature in its own dtype."""
    if isinstance(feature, Tensor):
        return feature
    return _decoded(feature.codes, feature.scales).to(feature.dtype)


def encode_residual(out: Tensor, base: Tensor | None, code: str, into: Coded | None = None) -> Coded:
    """out − base, or out where there is no base, in codes of CODES; into: written and returned, where it is given.

    The scale of a row is its largest magnitude over the code's, so that a value which is not finite shows as a scale
    that is not.
    """
    if into is None:
        scales = torch.empty(out.shape[:-1], dtype=torch.float32, device=out.device)
        into = Coded(torch.empty(out.shape, dtype=CODES[code], device=out.device), scales, out.dtype)
    if out.shape[-1] <= _KERNEL_ROW and _has_kernel(out.dtype, out, base):
        _run("store_residual", into.codes, into.scales, out, base)
    else:
        _store(into.codes, into.scales, out, base)
    return into


def relative_change(current: Tensor, previous: Tensor, measure: str = "l1") -> Tensor:
    """How far each batch row is from what it was, in float32: [batch] from two [batch, ...].

    measure: "l1" for mean|current − previous| / mean|previous|, "l2" for the same of Euclidean norms, "cosine" for the
    cosine of the angle between them. A zero reference gives infinity unless nothing changed.
    """
    if _has_kernel(current.dtype, current, previous) and current.dtype == previous.dtype:
        return _run("relative_l1", current, previous, measure)
    return _relative(current, previous, measure)


def add_sketch(sums: Tensor, flat: Tensor, run: int, first: int, seed: int) -> None:
    """Add features [batch, elements] to their count-sketches [batch, width], float32, in place.

    Each element goes to one of the sums with a sign, as hashes of its index say (`diffusion_cache.count_sketch`).
    run: of the whole feature's runs of `width` elements, the one that these begin with. first: the number of the first
    sample; samples of different numbers have signs of their own. width: a power of two.
    """
    keys = count_sketch.keys_of(seed, first, len(sums))
    if flat.shape[1] and _has_kernel(flat.dtype, flat):
        _run("count_sketch", sums, flat, run, first, *keys)
    else:
        count_sketch.add(sums, flat, run, first, *keys)


def channel_axis(feature: Tensor) -> int:
    """Of a feature [rows, ..., channels], or of one with more than 3 axes, [rows, channels, ...]."""
    return -1 if feature.ndim <= 3 else 1


def channels(feature: Tensor) -> int:
    """How many channels a feature has."""
    return feature.shape[channel_axis(feature)]


def wide(tensor: Tensor) -> Tensor:
    """In at least float32."""
    return tensor.float() if tensor.dtype in LOW_PRECISION else tensor


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """What to sum numbers of a dtype in."""
    return torch.promote_types(dtype, torch.float32)


def double(tensor: Tensor) -> Tensor:
    """In float64: on its device, or on the CPU where that has none."""
    return (tensor.cpu() if tensor.device.type in WITHOUT_FLOAT64 else tensor).to(torch.float64)


# in PyTorch


def _forecast(
    base: Tensor | None,
    features: Sequence[Tensor],
    scales: Sequence[Tensor],
    weights: Sequence[float] | Tensor,
    correction: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    if scales:
        plain = len(features) - len(scales)
        features = [*map(wide, features[:plain]), *map(_decoded, features[plain:], scales)]
        base = None if base is None else base.float()
    if isinstance(weights, Tensor):
        return _forecast_tensor(base, features, weights, correction).to(dtype)
    terms = [(weight, feature) for weight, feature in zip(weights, features, strict=True) if weight != 0.0]
    if not terms:
        return _corrected(torch.zeros_like(features[0]) if base is None else base.clone(), correction).to(dtype)
    if features[0].dtype in LOW_PRECISION:
        terms = [(weight, feature.float()) for weight, feature in terms]
        base = None if base is None else base.float()
    (weight, feature), *rest = terms
    if base is not None:
        total = torch.add(base, feature, alpha=weight)
    else:
        total = feature.clone() if weight == 1.0 else feature * weight
    for weight, feature in rest:
        total.add_(feature, alpha=weight)
    return _corrected(total, correction).to(dtype)


def _forecast_tensor(
    base: Tensor | None, features: Sequence[Tensor], weights: Tensor, correction: Tensor | None
) -> Tensor:
    """In float32 at least."""
    if weights.shape[-1] != len(features):
        raise ValueError(f"each feature needs a weight, and {weights.shape[-1]} are another number of them")
    dtype = torch.float32 if features[0].dtype in LOW_PRECISION else features[0].dtype
    weights = weights.to(dtype)
    shape = (-1, *[1] * (features[0].ndim - 1)) if weights.ndim == 2 else ()
    total = torch.zeros_like(features[0], dtype=dtype) if base is None else base.to(dtype)
    for j, feature in enumerate(features):
        total = torch.addcmul(total, weights[..., j].reshape(shape), feature.to(dtype))
    return _corrected(total, correction)


def _corrected(output: Tensor, correction: Tensor | None) -> Tensor:
    if correction is None or not output.is_floating_point():
        return output
    rows, _, count = correction.shape
    between = (1,) * (output.ndim - 2)
    shape = (rows, *between, count) if output.ndim <= 3 else (rows, count, *between)
    output = wide(output)
    scale, bias = (part.reshape(shape).to(output.dtype) for part in correction.unbind(1))
    return torch.addcmul(bias, scale, output)


def _gated(
    base: Tensor,
    gate: Tensor,
    features: Sequence[Tensor],
    scales: Sequence[Tensor],
    weights: Tensor,
    correction: Tensor | None,
) -> Tensor:
    dtype = at_least_float32(base.dtype)
    if not scales:
        features = [feature.to(dtype) for feature in features]
    branch = _forecast(None, features, scales, weights, correction, dtype)
    return torch.addcmul(base.to(dtype), gate.to(dtype), branch).to(base.dtype).contiguous()


def _store(codes: Tensor, scales: Tensor, out: Tensor, base: Tensor | None) -> None:
    """Every operation rounds as the kernel's does, so that both give the same bits."""
    residual = out.float() if base is None else out.float() - base.float()
    largest = residual.abs().amax(-1, keepdim=True)
    largest = torch.where(largest < _FLOOR, _FLOOR, largest)
    top = torch.full_like(largest, _TOP[codes.dtype])  # a number would be divided by as a product with its reciprocal
    steps = (residual * (top / largest)).clamp_(-_TOP[codes.dtype], _TOP[codes.dtype])
    if codes.dtype == torch.int8:
        steps = steps.round_().nan_to_num_()
    codes.copy_(steps)
    scales.copy_((largest / top).squeeze(-1))


def _decoded(codes: Tensor, scales: Tensor) -> Tensor:
    return codes.float() * scales.unsqueeze(-1)


def _relative(current: Tensor, previous: Tensor, measure: str) -> Tensor:
    a, b = current.float().flatten(1), previous.float().flatten(1)
    if measure == "cosine":
        return (a * b).mean(1) / (a.square().mean(1) * b.square().mean(1)).sqrt()
    change, size = (a - b, b) if measure == "l1" else ((a - b).square(), b.square())
    difference, scale = change.abs().mean(1), size.abs().mean(1)
    ratio = difference / scale if measure == "l1" else (difference / scale).sqrt()
    return torch.where(difference == 0, torch.zeros_like(difference), ratio)


# numbers of the host


def on_device(numbers: Sequence[Any], device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """A new tensor of these numbers, for which the host does not wait for the device."""
    values = torch.tensor(numbers, dtype=dtype, device="cpu")  # whatever the default device is
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def shared(numbers: tuple[Any, ...], device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """The same of a few numbers that come again, as weights do that spans share in a step; not to be written into."""
    if device.type != "cuda":
        return _shared(numbers, device, dtype, 0)
    if torch.cuda.is_current_stream_capturing():
        return on_device(numbers, device, dtype)  # in memory of the graph
    return _shared(numbers, device, dtype, torch.cuda.current_stream(device).cuda_stream)


@functools.lru_cache(maxsize=256)
def _shared(numbers: tuple[Any, ...], device: torch.device, dtype: torch.dtype, stream: int) -> Tensor:
    """stream: on which they can be relied on."""
    with torch.inference_mode(False):  # so that they serve outside of it as well
        return on_device(numbers, device, dtype)


# as kernels


def _has_kernel(dtype: torch.dtype, like: Tensor, *others: Tensor | None) -> bool:
    """Whether a kernel gives a result of this dtype from tensors like this one."""
    if _MODE == "off" or torch.compiler.is_compiling() or dtype not in _KERNEL_DTYPES:
        return False
    if not (like.is_cuda or (_MODE == "interpret" and like.device.type == "cpu")) or like.ndim < 2 or not like.numel():
        return False
    tensors = [like, *[other for other in others if other is not None]]
    if any([type(tensor) is not Tensor for tensor in tensors]):
        return False  # what is made of others is for them to say
    if torch.is_grad_enabled() and any([tensor.requires_grad for tensor in tensors]):
        return False
    return _kernels_run(like.device)


_WORKS: dict[torch.device, bool] = {}  # whether Triton works there


def _kernels_run(device: torch.device) -> bool:
    """Whether Triton works there, which is tried once; it may lack a compiler."""
    if device not in _WORKS:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return False  # what is tried would become a part of the graph
        try:
            _WORKS[device] = find_spec("triton") is not None and _try_kernel(device)
        except torch.OutOfMemoryError:
            return False  # which says nothing of Triton
    return _WORKS[device]


def _try_kernel(device: torch.device) -> bool:
    """Whether a kernel runs, told if not.

    Raises:
        OutOfMemoryError: where there is no room to find out.
    """
    try:
        one = torch.ones(1, 16, device=device)
        _kernel("forecast_residual").launch(one, [one], [], torch.ones(1, device=device), None, one.dtype)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        warnings.warn(
            f"Triton kernels do not run on {device} ({type(error).__name__}: {error}), so cached steps use PyTorch "
            "there, which takes longer; DIFFUSION_CACHE_KERNELS=off does so without trying",
            DiffusionCacheWarning,
            stacklevel=2,
        )
        return False
    return True


@functools.cache
def _kernel(name: str) -> Any:
    return import_module(f".kernels.{name}", __package__)


def _run(name: str, *arguments: Any) -> Any:
    """What an operator gives of tensors that `_has_kernel` is true of.

    Its kernel is launched right away unless operations are being watched: the dispatcher takes longer than all else.
    """
    if torch._C._len_torch_dispatch_stack():
        return getattr(torch.ops.diffusion_cache, name)(*arguments)
    return _kernel(name).launch(*arguments)


def _operator(plain: Callable, name: str, schema: str, mutated: Sequence[str] = ()) -> Any:
    """A custom operator that is this function, and the launch of its kernel where kernels run."""
    operator = torch.library.custom_op(f"diffusion_cache::{name}", plain, mutates_args=mutated, schema=schema)

    def launch(*arguments: Any) -> Any:
        return _kernel(name).launch(*arguments)

    operator.register_kernel("cpu" if _MODE == "interpret" else "cuda")(launch)
    return operator


def _layout(feature: Tensor) -> torch.memory_format:
    """Of what the operators return."""
    form = {4: torch.channels_last, 5: torch.channels_last_3d}.get(feature.ndim, torch.contiguous_format)
    return (
        form if not feature.is_contiguous() and feature.is_contiguous(memory_format=form) else torch.contiguous_format
    )


def _forecast_laid_out(
    base: Tensor | None, features: Sequence[Tensor], scales: Sequence[Tensor], *arguments: Any
) -> Tensor:
    result = _forecast(base, features, scales, *arguments)
    return result.contiguous(memory_format=_layout(features[-1 if scales else 0]))


_forecast_residual = _operator(
    _forecast_laid_out,
    "forecast_residual",
    "(Tensor? base, Tensor[] features, Tensor[] scales, Tensor weights, Tensor? correction, ScalarType dtype)"
    " -> Tensor",
)
_gated_residual = _operator(
    _gated,
    "gated_residual",
    "(Tensor base, Tensor gate, Tensor[] features, Tensor[] scales, Tensor weights, Tensor? correction) -> Tensor",
)
_store_residual = _operator(
    _store,
    "store_residual",
    "(Tensor(a!) codes, Tensor(b!) scales, Tensor out, Tensor? base) -> ()",
    ("codes", "scales"),
)
_relative_l1 = _operator(_relative, "relative_l1", "(Tensor current, Tensor previous, str measure) -> Tensor")
_count_sketch = _operator(
    count_sketch.add,
    "count_sketch",
    "(Tensor(a!) sums, Tensor flat, int run, int first, int[] stages, int[] signs) -> ()",
    ("sums",),
)


@_forecast_residual.register_fake
def _(
    base: Tensor | None,
    features: Sequence[Tensor],
    scales: Sequence[Tensor],
    weights: Tensor,
    correction: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    like = features[-1 if scales else 0]
    return torch.empty_like(like, dtype=dtype, memory_format=_layout(like))


@_gated_residual.register_fake
def _(
    base: Tensor,
    gate: Tensor,
    features: Sequence[Tensor],
    scales: Sequence[Tensor],
    weights: Tensor,
    correction: Tensor | None,
) -> Tensor:
    return torch.empty_like(base, memory_format=torch.contiguous_format)


@_store_residual.register_fake
def _(codes: Tensor, scales: Tensor, out: Tensor, base: Tensor | None) -> None:
    return None


@_relative_l1.register_fake
def _(current: Tensor, previous: Tensor, measure: str) -> Tensor:
    return current.new_empty(len(current), dtype=torch.float32)


@_count_sketch.register_fake
def _(sums: Tensor, flat: Tensor, run: int, first: int, stages: Sequence[int], signs: Sequence[int]) -> None:
    return None
