"""Forecasters against Taylor, and the growing window against even steps, on flux-digits: planned runs of equal work."""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

from .bench import Bench, Ran
from .claims import Outcome, SeedSet, claim
from .schedules import compared

FLOW, DIFFUSION, SAMPLES = "flux-digits", "dit-digits", 4
MIDDLE, LONG = (3, 5), 8  # intervals
GROWTHS = (0.75, 3.0)  # Spectrum's
WARMUP = 5
MILD = 1.3  # exponent of a spacing

DAMPED = (
    "With σ = 0.5 the slope is half of what was seen, 2σ²; with σ = 1/√2, which leaves it whole, the "
    "polynomials are level with powers (within 0.5 dB, `undamped` in the figures)."
)
EARLY = "Its computed steps lie early; as many that are mildly crowded there lose as well (`crowded` in the figures)."

Options = tuple[tuple[str, Any], ...]


@lru_cache(maxsize=2)
def bench(model: str, seeds: SeedSet) -> Bench:
    return Bench(model, seeds, count=SAMPLES)


@lru_cache(maxsize=32)
def forecast(seeds: SeedSet, every: int, forecaster: str, options: Options, scope: str = "stack") -> Ran:
    """Every n-th step computed, and the others forecast."""
    where = {"policy": "interval", "every": every, "scope": scope}
    return bench(FLOW, seeds).run(**where, forecaster=forecaster, **dict(options))


def line(seeds: SeedSet, every: int) -> Ran:
    return forecast(seeds, every, "taylor", (("order", 1),))


def hermite(seeds: SeedSet, intervals: Sequence[int]) -> Outcome:
    """Against the same recursion's powers; in the figures also with σ = 1/√2, which leaves the slope as it is."""
    order = ("order", 2)
    whole = {every: forecast(seeds, every, "hermite", (order, ("sigma", 0.5**0.5))) for every in intervals}
    outcome = compared(
        ("hermite", [forecast(seeds, every, "hermite", (order,)) for every in intervals]),
        ("taylor", [forecast(seeds, every, "taylor_paper", (order,)) for every in intervals]),
    )
    undamped = {f"undamped_{ran.nfe:g}": ran.mean for ran in whole.values()}
    return replace(outcome, figures={**outcome.figures, **undamped})


@claim(
    system="hicache",
    claim="Scaled Hermite polynomials forecast better than the powers of TaylorSeer's recursion, both of order 2.",
    reason=DAMPED,
)
def hermite_beats_powers(seeds: SeedSet) -> Outcome:
    return hermite(seeds, MIDDLE)


@claim(
    system="hicache",
    claim="Computing every eighth step, scaled Hermite polynomials of order 2 forecast better than powers.",
    reason=DAMPED,
)
def hermite_beats_powers_at_long_intervals(seeds: SeedSet) -> Outcome:
    return hermite(seeds, (LONG,))


@claim(
    system="spectrum",
    claim="A ridge regression on Chebyshev polynomials, blended with a line, beats the line.",
    reason="The ridge shrinks even what is constant; on the features less the last one (another claim here) half "
    "of the gap or less is gone. What the rest is was not found.",
)
def chebyshev_beats_the_line(seeds: SeedSet) -> Outcome:
    return compared(
        ("chebyshev", [forecast(seeds, every, "chebyshev", ()) for every in MIDDLE]),
        ("taylor", [line(seeds, every) for every in MIDDLE]),
    )


@claim(
    system="spectrum",
    claim="On the features less the last one, the Chebyshev regression beats the line.",
    reason="The ridge then shrinks the slope, half of which the blend takes from it. Other settings were not tried.",
)
def anchored_chebyshev_beats_the_line(seeds: SeedSet) -> Outcome:
    anchored = (("anchored", True),)
    return compared(
        ("chebyshev", [forecast(seeds, every, "chebyshev", anchored) for every in MIDDLE]),
        ("taylor", [line(seeds, every) for every in MIDDLE]),
    )


@claim(
    system="sampler",
    claim="Adams–Bashforth weights of order 2 on the sampler's noise levels beat Taylor-1, which has as many features.",
    reason="They aim at the exact path of the differential equation, and the uncached run, which takes Euler's "
    "steps, is not on it.",
)
def adams_bashforth_beats_taylor(seeds: SeedSet) -> Outcome:
    return compared(
        ("sampler", [forecast(seeds, every, "sampler", (("order", 2),)) for every in MIDDLE]),
        ("taylor", [line(seeds, every) for every in MIDDLE]),
    )


@claim(system="meancache", claim="The average velocity beats the last computed velocity.")
def average_velocity_beats_the_last(seeds: SeedSet) -> Outcome:
    return compared(
        ("average", [forecast(seeds, every, "average_velocity", (), "denoiser") for every in MIDDLE]),
        ("last", [forecast(seeds, every, "reuse", (("feature", "output"),), "denoiser") for every in MIDDLE]),
    )


@claim(
    system="meancache",
    claim="The average velocity beats Taylor-1 on velocities.",
    reason="Where velocities lie on a line, it goes on with half of their slope or less: its mean over the last lag is "
    "half-way to the last of them.",
)
def average_velocity_beats_taylor(seeds: SeedSet) -> Outcome:
    velocities = (("order", 1), ("feature", "output"))
    return compared(
        ("average", [forecast(seeds, every, "average_velocity", (), "denoiser") for every in MIDDLE]),
        ("taylor", [forecast(seeds, every, "taylor", velocities, "denoiser") for every in MIDDLE]),
    )


def growing(model: str, seeds: SeedSet) -> Outcome:
    """Growing windows against as many even steps, with Taylor-1; in the figures also steps mildly crowded early."""
    made, common = bench(model, seeds), {"forecaster": "taylor", "scope": "stack"}
    windows = [made.run(policy="growing_window", growth=growth, warmup=WARMUP, **common) for growth in GROWTHS]
    even, crowded = (
        [
            made.run(policy="spaced", share=round(ran.nfe) / made.subject.steps, exponent=exponent, **common)
            for ran in windows
        ]
        for exponent in (1.0, MILD)
    )
    outcome = compared(("growing", windows), ("even", even))
    return replace(outcome, figures={**outcome.figures, **{f"crowded_{ran.nfe:g}": ran.mean for ran in crowded}})


@claim(system="spectrum", claim="On a flow model, windows that grow beat as many evenly spaced steps.", reason=EARLY)
def growing_window_beats_even_on_a_flow(seeds: SeedSet) -> Outcome:
    return growing(FLOW, seeds)


@claim(system="spectrum", claim="With DDIM, windows that grow beat as many evenly spaced steps.", reason=EARLY)
def growing_window_beats_even_with_ddim(seeds: SeedSet) -> Outcome:
    return growing(DIFFUSION, seeds)
