"""Making plans: on shipped models, with few steps, samples and runs."""

import math
from dataclasses import replace
from itertools import combinations

import numpy as np
import plans
import pytest
import torch
from plans import STEPS

import diffusion_cache as dc
from diffusion_cache import reference
from diffusion_cache.context import Correction
from diffusion_cache.engine import session_of
from diffusion_cache.errors import ConfigError
from diffusion_cache.forecasters.fitted import Fit, Fitted
from diffusion_cache.plan import Speed
from diffusion_cache.planning import build
from diffusion_cache.planning.build import MAX_PSNR, Search, psnr
from diffusion_cache.profiling import trajectory
from diffusion_cache.profiling.generation import teach

NAME = "flux-digits"
BARE = Search(runs=1, fitted=False, refined=False)


@pytest.fixture(scope="module", autouse=True)
def quickly_timed():
    with plans.quickly_timed():
        yield


@pytest.fixture(scope="module")
def pipe():
    return reference.load(NAME)


@pytest.fixture(scope="module")
def planner(pipe):
    return plans.planner(NAME, pipe, plans.profile(NAME))


@pytest.fixture(scope="module")
def three(planner):
    return planner.plan(3)


def with_search(planner, **fields):
    """Another planner of the same samples; what was tried is not known to it."""
    return replace(planner, search=replace(planner.search, **fields), _scores={})


def test_a_plan_holds_what_was_asked_for(planner, three):
    plan = three
    assert (plan.name, plan.scope, plan.nfe, plan.total) == ("nfe-3", "stack", 3.0, STEPS)
    assert plan.schedule.nfe == 3
    assert plan.noise_levels == planner.profile.noise_levels
    assert torch.isfinite(plan.weights).any()
    assert (plan.facts["fitted_on"], plan.facts["tuned_on"]) == (2, 2)
    assert plan.quality.seeds == tuple(planner.seeds)
    assert plan.quality.n == 4
    assert 0 < plan.speed.low <= plan.speed.ratio <= plan.speed.high
    assert plan.speed.batch == 2
    assert session_of(planner.fitting.batch.pipe) is None
    # a profile takes it
    assert planner.profile.with_plans([plan]).plans == (plan,)


def test_fitted_weights_beat_taylor_on_held_out_samples(planner, three):
    bare = replace(three, nodes=torch.full_like(three.nodes, -1), weights=torch.full_like(three.weights, math.nan))
    taylor = planner.measured(bare)
    assert taylor.quality.seeds == three.quality.seeds
    better = [a - b for a, b in zip(three.quality.values, taylor.quality.values, strict=True)]
    assert sum(gain > 0 for gain in better) >= 3  # a sample may be level, which side depends on the processor
    assert sum(better) / len(better) > 0.25


def test_without_fitting_all_is_left_to_taylor(planner):
    plan = replace(planner, search=BARE, _scores={}).plan(3)
    assert torch.isnan(plan.weights).all()
    assert plan.facts["search"]["fitted"] is False


def test_planners_that_share_scores_do_not_take_taylors_for_those_of_weights(planner):
    bare = replace(planner, search=BARE, _scores={})
    bare.plan(3)
    taylor = dict(bare._scores)
    fitting = replace(bare, search=replace(BARE, fitted=True, regressors=False, polished=0))
    fitting.plan(3)
    gains = [bare._scores[steps, scope, True] - score for (steps, scope, _), score in taylor.items()]
    assert len(gains) == len(taylor) > 1
    assert sum(gains) / len(gains) > 0.25


def test_regressors_where_they_are_better(planner):
    """Tuned on the samples that they were fitted to, they are."""
    search = replace(planner.search, runs=1, refined=False, scopes=("denoiser",))
    here = replace(planner, tuning=planner.fitting, held_out=[planner.fitting], seeds=[1, 2], _scores={})
    plain, corrected = (replace(here, search=replace(search, regressors=flag)).plan(3) for flag in (False, True))
    assert (plain.correction, plain.facts["regressors"]) == (None, [])
    assert corrected.facts["regressors"] == ["scale"]
    assert corrected.correction.shape == (STEPS, 1, 1, 2, 1)
    assert torch.equal(torch.isfinite(corrected.correction[..., 0, 0]), torch.isfinite(corrected.weights).any(dim=3))
    assert not corrected.correction[..., 1, :].nan_to_num().any()
    assert corrected.quality.mean > plain.quality.mean


