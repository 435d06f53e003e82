"""The types that policies, forecasters, correctors and the engine share."""

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Literal, NamedTuple, get_args

from torch import Tensor

from .errors import ConfigError
from .schedule import Schedule

Feature = Literal["auto", "residual", "output"]
Form = Literal["flow", "epsilon", "v_prediction", "other"]
TIMED: tuple[Form, ...] = ("flow", "epsilon", "v_prediction")  # whose samplers' variable is known, `NoiseLevels.times`
SCOPES = ("denoiser", "stack", "block", "branch", "cut")
CROSS = re.compile(r"attn2|cross|_ca\b")
# whose blocks of two attentions over frames call the second one attn2 as well (AnimateDiff, I2VGenXL)
TWICE_OVER_FRAMES = re.compile(r"\b(motion_modules|temp_attentions)\b")
ATTENTION = re.compile(r"att", re.IGNORECASE)

# what a policy may look at, each [rows, ...]
SIGNALS = {
    "input": "what enters the first span: its stream of the sample",
    "input_map": "the same as latents [rows, C, H, W] or [rows, C, frames, H, W]",
    "probe_input": "what enters the probe; where there is none, the first span",
    "probe_residual": "what the probe adds to it, or gives where its shape changes (UNet cuts)",
    "modulated_input": "what the first attention of the first span's first block receives, normalised and modulated",
    "noise_level": "log-SNR of the step, [rows]",
    "disagreement": "‖ĥ_c − ĥ_t‖ / ‖ĥ_c‖ of two forecasts of the first span's feature, by a regression on Chebyshev "
    "polynomials and by a line, [rows]; NaN while nothing is stored",
    "output": "what the last span gave; known after the call, so of the past alone",
    "tail_output": "what the blocks after the spans gave; known after the call",
    "tail_forecast": "what was forecast of that from its own history; known after a call with reused spans",
}
KNOWN_AFTER = frozenset({"output", "tail_output", "tail_forecast"})


@dataclass(frozen=True, slots=True)
class Step:
    """Where a denoiser call stands in its run.

    index: sampler iteration, from 0. total: iterations in the run, if known. evaluation: denoiser calls before this
    one in the run. noise_level: log-SNR, if the sampler tells. pass_name: the guidance branch's name or position.
    rows: the batch rows of each guidance branch stacked inside this call (one slice where there is one). pass_index:
    the guidance branch's position in its step, of those that are calls of their own. guidance: g of classifier-free
    guidance (1 − g)·u + g·c by this denoiser, if the pipeline's call tells.
    """

    index: int
    total: int | None
    evaluation: int
    noise_level: float | None
    pass_name: str
    rows: tuple[slice, ...]
    pass_index: int = 0
    guidance: float | None = None


@dataclass(frozen=True)
class Needs:
    """What a policy must see before it can decide.

    signals: names of `SIGNALS`; empty for a policy that knows its schedule beforehand. previous: of how many steps
    before this one, computed or not, they are kept as well (True is 1).
    probe, tail: blocks at the front and end of the stacks that are always computed and so are no part of a span.
    blocks: names of the blocks that may be skipped, at scope block, those side by side as one span; () for all, each
    a span of its own. condition: the prompt or class, of the run's first call, see `Policy.choose`.
    verify: whether reused calls are measured at their end, with the signals known then, and not before they are made.
    rollback: whether a call that is decided against then is made again, computed; else the next one is computed.
    history: features of the spans to keep, where signals are made of them. guided: whether a sample's numbers of both
    guidance branches are combined, also where they are calls of their own.
    """

    signals: tuple[str, ...] = ()
    previous: int = 0
    probe: int = 0
    tail: int = 0
    blocks: tuple[str, ...] = ()
    condition: bool = False
    verify: bool = False
    rollback: bool = False
    history: int = 1
    guided: bool = False


class Condition(NamedTuple):
    """What a denoiser call is conditioned on. name: of its argument; values: embeddings [rows, D], or labels [rows]."""

    name: str
    values: Tensor


