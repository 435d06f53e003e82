"""An autoencoder that does nothing, so that pixel-space models run through latent pipelines."""

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from torch import Tensor


class IdentityAutoencoder(ModelMixin, ConfigMixin):
    """decode(z) = z. Its config carries the fields that image (AutoencoderKL) and Wan pipelines read."""

    @register_to_config
    def __init__(
        self,
        channels: int = 1,
        block_out_channels: tuple[int, ...] = (1,),
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
        scale_factor_temporal: int = 1,
        scale_factor_spatial: int = 1,
    ):
        super().__init__()
        self.register_to_config(
            latent_channels=channels, z_dim=channels, latents_mean=[0.0] * channels, latents_std=[1.0] * channels
        )
        # pipelines ask a module for its dtype and device
        self.register_buffer("anchor", torch.zeros(1))

    def decode(
        self, latents: Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple[Tensor]:
        return DecoderOutput(sample=latents) if return_dict else (latents,)
