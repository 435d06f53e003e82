"""Profiles and plans of language models: spans are layers, steps a block's refinements."""

import pytest
import torch
from language_models import BLOCK, call, logits, model, pipeline

import diffusion_cache as dc
from diffusion_cache.language import SCOPE
from diffusion_cache.language.decoder import Decoder
from diffusion_cache.planning.refinements import METRIC, candidates, damages, planned
from diffusion_cache.profile import Profile
from diffusion_cache.profiling.refinements import Block, Sums, blocks, measure

ONE_EACH = dict(threshold=2.0, prompt=8, gen_length=8)  # two blocks, a token a refinement


@pytest.fixture(scope="module")
def pipe():
    return pipeline(model())


@pytest.fixture(scope="module")
def profile(pipe):
    return measure(pipe, [call(**ONE_EACH), call(**ONE_EACH, seed=1)])


@pytest.fixture(scope="module")
def plans(pipe, profile):
    return planned(pipe, profile, [1, 2, 4], [call(**ONE_EACH)], [call(**ONE_EACH, seed=2)])


def test_a_profile_says_what_was_measured(profile):
    assert (profile.total, profile.scope, profile.passes) == (BLOCK, SCOPE, ("0",))
    assert [span.name for span in profile.spans] == ["layers.0", "layers.1", "layers.2"]
    assert 0.8 < sum(span.share for span in profile.spans) < 1
    assert len(profile.samples) == 6


@torch.no_grad()
def test_features_and_distances_are_those_of_the_layers(pipe, profile):
    decoder, given = Decoder(pipe.model, BLOCK), [call(**ONE_EACH), call(**ONE_EACH, seed=1)]
    found = []
    for arguments in given:
        assert blocks(pipe, decoder, arguments, found.append) == 3
    expected = torch.stack(logits(pipe, **ONE_EACH))
    left = torch.cat([decoder.logits(block.features[1, :, -1]) for block in found[:2]])
    torch.testing.assert_close(left, expected)
    added = found[0].features[1, :, 1] - found[0].features[1, :, 0]
    torch.testing.assert_close(found[0].features[0, :, 1], added, rtol=1e-3, atol=1e-4)

    last = BLOCK - 1
    rows = [(block.features[0, [0, last], 2], block.masked[last]) for block in found]
    distance = sum((both[0] - both[1])[masked].square().sum() for both, masked in rows)
    count = sum(masked.sum() for _, masked in rows)
    gram = profile.arrays["gram_residual"][2, 0]
    stored = float(gram[0, 0] + gram[last, last] - 2 * gram[0, last])
    assert stored == pytest.approx(float(distance / count), rel=1e-4)


def test_a_block_is_handed_on_before_the_next_one_is_decoded(pipe):
    ran, at = [], []
    handle = pipe.model.register_forward_hook(lambda *_: ran.append(1))
    blocks(pipe, Decoder(pipe.model, BLOCK), call(**ONE_EACH), lambda block: at.append(len(ran)))
    handle.remove()
    tried = len(ran) - 2 * BLOCK  # by the decoder, and before it
    assert at == [tried + BLOCK, tried + 2 * BLOCK]


def test_only_tokens_that_are_masked_later_count():
    masked = torch.tensor([[[1, 1]], [[0, 1]]]).bool()
    features = torch.zeros(2, 2, 1, 1, 2, 1)
    features[0, :, 0, 0] = torch.tensor([[[3.0], [1.0]], [[100.0], [2.0]]])  # the first token is decoded in between
    sums = Sums(1)
    sums.add(Block(list(masked), list(features.transpose(0, 1))))
    distances, energies = sums.means()
    assert distances[0, 0].tolist() == [[0.0, 1.0], [1.0, 0.0]]
    assert energies[0, 0].tolist() == [5.0, 4.0]


def test_damages_grow_with_distance_and_plans_compute_what_they_say(profile):
    damage = damages(profile)[0]
    assert (damage[0, 1:] > 0).all()
    for count in (1, 2, 3):
        found = {plan.name: plan.computed()[:, 0, 0].tolist() for plan in candidates(profile, count)}
        assert all(sum(computed) == count and computed[0] for computed in found.values())
        cost = {
            name: sum(damage[max(i for i in range(t) if computed[i]), t] for t in range(1, BLOCK) if not computed[t])
            for name, computed in found.items()
        }
        assert cost["sum"] == min(cost.values())


def test_plans_are_measured_stored_and_chosen(pipe, plans, tmp_path):
    assert [plan.name for plan in plans.plans] == ["nfe-1", "nfe-2", "nfe-4"]
    assert [plan.quality.metric for plan in plans.plans] == [METRIC] * 3
    assert plans.plans[2].quality.worst == 1.0  # everything is computed
    plans.save(tmp_path / "p")
    expected = pipe(**call(**ONE_EACH)).sequences
    for wish, name in (({"nfe": 2.5}, "nfe-2"), ({"plan": "nfe-4"}, "nfe-4")):
        with dc.cached(pipe, profile=str(tmp_path / "p"), **wish):
            found = pipe(**call(**ONE_EACH)).sequences
            summary = dc.summary(pipe)
        assert name in summary.method
    assert torch.equal(found, expected)
    assert Profile.load(tmp_path / "p").plans[1].schedule == plans.plans[1].schedule


def test_where_nothing_is_computed_the_next_token_is_decoded_by_the_same_logits(pipe, plans):
    with dc.cached(pipe, plan=plans.plans[0]):
        found = logits(pipe, **ONE_EACH)
        summary = dc.summary(pipe)
    assert [record.executed > 0 for record in summary.records] == [True, False, False, False] * 2
    assert all(torch.equal(found[0], other) for other in found[1:BLOCK])
    assert not torch.equal(found[BLOCK], found[0])


def test_what_was_enabled_comes_back(pipe):
    with dc.cached(pipe, method="dkv", refresh=3):
        measure(pipe, [call(**ONE_EACH)])
        pipe(**call(**ONE_EACH))
        assert dc.summary(pipe).method == "dkv(refresh=3)"


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        (dict(method="dkv"), "give method or profile"),
        (dict(nfe=0.5), "takes 0.5 denoiser evaluations or fewer"),
        (dict(speedup=1000.0), "1000× as fast"),
        (dict(plan="nfe-3"), "no plan 'nfe-3'"),
        ({}, "say what you want of the profile"),
    ],
)
def test_bad_wishes_are_told_and_change_nothing(pipe, plans, wrong, match):
    with pytest.raises(dc.ConfigError, match=match):
        dc.enable(pipe, profile=plans, **wrong)
    with pytest.raises(dc.ConfigError, match="not enabled"):
        dc.summary(pipe)


def test_a_profile_of_another_model_or_of_nothing_is_refused(plans):
    other = pipeline(model(num_hidden_layers=2))
    with pytest.raises(dc.ConfigError, match="not of this model"):
        dc.enable(other, profile=plans, plan="nfe-2")
    with pytest.raises(dc.ConfigError, match=r"make some with planning\.refinements\.planned"):
        dc.enable(pipeline(model()), profile=plans.with_plans([]), nfe=2)
    with pytest.raises(dc.ConfigError, match="at least one call"):
        measure(other, call())
    with pytest.raises(dc.ConfigError, match="decodes masked tokens block by block"):
        measure(dc.reference.load("dit-digits"), [{}])
    with pytest.raises(dc.ConfigError, match="at least one of each"):
        planned(pipeline(model()), plans, [2], [], [])
    with pytest.raises(dc.ConfigError, match="scope"):
        dc.enable(dc.reference.load("dit-digits"), plan=plans.plans[1])
