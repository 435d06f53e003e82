"""Trajectory matching: at each reused step, the weights that put the sampler back on the uncached path.

Go through a generation in order, on the cached path. At a reused step let M(w) be the guided model output with the
spans forecast by the weights w, and let the sampler be affine in it, x' = a + b·M. With M* = (x'* − a)/b, where x'*
is the state that the uncached run has next, and w₀ the Taylor-1 weights, solve

    min over δ of ‖M(w₀) + Jδ − M*‖² + λ Σ_j ‖J_j‖² δ_j²   subject to Σ_j δ_j = 0 for each guidance branch and group

with the derivatives J_j taken by finite differences (of reused calls, which are cheap), and go on with w₀ + δ. Further
regressors may take part in the same system, for each branch and group: a scale of the spans' outputs, which frees the
weights from summing to one and so weighs the spans' inputs, and a bias of each of their channels. What the sampler
makes of a model output is asked of a copy of itself; how guidance combines its branches is found by regression.

A sample that has left its path has most to say in a sum of squares. Robustly, each sample's part of it is weighed by
ω = 1 / (1 + q / median q), with its mean square q of M(w₀) − M*.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..context import Correction, Feature, Forecaster, Policy, Query
from ..engine import Method, Observer
from ..engine.frame import Frame
from ..engine.observer import Again
from ..engine.patches import wrapped_step
from ..engine.structure import first_tensor, forked_rng
from ..forecasters.fitted import Fit, Fitted, Key, taylor_weights
from ..ops import double
from ..policies import Guarded
from .generation import StepCall, Teacher, attached, state_of

NUDGES = {torch.float64: 1e-3, torch.float32: 1e-2}
LOW_PRECISION_NUDGE = 0.25
GUIDANCE_TOLERANCE = 1e-3  # what guidance may differ from a linear combination by, relative
ROUNDINGS = 0.5  # or by so many units of the precision that it is combined in, where that is more
LENGTHS = (1.0, 0.5, 0.25)  # of the step that is solved for, where the output is not as linear as it takes it to be
BIASED_CHANNELS = 128
NEGLIGIBLE = 1e-2  # what a scale or a bias of one changes the model output by, relative, if it is to be solved for
ONE_FEATURE = "with one feature in the history there is nothing to choose"
AFFINE_TOLERANCE = 1e-3  # what a sampler's step may differ from an affine map by, relative


@dataclass(frozen=True)
class Settings:
    """history: features kept. ridge: λ. groups: the span group of each span, or () for one; scope, depth: of the spans.

    feature: what is stored (see `Forecaster`). scale, bias: correct the outputs too, strengths: their λ. A bias takes
    a reused call for each channel and group; spans of more than BIASED_CHANNELS, or of different ones, get one for all.
    robust: weigh samples by ω.
    """

    scope: str | None = None
    depth: int | None = None
    history: int = 3
    ridge: float = 1e-3
    groups: tuple[int, ...] = ()
    feature: Feature = "auto"
    scale: bool = False
    bias: bool = False
    strengths: tuple[float, float] = (1e-3, 1.0)
    robust: bool = False


@dataclass(frozen=True)
class Result:
    """What a fit has found.

    images: of the cached run it went along, [n, ...]. notes: by step, why it keeps Taylor. errors: by step, the
    distance from M* before and after, relative to ‖M*‖, samples weighed as in the fit.
    """

    forecaster: Fitted
    images: Tensor
    notes: Mapping[int, str]
    errors: Mapping[int, tuple[float, float]]


class UnfitError(Exception):
    """A step that keeps its Taylor weights, with the reason."""


def nudge_of(dtype: torch.dtype) -> float:
    """What weights are moved by for a finite difference of what a model of this precision makes of them."""
    return NUDGES.get(dtype, LOW_PRECISION_NUDGE)


def fit(teacher: Teacher, policy: Policy, settings: Settings) -> Result:
    """Fit weights for a policy that knows its schedule beforehand, on the teacher's batch: one cached generation."""
    fitting = Fitting(teacher, settings)
    method = Method(Guarded(policy), fitting.forecaster, settings.scope, settings.depth, "batch")
    batch = teacher.batch
    with attached(batch.pipe, method, fitting), wrapped_step(batch.pipe.scheduler, fitting.stepping):
        images = batch.images(batch.call()).detach().float()
    return Result(fitting.forecaster.fitted, images, fitting.notes, fitting.errors)


