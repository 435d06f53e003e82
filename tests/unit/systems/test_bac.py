"""BAC: its scheduler, its union, and what runs."""

from contextlib import ExitStack
from dataclasses import replace
from itertools import combinations

import grams
import plans
import pytest
import torch

import diffusion_cache as dc
from diffusion_cache import reference
from diffusion_cache.context import branch_kind
from diffusion_cache.errors import ConfigError
from diffusion_cache.measure import count_blocks, executed_flops
from diffusion_cache.models import find_layout
from diffusion_cache.systems import BAC
from diffusion_cache.systems.bac import bubbling_union, similarity, spread, update_steps

MODEL = "dit-digits"


@pytest.fixture(scope="module")
def pipe():
    return reference.load(MODEL)


@pytest.fixture(scope="module")
def profile():
    return plans.profile(MODEL, scope="branch")


def gram(steps, seed=0, width=24):
    """Of features on a random walk, [1, 1, steps, steps]."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(steps, width, generator=generator, dtype=torch.float64).cumsum(0)
    return (features @ features.T)[None, None]


def total(alike, steps):
    """Σ_t S[a(t), t]."""
    ends = [*sorted(steps)[1:], len(alike)]
    return sum(alike[a, a:b].sum().item() for a, b in zip(sorted(steps), ends, strict=True))


def update_sets(plan):
    """Computed steps of each span."""
    return [set(column.nonzero().flatten().tolist()) for column in plan.computed()[:, 0].T]


@pytest.mark.parametrize("updates", [1, 2, 4, 8, 9])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_scheduler_finds_what_trying_all_finds(updates, seed):
    alike = similarity(gram(9, seed))[0]
    best = max(total(alike, (0, *rest)) for rest in combinations(range(1, 9), updates - 1))
    found = update_steps(alike, updates)
    assert len(found) == updates
    assert 0 in found
    assert total(alike, found) == pytest.approx(best, abs=1e-12)


def test_similarity_is_the_cosine_averaged_over_passes():
    one, other = gram(5, 3), gram(5, 4)
    found = similarity(torch.cat([one, 100 * other], dim=1))
    norms = [each[0, 0].diagonal().sqrt() for each in (one, other)]
    cosines = [each[0, 0] / size.outer(size) for each, size in zip((one, other), norms, strict=True)]
    torch.testing.assert_close(found[0], (cosines[0] + cosines[1]) / 2)
    assert torch.equal(similarity(torch.zeros(1, 1, 3, 3)), torch.ones(1, 3, 3).double())  # of a branch that never ran


def test_spread_is_the_mean_distance_between_outputs():
    features = torch.randn(2, 7, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)  # passes, steps
    differences = [(one[a] - one[b]).square().mean().sqrt() for one in features for a, b in combinations(range(7), 2)]
    expected = torch.stack(differences).mean()
    found = spread((features @ features.mT)[None], [6])
    torch.testing.assert_close(found, expected[None])


def test_the_union_takes_over_updates_of_feed_forwards_behind_and_passes_them_on():
    # in the order they run: attention, feed-forward, attention, feed-forward, feed-forward
    steps = [frozenset(each) for each in ({0, 1}, {0, 2}, {0, 3}, {0, 4}, {0, 5})]
    assert bubbling_union(steps, [], [1, 3, 4]) == steps
    assert bubbling_union(steps, [2], [1, 3, 4]) == [*steps[:2], {0, 3, 4, 5}, *steps[3:]]
    # attention 0 gets what feed-forward 1 has taken over; attention 2 is no feed-forward and passes nothing on
    assert bubbling_union(steps, [0, 1, 2], [1, 3, 4]) == [{0, 1, 2, 4, 5}, {0, 2, 4, 5}, {0, 3, 4, 5}, *steps[3:]]
    assert bubbling_union(steps, [4], [1, 3, 4]) == steps  # nothing runs behind it


ATTENTION = {"flux-digits": "FluxAttention", "wan-moving-digits": "WanAttention"}


@pytest.mark.parametrize("model", sorted(reference.MODELS))
def test_feed_forwards_are_told_from_attention_by_name(model):
    spans = find_layout(reference.spec(model).build(), "branch").spans
    kinds = {(type(span.members[0]).__name__, branch_kind(span.name) == "feed-forward") for span in spans}
    assert kinds == {("FeedForward", True), (ATTENTION.get(model, "Attention"), False)}


def test_the_plan_extends_the_worst_branches_and_no_others(profile):
    alone, united = BAC(updates=3, upstream=0).plan(profile), BAC(updates=3, upstream=2).plan(profile)
    apart = spread(profile.arrays["gram_output"], [span.elements for span in profile.spans])
    worst = set(apart.argsort(descending=True)[:2].tolist())
    assert united.facts["upstream"] == [profile.spans[place].name for place in sorted(worst)]
    alike = similarity(profile.arrays["gram_output"])
    before, after = update_sets(alone), update_sets(united)
    assert before == [set(update_steps(values, 3)) for values in alike]
    assert len({frozenset(steps) for steps in before}) > 1
    for place, (few, more) in enumerate(zip(before, after, strict=True)):
        assert few <= more if place in worst else few == more
    assert alone.schedule.nfe == pytest.approx(3)
    assert united.nfe > alone.nfe > 3  # what is no branch is computed at every step


def test_it_goes_by_the_feature_that_is_reused():
    """A profile may be of residuals, however alike the outputs are."""
    features = torch.tensor([[[1.0, 0], [1, 0], [1, 0], [0, 1]], [[1.0, 0], [0, 1], [0, 1], [0, 1]]])
    profile = grams.profile_of(features, "branch", names=["0.attn", "0.ff"], feature="residual")
    profile = replace(profile, arrays={**profile.arrays, "gram_output": torch.ones(2, 1, 4, 4)})
    plan = BAC(updates=2, upstream=0).plan(profile)
    assert update_sets(plan) == [{0, 3}, {0, 1}]


def test_one_schedule_for_all(profile):
    plan = BAC(updates=3, unified=True).plan(profile)
    mean = similarity(profile.arrays["gram_output"]).mean(dim=0)
    assert {frozenset(steps) for steps in update_sets(plan)} == {update_steps(mean, 3)}


def test_what_runs_is_the_plan(pipe, profile):
    """Branches run as often as planned, a reused output is the last computed one, and the plan's NFE are the work."""
    plan = BAC(updates=3, upstream=2).plan(profile)
    branches = [span.members[0] for span in find_layout(pipe.transformer, "branch").spans]
    inputs = reference.inputs(MODEL, [3, 7], [0, 1], steps=plans.STEPS)

    def generate():
        again = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
        return pipe(**{**inputs, "generator": again}).images

    full = executed_flops(generate)
    uncached = generate()
    with dc.cached(pipe, method="bac", profile=profile, updates=3, max_reused=0):
        assert torch.equal(generate(), uncached)
    with dc.cached(pipe, method="bac", profile=profile, updates=3, upstream=2), count_blocks(branches) as counted:
        found = generate()
        assert counted.per_block == [len(steps) for steps in update_sets(plan)]
        assert dc.summary(pipe).unfitted == 0
        assert executed_flops(generate) / full == pytest.approx(plan.nfe / plan.total, rel=1e-6)

    with ExitStack() as stack:
        for module, steps in zip(branches, update_sets(plan), strict=True):
            stack.enter_context(by_hand(module, steps))
        expected = generate()
    torch.testing.assert_close(found, expected)
    assert torch.equal(generate(), uncached)
    assert not torch.allclose(found, uncached)


class by_hand:
    """A module that returns what it last gave, except at the calls of these numbers."""

    def __init__(self, module, calls):
        self.module, self.calls = module, calls

    def __enter__(self):
        original, count, last = self.module.forward, iter(range(1000)), [None]

        def forward(*args, **kwargs):
            if next(count) in self.calls:
                last[0] = original(*args, **kwargs)
            return last[0]

        self.module.forward = forward

    def __exit__(self, *error):
        del self.module.forward


def test_bad_settings(pipe, profile):
    for options, message in (
        ({"updates": 0}, "updates ≥ 1 .*updates=0"),
        ({"upstream": -1}, "upstream ≥ 0: .*upstream=-1"),
        ({"updates": plans.STEPS + 1}, "updates must be from 1 to the run's 8 steps"),
        ({"unified": 1}, "unified must be bool, not 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            dc.enable(pipe, method="bac", profile=profile, **options)
    with pytest.raises(ConfigError, match="scope branch"):
        dc.enable(pipe, method="bac", profile=plans.profile(MODEL))
    two = replace(profile, spans=(replace(profile.spans[0], denoiser="transformer_2"), *profile.spans[1:]))
    with pytest.raises(ConfigError, match="one denoiser"):
        BAC().plan(two)
