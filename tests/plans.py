"""A shipped model's profile and planner, of few steps and samples, for the tests of planning and of enabling."""

from dataclasses import replace
from functools import cache
from unittest.mock import patch

from diffusion_cache import reference
from diffusion_cache.evaluation.prompts import FITTING_SEEDS
from diffusion_cache.planning import build
from diffusion_cache.planning.build import Planner, Search
from diffusion_cache.profiling.generation import Batch, teach
from diffusion_cache.profiling.measure import Options, measure

STEPS = 8
SEARCH = Search(runs=6, regressors=False, polished=0)


def quickly_timed():
    """While it is entered, the speed of plans is that of one pair of runs."""
    return patch.object(build, "TIMED_PAIRS", 1)


def batch(pipe, name, samples, steps=STEPS):
    """samples: of each a class label, as text or not, and a seed."""
    labels, seeds = [int(label) for label, _ in samples], [seed for _, seed in samples]

    def call():
        return pipe(**reference.inputs(name, labels, seeds, steps))

    return Batch(pipe, call, lambda output: reference.images(name, output), len(samples))


def drawn(first, count):
    return [(str(i % 10), FITTING_SEEDS + first + i) for i in range(count)]


@cache
def profile(name, sampler=None, scope=None, steps=STEPS, feature="auto"):
    """Of two samples, without sensitivities; made once in a test run."""
    pipe = reference.load(name, sampler)
    options = Options(scope=scope, sensitivity_samples=0, batch=2, feature=feature)
    return measure(lambda samples: batch(pipe, name, samples, steps), drawn(0, 2), options)


def planner(name, pipe, found, search=SEARCH, held_out=4, steps=STEPS, **fields):
    """The held-out samples come in two calls."""
    kept = drawn(300, held_out)
    half = held_out // 2
    return Planner(
        found,
        teach(batch(pipe, name, drawn(100, 2), steps)),
        teach(batch(pipe, name, drawn(200, 2), steps)),
        [teach(batch(pipe, name, part, steps)) for part in (kept[:half], kept[half:])],
        [seed for _, seed in kept],
        search,
        **fields,
    )


@cache
def _planner(name, sampler, scope):
    return planner(name, reference.load(name, sampler), profile(name, sampler, scope))


@cache
def _plan(name, sampler, scope, count):
    """By itself: no search starts from the steps of another plan, whichever was made before."""
    with quickly_timed():
        return replace(_planner(name, sampler, scope)).plan(count)


def planned(name, sampler=None, scope=None, computed=(4, 3)):
    """The profile with a plan for each number of computed steps; each made once in a test run."""
    return profile(name, sampler, scope).with_plans([_plan(name, sampler, scope, count) for count in computed])
