"""Sensitivity, against runs in which plain hooks or the public API reuse one step."""

import json
import math
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel, UNetMotionModel

import diffusion_cache
from diffusion_cache import reference
from diffusion_cache.engine import session_of
from diffusion_cache.errors import ConfigError
from diffusion_cache.models.spans import branches
from diffusion_cache.profile import SpanFacts
from diffusion_cache.profiling import measure
from diffusion_cache.profiling import sensitivity as module
from diffusion_cache.profiling.generation import Batch, last_state, teach
from diffusion_cache.profiling.recorder import Recorder, surveyed
from diffusion_cache.profiling.sensitivity import (
    Group,
    branch_kind,
    reuse_errors,
    sampled_steps,
    sensitivities,
    span_groups,
)

STEPS = 6


def spans(names, kind="block", denoisers=("transformer",)):
    return [SpanFacts(name, owner, kind, "residual", 8, 0.1) for owner in denoisers for name in names]


def batch(name, steps=STEPS):
    pipe = reference.load(name)
    given = [3, 4], [100_001, 100_002]
    return Batch(
        pipe,
        lambda: pipe(**reference.inputs(name, *given, steps)),
        lambda output: reference.images(name, output),
        2,
    )


def profiled(made, scope=None):
    """Spans and Gram matrices of one batch."""
    with surveyed(made, scope) as (session, survey):
        session.observer = recorder = Recorder(survey, made.count)
        with recorder.watching():
            made.call()
    return [one.facts for one in survey.spans], recorder.arrays()["gram_residual"]


def last(made):
    with last_state(made.pipe.scheduler) as found:
        made.call()
    return found[0]


def relative(state, teacher):
    wanted = teacher.states[-1].double()
    return float((state.double() - wanted).square().mean().sqrt() / wanted.square().mean().sqrt())


@pytest.fixture(scope="module")
def flux():
    made = batch("flux-digits")
    return teach(made), *profiled(made)


def test_one_step_reused_at_a_time(flux):
    teacher, facts, grams = flux
    found = sensitivities([teacher], grams, facts, scope="stack", steps_sampled=3, pairs=0)
    assert found.groups == (Group("all", None),)
    assert found.sampled.tolist() == [[0, 1, 0, 1, 0, 1]]
    pipe = teacher.batch.pipe
    expected = []
    for step in (1, 3, 5):
        mask = "".join("0" if i == step else "1" for i in range(STEPS))
        with diffusion_cache.cached(pipe, policy="mask", mask=mask, forecaster="reuse", scope="stack"):
            error = relative(last(teacher.batch), teacher)
        squares = [
            (g[step, step] + g[step - 1, step - 1] - 2 * g[step, step - 1], g[step, step], g.diagonal().mean())
            for g in grams[:, 0]
        ]
        change = math.sqrt(sum(d / size for d, _, size in squares) / sum(e / size for _, e, size in squares))
        expected.append(error / change)
    assert found.values[0, [1, 3, 5]].tolist() == pytest.approx(expected, rel=1e-5)
    assert found.values[0, 0] == found.values[0, 1]
    assert found.values[0, 2] == pytest.approx(math.sqrt(expected[0] * expected[1]), rel=1e-5)
    assert found.values[0, 4] == pytest.approx(math.sqrt(expected[1] * expected[2]), rel=1e-5)
    assert session_of(pipe) is None


def test_squared_errors_of_two_steps_against_their_sum(flux):
    teacher, facts, grams = flux
    known = {}
    news = []
    found = sensitivities(
        [teacher],
        grams,
        facts,
        scope="stack",
        steps_sampled=9,
        pairs=3,
        known=known,
        progress=lambda *n: news.append(n),
    )
    assert int(found.sampled.sum()) == STEPS - 1
    assert len(known) == STEPS - 1 + 3
    assert news[0] == (0, 8)
    assert news[-1] == (8, 8)
    ratios = []
    for key, error in known.items():
        cells = json.loads(key)
        if len(cells) == 2:
            (_, one), (_, other) = cells
            assert abs(one - other) > 1
            ratios.append(error**2 / (known[f"[[0, {one}]]"] ** 2 + known[f"[[0, {other}]]"] ** 2))
            mask = "".join("0" if i in (one, other) else "1" for i in range(STEPS))
            with diffusion_cache.cached(teacher.batch.pipe, policy="mask", mask=mask, forecaster="reuse"):
                assert relative(last(teacher.batch), teacher) == pytest.approx(error, rel=1e-6)
    assert sorted(found.additivity) == pytest.approx(sorted(ratios))
    told = found.facts()
    assert told["groups"] == [{"name": "all", "spans": None}]
    assert told["additivity"]["pairs"] == 3
    assert told["additivity"]["mean"] == pytest.approx(np.mean(ratios))
    assert told["additivity"]["spread"] == pytest.approx(np.std(ratios, ddof=1))


