"""FID, KID and the digit features they read."""

import json

import numpy as np
import pytest
import scipy.linalg
import torch

from diffusion_cache.errors import ConfigError
from diffusion_cache.evaluation import distribution
from diffusion_cache.reference import features as digits

DIGITS, MOVING = "dit-digits", "wan-moving-digits"


def normal(n, d=4, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_fid_equals_the_formula_by_scipy():
    a, b = normal(50), normal(70, seed=1) @ torch.diag(torch.tensor([1.0, 2, 0.5, 3], dtype=torch.float64)) + 0.3
    covariances = [np.cov(x.numpy(), rowvar=False) for x in (a, b)]
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum().item() + np.trace(
        covariances[0] + covariances[1] - 2 * scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    )
    assert distribution.fid(a, b) == pytest.approx(expected, rel=1e-6)


def test_fid_and_kid_of_a_set_with_itself_and_of_a_shifted_one():
    a = normal(300)
    assert distribution.fid(a, a) == pytest.approx(0, abs=1e-6)
    assert distribution.fid(a, a + 2) == pytest.approx(4 * 2**2, rel=1e-6)
    assert distribution.kid(a[:150], a[150:]) == pytest.approx(0, abs=0.2)
    assert distribution.kid(a, a + 2) > 1


def test_kid_equals_the_unbiased_estimate_and_repeats_without_touching_the_random_state():
    a, b = normal(30), normal(30, seed=1) + 1
    k = lambda x, y: (x @ y.T / 4 + 1) ** 3  # noqa: E731
    aa, bb = (k(x, x) for x in (a, b))
    off = [(m.sum() - m.trace()) / (30 * 29) for m in (aa, bb)]
    expected = (off[0] + off[1] - 2 * k(a, b).mean()).item()
    assert distribution.kid(a, b) == pytest.approx(expected, rel=1e-9)
    before = torch.get_rng_state()
    assert distribution.kid(a, normal(90, seed=2)) == distribution.kid(a, normal(90, seed=2))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("candidate", "message"),
    [
        (torch.zeros(1, 4), "two samples or more"),
        (torch.zeros(5, 3), "two samples or more"),
        (torch.zeros(5, 4, dtype=torch.uint8), "torch.uint8"),
        (torch.full((5, 4), torch.nan), "not finite"),
    ],
)
@pytest.mark.parametrize("distance", [distribution.fid, distribution.kid])
def test_unfit_features_are_refused(distance, candidate, message):
    with pytest.raises(ConfigError, match=message):
        distance(candidate, torch.zeros(5, 4))


def test_real_digits_score_better_than_noisy_ones_and_those_better_than_noise():
    real = digits.real_digits(256, seed=11)
    noise = torch.rand(real.shape, generator=torch.Generator().manual_seed(0))
    found = [
        distribution.scores(DIGITS, distribution.features(DIGITS, x))
        for x in (real, torch.lerp(real, noise, 0.3), noise)
    ]
    for name in ("fid", "kid"):
        values = [scores[name] for scores in found]
        assert values[0] < values[1] < values[2]
        assert values[0] < 0.1 * values[2]
    assert abs(found[0]["kid"]) < 0.05


def test_moving_digits_are_compared_with_moving_digits():
    real = digits.real_digits(100, video=True, seed=11)
    features = distribution.features(MOVING, real)
    assert torch.equal(features, distribution.features(DIGITS, real[:, 3:4]))  # the middle frames
    good = distribution.scores(MOVING, features)
    bad = distribution.scores(MOVING, distribution.features(MOVING, digits.real_digits(100, seed=11)))
    assert good["fid"] < 0.7 * bad["fid"]
    assert good["kid"] < 0.3 * bad["kid"]


def test_fid_is_not_given_for_hardly_more_samples_than_features():
    features = distribution.features(DIGITS, digits.real_digits(64))
    assert distribution.scores(DIGITS, features[:63])["fid"] is None
    assert distribution.scores(DIGITS, features)["fid"] > 0
    assert distribution.scores(DIGITS, features[:1]) == {"fid": None, "kid": None}


def test_features_see_less_than_a_step_of_8_bits():
    x = digits.real_digits(4)
    change = (digits.digit_features()(x[:, 0] * 0.999) - digits.digit_features()(x[:, 0])).abs().amax(1)
    assert change.min() > 0  # 0.001 is a quarter of a step
    with pytest.raises(ConfigError, match="float images"):
        digits.digit_features()((x[:, 0] * 255).byte())
    with pytest.raises(ConfigError, match=r"\[n, 1, 16, 16\]"):
        distribution.features(DIGITS, torch.rand(2, 1, 3, 16, 16))


def test_stored_features_recognise_digits_that_they_were_not_trained_on():
    found = digits.accuracy(digits.digit_features())
    card = json.loads((digits.FOLDER / "card.json").read_text())
    assert min(found.values()) >= 0.97
    assert found == pytest.approx(card["held_out_accuracy"], abs=2e-3)
    assert (digits.FOLDER / "model.safetensors").stat().st_size < 300_000


def test_no_held_out_digit_is_trained_on():
    drawn = {held_out: digits._drawn(12_000, seed=3 + held_out)[0] for held_out in (False, True)}
    for held_out, index in drawn.items():
        images, labels = digits._stills(held_out)
        keep = index % 5 == 0 if held_out else index % 5 != 0
        assert torch.equal(labels, digits.digit_images()[1][index[keep]])  # what is drawn first is the digit
        assert len(images) == int(keep.sum())


def test_training_repeats_exactly_and_learns(monkeypatch):
    monkeypatch.setattr(digits, "STEPS", 60)
    losses = []
    first, second = digits.train(lambda step, loss: losses.append(loss)), digits.train()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert losses[0] > 2
    assert losses[-1] < 0.8 * losses[0]


def test_changed_or_missing_weights_are_told(tmp_path, monkeypatch):
    network = digits.digit_features()
    monkeypatch.setattr(digits, "FOLDER", tmp_path)
    try:
        digits.digit_features.cache_clear()
        with pytest.raises(ConfigError, match=r"no digit features in .*run scripts/train_features.py"):
            distribution.check(DIGITS)
        digits.save(network, {})
        restored = digits.digit_features()
        assert all(torch.equal(a, b) for a, b in zip(restored.parameters(), network.parameters(), strict=True))
        path = tmp_path / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-2] + b"\0\0")
        digits.digit_features.cache_clear()
        with pytest.raises(ConfigError, match=r"is not what its card.json describes"):
            distribution.check(DIGITS)
    finally:
        digits.digit_features.cache_clear()


def test_other_models_need_inception_and_say_so(tmp_path, monkeypatch):
    distribution._inception.cache_clear()
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(ConfigError, match=r"no Inception weights: .*weights-inception-2015.*distribution=false"):
        distribution.features("some/model", torch.rand(2, 1, 3, 16, 16))
    with pytest.raises(ConfigError, match=r"no option 'layers'. Did you mean 'layer'\?"):
        distribution.check("some/model", {"inception": {"layers": 64}})
    with pytest.raises(ConfigError, match="layer must be one of"):
        distribution.check("some/model", {"inception": {"layer": 65}})
    assert distribution.scores("some/model", normal(9)) == {"fid": None, "kid": None}  # no real images were named


def test_inception_reads_8_bit_images_and_a_folder_of_real_ones(tmp_path, monkeypatch):
    from PIL import Image

    seen = []

    def network(x):
        seen.append((x.dtype, tuple(x.shape)))
        return x.double().flatten(2).mean(2)

    monkeypatch.setattr(distribution, "_inception", lambda weights, layer: network)
    distribution._real_images.cache_clear()
    for i, size in enumerate([(8, 6), (5, 9), (7, 7)]):
        Image.new("RGB", size, (10 * i, 20, 30 + i * i)).save(tmp_path / f"{i}.png")
    settings = {"inception": {"real": str(tmp_path)}}
    distribution.check("some/model", settings)
    features = distribution.features("some/model", torch.full((8, 1, 1, 4, 4), 0.5), settings)
    assert features.tolist() == [[128, 128, 128]] * 8
    scores = distribution.scores("some/model", features, settings)
    assert scores["kid"] > 0
    assert scores["fid"] is None  # three real images
    assert {dtype for dtype, _ in seen} == {torch.uint8}
    assert (1, 3, 6, 8) in {shape for _, shape in seen}
    with pytest.raises(ConfigError, match="name their folder"):
        distribution.check("some/model")
    (tmp_path / "3.png").write_bytes(b"no picture")
    distribution._real_images.cache_clear()
    with pytest.raises(ConfigError, match=r"3.png cannot be read"):
        distribution.scores("some/model", features, settings)
    with pytest.raises(ConfigError, match="fewer than two images"):
        distribution.check("some/model", {"inception": {"real": str(tmp_path / "nothing")}})
    distribution._real_images.cache_clear()
