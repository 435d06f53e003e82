"""Errors of linear forecasts from the Gram matrix: against the features themselves."""

import grams
import numpy as np
import pytest

from diffusion_cache.context import Query
from diffusion_cache.errors import ConfigError
from diffusion_cache.forecasters import Taylor
from diffusion_cache.planning.surrogate import (
    MOST_STEPS,
    cell_errors,
    damages,
    forecast_error,
    least_squares,
    mean_damages,
    seen_errors,
    taylor_errors,
    unreachable,
)

STEPS, SIZE = 9, 30


@pytest.fixture
def features():
    return np.cumsum(np.random.default_rng(0).normal(size=(STEPS, SIZE)), axis=0)


def square(x):
    return float(x @ x)


def test_forecast_error_is_the_squared_distance(features):
    rng = np.random.default_rng(1)
    nodes = np.array([[0, 2, 4], [-1, 1, 3], [5, 5, 0]])
    weights = rng.normal(size=(3, 3))
    weights[1, 0] = np.nan  # an empty slot's weight is not read
    target = np.array([5, 4, 8])
    expected = [
        square(sum(w * features[n] for n, w in zip(row, ws, strict=True) if n >= 0) - features[t])
        for row, ws, t in zip(nodes, weights, target, strict=True)
    ]
    gram = features @ features.T
    assert forecast_error(gram, nodes, weights, target) == pytest.approx(expected)
    assert forecast_error(gram, nodes[0], weights[0], 5) == pytest.approx(expected[0])
    assert forecast_error(gram, [5], [1.0], 5) == 0.0
    assert forecast_error(gram, [-1], [1.0], 5) == pytest.approx(square(features[5]))


def test_forecast_error_adds_over_passes(features):
    other = features[::-1]
    arguments = ([1, 3], [-0.5, 1.5], 4)
    grams = features @ features.T, other @ other.T
    both = forecast_error(sum(grams), *arguments)
    assert both == pytest.approx(sum(forecast_error(gram, *arguments) for gram in grams))


@pytest.mark.parametrize(
    ("nodes", "target", "message"), [([0, 9], 5, "nodes"), ([-2, 1], 5, "nodes"), ([0, 1], 9, "forecast")]
)
def test_forecast_error_of_steps_that_are_not_there(features, nodes, target, message):
    with pytest.raises(ConfigError, match=message):
        forecast_error(features @ features.T, nodes, [1.0, 1.0], target)


def test_taylor_errors_are_those_of_the_forecaster(features):
    errors = taylor_errors(features @ features.T)
    assert errors.shape == (STEPS, STEPS, STEPS)
    forecaster = Taylor(order=1)
    for t in range(STEPS):
        for i in range(STEPS):
            for h in range(-1, STEPS - 1):
                expected = 0.0
                if h < i < t:
                    nodes = [node for node in (h, i) if node >= 0]
                    weights = forecaster.weights(Query(tuple(map(float, nodes)), float(t), STEPS))
                    expected = square(np.asarray(weights) @ features[nodes] - features[t])
                assert errors[h + 1, i, t] == pytest.approx(expected, abs=1e-9)


def test_taylor_errors_of_straight_features_are_zero_and_never_negative():
    line = np.outer(np.arange(STEPS), np.full(SIZE, 0.1)) + 7.3
    errors = taylor_errors(line @ line.T)
    assert errors.min() == 0.0
    assert errors[1:].max() < 1e-9
    assert errors[0, 0, 5] == pytest.approx(SIZE * 0.5**2)


def test_least_squares_without_ridge_is_the_regression(features):
    gram = features @ features.T
    nodes = [1, 2, 4]
    expected = np.linalg.lstsq(features[nodes].T, features[6], rcond=None)[0]
    assert least_squares(gram, nodes, 6, ridge=0) == pytest.approx(expected)
    best = forecast_error(gram, nodes, expected, 6)
    assert best < forecast_error(gram, [2, 4], [-1, 2], 6)

    affine = least_squares(gram, nodes, 6, ridge=0, affine=True)
    assert affine.sum() == pytest.approx(1.0)
    for step in np.random.default_rng(2).normal(size=(20, 3)) * 0.1:
        moved = affine + step - step.mean()
        assert forecast_error(gram, nodes, moved, 6) > forecast_error(gram, nodes, affine, 6) >= best


