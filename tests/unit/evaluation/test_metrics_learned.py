"""Metrics that need a network, on tiny ones made here, and what is said where there is none."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from diffusion_cache.errors import ConfigError
from diffusion_cache.evaluation import perceptual, preference
from diffusion_cache.evaluation.metrics import check, per_sample

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
WORDS = ["<|startoftext|>", "<|endoftext|>", "a</w>", "r</w>", "c</w>", "d</w>"]
PIXELS, LENGTH = 16, 12


@pytest.fixture(autouse=True)
def nothing_loaded(tmp_path, monkeypatch):
    """No network of another test, no cache of this machine, no download."""
    for load in (perceptual._load, preference._load_clip, preference._load_reward):
        load.cache_clear()
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def images(n=2, frames=1, channels=3, size=PIXELS, seed=0):
    return torch.rand(n, frames, channels, size, size, generator=torch.Generator().manual_seed(seed))


def of(name, candidate, reference, **options):
    return per_sample([name], candidate, reference, **options)[name]


# LPIPS


@pytest.fixture(scope="module")
def alexnet():
    """An untrained AlexNet with torchvision's names."""
    torch.manual_seed(0)
    layers = nn.Sequential(*perceptual.BACKBONES["alex"].layers())
    return layers, {f"features.{key}": value for key, value in layers.state_dict().items()} | {
        "classifier.1.bias": torch.zeros(3)
    }


@pytest.fixture(params=["alex", "vgg"])
def backbone(request):
    torch.manual_seed(1)
    return request.param, nn.Sequential(*perceptual.BACKBONES[request.param].layers())


def test_lpips_equals_torchmetrics_with_the_same_backbone(backbone, tmp_path, monkeypatch):
    from torchmetrics.functional.image import lpips

    name, layers = backbone
    torch.save({f"features.{key}": value for key, value in layers.state_dict().items()}, tmp_path / "weights.pth")
    padded = nn.Sequential(*layers, nn.MaxPool2d(2))  # torchvision's ends in a pooling layer
    monkeypatch.setattr(lpips, "_get_tv_model_features", lambda net, pretrained: padded)
    a, b = images(size=36, seed=1), images(size=36, seed=2)
    expected = lpips.learned_perceptual_image_patch_similarity(
        a[:, 0], b[:, 0], net_type=name, reduction="none", normalize=True
    )
    settings = {"lpips": {"network": name, "backbone": str(tmp_path / "weights.pth")}}
    found = of("lpips", a, b, settings=settings)
    assert found == pytest.approx(expected.tolist(), rel=1e-4)
    assert min(found) > 1e-4


def test_lpips_finds_its_backbone_in_the_cache_or_a_folder(alexnet, tmp_path):
    state = alexnet[1]
    a, b = images(size=32, seed=1), images(size=32, seed=2)
    with pytest.raises(
        ConfigError, match=r"lpips has no backbone: there is no .*hub.checkpoints.alexnet-owt-7be5be79.pth"
    ):
        check(["lpips"])
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    torch.save(state, tmp_path / "hub/checkpoints/alexnet-owt-7be5be79.pth")
    check(["lpips"])
    cached = of("lpips", a, b)
    folder = {"lpips": {"backbone": str(tmp_path / "hub/checkpoints")}}
    assert of("lpips", a, b, settings=folder) == cached
    save_file(state, tmp_path / "weights.safetensors")
    assert of("lpips", a, b, settings={"lpips": {"backbone": str(tmp_path / "weights.safetensors")}}) == cached
    assert of("lpips", a, a) == [0, 0]


def test_lpips_of_grey_images_videos_and_tiny_images(alexnet, tmp_path):
    torch.save(alexnet[1], tmp_path / "weights.pth")
    settings = {"lpips": {"backbone": str(tmp_path / "weights.pth")}}
    a, b = images(frames=5, channels=1, size=32, seed=1), images(frames=5, channels=1, size=32, seed=2)
    frames = [
        of("lpips", a[:, [i]].expand(-1, -1, 3, -1, -1), b[:, [i]].expand(-1, -1, 3, -1, -1), settings=settings)
        for i in range(5)
    ]
    assert of("lpips", a, b, settings=settings) == pytest.approx(torch.tensor(frames).mean(0).tolist(), rel=1e-5)
    assert of("lpips", a[..., :30], b[..., :30], settings=settings) == [None, None]
    with pytest.raises(ConfigError, match="grey or RGB images, got 4 channels"):
        of("lpips", images(channels=4, size=32), images(channels=4, size=32), settings=settings)


class Distance(nn.Module):
    def forward(self, a, b):
        return (a - b).abs().mean((1, 2, 3), keepdim=True)


def test_lpips_takes_a_whole_network_as_torchscript(tmp_path):
    a, b = images(size=40, seed=1), images(size=40, seed=2)
    example = torch.zeros(1, 3, 8, 8)
    torch.jit.trace(Distance(), (example, example)).save(str(tmp_path / "network.ts"))
    found = of("lpips", a, b, settings={"lpips": {"backbone": str(tmp_path / "network.ts")}})
    assert found == pytest.approx((2 * (a - b)).abs().mean((1, 2, 3, 4)).tolist(), rel=1e-5)


@pytest.mark.parametrize("file", ["weights.pth", "weights.safetensors", "network.ts"])
def test_broken_lpips_files_are_told(tmp_path, file):
    path = tmp_path / file
    path.write_bytes(b"no weights")
    with pytest.raises(ConfigError, match=f"lpips: .*{file} (does not hold|is no TorchScript)"):
        check(["lpips"], settings={"lpips": {"backbone": str(path)}})


def test_weights_of_another_network_are_told(alexnet, tmp_path):
    torch.save(alexnet[1], tmp_path / "weights.pth")
    with pytest.raises(ConfigError, match="does not hold torchvision's weights of 'vgg'"):
        check(["lpips"], settings={"lpips": {"network": "vgg", "backbone": str(tmp_path / "weights.pth")}})
    with pytest.raises(ConfigError, match=r"Unknown LPIPS network 'alexnet'. Did you mean 'alex'\?"):
        check(["lpips"], settings={"lpips": {"network": "alexnet"}})


