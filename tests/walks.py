"""A small denoiser, and samples on a walk, some of whose steps are larger than others."""

import torch
from diffusers import DiTTransformer2DModel

STEPS, BATCH = 9, 3


def model_of(**options):
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=1, out_channels=1, num_layers=3, norm_num_groups=16,
        sample_size=8, patch_size=2, num_embeds_ada_norm=4, **options,
    )  # fmt: skip
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def walk():
    """[steps, batch, 1, 8, 8]"""
    generator = torch.Generator().manual_seed(3)
    sizes = 0.3 * torch.rand(STEPS, BATCH, 1, 1, 1, generator=generator) ** 2
    sizes[0] = 1.0
    return (sizes * torch.randn(STEPS, BATCH, 1, 8, 8, generator=generator)).cumsum(0)


@torch.no_grad()
def call(model, x, step):
    times = torch.full((len(x),), 900 - 90 * step)
    return model(x, timestep=times, class_labels=torch.zeros_like(times)).sample