class _Growing(Forecaster):
    """Weights while they are being fitted: a table that grows, and one unknown moved for a moment."""

    name = "fitting"

    def __init__(self, settings: Settings, branches: int):
        self.feature = settings.feature
        self.table: dict[Key, Fit] = {}
        self.fitted = Fitted(self.table, settings.history, settings.groups, branches, settings.feature)
        self.channels, self.size = 0, 1.0  # how many channels are corrected; biases are solved for in units of this
        self._nudged: tuple[int, Unknown, float] | None = None  # of which group, by how much

    @property
    def history(self) -> int:
        return self.fitted.history

    @property
    def row_passes(self) -> int:
        return self.fitted.row_passes

    @property
    def exact_degree(self) -> int | None:
        return None

    def weights(self, query: Query) -> tuple[float, ...]:
        weights = self.fitted.weights(query)
        if self._nudged is None or self._nudged[0] != self.fitted.group(query.span):
            return weights
        _, (kind, place), by = self._nudged
        return tuple(weight + by * ((kind, i) == ("weight", place)) for i, weight in enumerate(weights))

    @property
    def corrected_channels(self) -> int:
        return self.channels

    def correction(self, query: Query) -> Correction | None:
        if self._nudged is None or self._nudged[0] != self.fitted.group(query.span):
            return self.fitted.correction(query)
        _, (kind, place), by = self._nudged
        scale = 1.0 + by * (kind == "scale")
        bias = [by * self.size * ((kind, channel) == ("bias", place)) for channel in range(self.channels)]
        return Correction((scale,) * self.channels, tuple(bias))

    @contextmanager
    def nudged(self, group: int, unknown: "Unknown", by: float) -> Iterator[None]:
        self._nudged = group, unknown, by
        try:
            yield
        finally:
            self._nudged = None


class Unknown(NamedTuple):
    """What is solved for: the weight of a place in the history, the scale, or the bias of a channel."""

    kind: Literal["weight", "scale", "bias"]
    place: int = 0


class _Owner(NamedTuple):
    """Whose unknowns they are: a group's in one guidance branch, with the steps of its features.

    branches: those of the table; all of a call's where its rows are one branch now, and are taken for several there.
    """

    group: int
    branches: tuple[int, ...]
    nodes: tuple[int, ...]


class Called(NamedTuple):
    """One call of the denoiser in the current step. branches: outputs of its guidance branches, [n, ...] each."""

    frame: Frame
    branches: list[Tensor]
    again: Again