def test_more_computed_steps_are_better(planner):
    quick = replace(planner, search=BARE, _scores={})
    means = [quick.plan(computed).quality.mean for computed in (2, 5, 8)]
    assert means == sorted(means)
    assert means[-1] == pytest.approx(MAX_PSNR)


def test_moved_noise_levels_are_kept_where_they_score_higher(planner):
    """And a plan that was made before there was that option is known again."""
    moving = replace(planner, search=replace(BARE, sigmas=True), _scores={})
    plan = moving.plan(3)
    own, moved = plan.facts["sigmas"]["own"], plan.facts["sigmas"]["moved"]
    assert (plan.sigmas is None) == (moved <= own)
    assert moving.made(plan)
    assert not replace(planner, search=BARE).made(plan)
    search = {name: value for name, value in plan.facts["search"].items() if name != "sigmas"}
    earlier = replace(plan, facts={**plan.facts, "search": search})
    assert replace(planner, search=BARE).made(earlier)
    assert not moving.made(earlier)


def same(one, other):
    assert one.schedule == other.schedule
    for name, tensor in one.tensors().items():  # sums of floats depend on where they lie in memory
        torch.testing.assert_close(other.tensors()[name], tensor, rtol=1e-9, atol=1e-9, equal_nan=True)
    assert one.quality.values == pytest.approx(other.quality.values, abs=1e-3)
    return True


def test_an_interrupted_search_goes_on(planner, three):
    """What was run is not run again, and the plan is the one that another search, uninterrupted, has made."""
    told = []

    def interrupt(what, done, of):
        told.append(what)
        if len(told) == 12:  # the starts are run, and a few moves
            raise KeyboardInterrupt

    other = replace(planner, progress=interrupt, _scores={})
    with pytest.raises(KeyboardInterrupt):
        other.plan(3)
    assert session_of(planner.fitting.batch.pipe) is None
    known = dict(other._scores)
    assert known
    assert same(three, other.plan(3))
    assert all(other._scores[key] == score for key, score in known.items())


def test_starts_compute_as_many_steps_as_asked_for(planner):
    for computed in range(1, STEPS + 1):
        starts = planner.starts(computed)
        assert len(set(starts)) == len(starts) > 0
        assert all(len(start) == computed and start[0] == 0 for start in starts)
    assert (0, 2, 4, 6) in planner.starts(4)
    with_last = with_search(planner, last=2)
    assert all({0, 6, 7} <= set(start) for start in with_last.starts(4))


def test_a_search_starts_from_the_least_sum_of_powers_of_gaps(planner):
    """Though the first step is never reused, which damages are infinite at."""
    damage = np.random.default_rng(19).random((STEPS, STEPS, STEPS))
    damage[..., 0] = math.inf
    chosen = replace(planner)
    vars(chosen)["_damage"] = damage

    def powers(steps):
        edges = zip((-1, *steps), steps, (*steps[1:], STEPS), strict=False)
        return sum(damage[h + 1, i, i + 1 : j].sum() ** 2 for h, i, j in edges)

    for computed in (3, 4, 5):
        every = [(0, *rest) for rest in combinations(range(1, STEPS), computed - 1)]
        assert min(every, key=powers) in chosen.starts(computed)


def test_what_a_profile_has_wrong_is_told_of_rather_than_left_out(planner):
    broken = replace(planner)
    vars(broken)["_damage"] = np.full((STEPS, STEPS, STEPS), math.nan)
    with pytest.raises(ConfigError, match="damages must be numbers"):
        broken.starts(3)


def test_a_search_starts_from_the_steps_of_the_nearest_plans(planner):
    """A plan with more steps adds to those of a cheaper one, and a cheaper one leaves some out."""
    odd = planner.fitted((0, 5, 6), "nfe-3")
    known, unknown = replace(planner, profile=planner.profile.with_plans([odd])), replace(planner)
    for computed in (2, 4, 5):
        starts = known.starts(computed)
        assert any({0, 5, 6} < set(start) or set(start) < {0, 5, 6} for start in starts)
        assert set(unknown.starts(computed)) <= set(starts)
    assert not any({0, 5, 6} < set(start) for start in unknown.starts(4))


