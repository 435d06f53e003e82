"""Faster diffusers pipelines: reuse block features between denoising steps, at a quality you choose.

import diffusion_cache as dc
dc.enable(pipe, policy="interval", every=2)
images = pipe(prompt).images
print(dc.summary(pipe)); dc.disable(pipe)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import ConfigError, DiffusionCacheError, DiffusionCacheWarning, NoSpansError

if TYPE_CHECKING:
    from . import correctors, forecasters, policies, published, reference, registry, systems
    from .advice import recommend
    from .api import cached, disable, enable, inspect, refresh, run, summary, tune
    from .chunks import Stream
    from .context import NoiseLevels
    from .profile import Profile
    from .slicing import slice_features

__version__ = "0.1.0"

_HOMES = {
    **dict.fromkeys(("cached", "disable", "enable", "inspect", "refresh", "run", "summary", "tune"), ".api"),
    "NoiseLevels": ".context",
    "Profile": ".profile",
    "Stream": ".chunks",
    "recommend": ".advice",
    "slice_features": ".slicing",
}
_MODULES = ("correctors", "forecasters", "policies", "published", "reference", "registry", "systems")
__all__ = [
    "ConfigError",
    "DiffusionCacheError",
    "DiffusionCacheWarning",
    "NoSpansError",
    "NoiseLevels",
    "Profile",
    "Stream",
    "cached",
    "correctors",
    "disable",
    "enable",
    "forecasters",
    "inspect",
    "policies",
    "published",
    "recommend",
    "reference",
    "refresh",
    "registry",
    "run",
    "slice_features",
    "summary",
    "systems",
    "tune",
]


def __getattr__(name: str) -> Any:
    # torch and diffusers take seconds to import; `import diffusion_cache` does not
    if name in _HOMES:
        return getattr(import_module(_HOMES[name], __name__), name)
    if name in _MODULES:
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
