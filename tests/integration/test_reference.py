"""The shipped models: their weights, their cards, their pipelines and, on a few samples, their gates."""

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from diffusion_cache import ConfigError, reference
from diffusion_cache.reference import data, gate

MODELS = sorted(reference.MODELS)
SAMPLERS = [(name, sampler) for name in MODELS for sampler in reference.spec(name).samplers]
FEW = 8


@pytest.mark.parametrize("name", MODELS)
def test_weights_are_small(name):
    assert (reference.WEIGHTS / name / "model.safetensors").stat().st_size <= 12e6


@pytest.mark.parametrize("name", MODELS)
def test_weights_are_16_bit_and_finite(name):
    state = load_file(reference.WEIGHTS / name / "model.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.float16}
    assert all(tensor.isfinite().all() for tensor in state.values())


@pytest.mark.parametrize("name", MODELS)
def test_card_says_how_it_was_made_and_that_it_passed(name):
    card = reference.card(name)
    assert {"steps", "batch", "seconds", "hardware", "loss"} <= set(card["training"])
    assert "digits" in card["data"]
    assert card["gate_samples"] == 200
    assert set(card["class_accuracy"]) == set(reference.spec(name).samplers)
    assert min(card["class_accuracy"].values()) >= reference.spec(name).gate


@pytest.mark.parametrize(("name", "sampler"), SAMPLERS)
def test_gate_on_a_few_samples(name, sampler):
    # of 8 samples of a model that passes at its true rate, fewer than this many fail at most once in a hundred times
    least = {0.9: 5, 0.8: 4}[reference.spec(name).gate]
    assert gate.class_accuracy(name, sampler, samples=FEW) * FEW >= least


@pytest.mark.parametrize(("shape", "size"), [((12, 1), (10, 2)), ((3, 1), (10, 1)), ((2, 7), (7, 2))])
def test_any_number_of_samples_fills_a_grid(tmp_path, shape, size):
    samples = torch.ones(*shape, 1, 4, 4)
    gate.save_grid(samples, tmp_path / "grid.png", zoom=1)
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.size == (4 * size[0], 4 * size[1])
        assert sum(picture.histogram()[255:]) == samples.numel()


@pytest.mark.parametrize("video", [False, True])
def test_classifier_knows_real_digits_and_not_noise(video):
    generator = torch.Generator().manual_seed(99)
    if video:
        samples, labels, _ = data.sample_moving_digits(300, generator)
        samples = samples.transpose(1, 2)
    else:
        samples, labels = data.sample_digits(300, generator)
        samples = samples[:, None]
    samples = (samples + 1) / 2
    assert gate.recognised(samples, labels).float().mean() > 0.95
    noise = torch.rand(samples.shape, generator=generator)
    assert gate.recognised(noise, labels).float().mean() < 0.3


def test_moving_digits_move_over_a_static_background():
    videos, _, masks = data.sample_moving_digits(8, torch.Generator().manual_seed(0))
    assert videos.shape == (8, 1, data.VIDEO_FRAMES, data.VIDEO_SIZE, data.VIDEO_SIZE)
    assert videos.min() >= -1
    assert videos.max() <= 1
    still = ~masks.any(dim=2, keepdim=True).expand_as(masks)
    change = (videos[:, :, 1:] - videos[:, :, :-1]).abs()
    # outside the mask lies the digit's faint rim (opacity up to a quarter) at most
    assert change[still[:, :, 1:]].mean() < 0.05
    assert change[masks[:, :, 1:]].mean() > 0.1


def test_same_seeds_give_the_same_samples_and_samples_do_not_depend_on_their_batch():
    pipe = reference.load("dit-digits")
    both = reference.images("dit-digits", pipe(**reference.inputs("dit-digits", [3, 7], [1, 2], steps=4)))
    again = reference.images("dit-digits", pipe(**reference.inputs("dit-digits", [3, 7], [1, 2], steps=4)))
    alone = reference.images("dit-digits", pipe(**reference.inputs("dit-digits", [7], [2], steps=4)))
    assert torch.equal(both, again)
    assert torch.allclose(both[1:], alone, atol=1e-5)


def test_what_flux_is_given_lies_on_one_device():
    seen = {}

    def model(**given):
        seen.update(given)
        return (given["hidden_states"],)

    spec = reference.spec("flux-digits")
    noisy = torch.zeros(2, *spec.sample_shape, device="meta", dtype=torch.bfloat16)
    spec.denoise(model, noisy, torch.zeros(2, device="meta"), torch.zeros(2, device="meta", dtype=torch.long))
    assert {value.device.type for value in seen.values() if isinstance(value, torch.Tensor)} == {"meta"}
    assert seen["txt_ids"].dtype == seen["img_ids"].dtype == torch.bfloat16


def test_unknown_names_are_errors():
    with pytest.raises(ConfigError, match="Did you mean 'dit-digits'"):
        reference.load("dit-digit")
    with pytest.raises(ConfigError, match=r"samplers ddim, dpm\+\+, not 'heun'"):
        reference.load("dit-digits", sampler="heun")
    with pytest.raises(ValueError, match="one seed per label"):
        reference.inputs("dit-digits", [1, 2], [0])


def test_pipelines_can_be_saved_and_loaded(tmp_path):
    pipe = reference.load("flux-digits")
    pipe.save_pretrained(tmp_path)
    absent = {name: None for name, part in pipe.components.items() if part is None}
    found = type(pipe).from_pretrained(tmp_path, **absent)
    images = [torch.as_tensor(one(**reference.inputs("flux-digits", [3], [0], 2)).images) for one in (pipe, found)]
    assert torch.equal(*images)