def test_one_group_of_many_spans():
    made = batch("dit-digits", steps=4)
    facts, grams = profiled(made, "branch")
    teacher = teach(made)
    known = {}
    found = sensitivities([teacher], grams, facts, scope="branch", pairs=0, known=known)
    assert [group.name for group in found.groups] == ["attention", "feed-forward"]
    assert found.groups[0].spans == tuple(range(0, 24, 2))
    blocks = made.pipe.transformer.transformer_blocks
    for group, part in enumerate(("attn1", "ff")):
        for step in (1, 3):
            handles = [getattr(block, part).register_forward_hook(reusing(step)) for block in blocks]
            error = relative(last(made), teacher)
            for handle in handles:
                handle.remove()
            assert known[f"[[{group}, {step}]]"] == pytest.approx(error, rel=1e-4)
    errors = reuse_errors(grams, found.groups, facts)
    assert float(found.values[1, 2] * errors[1, 2]) == pytest.approx(known["[[1, 2]]"], rel=1e-5)


def reusing(step):
    """A hook that gives the output of step − 1 once more at one step."""
    calls = []

    def hook(part, args, output):
        calls.append(output)
        return calls[step - 1] if len(calls) == step + 1 else None

    return hook


def test_what_was_measured_before_is_not_measured_again(flux):
    teacher, facts, grams = flux
    known = {f"[[0, {step}]]": 0.1 * step for step in (1, 3, 5)}
    counted = []

    def call():
        counted.append(1)
        return teacher.batch.call()

    watched = replace(teacher, batch=replace(teacher.batch, call=call))
    found = sensitivities([watched], grams, facts, scope="stack", steps_sampled=3, pairs=0, known=known)
    assert not counted
    change = reuse_errors(grams, found.groups, facts)[0]
    assert found.values[0, 3] == pytest.approx(0.3 / float(change[3]))
    sensitivities([watched], grams, facts, scope="stack", steps_sampled=2, pairs=1, known=known)
    assert len(counted) == 1
    assert "[[0, 1], [0, 5]]" in known


def test_a_step_without_effect_says_nothing_of_its_neighbours(flux):
    teacher, facts, grams = flux
    known = {"[[0, 1]]": 0.2, "[[0, 3]]": 0.0, "[[0, 5]]": 0.4}
    found = sensitivities([teacher], grams, facts, scope="stack", steps_sampled=3, pairs=0, known=known)
    change = reuse_errors(grams, found.groups, facts)[0]
    one, five = 0.2 / float(change[1]), 0.4 / float(change[5])
    between = [one ** ((5 - step) / 4) * five ** ((step - 1) / 4) for step in (2, 4)]
    assert found.values[0].tolist() == pytest.approx([one, one, between[0], 1e-12, between[1], five], rel=1e-5)
    known = dict.fromkeys(known, 0.0)
    found = sensitivities([teacher], grams, facts, scope="stack", steps_sampled=3, pairs=0, known=known)
    assert found.values[0].tolist() == pytest.approx([1e-12] * STEPS)


def test_groups_that_cannot_be_reused(flux):
    teacher, facts, grams = flux
    # whatever a forecast leads to is NaN then, and not trusted
    handle = teacher.batch.pipe.transformer.register_forward_hook(lambda part, args, output: (output[0] * torch.nan,))
    try:
        found = sensitivities([teacher], grams, facts, scope="stack", steps_sampled=2)
    finally:
        handle.remove()
    assert found.unmeasured == ("all",)
    assert not found.values.any()
    assert not found.sampled.any()
    assert found.additivity == ()
    assert "additivity" not in found.facts()


def test_a_result_that_is_not_finite(flux, monkeypatch):
    teacher, facts, grams = flux

    @contextmanager
    def last(scheduler):
        with last_state(scheduler) as found:
            yield found
        found[0] = found[0] / 0

    monkeypatch.setattr(module, "last_state", last)
    with pytest.raises(ConfigError, match="reusing step 1 gives latents that are not finite"):
        sensitivities([teacher], grams, facts, scope="stack", steps_sampled=1)
    assert session_of(teacher.batch.pipe) is None


