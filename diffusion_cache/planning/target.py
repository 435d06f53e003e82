"""How much an online policy reuses, set beforehand: the value of its `tuned` field is searched in closed loop.

Thresholds mean something else for every model, sampler, size and policy. What is searched here is the one at which a
pipeline's own call, from other noise, reuses a given share of its steps or is so many times as fast.
"""

import inspect
import math
import re
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Collection, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, is_dataclass, replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from ..engine import CacheRun, Method, Observer, Session
from ..engine.frame import Frame
from ..engine.structure import forked_rng
from ..errors import ConfigError, DiffusionCacheWarning
from ..fingerprint import Fingerprint, adapters_of
from ..measure.timing import paired
from ..models import find_denoisers, guider_scales, guiders, unwrap
from ..plain import digest, plain_json
from ..policies import Guarded, Interval
from ..profiling.generation import device_name, device_of
from ..registry import check_options
from .kept import Tuned, keep, kept

FIRST_SEED = 190_000  # far inside the range that is left to fitting (`evaluation.prompts.FITTING_SEEDS`)
CALLS = 3  # generations that a value is judged by
MOST_TRIED = 14
STEPS_OFF = 0.5  # from the target, in steps: good enough
NO_FINER = 1.005  # values that differ by less than this factor are one
# of a pipeline's arguments, what tells neither steps, size nor guidance, though it has sizes or is a number or a switch
SILENT = re.compile(r"prompt|embed|mask|labels|_ids$|conditioning_scale$|^return_dict$|^max_sequence_length$")
UNTOLD = object()  # of an argument that says nothing of a call's kind
PAIRS = 3  # of timed generations, uncached and cached


@dataclass(frozen=True)
class Target:
    """What is to be met. reuse: share of the steps that are reused; speedup: of a whole generation. One of them."""

    reuse: float | None = None
    speedup: float | None = None

    def __post_init__(self) -> None:
        if (self.reuse is None) == (self.speedup is None):
            raise ConfigError("give target_reuse or speedup: one of them says what is to be met")
        check_options("target_reuse and speedup", Target, vars(self))
        if self.reuse is not None and not 0 < self.reuse < 1:
            raise ConfigError(f"target_reuse is the share of steps to reuse, between 0 and 1, not {self.reuse!r}")
        if self.speedup is not None and not 1 < self.speedup < math.inf:
            raise ConfigError(f"speedup must be a number above 1, not {self.speedup!r}")


