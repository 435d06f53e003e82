"""Distances from step to step, against the formulas written out in float64."""

import math

import pytest
import torch

from diffusion_cache.errors import ConfigError
from diffusion_cache.profiling import signals as module
from diffusion_cache.profiling.signals import SignalCurves
from diffusion_cache.signals import filtered_l1, relative_l1


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def run_of(batch, steps, *shape):
    """(outputs, inputs) of each step."""
    inputs = torch.randn(batch, *shape) + torch.randn(steps, batch, *shape).cumsum(0) / 3
    return [(x + x.tanh() + 0.1 * torch.randn_like(x), x) for x in inputs]


def feed(curves, run, pass_index=0):
    for step, (output, x) in enumerate(run):
        curves.observe(step, pass_index, output, x)
    curves.end_run()
    return curves


def l1(now, before):
    return ((now - before).abs().mean() / before.abs().mean()).item()


def test_curves_are_means_over_samples_of_their_formulas():
    steps = 4
    runs = [run_of(batch, steps, 6, 8) for batch in (2, 3)]
    curves = SignalCurves("s", steps)
    for run in runs:
        feed(curves, run)
    result = curves.result()
    assert set(result) == {"residual_l1", "input_l1", "filtered_l1", "norm_ratio"}
    for step in range(1, steps):
        residual, raw, norms = [], [], []
        for run in runs:
            (y, x), (y_before, x_before) = run[step], run[step - 1]
            for row in range(len(x)):
                new, old = (y - x)[row].double(), (y_before - x_before)[row].double()
                residual.append(l1(new, old))
                raw.append(l1(x[row].double(), x_before[row].double()))
                norms.append((new.norm(dim=1) / old.norm(dim=1)).mean().item())
        for key, values in (("residual_l1", residual), ("input_l1", raw), ("norm_ratio", norms)):
            assert result[key][0, step].item() == pytest.approx(sum(values) / 5, rel=1e-5)
    assert all(value.shape == (1, steps) and value[0, 0].isnan() for value in result.values())
    assert result["filtered_l1"].isnan().all()


def test_features_in_float64():
    run = [(output.double(), x.double()) for output, x in run_of(2, 3, 6, 8)]
    single = feed(SignalCurves("s", 3), [(output.float(), x.float()) for output, x in run]).result()
    for key, values in feed(SignalCurves("s", 3), run).result().items():
        torch.testing.assert_close(values, single[key], equal_nan=True)


def test_the_online_signal_is_the_same_number():
    now, before = torch.randn(2, 3, 50, 8)
    assert torch.allclose(module.leaves_l1([now], [before]), relative_l1(now, before))


def test_passes_and_runs_do_not_mix():
    first, second = run_of(1, 3, 6, 8), run_of(1, 3, 6, 8)
    both = SignalCurves("s", 3, 2)
    for step in range(3):
        both.observe(step, 0, *first[step])
        both.observe(step, 1, *second[step])
    for index, run in enumerate((first, second)):
        alone = feed(SignalCurves("s", 3), run).result()
        for key, value in alone.items():
            torch.testing.assert_close(both.result()[key][index], value[0], equal_nan=True)
    # a step that was not seen leaves the one after it without a neighbour, and so does another run
    gap = SignalCurves("s", 3)
    gap.observe(0, 0, *first[0])
    gap.observe(2, 0, *first[2])
    gap.end_run()
    gap.observe(1, 0, *first[1])
    assert all(value.isnan().all() for value in gap.result().values())


def test_norm_ratio_of_latents_and_of_the_largest_leaf():
    curves = SignalCurves("s", 2)
    latents, small = torch.rand(2, 4, 3, 5) + 1, torch.rand(2, 2, 6)
    curves.observe(0, 0, [small, latents], None)
    curves.observe(1, 0, [7 * small, 1.5 * latents], None)
    assert curves.result()["norm_ratio"][0, 1].item() == pytest.approx(1.5)
    other = torch.rand(2, 4, 3, 5)
    uneven = SignalCurves("s", 2)
    uneven.observe(0, 0, latents)
    uneven.observe(1, 0, other)
    assert uneven.result()["norm_ratio"][0, 1].item() == pytest.approx((other.norm(dim=1) / latents.norm(dim=1)).mean())
    total = (small.sum((1, 2)) * 6 + latents.sum((1, 2, 3)) * 0.5) / (small.sum((1, 2)) + latents.sum((1, 2, 3)))
    assert curves.result()["residual_l1"][0, 1].item() == pytest.approx(total.mean().item(), rel=1e-5)
    assert curves.result()["input_l1"].isnan().all()


def test_zeros_count_for_nothing():
    curves = SignalCurves("s", 2)
    y, x = torch.rand(2, 2, 3, 4) + 1
    before = x.clone()
    before[0] += y[0]  # sample 0 has a residual, sample 1 none; of sample 0, one token has none
    before[0, 1] = x[0, 1]
    curves.observe(0, 0, before, x)
    now = x.clone()
    now[0] += 2 * y[0]
    now[1] += 1
    curves.observe(1, 0, now, x)
    assert curves.result()["norm_ratio"][0, 1].item() == pytest.approx(2)
    kept = y[0, [0, 2]].sum()
    assert curves.result()["residual_l1"][0, 1].item() == pytest.approx(((kept + 2 * y[0, 1].sum()) / kept).item())
    assert curves.result()["input_l1"][0, 1] == 0


