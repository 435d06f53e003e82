"""Calibrating on runs: against the same done in a loop that is written out, with the denoiser in its hands."""

from dataclasses import replace

import numpy as np
import plans
import pytest
import torch

import diffusion_cache as dc
from diffusion_cache import reference
from diffusion_cache.context import Correction
from diffusion_cache.errors import ConfigError
from diffusion_cache.plan import Plan, Quality, Speed
from diffusion_cache.planning.static import static_plan
from diffusion_cache.profiling.generation import teach
from diffusion_cache.profiling.rectify import _channels, _padded, _uncached_outputs, rectified, reuse_errors

MODEL = "flux-digits"
COMPUTED = [True, False, False, True, False, True, True, False]
LEVELS = (1.0, 0.95, 0.9, 0.8, 0.7, 0.55, 0.4, 0.2)


@pytest.fixture(scope="module")
def batch():
    return plans.batch(reference.load(MODEL), MODEL, plans.drawn(100, 2))


@pytest.fixture(scope="module")
def teacher(batch):
    return teach(batch)


@pytest.fixture(scope="module")
def plan():
    return replace(
        static_plan(plans.profile(MODEL), "every now and then", COMPUTED), scope="denoiser", feature="residual"
    )


def generated(batch, cached: Plan):
    with dc.cached(batch.pipe, plan=cached, granularity="batch"):
        return batch.images(batch.call())


def least_squares(given, wanted):
    """Of each column: scale and bias, by a solver."""
    found = []
    for x, y in zip(given.unbind(-1), wanted.unbind(-1), strict=True):
        design = np.stack([x.numpy().astype(np.float64).ravel(), np.ones(x.numel())], axis=1)
        found.append(np.linalg.lstsq(design, y.numpy().astype(np.float64).ravel(), rcond=None)[0])
    return torch.tensor(np.array(found).T)


def by_hand(batch, wanted):
    """Images and corrections of a run that reuses v − x. wanted(step, true v, reused v, x): what v should be."""
    transformer, kept, found, step = batch.pipe.transformer, [], {}, iter(range(len(COMPUTED)))
    original = transformer.forward

    def forward(hidden_states, *args, **kwargs):
        index = next(step)
        true = original(hidden_states, *args, **kwargs)[0]
        if COMPUTED[index]:
            kept[:] = [true - hidden_states]
            return (true,)
        given = hidden_states + kept[0]
        scale, bias = found[index] = least_squares(given, wanted(index, true, given, hidden_states))
        return ((given * scale + bias).float(),)

    transformer.forward = forward
    try:
        return batch.images(batch.call()), found
    finally:
        del transformer.forward


