"""Published architectures: their sizes, and that random weights make something worth timing."""

import pytest
import torch

import diffusion_cache as dc
from diffusion_cache.errors import ConfigError
from diffusion_cache.evaluation.architectures import ARCHITECTURES, architecture

# billions of parameters as published; of SD3.5 with its table of positions, a buffer
PUBLISHED = {
    "flux-1-dev": 11.9,
    "sd-3.5-medium": 2.47,
    "pixart-sigma": 0.61,
    "wan-2.1-1.3b": 1.42,
    "sdxl": 2.57,
    "dit-xl-2": 0.675,
}
IMAGE_TOKENS = {"flux-1-dev": (1, 4096, 64), "sdxl": (2, 4, 128, 128), "wan-2.1-1.3b": (1, 16, 21, 60, 104)}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_full_size_has_the_published_parameters(name):
    model = architecture(name)
    denoiser = model.build("meta")
    parameters = sum(parameter.numel() for parameter in denoiser.parameters())
    assert parameters == model.parameters
    if name == "dit-xl-2":  # diffusers has the embedder of noise level and class in each block, the original has one
        embedder = denoiser.transformer_blocks[0].norm1.emb
        parameters -= 27 * sum(parameter.numel() for parameter in embedder.parameters())
        assert parameters == 674_834_720
    if name == "sd-3.5-medium":
        parameters += denoiser.pos_embed.pos_embed.numel()
    assert parameters / 1e9 == pytest.approx(PUBLISHED[name], rel=0.005)
    assert all(parameter.is_meta for parameter in denoiser.parameters())
    assert model.steps in (20, 28, 40, 50)


@pytest.mark.parametrize("name", IMAGE_TOKENS)
def test_calls_have_the_usual_size(name):
    model = architecture(name)
    calls = model.calls(dtype=torch.bfloat16)
    assert len(calls) == len(model.passes)
    latents = calls[0][model.sample]
    assert latents.shape == IMAGE_TOKENS[name]
    assert latents.dtype == torch.bfloat16
    assert (latents[0] == latents[-1]).all()  # guidance branches start from one noise
    assert calls[0]["encoder_hidden_states"].shape[:2] == (model.rows, model.tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_a_loop_is_finite_and_depends_on_everything(name, dtype):
    model = architecture(name)
    denoiser = model.build("cpu", dtype, tiny=True)
    start = calls = model.calls("cpu", dtype, batch=2, tiny=True)
    first = [denoiser(**call)[0] for call in calls]
    for step in range(4):
        calls = model.advance(calls, [denoiser(**call)[0] for call in calls], step, 4)
    latents = calls[0][model.sample]
    assert latents.shape == start[0][model.sample].shape
    assert latents.dtype == dtype
    assert latents.isfinite().all()
    assert 0.3 < first[0].float().std() < 3
    assert calls[0]["timestep"].unique().tolist() == [0.0]
    # blocks and conditions take part: no layer starts at zero, as it would in training
    rows = model.rows * 2
    assert not torch.equal(first[0][0], first[0][rows - 1])
    again = model.build("cpu", dtype, tiny=True)
    assert torch.equal(again(**start[0])[0], first[0])
    gate = next(weight for path, weight in again.named_parameters() if "attn" in path and weight.ndim == 2)
    gate.zero_()
    assert not torch.equal(again(**start[0])[0], first[0])


def test_weights_differ_by_seed_and_some_stay_wide():
    model = architecture("wan-2.1-1.3b")
    one, other = (model.build("cpu", torch.bfloat16, tiny=True, seed=seed) for seed in (0, 1))
    assert not torch.equal(one.patch_embedding.weight, other.patch_embedding.weight)
    assert one.patch_embedding.weight.dtype == torch.bfloat16
    assert one.scale_shift_table.dtype == torch.float32  # as diffusers loads it
    assert one.condition_embedder.time_embedder.linear_1.weight.dtype == torch.float32


@torch.no_grad()
def test_guidance_and_the_euler_step():
    model = architecture("wan-2.1-1.3b")
    calls = model.calls("cpu", torch.float32, tiny=True)
    latents = calls[0]["hidden_states"]
    positive, negative = torch.ones_like(latents), torch.zeros_like(latents)
    after = model.advance(calls, [positive, negative], 0, 10)
    assert torch.allclose(after[1]["hidden_states"], latents - 0.1 * model.guidance)
    assert after[1]["encoder_hidden_states"] is calls[1]["encoder_hidden_states"]
    assert after[0]["timestep"].item() == pytest.approx(900)
    dit = architecture("dit-xl-2")  # its positive rows come first, and half of its output is a variance
    calls = dit.calls("cpu", torch.float32, batch=3, tiny=True)
    latents = calls[0]["hidden_states"]
    output = torch.zeros(6, 8, 16, 16)
    output[:3, :4] = 1.0
    after = dit.advance(calls, [output], 0, 4)[0]["hidden_states"]
    assert torch.allclose(after, latents - dit.guidance / 4)
    assert calls[0]["class_labels"].tolist() == [0, 1, 2, 1000, 1000, 1000]


@torch.no_grad()
def test_loops_can_be_cached():
    model = architecture("wan-2.1-1.3b")
    denoiser = model.build("cpu", torch.float32, tiny=True)
    calls = model.calls("cpu", torch.float32, tiny=True)
    with dc.run(denoiser, "interval", every=2, num_steps=4) as run:
        for step in range(4):
            run.next_step()
            calls = model.advance(calls, [denoiser(**call)[0] for call in calls], step, 4)
        computed = [record.computed for record in run.summary().records]
    assert computed == [True, True, False, False] * 2  # both passes of a step


def test_bad_input():
    with pytest.raises(ConfigError, match="Did you mean 'flux-1-dev'"):
        architecture("flux-dev")
    with pytest.raises(ConfigError, match="batch must be at least 1"):
        architecture("sdxl").calls(batch=0)
    with pytest.raises(ConfigError, match=r"has the shape of \[4, 16, 16\]"):
        architecture("sdxl").calls(tiny=True, latent=(3, 16, 16))