class Past(NamedTuple):
    """What is kept of earlier calls of a pass; tensors of the same rows and shapes as this call's signals.

    computed: signals of each row's last computed step, `output` among them. previous: those of the step before this
    one, computed or not, if the policy asks for it. memory: what it remembered (`Policy.remember`), [rows] each; a row
    for which it has remembered nothing yet is NaN. earlier: signals of the steps before the previous one, newest first.
    """

    computed: Mapping[str, Tensor] = {}
    previous: Mapping[str, Tensor] = {}
    memory: Mapping[str, Tensor] = {}
    earlier: tuple[Mapping[str, Tensor], ...] = ()


def branch_kind(name: str, names: Collection[str] = ()) -> str:
    """attention, cross-attention or feed-forward, as the last part of a branch's name says.

    names: of the denoiser's branches. attn2 is no cross-attention, but a second self-attention, over frames in
    motion modules, and over the image beside `attn` (SD3.5-medium).
    """
    block, _, last = name.rpartition(".")
    twice = last == "attn2" and (TWICE_OVER_FRAMES.search(block) or f"{block}.attn" in names)
    if CROSS.search(last) and not twice:
        return "cross-attention"
    return "attention" if ATTENTION.search(last) else "feed-forward"


def largest(values: Sequence[float]) -> float:
    """The largest number, NaN above all."""
    return max(values, key=lambda value: (math.isnan(value), value))


class Verdict(NamedTuple):
    """A decision for all spans of one call, or for one sample in them, with its reason in a few words.

    extra: whether a plan would have reused the step. accumulated: what `PassState.accumulated` is to be at the next
    step if this one is reused.
    """

    compute: bool
    reason: str
    extra: bool = False
    accumulated: float = 0.0


@dataclass
class PassState:
    """What a policy may know of the past of its pass: of one sample in it, where samples are decided on apart.

    accumulated: of the verdict on the step before, if that was reused; 0 after a computed one, whoever asked for it.
    first: the step of its first call, later than 0 for a second denoiser or guidance that begins on the way.
    """

    last_computed: int = -1
    consecutive: int = 0
    reused: int = 0
    accumulated: float = 0.0
    extra: tuple[int, ...] = ()  # steps that a guard had computed beside the planned ones
    first: int = 0

    def update(self, index: int, computed: bool, accumulated: float = 0.0) -> None:
        if computed:
            self.last_computed, self.consecutive, self.accumulated = index, 0, 0.0
        else:
            self.consecutive += 1
            self.reused += 1
            self.accumulated = accumulated


class _Named(ABC):
    """A kind of method."""

    name: ClassVar[str]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" not in vars(cls):
            cls.name = cls.__name__  # until it is registered under another


