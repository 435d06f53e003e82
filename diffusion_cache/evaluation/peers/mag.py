"""diffusers' MagCache."""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...errors import ConfigError
from .base import Loop, at_least, for_every_denoiser
from .hooks import DiffusersPeer, without_stack


@dataclass(frozen=True)
class MagSettings:
    """threshold: largest accumulated error that is still reused. max_skip: reused steps in a row, at most.

    retention: share of the steps at the start that are computed. ratios: how a step's residual compares in size with
    the step before, for every step (`DiffusersMag.calibrate`); taken at other step counts too.
    """

    threshold: float = 0.06
    max_skip: int = 3
    retention: float = 0.2
    ratios: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        at_least(0, max_skip=self.max_skip, retention=self.retention)
        if not all(isinstance(ratio, int | float) and math.isfinite(ratio) for ratio in self.ratios):
            raise ConfigError("ratios must be finite numbers")


class DiffusersMag(DiffusersPeer):
    name = "diffusers_mag"
    batchable = True  # decides by the ratios alone
    hook_names = ("mag_cache_leader_block_hook", "mag_cache_block_hook")
    Settings = MagSettings

    def why_not(self, pipe: Any) -> str | None:
        return for_every_denoiser(pipe, without_stack)

    def lacks(self, settings: Mapping[str, Any]) -> str | None:
        return None if settings.get("ratios") else "ratios"

    def never(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        return {**settings, "max_skip": 0}

    def calibrate(self, pipe: Any, generate: Callable[[], object], steps: int) -> tuple[float, ...]:
        """Measure `ratios` in diffusers' calibration mode: one a step, the mean over guidance passes and samples.

        generate: calls the pipeline with `steps` sampler steps, on seeds that nothing is reported on.
        """
        reason = self.why_not(pipe)
        if reason is not None:
            raise ConfigError(f"rival {self.name!r} cannot run on {type(pipe).__name__}: {reason}")
        kept: dict[int, Any] = {}
        with _Calibration(kept)._applied(pipe, None, steps):
            generate()
        lists = [ratios for ratios in kept.values() if len(ratios) >= steps]
        if not lists:
            raise ConfigError(f"calibration needs a generation of {steps} steps: generate() made none")
        return tuple(sum(values) / len(values) for values in zip(*(ratios[:steps] for ratios in lists), strict=True))

    def _install(self, denoiser: nn.Module, options: MagSettings, steps: int, loop: Loop) -> None:
        from diffusers.hooks import MagCacheConfig, apply_mag_cache

        if not options.ratios:
            raise ConfigError(
                f"rival {self.name!r} needs the ratios of the model it runs on: measure them with "
                "evaluation.peers.peer('diffusers_mag').calibrate(pipe, generate, steps) and set ratios=[...]"
            )
        config = MagCacheConfig(
            threshold=options.threshold,
            max_skip_steps=options.max_skip,
            retention_ratio=options.retention,
            num_inference_steps=steps,
            mag_ratios=list(options.ratios),
        )
        apply_mag_cache(denoiser, config)


class _Calibration(DiffusersMag):
    """MagCache measuring instead of skipping; kept: by state, the ratios of each generation and pass."""

    def __init__(self, kept: dict[int, Any]):
        self._kept = kept
        self._states: list[Any] = []  # held, so that no two states share an id

    def _install(self, denoiser: nn.Module, options: Any, steps: int, loop: Loop) -> None:
        from diffusers.hooks import MagCacheConfig, apply_mag_cache

        # One step more than there will be, as it prints and forgets the ratios at the last one.
        apply_mag_cache(denoiser, MagCacheConfig(calibrate=True, num_inference_steps=steps + 1))
        for hook in self._hooks(denoiser):
            if getattr(hook, "is_tail", False):
                hook._perform_calibration_step = functools.partial(self._record, hook._perform_calibration_step)

    def _record(self, perform: Callable, state: Any, residual: torch.Tensor) -> None:
        perform(state, residual)
        self._states.append(state)
        self._kept[id(state)] = state.calibration_ratios  # a reset replaces the list, so that this one stays