@pytest.mark.parametrize("affine", [False, True])
def test_ridge_is_the_stated_penalty(features, affine):
    nodes, target, ridge = [0, 3, 5], 7, 0.3
    weights = least_squares(features @ features.T, nodes, target, ridge=ridge, affine=affine)
    if affine:
        regressors, goal, free = features[nodes[:-1]] - features[5], features[target] - features[5], weights[:-1]
        assert weights.sum() == pytest.approx(1.0)
    else:
        regressors, goal, free = features[nodes], features[target], weights
    strength = ridge * np.mean([square(row) for row in regressors])
    stacked = np.vstack([regressors.T, np.sqrt(strength) * np.eye(len(free))])
    expected = np.linalg.lstsq(stacked, np.append(goal, np.zeros(len(free))), rcond=None)[0]
    assert free == pytest.approx(expected)


def test_a_strong_ridge_draws_affine_weights_to_plain_reuse(features):
    gram = features @ features.T
    assert least_squares(gram, [0, 3, 5], 7, ridge=1e9, affine=True) == pytest.approx([0, 0, 1], abs=1e-6)
    assert least_squares(gram, [0, 3, 5], 7, ridge=1e9) == pytest.approx([0, 0, 0], abs=1e-6)


def test_affine_weights_keep_a_constant_feature():
    constant = np.ones((STEPS, STEPS))
    assert least_squares(constant, [0, 1, 2], 5, ridge=0.1, affine=True).sum() == pytest.approx(1.0)
    assert least_squares(constant, [0, 1, 2], 5, ridge=0.1).sum() < 0.98


def test_empty_slots_get_no_weight(features):
    gram = features @ features.T
    weights = least_squares(gram, [-1, -1, 2, 4], 6)
    assert weights[:2].tolist() == [0, 0]
    assert weights[2:] == pytest.approx(least_squares(gram, [2, 4], 6))
    assert least_squares(gram, [-1, 4], 6, affine=True).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nodes": []}, "at least one node"),
        ({"nodes": [-1]}, "at least one node"),
        ({"nodes": [0, 9]}, "from 0 to 8"),
        ({"target": 9}, "from 0 to 8"),
        ({"ridge": -1.0}, "ridge"),
    ],
)
def test_least_squares_of_what_is_not_there(features, options, message):
    arguments = {"nodes": [0, 1], "target": 4, "ridge": 0.1, **options}
    with pytest.raises(ConfigError, match=message):
        least_squares(features @ features.T, **arguments)


@pytest.mark.parametrize("gram", [np.zeros((3, 4)), np.zeros(3), np.zeros((0, 0)), np.full((3, 3), np.nan)])
def test_what_is_no_gram_matrix(gram):
    with pytest.raises(ConfigError, match=r"Gram matrix"):
        taylor_errors(gram)


def test_too_many_steps_are_refused_before_memory_is_taken():
    with pytest.raises(ConfigError, match=f"limited to {MOST_STEPS} steps"):
        taylor_errors(np.eye(MOST_STEPS + 1))


def test_damage_is_sensitivity_times_relative_error():
    err = np.array([[0.0, 4.0, 9.0], [1.0, 0.0, 36.0]])
    sensitivity, energy = [1.0, 2.0, 0.5], [4.0, 16.0, 9.0]
    assert damages(err, sensitivity, energy).tolist() == [[0.0, 1.0, 0.5], [0.5, 0.0, 1.0]]
    assert damages(err, sensitivity, energy, exponent=2).tolist() == [[0.0, 1.0, 0.25], [0.25, 0.0, 1.0]]
    assert err[0].tolist() == [0.0, 4.0, 9.0]  # not written into


@pytest.mark.parametrize("exponent", [0.5, 1, 2])
def test_a_feature_that_is_zero_is_reused_only_if_exactly_forecast(exponent):
    damage = damages(np.array([[0.0, 0.0], [0.0, 2.0]]), [0.0, 0.0], [0.0, 0.0], exponent)
    assert damage.tolist() == [[0.0, 0.0], [0.0, np.inf]]


