"""The error of a linear forecast, read off the Gram matrix of a span's features; no run of the model.

Every forecaster here is a weighted sum of past features, so its squared error is a quadratic form in the inner
products that a profile holds (methods: "profile once, and every question becomes linear algebra"). Several passes, or
several spans forecast at the same steps, share their errors by adding their Gram matrices.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import ConfigError
from ..plain import Fields, integer, text, tuple_of
from ..profile import Profile
from ..profiling.moments import ran

Array = NDArray[np.float64]

# an array over (previous node, node, step) of so many steps takes half a gigabyte, and planning takes several
MOST_STEPS = 400
TINY = 1e-30


def own_grams(profile: Profile) -> Array:
    """Of each span's own feature: [S, P, T, T]."""
    both = {name: profile.arrays[f"gram_{name}"].double().numpy() for name in ("residual", "output")}
    return np.stack([both[span.feature][i] for i, span in enumerate(profile.spans)])


def mean_energy(grams: Array) -> Array:
    """Of grams [S, P, T, T], over the steps that each span and pass ran at: [S, P]."""
    return grams.diagonal(axis1=2, axis2=3).sum(axis=2) / np.maximum(ran(grams).sum(axis=2), 1)


def mean_damages(profile: Profile, order: int = 1) -> Array:
    """`damages` of forecasting a step with all spans and passes together, by the mean sensitivity.

    Each counts alike, scaled by its own mean energy, at pairs of steps (i, t) that it ran at. order: 0 or 1.

    Returns: [1, T, T] over (i, t) at order 0, else [T, T, T] as `taylor_errors`; infinite where what runs at t did not
    at i, so that there is nothing to go on.
    """
    grams = own_grams(profile)
    scaled, seen = grams / np.maximum(mean_energy(grams), TINY)[:, :, None, None], ran(grams)
    steps = profile.total
    errors, energy = np.zeros((steps if order else 1, steps, steps)), np.zeros((steps, steps))
    for pattern in np.unique(seen.reshape(-1, steps), axis=0):
        alike = (seen == pattern).all(axis=2)
        gram = np.where(alike[:, :, None, None], scaled, 0).mean(axis=(0, 1))
        errors += seen_errors(gram)[: len(errors)]
        energy += np.where(pattern[:, None], gram.diagonal(), 0)
    damage = damages(errors, mean_sensitivity(profile), energy)
    damage[:, unreachable(seen)] = np.inf
    return damage


def cosines(grams: Array) -> Array:
    """Between features at two steps, from their inner products [S, P, T, T]; 0 for those that are zero."""
    norm = np.sqrt(np.maximum(grams.diagonal(axis1=-2, axis2=-1), 0))
    return np.minimum(grams / np.maximum(norm[..., :, None] * norm[..., None, :], TINY), 1.0)


def mean_together(values: Array, grams: Array, nothing: float) -> Array:
    """Mean over spans and passes of values [S, P, T, T] at pairs of steps that each ran at, by its grams; `nothing`
    where none did: [T, T].
    """
    seen = ran(grams)
    both = seen[..., :, None] & seen[..., None, :]
    count = both.sum(axis=(0, 1))
    return np.where(count > 0, np.where(both, values, 0).sum(axis=(0, 1)) / np.maximum(count, 1), nothing)


def unreachable(seen: ArrayLike) -> NDArray[np.bool_]:
    """Pairs of steps i < t of which something ran at t, and none of that at i; seen: [..., T], see `ran`. [T, T]."""
    seen = np.asarray(seen).reshape(-1, np.shape(seen)[-1])
    both = (seen[:, :, None] & seen[:, None, :]).any(axis=0)
    return np.triu(seen.any(axis=0) & ~both, 1)


def mean_sensitivity(profile: Profile) -> Array:
    """Of all groups of spans: [T]; ones where it was not measured."""
    found = profile.arrays.get("sensitivity")
    return np.ones(profile.total) if found is None else found.double().mean(dim=0).numpy()


