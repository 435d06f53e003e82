"""Schedules from ratios, against the rule carried out by hand."""

import math
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from diffusion_cache.errors import ConfigError
from diffusion_cache.policies import MagCache
from diffusion_cache.policies.ratios import ratios_of
from diffusion_cache.profile import Profile, shipped_profiles

LEVELS = (-4.0, -2.0, 0.0, 2.0)


def text(schedule, position=0):
    return "".join(str(int(schedule.row(step, position)[0])) for step in range(schedule.total))


def by_hand(ratios, threshold, max_skip, kept):
    """E and ρ as the paper writes them, once for each run of reused steps."""
    done, last = [0], 0
    for step in range(1, len(ratios)):
        run = ratios[last + 1 : step + 1]
        error = sum(abs(1 - math.prod(run[: i + 1])) for i in range(len(run)))
        if step in kept or error > threshold or step - last > max_skip:
            done.append(step)
            last = step
    return done


def test_against_the_rule_by_hand():
    rng = random.Random(0)
    for _ in range(100):
        ratios = [1.0] + [rng.uniform(0.8, 1.2) for _ in range(rng.randint(1, 20))]
        options = dict(threshold=rng.choice([0.0, 0.1, 0.5, 2.0]), max_skip=rng.choice([0, 1, 3, 50]))
        retention, always = rng.choice([0.0, 0.2, 1.0]), (rng.randrange(len(ratios)),)
        kept = {*range(math.floor(retention * len(ratios) + 0.5)), *always}
        schedule = MagCache(ratios, retention=retention, always=always, **options).schedule(len(ratios))
        assert [s for s in range(len(ratios)) if schedule.row(s, 0)[0]] == by_hand(ratios, **options, kept=kept)


def test_a_ratio_far_from_one_computes_its_step():
    policy = MagCache((1.0, 1.0, 1.5, 1.0), threshold=9.0, max_skip=9, retention=0.0, max_deviation=0.25)
    assert text(policy.schedule(4)) == "1010"


def test_each_pass_has_ratios_of_its_own_and_further_ones_the_last():
    policy = MagCache(((1.0, 1.0, 2.0, 1.0), (1.0, 2.0, 1.0, 1.0)), threshold=0.5, max_skip=9, retention=0.0)
    schedule = policy.schedule(4)
    assert [text(schedule, position) for position in range(3)] == ["1010", "1100", "1100"]


def test_other_steps_take_the_ratio_of_the_nearest_share_of_the_run():
    policy = MagCache((1.0, 2.0, 1.0, 1.0), threshold=0.5, max_skip=9, retention=0.0, always=(3,))
    # eight steps stand at 0, 0.43, 0.86, 1.29, 1.71, 2.14, 2.57 and 3
    assert text(policy.schedule(8)) == "10110011"
    assert policy.for_run([1.0] * 8) is policy  # whose ratios are of unknown noise levels


def test_other_noise_levels_take_the_ratio_of_the_nearest():
    options = dict(threshold=0.5, max_skip=9, retention=0.0)
    policy = MagCache((1.0, 1.0, 1.0, 2.0), levels=LEVELS, **options)
    assert text(policy.for_run(LEVELS).schedule(4)) == "1001"
    assert text(policy.for_run([-4.0, 1.5, 1.75, 0.0]).schedule(4)) == "1111"
    assert text(policy.for_run([-math.inf, -3.5, -1.0, 0.5, 1.5, math.inf]).schedule(6)) == "100011"
    assert policy.for_run([]) is policy
    assert text(policy.schedule(4)) == "1001"


def test_ratios_of_a_profile():
    profile = Profile.from_pretrained(shipped_profiles()["flux-digits-flow-euler"])
    policy = MagCache.from_profile(profile, threshold=0.3)
    assert (policy.threshold, policy.levels) == (0.3, profile.noise_levels)
    measured = profile.arrays["norm_ratio"][:, 0].tolist()
    for step, ratio in enumerate(policy.streams[0]):
        spans = [one[step] if step else 1.0 for one in measured]
        assert ratio == pytest.approx(max(spans, key=lambda value: abs(math.log(value))))
    # two branches in the rows of each of two calls: of them, as of spans, the ratio furthest from 1
    arrays = {"norm_ratio": torch.tensor([[[1.0, 1.1], [1.0, 0.5], [1.0, 1.2], [1.0, 1.1]], [[1.0, 1.3]] * 4])}
    assert ratios_of(SimpleNamespace(arrays=arrays, row_passes=2), "magcache") == (
        (1.0, pytest.approx(0.5)),
        (1.0, pytest.approx(1.3)),
    )
    without = {name: array for name, array in profile.arrays.items() if name != "norm_ratio"}
    with pytest.raises(ConfigError, match="the profile holds no norm_ratio"):
        MagCache.from_profile(replace(profile, arrays=without))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratios": ()}, "ratios must be numbers above 0"),
        ({"ratios": (1.0, 0.0)}, "ratios must be numbers above 0"),
        ({"ratios": ((1.0, 1.0), (1.0,))}, "ratios must be numbers above 0"),
        ({"ratios": (1.0, math.nan)}, "ratios must be numbers above 0"),
        ({"ratios": (1.0, 1.0), "levels": (1.0,)}, "1 levels for 2 ratios"),
        ({"ratios": (1.0,), "threshold": -1.0}, "threshold, max_skip"),
        ({"ratios": (1.0,), "max_skip": -1}, "threshold, max_skip"),
        ({"ratios": (1.0,), "retention": 1.5}, "retention from 0 to 1"),
        ({"ratios": (1.0, 1.0), "always": (-1,)}, "always must be steps of the ratios, from 0 to 1"),
        ({"ratios": ((1.0, 1.0),) * 3, "always": (2,)}, "always must be steps of the ratios, from 0 to 1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ConfigError, match=message):
        MagCache(**options)
