"""Moving the noise levels that a sampler goes through."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from .clock import is_flow

SAME = 1e-5  # levels between 0 and 1 that differ by less are one, and less would be lost in float32
SAME_TIMESTEP = 1.0  # some samplers round theirs to integers


def move_sigmas(scheduler: Any, sigmas: Sequence[float]) -> None:
    """Make a scheduler whose timesteps were just set go through these noise levels, one a step, noisiest first.

    They are what its `sigmas` shall hold, after all shifts: written there, and not handed to `set_timesteps`, which
    would shift them once more. Timesteps follow. The first level and the one after the last step stay the scheduler's,
    so that samples start from the noise they were drawn at and land exactly where they would.

    Raises:
        ConfigError: where this sampler cannot do that, or for levels that are not between its first and last one, in
            order. The scheduler is as it was then.
    """
    name = type(scheduler).__name__
    own = getattr(scheduler, "sigmas", None)
    timesteps = getattr(scheduler, "timesteps", None)
    taken = "sigmas" in inspect.signature(type(scheduler).set_timesteps).parameters
    if not taken or not isinstance(own, Tensor) or timesteps is None or not is_flow(scheduler):
        raise ConfigError(
            f"the plan moves noise levels, which {name} cannot do: its steps do not follow a list of them. Use a flow "
            "sampler that takes one (FlowMatchEulerDiscreteScheduler), or a plan without sigmas"
        )
    if len(own) != len(timesteps) + 1 or not _follow(timesteps, own[:-1], scheduler):
        raise ConfigError(
            f"the plan moves noise levels, but which timesteps belong to them cannot be told of {name} as it is set "
            "here: use a plan without sigmas"
        )
    if len(sigmas) != len(timesteps):
        raise ConfigError(f"the plan moves the noise levels of {len(sigmas)} steps, and this run has {len(timesteps)}")
    moved = torch.tensor([*sigmas, float(own[-1])], dtype=own.dtype, device=own.device)
    falls = (moved.diff() * (own[-1] - own[0]).sign() > 0).all()
    if not falls or abs(float(moved[0] - own[0])) > SAME:
        raise ConfigError(
            f"the plan's noise levels must go from {float(own[0]):g}, where {name} starts, step by step towards "
            f"{float(own[-1]):g}, where it ends: {', '.join(f'{sigma:g}' for sigma in sigmas)}"
        )
    moved[0] = own[0]
    following = (moved[:-1] * scheduler.config.num_train_timesteps).to(timesteps)
    # where nothing is moved, nothing may differ, not even by rounding
    scheduler.timesteps = torch.where((moved == own)[:-1].to(timesteps.device), timesteps, following)
    scheduler.sigmas = moved


def _follow(timesteps: Tensor, sigmas: Tensor, scheduler: Any) -> bool:
    """Whether timesteps are sigmas in the model's unit."""
    expected = sigmas.cpu().double() * scheduler.config.num_train_timesteps
    return bool((timesteps.cpu().double() - expected).abs().max() <= SAME_TIMESTEP)
