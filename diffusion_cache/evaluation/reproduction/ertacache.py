"""ERTACache on flux-digits: its ablation row by row, and its two timestep adjustments."""

from functools import lru_cache

from ...forecasters import Reuse
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
    """The rows of the ablation, what is reused being v − x."""
    bench = Bench(MODEL, seeds, count=SAMPLES)
    profile = bench.profile("denoiser", feature="residual", sensitivity_samples=0)
    plan = ERTACache(nfe=NFE, feature="residual").plan(profile)
    teacher, levels = teach(bench.batch()), profile.fingerprint.sigmas
    assert levels is not None
    moved = {kind: calibrated(plan, teacher, levels, kind) for kind in "AB"}
    uniform = Reuse(feature="residual")
    rows = {
        "uniform": bench.run(policy="interval", every=EVERY, forecaster=uniform, scope="denoiser", granularity="batch"),
        "policy": bench.run(plan=plan),
        "time A": bench.run(plan=moved["A"]),
        "time B": bench.run(plan=moved["B"]),
    }
    return rows


def _outcome(rows: dict[str, Ran], better: str, worse: str) -> Outcome:
    return Outcome(
        ours=f"{worse} {rows[worse].mean:.2f} dB, {better} {rows[better].mean:.2f} dB",
        equal_compute=", ".join(
            f"{name}: {rows[name].nfe:g} evaluations, {rows[name].work:.3f} of the FLOPs" for name in (worse, better)
        ),
        holds=rows[better].mean > rows[worse].mean,
        figures={name: row.mean for name, row in rows.items()},
    )


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