def forecast_error(gram: ArrayLike, nodes: ArrayLike, weights: ArrayLike, target: ArrayLike) -> Array:
    """‖Σ_j w_j F_j − F_t‖² = wᵀGw − 2wᵀg_t + G_tt, at least 0.

    gram: [T, T], inner products of one span's features. nodes: [..., K] steps whose features are weighted, −1 for a
    slot without one (its weight is not read). weights: [..., K]. target: [...] steps that are forecast.

    Returns: [...], in the unit of `gram`.

    Raises:
        ConfigError: where gram is not square, or a node or target is not one of its steps.
    """
    gram = _gram(gram)
    nodes, target = np.asarray(nodes), np.asarray(target)
    if nodes.size and not -1 <= nodes.min() <= nodes.max() < len(gram):
        raise ConfigError(f"nodes must be steps from 0 to {len(gram) - 1}, or −1 for none: {nodes.tolist()}")
    if target.size and not 0 <= target.min() <= target.max() < len(gram):
        raise ConfigError(f"the steps to forecast must be from 0 to {len(gram) - 1}: {target.tolist()}")
    weights = np.where(nodes < 0, 0.0, np.asarray(weights, dtype=np.float64))
    between = gram[nodes[..., :, None], nodes[..., None, :]]  # [..., K, K]
    across = gram[nodes, target[..., None]]  # [..., K]
    squares = np.einsum("...j,...jk,...k->...", weights, between, weights)
    return np.maximum(squares - 2 * (weights * across).sum(-1) + gram[target, target], 0.0)


def taylor_errors(gram: ArrayLike) -> Array:
    """Squared errors of forecasting step t with Taylor-1 through the features of steps h < i < t, on the step index.

    gram: [T, T], inner products of one span's features. Errors are differences of its entries: keep it in float64, as
    rounded to float32 it hides relative errors below some 1e-3.

    Returns: err[h + 1, i, t], [T, T, T] float64, at least 0; err[0, i, t] is that of plain reuse of step i (one node).
    Zero where not h < i < t.

    Raises:
        ConfigError: where gram is not square or not finite, or has more than MOST_STEPS steps.
    """
    gram = _gram(gram)
    steps = len(gram)
    if steps > MOST_STEPS:
        raise ConfigError(
            f"planning is limited to {MOST_STEPS} steps (memory), not {steps}: plan for fewer and resample"
        )
    energy = gram.diagonal()
    distance = np.maximum(energy[:, None] + energy[None, :] - 2 * gram, 0.0)  # ‖F_a − F_b‖²
    errors = np.zeros((steps, steps, steps))
    errors[0] = np.triu(distance, 1)
    for i in range(1, steps - 1):
        # with r = (t − i)/(i − h) the error is (F_i − F_t) + r(F_i − F_h); its square needs distances only
        ratio = np.arange(1, steps - i) / np.arange(i, 0, -1)[:, None]  # [h, t]
        square = (1 + ratio) * (distance[i, i + 1 :] + ratio * distance[:i, i, None]) - ratio * distance[:i, i + 1 :]
        np.maximum(square, 0.0, out=errors[1 : i + 1, i, i + 1 :])
    return errors


def seen_errors(gram: ArrayLike) -> Array:
    """`taylor_errors` of one pass, by the steps that it ran at (see `ran`).

    A step t or i that it did not run at counts for nothing; with such an h it has one node, and reuses it.
    """
    errors, seen = taylor_errors(gram), ran(gram)
    for h in np.flatnonzero(~seen[:-1]):
        errors[h + 1, h + 1 :] = errors[0, h + 1 :]
    errors[:, ~(seen[:, None] & seen)] = 0
    return errors