def test_a_planner_knows_the_steps_of_plans_that_it_has_made(planner, three):
    made = planner._schedules[3]
    assert made == three.schedule.computed
    profile = planner.profile.with_plans([three])
    assert planner.starts(4) == replace(planner, profile=profile).starts(4)


def test_last_steps_stay_computed(planner):
    plan = replace(planner, search=replace(BARE, last=2), _scores={}).plan(3)
    assert [step for step in range(STEPS) if plan.schedule.row(step, 0)[0]] == [0, 6, 7]


def test_the_best_scope_is_taken(planner):
    """Both are tried; what a plan states was measured where it caches."""
    scopes = ("stack", "denoiser")
    both = replace(planner, search=replace(BARE, scopes=scopes), _scores={})
    made = both.plan(4)
    best = {scope: max(score for (_, where, _), score in both._scores.items() if where == scope) for scope in scopes}
    assert best["stack"] != best["denoiser"]
    assert made.scope == max(scopes, key=best.get)


def test_a_span_without_residual_is_planned_by_its_output():
    """And a reused step of a cut costs what lies outside it."""
    name = "unet-digits"
    profile = plans.profile(name)
    assert (profile.scope, profile.spans[0].feature) == ("cut", "output")
    arrays = {**profile.arrays, "gram_residual": torch.full_like(profile.arrays["gram_residual"], math.nan)}
    planner = plans.planner(name, reference.load(name), replace(profile, arrays=arrays), BARE, held_out=2)
    assert planner.starts(4)
    share = profile.spans[0].share
    assert 0.5 < share < 1
    assert planner.nfe(4) == pytest.approx(4 + 4 * (1 - share))
    assert planner.nfe(4, "denoiser") == 4
    assert planner.nfe(STEPS) == STEPS
    assert planner.plan(4).nfe == pytest.approx(planner.nfe(4))


def test_branches_in_rows_have_weights_of_their_own():
    name = "dit-digits"
    planner = plans.planner(name, reference.load(name), plans.profile(name), held_out=2)
    found = planner.fitted((0, 2, 4, 6), "even")
    assert (found.row_passes, found.passes) == (2, 2)
    given = torch.isfinite(found.weights).all(dim=(2, 3))  # [T, P]
    assert given.any()
    assert (given[:, 0] == given[:, 1]).all()
    assert not torch.equal(found.weights[:, 0].nan_to_num(), found.weights[:, 1].nan_to_num())


def test_a_plan_is_known_again(planner, three, tmp_path):
    planner.profile.with_plans([three]).save(tmp_path)
    (stored,) = type(planner.profile).load(tmp_path).plans
    assert planner.made(stored)
    assert not with_search(planner, runs=7).made(stored)
    assert not replace(planner, held_out=planner.held_out[:1], seeds=planner.seeds[:2]).made(stored)
    assert not planner.made(replace(stored, quality=None))
    of_prompts = replace(stored, facts={**stored.facts, "origin": "a"})
    assert [replace(planner, origin=origin).made(of_prompts) for origin in ("a", "b")] == [True, False]
    assert not replace(planner, origin="a").made(stored)


@pytest.mark.parametrize("computed", [0, STEPS + 1])
def test_numbers_that_cannot_be(planner, computed):
    with pytest.raises(ConfigError, match=f"of {STEPS} steps, 1 to {STEPS} can be computed, not {computed}"):
        planner.plan(computed)


def test_a_speed_of_another_device_or_batch_is_measured_anew(planner, three):
    assert planner.timed_here(three) is three
    for other in ({"device": "NVIDIA H100"}, {"batch": 3}):
        stored = replace(three, speed=Speed(**{**vars(three.speed), "ratio": 50.0, "high": 60.0, **other}))
        found = planner.timed_here(stored)
        assert found.speed.ratio < 50
        assert (found.speed.device, found.speed.batch) == (three.speed.device, three.speed.batch)
        assert same(found, stored)


def test_a_speed_is_of_the_device_that_a_pipeline_executes_on(planner, three, monkeypatch):
    """Offloaded weights lie elsewhere."""
    pipe = planner.held_out[-1].batch.pipe
    monkeypatch.setattr(type(pipe), "device", torch.device("meta"))
    monkeypatch.setattr(type(pipe), "_execution_device", torch.device("cpu"))
    assert planner.timed_here(three) is three