class Policy(_Named):
    """When to compute. A frozen dataclass of primitives; state lives in PassState.

    A planned policy decides from the step alone. An adaptive one names the signals it needs, turns them into one
    number per batch row on their device (`measure`), and decides from a sample's number (`decide`); the engine reads
    all rows back at once.
    """

    scopes: ClassVar[frozenset[str]]
    tuned: ClassVar[str | None] = None  # the field, a number ≥ 0, that more is reused by the larger it is
    for_one_sampler: ClassVar[bool] = False  # whether it was planned for one, so that another in its place is told

    @property
    def needs(self) -> Needs:
        return Needs()

    @property
    def sigmas(self) -> tuple[float, ...] | None:
        """The noise levels that the sampler is to go through, one a step, in its own unit; None for its own."""
        return None

    def schedule(self, total: int) -> Schedule | None:
        """The whole schedule, for a policy that has one per pass or span; None to be asked step by step.

        A policy with signals goes by the schedule that it gives, and is asked at the steps that are reused by it
        whether to compute one all the same, each in exchange for the next computed one.
        """
        return None

    def schedule_of(self, total: int, spans: Sequence[str]) -> Schedule | None:
        """The same where the spans' names are known, which make the schedule's last axis in this order."""
        return self.schedule(total)

    @property
    def spans_alike(self) -> bool:
        """Whether the spans of a call are all computed or all reused, so that stacks in a row can be cached as one.

        True where the policy is asked step by step; one with schedules says it where theirs are for all spans.
        """
        own = type(self)
        return own.schedule is Policy.schedule and own.schedule_of is Policy.schedule_of

    def for_run(self, noise_levels: Sequence[float]) -> "Policy":
        """This policy for a run through these noise levels (log-SNR, one a step; empty if not known)."""
        return self

    @property
    def is_fitted(self) -> bool:
        """Whether its forecaster was fitted to the features of just the steps that its own schedule computes."""
        return False

    def departure(self, total: int | None) -> str:
        """What to warn of in a run of `total` steps (None: not known) that this policy is not made for, "" if it is."""
        return ""

    def choose(
        self, condition: Condition | None, agree: Callable[[Tensor], Tensor] | None
    ) -> "tuple[Policy, Forecaster]":
        """What a run goes by, from the condition of its first call; for a policy that needs it.

        condition: None where the denoiser is given none that is known. agree: makes values equal on all ranks that
        must decide alike, None where there are no others.
        """
        raise NotImplementedError(f"policy {self.name!r} asks for the condition and so must define choose")

    def measure(self, signals: Mapping[str, Tensor], past: Past) -> Tensor | None:
        """One number per batch row, [rows], on their device; None where there is nothing to compare with yet.

        signals: this step's, by needed name, all that are known before the call. It is not asked at a pass's first
        step. With `Needs.verify` it is asked at the end of calls with reused spans, of all signals, and the number is
        None for samples that were computed. `decide` is asked with it at once with `Needs.rollback`, and before that
        with None; else at the next step.
        """
        raise NotImplementedError(f"policy {self.name!r} names signals and so must define measure")

    def combine(self, values: Sequence[float], step: Step) -> float:
        """A sample's number from those of its guidance branches in one call, in order: the largest, NaN above all.

        Branches that are calls of their own are decided on apart, each with its own number. With `Needs.guided` the
        values are of the unconditional and the conditional branch, in this order, wherever there are two: of one that
        is a call of its own, what it measured at this step or the one before, or the same as the other's where that is
        not known.
        """
        return largest(values)

    def remember(self, signals: Mapping[str, Tensor], past: Past) -> dict[str, Tensor]:
        """Numbers to find in `Past.memory` from the next step on, [rows] each; asked at the end of computed calls.

        signals: this step's, `output` among them if needed. past: as it was before this step; empty at the first one.
        Of a call that is computed for some samples, only their rows are taken.
        """
        return {}

    @abstractmethod
    def decide(self, step: Step, value: float | None, state: PassState) -> Verdict:
        """Compute or reuse at this step. value: what was measured; None with no signals needed, or nothing kept."""


class NoiseLevels(list[float]):
    """log-SNR of each of a run's steps, noisiest first; empty where the sampler does not tell.

    form: what the sampler takes the denoiser's output for, and so in which variable it integrates that: "flow" (a
    velocity, in σ where x = (1 − σ)·x0 + σ·noise), "epsilon" (noise, in σ/α), "v_prediction" (in the angle
    arctan(σ/α)), or "other". after: the level that the last step leads to.
    """

    def __init__(self, levels: Iterable[float] = (), form: Form = "other", after: float = math.inf):
        super().__init__(levels)
        self.form = form
        self.after = after

    def until(self, total: int | None) -> "NoiseLevels":
        """Those of a run that ends after `total` steps: a pipeline may make the first ones of what is listed alone."""
        if total is None or total >= len(self):
            return self
        return NoiseLevels(self[:total], self.form, self[total])

    def times(self, method: str, forms: Sequence[Form] = TIMED) -> tuple[float, ...]:
        """The variable that the sampler integrates in, at each step and after the last one, where it ends at 0.

        Raises:
            ConfigError: naming the method that asks, where the sampler tells no noise levels, is of none of the forms,
                or does not go through falling finite levels.
        """
        if not self or self.form not in forms:
            raise ConfigError(
                f"{method} goes by the noise levels of the steps of a sampler of form {' or '.join(forms)}, which this "
                "run does not tell: use it on a pipeline with such a sampler, or take forecaster='taylor'"
            )
        times = tuple(_time(level, self.form) for level in (*self, self.after))
        if not math.isfinite(times[0]) or any(late >= early for early, late in pairwise(times)):
            raise ConfigError(
                f"{method} needs noise levels that are finite and fall from step to step, which this sampler's do not "
                "(samplers of second order visit them twice): use another sampler, or take forecaster='taylor'"
            )
        return times


