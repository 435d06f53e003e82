"""FORA, SmoothCache, and the optimal schedules of DPCache, MeanCache, LeMiCa and LAPTOP, against every schedule."""

import math
import warnings
from dataclasses import replace
from itertools import combinations, product

import grams
import numpy as np
import plans
import pytest
import torch

import diffusion_cache as dc
from diffusion_cache import reference
from diffusion_cache.errors import ConfigError, DiffusionCacheWarning
from diffusion_cache.planning.static import spared
from diffusion_cache.planning.surrogate import cell_errors, mean_sensitivity
from diffusion_cache.systems import DPCache, Laptop, LeMiCa, MeanCache, SmoothCache
from diffusion_cache.systems.smooth_cache import changes, longest_lags

NAME, STEPS = "dit-digits", 8


@pytest.fixture(scope="module")
def pipe():
    return reference.load(NAME)


@pytest.fixture(scope="module")
def branches():
    return plans.profile(NAME, scope="branch")


def generate(pipe):
    return pipe(**reference.inputs(NAME, [3], [5], STEPS)).images


def seeded(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def columns(plan):
    """Computed steps of each span, as text."""
    return ["".join(str(int(row[0][span])) for row in plan.schedule.compute) for span in range(plan.spans)]


# FORA


def test_fora_computes_every_branch_at_every_nth_step(pipe):
    with dc.cached(pipe, method="fora", every=3):
        generate(pipe)
        summary = dc.summary(pipe)
    assert summary.spans == 24
    assert "".join(str(int(record.computed)) for record in summary.records) == "10010010"
    assert summary.hit_rate == pytest.approx(5 / 8)


# SmoothCache


def test_changes_are_relative_distances():
    features = seeded(3, 2, 5, 7)
    found = changes(grams.profile_of(features).arrays["gram_output"].numpy())
    norms = features.norm(dim=-1)
    expected = (features[:, :, :, None] - features[:, :, None]).norm(dim=-1) / norms[..., None]
    assert found == pytest.approx(expected.mean(dim=(0, 1)).numpy(), abs=1e-6)


def test_changes_of_a_pass_that_ends_or_begins():
    features = seeded(1, 1, 6, 7).repeat(1, 2, 1, 1)
    whole = changes(grams.profile_of(features).arrays["gram_output"].numpy())
    features[:, 1, :2] = features[:, 1, 4:] = 0
    assert changes(grams.profile_of(features).arrays["gram_output"].numpy()) == pytest.approx(whole, abs=1e-6)
    features[:, 0, 4:] = 0
    assert np.isinf(changes(grams.profile_of(features).arrays["gram_output"].numpy())[3, 4])


def test_longest_lags_by_hand():
    change = np.full((6, 6), 9.0)
    change[0, 1], change[0, 2], change[2, 3], change[3, 4], change[3, 5] = 0.1, 0.3, 0.1, 0.1, 0.15
    assert longest_lags(change, 0.2, 3) == [0, 2, 4, 5]
    change[2, 3] = 0.25
    assert longest_lags(change, 0.2, 3) == [0, 2, 3]
    assert longest_lags(change, 0.2, 1) == [0, 2, 3, 5]
    assert longest_lags(change, 0.05, 3) == list(range(6))
    assert longest_lags(change, 10.0, 2) == [0, 3]


def test_each_type_of_layer_has_a_schedule_of_its_own():
    still, moving = torch.ones(6, 6), torch.eye(6) * 5
    profile = grams.profile_of(
        torch.stack([still, moving, still, moving]), "branch", ["b.0.attn1", "b.0.ff", "b.1.attn1", "b.1.ff"]
    )
    plan = SmoothCache(alpha=0.1, max_lag=4).plan(profile)
    assert columns(plan) == ["100001", "111111", "100001", "111111"]
    assert plan.nfe == pytest.approx(6 - 4 * 2 / 4)


def test_a_second_self_attention_has_the_schedule_of_attention():
    """As those of SD3.5-medium have."""
    still, moving = torch.ones(6, 6), torch.eye(6) * 5
    plan = SmoothCache(alpha=0.1, max_lag=4).plan(
        grams.profile_of(torch.stack([still, moving, still]), "branch", ["b.0.attn", "b.0.attn2", "b.0.ff"])
    )
    assert columns(plan) == ["111111", "111111", "100001"]


@pytest.mark.parametrize("alpha", [0.1, 0.2, 0.4])
def test_no_reuse_changes_by_more_than_alpha(branches, alpha):
    plan = SmoothCache(alpha).plan(branches)
    grams_ = branches.arrays["gram_output"].double().numpy()
    found = columns(plan)
    names = [span.name.rpartition(".")[2] for span in branches.spans]
    for kind in set(names):
        places = [place for place, name in enumerate(names) if name == kind]
        assert len({found[place] for place in places}) == 1
        text = found[places[0]]
        change = changes(grams_[places])
        for step in range(1, STEPS):
            lag = 0 if text[step] == "1" else step - text.rindex("1", 0, step)
            assert lag <= 3
            if lag and (step + 1 == STEPS or text[step + 1] == "1"):  # the lag that was chosen
                assert change[step - lag, step] <= alpha
    assert SmoothCache(2 * alpha).plan(branches).nfe <= plan.nfe


def test_smooth_cache_runs(pipe, branches):
    before = generate(pipe)
    with dc.cached(pipe, method="smooth_cache", profile=branches, alpha=0.0):
        assert torch.equal(generate(pipe), before)
    wanted = SmoothCache(0.4).plan(branches).schedule
    with dc.cached(pipe, method="smooth_cache", profile=branches, alpha=0.4):
        generate(pipe)
        records = dc.summary(pipe).records
    assert [record.spans - record.spans_reused for record in records] == [sum(row[0]) for row in wanted.compute]
    assert sum(record.spans_reused for record in records) > 0


# optimal schedules


def damage_of(profile, computed, order):
    """Of each gap, sensitivity times relative error of its steps, from the features' inner products alone."""
    gram, sensitivity = grams.mean_gram(profile), mean_sensitivity(profile)
    found = dict.fromkeys(computed, 0.0)
    for step in sorted(set(range(profile.total)) - set(computed)):
        past = [node for node in computed if node < step][-order - 1 :]
        weights = np.zeros(profile.total)
        weights[past[-1]] = 1.0
        if len(past) == 2:
            slope = (step - past[1]) / (past[1] - past[0])
            weights[past] = -slope, 1 + slope
        weights[step] -= 1
        found[past[-1]] += sensitivity[step] * np.sqrt(max(weights @ gram @ weights, 0) / gram[step, step])
    return list(found.values())


SCORES = {
    DPCache: sum,
    MeanCache: lambda found: sum(value**2 for value in found),
    LeMiCa: lambda found: (max(found), sum(found)),
}


@pytest.mark.parametrize("system", SCORES)
@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("nfe", [2, 3, 5])
def test_optimal_schedules_equal_brute_force(system, order, nfe):
    profile = grams.profile_of(
        seeded(2, 1, 7, 5).cumsum(dim=2), sensitivity=torch.rand(2, 7, generator=torch.Generator().manual_seed(1))
    )
    every = [(0, *rest) for rest in combinations(range(1, 7), nfe - 1)]
    best = min(every, key=lambda computed: SCORES[system](damage_of(profile, computed, order)))
    plan = system(nfe, order).plan(profile)
    assert [step for step, mark in enumerate(columns(plan)[0]) if mark == "1"] == list(best)
    assert (plan.nfe, plan.history) == (nfe, order + 1)


def test_each_objective_is_best_at_its_own(branches):
    """Of a real model: the sum gives the least sum, minimax the least worst gap."""
    made = {system: system(3, order=1).plan(branches) for system in SCORES}
    steps = {system: [i for i, mark in enumerate(columns(plan)[0]) if mark == "1"] for system, plan in made.items()}
    damages = {system: damage_of(branches, steps[system], 1) for system in made}
    for system, score in SCORES.items():
        assert score(damages[system]) <= min(score(found) for found in damages.values())


def test_evaluations_of_a_cut():
    """A reused step still runs a quarter: 3 evaluations of 6 steps are 2 computed steps."""
    profile = grams.profile_of(seeded(1, 6, 5), "cut", depth=1, shares=[0.75])
    plan = DPCache(3.0).plan(profile)
    assert columns(plan)[0].count("1") == 2
    assert plan.nfe == pytest.approx(3.0)
    assert DPCache(3.7).plan(profile).nfe == pytest.approx(3.0)
    with pytest.raises(ConfigError, match=r"nfe must be from 2\.25 to 6, not 2"):
        DPCache(2.0).plan(profile)


def test_optimal_schedules_run(pipe):
    profile = plans.profile(NAME)
    before = generate(pipe)
    for method in ("dpcache", "meancache", "lemica"):
        with dc.cached(pipe, method=method, profile=profile, nfe=4):
            generate(pipe)
            assert sum(record.computed for record in dc.summary(pipe).records) == 4
        with dc.cached(pipe, method=method, profile=profile, nfe=STEPS):
            assert torch.equal(generate(pipe), before)


def test_bad_options():
    for options, message in [
        (dict(method="dpcache"), "nfe"),
        (dict(method="dpcache", nfe=4, order=2), "order must be 0"),
        (dict(method="meancache", nfe=4, gamma=0.0), "gamma must be above 0"),
        (dict(method="laptop", keep=0.0), "keep is a share"),
        (dict(method="smooth_cache", alpha=-1.0), "alpha and max_lag"),
        (dict(method="fora", nfe=4), "nfe comes from the method"),
    ]:
        with pytest.raises(ConfigError, match=message):
            dc.enable(reference.load(NAME), **options)


# LAPTOP

SPANS, CELLS = 2, 4


def laptop_profile(mean=1.0, kind="block", **fields):
    groups = [{"name": "first", "spans": [0]}, {"name": "second", "spans": [1]}]
    checked = {"groups": groups, "unmeasured": [], "additivity": {"mean": mean, "spread": 0.1, "pairs": 4}}
    return grams.profile_of(
        seeded(SPANS, CELLS, 3, seed=3).cumsum(dim=1),
        kind,
        shares=[0.6, 0.3],
        sensitivity=[[1.0, 0.5, 0.3, 0.2], [0.1, 0.2, 0.4, 0.9]],
        **{"facts": {"sensitivity": checked}, **fields},
    )


def gaps(profile, span, computed):
    """Squared sums of the final errors of cells that reuse the same step, summed over such gaps."""
    found = dict.fromkeys(computed, 0.0)
    for step in sorted(set(range(CELLS)) - set(computed)):
        found[max(node for node in computed if node < step)] += cell(profile, span, computed, step)
    return sum(value**2 for value in found.values())


def cell(profile, span, computed, step):
    """Final error of reusing the last computed step at this one."""
    gram = profile.arrays["gram_residual"][span, 0].numpy()
    last = max(node for node in computed if node < step)
    error = gram[last, last] + gram[step, step] - 2 * gram[last, step]
    return float(profile.arrays["sensitivity"][span, step]) * np.sqrt(float(error / gram[step, step]))


@pytest.mark.parametrize("keep", [0.3, 0.5, 0.75, 1.0])
def test_laptop_equals_brute_force(keep):
    profile = laptop_profile()
    columns_ = [(0, *rest) for count in range(CELLS) for rest in combinations(range(1, CELLS), count)]
    best = (np.inf, None)
    for chosen in product(columns_, repeat=SPANS):
        cost = sum(share * len(steps) for share, steps in zip([0.6, 0.3], chosen, strict=True))
        if cost > keep * 0.9 * CELLS + 1e-9:
            continue
        damage = sum(gaps(profile, span, steps) for span, steps in enumerate(chosen))
        best = min(best, (damage, chosen))
    plan = Laptop(keep).plan(profile)
    assert plan.facts["damage"] <= best[0] / (1 - plan.facts["gap"]) + 1e-9
    found = [tuple(i for i, mark in enumerate(text) if mark == "1") for text in columns(plan)]
    assert sum(share * len(steps) for share, steps in zip([0.6, 0.3], found, strict=True)) <= keep * 0.9 * CELLS + 1e-9
    assert plan.facts["damage"] == pytest.approx(sum(gaps(profile, span, steps) for span, steps in enumerate(found)))
    assert plan.facts["damage"] == pytest.approx(best[0])
    assert tuple(found) == best[1]


def test_damages_of_a_group_add_up_to_what_was_measured():
    """Reusing all spans of a group at one step: the square of its sensitivity times the group's relative error."""
    facts = {
        "groups": [{"name": "all", "spans": None}],
        "unmeasured": [],
        "additivity": {"mean": 1.0, "spread": 0.0, "pairs": 4},
    }
    profile = grams.profile_of(seeded(3, 2, 5, 4), "block", sensitivity=[[2.0] * 5], facts={"sensitivity": facts})
    gram = profile.arrays["gram_residual"].numpy()
    energy = gram.diagonal(axis1=2, axis2=3)
    scale = energy.mean(axis=2)
    square = np.array([gram[..., t, t] + gram[..., t - 1, t - 1] - 2 * gram[..., t, t - 1] for t in range(1, 5)])
    relative = np.sqrt((square / scale).sum(axis=(1, 2)) / (energy / scale[..., None]).sum(axis=(0, 1))[1:])
    total = sum(error[0] ** 2 for error in cell_errors(profile))
    assert [total[t - 1, t] for t in range(1, 5)] == pytest.approx((2 * relative) ** 2)


def test_laptop_tells_when_damages_do_not_add_up():
    with pytest.warns(DiffusionCacheWarning, match="do not add up"):
        Laptop().plan(laptop_profile(mean=3.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Laptop().plan(laptop_profile(mean=1.2)).facts["additivity"] == 1.2


def test_laptop_computes_one_step_at_least():
    with pytest.raises(ConfigError, match=r"keep must be at least 1/\d+, for the first step"):
        Laptop(0.001).plan(laptop_profile())


def test_laptop_needs_sensitivities_and_their_check():
    without = grams.profile_of(seeded(2, 4, 3), "block")
    with pytest.raises(ConfigError, match="reads sensitivity"):
        Laptop().plan(without)
    facts = {"sensitivity": {"groups": [{"name": "all", "spans": None}], "unmeasured": []}}
    with pytest.raises(ConfigError, match="did not check whether damages add up"):
        Laptop().plan(laptop_profile(facts=facts))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"groups": [{"name": "first", "spans": [99]}, {"name": "second", "spans": [1]}]}, "has 2 spans"),
        ({"groups": [{"name": "first", "spans": ["a"]}, {"name": "second", "spans": [1]}]}, "whole number"),
        ({"groups": [{"name": "all", "spans": None}]}, "names 1 groups, and 2 are measured"),
        ({"groups": 3}, "groups"),
        ({"additivity": {"mean": "x"}}, "additivity.mean: expected a whole number, found 'x'"),
        ({"additivity": 1.0}, "additivity: expected an object"),
    ],
)
def test_laptop_tells_what_is_wrong_with_a_strangers_facts(change, words):
    profile = laptop_profile()
    facts = {"sensitivity": {**profile.facts["sensitivity"], **change}}
    with pytest.raises(ConfigError, match=words):
        Laptop().plan(replace(profile, facts=facts))
    with pytest.raises(ConfigError, match="expected an object, found str"):
        Laptop().plan(replace(profile, facts={"sensitivity": "none"}))


