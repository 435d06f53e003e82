"""Generations whose features wait on the host: the same images as without, however late the copies are made."""

import pytest
import torch
from late_carrier import LateCarrier

import diffusion_cache as dc
from diffusion_cache import offload, reference

STEPS = 6
TAYLOR = dict(policy="interval", forecaster="taylor", every=2)
METHODS = {
    "blocks": ("dit-digits", dict(scope="block", **TAYLOR)),
    "branches of two passes": ("wan-moving-digits", dict(scope="branch", cache_dtype="int8-delta", **TAYLOR)),
    "adaptive": ("flux-digits", dict(policy="first_block", threshold=0.4, forecaster="taylor")),
    "signals of what is stored": ("dit-digits", dict(policy="racer", scope="stack", every=2)),
}


def generate(name, **method):
    pipe = reference.load(name)
    with dc.cached(pipe, **method):
        images = reference.images(name, pipe(**reference.inputs(name, (3, 8), (5, 6), steps=STEPS)))
        summary = dc.summary(pipe)
    assert summary.reused > 0
    return images, summary


@pytest.mark.parametrize("case", METHODS)
def test_images_are_the_same(case, monkeypatch):
    name, method = METHODS[case]
    made = []
    monkeypatch.setattr(offload, "carrier", lambda device: made.append(LateCarrier()) or made[-1])
    expected, plain = generate(name, **method)
    assert not made
    images, summary = generate(name, cache_device="cpu", **method)
    assert torch.equal(images, expected)
    assert len(made) == 1
    assert made[0].asked > 0
    assert summary.cache_bytes == plain.cache_bytes == plain.resident_bytes
    if summary.spans > 2:
        assert summary.resident_bytes <= 3 * plain.cache_bytes / summary.spans


def test_values_that_are_not_finite_are_told_at_the_end():
    pipe = reference.load("dit-digits")
    block = pipe.transformer.transformer_blocks[0]
    hook = block.register_forward_hook(lambda module, args, output: output * float("nan"))
    with (
        dc.cached(pipe, scope="block", cache_device="cpu", **TAYLOR),
        pytest.warns(dc.DiffusionCacheWarning, match="not finite; the images of this run may show it"),
    ):
        pipe(**reference.inputs("dit-digits", (3,), (5,), steps=2))
    hook.remove()


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (dict(cache_device="disk"), "Unknown cache_device 'disk'"),
        (dict(cache_device="cpu", stream=dc.Stream()), "leave cache_device out"),
    ],
)
def test_bad_options(options, problem):
    pipe = reference.load("flux-digits")
    with pytest.raises(dc.ConfigError, match=problem):
        dc.enable(pipe, "interval", "taylor", every=2, **options)
    assert not [name for name in vars(pipe) if "diffusion_cache" in name]


def test_a_denoiser_compiled_as_a_whole():
    pipe = reference.load("flux-digits")
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    with pytest.raises(dc.ConfigError, match="compiled as a whole"):
        dc.enable(pipe, "interval", "taylor", every=2, scope="stack", cache_device="cpu")