def noise_share(level: float) -> float:
    """σ / (α + σ) of a noise level (log-SNR, 2·log(α/σ)); of flow samplers, their own σ."""
    return 0.5 - 0.5 * math.tanh(level / 4)


def _time(level: float, form: Form) -> float:
    if form == "flow":
        return noise_share(level)
    noise = 0.5 * (1.0 - math.tanh(level / 2))  # σ² where α² + σ² = 1
    if form == "v_prediction":
        return math.atan2(math.sqrt(noise), math.sqrt(1.0 - noise))
    return math.sqrt(noise / (1.0 - noise)) if noise < 1.0 else math.inf


class Signals(NamedTuple):
    """One of a policy's signals at the step to forecast, [rows, ...], and at each node, oldest first, alike."""

    now: Tensor
    nodes: tuple[Tensor, ...]


class Query(NamedTuple):
    """nodes: steps of the stored features, oldest first; target: the step to forecast.

    span: position of the span among its denoiser's; pass_index: position of the guidance branch in its step.
    total: steps of the run, if known. signals: by name, those that a corrector needs. times: for a forecaster that is
    `timed`, the variable that the sampler integrates in, at each step of the run and after the last one. direction:
    for one that `keeps_inputs`, 1 where outputs are velocities along which the inputs went as that variable fell, −1
    where they are their negative (ZImage, Lumina), and 0 while what is stored does not tell.
    """

    nodes: Sequence[float]
    target: float
    span: int = 0
    pass_index: int = 0
    total: int | None = None
    signals: Mapping[str, Signals] | None = None
    times: tuple[float, ...] = ()
    direction: float = 1.0

    def in_time(self) -> tuple[list[float], float, float]:
        """The nodes in the sampler's variable, and where in it the step to forecast starts and ends.

        Raises:
            ConfigError: where that is not known.
        """
        if not self.times:
            raise ConfigError("a forecaster that goes by the sampler's steps has weights within a run only")
        step = int(self.target)
        return [self.times[int(node)] for node in self.nodes], self.times[step], self.times[step + 1]


class Blend(NamedTuple):
    """What a forecast ĥ becomes: keep·ĥ + Σ_j anchors[j]·F_j, one anchor for each node's feature.

    Each is one number for all batch rows, or a tensor [rows] of each row's own.
    """

    keep: float | Tensor
    anchors: tuple[float | Tensor, ...]


class Correction(NamedTuple):
    """What a forecast output y becomes, scale·y + bias: numbers of each of the span's channels, or one for all."""

    scale: tuple[float, ...]
    bias: tuple[float, ...]


