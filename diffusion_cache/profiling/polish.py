"""Fitted weights, moved once more to where the final output is nearest to the uncached one.

Trajectory matching is greedy: each step's weights make up for what has happened, not for what is still to come. Here
all of them move at once. With d the difference of the samples from the uncached ones and J its derivatives by the
weights, taken by finite differences of whole cached generations, a step of Gauss–Newton solves

    min over δ of Σ_s ω_s² ‖d_s + J_s δ‖² + μ Σ_j ‖J_j‖² δ_j²,   Σ_j δ_j = 0 for each table entry

with ω_s = 1/‖d_s‖, so that each sample's error counts in decibels and not by its size. How far to go (μ, and half or
all of the way) is decided on samples that the derivatives were not taken from.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..forecasters.fitted import Fitted, Key
from ..ops import double

NUDGE = 1e-2  # for float32
DAMPINGS = (1e-3, 1e-2, 1e-1)
LENGTHS = (1.0, 0.5)
LEAST_SHARE = 1e-3  # of the median error: a sample that is less off weighs no more than one that is as much
TINY = 1e-12  # of an error, where half of the samples have none


def polish(
    forecaster: Fitted,
    generate: Callable[[Fitted, int | None], Tensor],
    reference: Tensor,
    judge: Callable[[Fitted], float],
    *,
    rounds: int = 1,
    nudge: float = NUDGE,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Fitted:
    """The weights after at most `rounds` steps, each kept only if it raises what `judge` says.

    generate: the samples of a cached generation with given weights, [n, ...], which up to a step are those of the last
    generation for which no step was given; reference: the same uncached. judge: a score on other samples, higher is
    better. nudge: what a weight is moved by for the derivatives; it has to show in the model's precision. A round takes
    one generation for each free weight (guidance branches share theirs) and six calls of judge.
    """
    reached = judge(forecaster)
    for _ in range(rounds):
        directions = list(_directions(forecaster))
        base = generate(forecaster, None)
        difference = double((base - reference).flatten(1))
        norm = difference.norm(dim=1, keepdim=True)
        weight = 1.0 / norm.clamp_min(max(LEAST_SHARE * float(norm.median()), TINY))
        rows = []
        for done, direction in enumerate(directions):
            progress(done, len(directions))
            keys, _ = direction
            first = keys[0][0]  # the step of all of them
            moved = generate(_moved(forecaster, [direction], [nudge]), first)
            rows.append((double((moved - base).flatten(1)) / nudge * weight).flatten())
        if not rows:
            return forecaster
        jacobian = torch.stack(rows)
        gram, right = jacobian @ jacobian.T, -jacobian @ (difference * weight).flatten()
        candidates = []
        for damping in DAMPINGS:
            step = torch.linalg.lstsq(gram + damping * torch.diag(gram.diag()), right[:, None]).solution.flatten()
            candidates += [_moved(forecaster, directions, (length * step).tolist()) for length in LENGTHS]
        judged = [(judge(candidate), place) for place, candidate in enumerate(candidates)]
        best, place = max(judged)
        if not best > reached:
            break
        reached, forecaster = best, candidates[place]
    return forecaster


Direction = tuple[tuple[Key, ...], int]  # entries that move together, and which of their weights, against the newest


def _directions(forecaster: Fitted) -> Iterator[Direction]:
    entries: dict[tuple[int, int, int], list[Key]] = {}
    for key, fit in sorted(forecaster.table.items()):
        for place in range(len(fit.nodes) - 1):
            entries.setdefault((key[0], key[1], place), []).append(key)
    for (_, _, place), keys in entries.items():
        yield tuple(keys), place


def _moved(forecaster: Fitted, directions: Sequence[Direction], by: Sequence[float]) -> Fitted:
    table = dict(forecaster.table)
    for (keys, place), amount in zip(directions, by, strict=True):
        for key in keys:
            weights = list(table[key].weights)
            weights[place] += amount
            weights[-1] -= amount
            table[key] = replace(table[key], weights=tuple(weights))
    return replace(forecaster, table=table)
