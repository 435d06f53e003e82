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
# denoisers that live elsewhere in diffusers
DENOISERS = ("UNetControlNetXSModel", "UniDiffuserModel", "WuerstchenPrior", "WuerstchenDiffNeXt")
TIME_ARGUMENTS = ("timestep", "timesteps", "timestep_ratio", "t", "r", "timestep_img")
# pipelines that look into their denoiser while it runs, and so need every block of it at every step
LOOKING_INSIDE = {
    "StableDiffusionSAGPipeline": "attention maps for self-attention guidance",
    "StableDiffusionAttendAndExcitePipeline": "attention maps, and gradients through the blocks",
    "StableDiffusionPix2PixZeroPipeline": "attention maps, and gradients through the blocks",
    "LEditsPPPipelineStableDiffusion": "attention maps for the masks of its edits",
    "LEditsPPPipelineStableDiffusionXL": "attention maps for the masks of its edits",
}

# wrappers that hide a denoiser, and what to do instead
WRAPPERS = {
    "FullyShardedDataParallel": "shard it by fully_shard (FSDP2), which leaves it the module that it is",
    "DistributedDataParallel": "give the pipeline the module that it wraps: only training needs the wrapper",
    "DataParallel": "give the pipeline the module that it wraps, and each device a pipeline of its own",
    "PeftModel": "give the pipeline its get_base_model(), which has the same adapters in it, or add them by the "
    "denoiser's own add_adapter() or load_lora_adapter()",
}


def unwrap(module: nn.Module) -> nn.Module:
    """The module itself where torch.compile returned a wrapper around it."""
    return getattr(module, "_orig_mod", module)


def _wrapped(wrapper: Any) -> Any:
    return wrapper.get_base_model() if hasattr(wrapper, "get_base_model") else getattr(wrapper, "module", None)


def is_denoiser(component: Any) -> bool:
    """A module from diffusers' transformers or UNets, or any other whose forward takes a timestep.

    Of the former not those that take nothing beside one input, neither time nor conditions: containers of motion
    modules, whose forward does nothing, and decoders.
    """
    if not isinstance(component, nn.Module):
        return False
    cls = type(unwrap(component))
    parameters = inspect.signature(cls.forward).parameters
    if cls.__module__.startswith(DENOISER_PACKAGES):
        return len(parameters) > 2  # self is one
    if cls.__name__ in DENOISERS:
        return True
    if cls.__module__.startswith(OTHER_PACKAGES):
        return False
    return any(name in parameters for name in TIME_ARGUMENTS[:4])


def find_denoisers(pipe: Any) -> dict[str, nn.Module]:
    """The pipeline's denoisers by component name, e.g. {"transformer": …, "transformer_2": …}.

    Raises:
        ConfigError: if this is no diffusers pipeline, or hides its denoiser in a wrapper.
        NoSpansError: if none of its components is a denoiser, or its blocks must run at every step.
    """
    components = getattr(pipe, "components", None)
    if not isinstance(components, dict):
        raise ConfigError(
            f"expected a diffusers pipeline, got {type(pipe).__name__}; "
            f"for a bare denoiser use diffusion_cache.run(model, …)"
        )
    for cls in type(pipe).__mro__:
        if cls.__name__ in LOOKING_INSIDE:
            raise NoSpansError(
                f"{type(pipe).__name__} reads {LOOKING_INSIDE[cls.__name__]} from inside its denoiser at every step, "
                "so that no block may be skipped"
            )
    for name, component in components.items():
        wrapper = next((cls.__name__ for cls in type(component).__mro__ if cls.__name__ in WRAPPERS), None)
        if wrapper is not None and is_denoiser(_wrapped(component)):
            raise ConfigError(f"the pipeline's {name} is wrapped in {wrapper}: {WRAPPERS[wrapper]}")
    found = {name: component for name, component in components.items() if is_denoiser(component)}
    if not found:
        raise NoSpansError(f"{type(pipe).__name__} has no denoiser among its components ({', '.join(components)})")
    return found