class Forecaster(_Named):
    """What to reuse: a linear combination of stored features. A frozen dataclass of primitives.

    history: features kept. exact_degree: polynomials in the step index up to this degree are forecast exactly on
    any grid once enough features are stored; None for none. feature: what is stored, residual (output − input),
    output, or auto (residual for stacks and blocks where shapes match, else output).
    scopes: kinds of span that it may forecast. static: whether weights are all of it, and depend on steps and noise
    levels alone. scale_free: whether weights stay the same where all steps are scaled and shifted alike, as those of a
    stream's chunks (`chunks`) are known but for that. timed: forms of the samplers in whose variable it forecasts (see
    `Query.times`); other samplers are then refused. keeps_inputs: whether with each feature the input is stored that
    the output continues (a history takes as many bytes more), to be weighed by `input_weights`.
    """

    scopes: ClassVar[frozenset[str]] = frozenset(SCOPES)
    static: ClassVar[bool] = True
    scale_free: ClassVar[bool] = False
    timed: ClassVar[tuple[Form, ...]] = ()
    keeps_inputs: ClassVar[bool] = False
    feature: Feature

    def __post_init__(self) -> None:
        if self.feature not in get_args(Feature):
            raise ConfigError(
                f"{self.name}: feature must be one of {', '.join(get_args(Feature))}, not {self.feature!r}"
            )

    @property
    def row_passes(self) -> int:
        """Guidance branches stacked in the rows of one call that are forecast with weights of their own."""
        return 1

    @property
    def spans_alike(self) -> bool:
        """Whether what is forecast of two stacks in a row is what is forecast of them as one, but for rounding.

        So it is of sums with weights that are the same for all spans, whatever `Query.span` is.
        """
        return self.static and not self.keeps_inputs and not self.corrected_channels

    def for_run(self, noise_levels: NoiseLevels) -> "Forecaster":
        """This forecaster for a run through these noise levels.

        Raises:
            ConfigError: where it cannot forecast such a run; the run then ends, and the pipeline stays usable.
        """
        return self

    @property
    def corrected_channels(self) -> int:
        """Length of the corrections of forecast outputs: 0 where none are made, 1 if all channels are done alike."""
        return 0

    def correction(self, query: Query) -> Correction | None:
        """How the output that is forecast is corrected; asked for only where `corrected_channels` is not 0."""
        return None

    def note(self, query: Query) -> str:
        """What is to be known of a forecast beside that it was made, in a word; mostly nothing."""
        return ""

    @property
    @abstractmethod
    def history(self) -> int: ...

    @property
    @abstractmethod
    def exact_degree(self) -> int | None: ...

    @abstractmethod
    def weights(self, query: Query) -> tuple[float, ...]:
        """One weight per node; there are between 1 and `history` nodes."""

    def input_weights(self, query: Query) -> tuple[float, ...]:
        """One weight per node for the inputs stored with the features; asked only of what keeps inputs."""
        raise NotImplementedError(f"forecaster {self.name!r} keeps inputs and so must define input_weights")


class NonLinear(Forecaster):
    """A forecaster that is no weighted sum of features. A frozen dataclass of primitives."""

    static = False

    def weights(self, query: Query) -> tuple[float, ...]:
        raise TypeError(f"forecaster {self.name!r} is no weighted sum of features: it has no weights")

    @abstractmethod
    def forecast(self, query: Query, features: Sequence[Tensor]) -> Tensor:
        """The feature at the target from those of the nodes, all [rows, ...] and at least float32.

        features: between 1 and `history`, oldest first, not to be written into. Rows are samples and guidance
        branches: none may depend on another.
        """


class Corrector(_Named):
    """How a forecast is mended, linearly, so that one weighted sum serves. A frozen dataclass of primitives.

    needs_signals: names of `SIGNALS`, known before the call, that it compares; it is given them as `Query.signals`.
    static: whether it depends on steps alone. history: features that it needs at least. forecasters: names of those
    whose forecasts it mends, None for any.
    """

    forecasters: ClassVar[frozenset[str] | None] = None
    needs_signals: ClassVar[tuple[str, ...]] = ()
    history: ClassVar[int] = 1

    @property
    def static(self) -> bool:
        return not self.needs_signals

    @property
    def corrected_channels(self) -> int:
        """As `Forecaster.corrected_channels`."""
        return 0

    def correction(self, query: Query) -> Correction | None:
        """As `Forecaster.correction`."""
        return None

    def blend(self, query: Query) -> Blend | None:
        """What of the forecast feature is kept, and what of the stored ones takes its place; None to keep all."""
        return None
