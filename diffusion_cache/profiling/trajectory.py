"""Trajectory matching: at each reused step, the weights that put the sampler back on the uncached path.

Go through a generation in order, on the cached path. At a reused step let M(w) be the guided model output with the
spans forecast by the weights w, and let the sampler be affine in it, x' = a + b·M. With M* = (x'* − a)/b, where x'*
is the state that the uncached run has next, and w₀ the Taylor-1 weights, solve

    min over δ of ‖M(w₀) + Jδ − M*‖² + λ Σ_j ‖J_j‖² δ_j²   subject to Σ_j δ_j = 0 for each guidance branch and group

with the derivatives J_j taken by finite differences (of reused calls, which are cheap), and go on with w₀ + δ. What
the sampler makes of a model output is asked of a copy of itself; how guidance combines its branches is found by
regression.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..context import Feature, Forecaster, Policy, Query
from ..engine import Method, Observer
from ..engine.frame import Frame
from ..engine.patches import wrapped_step
from ..engine.structure import flatten, forked_rng
from ..forecasters.fitted import Fit, Fitted, Key, taylor_weights
from ..policies import Guarded
from .generation import StepCall, Teacher, attached, state_of

NUDGES = {torch.float64: 1e-3, torch.float32: 1e-2}
LOW_PRECISION_NUDGE = 0.25
GUIDANCE_TOLERANCE = 1e-3  # what guidance may differ from a linear combination by, relative
LENGTHS = (1.0, 0.5, 0.25)  # of the step that is solved for, where the output is not as linear as it takes it to be
AFFINE_TOLERANCE = 1e-3  # what a sampler's step may differ from an affine map by, relative


@dataclass(frozen=True)
class Settings:
    """history: features kept. ridge: λ. groups: the span group of each span, or () for one; scope, depth: of the spans.

    feature: what is stored (see `Forecaster`).
    """

    scope: str | None = None
    depth: int | None = None
    history: int = 3
    ridge: float = 1e-3
    groups: tuple[int, ...] = ()
    feature: Feature = "auto"


@dataclass(frozen=True)
class Result:
    """What a fit has found.

    images: of the cached run it went along, [n, ...]. notes: by step, why it keeps Taylor. errors: by step, the
    distance from M* before and after, relative to ‖M*‖.
    """

    forecaster: Fitted
    images: Tensor
    notes: Mapping[int, str]
    errors: Mapping[int, tuple[float, float]]


class UnfitError(Exception):
    """A step that keeps its Taylor weights, with the reason."""


def fit(teacher: Teacher, policy: Policy, settings: Settings) -> Result:
    """Fit weights for a policy that knows its schedule beforehand, on the teacher's batch: one cached generation."""
    fitting = _Fitting(teacher, settings)
    method = Method(Guarded(policy), fitting.forecaster, settings.scope, settings.depth, "batch")
    batch = teacher.batch
    with attached(batch.pipe, method, fitting), wrapped_step(batch.pipe.scheduler, fitting.stepping):
        images = batch.images(batch.call()).detach().float()
    return Result(fitting.forecaster.fitted, images, fitting.notes, fitting.errors)


class _Growing(Forecaster):
    """Weights while they are being fitted: a table that grows, and one weight moved for a moment."""

    name = "fitting"

    def __init__(self, settings: Settings, branches: int):
        self.feature = settings.feature
        self.table: dict[Key, Fit] = {}
        self.fitted = Fitted(self.table, settings.history, settings.groups, branches, settings.feature)
        self._nudged: tuple[int, int, float] | None = None  # group, place of a node, by how much

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
        _, place, by = self._nudged
        return tuple(weight + by * (i == place) for i, weight in enumerate(weights))

    @contextmanager
    def nudged(self, group: int, place: int, by: float) -> Iterator[None]:
        self._nudged = group, place, by
        try:
            yield
        finally:
            self._nudged = None


class _Called(NamedTuple):
    """One call of the denoiser in the current step. branches: outputs of its guidance branches, [n, ...] each."""

    frame: Frame
    branches: list[Tensor]
    again: Callable[[], Any]


