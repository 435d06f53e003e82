"""ERTACache on flux-digits: its ablation row by row, and its two timestep adjustments."""

from functools import lru_cache

from ...context import Feature
from ...forecasters import Reuse
from ...plan import Plan
from ...planning.timesteps import calibrated
from ...profiling.generation import teach
from ...systems.ertacache import ERTACache
from .bench import Bench, Ran
from .claims import Outcome, SeedSet, claim

MODEL, SAMPLES = "flux-digits", 8
EVERY, NFE = 2, 20  # of 40 steps
PAPER = "Wan2.1-1.3B, PSNR: uniform 13.76, + policy 22.09, + time 22.94, + rectification 23.77"


@lru_cache(maxsize=1)
def _rows(seeds: SeedSet) -> dict[str, Ran]:
    """The rows of the ablation with v − x reused, and two of them with v and with the hidden residual."""
    bench = Bench(MODEL, seeds, count=SAMPLES)
    profiles = {
        scope: bench.profile(scope, feature="residual", sensitivity_samples=0) for scope in ("denoiser", "stack")
    }
    teacher, levels = teach(bench.batch()), profiles["stack"].fingerprint.sigmas
    assert levels is not None

    def planned(scope: str, feature: Feature) -> Plan:
        return ERTACache(nfe=NFE, feature=feature).plan(profiles[scope])

    plan, output, hidden = planned("denoiser", "residual"), planned("denoiser", "output"), planned("stack", "residual")
    uniform = Reuse(feature="residual")
    return {
        "uniform": bench.run(policy="interval", every=EVERY, forecaster=uniform, scope="denoiser", granularity="batch"),
        "policy": bench.run(plan=plan),
        "time A": bench.run(plan=calibrated(plan, teacher, levels, "A")),
        "time B": bench.run(plan=calibrated(plan, teacher, levels, "B")),
        "v": bench.run(plan=output),
        "v, time B": bench.run(plan=calibrated(output, teacher, levels, "B")),
        "hidden": bench.run(plan=hidden),
        "hidden, time B": bench.run(plan=calibrated(hidden, teacher, levels, "B")),
    }


@claim(
    system="ertacache",
    claim="The schedule from replayed residuals beats a uniform one.",
    published=PAPER,
)
def policy_beats_uniform(seeds: SeedSet) -> Outcome:
    return _outcome(_rows(seeds), "policy", "uniform")


@claim(
    system="ertacache",
    claim="Adjusting the timesteps (φ-B, calibrated on runs) improves on the schedule alone.",
    published=PAPER,
)
def time_adjustment_helps(seeds: SeedSet) -> Outcome:
    return _outcome(_rows(seeds), "time B", "policy")


@claim(
    system="ertacache",
    claim="Of the two forms of the adjustment, φ-B beats φ-A, whose steps all but vanish with a cache one step old.",
)
def b_beats_a(seeds: SeedSet) -> Outcome:
    return _outcome(_rows(seeds), "time B", "time A")
