"""Watching uncached generations: which spans a pipeline has, and what every step of them tells."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..context import Feature
from ..engine import Method, Observer, Session
from ..engine.frame import Frame
from ..engine.intercept import is_compiled
from ..engine.patches import ACTIVE
from ..engine.structure import Inputs, image_stream
from ..errors import ConfigError, DiffusionCacheError
from ..forecasters import Reuse
from ..history import Leaf
from ..measure import FlopCounter
from ..models import Span, unwrap
from ..policies import Guarded, Interval
from ..profile import SpanFacts
from ..signals import Grid, channels_first, grid_of
from .attention import AttentionReceived
from .generation import Batch, attached, watched_steps
from .moments import SpanMoments
from .signals import SignalCurves
from .sketch import DEFAULT_WIDTH

EXACT_BYTES = 2**23
HELD_ON_DEVICE = 2**31  # bytes of last steps that stay on the model's device
State = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Watched:
    """One span. grid: (frames, height, width) of its tokens, where they can be told. seen: whether it ever ran."""

    span: Span
    facts: SpanFacts
    grid: Grid | None
    seen: bool


@dataclass(frozen=True, eq=False)
class Survey:
    """What one generation showed. spans: of all denoisers, in the order of their layouts.

    rows: guidance branches stacked in the rows of one call. noise_levels: log-SNR of each step, empty if unknown.
    sample_shape: of one sample's latents; latent_shape: the same with the channels first. channels: that the denoisers
    take or give. shares: what spans' shares are of, "flops" or "parameters". unusable: why a span cannot be cached as
    one.
    """

    scope: str
    spans: tuple[Watched, ...]
    steps: int
    rows: int
    passes: tuple[str, ...]
    noise_levels: tuple[float, ...]
    sample_shape: tuple[int, ...]
    latent_shape: tuple[int, ...]
    channels: frozenset[int]
    shares: str
    unusable: Mapping[str, str]


class Recorder(Observer):
    """Feeds what each span computes in one batch's uncached generation into its sums.

    Pass p of a step is row group p mod rows of its call number p div rows. Sums over several batches are made by
    `merge`; give every batch's recorder a sketch seed of its own, so that their errors are independent.

    count: samples in the batch. width, exact_bytes: of sketches, see `SpanMoments`. hold: see `SignalCurves`.
    attention: where attention received is noted, blocks named as by `attention_names`.
    """

    def __init__(
        self,
        survey: Survey,
        count: int = 1,
        *,
        seed: int = 0,
        width: int = DEFAULT_WIDTH,
        exact_bytes: int = EXACT_BYTES,
        hold: str | None = None,
        attention: AttentionReceived | None = None,
    ):
        self.survey, self.count, self.attention = survey, count, attention
        steps, passes = survey.steps, len(survey.passes)
        # each pass alone: prompts and their negatives may differ in length, and so may features
        self.moments = [
            [
                SpanMoments(
                    f"{watched.facts.name} (pass {name})", steps, width=width, exact_bytes=exact_bytes, seed=seed
                )
                for name in survey.passes
            ]
            for watched in survey.spans
        ]
        self.signals = [
            SignalCurves(
                watched.facts.name,
                steps,
                passes,
                noise_levels=survey.noise_levels or None,
                grid=watched.grid,
                hold=hold,
            )
            for watched in survey.spans
        ]
        self.places = {watched.span: place for place, watched in enumerate(survey.spans)}
        self.revisited: set[int] = set()
        self.peak_bytes = 0
        self._step = 0

    # while a generation runs

    def span_computed(
        self, frame: Frame, span: Span, inputs: Inputs, leaves: Sequence[Leaf], outputs: Sequence[Tensor]
    ) -> None:
        if frame.step.index < self._step:
            raise ConfigError(
                "the pipeline runs several denoising loops in one call, which cannot be profiled as one: profile the "
                "parts it is made of"
            )
        self._step = frame.step.index
        place = self.places.get(span)
        if place is None:
            raise ConfigError(f"{span.name} is no span that was there at first: the pipeline's denoisers have changed")
        if frame.counts.get(span, 1) > 1:
            self.revisited.add(place)  # each visit has a history of its own; the first one stands for all
            return
        rows = frame.batch // self.count  # of which there are fewer once guidance has ended
        if frame.batch % self.count or rows > self.survey.rows:
            raise ConfigError(
                f"the denoiser was called with {frame.batch} rows for {self.count} samples in at most "
                f"{self.survey.rows} guidance branches: profile with one guidance for all, one image a prompt"
            )
        channels = self.survey.channels if span.kind == "denoiser" else ()  # within one, they are the model's own

        def whole(leaf: Tensor) -> Tensor:
            return channels_first(per_sample(leaf, frame.batch, span.name), channels)

        outs: list[Tensor | None] = [whole(out) if out.is_floating_point() else None for out in outputs]
        bases = [
            None if leaf.base is None or out is None else whole(inputs[leaf.base])
            for leaf, out in zip(leaves, outs, strict=True)
        ]
        stream = None
        if all(base is None for base in bases):
            stream = _batched(image_stream(inputs, span.members[0]), frame.batch)
            stream = None if stream is None else channels_first(stream, channels)
        for group in range(rows):
            part = slice(group * self.count, (group + 1) * self.count)
            some_outs = [None if out is None else out[part] for out in outs]
            some_bases = [None if base is None else base[part] for base in bases]
            step, index = frame.step.index, frame.position * self.survey.rows + group
            if index >= len(self.survey.passes):
                raise ConfigError(f"the denoiser is called more often at step {step} than it was at first")
            self.moments[place][index].observe(step, some_outs, some_bases)
            if stream is not None:  # no residual is taken against it, but it has its curves
                some_outs, some_bases = [*some_outs, None], [*some_bases, stream[part]]
            self.signals[place].observe(step, index, some_outs, some_bases)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Note the attention inside the block, if it is wanted; at the end, fold what was observed into the sums."""
        with ExitStack() as stack:
            if self.attention is not None:
                stack.enter_context(self.attention)
                for handle in self._attention_hooks(self.attention):
                    stack.callback(handle.remove)
            yield
        self.peak_bytes = max(self.peak_bytes, self.nbytes)
        for moments in self._moments():
            moments.end_run()
        for signals in self.signals:
            signals.end_run()
        self._step = 0

    def _attention_hooks(self, attention: AttentionReceived) -> Iterator[Any]:
        inside: list[ExitStack] = []

        def enter(name: str) -> Callable:
            def hook(module: nn.Module, args: Any) -> None:
                run = ACTIVE.get()
                block = ExitStack()
                if run is not None and run.frame is not None:
                    block.enter_context(attention.block(name, run.frame.step.index))
                inside.append(block)

            return hook

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            inside.pop().close()

        for name, watched in zip(attention_names(self.survey), self.survey.spans, strict=True):
            for member in watched.span.members:
                yield member.register_forward_pre_hook(enter(name))
                yield member.register_forward_hook(leave, always_call=True)

    # sums

    @property
    def nbytes(self) -> int:
        """Bytes held on the host, and of the last steps that are held where they were computed."""
        return sum(part.nbytes for part in (*self._moments(), *self.signals))

    def _moments(self) -> Iterator[SpanMoments]:
        return (part for passes in self.moments for part in passes)

    def _parts(self) -> dict[str, Any]:
        parts: dict[str, Any] = {f"moments.{i}.{p}": x for i, ps in enumerate(self.moments) for p, x in enumerate(ps)}
        parts |= {f"signals.{i}": part for i, part in enumerate(self.signals)}
        return parts if self.attention is None else {**parts, "attention": self.attention}

    def state_dict(self) -> State:
        """The sums of finished runs, as flat named float64 tensors."""
        return {
            f"{name}/{key}": value for name, part in self._parts().items() for key, value in part.state_dict().items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Replace the sums by stored ones. Raises ConfigError where they are of other spans or steps."""
        parts = self._parts()
        found: dict[str, State] = {name: {} for name in parts}
        for key, value in state.items():
            name, _, inner = key.partition("/")
            if name not in parts:
                raise ConfigError(f"stored sums of {name!r}, which is not measured here")
            found[name][inner] = value
        for name, part in parts.items():
            part.load_state_dict(found[name])

    def merge(self, other: "Recorder") -> None:
        """Add what was summed over other samples. Raises ConfigError where it is of other spans or steps."""
        theirs = other._parts()
        for name, part in self._parts().items():
            part.merge(theirs[name])
        self.revisited |= other.revisited

    def arrays(self) -> dict[str, Tensor]:
        """Means over samples, named and shaped as in a `Profile`; zeros (signals: NaN) for what never ran.

        Raises:
            ConfigError: if no run was finished.
        """
        if not any(part.samples for part in self._moments()):
            raise ConfigError("no run was finished: nothing was measured")
        steps = self.survey.steps
        nothing = {
            **dict.fromkeys(("gram_residual", "gram_output", "cross_input"), torch.zeros(steps, steps).double()),
            "input_energy": torch.zeros(steps).double(),
        }
        found = [[part.result() if part.samples else nothing for part in passes] for passes in self.moments]
        arrays = {
            name: torch.stack([torch.stack([part[name] for part in passes]) for passes in found]) for name in nothing
        }
        arrays["input_energy"] = arrays["input_energy"].float()
        for i, passes in enumerate(found):
            for name in ("channel_mean", "channel_square"):
                widths = {part[name].shape[-1] for part in passes if name in part}
                if len(widths) == 1:
                    empty = torch.zeros(steps, widths.pop())
                    arrays[f"{name}.{i}"] = torch.stack([part.get(name, empty).float() for part in passes])
        curves = [part.result() for part in self.signals]
        return arrays | {name: torch.stack([curve[name] for curve in curves]) for name in curves[0]}


def always(scope: str | None, depth: int | None, feature: Feature = "auto", every: int = 1) -> Method:
    """The method that reuses nothing (or, with every > 1, all spans at the steps between)."""
    return Method(Guarded(Interval(every)), Reuse(feature), scope, depth)


@contextmanager
def surveyed(
    batch: Batch, scope: str | None, depth: int | None = None, feature: Feature = "auto"
) -> Iterator[tuple[Session, Survey]]:
    """A session on the batch's pipeline that has generated the batch once, and what that showed.

    Inside the block the session computes everything; set its observer to see it. The first generation reused every
    second step: only then do the spans take their final form (stacks whose blocks take turns, or use each other's
    outputs, become one).

    Raises:
        ConfigError: if no span or no scheduler step was seen, or calls cannot be told apart into passes.
        NoSpansError: if a denoiser has no spans at this scope.
    """
    if not callable(getattr(getattr(batch.pipe, "scheduler", None), "step", None)):
        raise ConfigError(f"{type(batch.pipe).__name__} has no scheduler whose steps could be followed")
    looking = _Looking(batch)
    with attached(batch.pipe, always(scope, depth, feature, every=2), looking) as session:
        try:
            with watched_steps(batch.pipe.scheduler, looking.stepped), _counting_flops(session) as flops:
                images = batch.images(batch.call())
        except DiffusionCacheError:
            raise
        except Exception:
            # some operations cannot run while they are counted (compiled attention, which is spoilt by the attempt);
            # if that is not why, it is raised now
            torch.compiler.reset()
            session.observer, flops = (looking := _Looking(batch)), {}
            with watched_steps(batch.pipe.scheduler, looking.stepped):
                images = batch.images(batch.call())
        found = looking.survey(session, flops, images)
        session.method = always(scope, depth, feature)
        session.observer = Observer()
        yield session, found


class _Looking(Observer):
    """Notes what a Survey tells."""

    def __init__(self, batch: Batch):
        self.batch = batch
        self.names: dict[int, str] = {}
        self.batches: set[int] = set()
        self.steps = 0
        self.levels: tuple[float, ...] = ()
        self.state: Tensor | None = None
        self.spans: dict[Span, tuple[str, int, int]] = {}  # feature, elements, tokens

    def stepped(self, state: Tensor) -> None:
        self.state = state

    def span_computed(
        self, frame: Frame, span: Span, inputs: Inputs, leaves: Sequence[Leaf], outputs: Sequence[Tensor]
    ) -> None:
        bases = [leaf.base for leaf in leaves if leaf.base is not None]
        elements = sum(out.numel() for out in outputs if out.is_floating_point()) // frame.batch
        stream = image_stream(inputs, span.members[0])
        tokens = stream.shape[1] if stream.ndim == 3 else 0
        if elements > self.spans.get(span, ("", -1, 0))[1]:  # which may differ from pass to pass
            self.spans[span] = "residual" if bases else "output", elements, tokens

    def denoiser_called(self, frame: Frame, output: Any, again: Callable[[], Any]) -> None:
        self.names.setdefault(frame.position, frame.step.pass_name)
        self.batches.add(frame.batch)
        self.steps = max(self.steps, frame.step.index + 1)
        self.levels = tuple(ACTIVE.get().noise_levels)

    def survey(self, session: Session, flops: "dict[str, _Flops]", images: Tensor) -> Survey:
        scopes = {layout.scope for layout in session.layouts.values()}
        if len(scopes) > 1:
            raise ConfigError(f"the denoisers are cached at different scopes ({', '.join(sorted(scopes))}): name one")
        pipeline = type(self.batch.pipe).__name__
        if not any(elements for _, elements, _ in self.spans.values()):
            raise ConfigError(
                f"{pipeline}: no span ran in a generation, so there is nothing to measure. Profile a denoiser that is "
                "compiled as a whole before it is compiled, or at another scope"
            )
        if self.state is None:
            raise ConfigError(f"{pipeline}: no scheduler step was seen in a generation, so its steps are not known")
        rows = self._rows(pipeline)
        channels = _channels(session)
        latent_shape = tuple(channels_first(self.state, channels).shape[1:])
        ran = [name for name, layout in session.layouts.items() if any(span in self.spans for span in layout.spans)]
        exact = all(name in flops and flops[name].total > 0 for name in ran)
        spans = [
            self._watched(name, span, flops.get(name) if exact else None, latent_shape, images)
            for name, layout in session.layouts.items()
            for span in layout.spans
        ]
        return Survey(
            scope=scopes.pop(),
            spans=tuple(spans),
            steps=self.steps,
            rows=rows,
            passes=tuple(self._pass_name(p // rows, p % rows, rows) for p in range((max(self.names) + 1) * rows)),
            noise_levels=self.levels if len(self.levels) == self.steps else (),
            sample_shape=tuple(self.state.shape[1:]),
            latent_shape=latent_shape,
            channels=channels,
            shares="flops" if exact else "parameters",
            unusable={span.name: why for span, why in session.unusable.items()},
        )

    def _rows(self, pipeline: str) -> int:
        """Guidance branches in the rows of a call, of which some calls may have fewer."""
        count = self.batch.count
        if any(batch % count for batch in self.batches):
            shown = ", ".join(map(str, sorted(self.batches)))
            raise ConfigError(
                f"{pipeline} calls its denoiser with {shown} rows for {count} samples, which cannot be told apart: "
                "profile with one image a prompt"
            )
        return max(self.batches) // count

    def _pass_name(self, position: int, group: int, rows: int) -> str:
        name = self.names.get(position, str(position))
        if rows == 1:
            return name
        return str(position * rows + group) if name == str(position) else f"{name}.{group}"

    def _watched(
        self, denoiser: str, span: Span, flops: "_Flops | None", latent_shape: tuple[int, ...], images: Tensor
    ) -> Watched:
        feature, elements, tokens = self.spans.get(span, ("output", 0, 0))
        whole = sum(parameter.numel() for parameter in self.batch.pipe.components[denoiser].parameters())
        if span not in self.spans or span.kind == "denoiser":
            share = float(span in self.spans)
        elif flops is not None:
            share = sum(flops.of.get(member, 0) for member in span.members) / flops.total
        else:
            share = span.parameters / max(whole, 1)
        facts = SpanFacts(span.name, denoiser, span.kind, feature, max(elements, 1), min(share, 1.0))
        grid = grid_of(tokens, latent_shape, tuple(images.shape[1:]))
        return Watched(span, facts, grid, elements > 0)


def _channels(session: Session) -> frozenset[int]:
    """Numbers of channels that the denoisers take or give, as they tell."""
    configs = [getattr(unwrap(denoiser), "config", None) for denoiser in session.denoisers.values()]
    told = (getattr(config, name, None) for config in configs for name in ("in_channels", "out_channels"))
    return frozenset(count for count in told if isinstance(count, int))


def attention_names(survey: Survey) -> list[str]:
    """A name of its own for each span, by which attention is noted."""
    return [f"{watched.facts.denoiser}.{watched.facts.name}" for watched in survey.spans]


def held_on(survey: Survey, count: int, device: torch.device) -> str | None:
    """Where to hold the last step of each span, see `SignalCurves`: on the host, if the device would fill up."""
    elements = sum(watched.facts.elements for watched in survey.spans)
    both = 2 * 4 * elements * count * len(survey.passes)  # residual and input
    return "cpu" if device.type != "cpu" and both > HELD_ON_DEVICE else None


def per_sample(leaf: Tensor, batch: int, name: str) -> Tensor:
    """A span's tensor as [batch, ...]: frames and the like that are folded into its rows become a dimension.

    Raises:
        ConfigError: where its rows cannot be told apart.
    """
    whole = _batched(leaf, batch)
    if whole is None:
        raise ConfigError(
            f"{name} gives a tensor of shape {tuple(leaf.shape)} for {batch} rows of samples, which cannot be told "
            "apart in it: profile one sample at a time (batch=1) without guidance, or at another scope"
        )
    return whole


def _batched(leaf: Tensor, batch: int) -> Tensor | None:
    if leaf.ndim and len(leaf) == batch:
        return leaf if leaf.ndim > 2 else leaf.reshape(batch, 1, -1)  # one token
    if not leaf.ndim or not len(leaf) or len(leaf) % batch:
        return None
    parts = leaf.unflatten(0, (batch, -1))  # [B, k, ...]
    if leaf.ndim == 3:
        return parts.flatten(1, 2)  # [B, k·N, C]
    if leaf.ndim == 4:
        return parts.movedim(1, 2)  # [B, C, k, H, W]
    return parts if parts.ndim > 2 else parts[:, None]


@dataclass
class _Flops:
    """Of a denoiser's first call, and of the modules in it."""

    total: int
    of: dict[nn.Module, int]


@contextmanager
def _counting_flops(session: Session) -> Iterator[dict[str, _Flops]]:
    """Operations of each denoiser's first call inside the block, by name, and of its spans' members.

    Not of denoisers that are compiled, or have compiled parts: those would be compiled anew for it.
    """
    found: dict[str, _Flops] = {}
    with ExitStack() as stack:
        for name, denoiser in session.denoisers.items():
            if any(is_compiled(module) for module in denoiser.modules()):
                continue
            members = {member for span in session.layouts[name].spans for member in span.members}
            for handle in _flop_hooks(name, unwrap(denoiser), members, found):
                stack.callback(handle.remove)
        yield found


def _flop_hooks(name: str, denoiser: nn.Module, members: set[nn.Module], found: dict[str, _Flops]) -> Iterator[Any]:
    counter: list[FlopCounter] = []  # while the first call runs
    began: dict[nn.Module, int] = {}
    inside: dict[nn.Module, int] = {}

    def begin(module: nn.Module, args: Any) -> None:
        if name not in found and not counter:
            counter.append(FlopCounter())
            counter[0].__enter__()

    def end(module: nn.Module, args: Any, output: Any) -> None:
        if counter:
            counter[0].__exit__(None, None, None)
            found[name] = _Flops(counter.pop().total, inside)

    def enter(module: nn.Module, args: Any) -> None:
        if counter:
            began[module] = counter[0].total

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        if counter:
            inside[module] = inside.get(module, 0) + counter[0].total - began[module]

    yield denoiser.register_forward_pre_hook(begin, prepend=True)
    for member in members - {denoiser}:
        yield member.register_forward_pre_hook(enter)
        yield member.register_forward_hook(leave, always_call=True)
    yield denoiser.register_forward_hook(end, always_call=True)
