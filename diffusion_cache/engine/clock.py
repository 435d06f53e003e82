"""StepClock: which step and pass of a run a denoiser call belongs to.

It reads no device tensor back once scheduler steps are seen.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..models.denoisers import TIME_ARGUMENTS


class StepClock:
    """Counts sampler iterations and, within each, the calls of the denoiser (its passes).

    A new iteration is a call after at least one `scheduler.step`; before the first one is seen, a call at another
    timestep; and in a loop that calls `next_step`, exactly that. total: a function asked once, at the first call.
    """

    def __init__(self, total: Callable[[], int | None]):
        self.index = -1
        self.position = -1
        self.evaluation = -1
        self.total: int | None = None
        self._ask_total = total
        self._advance = False
        self._stepped = False
        self._explicit = False
        self._suppressed = 0
        self._timestep: Any = None

    def scheduler_stepped(self) -> None:
        if not self._suppressed:
            self._stepped = self._advance = True

    def next_step(self) -> None:
        """The user's own loop says that the next call belongs to the next step."""
        self._explicit = self._advance = True

    def suppressed(self) -> "_Suppressed":
        """A context in which scheduler steps do not count (probing a copied scheduler fires the same patch)."""
        return _Suppressed(self)

    def denoiser_called(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """Count one call: afterwards index, position (of the call within its step) and evaluation are this call's."""
        self.evaluation += 1
        if self.index < 0:
            self.total = self._ask_total()
            new = True
            if not self._stepped:
                self._timestep = timestep_of(args, kwargs)
        elif self._explicit or self._stepped:
            new = self._advance
        else:
            timestep = timestep_of(args, kwargs)
            new = not same_timestep(timestep, self._timestep)
            self._timestep = timestep
        self._advance = False
        if new:
            self.index += 1
            self.position = 0
        else:
            self.position += 1


class _Suppressed:
    def __init__(self, clock: StepClock):
        self.clock = clock

    def __enter__(self) -> None:
        self.clock._suppressed += 1

    def __exit__(self, *error: object) -> None:
        self.clock._suppressed -= 1


def timestep_of(args: tuple, kwargs: dict[str, Any]) -> Any:
    """The call's timestep: by its usual names, else the second positional argument."""
    for name in TIME_ARGUMENTS:
        if name in kwargs:
            return kwargs[name]
    return args[1] if len(args) > 1 else None


def same_timestep(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.shape != b.shape:
            return False
        # one entry of the scheduler's list, expanded: no need to read it
        return (a.data_ptr() == b.data_ptr() and a.dtype == b.dtype and a.numel() > 0) or torch.equal(a, b)
    return type(a) is type(b) and a == b


def scheduler_total(scheduler: Any) -> int | None:
    """Iterations that a scheduler with its timesteps set still has before it."""
    timesteps = getattr(scheduler, "timesteps", None)
    if timesteps is None:
        return None
    return len(timesteps) - (getattr(scheduler, "begin_index", None) or 0)


def noise_levels(scheduler: Any) -> list[float]:
    """log-SNR of each of the scheduler's iterations, noisiest first; empty where the scheduler tells neither sigmas
    nor alphas.

    log(α²/σ²): 2·log((1 − σ)/σ) for flow matching, −2·log σ for sigmas of variance-exploding form, log(ᾱ/(1 − ᾱ))
    by timestep otherwise.
    """
    timesteps = getattr(scheduler, "timesteps", None)
    if timesteps is None:
        return []
    begin = getattr(scheduler, "begin_index", None) or 0
    sigmas, alphas = getattr(scheduler, "sigmas", None), getattr(scheduler, "alphas_cumprod", None)
    if sigmas is not None and len(sigmas) >= len(timesteps):
        values = torch.as_tensor(sigmas).double().cpu()[begin : len(timesteps)].tolist()
        if is_flow(scheduler):
            return [2 * (_log(1 - sigma) - _log(sigma)) for sigma in values]
        return [-2 * _log(sigma) for sigma in values]
    if alphas is not None:
        index = timesteps.cpu().long()[begin:].clamp(0, len(alphas) - 1)
        return [_log(a) - _log(1 - a) for a in alphas.double().cpu()[index].tolist()]
    return []


def is_flow(scheduler: Any) -> bool:
    """Whether the scheduler's sigmas mix data and noise linearly, x = (1 − σ)·x0 + σ·noise."""
    config = getattr(scheduler, "config", {})
    return "Flow" in type(scheduler).__name__ or bool(
        config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction"
    )


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf
