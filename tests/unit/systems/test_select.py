import warnings
from dataclasses import replace
from functools import cache

import numpy as np
import plans
import pytest
import torch

import diffusion_cache as dc
from diffusion_cache import reference
from diffusion_cache.context import Condition
from diffusion_cache.errors import ConfigError, DiffusionCacheWarning
from diffusion_cache.evaluation.prompts import FITTING_SEEDS
from diffusion_cache.forecasters import Taylor
from diffusion_cache.models import condition_of
from diffusion_cache.plan import Plan
from diffusion_cache.planning.select import Seen, best_together, reached, refitted, scores, see, with_selector
from diffusion_cache.planning.selector import Selector
from diffusion_cache.policies import Planned
from diffusion_cache.policies.select import Select
from diffusion_cache.profile import Profile, shipped_profiles
from diffusion_cache.profiling.generation import teach
from diffusion_cache.schedule import Schedule
from diffusion_cache.systems import Selection

STEPS = plans.STEPS


def plan(name, mask, levels=()):
    return Plan(name, "stack", None, "auto", Schedule.uniform(entry == "1" for entry in mask), tuple(levels))


def select(weights, bias=(0.0, 0.0), source="class_labels", labels=(3, 8), fallback=0):
    choices = tuple(Planned(plan(name, mask)) for name, mask in (("a", "1100"), ("b", "1001")))
    forecasters = (Taylor(1), Taylor(2))
    return Select(choices, forecasters, torch.tensor(weights), torch.tensor(bias), source, labels, fallback)


def chosen(policy, condition, agree=None):
    picked, forecaster = policy.choose(condition, agree)
    index = policy.plans.index(picked)
    assert forecaster is policy.forecasters[index]
    return picked.plan.name


def labels(*values):
    return Condition("class_labels", torch.tensor(values))


def test_the_plan_with_the_highest_score():
    policy = select([[1.0, 0.0], [0.0, 1.0]])
    assert chosen(policy, labels(3)) == "a"
    assert chosen(policy, labels(8)) == "b"
    assert chosen(policy, labels(8, 1000)) == "b"  # the class for none, beside it, is left out
    assert chosen(policy, labels(8, 3, 3)) == "a"  # the mean score of three samples
    assert chosen(select([[1.0, 0.0], [0.0, 4.0]]), labels(8, 3, 3)) == "b"
    by_text = select([[1.0, 0.0], [0.0, 1.0]], (0.0, 0.5), source="encoder_hidden_states", labels=())
    assert chosen(by_text, Condition("encoder_hidden_states", torch.tensor([[1.0, 0.2], [0.0, 0.2]]))) == "b"
    assert chosen(by_text, Condition("encoder_hidden_states", torch.tensor([[1.0, 0.2], [1.0, 0.2]]))) == "a"


@pytest.mark.parametrize(
    "condition",
    [
        None,
        labels(7),
        Condition("pooled_projections", torch.ones(1, 2)),
        Condition("class_labels", torch.ones(1, 2)),
    ],
)
def test_what_cannot_be_read_takes_the_best_on_average(condition):
    policy = select([[1.0, 0.0], [0.0, 1.0]], fallback=1)
    with pytest.warns(DiffusionCacheWarning, match="'b' is taken, the best on average"):
        assert chosen(policy, condition) == "b"
    by_text = select([[1.0, 0.0], [0.0, 1.0]], source="encoder_hidden_states", labels=())
    for values in (torch.ones(1, 3), torch.full((1, 2), torch.nan)):
        with pytest.warns(DiffusionCacheWarning, match="no known encoder_hidden_states"):
            assert chosen(by_text, Condition("encoder_hidden_states", values)) == "a"


def test_ranks_choose_alike():
    policy = select([[1.0, 0.0], [0.0, 1.0]], fallback=1)
    assert chosen(policy, labels(3), lambda values: values.flip(0)) == "b"
    with pytest.warns(DiffusionCacheWarning, match="on average"):
        assert chosen(policy, labels(3), lambda values: values * torch.nan) == "b"