@pytest.mark.parametrize("target", ["output", "teacher", "state"])
def test_rectified_as_by_hand(batch, teacher, plan, target):
    outputs = []
    hook = batch.pipe.transformer.register_forward_hook(lambda module, args, output: outputs.append(output[0]))
    batch.call()
    hook.remove()
    sigmas = batch.pipe.scheduler.sigmas

    def wanted(index, true, given, x):
        if target == "state":  # Euler: x' = x + (σ' − σ)·v
            return (teacher.states[index] - x) / (sigmas[index + 1] - sigmas[index])
        return {"output": true, "teacher": outputs[index]}[target]

    images, found = by_hand(batch, wanted)
    made = rectified(teacher, plan, target)
    assert made.correction.shape == (8, 1, 1, 2, 4)
    assert torch.isnan(made.correction[COMPUTED]).all()
    for index, correction in found.items():
        torch.testing.assert_close(made.correction[index, 0, 0], correction, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(generated(batch, made), images, atol=1e-4, rtol=0)
    errors = made.facts["rectified"]["errors"]
    assert sorted(map(int, errors)) == sorted(found)
    assert all(after < before for before, after in errors.values())


def test_reuse_errors_as_by_hand(batch, teacher, plan):
    transformer, kept, rows, step = batch.pipe.transformer, [], [], iter(range(len(COMPUTED)))
    original = transformer.forward

    def forward(hidden_states, *args, **kwargs):
        true = original(hidden_states, *args, **kwargs)[0]
        given = true
        if COMPUTED[next(step)]:
            kept[:] = [true - hidden_states]
        else:
            given = hidden_states + kept[0]
        before = rows[-1][3] if rows else true
        rows.append(
            [float((given - true).abs().sum()), float(true.abs().sum()), float((true - before).abs().sum()), true]
        )
        return (given,)

    transformer.forward = forward
    try:
        batch.call()
    finally:
        del transformer.forward
    for found, expected in zip(reuse_errors(teacher, plan), zip(*rows, strict=True), strict=False):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("target", ["output", "teacher"])
def test_hidden_residuals_of_two_stacks(batch, teacher, plan, target):
    """Each has corrections of its own channels; at the first reused step the uncached run tells them."""
    seen = {"in": [], "out": []}
    blocks = batch.pipe.transformer.transformer_blocks

    def entering(module, args, kwargs):
        seen["in"].append(torch.cat([kwargs["encoder_hidden_states"], kwargs["hidden_states"]], dim=1))

    hooks = [
        blocks[0].register_forward_pre_hook(entering, with_kwargs=True),
        blocks[-1].register_forward_hook(lambda module, args, output: seen["out"].append(torch.cat(output, dim=1))),
    ]
    batch.call()
    for hook in hooks:
        hook.remove()
    before, after = seen["in"][:2], seen["out"][:2]
    expected = least_squares(before[1] + after[0] - before[0], after[1])

    made = rectified(teacher, replace(plan, scope="stack"), target)
    assert made.correction.shape == (8, 1, 2, 2, 96)
    assert made.nodes.shape == (8, 2, 1)
    torch.testing.assert_close(made.correction[1, 0, 0], expected, atol=1e-3, rtol=1e-3)
    errors = np.array(list(made.facts["rectified"]["errors"].values()))
    assert (errors[:, 1] < errors[:, 0]).all()
    assert generated(batch, made).isfinite().all()


@pytest.mark.parametrize("target", ["output", "teacher", "state"])
def test_guidance_branches_in_the_rows_of_one_call(target):
    """Of DiT: those stacked in a call have corrections of their own, or one that survives being combined."""
    batch = plans.batch(reference.load("dit-digits"), "dit-digits", plans.drawn(100, 2))
    guided = replace(static_plan(plans.profile("dit-digits"), "", COMPUTED), scope="denoiser", feature="residual")
    made = rectified(teach(batch), guided, target)
    assert made.row_passes == 2
    assert made.correction.shape == (8, 2, 1, 2, 1)
    cond, null = made.correction[1, :, 0]
    assert torch.equal(cond, null) == (target == "state")
    facts = made.facts["rectified"]
    assert not facts["left"]
    before, after = np.array(list(facts["errors"].values())).T
    assert (after < before).all()


def test_what_cannot_be_fitted(teacher, plan):
    for arguments, message in [
        ({"target": "noise"}, "one of output, teacher, state, not 'noise'"),
        ({"plan": replace(plan, scope="stack"), "target": "state"}, "what the denoiser gives, not a stack"),
        ({"plan": replace(plan, sigmas=LEVELS)}, "other noise levels than this plan"),
        ({"plan": replace(plan, nodes=None, weights=None)}, "has no weights, beside which corrections stand"),
    ]:
        with pytest.raises(ConfigError, match=message):
            rectified(teacher, **{"plan": plan, **arguments})


@pytest.mark.parametrize("target", ["output", "teacher", "state"])
def test_steps_without_weights_are_left_as_they_are(teacher, plan, target):
    weights = plan.weights.clone()
    weights[2] = torch.nan
    made = rectified(teacher, replace(plan, weights=weights), target)
    assert list(made.facts["rectified"]["left"]) == ["2"]
    assert made.correction[2].isnan().all()
    assert made.correction[[1, 4, 7]].isfinite().all()


def test_of_the_uncached_run_what_the_plan_reuses_is_kept(teacher, plan):
    outputs = _uncached_outputs(teacher, plan)
    assert [step for step, *_ in outputs] == [1, 2, 4, 7]


def test_along_moved_noise_levels(batch, teacher, plan):
    moved = replace(plan, sigmas=LEVELS)
    made = rectified(teacher, moved, "output")
    assert made.sigmas == LEVELS
    assert not torch.equal(made.correction[1:3], rectified(teacher, plan, "output").correction[1:3])


def test_what_was_measured_of_the_plan_before_is_not_said_of_the_rectified_one(teacher, plan):
    measured = replace(plan, quality=Quality.of("psnr", [30.0] * 3, range(3)), speed=Speed(2.0, 2.0, 2.0, "cpu", 1))
    made = rectified(teacher, measured, "output")
    assert (made.quality, made.speed) == (None, None)


def test_channels_beyond_a_streams_own_are_left_as_they_are():
    assert _padded((2.0,), (3.0,), 3) == Correction((2.0, 1.0, 1.0), (3.0, 0.0, 0.0))


def test_spans_of_different_channels_are_refused():
    wide, narrow = (Correction((1.0,) * count, (0.0,) * count) for count in (3, 2))
    assert _channels([wide, wide], 0) == _channels([wide], 3) == 3
    for corrections, known in (([wide, narrow], 0), ([wide], 2)):
        with pytest.raises(ConfigError, match="have 2 and 3 channels, which one plan cannot correct"):
            _channels(corrections, known)