class Fitting(Observer):
    def __init__(self, teacher: Teacher, settings: Settings):
        self.teacher, self.settings = teacher, settings
        self.forecaster = _Growing(settings, teacher.rows)
        self.run: Any = None
        self.calls: list[Called] = []
        self.notes: dict[int, str] = {}
        self.errors: dict[int, tuple[float, float]] = {}

    def run_began(self, run: Any) -> None:
        self.run = run

    def denoiser_called(self, frame: Frame, output: Any, again: Again) -> None:
        self.calls.append(Called(frame, self._branches(frame, output), again))

    def _branches(self, frame: Frame, output: Any) -> list[Tensor]:
        return list(first_tensor(output).detach().chunk(max(1, frame.batch // self.teacher.batch.count)))

    def stepping(self, step: Callable) -> Callable:
        """`scheduler.step`, which goes on from the fitted weights."""

        def fitted(scheduler: Any, *args: Any, **kwargs: Any) -> Any:
            calls, self.calls = self.calls, []
            if not any(call.frame.reused for call in calls):
                return step(scheduler, *args, **kwargs)
            given = StepCall(step, scheduler, args, kwargs)
            index = calls[0].frame.step.index
            try:
                return given.result(self._fit(index, calls, given, scheduler))
            except UnfitError as why:
                self.notes[index] = str(why)
                return step(scheduler, *args, **kwargs)

        return fitted

    def _fit(self, index: int, calls: Sequence[Called], given: StepCall, scheduler: Any) -> Tensor:
        """The model output with the weights that are found, which are in the table then."""
        count = self.teacher.batch.count
        rows = len(given.model_output)
        guided = given.model_output[:count]
        before, like = double(guided), guided.shape
        branches = [aligned(branch, like) for call in calls for branch in call.branches]
        guidance = guidance_weights(branches, guided)
        target = self._target(index, given, scheduler)
        unknowns, columns = _that_matter(*self._derivatives(index, calls, guidance, like), float(before.norm()))
        owners = list(dict.fromkeys(owner for owner, _ in unknowns))
        if len(unknowns) == len(owners):
            raise UnfitError(ONE_FEATURE)
        wanted = target - before
        weight: Tensor | float = 1.0
        if self.settings.robust:
            weight = _root_weights(wanted)
            columns.unflatten(1, like).mul_(weight)
        delta = dict(zip(unknowns, self._solve(columns, (wanted * weight).flatten(), unknowns), strict=True))
        size = float((target * weight).norm().clamp_min(1e-30))
        error = float((wanted * weight).norm()) / size
        for length in LENGTHS:
            for owner in owners:
                own = {unknown: length * change for (of, unknown), change in delta.items() if of == owner}
                for branch in owner.branches:
                    self.forecaster.table[index, owner.group, branch] = self._found(index, owner.nodes, own)
            after = self._guided(before, branches, calls, guidance)
            reached = float(((after - target) * weight).norm()) / size
            if reached < error:
                self.errors[index] = error, reached
                whole = after.to(given.model_output)
                return whole.repeat(rows // count, *[1] * (whole.ndim - 1))
        for key in [key for key in self.forecaster.table if key[0] == index]:
            del self.forecaster.table[key]
        raise UnfitError("the fitted weights are no better than Taylor's")

    def _guided(
        self, before: Tensor, branches: Sequence[Tensor], calls: Sequence[Called], guidance: Sequence[float]
    ) -> Tensor:
        """The model output with the weights as they are now.

        before: what the pipeline made of these branches. In what that is off from their combination, it stays.
        """
        return before + (combined(self._repeat(calls, before.shape), guidance) - combined(branches, guidance))

    def _repeat(self, calls: Sequence[Called], like: torch.Size) -> list[Tensor]:
        """The guidance branches' outputs with the weights as they are now."""
        found = []
        for call in calls:
            branches = self._branches(call.frame, call.again()) if call.frame.reused else call.branches
            found += [aligned(branch, like) for branch in branches]
        return found

    def _found(self, index: int, nodes: tuple[int, ...], changes: Mapping[Unknown, float]) -> Fit:
        scale = 1.0 + changes.get(Unknown("scale"), 0.0)
        # what the weights add is scaled too: divided by it, the output is as linear in the unknowns as solved for
        ahead = enumerate(taylor_weights(nodes, index))
        weights = tuple(weight + changes[Unknown("weight", place)] / scale for place, weight in ahead)
        channels = self.forecaster.channels
        if not channels:
            return Fit(nodes, weights)
        bias = tuple(self.forecaster.size * changes.get(Unknown("bias", i), 0.0) for i in range(channels))
        return Fit(nodes, weights, Correction((scale,) * channels, bias))

    def _regressors(self, calls: Sequence[Called]) -> list[Unknown]:
        """Those beside the weights; the forecaster then corrects as many channels as they are for."""
        settings = self.settings
        if not settings.scale and not settings.bias:
            return []
        outputs = [leaf for call in calls for visit in call.frame.reused for leaf in visit.forecast or ()]
        outputs = [output for output in outputs if output.is_floating_point()]
        self.forecaster.size = float(double(outputs[0]).square().mean().sqrt())
        if not self.forecaster.channels:
            counts = {ops.channels(output) for output in outputs}
            wide = len(counts) > 1 or max(counts) > BIASED_CHANNELS
            self.forecaster.channels = 1 if wide or not settings.bias else counts.pop()
        biases = [Unknown("bias", channel) for channel in range(self.forecaster.channels)]
        return [Unknown("scale")] * settings.scale + biases * settings.bias

    def _derivatives(
        self, index: int, calls: Sequence[Called], guidance: Sequence[float], like: torch.Size
    ) -> tuple[list[tuple[_Owner, Unknown]], Tensor]:
        """What is to be solved for, and ∂M/∂ of each, flattened, [unknowns, elements]."""
        nodes: dict[tuple[int, int], tuple[int, ...]] = {}  # by group and place of the call
        of_group: dict[int, tuple[int, ...]] = {}
        for place, call in enumerate(calls):
            for visit in call.frame.reused:
                group = self.forecaster.fitted.group(self.run.session.span_index[visit.span])
                held = tuple(int(node) for node in visit.state.history.nodes)
                if nodes.setdefault((group, place), held) != held:
                    raise UnfitError("spans of one group hold features of different steps")
                if of_group.setdefault(group, held) != held:  # a plan has one set of nodes for all of them
                    raise UnfitError("guidance branches hold features of different steps")
        base = [branch for call in calls for branch in call.branches]
        sources = [(place, row) for place, call in enumerate(calls) for row in range(len(call.branches))]
        nudge = nudge_of(base[0].dtype)
        regressors = self._regressors(calls)
        found: dict[tuple[_Owner, Unknown], Tensor] = {}
        for group in sorted({group for group, _ in nodes}):
            longest = max(len(held) for (owner, _), held in nodes.items() if owner == group)
            for unknown in [*(Unknown("weight", node) for node in range(longest)), *regressors]:
                with self.forecaster.nudged(group, unknown, nudge):
                    moved = self._repeat(calls, like)
                for (place, row), branch, was, weight in zip(sources, moved, base, guidance, strict=True):
                    held = nodes.get((group, place), ())
                    if held and (unknown.kind != "weight" or unknown.place < len(held)):
                        owner = _Owner(group, self._branch_places(calls[place], row), held)
                        found[owner, unknown] = (weight * (branch - aligned(was, like)) / nudge).flatten()
        return list(found), torch.stack(list(found.values()))

    def _branch_places(self, call: Called, row: int) -> tuple[int, ...]:
        """Which of the step's guidance branches a part of a call's rows is in the table."""
        rows = self.teacher.rows
        first = call.frame.position * rows
        if len(call.branches) == rows:
            return (first + row,)
        if len(call.branches) > 1:
            raise UnfitError("guidance has fewer branches here than at other steps")
        return tuple(range(first, first + rows))

    def _solve(self, columns: Tensor, wanted: Tensor, unknowns: Sequence[tuple[_Owner, Unknown]]) -> list[float]:
        """δ by the system above, one of each unknown."""
        settings = self.settings
        scale, bias = settings.strengths
        strength = {"weight": settings.ridge, "scale": scale, "bias": bias}
        ridge = [strength[unknown.kind] for _, unknown in unknowns]
        sums = [
            [place for place, (of, unknown) in enumerate(unknowns) if of == owner and unknown.kind == "weight"]
            for owner in dict.fromkeys(owner for owner, _ in unknowns)
            if (owner, Unknown("scale")) not in unknowns
        ]
        return _solve(columns, wanted, ridge, sums).tolist()

    def _target(self, index: int, given: StepCall, scheduler: Any) -> Tensor:
        """M*: the model output that leads to the uncached run's next state, [n, ...] in float64."""
        count = self.teacher.batch.count
        output, sample = double(given.model_output), double(given.sample)
        scale = float(output.square().mean().sqrt())
        with self.run.clock.suppressed():
            # in its own dtype, for the noise that a sampler draws depends on it
            led = self._next(given, copy.deepcopy(scheduler), given.model_output, given.sample)[:count]
            here, up, down = (
                self._next(given, _in_float64(scheduler, sample.shape), output + move * scale, sample)[:count]
                for move in (0.0, 1.0, -1.0)
            )
        change = up - down
        if not bool(torch.isfinite(change).all()) or not float(change.abs().max()) > 0:
            raise UnfitError("the sampler's next state does not depend on the model output, or is not finite")
        if float((up + down - 2 * here).norm()) > AFFINE_TOLERANCE * float(change.norm()):
            raise UnfitError("the sampler's step is not affine in the model output")
        slope = change / (2 * scale)
        if float(slope.abs().min()) < 1e-6 * float(slope.abs().max()):
            raise UnfitError("the sampler's next state hardly depends on the model output")
        wanted = double(self.teacher.states[index][:count]).to(output.device)
        if wanted.shape != led.shape:
            raise UnfitError("the sampler gives states of another shape than in the uncached run")
        return output[:count] + (wanted - led) / slope

    @staticmethod
    def _next(given: StepCall, scheduler: Any, output: Tensor, sample: Tensor) -> Tensor:
        """What this copy of the sampler makes of a model output; random numbers go on as if it had not been asked."""
        states = [(generator, generator.get_state()) for generator in given.generators]
        try:
            with forked_rng():
                return double(state_of(given.result(output, scheduler, sample)))
        finally:
            for generator, state in states:
                generator.set_state(state)


def _in_float64(scheduler: Any, shape: torch.Size) -> Any:
    """A copy of a sampler with the samples and model outputs that it keeps, of this shape, in float64.

    A sampler's step may go on in their precision whatever it is given, and rounding is not affine.
    """
    copied = copy.deepcopy(scheduler)

    def widened(value: Any) -> Any:
        return double(value) if isinstance(value, Tensor) and value.shape == shape else value

    for name, value in list(vars(copied).items()):
        setattr(copied, name, [widened(item) for item in value] if isinstance(value, list) else widened(value))
    return copied


def _root_weights(missed: Tensor) -> Tensor:
    """√ω of each sample, [n, 1, …], by what it is off by, [n, …]."""
    squares = missed.flatten(1).square().mean(dim=1)
    median = squares.quantile(0.5).clamp_min(torch.finfo(squares.dtype).tiny)
    return (1 + squares / median).rsqrt().reshape(-1, *[1] * (missed.ndim - 1))


def _that_matter(
    unknowns: Sequence[tuple[_Owner, Unknown]], columns: Tensor, size: float
) -> tuple[list[tuple[_Owner, Unknown]], Tensor]:
    """Without the scales and biases that hardly move the model output, as where a normalisation follows the span.

    What is left of those is rounding, to which a solution would be as large as it likes.
    """
    kept = [
        place
        for place, (_, unknown) in enumerate(unknowns)
        if unknown.kind == "weight" or float(columns[place].norm()) > NEGLIGIBLE * size
    ]
    return [unknowns[place] for place in kept], columns[kept]


def aligned(branch: Tensor, like: torch.Size) -> Tensor:
    """A denoiser's output in the shape that the sampler is given, float64: less the channels of a learned variance."""
    if branch.shape != like and branch.ndim == len(like) and branch.shape[1] > like[1]:
        branch = branch[:, : like[1]]
    if branch.shape != like:
        raise UnfitError("the sampler is given something of another shape than the denoiser's output")
    return double(branch)


def guidance_weights(branches: Sequence[Tensor], guided: Tensor) -> list[float]:
    """The weights that guidance gives its branches, by least squares.

    guided: in the precision that they were combined in, which their sum is off by.
    """
    tolerance = max(GUIDANCE_TOLERANCE, ROUNDINGS * torch.finfo(guided.dtype).eps)
    design, wanted = torch.stack([branch.flatten() for branch in branches], dim=1), double(guided).flatten()
    found = torch.linalg.lstsq(design, wanted[:, None]).solution.flatten()
    missed = (design @ found - wanted).norm()
    if not float(missed) <= tolerance * float(wanted.norm()):
        raise UnfitError("guidance is no linear combination of the denoiser's outputs")
    return found.tolist()


def combined(branches: Sequence[Tensor], guidance: Sequence[float]) -> Tensor:
    total = torch.zeros_like(branches[0])
    for branch, weight in zip(branches, guidance, strict=True):
        total.add_(branch, alpha=weight)
    return total


def _solve(columns: Tensor, wanted: Tensor, ridge: Sequence[float], sums: Sequence[Sequence[int]]) -> Tensor:
    """δ [unknowns] that minimises ‖Jᵀδ − wanted‖² + Σ_j ridge_j ‖J_j‖² δ_j², with zero sums over these sets of places.

    columns: J, [unknowns, elements].
    """
    count = len(columns)
    gram, right = (columns @ columns.T).cpu(), (columns @ wanted).cpu()  # on CUDA, lstsq wants full rank
    # in units of each column's own length: lstsq takes what is small beside the largest for nothing
    norm = gram.diag().sqrt()
    norm[norm == 0] = 1.0
    gram, right = gram / norm / norm[:, None], right / norm
    system = gram.new_zeros(count + len(sums), count + len(sums))
    system[:count, :count] = gram + torch.diag(torch.tensor(ridge, dtype=gram.dtype) * gram.diag())
    for row, places in enumerate(sums, count):
        system[row, places] = system[places, row] = norm[places].min() / norm[places]
    found = torch.linalg.lstsq(system, torch.cat([right, right.new_zeros(len(sums))])[:, None]).solution.flatten()
    if not bool(torch.isfinite(found).all()):
        raise UnfitError("the system that gives the weights has no solution")
    return found[:count] / norm