def test_layout_of_tokens_and_latents():
    levels = [-4.0, -2.0, 1.0]
    maps = torch.randn(3, 2, 5, 3, 4, 6)  # [steps, B, C, F, H, W]
    expected = [filtered_l1(maps[t], maps[t - 1], levels[t], levels[t - 1]).mean().item() for t in (1, 2)]
    tokens = maps.flatten(3).transpose(2, 3)
    layouts = {
        "latents": (maps, {}),
        "tokens": (tokens, dict(grid=(3, 4, 6))),
    }
    for name, (inputs, options) in layouts.items():
        curves = SignalCurves("s", 3, noise_levels=levels, **options)
        for step, x in enumerate(inputs):
            curves.observe(step, 0, 2 * x, x)
        assert curves.result()["filtered_l1"][0, 1:].tolist() == pytest.approx(expected, rel=1e-5), name
    # an image of one frame is filtered as an image; text in front of the tokens is passed over
    image = torch.randn(3, 2, 24, 5)
    expected = filtered_l1(*(image[t].mT.unflatten(2, (4, 6)) for t in (2, 1)), levels[2], levels[1]).mean().item()
    curves = SignalCurves("s", 3, noise_levels=levels, grid=(1, 4, 6))
    for step, x in enumerate(image):
        text = torch.randn(2, 7, 5)
        curves.observe(step, 0, [text, 2 * x], [text, x])
    assert curves.result()["filtered_l1"][0, 2].item() == pytest.approx(expected, rel=1e-5)
    # tokens without a layout, or of another number than the grid's, are not filtered
    for options in ({}, dict(grid=(3, 4, 5))):
        curves = SignalCurves("s", 3, noise_levels=levels, **options)
        for step, x in enumerate(tokens):
            curves.observe(step, 0, 2 * x, x)
        assert curves.result()["filtered_l1"].isnan().all()
        assert curves.result()["input_l1"][0, 1:].isfinite().all()


def test_pure_noise_gives_finite_numbers():
    run = run_of(2, 3, 4, 8, 8)
    result = feed(SignalCurves("s", 3, noise_levels=[-math.inf, 0.0, math.inf]), run).result()
    assert result["filtered_l1"][0, 1:].isfinite().all()


def test_filtering_lowers_the_weight_of_what_noise_hides():
    """At a high noise level, a change of high frequency counts less than the same change of low frequency."""
    base = torch.randn(1, 1, 16, 16)
    waves = torch.cos(2 * math.pi * torch.arange(16) * torch.tensor([[1], [7]]) / 16)
    low, high = (base + 0.3 * wave for wave in waves)
    assert filtered_l1(high, base, -6, -6) < 0.5 * filtered_l1(low, base, -6, -6)
    assert filtered_l1(high, base, 12, 12).item() == pytest.approx(filtered_l1(low, base, 12, 12).item(), rel=0.05)


def test_parts_merge_and_resume():
    runs = [run_of(2, 3, 6, 8) for _ in range(4)]
    whole, first, second, resumed = (SignalCurves("s", 3) for _ in range(4))
    for run in runs:
        feed(whole, run)
    for run in runs[:2]:
        feed(first, run)
    resumed.load_state_dict(first.state_dict())
    for run in runs[2:]:
        feed(second, run)
        feed(resumed, run)
    first.merge(second)
    for other in (first, resumed):
        for key, value in whole.result().items():
            torch.testing.assert_close(other.result()[key], value, equal_nan=True)
    with pytest.raises(ConfigError, match="number of steps"):
        whole.merge(SignalCurves("s", 4))


def test_one_step_is_kept_and_may_be_overwritten():
    run = run_of(2, 5, 6, 8)
    expected = feed(SignalCurves("s", 5), run).result()
    sizes = []
    curves = SignalCurves("s", 5, hold="cpu")
    empty = curves.nbytes
    for step, (y, x) in enumerate(run):
        y, x = y.clone(), x.clone()
        curves.observe(step, 0, y, x)
        y.zero_()
        x.zero_()
        sizes.append(curves.nbytes - empty)
    assert set(sizes) == {4 * 2 * (2 * 6 * 8 + 6)}
    curves.end_run()
    assert curves.nbytes == empty
    for key, value in expected.items():
        torch.testing.assert_close(curves.result()[key], value, equal_nan=True)


def test_outputs_kept_without_an_input_may_be_overwritten():
    first, second = torch.randn(2, 2, 6, 8)
    curves = SignalCurves("s", 2)
    output = first.clone()
    curves.observe(0, 0, output)
    curves.observe(1, 0, output.copy_(second))
    expected = sum(l1(second[row], first[row]) for row in range(2)) / 2
    assert curves.result()["residual_l1"][0, 1].item() == pytest.approx(expected, rel=1e-5)


def test_misuse_is_refused():
    with pytest.raises(ConfigError, match="2 noise levels for 3 steps"):
        SignalCurves("s", 3, noise_levels=[0.0, 1.0])
    curves = SignalCurves("s", 3)
    with pytest.raises(ConfigError, match="outside"):
        curves.observe(3, 0, torch.randn(1, 2, 3))
    curves.observe(0, 0, torch.randn(1, 2, 3))
    with pytest.raises(ConfigError, match="changed their sizes at step 1"):
        curves.observe(1, 0, torch.randn(2, 2, 3))