def _sensitivity_groups(profile: Profile) -> tuple[list[tuple[str, tuple[int, ...]]], tuple[str, ...]]:
    """Names and spans of the groups that sensitivity was measured of, and those that it could not be measured of."""
    every = tuple(range(len(profile.spans)))

    def group(value: Any, where: str) -> tuple[str, tuple[int, ...]]:
        fields = Fields(value, where)
        name, spans = fields("name", text), fields("spans", lambda given, at: given and tuple_of(integer)(given, at))
        if not set(spans or ()) <= set(every):
            raise ConfigError(f"{where}.spans: the profile has {len(every)} spans, numbered from 0")
        return name, tuple(spans or every)

    facts = Fields(profile.facts.get("sensitivity"), "profile: facts.sensitivity")
    groups, unmeasured = facts("groups", tuple_of(group)), facts("unmeasured", tuple_of(text))
    if len(groups) != len(profile.arrays["sensitivity"]):
        raise ConfigError(
            f"profile: facts.sensitivity names {len(groups)} groups, and {len(profile.arrays['sensitivity'])} are "
            "measured: profile the model anew"
        )
    return list(groups), unmeasured


def cell_errors(profile: Profile, order: int = 0) -> Iterator[Array]:
    """Of each span, the relative final error of forecasting step t at order 0 (reuse of step i) or 1 (Taylor-1).

    Squared relative errors of a group's spans add up to the group's, each scaled by its own mean energy, as where its
    sensitivity was measured; a pass counts where it ran at i and t. A group that could not be reused anywhere is never
    reused, nor is a step t of a span that did not run at i.

    Yields: [1, T, T] over (i, t) at order 0, else [T, T, T] over (h + 1, i, t) as `taylor_errors`.

    Raises:
        ConfigError: where the profile has no sensitivity, or is of several denoisers.
    """
    if "sensitivity" not in profile.arrays:
        raise ConfigError("this profile has no sensitivity: measure it with sensitivity_samples above 0")
    if len({span.denoiser for span in profile.spans}) > 1:
        raise ConfigError("spans of several denoisers cannot be told apart by their sensitivity: plan whole steps")
    grams = own_grams(profile)
    energy, seen = grams.diagonal(axis1=2, axis2=3), ran(grams)
    scale = mean_energy(grams)[..., None]
    weights = np.where(scale > 0, 1 / np.where(scale > 0, scale, 1), 0)
    sensitivity = profile.arrays["sensitivity"].double().numpy()
    groups, unmeasured = _sensitivity_groups(profile)
    owner = {place: g for g, (_, places) in enumerate(groups) for place in places}
    totals = np.zeros((len(groups), profile.total, profile.total))
    for place, g in owner.items():
        both = seen[place][:, :, None] & seen[place][:, None]
        totals[g] += np.where(both, (energy[place] * weights[place])[:, None], 0).sum(axis=0)
    rows = slice(None) if order else slice(1)
    for place, g in sorted(owner.items()):
        found = np.zeros((profile.total if order else 1, profile.total, profile.total))
        if groups[g][0] in unmeasured:
            yield found + np.inf
            continue
        for gram, weight in zip(grams[place], weights[place], strict=True):
            found += seen_errors(gram)[rows] * weight
        found = sensitivity[g] * np.sqrt(found / np.maximum(totals[g], np.finfo(float).tiny))
        found[:, unreachable(seen[place])] = np.inf
        yield found


