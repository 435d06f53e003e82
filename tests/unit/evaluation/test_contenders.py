import pytest

from diffusion_cache.errors import ConfigError
from diffusion_cache.evaluation.contenders import (
    Adaptive,
    FewerSteps,
    Ours,
    Rival,
    Uncached,
    contender,
    expand,
    spaced_mask,
)

TAYLOR = {"name": "taylor", "order": 1}
NODE = {
    "kind": "ours",
    "label": None,
    "policy": {"name": "interval", "every": 2},
    "forecaster": None,
    "guards": {"warmup": None, "last": 2},
    "scope": None,
    "depth": None,
}


def test_a_grid_is_every_combination():
    node = {**NODE, "grid": {"policy.every": [2, 3], "scope": [None, "block"]}}
    found = [(one["policy"]["every"], one["scope"]) for one in expand(node, "m")]
    assert found == [(2, None), (2, "block"), (3, None), (3, "block")]
    assert all("grid" not in one for one in expand(node, "m"))
    assert NODE["policy"]["every"] == 2  # the node itself is as it was


def test_points_are_choices_of_their_own():
    node = {**NODE, "points": [{"policy.every": 4}, {"policy.every": 5, "scope": "stack"}]}
    assert [(one["policy"]["every"], one["scope"]) for one in expand(node, "m")] == [(4, None), (5, "stack")]


def test_a_model_may_have_a_grid_of_its_own():
    node = {**NODE, "grid": {"policy.every": [2]}, "models": {"m": {"grid": {"policy.every": [7, 8]}}}}
    assert [one["policy"]["every"] for one in expand(node, "m")] == [7, 8]
    assert [one["policy"]["every"] for one in expand(node, "other")] == [2]


@pytest.mark.parametrize("key", ["policy.evry.x", "polcy.every", "scop"])
def test_a_grid_over_what_is_not_there(key):
    with pytest.raises(ConfigError, match="is not in the method"):
        expand({**NODE, "grid": {key: [1]}}, "m")


def test_a_grid_that_is_no_grid():
    with pytest.raises(ConfigError, match="must map keys to lists"):
        expand({**NODE, "grid": {"policy.every": 3}}, "m")


def test_ours_with_the_common_forecaster():
    what = contender(NODE, TAYLOR, 20)
    assert type(what) is Ours
    assert what.method == "interval, taylor"
    assert what.options == {"policy": "interval", "every": 2, "last": 2, "forecaster": "taylor", "order": 1}
    assert what.control == {**what.options, "max_reused": 0}  # the same, told to reuse nothing
    assert what.batchable


def test_adaptive_methods_run_one_by_one():
    what = contender({**NODE, "policy": {"name": "first_block", "threshold": 0.1}}, TAYLOR, 20)
    assert type(what) is Adaptive
    assert not what.batchable


def test_spaced_masks_follow_the_number_of_steps():
    node = {**NODE, "policy": {"name": "mask", "spaced": {"share": 1 / 3, "exponent": 1.0}}}
    assert contender(node, TAYLOR, 9).options["mask"] == "100100100"
    assert contender(node, TAYLOR, 50).options["mask"].count("1") == 17
    assert spaced_mask(8, 4, 2.0) == (1, 1, 1, 0, 1, 0, 0, 0)


def test_baselines():
    assert type(contender({"kind": "baseline", "label": "uncached", "steps_ratio": 1}, TAYLOR, 20)) is Uncached
    fewer = contender({"kind": "baseline", "label": None, "steps_ratio": 1 / 3}, TAYLOR, 50)
    assert type(fewer) is FewerSteps
    assert fewer.steps(50) == 17
    assert fewer.settings == {"steps": 17}
    assert fewer.method == "fewer steps"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"policy": {"name": "intervl"}}, "Did you mean 'interval'"),
        ({"policy": {"name": "interval", "evry": 2}}, "Did you mean 'every'"),
        ({"policy": {"name": "interval", "every": "two"}}, "whole number"),
        ({"policy": {"name": "interval", "every": 0}}, "at least 1"),
        ({"forecaster": {"name": "tailor"}}, "Did you mean 'taylor'"),
        ({"guards": {"warmup": 0}}, "warmup must be at least 1"),
        ({"policy": {"name": "mask", "spaced": {"share": 0.5}}}, "share of computed steps and an exponent"),
    ],
)
def test_bad_settings_are_told(change, message):
    with pytest.raises(ConfigError, match=message):
        contender({**NODE, **change}, TAYLOR, 20)


@pytest.mark.parametrize("ratio", [0, 1.5, "half"])
def test_a_share_of_steps_must_be_one(ratio):
    with pytest.raises(ConfigError, match="above 0 and at most 1"):
        contender({"kind": "baseline", "label": None, "steps_ratio": ratio}, TAYLOR, 20)


def test_rivals_keep_their_settings():
    node = {"kind": "rival", "label": None, "peer": "deepcache", "settings": {"interval": 5}}
    what = contender(node, TAYLOR, 20)
    assert type(what) is Rival
    assert (what.kind, what.method, what.settings) == ("rival", "deepcache", {"interval": 5})
