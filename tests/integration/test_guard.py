"""Plans with a guard, in real generations."""

from dataclasses import replace

import plans
import pytest
import torch

import diffusion_cache as dc
from diffusion_cache import reference
from diffusion_cache.engine import session_of
from diffusion_cache.errors import ConfigError
from diffusion_cache.planning.band import with_guard

STEPS = plans.STEPS
SAMPLES = [("3", 5), ("8", 6), ("1", 7)]
NAMES = ("dit-digits", "flux-digits")


@pytest.fixture(scope="module", params=NAMES)
def guarded(request):
    """Name, pipeline and a plan of 4 computed steps with a band."""
    name = request.param
    pipe = reference.load(name)
    plan = plans.planned(name, computed=(4,)).plans[0]
    return name, pipe, with_guard(plan, "input_turn", [plans.batch(pipe, name, plans.drawn(400, 4))])


def generate(name, pipe, samples=SAMPLES, guidance=None):
    labels, seeds = [int(label) for label, _ in samples], [seed for _, seed in samples]
    return reference.images(name, pipe(**reference.inputs(name, labels, seeds, STEPS, guidance)))


def computed(pipe):
    return [record.computed for record in dc.summary(pipe).records]


def test_the_band_is_measured_along_the_plans_path(guarded):
    _, _, plan = guarded
    band = plan.guard
    assert band.samples == 4
    assert len(band.mean) == STEPS
    # a change of the change takes two steps before it
    assert [mean > 0 for mean in band.mean] == [False, False] + [True] * (STEPS - 2)
    assert all(spread > 0 for spread in band.spread[2:])


def test_in_its_band_a_generation_is_the_plans(guarded):
    name, pipe, plan = guarded
    with dc.cached(pipe, plan=plan):
        expected, strip = generate(name, pipe), computed(pipe)
    with dc.cached(pipe, plan=plan, guard="input_turn", guard_factor=1e9):
        found = generate(name, pipe)
        assert torch.equal(found, expected)
        assert computed(pipe) == strip
        assert "guard" not in {record.reason.split(" ")[0] for record in dc.summary(pipe).records}


def test_a_disturbed_generation_moves_steps_and_computes_as_many(guarded):
    name, pipe, plan = guarded
    with dc.cached(pipe, plan=plan, ignore=()):
        generate(name, pipe, SAMPLES[:1], guidance=6.0)
        strip = computed(pipe)
    with dc.cached(pipe, plan=plan, guard="input_turn", guard_factor=1.0):
        generate(name, pipe, SAMPLES[:1], guidance=6.0)
        assert computed(pipe) != strip
        assert sum(computed(pipe)) == sum(strip)
        assert any(record.reason.startswith("guard (input_turn") for record in dc.summary(pipe).records)
        assert "guard" in str(dc.summary(pipe))
    with dc.cached(pipe, plan=plan, guard="input_turn", guard_factor=1.0, strict=True):
        generate(name, pipe, SAMPLES[:1], guidance=6.0)
        more = computed(pipe)
        assert sum(more) > sum(strip)
        assert all(now or not before for now, before in zip(more, strip, strict=True))


def test_samples_of_a_batch_are_watched_apart(guarded):
    """Each goes as it would alone, though some leave their band and others do not."""
    name, pipe, plan = guarded
    with dc.cached(pipe, plan=plan, guard="input_turn", guard_factor=1.0):
        together = generate(name, pipe)
        apart, hits = [], []
        for sample in SAMPLES:
            apart.append(generate(name, pipe, [sample]))
            hits.append(sum("guard" in record.reason for record in dc.summary(pipe).records))
    assert len(set(hits)) > 1
    assert torch.allclose(together, torch.cat(apart), atol=2e-4)


def test_two_runs_are_identical(guarded):
    name, pipe, plan = guarded
    with dc.cached(pipe, plan=plan, guard="input_turn", guard_factor=1.0, granularity="batch"):
        first = generate(name, pipe)
        assert torch.equal(generate(name, pipe), first)
        hits = [record for record in dc.summary(pipe).records if "guard" in record.reason]
        assert hits
        assert all(record.spans_reused == 0 for record in hits)


def test_a_batch_computes_as_many_steps_as_the_plan(guarded):
    """All of its samples give one up for a step that one of them asks for."""
    name, pipe, plan = guarded
    with dc.cached(pipe, plan=plan):
        generate(name, pipe)
        strip = computed(pipe)
    with dc.cached(pipe, plan=plan, guard="input_turn", guard_factor=1.0, granularity="batch"):
        generate(name, pipe)
        assert any("guard" in record.reason for record in dc.summary(pipe).records)
        assert sum(computed(pipe)) == sum(strip)


def test_other_steps_switch_the_guard_off(guarded):
    name, pipe, plan = guarded
    with dc.cached(pipe, plan=plan, guard="input_turn"):
        with pytest.warns(dc.DiffusionCacheWarning, match="nor does the band of its guard, which is off"):
            pipe(**reference.inputs(name, [3], [5], STEPS + 4))
        assert session_of(pipe).last_run.decisions.guarded.drift is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guard": "input_l1"}, "carries no guard 'input_l1', but 'input_turn'"),
        ({"guard": "turn"}, "Unknown guard signal 'turn'"),
        ({"strict": True}, "strict says how a guard works: name its signal too"),
        ({"guard_factor": 3.0}, "guard_factor says how a guard works"),
        ({"guard": "input_turn", "guard_factor": 0}, "guard_factor must be a number above 0"),
    ],
)
def test_refused_options(guarded, options, message):
    _, pipe, plan = guarded
    with pytest.raises(ConfigError, match=message):
        dc.enable(pipe, plan=plan, **options)


def test_refused_without_a_band(guarded):
    _, pipe, plan = guarded
    with pytest.raises(ConfigError, match="`diffusion-cache plan --guard input_turn` makes plans that do"):
        dc.enable(pipe, plan=replace(plan, guard=None), guard="input_turn")
    with pytest.raises(ConfigError, match="guard needs a profile"):
        dc.enable(pipe, guard="input_turn")
