from dataclasses import replace
from functools import cache

import plans
import pytest
import torch

import diffusion_cache as dc
from diffusion_cache import published, reference
from diffusion_cache.errors import ConfigError, DiffusionCacheWarning
from diffusion_cache.forecasters.fitted import Fitted
from diffusion_cache.policies import Guarded, Planned
from diffusion_cache.profiling.measure import Options, measure
from diffusion_cache.systems import ProfilingDiT

NAME, STEPS = "wan-moving-digits", 6


@cache
def profile(attention=True):
    pipe = reference.load(NAME)
    options = Options(scope="block", batch=2, sensitivity_samples=0, attention=attention)
    given = plans.drawn(0, 2)
    foreground = "motion" if attention else None
    return measure(lambda samples: plans.batch(pipe, NAME, samples, STEPS), given, options, foreground=foreground)


def with_shares(shares):
    found = profile()
    rows = torch.tensor(shares)[:, None].expand(-1, STEPS).contiguous()
    return replace(found, arrays={**found.arrays, "foreground_share": rows})


def test_refresh_intervals():
    published_list = list(published.load("profilingdit/hunyuanvideo-50").figures["refresh_steps"])
    decreasing = ProfilingDiT().refreshed(50)
    assert decreasing[:6] == [0, 1, 2, 3, 4, 5]
    assert decreasing[6:8] == published_list[:2] == [6, 18]
    # by hand: 18 + round(12 − 10·12/44) = 27, 27 + round(12 − 10·21/44) = 34, …
    assert decreasing[6:] == [6, 18, 27, 34, 40, 44, 47]
    fixed = ProfilingDiT(interval_from=6, interval_to=6).refreshed(50)
    assert fixed == [*range(6), *range(6, 50, 6)]
    increasing = ProfilingDiT(interval_from=2, interval_to=12).refreshed(50)
    assert increasing[6:] == [6, 8, 10, 13, 17, 21, 26, 33, 41]
    assert ProfilingDiT(full_steps=9).refreshed(4) == [0, 1, 2, 3]


def test_classes_of_blocks():
    shares = torch.tensor([0.1, 0.5, 0.1, torch.nan, 0.3])
    assert ProfilingDiT(background=0.4).classified(shares) == (0, 2)
    assert ProfilingDiT(background=1.0).classified(shares) == (0, 1, 2, 4)
    assert ProfilingDiT(background=0.0).classified(shares) == ()
    assert ProfilingDiT(tau=0.3).classified(shares) == (0, 2)
    assert ProfilingDiT(tau=0.31).classified(shares) == (0, 2, 4)


def test_a_plan_and_what_it_costs():
    found = with_shares([0.1, 0.1, 0.9, 0.2, 0.8, 0.7, 0.2, 0.3, 0.1, 0.9])
    plan = ProfilingDiT(background=0.5, full_steps=2, interval_from=2, interval_to=2).plan(found)
    computed = plan.computed()[:, 0]
    background = [0, 1, 3, 6, 8]
    assert computed[:, background].tolist() == [[step in (0, 1, 2, 4)] * 5 for step in range(STEPS)]
    assert computed[:, [2, 4, 5, 7, 9]].all()
    share = sum(found.spans[span].share for span in background)
    assert 0.4 < share < 0.5
    assert plan.nfe == pytest.approx(6 - 2 * share)


def test_one_delta_for_a_run_gives_what_its_blocks_give():
    found = with_shares([0.1, 0.1, 0.9, 0.2, 0.8, 0.7, 0.2, 0.3, 0.1, 0.9])  # one run begins at block 0
    system = ProfilingDiT(full_steps=2, interval_from=2, interval_to=2)
    pipe = reference.load(NAME)
    plan = system.plan(found)
    samples = plans.drawn(0, 2)
    images, bytes_held = [], []
    for given in (
        dict(method=system, profile=found),
        dict(policy=Planned(plan), forecaster=Fitted.of(plan), scope="block"),
    ):
        with dc.cached(pipe, **given):
            images.append(reference.images(NAME, plans.batch(pipe, NAME, samples, STEPS).call()))
            bytes_held.append(dc.summary(pipe).cache_bytes)
    torch.testing.assert_close(*images, rtol=1e-3, atol=1e-4)
    # background blocks 0, 1, 3, 6, 7, 8 and one of those with 0.7: [0, 1], [3], [5, 6, 7, 8]
    assert bytes_held[1] == bytes_held[0] * 7 / 3  # a Δ of each block, and one of each run
    uncached = reference.images(NAME, plans.batch(pipe, NAME, samples, STEPS).call())
    assert (images[0] - uncached).abs().max() > 1e-3


def test_what_is_measured_of_a_video():
    """R of every block and step, and a system made from it by name."""
    shares = profile().arrays["foreground_share"]
    assert shares.isfinite().all()
    assert shares.std(dim=0).min() > 0
    pipe = reference.load(NAME)
    with dc.cached(pipe, method="profiling_dit", profile=profile(), full_steps=2):
        plans.batch(pipe, NAME, plans.drawn(0, 1), STEPS).call()
        records = dc.summary(pipe).records
    assert [record.step for record in records if record.computed and record.pass_name == "cond"] == [0, 1, 2]
    assert 1 <= records[-1].spans <= 7
    parts = ProfilingDiT().parts(profile())
    for total in (3, STEPS, 40):  # of runs of other lengths, the steps that its rule gives for them
        schedule = Guarded(parts.policy).schedule(total)
        assert list(schedule.computed) == ProfilingDiT().refreshed(total)


def test_what_it_cannot_plan_from():
    with pytest.raises(ConfigError, match="attention=true foreground="):
        ProfilingDiT().plan(profile(attention=False))
    for option in ("tau", "background"):  # the one that decides
        with pytest.raises(ConfigError, match=f"no block is a background block.*: raise {option}"):
            ProfilingDiT(**{option: 0.0}).parts(profile())
    for options in (
        dict(background=1.5),
        dict(tau=-1.0),
        dict(full_steps=0),
        dict(interval_to=0.5),
        dict(interval_from=float("inf")),
    ):
        with pytest.raises(ConfigError, match=r"must be|shares between"):
            ProfilingDiT(**options)
    shares = [0.1] * 9 + [float("nan")]
    with pytest.warns(DiffusionCacheWarning, match="no attention was seen in 1 blocks, as blocks.9"):
        assert ProfilingDiT(background=1.0).background_blocks(with_shares(shares)) == tuple(range(9))
