"""What ERTACache (arXiv 2508.21091) calibrates on runs of a pipeline along the cached path.

Its rectification v̂ = ṽ − ε̂ takes the error of a reused output ṽ to be ε̄ + β(ṽ − v̄), in each step, with β by
ordinary least squares: so v̂ = scale·ṽ + bias, which a plan carries as its correction.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import ops
from ..context import Correction
from ..engine import Method, Observer
from ..engine.frame import Frame, Visit
from ..engine.observer import Again
from ..engine.patches import wrapped_step
from ..engine.structure import first_tensor
from ..errors import ConfigError
from ..forecasters import Reuse
from ..forecasters.fitted import Fit, Fitted
from ..models import Span
from ..ops import double
from ..plan import Plan
from ..policies import Guarded, Interval, Planned
from .generation import StepCall, Teacher, attached, plan_method
from .trajectory import Called, Fitting, Settings, UnfitError, aligned, guidance_weights

Array = NDArray[np.float64]

TARGETS = ("output", "teacher", "state")
FLAT = 1e-9  # a share of an output's mean square: what varies less is taken not to vary, and gets a bias alone


def reuse_errors(teacher: Teacher, plan: Plan) -> tuple[Array, Array, Array]:
    """What a plan's reused model outputs ṽ are off by, and how large and how different the true ones v are.

    v is computed where the cached run has come to. Norms are L1, over all samples and guidance branches.

    Returns: ‖ṽ_t − v_t‖ (0 at computed steps), ‖v_t‖ and ‖v_t − v_{t−1}‖ (0 at the first), each [T].
    """
    watching = _Watching(teacher.steps)
    batch = teacher.batch
    with attached(batch.pipe, plan_method(plan), watching):
        batch.call()
    return watching.errors, watching.sizes, watching.changes


class _Watching(Observer):
    def __init__(self, steps: int):
        self.errors, self.sizes, self.changes = np.zeros((3, steps))
        self._before: dict[tuple, Tensor] = {}  # by denoiser and pass

    def denoiser_called(self, frame: Frame, output: Any, again: Again) -> None:
        step = frame.step.index
        given = true = first_tensor(output).detach()
        if frame.reused:
            true = first_tensor(again(compute=True)).detach()
        before = self._before.get(frame.key, true)
        self._before[frame.key] = true.clone()
        self.errors[step] += _l1(given - true)
        self.sizes[step] += _l1(true)
        self.changes[step] += _l1(true - before)


def _l1(tensor: Tensor) -> float:
    return float(double(tensor).abs().sum())


def rectified(teacher: Teacher, plan: Plan, target: str = "teacher") -> Plan:
    """The plan with a correction of each span's reused output, fitted along one cached run of the teacher's batch.

    Step by step, on the path that the corrections so far lead to. target: what the corrected output shall be: "output",
    the span's own where the run has come to; "teacher", that of the uncached run at this step; "state", at scope
    denoiser, the model output that leads to the uncached run's next state. Each channel has a scale and a bias.

    What it comes to is in the plan's facts, as "rectified": the distance from the target at each step before and after,
    relative, of the (guided) model output for "state" and of the spans' outputs otherwise. Steps that the plan has no
    weights for, beside which corrections stand, are left as they are, and named there with those that cannot be fitted.

    Raises:
        ConfigError: for another target, "state" at another scope, a target of the uncached run for a plan that goes
            through other noise levels than it, a plan without weights, or spans whose channels differ.
    """
    if target not in TARGETS:
        raise ConfigError(f"the target of a rectification must be one of {', '.join(TARGETS)}, not {target!r}")
    if target == "state" and plan.scope != "denoiser":
        raise ConfigError(f"the next state tells what the denoiser gives, not a {plan.scope}: set target='output'")
    if plan.sigmas is not None and target != "output":
        raise ConfigError("the uncached run goes through other noise levels than this plan: take target 'output'")
    if bool(plan.weights.isnan().all()):
        raise ConfigError(
            f"plan {plan.name!r} has no weights, beside which corrections stand: give it some, as "
            "planning.static.static_plan does"
        )
    batch = teacher.batch
    known = _uncached_outputs(teacher, plan) if target == "teacher" else {}
    fitting = _Rectifying(teacher, plan, target, known)
    method = Method(Guarded(Planned(plan)), fitting.forecaster, plan.scope, plan.depth, "batch")
    with (
        attached(batch.pipe, method, fitting) as session,
        wrapped_step(batch.pipe.scheduler, fitting.stepping),
    ):
        fitting.begin(len(session.span_index))
        batch.call()
    return fitting.plan()


Outputs = dict[tuple[int, tuple[str, str], str], list[Tensor]]  # by step, denoiser and pass, span


def _uncached_outputs(teacher: Teacher, plan: Plan) -> Outputs:
    collecting = _Collecting(_reused_steps(plan))
    method = Method(Guarded(Interval(1)), Reuse(), plan.scope, plan.depth)
    with attached(teacher.batch.pipe, method, collecting):
        teacher.batch.call()
    return collecting.outputs


def _reused_steps(plan: Plan) -> frozenset[int]:
    """Steps at which any span is reused."""
    return frozenset((~plan.computed()).flatten(1).any(dim=1).nonzero().flatten().tolist())


class _Collecting(Observer):
    def __init__(self, steps: frozenset[int]) -> None:
        self.steps = steps
        self.outputs: Outputs = {}

    def span_computed(self, frame: Frame, span: Span, inputs: Any, leaves: Any, outputs: Sequence[Tensor]) -> None:
        if frame.step.index in self.steps:
            self.outputs[frame.step.index, frame.key, span.name] = [output.detach().clone() for output in outputs]


class _Rectifying(Fitting):
    """Goes along the cached path as trajectory matching does, with another fit at each reused step."""

    def __init__(self, teacher: Teacher, plan: Plan, target: str, known: Outputs):
        settings = Settings(plan.scope, plan.depth, plan.history, feature=plan.feature)  # type: ignore[arg-type]
        super().__init__(teacher, settings)
        self.given, self.target, self.known = plan, target, known
        self.steps = _reused_steps(plan)
        self.spans = 1

    def begin(self, spans: int) -> None:
        """Once it is known how many spans there are: the plan's weights, for each of them and each guidance branch."""
        self.spans = spans
        self.forecaster.fitted = replace(self.forecaster.fitted, groups=tuple(range(spans)))
        weights = Fitted.of(self.given)
        for step, span, branch in product(range(self.given.total), range(spans), range(self.teacher.branches)):
            keys = [(step, span if self.given.weights.shape[2] > 1 else 0, b) for b in (branch, -1)]
            found = next((weights.table[key] for key in keys if key in weights.table), None)
            if found is not None:
                self.forecaster.table[step, span, branch] = Fit(found.nodes, found.weights)

    def span_computed(self, frame: Frame, span: Span, inputs: Any, leaves: Any, outputs: Sequence[Tensor]) -> None:
        if self.target == "output" and frame.step.index in self.steps:
            self.known[frame.step.index, frame.key, span.name] = [output.detach() for output in outputs]

    def _fit(self, index: int, calls: Sequence[Called], given: StepCall, scheduler: Any) -> Tensor:
        keys = [self._key(call, visit, row) for call, visit in _reused(calls) for row in range(self.teacher.rows)]
        if not all((index, *key) in self.forecaster.table for key in keys):
            raise UnfitError("the plan has no weights at this step, beside which a correction stands")
        if any(len(call.branches) != self.teacher.rows for call in calls):
            raise UnfitError("guidance has other branches here than at other steps")
        count = self.teacher.batch.count
        guided = given.model_output[:count]
        before = double(guided)
        branches = [aligned(branch, before.shape) for call in calls for branch in call.branches]
        guidance = guidance_weights(branches, guided)
        found: dict[tuple[int, int], Correction] = {}  # by span and branch
        errors = []
        if self.target == "state":
            target = self._target(index, given, scheduler)
            scale, bias = self._affine([before], [target])
            # of the branches one by one, it is the same once guidance has combined them
            bias = tuple(value / sum(guidance) for value in bias)
            for call, visit in _reused(calls):
                scale, bias = _padded(scale, bias, ops.channels((visit.forecast or [])[0]))
                for branch in range(self.teacher.rows):
                    found[self._key(call, visit, branch)] = Correction(scale, bias)
        else:
            if self.target == "output":
                self.known.clear()  # of spans that were computed at such steps
                for call in calls:
                    if call.frame.reused:
                        call.again(compute=True)
            for call, visit in _reused(calls):
                true = self.known.pop((index, call.frame.key, visit.span.name))
                chunks = [[leaf.chunk(self.teacher.rows) for leaf in side] for side in (visit.forecast or [], true)]
                for branch in range(self.teacher.rows):
                    pair = [[leaf[branch] for leaf in side if leaf[branch].is_floating_point()] for side in chunks]
                    found[self._key(call, visit, branch)] = self._affine(*pair)
                    errors.append(_distances(pair[0], pair[1], found[self._key(call, visit, branch)]))
        self.forecaster.channels = _channels(found.values(), self.forecaster.channels)
        for (span, branch), correction in found.items():
            entry = self.forecaster.table[index, span, branch]
            self.forecaster.table[index, span, branch] = replace(entry, correction=correction)
        after = self._guided(before, branches, calls, guidance)
        if self.target == "state":
            size = float(target.norm().clamp_min(1e-30))
            errors = [(float((before - target).norm()) / size, float((after - target).norm()) / size)]
        self.errors[index] = (float(np.mean([a for a, _ in errors])), float(np.mean([b for _, b in errors])))
        whole = after.to(given.model_output)
        return whole.repeat(len(given.model_output) // count, *[1] * (whole.ndim - 1))

    def _key(self, call: Called, visit: Visit, branch: int) -> tuple[int, int]:
        return self.run.session.span_index[visit.span], call.frame.position * self.teacher.rows + branch

    def _affine(self, given: Sequence[Tensor], wanted: Sequence[Tensor]) -> Correction:
        """Scale and bias by least squares."""
        if len({ops.channels(leaf) for leaf in given}) > 1:
            raise ConfigError("the outputs of one span have different channels, which no one correction is of")
        x, y = (torch.cat([_by_channel(leaf) for leaf in side]) for side in (given, wanted))
        mean_x, mean_y = x.mean(dim=0), y.mean(dim=0)
        varied = (x - mean_x).square().mean(dim=0)
        together = ((x - mean_x) * (y - mean_y)).mean(dim=0)
        flat = varied <= FLAT * x.square().mean(dim=0)
        scale = torch.where(flat, 1.0, together / varied.where(~flat, 1.0))
        return Correction(tuple(scale.tolist()), tuple((mean_y - scale * mean_x).tolist()))

    def plan(self) -> Plan:
        """The plan with what was found."""
        total, plan = self.given.total, self.given
        shape = (total, self.teacher.branches, self.spans)
        correction = torch.full((*shape, 2, max(self.forecaster.channels, 1)), torch.nan, dtype=torch.float64)
        for (step, span, branch), entry in self.forecaster.table.items():
            if entry.correction is not None:
                correction[step, branch, span] = torch.tensor(entry.correction, dtype=torch.float64)
        found = {str(step): [round(error, 6) for error in errors] for step, errors in self.errors.items()}
        how = {"target": self.target, "samples": self.teacher.batch.count}
        left = {str(step): why for step, why in self.notes.items()}
        return replace(
            plan,
            nodes=plan.nodes.expand(-1, self.spans, -1).contiguous(),
            weights=plan.weights.expand(-1, *shape[1:], -1).contiguous(),
            correction=correction,
            row_passes=self.teacher.rows,
            facts={**plan.facts, "rectified": {**how, "errors": found, "left": left}},
            quality=None,
            speed=None,
        )


def _reused(calls: Sequence[Called]) -> list[tuple[Called, Visit]]:
    return [(call, visit) for call in calls for visit in call.frame.reused]


def _channels(corrections: Iterable[Correction], known: int) -> int:
    """What all are of; known: the channels of corrections at other steps, 0 for none yet.

    Raises:
        ConfigError: where they differ.
    """
    counts = sorted({len(correction.scale) for correction in corrections} | {known} - {0})
    if len(counts) > 1:
        raise ConfigError(
            f"the spans' outputs have {' and '.join(map(str, counts))} channels, which one plan cannot correct: "
            "rectify a plan at scope denoiser"
        )
    return counts[0]


def _by_channel(leaf: Tensor) -> Tensor:
    """[numbers, channels] in float64."""
    return double(leaf).movedim(ops.channel_axis(leaf), -1).flatten(0, -2)


def _padded(scale: tuple[float, ...], bias: tuple[float, ...], channels: int) -> Correction:
    """Channels of a learned variance, which the sampler is not given, stay as they are."""
    more = channels - len(scale)
    return Correction(scale + (1.0,) * more, bias + (0.0,) * more)


def _distances(given: Sequence[Tensor], wanted: Sequence[Tensor], correction: Correction) -> tuple[float, float]:
    """Relative ones, before and after."""
    x, y = (torch.cat([_by_channel(leaf) for leaf in side]) for side in (given, wanted))
    scale, bias = torch.tensor(correction, dtype=x.dtype, device=x.device)
    after = x * scale + bias
    size = float(y.norm().clamp_min(1e-30))
    return float((x - y).norm()) / size, float((after - y).norm()) / size
