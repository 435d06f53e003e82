"""A small Diffusion-Policy transformer (Chi et al. 2023, arXiv 2303.04137) for the task of `reaching`.

It denoises the next HORIZON positions given what was seen; the first EXECUTED of them are done, then it is asked
again (receding horizon). Like the original's transformer, its tokens are actions, and the noise level comes in among
the observations that cross-attention reads. It is a bare denoiser, for a loop of one's own;
scripts/train_reference.py trains it.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from diffusers import DDPMScheduler
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from safetensors.torch import load_file
from torch import Tensor, nn

from . import WEIGHTS, reaching

NAME = "reacher"
HORIZON, EXECUTED = 16, 8
STEPS = 100
OBSERVED = 5  # tokens of an observation
WIDTH, LAYERS, HEADS = 64, 6, 4
GATE = 0.7
FIRST_SEED = 50_000  # of the episodes that the gate is passed on

Within = Callable[[], AbstractContextManager[Any]]


class Reacher(nn.Module):
    """Predicts the noise in actions [n, HORIZON, 2] at a timestep, given observations [n, OBSERVED, 2]."""

    def __init__(self) -> None:
        super().__init__()
        self.action = nn.Linear(2, WIDTH)
        self.place = nn.Parameter(0.02 * torch.randn(HORIZON, WIDTH))
        self.observed = nn.Linear(2, WIDTH)
        self.kind = nn.Parameter(0.02 * torch.randn(OBSERVED, WIDTH))
        self.frequencies = Timesteps(WIDTH, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time = TimestepEmbedding(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(
            BasicTransformerBlock(WIDTH, HEADS, WIDTH // HEADS, cross_attention_dim=WIDTH, activation_fn="gelu")
            for _ in range(LAYERS)
        )
        self.norm = nn.LayerNorm(WIDTH)
        self.noise = nn.Linear(WIDTH, 2)

    def forward(self, sample: Tensor, timestep: Tensor, observation: Tensor) -> Tensor:
        times = self.time(self.frequencies(timestep.expand(len(sample))).to(sample))
        context = torch.cat([times[:, None], self.observed(observation) + self.kind], dim=1)
        hidden = self.action(sample) + self.place
        for block in self.blocks:
            hidden = block(hidden, encoder_hidden_states=context)
        return self.noise(self.norm(hidden))


def load(dtype: torch.dtype = torch.float32) -> Reacher:
    """The trained denoiser on the CPU, in eval mode."""
    model = Reacher()
    model.load_state_dict(load_file(WEIGHTS / NAME / "model.safetensors"))
    return model.to(dtype).eval()


def scheduler() -> Any:
    """DDPM, of as many steps as it was trained with."""
    return DDPMScheduler(num_train_timesteps=STEPS, beta_schedule="squaredcos_cap_v2", prediction_type="epsilon")


def loss(model: nn.Module, n: int, seed: int, device: str = "cpu") -> Tensor:
    """Mean squared error of the noise, on n new demonstrations."""
    generator = torch.Generator().manual_seed(seed)
    observation, actions = reaching.demonstrations(n, HORIZON, generator)
    noise = torch.randn(actions.shape, generator=generator)
    t = torch.randint(STEPS, (n,), generator=generator)
    noisy = scheduler().add_noise(actions, noise, t)
    noisy, t, observation, noise = (tensor.to(device) for tensor in (noisy, t, observation, noise))
    return (model(noisy, t, observation) - noise).square().mean()


@torch.no_grad()
def act(
    model: nn.Module,
    observation: Tensor,
    generators: Sequence[torch.Generator],
    steps: int = STEPS,
    sampler: Any = None,
) -> Tensor:
    """Actions [n, HORIZON, 2] for observations [n, OBSERVED, 2], each from its own generator."""
    sampler = sampler or scheduler()
    sampler.set_timesteps(steps)
    sample = torch.stack([torch.randn(HORIZON, 2, generator=generator) for generator in generators])
    for t in sampler.timesteps:
        sample = sampler.step(model(sample, t, observation), t, sample, generator=list(generators)).prev_sample
    return sample


def successes(model: nn.Module, seeds: Sequence[int], within: Within = nullcontext, steps: int = STEPS) -> Tensor:
    """Whether each of these episodes succeeds, bool [n].

    within: makes the context in which each denoising of actions runs, such as
    `lambda: diffusion_cache.run(model, …, num_steps=100)`.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    drawn = [reaching.scenes(1, generator) for generator in generators]
    scene = reaching.Scene(*(torch.cat(parts) for parts in zip(*drawn, strict=True)))
    before = position = scene.start
    failed = torch.zeros(len(seeds), dtype=torch.bool)
    done = failed.clone()
    for _ in range(reaching.LIMIT // EXECUTED):
        with within():
            actions = act(model, scene.observation(before, position), generators, steps)
        for action in actions[:, :EXECUTED].unbind(1):
            before, position = position, reaching.move(position, action)
            failed |= reaching.touched(scene, before, position) & ~done
            done |= reaching.arrived(scene, position) & ~failed
        if bool((done | failed).all()):
            break
    return done
