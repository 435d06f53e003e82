"""Evaluation of pipelines from a folder: text to image, class to image, other samplers."""

import json
from pathlib import Path

import diffusers
import pytest
import torch
from hydra import compose, initialize_config_module
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffusion_cache.cli import evaluate as command
from diffusion_cache.errors import ConfigError
from diffusion_cache.evaluation.jobs import Team, run_job
from diffusion_cache.evaluation.prompts import Sample
from diffusion_cache.evaluation.runner import Job
from diffusion_cache.evaluation.subjects import Pretrained

WORDS = [f"{letter}</w>" for letter in "abcdefghijklmnopqrstuvwxyz,"] + list("abcdefghijklmnopqrstuvwxyz")
COMMON = [
    "steps=4",
    "prompts.n=2",
    "timing=none",
    "model.dtype=float32",
    "model.device=cpu",
    "metrics.distribution=false",
]


def autoencoder():
    return diffusers.AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=16,
    )


@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory):
    """A folder with a tiny text-to-image pipeline, its tokenizer included."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    text = CLIPTextConfig(
        vocab_size=len(WORDS) + 2,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        eos_token_id=1,
    )
    vocabulary = {word: i for i, word in enumerate(["<|startoftext|>", "<|endoftext|>", *WORDS])}
    pipe = diffusers.StableDiffusionPipeline(
        vae=autoencoder(),
        text_encoder=CLIPTextModel(text),
        tokenizer=CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=16),
        unet=unet,
        scheduler=diffusers.DDIMScheduler(clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    folder = tmp_path_factory.mktemp("stable-diffusion")
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dit(tmp_path_factory):
    """A folder with a tiny class-to-image pipeline, which has no output_type "pt"."""
    torch.manual_seed(0)
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        norm_num_groups=2,
        sample_size=8,
    )
    torch.nn.init.normal_(transformer.proj_out_2.weight, std=0.2)
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    pipe = diffusers.DiTPipeline(transformer, autoencoder(), scheduler, id2label={})
    folder = tmp_path_factory.mktemp("dit")
    pipe.save_pretrained(folder)
    return folder


def config(*overrides):
    command.register_methods()
    with initialize_config_module(command.CONFIGS, version_base="1.3"):
        return command.resolved(compose("evaluate", [*COMMON, *overrides]))


def made(folder, *overrides):
    paths = run_job(Job(config(*overrides), Path(folder)), lambda *news: None, Team())
    return [json.loads((path / "summary.json").read_text()) for path in paths]


def test_text_to_image(stable_diffusion, tmp_path):
    options = [
        "model=hub",
        f"model.repository={stable_diffusion}",
        "prompts=builtin",
        "model.call={height: 16, width: 16}",
    ]
    (summary,) = made(tmp_path, *options, "method=interval")
    assert summary["problem"] is None
    assert summary["model"] == str(stable_diffusion)
    assert summary["sampler"] == "DDIMScheduler"
    assert summary["n"] == 2
    assert 10 < summary["metrics"]["psnr"]["mean"] < 100
    assert 0.5 < summary["flops_ratio"] < 0.9  # a cut leaves the top level out
    assert summary["metrics"]["latent_error"]["mean"] > 0


def test_another_scheduler(stable_diffusion, tmp_path):
    options = [
        "model=hub",
        f"model.repository={stable_diffusion}",
        "prompts=builtin",
        "model.call={height: 16, width: 16}",
    ]
    options += ["sampler=scheduler", "sampler.options={use_karras_sigmas: true}"]
    (summary,) = made(tmp_path, *options, "sampler.name=DPMSolverMultistepScheduler", "method=interval")
    assert summary["sampler"] == "DPMSolverMultistepScheduler"
    assert summary["problem"] is None
    with pytest.raises(ConfigError, match="Did you mean 'DPMSolverMultistepScheduler'"):
        made(tmp_path, *options, "sampler.name=DPMSolverMultistepSchedulr", "method=interval")


def test_class_to_image(dit, tmp_path):
    options = ["model=hub", f"model.repository={dit}", "prompts=classes", "model.call={guidance_scale: 1.0}"]
    (summary,) = made(tmp_path, *options, "method=interval")
    assert summary["problem"] is None
    assert summary["nfe_ratio"] == pytest.approx(0.5)
    assert 10 < summary["metrics"]["psnr"]["mean"] < 100


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.dtype=float23", "Did you mean 'float32'"),
        ("model.offload=modell", "Did you mean 'model'"),
        ("model.compile=block", "Did you mean 'blocks'"),
        ("model.device=tpu0x", "must be auto or a device"),
        ("model.device=cuda:9", "model.device=cuda:9 is not there: torch sees 0 GPUs"),
        ("model.call={hight: 16}", "Did you mean 'height'"),
    ],
)
def test_options_that_cannot_work(stable_diffusion, tmp_path, override, message):
    options = ["model=hub", f"model.repository={stable_diffusion}", "prompts=builtin", "method=interval"]
    with pytest.raises(ConfigError, match=message):
        made(tmp_path, *options, override)


def test_what_the_evaluation_gives_itself_is_not_for_the_call(stable_diffusion):
    options = config("model=hub", f"model.repository={stable_diffusion}")["model"]
    for key, instead in (("prompt", "prompts="), ("class_labels", "prompts="), ("generator", "prompts.first_seed=")):
        with pytest.raises(ConfigError, match=f"model.call.{key} is not yours to give: say {instead}"):
            Pretrained({**options, "call": {key: "x"}}, {"name": None, "options": {}})


def test_a_negative_prompt_is_given_for_each_sample(stable_diffusion):
    options = config("model=hub", f"model.repository={stable_diffusion}")["model"]
    what = Pretrained({**options, "call": {"negative_prompt": "a blur"}}, {"name": None, "options": {}})
    assert what.inputs([Sample(0, "a", 0), Sample(1, "b", 1)], 2)["negative_prompt"] == ["a blur"] * 2
    assert what.text


def test_a_repository_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match="offline, give a local folder"):
        made(tmp_path, "model=hub", f"model.repository={tmp_path}/nothing", "prompts=builtin")


def test_metrics_without_their_network_are_told_first(stable_diffusion, tmp_path):
    options = ["model=hub", f"model.repository={stable_diffusion}", "prompts=builtin", "method=interval"]
    with pytest.raises(ConfigError, match="lpips"):
        made(tmp_path, *options, "metrics.names=[psnr,lpips]", "metrics.settings={lpips: {backbone: /nowhere.pth}}")
    assert not list((tmp_path / "runs").glob("*/summary.json"))
