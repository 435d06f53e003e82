"""How much the final output moves with an error at one step, measured: one step's reuse at a time, run for real.

At a step t, a group of spans reuses its features of step t − 1, everything else is computed. The relative change of
the final latents, over the relative error ‖F_t − F_{t−1}‖ / ‖F_t‖ that was put in, is the sensitivity of that cell.
"""

import json
import math
import random
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean, stdev
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..context import SCOPES, Feature, PassState, Policy, Step, Verdict, branch_kind
from ..engine import Method, Session
from ..errors import ConfigError
from ..forecasters import Reuse
from ..models import Layout
from ..ops import double
from ..policies import Guarded
from ..profile import SpanFacts
from ..schedule import Schedule
from .generation import Teacher, attached, last_state
from .moments import ran

PAIRS = 4  # of cells that are also reused together
LEAST = 1e-12  # of a sensitivity

Cells = tuple[tuple[int, int], ...]  # (group, step) of each reuse


class Group(NamedTuple):
    """Spans that are reused together, by their positions in a denoiser's layout; None for all."""

    name: str
    spans: tuple[int, ...] | None


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """values: [G, T] float32. sampled: [G, T] uint8, 1 where measured, else interpolated.

    additivity: squared final error of two reuses in one run over the sum of those of each alone, for a few pairs.
    unmeasured: groups that could not be reused anywhere; their values are 0.
    """

    groups: tuple[Group, ...]
    values: Tensor
    sampled: Tensor
    additivity: tuple[float, ...]
    unmeasured: tuple[str, ...]

    def facts(self) -> dict[str, Any]:
        """Plain JSON values: the groups, and whether squared errors of different steps add up (1: exactly)."""
        found: dict[str, Any] = {
            "groups": [{"name": group.name, "spans": group.spans and list(group.spans)} for group in self.groups],
            "unmeasured": list(self.unmeasured),
        }
        if self.additivity:
            spread = stdev(self.additivity) if len(self.additivity) > 1 else 0.0
            found["additivity"] = {"mean": fmean(self.additivity), "spread": spread, "pairs": len(self.additivity)}
        return found