@pytest.mark.parametrize(
    ("sensitivity", "energy", "message"),
    [
        ([1.0], [1.0, 1.0], "sensitivity needs one value for each of 2 steps"),
        ([1.0, 1.0], [1.0], "energy needs"),
        ([1.0, np.nan], [1.0, 1.0], "sensitivity must be finite"),
        ([1.0, 1.0], [1.0, -1.0], "energy must be finite"),
    ],
)
def test_damages_of_unusable_measurements(sensitivity, energy, message):
    with pytest.raises(ConfigError, match=message):
        damages(np.zeros((2, 2)), sensitivity, energy)


# passes that do not run at every step


def test_errors_of_a_pass_are_of_the_steps_that_it_ran_at(features):
    features[[0, 1, 6]] = 0
    errors, whole = seen_errors(features @ features.T), taylor_errors(features @ features.T)
    for h, i, t in np.ndindex(STEPS, STEPS, STEPS):
        row = 0 if h - 1 in (0, 1, 6) and h - 1 < i else h  # from before it began there is no line
        assert errors[h, i, t] == (0 if {i, t} & {0, 1, 6} else whole[row, i, t])


@pytest.mark.parametrize("order", [0, 1])
def test_guidance_that_ends_does_not_make_the_other_branch_dearer(features, order):
    """Where only one pass runs, damages are that pass's; where both do, of both, each in its own unit."""
    both = np.stack([features, 100 * features[::-1]])
    both[1, 5:] = 0
    one, other = (grams.profile_of(path[None]) for path in (both[0], 100 * features[::-1][:5]))
    found = mean_damages(grams.profile_of(both[None]), order)
    alone = mean_damages(one, order)
    np.testing.assert_allclose(found[..., 5:], alone[..., 5:])
    rows = 5 if order else 1
    error = sum(taylor_errors(grams.mean_gram(profile))[:rows, :5, :5] for profile in (one, other))
    energy = sum(grams.mean_gram(profile).diagonal()[:5] for profile in (one, other))
    np.testing.assert_allclose(found[:rows, :5, :5], np.sqrt(error / energy))


def test_nothing_is_reused_from_before_a_denoiser_began(features):
    """Two denoisers take turns: the second one's first step has nothing to go on."""
    paths = np.stack([features, features])
    paths[0, 4:] = paths[1, :4] = 0
    found = mean_damages(grams.profile_of(paths))
    for i, t in np.ndindex(STEPS, STEPS):
        assert np.isinf(found[0, i, t]) == (i < 4 <= t)


@pytest.mark.parametrize("order", [0, 1])
def test_cells_are_of_the_passes_that_ran(features, order):
    facts = {"sensitivity": {"groups": [{"name": "all", "spans": None}], "unmeasured": []}}
    options = dict(sensitivity=np.ones((1, STEPS)), facts=facts)
    both = np.stack([features, features])
    both[1, 5:] = 0
    (ended,), (alone,) = (cell_errors(grams.profile_of(x[None], **options), order) for x in (both, features))
    np.testing.assert_allclose(ended, alone)


@pytest.mark.parametrize("order", [0, 1])
def test_cells_are_of_the_passes_that_ran_at_both_steps(features, order):
    """One that begins late counts for nothing in what is reused from before it began."""
    facts = {"sensitivity": {"groups": [{"name": "all", "spans": None}], "unmeasured": []}}
    options = dict(sensitivity=np.ones((1, STEPS)), facts=facts)
    both = np.stack([features, features])
    both[1, :5] = 0
    (late,), (alone,) = (cell_errors(grams.profile_of(x[None], **options), order) for x in (both, features))
    np.testing.assert_allclose(late[:5, :5, 5:], alone[:5, :5, 5:])


def test_steps_that_a_span_never_runs_at_can_be_reached():
    assert unreachable([[True, True, False]]).tolist() == [[False] * 3] * 3
    assert unreachable([[True, False, False], [False, True, True]])[0].tolist() == [False, True, True]