def test_another_number_of_steps(flux):
    teacher, facts, grams = flux
    with pytest.raises(ConfigError, match="two steps or more"):
        sensitivities([teacher], grams[..., :3, :3], facts, scope="stack")


def test_other_spans_than_profiled():
    made = batch("dit-digits", steps=2)
    facts = spans([f"blocks.{i}" for i in range(12)])
    with pytest.raises(ConfigError, match="not those of the profile"):
        sensitivities([teach(made)], torch.ones(12, 1, 2, 2) + torch.eye(2), facts, scope="block")


# parts


def test_reuse_errors_by_hand():
    path = torch.randn(3, 2, 5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    path[2] *= 100  # spans of another size count alike
    path[1, 1] = 0  # a pass that this span had no part in
    grams = path @ path.mT
    groups = [Group("all", None), Group("some", (1, 2)), Group("none", ())]
    errors = reuse_errors(grams, groups, spans("abc"))
    assert errors.shape == (3, 5)
    assert errors[:, 0].tolist() == [0, 0, 0]
    assert not errors[2].any()
    scale = grams.diagonal(dim1=2, dim2=3).mean(2)
    for group, members in enumerate(([0, 1, 2], [1, 2])):
        for step in range(1, 5):
            change = energy = 0.0
            for span in members:
                for one in range(2):
                    if scale[span, one] == 0:
                        continue
                    change += float(
                        (path[span, one, step] - path[span, one, step - 1]).square().sum() / scale[span, one]
                    )
                    energy += float(path[span, one, step].square().sum() / scale[span, one])
            assert float(errors[group, step]) == pytest.approx(math.sqrt(change / energy))


def test_members_of_groups_in_two_denoisers():
    facts = spans("abcdef", denoisers=("one", "two"))
    assert list(module._members(Group("some", (0, 5)), facts)) == [0, 5, 6, 11]
    assert list(module._members(Group("all", None), facts)) == [*range(12)]


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        (spans(["a", "b", "c", "d"]), [("all", None)]),
        (spans("abcdefgh", kind="stack"), [("all", None)]),
        (
            spans("abcdefg"),
            [("first third", (0, 1, 2)), ("middle third", (3, 4)), ("last third", (5, 6))],
        ),
        (
            spans(["b.0.attn1", "b.0.attn2", "b.0.ff", "b.1.attn1", "b.1.attn2", "b.1.ff"], "branch"),
            [("attention", (0, 3)), ("cross-attention", (1, 4)), ("feed-forward", (2, 5))],
        ),
        (spans([f"b.{i}.attn" for i in range(6)], "branch"), [("all", None)]),
        (
            spans("abcdef", denoisers=("one", "two")),
            [("first third", (0, 1)), ("middle third", (2, 3)), ("last third", (4, 5))],
        ),
        (spans("abcdef") + spans("abc", denoisers=("two",)), [("all", None)]),
        (
            spans(["b.0.attn", "b.0.attn2", "b.0.ff", "b.1.attn", "b.1.ff"], "branch"),
            [("attention", (0, 1, 3)), ("feed-forward", (2, 4))],
        ),
    ],
)
def test_groups(facts, expected):
    assert [tuple(group) for group in span_groups(facts)] == expected


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("transformer_blocks.0.attn1", "attention"),
        ("blocks.3.self_attn", "attention"),
        ("blocks.3.cross_attn", "cross-attention"),
        ("up_blocks.1.attentions.0.transformer_blocks.0.attn2", "cross-attention"),
        ("attention_blocks.2.ffn", "feed-forward"),
        ("transformer_blocks.4.ff_context", "feed-forward"),
    ],
)
def test_kinds_of_branches(name, kind):
    assert branch_kind(name) == kind


@pytest.mark.parametrize(
    ("name", "beside", "kind"),
    [
        ("transformer_blocks.0.attn2", "transformer_blocks.0.attn", "attention"),  # SD3.5-medium
        ("transformer_blocks.0.attn2", "transformer_blocks.0.attn1", "cross-attention"),
        ("transformer_blocks.0.attn2", "transformer_blocks.1.attn", "cross-attention"),
        ("down_blocks.0.motion_modules.0.transformer_blocks.0.attn2", "attn1", "attention"),
        ("down_blocks.0.temp_attentions.0.transformer_blocks.0.attn2", "attn1", "attention"),
        ("down_blocks.0.attentions.0.temporal_transformer_blocks.0.attn2", "attn1", "cross-attention"),  # of SVD
    ],
)
def test_second_attentions_are_no_cross_attentions_everywhere(name, beside, kind):
    assert branch_kind(name, [beside, name]) == kind