def test_what_a_call_is_conditioned_on():
    text = torch.arange(24.0).view(2, 3, 4)
    found = condition_of({"encoder_hidden_states": text.bfloat16(), "pooled_projections": torch.ones(2, 5)})
    assert found.name == "encoder_hidden_states"
    assert found.values.dtype == torch.float32
    assert found.values.tolist() == [[4.0, 5.0, 6.0, 7.0], [16.0, 17.0, 18.0, 19.0]]
    assert condition_of({"class_labels": torch.tensor([3, 1000])}).values.tolist() == [3, 1000]
    pooled = torch.ones(2, 5)
    assert torch.equal(condition_of({"encoder_hidden_states": [text], "pooled_projections": pooled}).values, pooled)
    assert condition_of({"hidden_states": text, "class_labels": None, "timestep": torch.ones(2)}) is None


def test_scores_are_a_ridge_that_leaves_nothing_where_there_is_nothing():
    generator = np.random.default_rng(0)
    inputs = generator.normal(size=(64, 6))
    truth = generator.normal(size=(3, 6))
    weights, bias = scores(inputs, inputs @ truth.T + [1.0, 0.0, -1.0])
    np.testing.assert_allclose(weights, truth, atol=1e-2)
    np.testing.assert_allclose(bias, [1.0, 0.0, -1.0], atol=1e-2)
    noise = generator.normal(size=(64, 3))
    weights, bias = scores(inputs, noise)
    assert np.abs(weights).max() < 0.15
    np.testing.assert_allclose(bias, noise.mean(0), atol=0.05)


def test_prompts_that_tell_nothing_of_others_leave_nothing():
    """Each prompt has a taste of its own, by which its samples tell of each other, and not of other prompts'."""
    generator = np.random.default_rng(0)
    prompts, tastes = generator.normal(size=(16, 256)), generator.normal(size=(16, 3))
    inputs = np.repeat(prompts, 4, axis=0)
    targets = np.repeat(tastes, 4, axis=0) + 0.1 * generator.normal(size=(64, 3))
    alone, _ = scores(inputs, targets)
    together, bias = scores(inputs, targets, together=True)
    assert np.abs(together).max() < 0.01 < np.abs(alone).max()
    np.testing.assert_allclose(bias, targets.mean(0), atol=0.01)


@cache
def learned(name):
    """A profile with two plans of equal cost, and scores for them that class 3 and class 8 reverse."""
    found = plans.profile(name)
    levels = found.noise_levels
    found = found.with_plans([plan("early", "11111000", levels), plan("late", "10001111", levels)])
    pipe = reference.load(name)
    samples = [("3", 1), ("8", 2), ("3", 3), ("8", 4)]
    teachers = [teach(plans.batch(pipe, name, part)) for part in (samples[:2], samples[2:])]
    seen = see(teachers, found.plans)
    learnt = with_selector(found, seen, seen, [seed for _, seed in samples])
    wanted = torch.tensor([[1.0], [-1.0]])
    rows = {"class_labels": torch.eye(2), "encoder_hidden_states": reference.class_embeddings()[[3, 8]].mean(1)}
    source = learnt.facts["select"]["source"]
    both = rows[source]
    direction = both[0] - both[1]
    weights = wanted * direction / direction.square().sum()
    bias = -(weights @ both.mean(0))
    return learnt, replace(learnt, arrays={**learnt.arrays, "select_weights": weights, "select_bias": bias})


def strip(pipe):
    records = dc.summary(pipe).records
    return "".join(str(int(record.computed)) for record in records if record.pass_name in ("0", "cond"))