def span_groups(spans: Sequence[SpanFacts]) -> tuple[Group, ...]:
    """Which spans are measured together.

    Blocks: the first, middle and last third of them. Branches: attention, cross-attention, feed-forward, by their
    names. All as one: at the other scopes, where there are at most four, and in denoisers that are built differently.
    """
    every = (Group("all", None),)
    denoisers = list(dict.fromkeys(span.denoiser for span in spans))
    lists = [[span for span in spans if span.denoiser == name] for name in denoisers]
    names = [span.name for span in lists[0]]
    if len(names) <= 4 or any([span.name for span in other] != names for other in lists):
        return every
    if spans[0].kind == "block":
        kinds = [("first", "middle", "last")[place * 3 // len(names)] + " third" for place in range(len(names))]
    elif spans[0].kind == "branch":
        kinds = [branch_kind(name, names) for name in names]
    else:
        return every
    found: dict[str, list[int]] = {}
    for place, kind in enumerate(kinds):
        found.setdefault(kind, []).append(place)
    return tuple(Group(kind, tuple(places)) for kind, places in found.items()) if len(found) > 1 else every


def reuse_errors(grams: Tensor, groups: Sequence[Group], spans: Sequence[SpanFacts]) -> Tensor:
    """The relative error of reusing step t − 1 at step t, for each group: [G, T] float64, 0 at step 0.

    grams: [S, P, T, T], inner products of each span's own feature. Spans and passes count alike: each is scaled by its
    mean energy over the steps that it ran at before squared errors, and energies, are added up of those that ran at
    both steps.
    """
    energy = grams.double().diagonal(dim1=2, dim2=3)  # [S, P, T]
    between = grams.double().diagonal(offset=1, dim1=2, dim2=3)
    square = torch.zeros_like(energy)
    square[..., 1:] = (energy[..., 1:] + energy[..., :-1] - 2 * between).clamp_min(0)
    seen = torch.from_numpy(ran(grams))
    scale = energy.sum(dim=2, keepdim=True) / seen.sum(dim=2, keepdim=True).clamp_min(1)
    both = seen.clone()
    both[..., 1:] &= seen[..., :-1]
    square, energy = (torch.where(both, x / torch.where(both, scale, 1), 0) for x in (square, energy))
    rows = []
    for group in groups:
        members = list(_members(group, spans))
        total = energy[members].sum(dim=(0, 1))
        error = square[members].sum(dim=(0, 1))
        rows.append(torch.where(total > 0, error / torch.where(total > 0, total, 1), 0).sqrt())
    return torch.stack(rows)


def _members(group: Group, spans: Sequence[SpanFacts]) -> Iterator[int]:
    """Indices of a group's spans among those of all denoisers."""
    places: dict[str, int] = {}
    for index, span in enumerate(spans):
        place = places[span.denoiser] = places.get(span.denoiser, -1) + 1
        if group.spans is None or place in group.spans:
            yield index


def sampled_steps(total: int, count: int) -> list[int]:
    """At most `count` of the steps that can be reused, evenly spaced, both ends among them."""
    return np.unique(np.linspace(1, total - 1, min(count, total - 1)).round().astype(int)).tolist()


def sensitivities(
    teachers: Sequence[Teacher],
    grams: Tensor,
    spans: Sequence[SpanFacts],
    *,
    scope: str | None,
    depth: int | None = None,
    feature: Feature = "auto",
    steps_sampled: int = 16,
    pairs: int = PAIRS,
    known: MutableMapping[str, float] | None = None,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Sensitivity:
    """Measure every group's sensitivity at some steps and interpolate the others.

    Takes one generation of the teachers' batches for each group and sampled step, and one for each pair. Between
    sampled steps that have an effect the logarithm is interpolated over the step index; step 0 is as step 1.

    teachers: of the same pipeline, sampler and number of steps as the Gram matrices [S, P, T, T], which are of each
    span's own feature; their squared errors, and norms, are added up. known: final errors that were measured before, by
    cell; new ones are added as they are found.

    Raises:
        ConfigError: for fewer than two steps, a span layout that is not the profile's, or a result that is not finite.
    """
    total = teachers[0].steps
    if total < 2 or grams.shape[-1] != total:
        raise ConfigError(f"sensitivity needs two steps or more, {grams.shape[-1]} as profiled; there are {total}")
    groups = span_groups(spans)
    errors = reuse_errors(grams, groups, spans)
    known = {} if known is None else known
    single: list[Cells] = [
        ((g, t),) for g in range(len(groups)) for t in sampled_steps(total, steps_sampled) if float(errors[g, t]) > 0
    ]
    of = len(single) + pairs
    with _reusing(teachers, groups, spans, scope, depth, feature) as run:

        def measured(cells: Cells) -> float:
            key = json.dumps(cells)
            if key not in known:
                known[key] = run(cells)
            return known[key]

        found = {}
        for done, cells in enumerate(single):
            progress(done, of)
            error = measured(cells)
            if not math.isnan(error):
                found[cells[0]] = error
        additivity = []
        for done, (one, other) in enumerate(_pairs(found, pairs)):
            progress(len(single) + done, of)
            apart = found[one] ** 2 + found[other] ** 2
            if apart > 0:
                additivity.append(measured((one, other)) ** 2 / apart)
    progress(of, of)
    values, sampled = torch.zeros(len(groups), total), torch.zeros(len(groups), total, dtype=torch.uint8)
    for g in range(len(groups)):
        steps = [t for group, t in found if group == g]
        if not steps:
            continue
        ratios = np.array([found[g, t] / float(errors[g, t]) for t in steps])
        moves = ratios > LEAST  # a step without effect says nothing of its neighbours
        values[g] = LEAST
        if moves.any():
            logarithms = np.interp(np.arange(total), np.array(steps)[moves], np.log(ratios[moves]))
            values[g] = torch.from_numpy(np.exp(logarithms))
        values[g, np.array(steps)[~moves]] = LEAST
        sampled[g, steps] = 1
    unmeasured = [group.name for g, group in enumerate(groups) if not sampled[g].any()]
    return Sensitivity(groups, values, sampled, tuple(additivity), tuple(unmeasured))


def _pairs(found: Mapping[tuple[int, int], float], count: int) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Pairs of cells of one group, not of neighbouring steps: each must reuse what it reused alone."""
    together = [(a, b) for a, b in combinations(sorted(found), 2) if a[0] == b[0] and b[1] - a[1] > 1]
    return random.Random(0).sample(together, min(count, len(together)))


@dataclass(frozen=True)
class _Injected(Policy):
    """A given schedule."""

    given: Schedule

    scopes = frozenset(SCOPES)

    def schedule(self, total: int) -> Schedule:
        return self.given

    def decide(self, step: Step, value: float | None, state: PassState) -> Verdict:
        raise ConfigError("sensitivity can be measured only where the number of steps is known beforehand")


@contextmanager
def _reusing(
    teachers: Sequence[Teacher],
    groups: Sequence[Group],
    spans: Sequence[SpanFacts],
    scope: str | None,
    depth: int | None,
    feature: Feature,
) -> Iterator[Callable[[Cells], float]]:
    """A function that gives the relative error of the final latents with some cells reused; NaN where none was."""
    pipe, total = teachers[0].batch.pipe, teachers[0].steps
    count = len([span for span in spans if span.denoiser == spans[0].denoiser])

    def method(cells: Cells) -> Method:
        rows: list[tuple[tuple[bool, ...], ...]] = []
        for step in range(total):
            reused = [groups[g].spans for g, t in cells if t == step]
            if len(groups) == 1:
                rows.append(((not reused,),))
            else:
                inside = {place for places in reused for place in places or range(count)}
                rows.append((tuple(place not in inside for place in range(count)),))
        return Method(Guarded(_Injected(Schedule(tuple(rows)))), Reuse(feature), scope, depth)

    with attached(pipe, method(())) as session:
        if len(groups) > 1:
            _check_layouts(session.layouts, spans)

        def error(cells: Cells) -> float:
            session.method = method(cells)
            errors, norms = [], []
            for teacher in teachers:
                with last_state(pipe.scheduler) as states:
                    teacher.batch.call()
                (state,) = states
                if not _reused(session, {step for _, step in cells}):
                    return math.nan
                wanted = double(teacher.states[-1].to(state.device))
                errors.append(float((double(state) - wanted).norm()))
                norms.append(float(wanted.norm()))
            found = math.hypot(*errors) / max(math.hypot(*norms), 1e-30)
            if not math.isfinite(found):
                at = ", ".join(str(step) for _, step in cells)
                raise ConfigError(f"reusing step {at} gives latents that are not finite: use bfloat16 or float32")
            return found

        yield error


def _check_layouts(layouts: Mapping[str, Layout], spans: Sequence[SpanFacts]) -> None:
    now = [(name, span.name) for name, layout in layouts.items() for span in layout.spans]
    if now != [(span.denoiser, span.name) for span in spans]:
        raise ConfigError("the pipeline's spans are not those of the profile: profile again")


def _reused(session: Session, steps: set[int]) -> bool:
    """Whether the last run reused something at each of the steps."""
    assert session.last_run is not None
    return steps <= {record.step for record in session.last_run.records if record.spans_reused}
