"""Timestep adjustment of ERTACache (arXiv 2508.21091): reused steps go less far, the later ones further.

A reused step covers the share φ of the interval that it would have. The time it leaves over is spread over the steps
that remain, in proportion to their own intervals, so that the last one lands exactly where the sampler's does.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import ConfigError
from ..plan import Plan
from ..profile import Profile
from ..profiling.generation import Teacher
from ..profiling.rectify import reuse_errors

Array = NDArray[np.float64]

KINDS = ("A", "B")
LEAST = 0.01  # a step that went nowhere would be no step: noise levels have to fall


def shares(errors: ArrayLike, outputs: ArrayLike, changes: ArrayLike, kind: str) -> Array:
    """φ of each step, [T], from 0.01 to 1: 1 − ‖ṽ − v‖ / ‖v‖ (kind B), or over the change of v in the step before (A).

    errors: ‖ṽ_t − v_t‖ of the reused output. outputs: ‖v_t‖. changes: ‖v_t − v_{t−1}‖; all [T], in one norm.

    With a cache that is one step old, A's two norms are much the same and its steps all but vanish.

    Raises:
        ConfigError: for another kind.
    """
    if kind not in KINDS:
        raise ConfigError(f"the timestep adjustment must be one of {', '.join(KINDS)}, not {kind!r}")
    errors, sizes = np.asarray(errors, dtype=np.float64), np.asarray(changes if kind == "A" else outputs)
    relative = np.divide(errors, sizes, out=np.where(errors > 0, np.inf, 0.0), where=sizes > 0)
    return np.clip(1.0 - relative, LEAST, 1.0)


def profiled_shares(profile: Profile, computed: Sequence[bool], feature: str, kind: str) -> Array:
    """`shares` [T] as a profile has it: of the uncached run, in L2 norms, of all spans and passes together.

    computed: by step; the others reuse the last computed step's feature, "residual" or "output". Computed steps have 1.
    Where the spans are not the denoiser itself, their outputs stand for v.
    """
    output = total_gram(profile, "output")
    used = total_gram(profile, feature)
    steps = np.arange(profile.total)
    source = np.maximum.accumulate(np.where(computed, steps, 0))
    changes = np.append(0.0, distances(output)[steps[1:], steps[:-1]])
    found = shares(distances(used)[source, steps], np.sqrt(output.diagonal()), changes, kind)
    return np.where(computed, 1.0, found)


def calibrated(plan: Plan, teacher: Teacher, sigmas: ArrayLike, kind: str) -> Plan:
    """The plan with noise levels moved by `shares` of the teacher's batch, along the run that the plan caches.

    sigmas: the sampler's own, as for `adjusted`. Steps with any span computed go all the way.
    """
    phi = shares(*reuse_errors(teacher, replace(plan, sigmas=None)), kind)
    computed = plan.computed().flatten(1).any(dim=1).numpy()
    return replace(plan, sigmas=adjusted(sigmas, np.where(computed, 1.0, phi)))


def kept_if_better(plan: Plan, teacher: Teacher, sigmas: ArrayLike | None, score: Callable[[Plan], float]) -> Plan:
    """The plan with `calibrated` noise levels where they score higher than its own, else as it was.

    sigmas: the sampler's own, None if it has none. score: of a plan, higher is better. What was found is in the plan's
    facts, as "sigmas".
    """
    if sigmas is None:
        return replace(plan, facts={**plan.facts, "sigmas": "the sampler has none"})
    try:
        moved = calibrated(plan, teacher, sigmas, "B")
        before, after = score(plan), score(moved)
    except ConfigError as error:  # not this sampler
        return replace(plan, facts={**plan.facts, "sigmas": str(error)})
    best = moved if after > before else plan
    return replace(best, facts={**plan.facts, "sigmas": {"own": before, "moved": after}})


def adjusted(sigmas: ArrayLike, phi: ArrayLike) -> tuple[float, ...]:
    """The noise levels [T] with step t going φ_t of its interval.

    sigmas: the sampler's own, [T + 1], with the one that it ends at. phi: [T], 1 for computed steps; the last step's is
    not used, as it goes to the end.

    Raises:
        ConfigError: for other lengths, or φ that are not above 0 and at most 1.
    """
    own, phi = np.asarray(sigmas, dtype=np.float64), np.asarray(phi, dtype=np.float64)
    if own.ndim != 1 or len(own) != len(phi) + 1:
        raise ConfigError(f"for {len(phi)} steps {len(phi) + 1} noise levels are needed, with the last, not {len(own)}")
    if not ((phi > 0) & (phi <= 1)).all():
        raise ConfigError("a step must go more than nothing and at most all of its interval")
    moved = [float(own[0])]
    for t in range(len(phi) - 1):
        # of the time that is left, what this step's own interval is of those that are left
        share = (own[t] - own[t + 1]) / (own[t] - own[-1])
        moved.append(moved[-1] - (moved[-1] - own[-1]) * share * phi[t])
    return tuple(float(sigma) for sigma in moved)


def total_gram(profile: Profile, feature: str) -> Array:
    """Of all spans and passes together, [T, T], as if their features were one.

    Raises:
        ConfigError: where the residuals of a span were not measured.
    """
    lacking = [span.name for span in profile.spans if feature == "residual" != span.feature]
    if lacking:
        raise ConfigError(
            f"the profile has measured outputs and no residuals of {', '.join(lacking[:4])}: profile again with "
            "feature=residual (if input and output have one shape), or go by outputs"
        )
    return profile.arrays[f"gram_{feature}"].double().sum(dim=(0, 1)).numpy()


def distances(gram: Array) -> Array:
    """‖F_a − F_b‖, [T, T]."""
    energy = gram.diagonal()
    return np.sqrt(np.maximum(energy[:, None] + energy[None, :] - 2 * gram, 0.0))
