"""One batch of a pipeline's generations that can be made again and again, and what its uncached run looks like."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..engine import Method, Observer, Session, session_of
from ..engine.frame import Frame, PassKey
from ..engine.patches import wrapped_step
from ..errors import ConfigError
from ..forecasters import Reuse
from ..forecasters.fitted import Fitted
from ..models import find_denoisers
from ..plan import Plan
from ..policies import Guarded, Interval, Planned


@dataclass(frozen=True)
class Batch:
    """`call()` makes the same `count` samples every time, with the pipeline as it stands.

    images: the samples in what it returned, float [count, ...] in [0, 1].
    """

    pipe: Any
    call: Callable[[], Any]
    images: Callable[[Any], Tensor]
    count: int


class Loop:
    """A bare denoiser and the scheduler that one's own loop steps, as a pipeline for `Batch`.

    Called with the loop, a function that makes the samples with both and gives them as a tensor, it runs it.
    """

    def __init__(self, denoiser: nn.Module, scheduler: Any):
        self.components = {"denoiser": denoiser}
        self.scheduler = scheduler

    def __call__(self, loop: Callable[[], Tensor]) -> Tensor:
        return loop()

    def batch(self, loop: Callable[[], Tensor], count: int) -> Batch:
        """The batch of `count` samples that the loop makes, the same every time."""
        return Batch(self, lambda: self(loop), lambda samples: samples, count)


@dataclass
class Teacher:
    """The uncached run of a batch.

    states: what each `scheduler.step` gave, [rows, ...]; rows may be a multiple of the samples. images: [count, ...].
    calls: denoiser calls in a step; rows: guidance branches stacked in the rows of one call. begun: steps that are
    computed whatever is planned, as a denoiser or guidance branch has nothing to go on yet, or has other rows than
    before. guidance_scales: in the pipeline's call, empty if unknown.
    """

    batch: Batch
    images: Tensor = field(default_factory=lambda: torch.empty(0))
    states: list[Tensor] = field(default_factory=list)
    noise_levels: tuple[float, ...] = ()
    calls: int = 0
    rows: int = 1
    begun: tuple[int, ...] = (0,)
    guidance_scales: tuple[float, ...] = ()

    @property
    def steps(self) -> int:
        return len(self.states)

    @property
    def branches(self) -> int:
        """Guidance branches of a step."""
        return self.calls * self.rows


class _Counting(Observer):
    def __init__(self, teacher: Teacher):
        self.teacher = teacher
        self.run: Any = None
        self.steps = 0
        self.batches: dict[PassKey, int] = {}

    def run_began(self, run: Any) -> None:
        self.run = run

    def denoiser_called(self, frame: Frame, output: Any, again: Callable[[], Any]) -> None:
        teacher = self.teacher
        self.steps = max(self.steps, frame.step.index + 1)
        teacher.calls = max(teacher.calls, frame.position + 1)
        teacher.rows = max(teacher.rows, frame.batch // teacher.batch.count)  # guidance may end before the last step
        if self.batches.get(frame.key) != frame.batch:
            teacher.begun = tuple(sorted({*teacher.begun, frame.step.index}))
        self.batches[frame.key] = frame.batch


def teach(batch: Batch) -> Teacher:
    """Generate the batch uncached and note its path.

    Raises:
        ConfigError: if the sampler's steps or the denoiser's calls cannot be seen, or something is not finite.
    """
    teacher = Teacher(batch)
    counting = _Counting(teacher)

    def see(state: Tensor) -> None:
        teacher.states.append(state.detach().clone())

    method = Method(Guarded(Interval(1)), Reuse(), "denoiser")
    with attached(batch.pipe, method, counting), watched_steps(batch.pipe.scheduler, see):
        teacher.images = batch.images(batch.call()).detach().float()
    if not teacher.calls or not teacher.states:
        raise ConfigError(
            f"{type(batch.pipe).__name__}: no denoiser call or no scheduler step was seen in a generation, so there is "
            "no path to fit to"
        )
    if counting.steps != teacher.steps:
        raise ConfigError(
            f"a generation had {teacher.steps} scheduler steps where the denoiser was called in {counting.steps}: one "
            "loop over the steps is needed, of one call of the pipeline"
        )
    if len(teacher.images) != batch.count:
        raise ConfigError(f"a generation gave {len(teacher.images)} samples where {batch.count} were asked for")
    for index, state in enumerate(teacher.states):
        if not bool(torch.isfinite(state).all()):
            raise ConfigError(
                f"the uncached generation is not finite from step {index} on: nothing can be fitted to it"
            )
    teacher.noise_levels = tuple(counting.run.noise_levels)
    teacher.guidance_scales = counting.run.guidance_scales
    return teacher


def state_of(result: Any) -> Tensor:
    """The next state in what `scheduler.step` returned."""
    return result[0] if isinstance(result, tuple) else result.prev_sample


@contextmanager
def watched_steps(scheduler: Any, see: Callable[[Tensor], None]) -> Iterator[None]:
    """Hand on the state that each `scheduler.step` inside the block gives."""

    def make(step: Callable) -> Callable:
        def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
            result = step(self, *args, **kwargs)
            see(state_of(result))
            return result

        return watched

    with wrapped_step(scheduler, make):
        yield


@contextmanager
def last_state(scheduler: Any) -> Iterator[list[Tensor]]:
    """A list that holds, after each `scheduler.step` inside the block, the state that it gave."""
    found: list[Tensor] = []

    def see(state: Tensor) -> None:
        found[:] = [state]

    with watched_steps(scheduler, see):
        yield found


def device_of(pipe: Any) -> torch.device:
    """Where a pipeline runs: as it says, for weights may be kept elsewhere; else where its denoiser's weights are."""
    told = getattr(pipe, "_execution_device", None)
    if told is not None:
        return torch.device(told)
    parameters = (parameter for denoiser in find_denoisers(pipe).values() for parameter in denoiser.parameters())
    return next((parameter.device for parameter in parameters), torch.device("cpu"))


