"""What is measured of every denoiser in the zoo, for tests and scripts/coverage.py."""

import contextlib
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from zoo import Case, Draw, build, flat

import diffusion_cache as dc
from diffusion_cache.forecasters.taylor import Taylor
from diffusion_cache.models.spans import find_layout, is_unet

STEPS = 4  # computed, reused, computed, reused
TOLERANCE = 1e-5
PERTURBED = 1e-4  # a perturbed feature must change the output by more


@dataclass(frozen=True)
class Check:
    """One denoiser at one scope.

    spans: how many were found. identical: always computing gave the uncached output bit for bit. reused: span runs
    that were not computed. error: the largest relative error of a step that was reused. perturbed: the change of the
    output when the stored features are perturbed. restored: the model was as before afterwards. reason: why nothing
    is reused, where nothing is.
    """

    scope: str
    spans: int = 0
    identical: bool = True
    reused: int = 0
    error: float = 0.0
    perturbed: float = 0.0
    restored: bool = True
    reason: str = ""


def scopes(case: Case, model: nn.Module) -> list[tuple[str, int | None]]:
    """The scopes that a model of this kind is asked for: stack or cuts, and the rest."""
    depths: list[tuple[str, int | None]] = [("cut", depth) for depth in range(1, max(case.levels, 2))]
    middle: list[tuple[str, int | None]] = depths if is_unet(model) else [("stack", None)]
    return [("denoiser", None), *middle, ("block", None), ("branch", None)]


def check(case: Case, model: nn.Module, scope: str, depth: int | None, expected: list[Tensor]) -> Check:
    """expected: what the model returned, without a cache."""
    name = scope if depth is None else f"{scope}.{depth}"
    before = _attributes(model)
    try:
        spans = len(find_layout(model, scope, depth or 1).spans)
    except (dc.NoSpansError, dc.ConfigError) as error:
        return Check(name, reason=str(error))
    with dc.run(model, "interval", "reuse", every=1, num_steps=2, scope=scope, depth=depth) as run:
        identical = all(_equal(step, expected) for step in _steps(case, model, run, 2))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", dc.DiffusionCacheWarning)
        with dc.run(model, "interval", "reuse", every=2, num_steps=STEPS, scope=scope, depth=depth) as run:
            error = max(_error(step, expected) for step in _steps(case, model, run, STEPS))
            reused = sum(record.spans_reused for record in run.summary().records)
            reasons = dict.fromkeys(record.reason for record in run.summary().records[1:])
        told = [str(w.message) for w in caught if issubclass(w.category, dc.DiffusionCacheWarning)]
        with dc.run(model, "interval", "reuse", every=2, num_steps=2, scope=scope, depth=depth) as run:
            perturbed = 0.0
            for step in _steps(case, model, run, 2):
                perturbed = max(perturbed, _error(step, expected))
                _perturb(run)
    restored = _attributes(model) == before and _equal(_call(case, model), expected)
    return Check(
        name, spans, identical, reused, error, perturbed, restored, "; ".join(told or reasons) if not reused else ""
    )


def checks(case: Case, model: nn.Module | None = None) -> list[Check]:
    """model: as `build` makes it, by default a new one."""
    model = build(case) if model is None else model
    expected = _call(case, model)  # before anything else: some prepare tables at their first call
    return [check(case, model, scope, depth, expected) for scope, depth in scopes(case, model)]


@dataclass(frozen=True)
class Apart:
    """One denoiser whose stacks are cached as one span where they can be, beside each by itself.

    joined: whether they were. error: the largest relative difference between the two, where the inputs differ from
    step to step. reused: steps that were. bytes, bytes_apart: stored.
    """

    joined: bool
    error: float
    reused: int
    bytes: int
    bytes_apart: int


class OneByOne(Taylor):
    """Of each stack by itself, as if its weights were its own."""

    spans_alike = False


def compared_apart(case: Case, model: nn.Module) -> Apart:
    """The inputs are other at every step, so that what a span begins with is not what it was stored with."""
    outputs, spans, reused, stored = [], [], [], []
    for forecaster in (Taylor(), OneByOne()):
        noise = Draw(2)
        made = []
        with dc.run(model, "interval", forecaster, every=2, warmup=2, num_steps=6, scope="stack") as run:
            for _ in range(6):
                run.next_step()
                made.append(_call(case, model, noise))
            spans.append(len(run._run.layouts["denoiser"].spans))
            reused.append(run.summary().reused)
            stored.append(run.summary().cache_bytes)
        outputs.append(made)
    assert reused[0] == reused[1]
    error = max(_error(*step) for step in zip(*outputs, strict=True))
    return Apart(spans[0] < spans[1], error, reused[0], *stored)


@dataclass(frozen=True)
class Sliced:
    """One denoiser in the smallest slices. modules: that can run so. least: bytes a slice takes. error: relative."""

    modules: int
    least: int
    error: float
    restored: bool


def sliced(case: Case, model: nn.Module) -> Sliced | None:
    """None where nothing is known that can be sliced."""
    expected = _call(case, model)
    before = _attributes(model)
    try:
        features = dc.slice_features(model, max_bytes=1)
    except dc.ConfigError:
        return None
    with features, contextlib.suppress(dc.ConfigError):
        _call(case, model)  # finds out how small slices can be
    least = max(1, features.least_bytes)
    with dc.slice_features(model, max_bytes=least):
        error = max(_error(_call(case, model), expected) for _ in range(2))
    restored = _attributes(model) == before and _equal(_call(case, model), expected)
    return Sliced(len(features.modules), features.least_bytes, error, restored)


@torch.no_grad()
def _call(case: Case, model: nn.Module, noise: Draw | None = None) -> list[Tensor]:
    # fresh every time: some forwards empty the lists they are given
    inputs = case.inputs(Draw(1))
    if noise is not None:
        inputs = tree_map_only(Tensor, lambda given: _noised(given, noise), inputs)
    return [tensor.clone() for tensor in flat(model(**inputs))]


def _noised(tensor: Tensor, noise: Draw) -> Tensor:
    return tensor + 0.05 * noise(*tensor.shape).to(tensor) if tensor.is_floating_point() else tensor


def _steps(case: Case, model: nn.Module, run: Any, count: int) -> Any:
    for _ in range(count):
        run.next_step()
        yield _call(case, model)


def _perturb(run: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    for state in run._run.spans._states.values():
        for tensor in state.history.tensors():
            if tensor.is_floating_point():
                noise = torch.randn(tensor.shape, generator=generator)
                tensor.add_(noise.to(tensor) * (0.1 * tensor.abs().mean() + 1e-3))


def _attributes(model: nn.Module) -> dict[str, dict[str, Any]]:
    return {name: dict(vars(module)) for name, module in model.named_modules()}


def _equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


def _error(a: list[Tensor], b: list[Tensor]) -> float:
    """The largest relative error among the tensors of an output."""
    if len(a) != len(b) or any(x.shape != y.shape for x, y in zip(a, b, strict=True)):
        return float("inf")
    errors = [((x - y).double().norm() / y.double().norm().clamp_min(1e-12)).item() for x, y in zip(a, b, strict=True)]
    return float("inf") if any(error != error for error in errors) else max(errors, default=0.0)