# CLIP score


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A folder with a tiny CLIP model, its tokenizer and image processor, and the model itself."""
    import json

    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    common = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    text = dict(vocab_size=6, max_position_embeddings=LENGTH, bos_token_id=0, eos_token_id=1, pad_token_id=1)
    vision = dict(image_size=PIXELS, patch_size=8)
    model = CLIPModel(CLIPConfig(text_config={**common, **text}, vision_config={**common, **vision}, projection_dim=8))
    for parameter in model.parameters():  # larger than the usual start, so that prompts and images matter
        parameter.data.normal_(std=0.3)
    model.save_pretrained(folder)
    CLIPTokenizer(vocab={word: i for i, word in enumerate(WORDS)}, merges=[]).save_pretrained(folder)
    processor = dict(
        image_processor_type="CLIPImageProcessor",
        size={"shortest_edge": PIXELS},
        crop_size={"height": PIXELS, "width": PIXELS},
        image_mean=[0.5, 0.4, 0.3],
        image_std=[0.2, 0.3, 0.4],
    )
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder, model.eval()


def by_hand(model, picture, tokens):
    """100 · cosine of the projected embeddings of one prepared image [3, h, w] and its tokens."""
    with torch.no_grad():
        output = model(input_ids=torch.tensor([tokens]), pixel_values=picture[None])
    return 100 * F.cosine_similarity(output.image_embeds, output.text_embeds).item()


def tokens_of(prompt):
    return [0, *(WORDS.index(f"{word}</w>") for word in prompt.split()), 1]


def prepared(picture):
    return (picture - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)


def test_clip_score_is_a_hundred_times_the_cosine(clip):
    folder, model = clip
    x = images(n=6, seed=5)
    prompts = ["a r c", "a d", "r", "a a a", "d c", "c"]
    check(["clip_score"], settings={"clip_score": {"model": str(folder)}})
    found = of("clip_score", x, x, prompts=prompts, settings={"clip_score": {"model": str(folder)}})
    cosines = [by_hand(model, prepared(x[i, 0]), tokens_of(prompt)) for i, prompt in enumerate(prompts)]
    assert found == pytest.approx([max(0, value) for value in cosines], abs=1e-3)
    assert len({round(value, 2) for value in found if value > 1}) >= 2  # or clamping made it trivial


def test_clip_score_of_videos_grey_images_and_long_prompts(clip):
    folder, model = clip
    settings = {"clip_score": {"model": str(folder)}}
    x = images(n=1, frames=2, channels=1, seed=5)
    frames = [
        of(
            "clip_score",
            x[:, [i]].expand(-1, -1, 3, -1, -1),
            x[:, [i]].expand(-1, -1, 3, -1, -1),
            prompts=["a c"],
            settings=settings,
        )[0]
        for i in range(2)
    ]
    assert of("clip_score", x, x, prompts=["a c"], settings=settings) == pytest.approx([sum(frames) / 2], abs=1e-4)
    long, cut = " ".join(["c"] * 30), [0, *[WORDS.index("c</w>")] * (LENGTH - 2), 1]
    expected = max(0, by_hand(model, prepared(x[0, 0].expand(3, -1, -1)), cut))
    assert of("clip_score", x[:, :1], x[:, :1], prompts=[long], settings=settings) == pytest.approx(
        [expected], abs=1e-3
    )


def test_clip_score_resizes_the_short_side_and_crops_the_middle(clip):
    folder, model = clip
    settings = {"clip_score": {"model": str(folder)}}
    x = images(n=1, size=32, seed=6)[..., :24]  # 32 × 24 pixels
    picture = F.interpolate(x[:, 0], size=(21, 16), mode="bicubic", antialias=True).clamp(0, 1)[0, :, 2:18]
    expected = max(0, by_hand(model, prepared(picture), tokens_of("a r d")))
    assert of("clip_score", x, x, prompts=["a r d"], settings=settings) == pytest.approx([expected], abs=1e-3)


def test_a_missing_clip_model_or_prompt_is_told(clip, tmp_path):
    for name in (str(tmp_path), "nobody/has-this-model"):
        with pytest.raises(ConfigError, match=r"clip_score cannot load the CLIP model .* leave clip_score out"):
            check(["clip_score"], settings={"clip_score": {"model": name}})
    x = images()
    with pytest.raises(ConfigError, match="clip_score needs the prompts"):
        of("clip_score", x, x, settings={"clip_score": {"model": str(clip[0])}})


# ImageReward


class Reward(nn.Module):
    """Mean of the prepared image plus a tenth of the number of tokens."""

    def forward(self, input_ids, attention_mask, pixels):
        return pixels.mean((1, 2, 3)) + 0.1 * attention_mask.sum(1).to(pixels.dtype) + 0 * input_ids.sum(1)


class PackageReward(nn.Module):
    """What the package ImageReward gives: score_gard, with rewards [n, 1], and blip.tokenizer."""

    def __init__(self, tokenizer):
        super().__init__()
        self.blip = SimpleNamespace(tokenizer=tokenizer)
        self.network = Reward()

    def score_gard(self, prompt_ids, prompt_attention_mask, image):
        assert prompt_ids.shape == (len(image), 35)
        assert image.shape[1:] == (3, 224, 224)
        return self.network(prompt_ids, prompt_attention_mask, image)[:, None]


PROMPTS = ["a r c", "d"]
TOKENS = torch.tensor([5.0, 3.0])  # with the first and the last


def expected_rewards(x):
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (preference.CLIP_MEAN, preference.CLIP_STD))
    large = F.interpolate(x[:, 0], size=(224, 224), mode="bicubic", antialias=True).clamp(0, 1)
    return (((large - mean) / std).mean((1, 2, 3)) + 0.1 * TOKENS).tolist()


def test_image_reward_from_an_exported_network(clip, tmp_path):
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(clip[0]).save_pretrained(tmp_path)
    ids = torch.ones(1, 35, dtype=torch.long)
    torch.jit.trace(Reward(), (ids, ids, torch.zeros(1, 3, 224, 224))).save(str(tmp_path / "reward.ts"))
    settings = {"image_reward": {"model": str(tmp_path)}}
    check(["image_reward"], settings=settings)
    x = images()
    assert of("image_reward", x, x, prompts=PROMPTS, settings=settings) == pytest.approx(expected_rewards(x), abs=1e-4)


@pytest.fixture
def package(clip, monkeypatch):
    """A stand-in for the package ImageReward, and the calls of its `load`."""
    from transformers import AutoTokenizer

    module, calls = ModuleType("ImageReward"), []

    def load(name, device, download_root=None):
        calls.append((name, device, download_root))
        if name == "unheard-of":
            raise RuntimeError("Model unheard-of not found")
        return PackageReward(AutoTokenizer.from_pretrained(clip[0]))

    module.load = load
    monkeypatch.setitem(sys.modules, "ImageReward", module)
    return calls


def test_image_reward_through_its_package(package, tmp_path):
    x = images()
    assert of("image_reward", x, x, prompts=PROMPTS) == pytest.approx(expected_rewards(x), abs=1e-4)
    for file in ("ImageReward.pt", "med_config.json"):
        (tmp_path / file).touch()
    check(["image_reward"], settings={"image_reward": {"model": str(tmp_path)}})
    assert package == [
        ("ImageReward-v1.0", "cpu", None),
        (str(tmp_path / "ImageReward.pt"), "cpu", str(tmp_path)),
    ]


def test_a_missing_image_reward_is_told(package, monkeypatch, tmp_path):
    with pytest.raises(ConfigError, match=r"cannot load 'unheard-of' \(RuntimeError: Model unheard-of not found\)"):
        check(["image_reward"], settings={"image_reward": {"model": "unheard-of"}})
    with pytest.raises(
        ConfigError, match=r"holds neither reward.ts with a tokenizer nor ImageReward.pt and med_config"
    ):
        check(["image_reward"], settings={"image_reward": {"model": str(tmp_path)}})
    (tmp_path / "reward.ts").touch()
    with pytest.raises(ConfigError, match="image_reward: no tokenizer in"):
        check(["image_reward"], settings={"image_reward": {"model": str(tmp_path)}})
    monkeypatch.setitem(sys.modules, "ImageReward", None)
    with pytest.raises(ConfigError, match=r"`pip install image-reward`.* leave image_reward out"):
        check(["image_reward"])
