"""Offline profiles and plans that ship with the package, imported as `diffusion_cache.profiles`."""