def test_speed_is_known_before_a_plan_is_made(planner, monkeypatch):
    monkeypatch.setattr(build, "TIMED_PAIRS", 5)  # for the machine may be busy
    slow, fast = planner.timed(STEPS - 1, None), planner.timed(1, None)
    assert slow.ratio < fast.ratio
    assert session_of(planner.fitting.batch.pipe) is None


def test_samples_that_are_not_of_the_profile(pipe, planner):
    other = teach(plans.batch(pipe, NAME, plans.drawn(0, 2), STEPS + 1))
    with pytest.raises(ConfigError, match=f"profile has {STEPS} steps and the generation {STEPS + 1}"):
        replace(planner, tuning=other)
    with pytest.raises(ConfigError, match="3 seeds"):
        replace(planner, seeds=planner.seeds[:3])
    with pytest.raises(ConfigError, match="0 held-out samples"):
        replace(planner, held_out=[], seeds=[])
    with pytest.raises(ConfigError, match="1 guidance branches and the profile 2"):
        replace(planner, profile=replace(plans.profile("dit-digits"), fingerprint=planner.profile.fingerprint))
    shifted = reference.load(NAME)
    shifted.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, shift=1.0)
    moved = teach(plans.batch(shifted, NAME, plans.drawn(0, 2)))
    with pytest.raises(ConfigError, match="other noise levels"):
        replace(planner, fitting=moved)
    with pytest.raises(ConfigError, match="make one at scope cut"):
        with_search(planner, scopes=("cut",))
    with pytest.raises(ConfigError, match="a cache of branches spares is not in this profile, of scope stack"):
        with_search(planner, scopes=("stack", "branch"))


def test_a_generation_at_another_guidance_or_size(planner):
    """Plans do not say what they were made at: that is the profile's."""
    fingerprint = planner.profile.fingerprint
    guidance, size = fingerprint.guidance, fingerprint.sample_shape
    assert guidance in planner.fitting.guidance_scales
    with pytest.raises(ConfigError, match=f"generation is at guidance 7 and the profile at {guidance:g}"):
        replace(planner, tuning=replace(planner.tuning, guidance_scales=(7.0,)))
    replace(planner, tuning=replace(planner.tuning, guidance_scales=(7.0, guidance)))
    replace(planner, tuning=replace(planner.tuning, guidance_scales=()))  # of one's own loop
    larger = replace(planner.profile, fingerprint=replace(fingerprint, sample_shape=(*size[:-1], 2 * size[-1])))
    with pytest.raises(ConfigError, match="profile again at this size"):
        replace(planner, profile=larger)


def test_tables_and_tensors_say_the_same():
    table = {
        (3, 0, 0): Fit((0, 2), (-0.5, 1.5)),
        (3, 0, 1): Fit((0, 2), (-0.25, 1.25)),
        (3, 1, 0): Fit((2,), (1.0,)),
        (5, 1, 1): Fit((0, 2, 4), (0.1, -0.1, 1.0)),
    }
    nodes, weights, correction = Fitted(table, 3, (0, 1), 2).as_tensors(6, 2)
    assert correction is None
    assert (nodes.shape, weights.shape) == ((6, 2, 3), (6, 2, 2, 3))
    assert nodes[3].tolist() == [[-1, 0, 2], [-1, -1, 2]]
    assert weights[3, 1, 0].tolist() == [0.0, -0.25, 1.25]
    assert torch.isnan(weights[3, 1, 1]).all()
    assert nodes[4].tolist() == [[-1] * 3] * 2
    assert torch.isnan(weights[4]).all()
    table[3, 1, 0] = Fit((2,), (1.0,), Correction((1.5, 0.5), (0.0, -1.0)))
    _, _, correction = Fitted(table, 3, (0, 1), 2).as_tensors(6, 2)
    assert correction.shape == (6, 2, 2, 2, 2)
    assert correction[3, 0, 1].tolist() == [[1.5, 0.5], [0.0, -1.0]]
    assert torch.isfinite(correction).sum() == 4


def test_psnr():
    reference_images = torch.full((3, 1, 1, 2, 2), 0.5)
    images = reference_images.clone()
    images[1] += 0.1
    images[2] = 7.0  # clamped to 1
    assert psnr(images, reference_images) == pytest.approx([MAX_PSNR, 20.0, -10 * math.log10(0.25)], abs=1e-5)


