"""StepClock: which step and pass of a run a denoiser call belongs to.

It reads no device tensor back once scheduler steps are seen.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..context import Form, NoiseLevels
from ..models.denoisers import TIME_ARGUMENTS

LARGEST_FLOW = 1 + 1e-3  # σ of a flow, by rounding


class StepClock:
    """Counts sampler iterations and, within each, the calls of the denoiser (its passes).

    A new iteration is a call after at least one `scheduler.step`, unless at the very entry of the timesteps that the
    last call was at (views of a panorama are stepped one by one); before the first step is seen, a call at another
    timestep; and in a loop that calls `next_step`, exactly that. Where a scheduler's timesteps are set again, counting
    begins again. total: asked with the first call's timestep of each loop.
    """

    def __init__(self, total: Callable[[Any], int | None]):
        self.index = -1
        self.position = -1
        self.evaluation = -1
        self.total: int | None = None
        self.first_timestep: Any = None
        self._ask_total = total
        self._advance = False
        self._stepped = False
        self._explicit = False
        self._suppressed = 0
        self._timestep = _Seen(None)

    def close(self) -> None:
        """The run is over: let go of what the total was to be asked of."""
        self._ask_total = lambda timestep: None

    def scheduler_stepped(self) -> None:
        if not self._suppressed and not self._explicit:
            self._stepped = self._advance = True

    def timesteps_set(self) -> None:
        """A scheduler's timesteps are set: the next call is the first of a loop."""
        if not self._suppressed and not self._explicit:
            self.index = -1

    def next_step(self) -> None:
        """The user's own loop says that the next call belongs to the next step."""
        self._explicit = self._advance = True

    @property
    def is_suppressed(self) -> bool:
        return self._suppressed > 0

    def suppressed(self) -> "_Suppressed":
        """A context in which scheduler steps do not count (probing a copied scheduler fires the same patch)."""
        return _Suppressed(self)

    def denoiser_called(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """Count one call: afterwards index, position (of the call within its step) and evaluation are this call's."""
        self.evaluation += 1
        if self.index < 0:
            self.first_timestep = timestep_of(args, kwargs)
            self.total = self._ask_total(self.first_timestep)
            self._timestep = _Seen(self.first_timestep)
            new = True
        elif self._explicit:
            new = self._advance
        elif self._stepped:
            timestep = timestep_of(args, kwargs)
            new = self._advance and not self._timestep.is_same_entry(timestep)
            self._timestep = _Seen(timestep)
        else:
            timestep = timestep_of(args, kwargs)
            new = not self._timestep.equals(timestep)
            self._timestep = _Seen(timestep)
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


class _Seen:
    """A timestep as it was when it was seen: loops may write the next one into the same tensor."""

    def __init__(self, timestep: Any):
        self.value = timestep.clone() if isinstance(timestep, Tensor) else timestep
        self.identity = _identity(timestep)
        self._alive = timestep  # or its memory may become another's

    def is_same_entry(self, timestep: Any) -> bool:
        """Whether this is the same entry of a list of timesteps, unchanged, expanded or not."""
        base = timestep._base if isinstance(timestep, Tensor) else None
        return base is not None and base.numel() > 1 and self.is_unchanged(timestep)

    def is_unchanged(self, timestep: Any) -> bool:
        """Whether this is the same memory, and nothing was written into it."""
        identity = _identity(timestep)
        return identity is not None and identity == self.identity

    def equals(self, timestep: Any) -> bool:
        if isinstance(timestep, Tensor) and isinstance(self.value, Tensor):
            if timestep.shape != self.value.shape:  # passes of one step may have different numbers of rows
                return torch.equal(timestep.unique(), self.value.unique())
            # one unchanged entry of the scheduler's list, expanded anew: no need to read it back
            return self.is_unchanged(timestep) or torch.equal(timestep, self.value)
        return type(timestep) is type(self.value) and bool(timestep == self.value)


def _identity(timestep: Any) -> tuple[int, int, torch.dtype] | None:
    if not isinstance(timestep, Tensor) or timestep.is_inference() or not timestep.numel():
        return None  # inference tensors do not count their changes
    return timestep.data_ptr(), timestep._version, timestep.dtype


def begin_index(scheduler: Any, timestep: Any = None) -> int:
    """Where in its list a scheduler starts: what it was told, else where the first call's timestep stands."""
    told = getattr(scheduler, "begin_index", None)
    if told is not None:
        return told
    timesteps = scheduler.timesteps
    if isinstance(timestep, Tensor) and timestep.numel():
        place = _entry(timesteps, timestep)
        if place is not None:
            return place
        timestep = timestep.flatten()[0].item()
    if isinstance(timestep, (int, float)):
        places = (timesteps.cpu().double() == timestep).nonzero().flatten().tolist()
        return places[min(1, len(places) - 1)] if places else 0  # of several the second, as schedulers do themselves
    return 0


def _entry(timesteps: Tensor, timestep: Tensor) -> int | None:
    """Which entry of the list this very tensor is a view of: only that tells PNDM's repeated entries apart."""
    if timestep.device != timesteps.device or timestep.dtype != timesteps.dtype or not timesteps.is_contiguous():
        return None
    place = (timestep.data_ptr() - timesteps.data_ptr()) // timesteps.element_size()
    return place if 0 <= place < len(timesteps) else None


def scheduler_total(scheduler: Any, timestep: Any = None) -> int | None:
    """Iterations that a scheduler with its timesteps set still has before it, from the first call's timestep on."""
    timesteps = getattr(scheduler, "timesteps", None)
    return None if timesteps is None else len(timesteps) - begin_index(scheduler, timestep)


def loop_total(scheduler: Any, timestep: Any, progress_total: int | None) -> int | None:
    """A run's iterations from what its progress bar counts to, where it has one, and its scheduler."""
    listed = scheduler_total(scheduler, timestep)
    if listed is None or progress_total is None:
        return progress_total or listed
    # bars of order-2 samplers, and of those that repeat timesteps, count what the user asked for
    repeats = len(set(scheduler.timesteps.tolist())) < len(scheduler.timesteps)
    if getattr(scheduler, "order", 1) > 1 or repeats:
        return listed
    return min(listed, progress_total)


def noise_levels(scheduler: Any, timestep: Any = None) -> NoiseLevels:
    """log-SNR of each of the run's iterations, noisiest first; empty where the scheduler has neither sigmas nor alphas.

    log(α²/σ²): 2·log((1 − σ)/σ) for flow matching, −2·log σ for sigmas of variance-exploding form, and by timestep
    log(ᾱ/(1 − ᾱ)) otherwise. timestep: the first call's, for schedulers that do not know where a run begins (img2img).
    """
    timesteps = getattr(scheduler, "timesteps", None)
    if timesteps is None:
        return NoiseLevels()
    begin = begin_index(scheduler, timestep)
    sigmas, alphas = getattr(scheduler, "sigmas", None), getattr(scheduler, "alphas_cumprod", None)
    if sigmas is not None and len(sigmas) >= len(timesteps):
        listed = torch.as_tensor(sigmas).cpu().double()[: len(timesteps)].tolist()
        values = listed[begin:]
        # flow schedulers take sigmas of the other form as well, of pipelines that scale their samples themselves
        if is_flow(scheduler) and max(listed, default=0.0) <= LARGEST_FLOW:
            if getattr(scheduler, "config", {}).get("invert_sigmas"):  # they say how much data there is
                values = [1 - sigma for sigma in values]
            return NoiseLevels((2 * (_log(1 - sigma) - _log(sigma)) for sigma in values), "flow")
        return NoiseLevels((-2 * _log(sigma) for sigma in values), _form(scheduler))
    if alphas is not None:
        index = timesteps.cpu().long()[begin:].clamp(0, len(alphas) - 1)
        levels = (_log(a) - _log(1 - a) for a in alphas.cpu().double()[index].tolist())
        return NoiseLevels(levels, _form(scheduler))
    return NoiseLevels()


def _form(scheduler: Any) -> Form:
    """What a scheduler that is of no flow takes the denoiser's output for."""
    config = getattr(scheduler, "config", {})
    if "sigma_data" in config:  # scaled by more than its kind says (EDM)
        return "other"
    given = config.get("prediction_type")
    return given if given in ("epsilon", "v_prediction") else "other"


def is_flow(scheduler: Any) -> bool:
    """Whether the scheduler's sigmas mix data and noise linearly, x = (1 − σ)·x0 + σ·noise."""
    config = getattr(scheduler, "config", {})
    if "Flow" in type(scheduler).__name__ or config.get("use_flow_sigmas"):
        return True
    if config.get("prediction_type") == "flow_prediction":
        return True
    # others say so in no name or option, but have no ᾱ and end at pure noise, where σ is 1
    return not hasattr(scheduler, "alphas_cumprod") and bool((torch.as_tensor(scheduler.sigmas) <= 1).all())


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf
