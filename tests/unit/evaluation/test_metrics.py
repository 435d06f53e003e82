"""Per-sample metrics against values computed by hand, and what a set of them says."""

import json
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure, peak_signal_noise_ratio

from diffusion_cache import measure
from diffusion_cache.errors import ConfigError
from diffusion_cache.evaluation import metric_base
from diffusion_cache.evaluation.metrics import check, higher_is_better, metrics, per_sample, summarise
from diffusion_cache.reference.data import digit_images


def images(n=3, frames=1, channels=3, size=16, seed=0):
    return torch.rand(n, frames, channels, size, size, generator=torch.Generator().manual_seed(seed))


def of(name, candidate, reference, **options):
    return per_sample([name], candidate, reference, **options)[name]


def test_psnr_of_unrelated_images_is_not_what_uint8_arithmetic_would_say():
    candidate, reference = images(seed=1, size=64), images(seed=2, size=64)
    a, b = (x.numpy().astype(np.float64) for x in (candidate, reference))
    expected = 10 * np.log10(1 / ((a - b) ** 2).mean((1, 2, 3, 4)))
    found = of("psnr", candidate, reference)
    assert found == pytest.approx(expected.tolist(), abs=1e-9)
    assert all(7 < value < 9 for value in found)

    a8, b8 = ((x * 255).round().astype(np.uint8) for x in (a, b))
    wrapped = (a8 - b8) ** 2  # both operations stay in uint8, and wrap around
    assert wrapped.dtype == np.uint8
    in_uint8 = 10 * np.log10(255**2 / wrapped.mean((1, 2, 3, 4)))
    assert all(27 < value < 29 for value in in_uint8)


def test_psnr_equals_torchmetrics_to_its_single_precision_constants():
    candidate, reference = images(seed=1).double(), images(seed=2).double()
    expected = peak_signal_noise_ratio(candidate, reference, data_range=1.0, reduction="none", dim=(1, 2, 3, 4))
    assert of("psnr", candidate, reference) == pytest.approx(expected.tolist(), abs=2e-6)


def test_only_clamped_psnr_forgives_what_leaves_the_range():
    reference = torch.ones(1, 1, 1, 8, 8)
    found = per_sample(["psnr", "psnr_unclamped"], reference + 0.1, reference)
    assert found["psnr"] == [math.inf]
    assert found["psnr_unclamped"] == pytest.approx([20], abs=1e-5)
    wild = torch.full_like(reference, -9)  # a diverged candidate is scored, not refused
    assert of("psnr_unclamped", wild, reference) == pytest.approx([-20], abs=1e-9)


def test_latent_error_needs_latents_of_both():
    a, b = torch.tensor([[3.0, 4.5], [0.0, 0.0]]), torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    x = images(n=2)
    assert of("latent_error", x, x, candidate_latents=a, reference_latents=b) == pytest.approx([0.1, 1.0])
    assert of("latent_error", x, x, candidate_latents=a) == [None, None]


def test_an_error_without_a_scale_is_missing_not_nan():
    x, zero = images(n=1), torch.zeros(1, 4)
    assert of("latent_error", x, x, candidate_latents=zero, reference_latents=zero) == [None]


def test_ssim_is_the_one_of_measure_and_missing_for_tiny_images():
    a, b = images(seed=1), images(seed=2)
    assert of("ssim", a, b) == pytest.approx(measure.ssim(a, b).tolist(), abs=1e-12)
    assert of("ssim", a[..., :6], b[..., :6]) == [None, None, None]


def test_ms_ssim_is_torchmetrics_own_where_the_fifth_scale_holds_its_window():
    reference = images(n=2, frames=2, channels=1, size=176)
    candidate = torch.lerp(reference, images(n=2, frames=2, channels=1, size=176, seed=1), 0.3)
    one_by_one = [
        multiscale_structural_similarity_index_measure(a[None].double(), b[None].double(), data_range=1.0).item()
        for a, b in zip(candidate.flatten(0, 1), reference.flatten(0, 1), strict=True)
    ]
    expected = [(one_by_one[0] + one_by_one[1]) / 2, (one_by_one[2] + one_by_one[3]) / 2]
    assert of("ms_ssim", candidate, reference) == pytest.approx(expected, abs=1e-9)
    assert of("ms_ssim", candidate[..., :175], reference[..., :175]) == [None, None]


def test_the_worst_frame_of_a_video():
    reference = torch.full((2, 3, 1, 8, 8), 0.5)
    candidate = reference.clone()
    candidate[0, 1] += 0.1
    candidate[0, 2] += 0.01
    found = per_sample(["psnr", "psnr_worst_frame"], candidate, reference)
    assert found["psnr_worst_frame"] == pytest.approx([20, math.inf], abs=1e-5)
    assert found["psnr"] == pytest.approx([10 * math.log10(3 / (0.01 + 0.0001)), math.inf], abs=1e-5)


def test_temporal_error_sees_flicker_and_frozen_motion_but_no_constant_offset():
    moving = torch.tensor([0.0, 0.2, 0.4]).view(1, 3, 1, 1, 1).expand(4, 3, 1, 8, 8).clone()
    candidate = moving.clone()
    candidate[1] += 0.1  # brighter throughout
    candidate[2] = moving[2, :1]  # the first frame, frozen
    candidate[3, 1] += 0.1  # flicker: differences 0.3 and 0.1 instead of 0.2 and 0.2
    assert of("temporal_error", candidate, moving) == pytest.approx([0, 0, 1, 0.5], abs=1e-6)
    still = moving[:, :1].expand(4, 3, 1, 8, 8)
    assert of("temporal_error", still, still) == [None] * 4
    assert of("temporal_error", candidate[3:], still[3:]) == [math.inf]


def test_temporal_error_is_of_what_would_be_shown():
    reference = torch.tensor([0.0, 1.0, 0.5]).view(1, 3, 1, 1, 1).expand(1, 3, 1, 4, 4).contiguous()
    candidate = reference.clone()
    candidate[:, 1] = 1.4
    assert of("temporal_error", candidate, reference) == [0.0]


def test_metrics_of_videos_are_missing_for_images():
    x = images()
    found = per_sample(["temporal_error", "psnr_worst_frame"], x, x)
    assert found == {"temporal_error": [None] * 3, "psnr_worst_frame": [None] * 3}


def test_class_correct_asks_a_classifier_of_real_digits():
    digits, labels = digit_images()
    x = (digits[:20, None] + 1) / 2
    wrong = [(int(label) + 1) % 10 for label in labels[:20]]
    assert sum(of("class_correct", x, x, labels=labels[:20].tolist())) >= 19
    assert sum(of("class_correct", x, x, labels=wrong)) <= 1
    assert of("class_correct", x, x) == [None] * 20
    with pytest.raises(ConfigError, match="16×16 digits"):
        of("class_correct", images(), images(), labels=[0, 1, 2])


@pytest.mark.parametrize(
    ("candidate", "reference", "message"),
    [
        (torch.zeros(2, 1, 8, 8), torch.zeros(2, 1, 8, 8), r"\[n, frames, c, h, w\]"),
        (torch.zeros(2, 1, 1, 8, 8), torch.zeros(3, 1, 1, 8, 8), r"\[n, frames, c, h, w\]"),
        (torch.zeros(0, 1, 1, 8, 8), torch.zeros(0, 1, 1, 8, 8), r"\[n, frames, c, h, w\]"),
        (torch.zeros(2, 1, 1, 8, 8, dtype=torch.uint8), torch.zeros(2, 1, 1, 8, 8), "candidate is torch.uint8"),
        (torch.zeros(2, 1, 1, 8, 8), torch.full((2, 1, 1, 8, 8), 255.0), "from 255 to 255: images must be in"),
        (torch.zeros(2, 1, 1, 8, 8), torch.full((2, 1, 1, 8, 8), -1.0), "from -1 to -1: images must be in"),
        (torch.full((2, 1, 1, 8, 8), math.nan), torch.zeros(2, 1, 1, 8, 8), "candidate contains NaN"),
    ],
)
@pytest.mark.parametrize("name", ["psnr", "psnr_unclamped", "ssim"])
def test_unfit_samples_are_refused(name, candidate, reference, message):
    with pytest.raises(ConfigError, match=message):
        of(name, candidate, reference)


def test_prompts_and_labels_must_match_the_samples():
    with pytest.raises(ConfigError, match="2 labels for 3 samples"):
        of("psnr", images(), images(), labels=[1, 2])


def test_unknown_names_and_options_are_errors_with_a_suggestion():
    with pytest.raises(ConfigError, match=r"Unknown metric 'pnsr'. Did you mean 'psnr'\?"):
        check(["psnr", "pnsr"])
    with pytest.raises(ConfigError, match="Unknown metric 'psnrr'"):
        of("psnrr", images(), images())
    with pytest.raises(ConfigError, match="Unknown metric 'fidelity'"):
        higher_is_better("fidelity")
    with pytest.raises(ConfigError, match=r"Metric 'lpips' has no option 'backbon'. Did you mean 'backbone'\?"):
        check(["lpips"], settings={"lpips": {"backbon": "x"}})
    with pytest.raises(ConfigError, match=r"settings 'lpisp'. Did you mean 'lpips'\?"):
        check(["psnr"], settings={"lpisp": {}})
    with pytest.raises(ConfigError, match="model must be a string, not 3"):
        check(["clip_score"], settings={"clip_score": {"model": 3}})


def test_metrics_that_make_no_sense_for_the_model_are_refused_beforehand():
    check(["psnr", "class_correct"], "dit-digits")
    with pytest.raises(ConfigError, match="class_correct is for the shipped models"):
        check(["class_correct"])
    for name in ("clip_score", "image_reward"):
        with pytest.raises(ConfigError, match=f"{name} needs text prompts, but dit-digits takes class labels"):
            check([name], "dit-digits")
        with pytest.raises(ConfigError, match="no option 'weights'"):
            check([name], settings={name: {"weights": "x"}})


def test_directions():
    lower = {name for name in metrics.names() if not higher_is_better(name)}
    assert lower == {"latent_error", "temporal_error", "lpips"}


def test_another_package_can_add_a_metric():
    @metrics.register("brightness")
    @dataclass(frozen=True)
    class Brightness(metric_base.PerSample):
        higher_is_better = True
        scale: float = 1.0

        def __call__(self, samples):
            return (self.scale * samples.candidate.flatten(1).mean(1)).tolist()

    try:
        x = torch.full((2, 1, 1, 4, 4), 0.25)
        assert of("brightness", x, x, settings={"brightness": {"scale": 2.0}}) == [0.5, 0.5]
    finally:
        metrics.unregister("brightness")


def test_a_metric_that_miscounts_is_an_error():
    @metrics.register("short")
    @dataclass(frozen=True)
    class Short(metric_base.PerSample):
        higher_is_better = True

        def __call__(self, samples):
            return [1.0]

    try:
        with pytest.raises(ConfigError, match="'short' gave 1 values for 3 samples"):
            of("short", images(), images())
    finally:
        metrics.unregister("short")


def test_summary_names_the_seed_of_the_worst_case():
    values, seeds = [30.0, 20.0, None, 25.0, 20.0], [7, 8, 9, 10, 11]
    found = summarise(values, seeds, higher_is_better=True)
    assert (found["worst"], found["worst_seed"]) == (20, 8)
    assert found["mean"] == pytest.approx(23.75)
    assert found["se"] == pytest.approx(np.std([30, 20, 25, 20], ddof=1) / 2)
    assert (found["n"], found["identical"]) == (4, 0)
    lower = summarise(values, seeds, higher_is_better=False)
    assert (lower["worst"], lower["worst_seed"]) == (30, 7)


def test_the_worst_case_is_the_seed_that_gave_it():
    reference = images(n=8, seed=3).clamp(0.2, 0.8)
    candidate = reference + 0.01
    candidate[5] += 0.1
    found = summarise(of("psnr", candidate, reference), range(100, 108), True)
    assert found["worst_seed"] == 105
    assert found["worst"] == pytest.approx(20 * math.log10(1 / 0.11), abs=1e-4)


@pytest.mark.parametrize("higher", [True, False])
def test_the_fifth_percentile_is_of_the_bad_tail(higher):
    values = [float(v) for v in np.random.default_rng(0).permutation(40)]
    found = summarise(values, range(40), higher)
    assert found["p5"] == (1 if higher else 38)  # 39 of 40 are as good or better
    assert summarise(values[:20], range(20), higher)["p5"] == summarise(values[:20], range(20), higher)["worst"]
    if higher:
        reference = torch.zeros(40, 1, 1, 8, 8)
        offsets = 10 ** (-(torch.tensor(values) + 20) / 20).view(-1, 1, 1, 1, 1)
        assert found["p5"] == pytest.approx(
            measure.quality(offsets.expand_as(reference), reference).psnr_p5 - 20, abs=1e-3
        )


def test_identical_samples_are_never_dropped_from_the_mean():
    found = summarise([30.0, math.inf, 40.0, math.inf], [1, 2, 3, 4], True)
    assert found["mean"] is None
    assert found["se"] is None
    assert (found["identical"], found["n"]) == (2, 4)
    assert (found["worst"], found["worst_seed"]) == (30.0, 1)
    everything = summarise([math.inf] * 3, [5, 6, 7], True)
    assert (everything["identical"], everything["worst"], everything["worst_seed"]) == (3, None, 5)
    assert everything["p5"] is None
    assert json.loads(json.dumps(everything, allow_nan=False)) == everything
    assert summarise([0.0, 0.5], [1, 2], False)["identical"] == 1
    infinitely_bad = summarise([0.1, math.inf], [1, 2], False)
    assert (infinitely_bad["identical"], infinitely_bad["worst"], infinitely_bad["worst_seed"]) == (0, None, 2)


def test_summaries_of_little_or_nothing():
    nothing = summarise([None, None], [1, 2], True)
    assert nothing["n"] == 0
    assert {nothing[key] for key in ("mean", "se", "p5", "worst", "worst_seed")} == {None}
    one = summarise([3.0], [1], True)
    assert (one["mean"], one["se"], one["worst"]) == (3.0, None, 3.0)
    with pytest.raises(ConfigError, match="2 values but 1 seeds"):
        summarise([1.0, 2.0], [1], True)
    with pytest.raises(ConfigError, match="NaN"):
        summarise([math.nan], [1], True)