def test_laptop_is_for_one_denoiser():
    profile = laptop_profile()
    spans = (profile.spans[0], replace(profile.spans[1], denoiser="transformer_2"))
    with pytest.raises(ConfigError, match="several denoisers"):
        Laptop().plan(replace(profile, spans=spans))


def test_settings_that_are_infinite():
    with pytest.raises(ConfigError, match="gamma must be above 0 and finite, not inf"):
        MeanCache(nfe=3, gamma=math.inf)
    with pytest.raises(ConfigError, match="alpha and max_lag must be finite and at least 0, not inf"):
        SmoothCache(alpha=math.inf)


@pytest.mark.parametrize("system", [DPCache, LeMiCa, MeanCache])
def test_spans_without_a_share_leave_nothing_to_choose(system):
    profile = grams.profile_of(seeded(2, 4, 3), "block", shares=[0.0, 0.0])
    with pytest.raises(ConfigError, match="spans take no share of the denoiser's work"):
        system(nfe=2).plan(profile)


def test_evaluations_that_are_no_number():
    with pytest.raises(ConfigError, match="nfe must be a finite number, not nan"):
        DPCache(nfe=math.nan)


@pytest.mark.parametrize(("denoisers", "expected"), [(("a", "a"), 0.9), (("a", "b"), 0.45)])
def test_what_a_reused_step_spares_is_a_mean_over_denoisers(denoisers, expected):
    profile = laptop_profile()
    spans = tuple(replace(span, denoiser=name) for span, name in zip(profile.spans, denoisers, strict=True))
    assert spared(replace(profile, spans=spans)) == pytest.approx(expected)


def test_a_group_that_could_not_be_reused_is_always_computed():
    profile = laptop_profile()
    profile.facts["sensitivity"]["unmeasured"].append("second")
    assert columns(Laptop(keep=0.7).plan(profile))[1] == "1111"
