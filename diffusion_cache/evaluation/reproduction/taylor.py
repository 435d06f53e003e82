"""Taylor's order against the interval between computed steps, on flux-digits."""

from collections.abc import Sequence
from functools import lru_cache

from .bench import Bench, Ran
from .claims import Outcome, SeedSet, claim

MODEL, SAMPLES = "flux-digits", 8
SHORT, LONG = 2, 8  # intervals


@lru_cache(maxsize=1)
def bench(seeds: SeedSet) -> Bench:
    return Bench(MODEL, seeds, count=SAMPLES)


@lru_cache(maxsize=8)
def taylor(seeds: SeedSet, every: int, order: int) -> Ran:
    return bench(seeds).run(policy="interval", every=every, scope="stack", forecaster="taylor", order=order)


def orders(seeds: SeedSet, every: int, falling: Sequence[int]) -> Outcome:
    """Whether Taylor is the worse, the further an order stands behind."""
    runs = {order: taylor(seeds, every, order) for order in falling}
    means = [ran.mean for ran in runs.values()]
    return Outcome(
        ", ".join(f"order {order}: {ran.mean:.2f} dB" for order, ran in sorted(runs.items())),
        f"{runs[1].nfe:g} evaluations, {runs[1].work:.3f} of the uncached FLOPs",
        means == sorted(means, reverse=True),
        {f"order_{order}": ran.mean for order, ran in sorted(runs.items())} | {"work": runs[1].work},
    )


@claim(system="taylorseer", claim="Computing every second step, a higher order of Taylor is better: 2 than 1 than 0.")
def orders_help_at_short_intervals(seeds: SeedSet) -> Outcome:
    return orders(seeds, SHORT, (2, 1, 0))


@claim(system="taylorseer", claim="Computing every eighth step, a higher order of Taylor is worse: 3 than 2 than 1.")
def orders_hurt_at_long_intervals(seeds: SeedSet) -> Outcome:
    return orders(seeds, LONG, (1, 2, 3))