class _Fitting(Observer):
    def __init__(self, teacher: Teacher, settings: Settings):
        self.teacher, self.ridge = teacher, settings.ridge
        self.forecaster = _Growing(settings, teacher.rows)
        self.run: Any = None
        self.calls: list[_Called] = []
        self.notes: dict[int, str] = {}
        self.errors: dict[int, tuple[float, float]] = {}

    def run_began(self, run: Any) -> None:
        self.run = run

    def denoiser_called(self, frame: Frame, output: Any, again: Callable[[], Any]) -> None:
        self.calls.append(_Called(frame, self._branches(output), again))

    def _branches(self, output: Any) -> list[Tensor]:
        first = next(leaf for leaf in flatten(output)[0] if isinstance(leaf, Tensor))
        return list(first.detach().chunk(self.teacher.rows))

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

    def _fit(self, index: int, calls: Sequence[_Called], given: StepCall, scheduler: Any) -> Tensor:
        """The model output with the weights that are found, which are in the table then."""
        count = self.teacher.batch.count
        rows = len(given.model_output)
        before = given.model_output[:count].double()
        like = before.shape
        branches = [_aligned(branch, like) for call in calls for branch in call.branches]
        guidance = _guidance(branches, before)
        target = self._target(index, given, scheduler)
        unknowns, columns = self._derivatives(index, calls, guidance, like)
        starts = _starts(unknowns)
        if len(unknowns) == len(starts):
            raise UnfitError("with one feature in the history there is nothing to choose")
        delta = _solve(torch.stack(columns), (target - before).flatten(), unknowns, self.ridge).tolist()
        size = float(target.norm().clamp_min(1e-30))
        error = float((before - target).norm()) / size
        for length in LENGTHS:
            for (group, guided, nodes), start in starts.items():
                ahead = zip(taylor_weights(nodes, index), delta[start : start + len(nodes)], strict=True)
                weights = tuple(weight + length * change for weight, change in ahead)
                self.forecaster.table[index, group, guided] = Fit(nodes, weights)
            after = _combined(self._repeat(calls, like), guidance)
            reached = float((after - target).norm()) / size
            if reached < error:
                self.errors[index] = error, reached
                whole = after.to(given.model_output.dtype)
                return whole.repeat(rows // count, *[1] * (whole.ndim - 1))
        for key in [key for key in self.forecaster.table if key[0] == index]:
            del self.forecaster.table[key]
        raise UnfitError("the fitted weights are no better than Taylor's")

    def _repeat(self, calls: Sequence[_Called], like: torch.Size) -> list[Tensor]:
        """The guidance branches' outputs with the weights as they are now."""
        found = []
        for call in calls:
            branches = self._branches(call.again()) if call.frame.reused else call.branches
            found += [_aligned(branch, like) for branch in branches]
        return found

    def _derivatives(
        self, index: int, calls: Sequence[_Called], guidance: Sequence[float], like: torch.Size
    ) -> tuple[list[tuple[int, int, tuple[int, ...], int]], list[Tensor]]:
        """Unknowns (group, guidance branch, nodes, place of the node) and ∂M/∂w of each, flattened."""
        nodes: dict[tuple[int, int], tuple[int, ...]] = {}  # by group and place of the call
        for place, call in enumerate(calls):
            for visit in call.frame.reused:
                group = self.forecaster.fitted.group(self.run.session.span_index[visit.span])
                held = tuple(int(node) for node in visit.state.history.nodes)
                if nodes.setdefault((group, place), held) != held:
                    raise UnfitError("spans of one group hold features of different steps")
        base = [branch for call in calls for branch in call.branches]
        nudge = NUDGES.get(base[0].dtype, LOW_PRECISION_NUDGE)
        rows = self.teacher.rows
        unknowns, columns = [], []
        groups = sorted({group for group, _ in nodes})
        for group in groups:
            longest = max(len(held) for (owner, _), held in nodes.items() if owner == group)
            for node in range(longest):
                with self.forecaster.nudged(group, node, nudge):
                    moved = self._repeat(calls, like)
                for position, (branch, was, weight) in enumerate(zip(moved, base, guidance, strict=True)):
                    held = nodes.get((group, position // rows), ())
                    if node < len(held):
                        unknowns.append(
                            (group, calls[position // rows].frame.position * rows + position % rows, held, node)
                        )
                        columns.append((weight * (branch - _aligned(was, like)) / nudge).flatten())
        order = sorted(range(len(unknowns)), key=lambda i: (unknowns[i][0], unknowns[i][1], unknowns[i][3]))
        return [unknowns[i] for i in order], [columns[i] for i in order]

    def _target(self, index: int, given: StepCall, scheduler: Any) -> Tensor:
        """M*: the model output that leads to the uncached run's next state, [n, ...] in float64."""
        count = self.teacher.batch.count
        output, sample = given.model_output.double(), given.sample.double()
        scale = float(output.square().mean().sqrt())
        with self.run.clock.suppressed():
            # in its own dtype, for the noise that a sampler draws depends on it
            led = self._next(given, scheduler, given.model_output, given.sample)[:count]
            here, up, down = (
                self._next(given, scheduler, output + move * scale, sample)[:count] for move in (0.0, 1.0, -1.0)
            )
        change = up - down
        if not bool(torch.isfinite(change).all()) or not float(change.abs().max()) > 0:
            raise UnfitError("the sampler's next state does not depend on the model output, or is not finite")
        if float((up + down - 2 * here).norm()) > AFFINE_TOLERANCE * float(change.norm()):
            raise UnfitError("the sampler's step is not affine in the model output")
        slope = change / (2 * scale)
        if float(slope.abs().min()) < 1e-6 * float(slope.abs().max()):
            raise UnfitError("the sampler's next state hardly depends on the model output")
        wanted = self.teacher.states[index][:count].to(output.device).double()
        if wanted.shape != led.shape:
            raise UnfitError("the sampler gives states of another shape than in the uncached run")
        return output[:count] + (wanted - led) / slope

    @staticmethod
    def _next(given: StepCall, scheduler: Any, output: Tensor, sample: Tensor) -> Tensor:
        """What a copy of the sampler makes of a model output; random numbers then go on as if it had not been asked."""
        states = [(generator, generator.get_state()) for generator in given.generators]
        try:
            with forked_rng():
                return state_of(given.result(output, copy.deepcopy(scheduler), sample)).double()
        finally:
            for generator, state in states:
                generator.set_state(state)


def _aligned(branch: Tensor, like: torch.Size) -> Tensor:
    """A denoiser's output in the shape that the sampler is given, float64: less the channels of a learned variance."""
    if branch.shape != like and branch.ndim == len(like) and branch.shape[1] > like[1]:
        branch = branch[:, : like[1]]
    if branch.shape != like:
        raise UnfitError("the sampler is given something of another shape than the denoiser's output")
    return branch.double()


def _guidance(branches: Sequence[Tensor], combined: Tensor) -> list[float]:
    """The weights that guidance gives its branches, by least squares."""
    design = torch.stack([branch.flatten() for branch in branches], dim=1)
    found = torch.linalg.lstsq(design, combined.flatten()[:, None]).solution.flatten()
    missed = (design @ found - combined.flatten()).norm()
    if not float(missed) <= GUIDANCE_TOLERANCE * float(combined.norm()):
        raise UnfitError("guidance is no linear combination of the denoiser's outputs")
    return found.tolist()


def _combined(branches: Sequence[Tensor], guidance: Sequence[float]) -> Tensor:
    total = torch.zeros_like(branches[0])
    for branch, weight in zip(branches, guidance, strict=True):
        total.add_(branch, alpha=weight)
    return total


def _starts(unknowns: Sequence[tuple[int, int, tuple[int, ...], int]]) -> dict[tuple[int, int, tuple[int, ...]], int]:
    """Where the weights of each group and branch begin among the unknowns."""
    starts: dict[tuple[int, int, tuple[int, ...]], int] = {}
    for place, (group, branch, nodes, _) in enumerate(unknowns):
        starts.setdefault((group, branch, nodes), place)
    return starts


def _solve(
    columns: Tensor, wanted: Tensor, unknowns: Sequence[tuple[int, int, tuple[int, ...], int]], ridge: float
) -> Tensor:
    """δ by the system above, [unknowns]; columns: [unknowns, elements]."""
    count = len(columns)
    gram, right = (columns @ columns.T).cpu(), (columns @ wanted).cpu()  # on CUDA, lstsq wants full rank
    sums = list(dict.fromkeys((group, branch) for group, branch, _, _ in unknowns))
    system = torch.zeros(count + len(sums), count + len(sums), dtype=gram.dtype, device=gram.device)
    system[:count, :count] = gram + ridge * torch.diag(gram.diag())
    for row, owner in enumerate(sums):
        for column, (group, branch, _, _) in enumerate(unknowns):
            if (group, branch) == owner:
                system[count + row, column] = system[column, count + row] = gram.diag().mean()
    found = torch.linalg.lstsq(system, torch.cat([right, right.new_zeros(len(sums))])[:, None]).solution.flatten()
    if not bool(torch.isfinite(found).all()):
        raise UnfitError("the system that gives the weights has no solution")
    return found[:count]
