"""Modules that mix the frames of a video: exact in slices of positions, which stay apart but for group norms.

A group norm's mean and variance are over all positions, so that they are collected first (two passes). Samples are
[b, f, c, p] here: batch, frames, channels, positions (height × width).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .runner import Runner


class Moments:
    """Mean and variance of each group of channels, collected over slices of positions (Chan et al., 1979)."""

    def __init__(self, norm: nn.GroupNorm):
        self.norm = norm
        self.count = 0
        self.mean = torch.zeros(())  # [b, groups] once there are any
        self.squares = torch.zeros(())  # likewise: of the distance to the mean, summed

    def add(self, x: Tensor) -> None:
        """Take in x, [b, f, c, p]."""
        groups = x.unflatten(2, (self.norm.num_groups, -1)).float()
        variance, mean = torch.var_mean(groups, dim=(1, 3, 4), correction=0)
        count = groups[0, :, 0].numel()
        total = self.count + count
        offset = mean - self.mean
        self.mean = self.mean + offset * (count / total)
        self.squares = self.squares + variance * count + offset.square() * (self.count * count / total)
        self.count = total

    def normalise(self) -> Callable[[Tensor], Tensor]:
        """The norm with these moments, as a function of any slice [b, f, c, p]."""
        weight, bias = (t.float().unflatten(0, (self.norm.num_groups, -1)) for t in (self.norm.weight, self.norm.bias))
        scale = (self.squares / self.count + self.norm.eps).rsqrt()[..., None] * weight  # [b, groups, c / groups]
        shift = bias - self.mean[..., None] * scale
        scale, shift = (t.flatten(1)[:, None, :, None] for t in (scale, shift))
        return lambda x: torch.addcmul(shift, x.float(), scale).to(x.dtype)


def moments(norm: nn.GroupNorm, x: Tensor) -> Moments:
    """Those of the whole of x, frame by frame."""
    found = Moments(norm)
    for frame in x.split(1, dim=1):
        found.add(frame)
    return found


def frames(x: Tensor, count: int) -> Tensor:
    """[b·f, c, h, w] as [b, f, c, h·w]."""
    return x.reshape(-1, count, x.shape[1], x.shape[2] * x.shape[3])


def motion(runner: Runner, inner: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """AnimateDiffTransformer3D, TransformerTemporalModel: norm over positions, then attention over frames at each."""
    module: Any = runner.module
    sample, count = arguments.pop("hidden_states"), arguments.pop("num_frames")
    unpacks = arguments.pop("return_dict", None) is not None
    if any(value is not None for value in arguments.values()):
        return None
    x = frames(sample, count)
    norm = moments(module.norm, x).normalise()

    def run(part: slice) -> Tensor:
        given = x[..., part]
        hidden = norm(given).permute(0, 3, 1, 2)  # [b, p, f, c]
        shape = hidden.shape
        hidden = module.proj_in(hidden.flatten(0, 1))
        for block in module.transformer_blocks:
            hidden = block(hidden)
        return given + module.proj_out(hidden).view(shape).permute(0, 2, 3, 1)

    output = runner.sweep(("motion", count), x, x.shape[3], run, dim=3).reshape(sample.shape)
    return (output,) if unpacks else output


def resnet(runner: Runner, inner: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """SpatioTemporalResBlock: its spatial part, then the temporal one and the mixer, position by position."""
    module: Any = runner.module
    temporal, temb, images = module.temporal_res_block, arguments["temb"], arguments["image_only_indicator"]
    sample = module.spatial_res_block(arguments["hidden_states"], temb)
    x = frames(sample, images.shape[-1])
    time: Tensor | float = 0.0
    if temporal.time_emb_proj is not None:
        embedded = temb.reshape(*x.shape[:2], -1)
        time = temporal.time_emb_proj(temporal.nonlinearity(embedded))[..., None]  # [b, f, c, 1]
    norm1 = moments(temporal.norm1, x).normalise()
    collected = Moments(temporal.norm2)

    def first(part: slice) -> Tensor:
        hidden = _convolved(temporal.conv1, temporal.nonlinearity(norm1(x[..., part]))) + time
        collected.add(hidden)
        return hidden

    hidden = runner.sweep(("first", x.shape[1]), x, x.shape[3], first, dim=3)
    norm2 = collected.normalise()

    def second(part: slice) -> Tensor:
        given = x[..., part]
        change = _convolved(temporal.conv2, temporal.dropout(temporal.nonlinearity(norm2(hidden[..., part]))))
        skipped = given if temporal.conv_shortcut is None else _convolved(temporal.conv_shortcut, given)
        mixed = module.time_mixer(
            x_spatial=_channels_first(given),
            x_temporal=_channels_first(skipped + change),
            image_only_indicator=images,
        )
        return mixed.squeeze(-1).transpose(1, 2)

    into = None if hidden.requires_grad else hidden
    return runner.sweep(("second", x.shape[1]), x, x.shape[3], second, dim=3, into=into).reshape(sample.shape)


def transformer(runner: Runner, inner: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """TransformerSpatioTemporalModel: in turns attention over positions, by frames, and over frames, by positions."""
    module: Any = runner.module
    sample, context = arguments["hidden_states"], arguments["encoder_hidden_states"]
    images = arguments["image_only_indicator"]
    rows, count = len(sample), images.shape[-1]
    first_context = context.unflatten(0, (-1, count))[:, 0]  # [b, tokens, c]: that of the first frame
    places = torch.arange(count, device=sample.device).repeat(rows // count)
    place = module.time_pos_embed(module.time_proj(places).to(sample.dtype))[:, None]  # [b·f, 1, c]
    residual = sample.flatten(2)
    last = len(module.transformer_blocks) - 1
    hidden = sample  # from the first block on [b·f, p, c]

    for i, (block, temporal) in enumerate(
        zip(module.transformer_blocks, module.temporal_transformer_blocks, strict=True)
    ):

        def by_frames(part: slice, i: int = i, block: Any = block, hidden: Tensor = hidden) -> Tensor:
            given = hidden[part]
            if i == 0:
                given = module.proj_in(module.norm(given).flatten(2).transpose(1, 2))
            return block(given, encoder_hidden_states=context[part])

        into = None if i == 0 or hidden.requires_grad else hidden
        hidden = runner.sweep(("frames", count, i), sample, rows, by_frames, into=into, others=context)

        def by_positions(part: slice, i: int = i, temporal: Any = temporal, hidden: Tensor = hidden) -> Tensor:
            given = hidden[:, part]
            seen = first_context.repeat_interleave(given.shape[1], dim=0)
            mixed = module.time_mixer(
                x_spatial=given,
                x_temporal=temporal(given + place, num_frames=count, encoder_hidden_states=seen),
                image_only_indicator=images,
            )
            return mixed if i < last else residual[..., part] + module.proj_out(mixed).transpose(1, 2)

        dim, into = (1, None if hidden.requires_grad else hidden) if i < last else (2, None)
        positions = residual.shape[2]
        stage = ("positions", count, i)
        hidden = runner.sweep(stage, sample, positions, by_positions, dim=dim, into=into, others=context)
    return (hidden.reshape(sample.shape),)


def _channels_first(x: Tensor) -> Tensor:
    """[b, f, c, p] as [b, c, f, p, 1], what convolutions and mixers of videos take."""
    return x.transpose(1, 2).unsqueeze(-1)


def _convolved(conv: nn.Conv3d, x: Tensor) -> Tensor:
    return conv(_channels_first(x)).squeeze(-1).transpose(1, 2)
