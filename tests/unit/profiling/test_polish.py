"""Gauss–Newton on all weights: solved where samples are linear in them, and kept only where a judge gains."""

import pytest
import torch

from diffusion_cache.forecasters.fitted import Fit, Fitted
from diffusion_cache.profiling.polish import polish

NODES = {2: (0, 1), 4: (0, 1, 3), 7: (1, 3, 6)}


def fitted(rows=1):
    table = {
        (step, 0, row): Fit(nodes, (*[0.0] * (len(nodes) - 1), 1.0))
        for step, nodes in NODES.items()
        for row in range(rows)
    }
    return Fitted(table, 3, branches=rows)


def free(forecaster):
    """The weights that are free, by step: all but the newest, which makes up for the others."""
    return torch.tensor([weight for _, fit in sorted(forecaster.table.items()) for weight in fit.weights[:-1]]).double()


class Linear:
    """Samples [4, 30] that are linear in the free weights, and equal the reference at some of these."""

    def __init__(self, count, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.slopes = torch.randn(4, 30, count, generator=generator, dtype=torch.float64)
        self.wanted = torch.randn(count, generator=generator, dtype=torch.float64)
        self.reference = self.slopes @ self.wanted
        self.asked = []

    def samples(self, forecaster):
        return self.slopes @ free(forecaster)

    def __call__(self, forecaster, step):
        self.asked.append(step)
        return self.samples(forecaster)

    def judged(self, forecaster):
        return -float((self.samples(forecaster) - self.reference).norm())


def test_linear_samples_are_matched():
    problem = Linear(5)
    found = polish(fitted(), problem, problem.reference, problem.judged, rounds=3)
    assert free(found) == pytest.approx(problem.wanted, abs=1e-6)
    for fit in found.table.values():
        assert sum(fit.weights) == pytest.approx(1.0, abs=1e-12)


def test_each_generation_is_told_where_it_begins_to_differ():
    problem = Linear(5)
    polish(fitted(), problem, problem.reference, problem.judged, rounds=1)
    assert problem.asked == [None, 2, 4, 4, 7, 7]


def test_guidance_branches_move_together():
    problem = Linear(10)
    told = []
    found = polish(fitted(rows=2), problem, problem.reference, problem.judged, progress=lambda *news: told.append(news))
    assert told == [(done, 5) for done in range(5)]
    for (step, group, _), fit in found.table.items():
        assert fit == found.table[step, group, 0]


def test_what_other_samples_do_not_gain_by_is_not_kept():
    problem, other = Linear(5), Linear(5, seed=1)
    before = fitted()
    assert polish(before, problem, problem.reference, lambda forecaster: -float(free(forecaster).norm())) is before
    found = polish(before, problem, problem.reference, other.judged, rounds=3)
    assert other.judged(found) >= other.judged(before)


def test_half_of_a_step_is_taken_where_that_is_better():
    problem = Linear(5)
    found = polish(
        fitted(), problem, problem.reference, lambda forecaster: -float((free(forecaster) - problem.wanted / 2).norm())
    )
    assert free(found) == pytest.approx(problem.wanted / 2, abs=0.01)


def test_samples_count_in_decibels():
    """One sample that cannot be matched does not keep the others from it."""
    problem = Linear(5)
    problem.reference[0] += 1e3 * torch.randn(30, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def others(forecaster):
        return -float((problem.samples(forecaster) - problem.reference)[1:].norm())

    found = polish(fitted(), problem, problem.reference, others, rounds=6)
    assert others(found) > 0.05 * others(fitted())


def test_a_sample_that_is_exact_does_not_keep_the_others_from_it():
    """Though the weights move it a little."""
    problem, before = Linear(5), fitted()
    problem.slopes[0] *= 1e-6
    problem.reference[0] = problem.samples(before)[0]

    def others(forecaster):
        return -float((problem.samples(forecaster) - problem.reference)[1:].norm())

    assert others(polish(before, problem, problem.reference, others, rounds=3)) > 0.05 * others(before)


def test_nothing_to_move():
    empty = Fitted({}, 3)
    problem = Linear(0)
    assert polish(empty, problem, problem.reference, problem.judged) is empty


class Rounded(Linear):
    """Samples of which the last bits are lost, as in bfloat16, about a value that is far from zero."""

    def samples(self, forecaster):
        return (super().samples(forecaster) + 30.0).bfloat16().double() - 30.0


def test_weights_are_moved_by_what_shows():
    problem = Rounded(5)
    scores = [
        problem.judged(polish(fitted(), problem, problem.reference, problem.judged, nudge=nudge))
        for nudge in (1e-2, 0.25)
    ]
    assert scores[1] > 0.5 * scores[0]
