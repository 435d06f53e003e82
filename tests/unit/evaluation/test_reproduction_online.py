"""The parts of the online methods' claims that need no model."""

from types import SimpleNamespace

import grams
import numpy as np
import torch

from diffusion_cache.evaluation.reproduction import load_claims, online, seed_sets, signals
from diffusion_cache.evaluation.reproduction.bench import Ran


def ran(psnr, work=0.4):
    return Ran((psnr, psnr), (0.1, 0.1), work, 16.0, torch.empty(0))


def test_thresholds_are_searched_until_the_work_is_met(monkeypatch):
    asked = []

    def run(threshold, **arguments):
        asked.append(threshold)
        return ran(30.0, work=0.2 * threshold**-0.5)  # is WORK at 0.25

    monkeypatch.setattr(online, "bench", lambda seeds: SimpleNamespace(run=run))
    online.adaptive.cache_clear()
    found = online.adaptive(seed_sets()[0], "seacache")
    assert abs(found.work / online.WORK - 1) <= online.NEAR
    assert asked[0] == online.POLICIES["seacache"][1]
    assert len(asked) == 3  # the second tells the slope
    online.adaptive.cache_clear()


def test_a_better_policy_must_have_spent_as_much(monkeypatch):
    runs = {"seacache": ran(40.0), "teacache": ran(39.0)}
    monkeypatch.setattr(online, "adaptive", lambda seeds, name: runs[name])
    assert online.against("seacache", "teacache", seed_sets()[0]).holds
    assert not online.against("teacache", "seacache", seed_sets()[0]).holds
    runs["seacache"] = ran(40.0, work=0.45)
    outcome = online.against("seacache", "teacache", seed_sets()[0])
    assert not outcome.holds
    assert outcome.figures["seacache work"] == 0.45
    assert outcome.ours == "seacache 40.00 dB, teacache 39.00 dB"


def test_the_change_of_the_output_comes_from_its_gram_matrix():
    outputs = torch.tensor([[3.0, 4.0], [3.0, 9.0], [0.0, 9.0]], dtype=torch.float64)
    profile = grams.profile_of(outputs[None], "denoiser")
    assert np.allclose(signals.output_change(profile), [1.0, 3 / 90**0.5])


def test_claims_of_online_methods_are_found():
    names = {claim.name for claim in load_claims(["forecasters", "online", "signals", "targets"])}
    assert {
        "signals.ratios_are_alike",
        "online.lagged_decisions_cost_little",
        "targets.search_hits_its_target",
    } <= names
    assert len(names) >= 18
