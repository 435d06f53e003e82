"""How well images fit their prompts: CLIP score and ImageReward, for models that read text.

They judge the outputs, not their distance to the uncached ones: compare them with the uncached run's own scores. Images
are resized in float, never rounded to 8 bits, so scores differ in the third digit from tools that resize pictures.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigError
from .metric_base import PerSample, Samples, frame_means, load_torchscript, metrics, needs_text, reason, rgb

CHUNK = 8  # frames at once
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
REWARD_SIZE, REWARD_TOKENS = 224, 35  # what ImageReward was trained with
PUBLISHED_REWARD = ("ImageReward.pt", "med_config.json")
EXPORTED_REWARD = "reward.ts"


class Preparation(NamedTuple):
    """How images become a network's input. size: of the shorter side, or (height, width); crop: (height, width)."""

    size: int | tuple[int, int]
    crop: tuple[int, int] | None
    mean: Sequence[float]
    std: Sequence[float]

    def __call__(self, images: Tensor) -> Tensor:
        """float [n, 3, h, w] in [0, 1] to what the network reads."""
        size = self.size
        if isinstance(size, int):
            h, w = images.shape[-2:]
            size = (size * h // min(h, w), size * w // min(h, w))
        x = F.interpolate(images, size=size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
        if self.crop is not None:
            top, left = ((have - want) // 2 for have, want in zip(x.shape[-2:], self.crop, strict=True))
            x = x[..., top : top + self.crop[0], left : left + self.crop[1]]
        mean, std = (x.new_tensor(values).view(1, 3, 1, 1) for values in (self.mean, self.std))
        return (x - mean) / std


class Scorer(NamedTuple):
    """A loaded network: score(tokens, prepared images [n, 3, h, w]) -> n values; tokenize: texts -> tokens."""

    score: Any
    tokenize: Any
    prepare: Preparation


def _scores(samples: Samples, scorer: Scorer, name: str, device: str) -> list[float | None]:
    """Each sample's score with its prompt, averaged over frames."""
    if samples.prompts is None:
        raise ConfigError(f"{name} needs the prompts of the samples: leave it out where there are none")
    frames = samples.reference.shape[1]
    texts = [prompt for prompt in samples.prompts for _ in range(frames)]
    images = rgb(samples.clamped()[0].float())
    found = []
    with torch.no_grad():
        for start in range(0, len(images), CHUNK):
            part = images[start : start + CHUNK].to(device)
            tokens = scorer.tokenize(texts[start : start + CHUNK])
            tokens = {key: tokens[key].to(device) for key in ("input_ids", "attention_mask")}
            found.append(scorer.score(tokens, scorer.prepare(part)).reshape(len(part)).cpu())
    return frame_means(torch.cat(found), len(samples))


@metrics.register("clip_score")
@dataclass(frozen=True)
class ClipScore(PerSample):
    """CLIP score, 100 · max(cos(image, text), 0), a video's averaged over frames.

    Source: Hessel, Holtzman, Forbes, Le Bras, Choi, "CLIPScore", 2021, with torchmetrics' factor of 100.

    model: of transformers' CLIPModel, a local folder or a repository (downloaded unless offline), with its tokenizer
        and preprocessor_config.json. Prompts are cut to the length that it reads.
    device: where it runs.
    """

    higher_is_better = True
    model: str = "openai/clip-vit-large-patch14"
    device: str = "cpu"

    def check(self, model: str | None) -> None:
        needs_text(self, model)
        _load_clip(self.model, self.device)

    def __call__(self, samples: Samples) -> Sequence[float | None]:
        return _scores(samples, _load_clip(self.model, self.device), self.name, self.device)


@lru_cache(maxsize=1)
def _load_clip(name: str, device: str) -> Scorer:
    from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

    try:
        model = CLIPModel.from_pretrained(name).eval().requires_grad_(False).to(device)
        tokenizer = AutoTokenizer.from_pretrained(name)
        prepare = _preparation(AutoImageProcessor.from_pretrained(name).to_dict())
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise ConfigError(
            f"clip_score cannot load the CLIP model {name!r} ({reason(error)}). Name a local folder with "
            "a CLIPModel, its tokenizer and preprocessor_config.json, or a repository that can be reached, as "
            "settings.clip_score.model, or leave clip_score out"
        ) from error
    length = model.config.text_config.max_position_embeddings

    def tokenize(texts: list[str]) -> Mapping[str, Tensor]:
        return tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt")

    def score(tokens: Mapping[str, Tensor], images: Tensor) -> Tensor:
        # transformers 5 returns an object, 4 the features themselves
        found = (model.get_image_features(pixel_values=images), model.get_text_features(**tokens))
        image, text = (getattr(x, "pooler_output", x) for x in found)
        return 100 * F.cosine_similarity(image, text, dim=-1).clamp(min=0)

    return Scorer(score, tokenize, prepare)


def _preparation(config: Mapping[str, Any]) -> Preparation:
    """From an image processor's configuration."""
    size, crop = config["size"], config.get("crop_size")
    shortest = size.get("shortest_edge")
    return Preparation(
        size=shortest or (size["height"], size["width"]),
        crop=(crop["height"], crop["width"]) if crop and config.get("do_center_crop", True) else None,
        mean=config["image_mean"],
        std=config["image_std"],
    )


@metrics.register("image_reward")
@dataclass(frozen=True)
class ImageReward(PerSample):
    """ImageReward, a learned human preference for image and prompt; about 0 ± 1, a video's averaged over frames.

    Source: Xu, Liu, Wu, Tong, Li, Ding, Tang, Dong, "ImageReward", 2023.

    model: one of
        - a name that the package ImageReward knows (`pip install image-reward`; it downloads the weights),
        - a folder with ImageReward.pt and med_config.json as published, read by that package,
        - a folder with a tokenizer of transformers and reward.ts, any reward network as TorchScript:
          f(input_ids [n, 35], attention_mask [n, 35], images [n, 3, 224, 224] normalised like CLIP's) -> n rewards.
    device: where it runs.
    """

    higher_is_better = True
    model: str = "ImageReward-v1.0"
    device: str = "cpu"

    def check(self, model: str | None) -> None:
        needs_text(self, model)
        _load_reward(self.model, self.device)

    def __call__(self, samples: Samples) -> Sequence[float | None]:
        return _scores(samples, _load_reward(self.model, self.device), self.name, self.device)


@lru_cache(maxsize=1)
def _load_reward(name: str, device: str) -> Scorer:
    folder = Path(name).expanduser()
    if (folder / EXPORTED_REWARD).is_file():
        network, tokenizer = _exported_reward(folder)
    else:
        network, tokenizer = _package_reward(name, device)
    network.to(device)

    def tokenize(texts: list[str]) -> Mapping[str, Tensor]:
        return tokenizer(texts, padding="max_length", truncation=True, max_length=REWARD_TOKENS, return_tensors="pt")

    def score(tokens: Mapping[str, Tensor], images: Tensor) -> Tensor:
        call = getattr(network, "score_gard", network)  # the package's own spelling
        return call(tokens["input_ids"], tokens["attention_mask"], images)

    side = (REWARD_SIZE, REWARD_SIZE)
    return Scorer(score, tokenize, Preparation(REWARD_SIZE, side, CLIP_MEAN, CLIP_STD))


def _exported_reward(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"image_reward: no tokenizer in {folder} ({reason(error)})") from error
    return load_torchscript(folder / EXPORTED_REWARD, "image_reward"), tokenizer


def _package_reward(name: str, device: str) -> tuple[Any, Any]:
    """Network and tokenizer by the package ImageReward, from a name or a folder of the published files."""
    folder = Path(name).expanduser()
    options: dict[str, Any] = {"device": device}
    if folder.is_dir():
        for file in PUBLISHED_REWARD:
            if not (folder / file).is_file():
                raise ConfigError(
                    f"image_reward: {folder} holds neither {EXPORTED_REWARD} with a tokenizer nor "
                    f"{' and '.join(PUBLISHED_REWARD)}"
                )
        name = str(folder / PUBLISHED_REWARD[0])
        options["download_root"] = str(folder)  # where it looks for med_config.json
    try:
        import ImageReward as package
    except ImportError as error:
        raise ConfigError(
            f"image_reward cannot load {name!r}: the package ImageReward is missing or broken ({error}). "
            "`pip install image-reward`, name a folder with an exported reward network as settings.image_reward.model, "
            "or leave image_reward out"
        ) from error
    try:
        network = package.load(name, **options)
    except Exception as error:  # of whatever it builds on: a wrong name, no network, a changed transformers
        raise ConfigError(
            f"image_reward cannot load {name!r} ({type(error).__name__}: {error}). Name a folder with "
            f"{' and '.join(PUBLISHED_REWARD)} as settings.image_reward.model, or leave image_reward out"
        ) from error
    return network.eval(), network.blip.tokenizer
