"""Ratios γ_s = mean over tokens of ‖R_s‖ / ‖R_{s−1}‖ of residuals from step to step, one list a denoiser call."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from ..errors import ConfigError
from ..plain import numbers
from ..profile import Profile

Streams = tuple[tuple[float, ...], ...]


def streams_of(method: str, given: Any) -> Streams:
    """The option of a method as one list for each guidance branch, from such or from a single list.

    Raises:
        ConfigError: for what is no number above 0, and for lists that are empty or of several lengths.
    """
    wanted = f"{method}: ratios must be numbers above 0, one a step and as many for each guidance branch"
    lists = given if isinstance(given, Sequence) and given and isinstance(given[0], Sequence) else (given,)
    streams = tuple(numbers(wanted, one, lambda ratio: 0 < ratio < math.inf) for one in lists)
    if len({len(one) for one in streams}) > 1:
        raise ConfigError(f"{wanted}, not {given!r}")
    return streams


def ratios_of(profile: Profile, method: str) -> Streams:
    """Those that a profile has measured; of several spans and branches in one call, at each step the furthest from 1.

    Raises:
        ConfigError: for a profile without them.
    """
    if "norm_ratio" not in profile.arrays:
        raise ConfigError(f"{method}: the profile holds no norm_ratio: profile again, at scope stack or denoiser")
    measured = profile.arrays["norm_ratio"].double().nan_to_num(1.0)  # [spans, passes, steps]
    calls = measured.unflatten(1, (-1, profile.row_passes)).transpose(1, 2).flatten(0, 1)  # [candidates, calls, steps]
    furthest = calls.log().abs().argmax(0, keepdim=True)
    return tuple(map(tuple, torch.take_along_dim(calls, furthest, 0)[0].tolist()))
