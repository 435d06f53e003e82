"""Which of a pipeline's components are denoisers."""

import inspect
from typing import Any

from torch import nn

from ..errors import ConfigError, NoSpansError

DENOISER_PACKAGES = ("diffusers.models.transformers", "diffusers.models.unets")
OTHER_PACKAGES = (
    "diffusers.models.controlnets",
    "diffusers.models.autoencoders",
    "diffusers.models.adapter",
    "transformers.",
)
TIME_ARGUMENTS = ("timestep", "timesteps", "timestep_ratio", "t")


def unwrap(module: nn.Module) -> nn.Module:
    """The module itself where torch.compile returned a wrapper around it."""
    return getattr(module, "_orig_mod", module)


def is_denoiser(component: Any) -> bool:
    """A module from diffusers' transformers or UNets, or any other whose forward takes a timestep."""
    if not isinstance(component, nn.Module):
        return False
    cls = type(unwrap(component))
    if cls.__module__.startswith(DENOISER_PACKAGES):
        return True
    if cls.__module__.startswith(OTHER_PACKAGES):
        return False
    parameters = inspect.signature(cls.forward).parameters
    return any(name in parameters for name in TIME_ARGUMENTS)


def find_denoisers(pipe: Any) -> dict[str, nn.Module]:
    """The pipeline's denoisers by component name, e.g. {"transformer": …, "transformer_2": …}.

    Raises:
        ConfigError: if this is no diffusers pipeline.
        NoSpansError: if none of its components is a denoiser.
    """
    components = getattr(pipe, "components", None)
    if not isinstance(components, dict):
        raise ConfigError(
            f"expected a diffusers pipeline, got {type(pipe).__name__}; "
            f"for a bare denoiser use diffusion_cache.run(model, …)"
        )
    found = {name: component for name, component in components.items() if is_denoiser(component)}
    if not found:
        raise NoSpansError(f"{type(pipe).__name__} has no denoiser among its components ({', '.join(components)})")
    return found