@pytest.mark.parametrize("name", ["dit-digits", "wan-moving-digits"])
def test_a_pipeline_runs_the_plan_of_its_prompt(name, tmp_path):
    learnt, reversed_ = learned(name)
    selector = Selector.of(learnt)
    assert [plan.name for plan in selector.choices[0].plans] == ["early", "late"]
    assert selector.choices[0].held_out.seeds == (1, 2, 3, 4)
    assert learnt.facts["select"]["choices"][0]["samples"] == 4
    reversed_.save(tmp_path)
    stored = Profile.load(tmp_path)
    pipe = reference.load(name)
    plain = {}
    for label, chosen_plan in (("3", "early"), ("8", "late")):
        with dc.cached(pipe, profile=stored, plan=chosen_plan):
            plain[label] = reference.images(name, plans.batch(pipe, name, [(label, 5)]).call())
    with warnings.catch_warnings():
        warnings.simplefilter("error", DiffusionCacheWarning)
        with dc.cached(pipe, policy="select", profile=stored):
            for label, mask in (("3", "11111000"), ("8", "10001111"), ("3", "11111000")):
                images = reference.images(name, plans.batch(pipe, name, [(label, 5)]).call())
                assert strip(pipe) == mask
                assert torch.equal(images, plain[label])
            assert "plan 'early'" in dc.summary(pipe).method
            plans.batch(pipe, name, [("8", 5), ("8", 6), ("3", 7)]).call()
            assert strip(pipe) == "10001111"


def test_scores_follow_the_measured_psnr():
    """With two classes and a strong preference, the ridge keeps the sign that was measured."""
    learnt, _ = learned("dit-digits")
    weights, bias = learnt.arrays["select_weights"], learnt.arrays["select_bias"]
    assert learnt.facts["select"]["labels"] == [3, 8]
    means = weights @ torch.eye(2) + bias[:, None]
    assert torch.allclose(means.sum(0), torch.zeros(2), atol=1e-4)  # PSNR over the mean of both plans
    assert Selector.of(learnt).choices[0].fallback == int(means.mean(1).argmax())


def seen(values, *names, classes=(3, 8)):
    """Plans of one evaluation less each, with these PSNRs of samples of the classes in turn."""
    made = [plan(name, "1" * (4 - place) + "0" * (4 + place)) for place, name in enumerate(names)]
    conditions = [labels(classes[sample % len(classes)], 1000) for sample in range(len(values))]
    return Seen(tuple(made), tuple(conditions), np.array(values, dtype=float))


def test_each_group_is_chosen_from_by_its_own_scores():
    """Two groups with opposite preferences; `nfe` takes the group of most evaluations that it allows."""
    dear = seen([[40, 30], [30, 42]] * 4, "a", "b")
    cheap = seen([[20, 26], [25, 20]] * 4, "c", "d")
    cheap = cheap._replace(plans=tuple(plan(made.name, "11000000") for made in cheap.plans))
    found = plans.profile("dit-digits").with_plans([*dear.plans, *cheap.plans])
    learnt = with_selector(with_selector(found, dear, dear, range(8)), cheap, cheap, range(8))
    policies = {nfe: Selection(nfe=nfe).parts(learnt).policy for nfe in (None, 4, 3.5, 2)}
    assert {nfe: [chosen(policy, labels(digit)) for digit in (3, 8)] for nfe, policy in policies.items()} == {
        None: ["a", "b"],
        4: ["a", "b"],
        3.5: ["d", "c"],
        2: ["d", "c"],
    }
    choices = Selector.of(learnt).choices
    assert [choice.plans[choice.fallback].name for choice in choices] == ["b", "d"]
    assert [choice.held_out.mean for choice in choices] == [41, 25.5]
    assert reached(policies[None], cheap._replace(plans=dear.plans)) == [20] * 8
    with pytest.raises(ConfigError, match=r"take 1 evaluations or fewer; there are 4, 2"):
        Selection(nfe=1).parts(learnt)


def test_shipped_choices_say_what_they_reach_on_samples_kept_apart():
    found = {name: Profile.load(path) for name, path in shipped_profiles().items() if name.endswith("-select")}
    assert "dit-digits-ddim-select" in found
    for name, profile in found.items():
        for choice in Selector.of(profile).choices:
            assert len({plan.nfe for plan in choice.plans}) == 1
            assert {plan.quality.seeds for plan in choice.plans} == {choice.held_out.seeds}, name
            assert min(choice.held_out.seeds) >= FITTING_SEEDS
            assert not set(choice.held_out.seeds) & {seed for _, seed in profile.samples}
            rows = zip(*(plan.quality.values for plan in choice.plans), strict=True)
            assert all(value in row for value, row in zip(choice.held_out.values, rows, strict=True))