def test_what_was_enabled_stays_enabled(pipe, planner):
    session = dc.enable(pipe, "interval", every=2)
    try:
        replace(planner, search=BARE, _scores={}).plan(4)
        assert session_of(pipe) is session
    finally:
        dc.disable(pipe)


def test_a_plan_carries_a_guard_where_it_is_asked_for(planner, three):
    watching = replace(planner, search=replace(BARE, guard="input_l1"), _scores={})
    plan = watching.plan(3)
    assert (plan.guard.signal, plan.guard.samples) == ("input_l1", 2)
    assert watching.made(plan)
    assert three.guard is None
    assert not watching.made(three)
    with pytest.raises(ConfigError, match="Unknown guard signal 'input'"):
        replace(BARE, guard="input")
    one = teach(plans.batch(planner.tuning.batch.pipe, NAME, plans.drawn(200, 1)))
    with pytest.raises(ConfigError, match="measured on the tuning samples: give at least 2"):
        replace(watching, tuning=one)


def test_steps_that_are_computed_anyway_are_counted(planner):
    """A denoiser that begins within the run has nothing to go on: no plan is given its step for free."""
    fitting = replace(planner.fitting, begun=(0, 5))
    late = replace(planner, fitting=fitting, search=replace(BARE, runs=12, refined=True), _scores={})
    assert late.least == 2
    for computed in range(2, STEPS + 1):
        starts = late.starts(computed)
        assert starts
        assert all({0, 5} <= set(start) and len(start) == computed for start in starts)
    assert (0, 5) in late.starts(2)
    plan = late.plan(3)
    assert plan.nfe == 3
    assert len(late._scores) > 5
    assert all({0, 5} <= set(steps) for steps, _, _ in late._scores)
    with pytest.raises(ConfigError, match=f"of {STEPS} steps, 2 to {STEPS} can be computed, not 1"):
        late.plan(1)
    with pytest.raises(ConfigError, match="begins at step 5"):
        late.fitted((0, 3), "three")


def test_a_plan_tells_of_how_many_prompts_its_samples_are(planner, three):
    texts = replace(planner, prompts=2)
    found = texts.measured(three)
    assert (found.held_out_prompts, three.held_out_prompts) == (2, None)
    assert texts.made(found)
    assert texts.made(three)


def test_a_plan_knows_the_texts_that_it_was_fitted_on(planner, three, tmp_path):
    known = replace(planner, fitted_prompts={"a cat", "a dog"})
    planner.profile.with_plans([known.fitted((0, 3), "texts")]).save(tmp_path)
    (stored,) = type(planner.profile).load(tmp_path).plans
    assert [stored.is_fitted_to(one) for one in ("a cat", "a dog", "a cow")] == [True, True, False]
    more = stored.fitted_to(["a cow"])
    assert [more.is_fitted_to(one) for one in ("a cat", "a cow")] == [True, True]
    assert not three.is_fitted_to("a cat")
    assert known.made(three)  # what says nothing of it is not made again


def test_weights_are_nudged_as_the_models_precision_wants_it(planner, monkeypatch):
    told = []

    def polish(forecaster, *args, nudge, **options):
        told.append(nudge)
        return forecaster

    monkeypatch.setattr(build, "polish", polish)
    for dtype in (torch.bfloat16, torch.float32):
        monkeypatch.setattr(build, "dtype_of", lambda pipe, dtype=dtype: dtype)
        planner._polished((0, 3), Fitted(), planner._settings("stack"), "three")
    assert told == [0.25, 1e-2]


def test_samples_weighed_by_their_error_are_tried_once(planner, monkeypatch):
    """With the best strengths, and kept where the tuning batch gains."""
    fits = []

    def fit(self, steps, settings):
        fits.append(settings)
        return trajectory.Result(Fitted(), torch.zeros(0), {}, {})

    monkeypatch.setattr(build.Planner, "_fit", fit)
    for gain in (1.0, -1.0):
        monkeypatch.setattr(
            build.Planner, "_tuning_score", lambda self, policy, weights, s, gain=gain: gain * s.robust - s.ridge
        )
        fits.clear()
        start = planner._settings("stack")
        _, _, chosen = planner._tuned([(0, 3), (0, 4)], start, "two")
        assert chosen == replace(start, robust=gain > 0)
        assert [settings.robust for settings in fits] == [False] * (len(fits) - 1) + [True]
        assert fits[-1] == replace(start, robust=True)
