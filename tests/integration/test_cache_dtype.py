"""Features in one-byte codes, and a limit on what features take."""

import warnings

import pytest
import torch

import diffusion_cache as dc
from diffusion_cache import reference
from diffusion_cache.measure import psnr

STEPS = 8
CODES = ("fp8", "int8")
METHODS = {
    "stack": ("flux-digits", dict(policy="interval", forecaster="taylor", every=2, scope="stack")),
    "cuts": ("unet-digits", dict(policy="interval", forecaster="reuse", every=2, scope="cut")),
    "branches": ("dit-digits", dict(policy="interval", forecaster="taylor", every=2, scope="branch")),
    "not linear": ("flux-digits", dict(policy="interval", forecaster="frequency", every=2, scope="stack")),
}
each_code = pytest.mark.parametrize("code", CODES)


def generate(pipe, name, labels=(3, 8), seeds=(5, 6)):
    return reference.images(name, pipe(**reference.inputs(name, labels, seeds, steps=STEPS)))


def cached(name, **method):
    """Images, and the summary of what was done."""
    pipe = reference.load(name)
    with dc.cached(pipe, **method):
        return generate(pipe, name), dc.summary(pipe)


@each_code
@pytest.mark.parametrize("case", METHODS)
def test_codes_take_a_quarter_of_float32_and_change_little(case, code):
    name, method = METHODS[case]
    uncached = generate(reference.load(name), name)
    images, plain = cached(name, **method)
    coded_images, coded = cached(name, cache_dtype=code, **method)
    assert [record.computed for record in coded.records] == [record.computed for record in plain.records]
    assert 0.25 < coded.cache_bytes / plain.cache_bytes < 0.35  # the scales of the rows come on top
    assert not torch.equal(coded_images, images)
    # what codes change is small beside what caching changes
    assert psnr(coded_images, images).min() > psnr(images, uncached).min() + 3


@pytest.mark.parametrize("case", METHODS)
def test_differences_in_codes_change_far_less(case):
    name, method = METHODS[case]
    images, plain = cached(name, **method)
    coded, _ = cached(name, cache_dtype="int8", **method)
    differences, summary = cached(name, cache_dtype="int8-delta", **method)
    assert [record.computed for record in summary.records] == [record.computed for record in plain.records]
    if case == "cuts":  # one feature of each span, which stays as it is
        assert torch.equal(differences, images)
        assert summary.cache_bytes == plain.cache_bytes
    else:
        assert summary.cache_bytes < 0.7 * plain.cache_bytes
        assert not torch.equal(differences, images)
        assert psnr(differences, images).min() > psnr(coded, images).min() + 6


@pytest.mark.parametrize("code", [*CODES, "int8-delta"])
def test_inspect_and_a_second_run(code):
    name, method = METHODS["stack"]
    pipe = reference.load(name)
    dc.enable(pipe, cache_dtype=code, **method)
    first = generate(pipe, name)
    assert torch.equal(generate(pipe, name), first)
    assert dc.inspect(pipe).cache_bytes == dc.summary(pipe).cache_bytes
    assert generate(pipe, name, (1,), (2,)).isfinite().all()  # another batch
    assert torch.equal(generate(pipe, name), first)


@each_code
def test_always_computing_is_bit_identical(code):
    name = "flux-digits"
    images, _ = cached(name, policy="interval", every=1, cache_dtype=code)
    assert torch.equal(images, generate(reference.load(name), name))


@pytest.mark.parametrize("code", ["int8", "int8-delta"])
def test_samples_that_are_computed_apart_do_not_depend_on_each_other(code):
    name, labels, seeds = "flux-digits", (3, 8, 1, 5), (5, 6, 7, 8)
    pipe = reference.load(name)
    with dc.cached(pipe, policy="first_block", threshold=0.5, forecaster="taylor", cache_dtype=code):
        together = generate(pipe, name, labels, seeds)
        assert any("of 4 samples" in record.reason for record in dc.summary(pipe).records)
        for row in (0, 2):
            alone = generate(pipe, name, labels[row : row + 1], seeds[row : row + 1])
            # sums in another order may round to the code beside
            assert (alone[0] - together[row]).abs().max() <= 5e-3


