"""Ratios γ_s = mean over tokens of ‖R_s‖ / ‖R_{s−1}‖ of residuals from step to step, one list a guidance branch."""

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
    """Those that a profile has measured; of several spans, each step's ratio that is furthest from 1.

    Raises:
        ConfigError: for a profile without them.
    """
    if "norm_ratio" not in profile.arrays:
        raise ConfigError(f"{method}: the profile holds no norm_ratio: profile again, at scope stack or denoiser")
    measured = profile.arrays["norm_ratio"].double().nan_to_num(1.0)  # [spans, passes, steps]
    furthest = measured.log().abs().argmax(0, keepdim=True)
    ratios = torch.take_along_dim(measured, furthest, 0)[0].tolist()
    return tuple(map(tuple, ratios[:: profile.row_passes]))