def device_name(device: torch.device | str) -> str:
    """As torch writes it, or the GPU's name."""
    device = torch.device(device)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def dtype_of(pipe: Any) -> torch.dtype:
    """The coarsest precision that a pipeline's denoisers keep their weights in."""
    parameters = (parameter for denoiser in find_denoisers(pipe).values() for parameter in denoiser.parameters())
    dtypes = {parameter.dtype for parameter in parameters if parameter.is_floating_point()}
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)


def plan_method(plan: Plan) -> Method:
    """What a session does to run by a plan."""
    return Method(Guarded(Planned(plan)), Fitted.of(plan), plan.scope, plan.depth, "batch")


class attached:
    """A session of this method and observer on a pipeline, inside the block; what was enabled before comes back."""

    def __init__(self, pipe: Any, method: Method, observer: Observer | None = None):
        self.pipe, self.session = pipe, Session(method, observer=observer)

    def __enter__(self) -> Session:
        self.before = session_of(self.pipe)
        self.session.attach_pipeline(self.pipe)
        return self.session

    def __exit__(self, *error: object) -> None:
        self.session.detach_pipeline(self.pipe)
        if self.before is not None:
            self.before.attach_pipeline(self.pipe)


class StepCall:
    """The arguments of one `scheduler.step`, by name."""

    def __init__(self, step: Callable, scheduler: Any, args: tuple, kwargs: dict[str, Any]):
        self._bound = inspect.signature(step).bind(scheduler, *args, **kwargs)
        self._step = step

    @property
    def model_output(self) -> Tensor:
        return self._bound.arguments["model_output"]

    def result(self, model_output: Tensor, scheduler: Any = None, sample: Tensor | None = None) -> Any:
        """What the step gives for another model output, on another scheduler or sample if given."""
        arguments = dict(self._bound.arguments)
        arguments["model_output"] = model_output
        if sample is not None:
            arguments["sample"] = sample
        if scheduler is not None:
            arguments[next(iter(arguments))] = scheduler
        bound = inspect.BoundArguments(self._bound.signature, arguments)
        return self._step(*bound.args, **bound.kwargs)

    @property
    def sample(self) -> Tensor:
        return self._bound.arguments["sample"]

    @property
    def generators(self) -> list[torch.Generator]:
        given = self._bound.arguments.get("generator")
        listed = given if isinstance(given, (list, tuple)) else [given]
        return [generator for generator in listed if isinstance(generator, torch.Generator)]
