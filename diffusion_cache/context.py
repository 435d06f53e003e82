"""The types that policies, forecasters and the engine share."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, get_args

from torch import Tensor

from .errors import ConfigError
from .schedule import Schedule

Feature = Literal["auto", "residual", "output"]
SCOPES = ("denoiser", "stack", "block", "branch", "cut")


@dataclass(frozen=True, slots=True)
class Step:
    """Where a denoiser call stands in its run.

    index: sampler iteration, from 0. total: iterations in the run, if known. evaluation: denoiser calls before this
    one in the run. noise_level: log-SNR, if the sampler tells. pass_name: the guidance branch's name or position.
    rows: the batch rows of each guidance branch stacked inside this call (one slice where there is one).
    """

    index: int
    total: int | None
    evaluation: int
    noise_level: float | None
    pass_name: str
    rows: tuple[slice, ...]


@dataclass(frozen=True)
class Needs:
    """What a policy must see before it can decide.

    signals: names from {"probe_residual", "input"} (what enters the first span); empty for a policy that knows its
    schedule beforehand.
    probe, tail: blocks at the front and end of the stacks that are always computed and so are no part of a span.
    blocks: names of the blocks that may be skipped, at scope block, those side by side as one span; () for all, each
    a span of its own. condition: the prompt or class, of the run's first call, see `Policy.choose`.
    """

    signals: tuple[str, ...] = ()
    probe: int = 0
    tail: int = 0
    blocks: tuple[str, ...] = ()
    condition: bool = False


class Condition(NamedTuple):
    """What a denoiser call is conditioned on. name: of its argument; values: embeddings [rows, D], or labels [rows]."""

    name: str
    values: Tensor


class Verdict(NamedTuple):
    """A decision for all spans of one call, or for one sample in them, with its reason in a few words."""

    compute: bool
    reason: str
    extra: bool = False  # whether a plan would have reused the step


@dataclass
class PassState:
    """What a policy may know of the past of its pass: of one sample in it, where samples are decided on apart."""

    last_computed: int = -1
    consecutive: int = 0
    reused: int = 0
    extra: tuple[int, ...] = ()  # steps that a guard had computed beside the planned ones

    def update(self, index: int, computed: bool) -> None:
        if computed:
            self.last_computed, self.consecutive = index, 0
        else:
            self.consecutive += 1
            self.reused += 1


class Policy(ABC):
    """When to compute. A frozen dataclass of primitives; state lives in PassState.

    A planned policy decides from the step alone. An adaptive one names the signals it needs, turns them into one
    number per batch row on their device (`measure`), and decides from a sample's number (`decide`); the engine reads
    all rows back at once.
    """

    name: ClassVar[str]
    scopes: ClassVar[frozenset[str]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" not in vars(cls):
            cls.name = cls.__name__  # until it is registered under another

    @property
    def needs(self) -> Needs:
        return Needs()

    @property
    def sigmas(self) -> tuple[float, ...] | None:
        """The noise levels that the sampler is to go through, one a step, in its own unit; None for its own."""
        return None

    def schedule(self, total: int) -> Schedule | None:
        """The whole schedule, for a policy that has one per pass or span; None to be asked step by step."""
        return None

    def for_run(self, noise_levels: Sequence[float]) -> "Policy":
        """This policy for a run through these noise levels (log-SNR, one a step; empty if not known)."""
        return self

    def choose(
        self, condition: Condition | None, agree: Callable[[Tensor], Tensor] | None
    ) -> "tuple[Policy, Forecaster]":
        """What a run goes by, from the condition of its first call; for a policy that needs it.

        condition: None where the denoiser is given none that is known. agree: makes values equal on all ranks that
        must decide alike, None where there are no others.
        """
        raise NotImplementedError(f"policy {self.name!r} asks for the condition and so must define choose")

    def measure(self, signals: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> Tensor:
        """One number per batch row, [rows]: from this step's signals and those of each row's last computed step.

        Both map the needed names to tensors of equal shape, [rows, ...]. Of the rows that belong to one sample
        (guidance branches) the largest number counts, and NaN above all.
        """
        raise NotImplementedError(f"policy {self.name!r} names signals and so must define measure")

    @abstractmethod
    def decide(self, step: Step, value: float | None, state: PassState) -> Verdict:
        """Compute or reuse at this step. value: what was measured; None with no signals needed, or nothing kept."""


class Query(NamedTuple):
    """nodes: steps of the stored features, oldest first; target: the step to forecast.

    span: position of the span among its denoiser's; pass_index: position of the guidance branch in its step.
    """

    nodes: Sequence[float]
    target: float
    span: int = 0
    pass_index: int = 0


class Correction(NamedTuple):
    """What a forecast output y becomes, scale·y + bias: numbers of each of the span's channels, or one for all."""

    scale: tuple[float, ...]
    bias: tuple[float, ...]


class Forecaster(ABC):
    """What to reuse: a linear combination of stored features. A frozen dataclass of primitives.

    history: features kept. exact_degree: polynomials in the step index up to this degree are forecast exactly on
    any grid once enough features are stored; None for none. feature: what is stored, residual (output − input),
    output, or auto (residual for stacks and blocks where shapes match, else output).
    """

    name: ClassVar[str]
    feature: Feature

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" not in vars(cls):
            cls.name = cls.__name__  # until it is registered under another

    def __post_init__(self) -> None:
        if self.feature not in get_args(Feature):
            raise ConfigError(
                f"{self.name}: feature must be one of {', '.join(get_args(Feature))}, not {self.feature!r}"
            )

    @property
    def row_passes(self) -> int:
        """Guidance branches stacked in the rows of one call that are forecast with weights of their own."""
        return 1

    def for_run(self, noise_levels: Sequence[float]) -> "Forecaster":
        """This forecaster for a run through these noise levels (log-SNR, one a step; empty if not known)."""
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