def test_values_that_are_not_finite_are_not_reused():
    name, method = METHODS["stack"]
    pipe = reference.load(name)
    block = pipe.transformer.transformer_blocks[0]
    hook = block.register_forward_hook(lambda module, args, output: tuple(part * float("nan") for part in output))
    with dc.cached(pipe, cache_dtype="fp8", **method):
        with pytest.warns(dc.DiffusionCacheWarning, match="not finite"):
            pipe(**reference.inputs(name, (3,), (5,), steps=4))
        assert dc.summary(pipe).reused == 0
    hook.remove()


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (dict(cache_dtype="fp4"), "Unknown cache_dtype 'fp4'"),
        (dict(cache_dtype="int8-delta", stream=dc.Stream(), forecaster="taylor"), "take 'int8'"),
        (dict(max_cache_bytes=0), "at least 1, not 0"),
        (dict(max_cache_bytes=1.5), "whole number"),
        (dict(max_cache_bytes=True), "whole number"),
    ],
)
def test_bad_options(options, problem):
    pipe = reference.load("flux-digits")
    with pytest.raises(dc.ConfigError, match=problem):
        dc.enable(pipe, "interval", every=2, **options)
    assert not [name for name in vars(pipe) if "diffusion_cache" in name]


@pytest.mark.parametrize("options", [dict(cache_dtype="fp8"), dict(max_cache_bytes=10**9)], ids=str)
def test_a_denoiser_compiled_as_a_whole_takes_features_as_they_are(options):
    pipe = reference.load("flux-digits")
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    with pytest.raises(dc.ConfigError, match="compiled as a whole"):
        dc.enable(pipe, "interval", "taylor", every=2, scope="stack", **options)


@pytest.mark.parametrize("dtype", ["model", "int8-delta"])
def test_what_does_not_fit_is_computed_and_told_once(dtype):
    name = "flux-digits"
    method = dict(policy="interval", forecaster="taylor", every=2, scope="block", cache_dtype=dtype)
    images, whole = cached(name, **method)
    pipe = reference.load(name)
    limit = whole.cache_bytes // 2
    dc.enable(pipe, max_cache_bytes=limit, **method)
    with pytest.warns(dc.DiffusionCacheWarning, match="max_cache_bytes") as told:
        part_images = generate(pipe, name)
    assert len(told) == 1
    part = dc.summary(pipe)
    assert 0 < part.hit_rate < whole.hit_rate
    assert 0 < part.cache_bytes <= limit
    assert not torch.equal(part_images, images)


def test_no_room_at_all_is_no_cache():
    name, method = METHODS["stack"]
    pipe = reference.load(name)
    dc.enable(pipe, max_cache_bytes=1, **method)
    with pytest.warns(dc.DiffusionCacheWarning, match="max_cache_bytes=1"):
        images = generate(pipe, name)
    assert torch.equal(images, generate(reference.load(name), name))
    assert (dc.summary(pipe).reused, dc.summary(pipe).cache_bytes) == (0, 0)


def test_enough_room_changes_nothing():
    name, method = METHODS["stack"]
    images, whole = cached(name, **method)
    with warnings.catch_warnings():
        warnings.simplefilter("error", dc.DiffusionCacheWarning)
        same, limited = cached(name, max_cache_bytes=whole.cache_bytes, **method)
    assert torch.equal(same, images)
    assert limited.cache_bytes == whole.cache_bytes


def test_a_span_that_is_never_reused_takes_no_room():
    """PAB computes every feed-forward branch unless told otherwise: the limit is the attentions' alone."""
    method = dict(policy="pab", forecaster="reuse", scope="branch", spatial=2)
    images, whole = cached("dit-digits", **method, feed_forward=1)
    _, attentions_and_more = cached("dit-digits", **method, feed_forward=2)
    assert whole.cache_bytes == attentions_and_more.cache_bytes // 2
    same, limited = cached("dit-digits", **method, feed_forward=1, max_cache_bytes=whole.cache_bytes)
    assert torch.equal(same, images)
    assert limited.hit_rate == whole.hit_rate > 0