class Tuner:
    """Finds the method of a session for each kind of call that is made of its pipeline; see `Session.generate`.

    A kind of call is what its arguments say of steps, size and guidance, with the sampler as it is set up. What was
    found is remembered, and stored in the user's cache (`kept`) by the model's fingerprint beside that.

    Raises:
        ConfigError: for a policy that has no `tuned` field.
    """

    def __init__(self, method: Method, target: Target):
        policy = method.guarded.policy
        if policy.tuned is None:
            raise ConfigError(
                f"policy {policy.name!r} has nothing that could be searched for a target: its options say how "
                "much it reuses. Give those, or take a policy that decides by a threshold (teacache, first_block)"
            )
        self.method, self.target, self.field = method, target, policy.tuned
        self._found: dict[str, tuple[dict[str, weakref.ref[nn.Module]], Tuned]] = {}  # each for these models
        self._searching = threading.Lock()

    def __call__(self, session: Session, pipe: Any, args: tuple, kwargs: dict[str, Any]) -> Method:
        return self.with_value(self.tuned(session, pipe, args, kwargs).value)

    def with_value(self, value: float) -> Method:
        """The method with this value of the tuned field."""
        guarded = self.method.guarded
        policy = replace(guarded.policy, **{self.field: value})  # type: ignore[type-var]
        return replace(self.method, guarded=replace(guarded, policy=policy))

    def tuned(self, session: Session, pipe: Any, args: tuple, kwargs: dict[str, Any]) -> Tuned:
        """What was found for such a call, before or now."""
        call = arguments_of(pipe, args, kwargs)
        models = {name: unwrap(model) for name, model in find_denoisers(pipe).items()}
        denoisers = {name: (id(model), adapters_of(model)) for name, model in models.items()}
        kind = digest(plain_json([kind_of(call), _sampler_of(pipe), denoisers]), 32)
        with self._searching:  # another thread's call of this kind waits for what is found
            known = self._found.get(kind)
            # the address of a model that is gone may be another's by now
            if known is None or any(ref() is not models[name] for name, ref in known[0].items()):
                key = self._key(pipe, call)
                found = kept(key) if key is not None else None
                if found is None:
                    policy = self.method.guarded.policy.name
                    print(f"{policy}: looking for {self.field}, by generating some times first", file=sys.stderr)
                    found = self._search(session, pipe, call)
                    place = keep(key, found) if key is not None else None
                    print(self._told(found, place), file=sys.stderr)
                self._found[kind] = known = {name: weakref.ref(model) for name, model in models.items()}, found
            return known[1]

    def _told(self, found: Tuned, place: Any) -> str:
        wished = f"target {self.target.reuse * found.steps:.1f}" if self.target.reuse else f"{self.target.speedup}×"
        return (
            f"{self.method.guarded.policy.name}: {self.field}={found.value:.4g} reuses {found.reuse * found.steps:.1f} "
            f"of {found.steps} steps ({wished}; {found.tried} values tried)" + (f"; kept in {place}" if place else "")
        )

    def _key(self, pipe: Any, call: Mapping[str, Any]) -> str | None:
        """What a threshold depends on, as a digest; None where the weights cannot be read."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DiffusionCacheWarning)
            fingerprint = Fingerprint.of(pipe, find_denoisers(pipe))
        if any(facts.weights is None for facts in fingerprint.denoisers.values()):
            return None
        made = self.with_value(0.0)
        device = _speed_of(pipe) if self.target.speedup else ""
        facts = replace(fingerprint, versions={}).to_json()
        return digest(plain_json([facts, kind_of(call), _sampler_of(pipe), repr(made), repr(self.target), device]), 32)

    def _search(self, session: Session, pipe: Any, call: Mapping[str, Any]) -> Tuned:
        count, latest = Counted(), None

        def run(method: Method, seed: int, observer: Observer | None = None) -> CacheRun:
            with forked_rng(), quiet(pipe):
                torch.manual_seed(seed)
                made = session.generate(pipe, from_other_noise(call, seed), method, observer)
            if session.agree is not None:
                raise ConfigError(
                    "a target cannot be searched where ranks share the work of a denoiser: find the threshold on one "
                    "device (diffusion_cache.tune), and give it"
                )
            return made

        def seen(value: float) -> float:
            nonlocal latest
            count.again()
            for index in range(1 if self.method.guarded.planned else CALLS):
                latest = run(self.with_value(value), FIRST_SEED + 1000 * index, count)
            return count.share

        most = seen(math.inf)
        if not count.steps or not most:
            raise ConfigError(
                f"policy {self.method.guarded.policy.name!r} reuses nothing of this call, whatever its {self.field}: "
                "there are too few steps, or the guards leave none"
            )
        share = self._scheduled(latest) or seen
        wished, timing = self.target.reuse, None
        if wished is None:
            uncached = replace(self.method, guarded=Guarded(Interval(1)))
            timing = paired(
                lambda: run(uncached, FIRST_SEED), lambda: run(self.with_value(math.inf), FIRST_SEED), PAIRS
            )
            assert self.target.speedup is not None
            wished = reuse_for(self.target.speedup, timing.wall_ratio, most)
        tolerance = STEPS_OFF / count.steps
        if wished > most + tolerance:
            reached = f"speedup={timing.wall_ratio:.2f}" if timing is not None else f"target_reuse={most:.3g}"
            raise ConfigError(
                f"policy {self.method.guarded.policy.name!r} reuses at most {most * count.steps:.4g} of {count.steps} "
                f"steps of this call, whatever its {self.field}: ask for {reached} at most, or have fewer steps kept "
                "from being reused (warmup, last, max_consecutive, …)"
            )
        if wished > most - tolerance:
            found, tried = (math.inf, most), 1
        else:
            start = getattr(self.method.guarded.policy, self.field)
            values = nearest(share, wished, start if 0 < start < math.inf else 0.1, tolerance)
            found, tried = min(values.items(), key=lambda item: abs(item[1] - wished)), len(values) + 1
        if self.target.reuse is not None and abs(found[1] - wished) * count.steps > 1:
            warnings.warn(
                f"policy {self.method.guarded.policy.name!r} cannot meet target_reuse={self.target.reuse:g} in this "
                f"call: the nearest that its {self.field} allows is {found[1]:.3g}, which is taken",
                DiffusionCacheWarning,
                stacklevel=2,
            )
        return Tuned(found[0], found[1], count.steps, tried)

    def _scheduled(self, run: CacheRun | None) -> Callable[[float], float] | None:
        """The share by the schedule of runs like this one, where that is known beforehand."""
        if not self.method.guarded.planned or run is None or run.clock.total is None:
            return None
        total, levels = run.clock.total, run.noise_levels
        passes = range(len({record.pass_name for record in run.records}))
        spans = [span.name for layout in run.layouts.values() for span in layout.spans]

        def share(value: float) -> float:
            schedule = self.with_value(value).guarded.for_run(levels, spans).schedule(total)
            assert schedule is not None  # of a planned policy
            rows = [schedule.row(step, position) for step in range(total) for position in passes]
            return sum(row.count(False) / len(row) for row in rows) / len(rows)

        return share


class Counted(Observer):
    """The share of what could be reused that was, over calls, spans and samples; and the steps of a run."""

    def __init__(self) -> None:
        self.again()

    def again(self) -> "Counted":
        self.reused = self.visited = 0.0
        self.steps = 0
        return self

    @property
    def share(self) -> float:
        return self.reused / self.visited if self.visited else 0.0

    def denoiser_called(self, frame: Frame, output: Any, again: Any) -> None:
        self.steps = max(self.steps, frame.step.index + 1)
        whole = sum(visit.rows is None for visit in frame.reused)
        # of spans that were computed for some samples, the share of the others
        part = (len(frame.reused) - whole) * (1 - sum(frame.asking) / max(len(frame.asking), 1))
        self.reused += whole + part
        self.visited += whole + frame.computed


def nearest(share: Callable[[float], float], target: float, start: float, tolerance: float) -> dict[float, float]:
    """Values tried and the share of each, until one is within `tolerance` of the target or nothing finer is left.

    share: rises with the value, in steps, but for noise; at infinity it is above the target.
    """
    tried: dict[float, float] = {}
    low, high, value = 0.0, math.inf, start
    while len(tried) < MOST_TRIED and high > NO_FINER * low:
        tried[value] = share(value)
        if abs(tried[value] - target) <= tolerance:
            break
        if tried[value] < target:
            low = value
        else:
            high = value
        value = 4 * low if math.isinf(high) else high / 4 if not low else math.sqrt(low * high)
    return tried


def reuse_for(speedup: float, fastest: float, most: float) -> float:
    """The share of steps to reuse for a speedup, if reusing a share `most` makes a generation `fastest` times as fast.

    The time that is saved grows in proportion to the share, from none at 0.
    """
    gained = 1 - 1 / fastest
    return (1 - 1 / speedup) * most / gained if gained > 0 else math.inf


def arguments_of(pipe: Any, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """A call's arguments by name, defaults too, but for callbacks: nobody is to be told of a trial.

    Raises:
        ConfigError: for arguments that the pipeline does not take.
    """
    signature = inspect.signature(type(pipe).__call__)
    try:
        bound = signature.bind(pipe, *args, **kwargs)
    except TypeError as error:
        raise ConfigError(f"{type(pipe).__name__} cannot be called like that: {error}") from error
    bound.apply_defaults()
    found: dict[str, Any] = {}
    for name, value in list(bound.arguments.items())[1:]:
        found |= value if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD else {name: value}
    return {name: value for name, value in found.items() if not name.startswith("callback")}


def from_other_noise(call: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """The call with generators and latents of its own in place of those that were given."""
    changed: dict[str, Any] = {}
    for name, value in call.items():
        listed = value if isinstance(value, (list, tuple)) else [value]
        if listed and all(isinstance(item, torch.Generator) for item in listed):
            made = [torch.Generator(item.device).manual_seed(seed + i) for i, item in enumerate(listed)]
            changed[name] = made if isinstance(value, (list, tuple)) else made[0]
        elif name == "latents" and isinstance(value, Tensor):
            noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(seed))
            changed[name] = (noise.to(value.device) * value.float().std() + value.float().mean()).to(value.dtype)
    return {**call, **changed}


@contextmanager
def quiet(pipe: Any) -> Any:
    """No progress bar of the pipeline inside the block."""
    own = vars(pipe).get("_progress_bar_config")
    vars(pipe)["_progress_bar_config"] = {**(own or {}), "disable": True}
    try:
        yield
    finally:
        del vars(pipe)["_progress_bar_config"]
        if own is not None:
            vars(pipe)["_progress_bar_config"] = own


def kind_of(call: Mapping[str, Any]) -> dict[str, Any]:
    """What of a call tells its steps, size and guidance: numbers and switches, sizes of tensors and images, and these
    in lists and dicts. Neither prompts, their embeddings, masks and number, nor how many samples there are; but whether
    there is a negative prompt, as some pipelines guide only then.
    """
    told = {name: _told(value) if not SILENT.search(name) else _whether(name, value) for name, value in call.items()}
    return {name: value for name, value in told.items() if value is not UNTOLD}


def _whether(name: str, value: Any) -> Any:
    return True if name.startswith("negative_") and value is not None else UNTOLD


def _told(value: Any) -> Any:
    if isinstance(value, Real):
        return value
    if isinstance(value, Tensor):
        return list(value.shape[1:])
    if isinstance(getattr(value, "size", None), tuple):  # an image
        return list(value.size)
    if isinstance(value, Mapping):
        return kind_of(value)
    if isinstance(value, Collection) and not isinstance(value, str):
        return [told for told in map(_told, value) if told is not UNTOLD] or UNTOLD
    return UNTOLD


def _sampler_of(pipe: Any) -> list[Any]:
    scheduler = getattr(pipe, "scheduler", None)
    parts = [scheduler, *guiders(pipe)]
    configs = [[type(part).__name__, plain_json(_opened(dict(getattr(part, "config", {}))))] for part in parts]
    return [*configs, *guider_scales(pipe)]  # which are read where they are set, apart from the configuration


def _opened(value: Any) -> Any:
    """A configuration with what those in it say; not their text, which a guider fills in at its first use."""
    if isinstance(value, Mapping):
        return {name: _opened(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_opened(item) for item in value]
    return kind_of(asdict(value)) if is_dataclass(value) and not isinstance(value, type) else value


def _speed_of(pipe: Any) -> str:
    """What of the machine a pipeline's speed depends on."""
    device = device_of(pipe)
    return device_name(device) if device.type == "cuda" else f"{device} {torch.get_num_threads()}"