def least_squares(
    gram: ArrayLike, nodes: Sequence[int], target: int, *, ridge: float = 1e-3, affine: bool = False
) -> Array:
    """The weights on the nodes' features with the smallest squared error at `target`, plus a ridge.

    gram: [T, T], inner products of one span's features. nodes: steps whose features are weighted, oldest first, −1
    for a slot without one (gets weight 0). ridge: in units of the mean diagonal of the system. affine: the weights sum
    to one, so that a constant feature is kept; the ridge then draws towards reuse of the newest node rather than to 0.

    Returns: [len(nodes)].

    Raises:
        ConfigError: where gram is not square, there is no node, or a step is not one of gram's.
    """
    gram = _gram(gram)
    slots = [slot for slot, node in enumerate(nodes) if node >= 0]
    used = [nodes[slot] for slot in slots]
    if not used:
        raise ConfigError("least squares needs at least one node")
    if not 0 <= target < len(gram) or max(used) >= len(gram):
        raise ConfigError(f"steps must be from 0 to {len(gram) - 1}: nodes {list(nodes)}, target {target}")
    if ridge < 0:
        raise ConfigError(f"ridge must be at least 0, not {ridge}")
    system, right = gram[np.ix_(used, used)], gram[used, target]
    if affine:
        # unknowns: the weights of F_j − F_newest, which forecast F_target − F_newest
        newest, corner = system[-1], system[-1, -1]
        right = right[:-1] - newest[:-1] - right[-1] + corner
        system = system[:-1, :-1] - newest[:-1] - newest[:-1, None] + corner
    solution = np.zeros(len(right))
    if len(right):
        system = system + ridge * system.trace() / len(system) * np.eye(len(system))
        solution = np.linalg.lstsq(system, right, rcond=None)[0]
    if affine:
        solution = np.append(solution, 1.0 - solution.sum())
    weights = np.zeros(len(nodes))
    weights[slots] = solution
    return weights


def damages(err: ArrayLike, sensitivity: ArrayLike, energy: ArrayLike, exponent: float = 1.0) -> Array:
    """What each forecast does to the final output: (sensitivity_t · sqrt(err / energy_t))^exponent.

    err: [..., T], squared errors of forecasting step t. sensitivity: [T], final error per unit of relative error.
    energy: the feature's squared norm, in err's unit (the Gram matrix's diagonal), [T], or [..., T] where it depends on
    more than t.

    Returns: [..., T]. Where a feature is zero its relative error is 0 if it is forecast exactly, else infinite (that
    step is never reused).

    Raises:
        ConfigError: for lengths that disagree, and negative or non-finite sensitivities or energies.
    """
    err = np.asarray(err, dtype=np.float64)
    per_step = []
    for name, values in (("sensitivity", sensitivity), ("energy", energy)):
        values = np.asarray(values, dtype=np.float64)
        axes = values.ndim if name == "energy" else 1
        if not axes or values.shape != err.shape[-axes:]:
            raise ConfigError(f"{name} needs one value for each of {err.shape[-1]} steps, not shape {values.shape}")
        if not (np.isfinite(values) & (values >= 0)).all():
            raise ConfigError(f"{name} must be finite and at least 0 at every step")
        per_step.append(values)
    sensitivity, energy = per_step
    zero = energy == 0
    damage = np.sqrt(err / np.where(zero, 1.0, energy))
    damage *= sensitivity
    if exponent != 1:
        damage **= exponent
    damage[..., zero] = np.where(err[..., zero] > 0, np.inf, 0.0)
    return damage


def edge_damages(damage: Array) -> Array:
    """What a gap does that begins after step i and has been reused up to step t: the damages so far, [h + 1, i, t]."""
    return np.cumsum(np.triu(damage, 1), axis=-1)  # what does not lie ahead is no part of a gap


def edge_powers(damage: Array, gamma: float) -> Array:
    """What each step of a gap adds to the power of the gap's damage: summed up, they are the sum of powers of gaps."""
    with np.errstate(invalid="ignore"):
        added = np.diff(edge_damages(damage) ** gamma, axis=-1, prepend=0.0)
    added[np.isnan(added)] = np.inf  # beyond a step that must not be reused
    return np.maximum(added, 0.0)


def _gram(gram: ArrayLike) -> Array:
    gram = np.asarray(gram, dtype=np.float64)
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1] or not gram.size:
        raise ConfigError(f"a Gram matrix must be [steps, steps], not {list(gram.shape)}")
    if not np.isfinite(gram).all():
        raise ConfigError("the Gram matrix holds values that are not finite: profile again")
    return gram