def test_plans_that_do_best_together():
    values = np.array([[10.0, 14, 10, 13], [10, 8, 12, 12], [10, 9, 12, 12]])
    assert best_together(values, 2) == [0, 3]  # +3, +2, +2 against +4 for one kind alone
    assert best_together(values, 3) == [0, 3, 1]
    assert best_together(values, 4) == [0, 3, 1]  # nothing is left to gain
    assert best_together(values[:, :1], 2) == [0]


def test_a_plan_is_refitted_to_other_samples():
    """Its schedule and settings stay, and on the samples it is fitted to it does better than before."""
    name = "flux-digits"
    start = plan("start", "10100100", plans.profile(name).noise_levels)
    teacher = teach(plans.batch(reference.load(name), name, [("3", 1), ("3", 2)]))
    made = refitted(replace(start, facts={"ridge": 1e-2, "held_out_prompts": 60}), teacher, "for threes")
    assert made.name == "for threes"
    assert made.schedule == start.schedule
    assert (made.facts["ridge"], made.facts["refitted_on"]) == (1e-2, 2)
    assert made.held_out_prompts is None  # nothing was measured of it yet
    found = see([teacher], [start, made])
    assert (found.values[:, 1] > found.values[:, 0] + 0.5).all()
    # a plan that has weights goes halfway to those of the samples
    other = teach(plans.batch(reference.load(name), name, [("8", 3)]))
    halfway = (made.weights + refitted(replace(start, facts={"ridge": 1e-2}), other, "for eights").weights) / 2
    moved = refitted(made, other, "moved")
    torch.testing.assert_close(moved.weights, halfway, equal_nan=True)
    assert not torch.allclose(moved.weights, made.weights, equal_nan=True)
    # but for those that are for features of other steps
    nodes, weights = made.nodes.clone(), made.weights.clone()
    nodes[7, 0], weights[7, 0, 0] = torch.tensor([-1, 2, 5]), torch.tensor([0.0, -0.5, 1.5])
    apart = refitted(replace(made, nodes=nodes, weights=weights), other, "apart")
    assert torch.equal(apart.nodes, nodes)
    assert torch.equal(apart.weights[7], weights[7])
    torch.testing.assert_close(apart.weights[:7], halfway[:7], equal_nan=True)


def test_what_cannot_be_selected():
    learnt, _ = learned("dit-digits")
    pipe = reference.load("dit-digits")
    with pytest.raises(ConfigError, match="has not learned"):
        dc.enable(pipe, policy="select", profile=plans.profile("dit-digits"))
    with pytest.raises(ConfigError, match="plans from measurements"):
        dc.enable(pipe, policy="select")
    with pytest.raises(ConfigError, match="min_psnr comes from the method"):
        dc.enable(pipe, policy="select", profile=learnt, min_psnr=40)
    with pytest.raises(ConfigError, match=r"for the plans early, late, and it has late: learn them again"):
        Selection().parts(learnt.with_plans(learnt.plans[1:]))
    alike = seen([[40, 30]] * 2, "early", "late", classes=(3,))
    with pytest.raises(ConfigError, match="is the same for all calibration prompts"):
        with_selector(learnt, alike)
    with pytest.raises(ConfigError, match="two or more of the profile's plans to choose among, not early: it has"):
        with_selector(learnt, alike.only([0]))
    with pytest.raises(ConfigError, match="not early, other: it has early, late"):
        with_selector(learnt, seen([[40, 30]] * 2, "early", "other"))
    with pytest.raises(ConfigError, match="were learned for other prompts"):
        with_selector(learnt, seen([[40, 30]] * 2, "early", "late", classes=(3, 4)))
