"""Which tokens each language cache computes, worked out by hand."""

import pytest
import torch

from diffusion_cache.errors import ConfigError
from diffusion_cache.language import DelayedKV, Elastic, Planned, Prefix, SubBlock, View
from diffusion_cache.language.elastic import Drift
from diffusion_cache.language.run import places_of
from diffusion_cache.plan import Plan
from diffusion_cache.registry import languages
from diffusion_cache.schedule import Schedule


def bits(*rows):
    return torch.tensor([[char == "1" for char in row] for row in rows])


def view(masked, was_masked=None, changed=None, unsettled=None, age=1, refinement=1):
    none = ["0" * len(masked[0])] * len(masked)
    unsettled = unsettled or ["1" * len(masked[0])] * len(masked)
    return View(
        bits(*masked), bits(*(was_masked or masked)), bits(*(changed or none)), bits(*unsettled), age, refinement
    )


def test_all_are_registered():
    assert languages.names() == ["dkv", "elastic", "planned", "prefix", "sub_block"]


def test_prefix_computes_what_is_not_settled():
    assert torch.equal(Prefix().rows(view(["000011"], unsettled=["000111"])), bits("000111"))


def test_dkv_computes_the_masked_and_the_just_decoded_and_refreshes():
    seen = view(["000101"], changed=["001000"], unsettled=["011111"])
    assert torch.equal(DelayedKV(refresh=3).rows(seen), bits("001101"))
    assert torch.equal(DelayedKV(refresh=2).rows(seen), bits("011111"))
    assert torch.equal(DelayedKV(refresh=1).rows(view(["01"], age=0)), bits("11"))


def test_planned_computes_what_is_not_settled_or_nothing():
    method = Planned(plan(True, False, True))
    for refinement, expected in {1: "000000", 2: "000111", 3: "000111"}.items():
        assert torch.equal(method.rows(view(["000011"], unsettled=["000111"], refinement=refinement)), bits(expected))
    assert str(method) == "planned('two': 2 of 3 refinements)"


def plan(*computed, scope="layer"):
    return Plan("two", scope, None, "residual", Schedule.uniform(computed), ())


def test_a_plan_for_a_denoiser_is_refused():
    with pytest.raises(ConfigError, match="at scope stack; one for text decides for all layers at once"):
        Planned(plan(True, scope="stack"))


def test_sub_block_computes_the_part_that_is_decoded_and_all_at_a_new_part():
    method = SubBlock(size=2)
    masked = ["00010111", "00000111", "00000000", "00000001"]
    before = ["00010111", "00010111", "00000011", "00000011"]
    unsettled = ["00001111", "00111111", "00111111", "00111111"]
    rows = method.rows(view(masked, before, unsettled=unsettled))
    # still at the second part; come to the third; all decoded; still at the fourth
    assert torch.equal(rows, bits("00110000", "00111111", "00111111", "00000011"))


def test_elastic_computes_the_first_masked_and_the_just_decoded():
    rows = Elastic(window=2).rows(view(["00010111", "00000001"], changed=["01000000", "00000000"]))
    assert torch.equal(rows, bits("01010100", "00000001"))


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (DelayedKV, {"refresh": 0}),
        (SubBlock, {"size": 0}),
        (Elastic, {"window": 0}),
        (Elastic, {"threshold": 1.5}),
        (Elastic, {"threshold": float("nan")}),
    ],
)
def test_impossible_options_are_refused(method, options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        method(**options)


def test_drift_watches_the_token_that_is_attended_to_most_and_may_drift():
    drift = Drift(threshold=0.9)
    assert drift.tracked() is None
    places = torch.arange(3).expand(2, -1)
    weights = torch.tensor([[[0.9, 0.1, 0.0], [0.5, 0.3, 0.2], [0.5, 0.2, 0.3]]] * 2)
    both, lasting = torch.tensor([True, True]), bits("011", "011")
    drift.refreshed(0, weights, places, both, lasting)
    # the first token is attended to most, but cannot drift
    assert torch.equal(drift.tracked(), bits("010", "010"))

    moved = torch.tensor([[[0.5, 0.3, 0.2]], [[0.2, 0.3, 0.5]]])
    assert drift.drifted(0, moved, torch.tensor([[1], [1]])).tolist() == [False, True]
    # a failed test is the new measure of what comes after it, a passed one is not
    assert drift.drifted(0, moved, torch.tensor([[1], [1]])).tolist() == [False, False]
    assert drift.drifted(0, moved * float("nan"), torch.tensor([[1], [1]])).all()

    # the second sample alone is refreshed: it attends to the third token most
    weights = torch.tensor([[[0.0, 0.1, 0.9]] * 3] * 2)
    drift.refreshed(0, weights, places, torch.tensor([False, True]), lasting)
    assert torch.equal(drift.tracked(), bits("010", "001"))


def test_a_watched_token_that_is_not_computed_has_not_drifted():
    drift = Drift(threshold=0.9)
    places, both = torch.arange(3).expand(2, -1), torch.tensor([True, True])
    weights = torch.tensor([[[0.1, 0.8, 0.1]] * 3] * 2)
    drift.refreshed(0, weights, places, both, bits("111", "111"))
    # the second sample computes its third token alone, which attends to others
    moved = torch.tensor([[[0.8, 0.1, 0.1]]] * 2)
    assert drift.drifted(0, moved, torch.tensor([[1], [2]])).tolist() == [True, False]
    assert torch.equal(drift.weights[0], torch.tensor([[0.8, 0.1, 0.1], [0.1, 0.8, 0.1]]))


def test_samples_with_fewer_tokens_repeat_their_first():
    assert places_of(bits("01011", "00100", "00000")).tolist() == [[1, 3, 4], [2, 2, 2], [0, 0, 0]]
