"""Whole generations with the kernels and without: collected where they are interpreted on the CPU."""

import pytest
import torch

import diffusion_cache as dc
from diffusion_cache import ops, reference

METHODS = {
    "several features": ("flux-digits", dict(policy="interval", every=3, forecaster="taylor", order=2, scope="stack")),
    "codes": ("unet-digits", dict(policy="interval", every=2, forecaster="reuse", scope="cut", cache_dtype="fp8")),
    "differences": (
        "flux-digits",
        dict(policy="interval", every=2, forecaster="taylor", scope="stack", cache_dtype="int8-delta", warmup=2),
    ),
    "branches": ("flux-digits", dict(policy="interval", every=2, forecaster="reuse", scope="branch")),
    "adaptive": ("wan-moving-digits", dict(policy="first_block", threshold=10.0, max_consecutive=2)),
}


def generate(name, method, steps=4):
    pipe = reference.load(name)
    with dc.cached(pipe, **method):
        images = reference.images(name, pipe(**reference.inputs(name, (3, 8), (5, 6), steps=steps)))
        assert dc.summary(pipe).reused > 0
    return images


@pytest.mark.parametrize("case", METHODS)
def test_images_are_the_same_with_kernels(case, monkeypatch):
    name, method = METHODS[case]
    launched, find = [], ops._kernel

    def counted(kernel):
        launched.append(kernel)
        return find(kernel)

    monkeypatch.setattr(ops, "_kernel", counted)
    with_kernels = generate(name, method)
    used = set(launched)
    monkeypatch.setattr(ops, "_MODE", "off")
    launched.clear()
    without = generate(name, method)
    assert not launched
    others = {"adaptive": {"relative_l1"}, "branches": {"gated_residual"}}
    others |= {case: {"store_residual"} for case in ("codes", "differences")}
    assert used == {"forecast_residual"} | others.get(case, set())
    assert (with_kernels - without).abs().max() <= 1e-5
    assert torch.isfinite(with_kernels).all()
