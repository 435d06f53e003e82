"""Taking the signals that a policy asks for, where the first span of a call is about to run."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import ops
from ..context import KNOWN_AFTER, SIGNALS, Query
from ..errors import ConfigError
from ..forecasters import Chebyshev, Taylor
from ..models import Span, grid_of_call, unwrap
from ..signals import channels_first, grid_of
from .frame import Frame
from .intercept import run_uncompiled
from .structure import Inputs, copied, forked_rng, image_stream, row_stream, tensor_inputs

if TYPE_CHECKING:
    from .cache_run import CacheRun


class AttentionReached(Exception):
    """Ends a block that is run only to see what its first attention receives."""

    def __init__(self, received: Tensor):
        super().__init__()
        self.received = received


class Entry(NamedTuple):
    """The first span of a call: its first member, not yet run, and the stream of the sample that enters it."""

    run: "CacheRun"
    frame: Frame
    span: Span
    args: tuple
    kwargs: dict[str, Any]
    stream: Tensor


def take(run: "CacheRun", frame: Frame, span: Span, args: tuple, kwargs: dict[str, Any], inputs: Inputs) -> None:
    """Take the signals of this call that are known before it, for the policy and for the corrector.

    Raises:
        ConfigError: for one that this model or sampler does not give.
    """
    entry = Entry(run, frame, span, args, kwargs, row_stream(inputs, span.members[0]).detach())
    corrector, decided_by = run.method.corrector, run.decisions.guarded.needs.signals
    compared = () if corrector is None else corrector.needs_signals
    signals = {name: TAKEN[name](entry) for name in dict.fromkeys((*decided_by, *compared)) if name in TAKEN}
    frame.compared = {name: signals[name] for name in compared}
    frame.signals = {name: signals[name] for name in decided_by if name in signals}


def _input(entry: Entry) -> Tensor:
    return entry.stream.clone()


def _input_map(entry: Entry) -> Tensor:
    stream = _latents(entry, entry.stream)
    if stream.ndim in (4, 5):
        return stream.clone()
    grids, grid = entry.run.grids, None
    if stream.ndim == 3:
        if stream.shape not in grids:  # once in a run, for it may be read back
            args, kwargs = entry.frame.called
            latent = tuple(_latents(entry, row_stream(tensor_inputs(args, kwargs))).shape[1:])
            grids[stream.shape] = grid_of_call(kwargs, stream.shape[1]) or grid_of(stream.shape[1], latent, ())
        grid = grids[stream.shape]
    if grid is None:
        raise ConfigError(
            f"where what enters {entry.span.name} lies in the image cannot be told of a tensor of shape "
            f"{tuple(stream.shape)}, which policy {entry.run.decisions.guarded.policy.name!r} needs: use scope "
            "'denoiser' if that takes latents, or another policy (first_block)"
        )
    sizes = grid if grid[0] > 1 else grid[1:]
    return stream.transpose(1, 2).reshape(len(stream), -1, *sizes).clone()


def _latents(entry: Entry, tensor: Tensor) -> Tensor:
    """Videos as [rows, C, frames, H, W], which some denoisers take frames first."""
    denoiser = unwrap(entry.run.session.denoisers[entry.frame.key[0]])
    count = getattr(getattr(denoiser, "config", None), "in_channels", None)
    return channels_first(tensor, () if count is None else (count,))


def _probe_input(entry: Entry) -> Tensor:
    before = entry.frame.probe_input
    return entry.stream.clone() if before is None else before


def _probe_residual(entry: Entry) -> Tensor:
    before, version = entry.frame.probe_input, entry.frame.probe_version
    if before is None or before.shape != entry.stream.shape:
        return entry.stream.clone()
    if version is not None and before._version != version:
        raise RuntimeError(
            f"the first block before {entry.span.name} writes into what it is given, so that what it adds is not "
            "known: under torch.inference_mode(), where that is copied first, it is"
        )
    return entry.stream - before.detach()


def _modulated_input(entry: Entry) -> Tensor:
    frame, block = entry.frame, entry.span.members[0]
    args, kwargs = copied(entry.args), copied(entry.kwargs)
    frame.peeking = True
    try:
        # only what trains draws, and other threads' draws meanwhile would be undone
        with forked_rng() if block.training else nullcontext():
            run_uncompiled(block, *args, **kwargs)
    except AttentionReached as reached:
        return reached.received
    finally:
        frame.peeking = False
        entry.run.spans.groups.begin(block)
    raise ConfigError(
        f"policy {entry.run.decisions.guarded.policy.name!r} looks at what the first attention of a block receives, "
        f"and none is reached in the first block of {entry.span.name}: use policy 'first_block', which looks at what "
        "a block gives"
    )


def _noise_level(entry: Entry) -> Tensor:
    level = entry.frame.step.noise_level
    if level is None:
        raise ConfigError(
            f"policy {entry.run.decisions.guarded.policy.name!r} needs the sampler's noise levels, which it does not "
            "tell: use another sampler, or in a loop of your own pass noise_levels to diffusion_cache.run"
        )
    return torch.full((len(entry.stream),), level, device=entry.stream.device)


SPECTRAL, LINE = Chebyshev(blend=1.0, anchored=True), Taylor(order=1)


def _disagreement(entry: Entry) -> Tensor:
    step, state = entry.frame.step, entry.run.spans.state(entry.frame.key, entry.span, 0)
    rows = len(entry.stream)
    if not state.history or state.template is None:
        return torch.full((rows,), math.nan, device=entry.stream.device)
    history = entry.run.spans.held(state.history)
    assert history is not None
    spectral, line = weights = torch.zeros(2, len(history.lanes), len(history.slots))
    wanted = entry.run.decisions.guarded.needs.history
    for row, lane in enumerate(history.lanes):
        query = Query([node for node, _ in lane[-wanted:]], step.index, total=step.total)
        older = (0.0,) * (len(lane) - len(query.nodes))
        for into, forecaster in zip(weights, (SPECTRAL, LINE), strict=True):
            own = history.combined(older + forecaster.weights(query))
            into[row, [slot for _, slot in lane]] = torch.tensor(own)
    leaves = [[ops.decoded(feature) for feature in history.leaf(i)] for i, _ in enumerate(state.template.leaves)]
    leaves = [leaf for leaf in leaves if leaf[0].is_floating_point() and leaf[0].shape[:1] == (rows,)]
    if not leaves:
        raise ConfigError(
            f"policy {entry.run.decisions.guarded.policy.name!r} compares forecasts of samples, and {entry.span.name} "
            "returns nothing that has a row for each: use another scope, or policy 'first_block'"
        )
    # a row of weights for each, also where all rows are in one lane
    difference, whole = torch.stack([spectral - line, spectral]).expand(-1, rows, -1).to(entry.stream.device)

    def norm(table: Tensor) -> Tensor:
        combined = [ops.forecast(None, leaf, table).float().flatten(1) for leaf in leaves]
        return torch.stack([each.square().sum(1) for each in combined]).sum(0).sqrt()

    apart = norm(difference)
    return torch.where(apart == 0, torch.zeros_like(apart), apart / norm(whole))


TAKEN: dict[str, Callable[[Entry], Tensor]] = {
    "input": _input,
    "input_map": _input_map,
    "probe_input": _probe_input,
    "probe_residual": _probe_residual,
    "modulated_input": _modulated_input,
    "noise_level": _noise_level,
    "disagreement": _disagreement,
}
assert TAKEN.keys() | KNOWN_AFTER == SIGNALS.keys()
PROBE_SIGNALS = frozenset({"probe_input", "probe_residual"})
TAIL_SIGNALS = frozenset({"tail_output", "tail_forecast"})


def attention_call(attention: nn.Module, run: "CacheRun", inner: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
    """An attention of a first block: where the block is run only to get here, that was it."""
    if run.frame is not None and run.frame.peeking:
        raise AttentionReached(image_stream(tensor_inputs(args, kwargs), attention).detach().clone())
    return inner(*args, **kwargs)
