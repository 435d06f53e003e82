"""PAB: each kind of branch at its own steps."""

import pytest

import diffusion_cache as dc
from diffusion_cache import reference
from diffusion_cache.errors import ConfigError
from diffusion_cache.policies import PAB, Guarded, Guards, Interval
from diffusion_cache.schedule import Schedule

NAMES = ("blocks.0.attn1", "blocks.0.attn2", "blocks.0.ff", "temporal_transformer_blocks.0.attn1")


def test_branches_are_computed_at_steps_of_their_kind():
    found = PAB(spatial=2, temporal=3, cross=4).schedule_of(6, NAMES)
    columns = list(zip(*(row for ((row),) in found.compute), strict=True))
    steps = [[step for step, computed in enumerate(column) if computed] for column in columns]
    assert steps == [[0, 2, 4], [0, 4], [0, 1, 2, 3, 4, 5], [0, 3]]


def test_second_attentions_are_of_the_kind_that_they_are():
    names = ("blocks.0.attn", "blocks.0.attn2", "motion_modules.0.attn2", "temp_attentions.0.attn1")
    found = PAB(spatial=2, temporal=3, cross=4).schedule_of(6, names)
    columns = list(zip(*(row for ((row),) in found.compute), strict=True))
    steps = [[step for step, computed in enumerate(column) if computed] for column in columns]
    assert steps == [[0, 2, 4], [0, 2, 4], [0, 3], [0, 3]]


def test_outside_the_window_of_noise_all_are():
    """σ of 0.95, 0.5, 0.4 and 0.05 as log-SNR."""
    levels = (-5.89, 0.0, 0.81, 5.89)
    guarded = Guarded(PAB(2, 2, 2, 2), Guards(sigma_max=0.8, sigma_min=0.1)).for_run(levels, NAMES)
    rows = [row for (row,) in guarded.schedule(4).compute]
    assert rows == [(True,) * 4, (False,) * 4, (True,) * 4, (True,) * 4]


@pytest.mark.parametrize(
    ("guards", "expected"),
    [
        (Guards(max_consecutive=1), [[0, 2, 4, 5], [0, 2, 4, 6], [0, 1, 2, 3, 4, 5, 6], [0, 2, 3, 5, 6]]),
        (Guards(max_reused=2), [[0, 3, 4, 5, 6], [0, 3, 4, 5, 6], [0, 1, 2, 3, 4, 5, 6], [0, 3, 4, 5, 6]]),
    ],
)
def test_guards_hold_for_each_branch(guards, expected):
    found = Guarded(PAB(spatial=5, temporal=3, cross=7), guards).for_run((), NAMES).schedule(7)
    columns = list(zip(*(row for ((row),) in found.compute), strict=True))
    assert [[step for step, computed in enumerate(column) if computed] for column in columns] == expected


@pytest.mark.parametrize("name", ["spatial", "temporal", "cross", "feed_forward"])
def test_one_is_the_least(name):
    with pytest.raises(ConfigError, match=f"pab: {name} must be at least 1"):
        PAB(**{name: 0})


def test_in_a_pipeline_each_kind_of_branch_is_counted():
    """wan-moving-digits: self-attention, cross-attention and a feed-forward in each block, two passes."""
    name, steps = "wan-moving-digits", 6
    pipe = reference.load(name)
    with dc.cached(pipe, "pab", spatial=2, cross=3, scope="branch"):
        pipe(**reference.inputs(name, (1,), (1,), steps))
        records = [record for record in dc.summary(pipe).records if record.pass_name == "cond"]
    third = len(pipe.transformer.blocks)
    # at steps 1 and 5 both attentions are reused, at 2 and 4 the cross-attention, at 3 the other
    assert [record.spans_reused for record in records] == [0, 2 * third, third, third, third, 2 * third]
    assert {record.spans for record in records} == {3 * third}


def test_the_names_do_not_matter_to_others():
    assert Guarded(Interval(2)).for_run((), NAMES).schedule(4) == Schedule.uniform([True, False] * 2)
