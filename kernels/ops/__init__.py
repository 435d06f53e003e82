"""The Triton kernels, imported as `diffusion_cache.kernels`.

One op per file: its formula and source, an fp32 `reference()`, the `@triton.jit` kernel, its launcher, tolerances and
bench shapes. Only `diffusion_cache/ops.py` imports this package. Triton itself is imported at the first launch.
"""