def test_second_attentions_are_told_as_the_modules_say():
    """Of a motion UNet, SVD's, and SD3.5-medium's transformer."""
    small = dict(block_out_channels=(4, 4), norm_num_groups=2, cross_attention_dim=8)
    models = [
        UNetMotionModel(
            **small,
            down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
            up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
            num_attention_heads=2,
            motion_num_attention_heads=2,
        ),
        SD3Transformer2DModel(
            sample_size=4,
            num_layers=2,
            attention_head_dim=4,
            num_attention_heads=2,
            joint_attention_dim=8,
            caption_projection_dim=8,
            pooled_projection_dim=8,
            dual_attention_layers=(0,),
        ),
    ]
    seen = set()
    for model in models:
        found = branches(model)
        for name, attention in found.items():
            if name.endswith("attn2"):
                kind = branch_kind(name, found.keys())
                assert (kind == "cross-attention") == attention.is_cross_attention, name
                seen.add((type(model).__name__, kind))
    assert seen == {
        ("UNetMotionModel", "attention"),
        ("UNetMotionModel", "cross-attention"),
        ("SD3Transformer2DModel", "attention"),
    }


@pytest.mark.parametrize(("total", "count"), [(2, 16), (6, 3), (50, 16), (50, 1), (17, 16), (16, 100)])
def test_sampled_steps(total, count):
    steps = sampled_steps(total, count)
    assert steps[0] == 1
    assert len(steps) == min(count, total - 1)
    assert steps == sorted(set(steps))
    assert max(steps) <= total - 1
    if count > 1:
        assert steps[-1] == total - 1
        gaps = np.diff(steps)
        assert len(gaps) == 0 or gaps.max() - gaps.min() <= 1


def test_a_pass_that_ends_is_not_an_error_of_reuse():
    path = torch.randn(1, 1, 6, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64).cumsum(2)
    path = path.repeat(1, 2, 1, 1)
    whole = reuse_errors(path @ path.mT, [Group("all", None)], spans("a"))
    path[:, 1, 4:] = path[:, 1, 0] = 0
    torch.testing.assert_close(reuse_errors(path @ path.mT, [Group("all", None)], spans("a")), whole)


def test_parts_of_the_samples_add_up(flux):
    """Two calls of one sample each tell what one call of both does."""
    teacher, facts, grams = flux
    pipe = teacher.batch.pipe

    def alone(label, seed):
        def call():
            return pipe(**reference.inputs("flux-digits", [label], [seed], STEPS))

        return teach(Batch(pipe, call, lambda output: reference.images("flux-digits", output), 1))

    parts = [alone(3, 100_001), alone(4, 100_002)]
    found, whole = (sensitivities(t, grams, facts, scope="stack", steps_sampled=2, pairs=0) for t in (parts, [teacher]))
    torch.testing.assert_close(found.values, whole.values, rtol=1e-3, atol=0)


@pytest.mark.parametrize(("size", "parts"), [(8, [3]), (2, [2, 1])])
def test_a_profile_asks_for_no_more_samples_at_once_than_its_batch(monkeypatch, size, parts):
    asked = []

    def sensitivity_of(teachers, *given, **options):
        asked.extend(teachers)
        return module.Sensitivity((), torch.zeros(0, 2), torch.zeros(0, 2), (), ())

    monkeypatch.setattr(measure, "teach", lambda batch: batch)
    monkeypatch.setattr(measure, "sensitivities", sensitivity_of)
    run = SimpleNamespace(
        options=measure.Options(batch=size),
        sensitive=[("3", seed) for seed in range(3)],
        make_batch=len,
        survey=SimpleNamespace(spans=[SimpleNamespace(facts=spans("a")[0])], scope="block"),
        batches=[],
        mine=[],
        depth=None,
        work=SimpleNamespace(cells=lambda count: {}),
    )
    facts = {}
    measure._Run._sensitivity(run, {"gram_residual": torch.zeros(1, 1, 2, 2)}, facts)
    assert asked == parts
    assert facts["sensitivity"]["samples"] == 3
