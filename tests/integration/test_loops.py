"""Denoising loops of many kinds, by the classes they are found in: steps, totals, passes and what is reused."""

import copy
import importlib
import inspect
from dataclasses import dataclass
from functools import partial

import diffusers
import pipeline_zoo
import pipelines_image
import pipelines_unet
import pipelines_video
import pytest
import torch
from cases import Spy
from pipeline_zoo import equal, tensors
from zoo import Draw

import diffusion_cache as dc
from diffusion_cache import DiffusionCacheWarning
from diffusion_cache.engine import intercept, patches, session_of
from diffusion_cache.models import find_denoisers, guidance_weights
from diffusion_cache.planning.target import _sampler_of

pytestmark = pytest.mark.filterwarnings("error::diffusion_cache.errors.DiffusionCacheWarning")

CASES = {case.id: case for case in pipeline_zoo.cases()}


@pytest.fixture(autouse=True)
def nothing_left():
    """Tests enable within `dc.cached` or disable at their end: no class stays patched."""
    before = set(patches._patches)
    yield
    assert set(patches._patches) == before


# what is expected, and reusing by hand


@dataclass(frozen=True)
class Call:
    """One denoiser call that is expected."""

    step: int
    key: str
    computed: bool
    denoiser: str = "transformer"


def regular(pattern, passes=("0",), denoiser="transformer"):
    """The same passes at every step of one loop, computed where the pattern has a 1."""
    return [
        Call(step, key, computed == "1", denoiser)
        for step, computed in enumerate(pattern)
        for key in passes
    ]  # fmt: skip


class ByHand:
    """Answers the expected calls, in order, by what the denoiser returned last in the same pass of the same loop."""

    def __init__(self, pipe, expected):
        self.pipe, self.calls = pipe, iter(expected)
        self.kept = {}

    def __enter__(self):
        self.forwards = [(name, module, module.forward) for name, module in find_denoisers(self.pipe).items()]
        for name, module, forward in self.forwards:
            module.forward = partial(self.call, name, forward)
            module.forward.__signature__ = inspect.signature(forward)

    def call(self, name, forward, *args, **kwargs):
        call = next(self.calls)
        assert call.denoiser == name
        if call.computed:
            self.kept[name, call.key] = forward(*args, **kwargs)
        return self.kept[name, call.key]

    def __exit__(self, error, *rest):
        for _, module, _ in self.forwards:
            del module.forward
        assert error or next(self.calls, None) is None


def record_of(record):
    return Call(record.step, record.pass_name, record.computed, record.denoiser)


def generate(pipe, call):
    return tensors(pipe(**call()))


def check(pipe, call, mask, expected, total=None):
    """Computed always, reused whole and reused at the default scope; total: None for the mask's length."""
    total = len(mask) if total is None else total
    uncached = generate(pipe, call)
    with dc.cached(pipe, "interval", every=1):
        assert equal(generate(pipe, call), uncached)
        summary = dc.summary(pipe)
    assert [(r.step, r.pass_name, r.denoiser) for r in summary.records] == [
        (c.step, c.key, c.denoiser) for c in expected
    ]
    assert (summary.total, summary.reused) == (total, 0)

    with dc.cached(pipe, "mask", "reuse", mask=mask, scope="denoiser"):
        cached = generate(pipe, call)
        summary = dc.summary(pipe)
    assert [record_of(r) for r in summary.records] == expected
    assert summary.total == total
    with ByHand(pipe, expected):
        assert equal(cached, generate(pipe, call))
    assert not equal(cached, uncached)

    with dc.cached(pipe, "mask", "reuse", mask=mask):
        generate(pipe, call)
        generate(pipe, call)  # the first run may still learn the order of the blocks
        summary = dc.summary(pipe)
    assert [record_of(r) for r in summary.records] == expected
    assert equal(generate(pipe, call), uncached)


def arguments(case, **more):
    """A case's call with other arguments; None takes one out."""

    def call():
        given = case.call() | more
        return {key: value for key, value in given.items() if value is not None or key not in more}

    return call


# loops of one kind of step


def row(name, mask, passes, **more):
    return pytest.param(name, mask, passes, more, id="-".join([name, *more]))


@pytest.mark.parametrize(
    ("name", "mask", "passes", "more"),
    [
        # image to image and inpainting
        row("FluxImg2ImgPipeline", "101", ("0",)),
        row("FluxImg2ImgPipeline", "1", ("0",), strength=0.25),
        row("StableDiffusion3InpaintPipeline", "101", ("0",)),
        row("QwenImageInpaintPipeline", "10", ("cond", "uncond"), strength=0.5),
        row("QwenImageImg2ImgPipeline", "101", ("cond", "uncond")),
        row("WanVideoToVideoPipeline", "101", ("0", "1")),
        # sigmas of one's own
        row("FluxPipeline", "101", ("cond",), sigmas=[1.0, 0.7, 0.2]),
        row("FluxPipeline-true_cfg", "1001", ("cond", "uncond"), sigmas=[1.0, 0.9, 0.5, 0.2]),
        # two passes, one call with a row for each branch (the prompt's is the second, then the first), several passes,
        # guidance that is distilled
        row("WanPipeline", "1001", ("cond", "uncond")),
        row("StableDiffusion3Pipeline", "1010", ("0",)),
        row("LuminaPipeline", "1010", ("0",)),
        row("ZImagePipeline", "1010", ("0",)),
        row("StableDiffusion3Pipeline-skip_layer", "1010", ("0", "1")),
        row("LTX2Pipeline", "1010", ("cond_uncond", "uncond_stg", "uncond_modality")),
        row("FluxPipeline", "1010", ("cond",)),
        row("SanaSprintPipeline", "1010", ("0",)),
        # `step` is called twice an iteration
        row("LTX2Pipeline-cfg", "1010", ("cond_uncond",)),
        row("CosmosTextToWorldPipeline", "1010", ("0", "1")),
        row("CosmosVideoToWorldPipeline", "1010", ("0", "1")),
        # the denoiser is told a time that increases
        row("LongCatImagePipeline", "1010", ("cond", "uncond")),
        row("LongCatAudioDiTPipeline", "1010", ("0", "1")),
        row("MochiPipeline", "1010", ("cond_uncond",)),
        # a scheduler for every frame, copied from the pipeline's
        row("SkyReelsV2DiffusionForcingPipeline", "1010", ("cond", "uncond")),
        row("SkyReelsV2DiffusionForcingPipeline-asynchronous", "10101010", ("cond", "uncond")),
        # a guider in a plain pipeline
        row("HunyuanVideo15Pipeline", "1010", ("pred_cond", "pred_uncond")),
        row("HunyuanImagePipeline", "1010", ("pred_cond", "pred_uncond")),
    ],
)
def test_transformers(name, mask, passes, more):
    case = CASES[name]
    pipe, call = case.build(), arguments(case, **more)
    if "0" not in mask:
        with dc.cached(pipe, "mask", mask="10"):
            generate(pipe, call)
            summary = dc.summary(pipe)
        assert [record_of(r) for r in summary.records] == regular(mask, passes)
        assert summary.total == len(mask)
        return
    check(pipe, call, mask, regular(mask, passes))


@pytest.mark.parametrize(
    ("name", "mask", "passes", "more"),
    [
        row("StableDiffusionInpaintPipeline", "101", ("0",), strength=0.75),
        row("StableDiffusionXLInpaintPipeline", "101", ("0",)),
        row("StableDiffusionXLImg2ImgPipeline", "101", ("0",)),
        row("StableDiffusionXLPipeline", "101", ("0",), timesteps=[900, 500, 100], num_inference_steps=None),
        row("StableDiffusionXLPipeline", "1010", ("0",), sigmas=[14.0, 5.0, 1.0, 0.3, 0.0], num_inference_steps=None),
        row("StableDiffusionXLPipeline", "1010", ("0",)),
        row("StableDiffusionXLPipeline", "1010", ("0",), guidance_scale=1.0),
        row("StableDiffusionInstructPix2PixPipeline", "1010", ("0",)),
    ],
)
def test_unets(name, mask, passes, more):
    case = CASES[name]
    check(case.build(), arguments(case, **more), mask, regular(mask, passes, "unet"))


ONE, TWO, THREE = (slice(None),), (slice(0, 1), slice(1, 2)), (slice(0, 1), slice(1, 2), slice(2, 3))


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("StableDiffusionXLPipeline", TWO),
        ("StableDiffusionInstructPix2PixPipeline", THREE),
        ("LuminaPipeline", TWO),
        ("ZImagePipeline", TWO),
        ("MochiPipeline", TWO),
        ("FluxPipeline", ONE),
        ("FluxPipeline-two_images", ONE),
        ("LongCatImagePipeline", ONE),
        ("LongCatAudioDiTPipeline", ONE),
        ("OmniGenPipeline", TWO),
    ],
)
def test_rows_and_noise_whatever_the_time_is(name, rows):
    case, spy = CASES[name], Spy()
    pipe = case.build()
    with dc.cached(pipe, spy):
        pipe(**case.call())
    assert all(step.rows == rows for step in spy.steps)
    assert [step.index for step in spy.steps] == sorted(step.index for step in spy.steps)
    levels = [step.noise_level for step in spy.steps]
    assert levels == sorted(levels)
    assert levels[0] < levels[-1]


# guidance that comes and goes


def test_a_second_pass_that_ends_in_the_middle():
    case = CASES["Lumina2Pipeline-cfg_trunc"]
    expected = [
        Call(0, "0", True), Call(0, "1", True),
        Call(1, "0", False), Call(1, "1", False),
        Call(2, "0", True),
        Call(3, "0", False),
    ]  # fmt: skip
    check(case.build(), case.call, "1010", expected)


def test_rows_that_end_in_the_middle():
    case = CASES["ZImagePipeline-cfg_truncation"]
    pipe = case.build()
    with dc.cached(pipe, "mask", "reuse", mask="1000"):
        generate(pipe, case.call)
        summary = dc.summary(pipe)
    assert [(r.computed, r.reason) for r in summary.records] == [
        (True, "schedule"), (False, "schedule"), (False, "schedule"), (True, "other shapes"),
    ]  # fmt: skip


# modular pipelines and guiders


def blocks(module, name):
    return getattr(importlib.import_module(f"diffusers.modular_pipelines.{module}"), name)()


def assembled(denoise, **components):
    pipe = denoise.init_pipeline()
    pipe.update_components(**components)
    for block in denoise.sub_blocks.values():
        if hasattr(block, "set_progress_bar_config"):
            block.set_progress_bar_config(disable=True)
    return pipe


def embeddings(*names, features=16, **more):
    """Arguments of a call: prompt embeddings of the names, and a fresh generator."""

    def call():
        drawn = {
            name: Draw(seed)(1, features) if "pooled" in name else Draw(seed)(1, 6, features)
            for seed, name in enumerate(names)
        }
        common = dict(num_inference_steps=4, generator=torch.Generator().manual_seed(0), output="latents")
        return common | drawn | more

    return call


TEXT = ("prompt_embeds", "negative_prompt_embeds")
POOLED = ("pooled_prompt_embeds", "negative_pooled_prompt_embeds")


def modular_wan(two=False):
    whole = pipelines_video._wan("WanPipeline", two=two)
    parts = dict(transformer=whole.transformer, scheduler=whole.scheduler)
    if two:
        denoise = blocks("wan.modular_blocks_wan22", "Wan22CoreDenoiseStep")
        parts["transformer_2"] = whole.transformer_2
    else:
        denoise = blocks("wan.modular_blocks_wan", "WanCoreDenoiseStep")
    return assembled(denoise, **parts), embeddings(*TEXT, height=32, width=32, num_frames=5)


def sized(call, size=64):
    return lambda: call() | dict(height=size, width=size)


def modular_sdxl():
    whole = pipelines_unet._sdxl("StableDiffusionXLPipeline")
    denoise = blocks("stable_diffusion_xl.modular_blocks_stable_diffusion_xl", "StableDiffusionXLCoreDenoiseStep")
    pipe = assembled(denoise, unet=whole.unet, scheduler=whole.scheduler, vae=whole.vae)
    return pipe, sized(embeddings(*TEXT, *POOLED))


def modular_flux():
    whole = pipelines_image._flux("FluxPipeline")
    denoise = blocks("flux.modular_blocks_flux", "FluxCoreDenoiseStep")
    pipe = assembled(denoise, transformer=whole.transformer, scheduler=whole.scheduler)
    return pipe, sized(embeddings("prompt_embeds", "pooled_prompt_embeds", features=32))


def modular_qwen():
    whole = pipelines_image._qwen("QwenImagePipeline")
    denoise = blocks("qwenimage.modular_blocks_qwenimage", "QwenImageCoreDenoiseStep")
    pipe = assembled(denoise, transformer=whole.transformer, scheduler=whole.scheduler)
    masks = {f"{name}_mask": torch.ones(1, 6, dtype=torch.long) for name in TEXT}
    return pipe, sized(embeddings(*TEXT, features=32, **masks))


GUIDED = ("pred_cond", "pred_uncond")


@pytest.mark.parametrize(
    ("build", "passes", "denoiser"),
    [
        (modular_sdxl, GUIDED, "unet"),
        (modular_flux, ("0",), "transformer"),
        (modular_qwen, GUIDED, "transformer"),
        (modular_wan, GUIDED, "transformer"),
    ],
    ids=["sdxl", "flux", "qwen", "wan"],
)
def test_modular(build, passes, denoiser):
    pipe, call = build()
    assert isinstance(pipe, diffusers.ModularPipeline)
    check(pipe, call, "1010", regular("1010", passes, denoiser))
    with dc.cached(pipe, "first_block", "reuse", threshold=1e9, max_consecutive=1):
        generate(pipe, call)
        assert [record_of(r) for r in dc.summary(pipe).records] == regular("1010", passes, denoiser)
    assert "__call__" not in vars(type(pipe))


def test_modular_with_two_transformers():
    pipe, call = modular_wan(two=True)
    expected = regular("1010", GUIDED)
    expected[4:] = [Call(c.step, c.key, c.computed, "transformer_2") for c in expected[4:]]
    check(pipe, call, "1010", expected)
    with dc.cached(pipe, "mask", "reuse", mask="1010", scope="denoiser"):
        generate(pipe, call)
        sizes = [span.feature_bytes for span in dc.inspect(pipe, scope="denoiser").spans]
        assert len(set(sizes)) == 1
        assert sum(sizes) == dc.summary(pipe).cache_bytes


def test_modular_begins_in_the_middle():
    whole = pipelines_unet._sdxl("StableDiffusionXLPipeline")
    denoise = blocks("stable_diffusion_xl.modular_blocks_stable_diffusion_xl", "StableDiffusionXLCoreDenoiseStep")
    pipe = assembled(denoise, unet=whole.unet, scheduler=whole.scheduler, vae=whole.vae)
    call = embeddings(*TEXT, *POOLED, image_latents=Draw(9)(1, 4, 8, 8), strength=0.75)
    check(pipe, sized(call), "101", regular("101", GUIDED, "unet"))


def test_modular_parts_are_swapped():
    pipe, call = modular_wan()
    generate(pipe, call)
    other = copy.deepcopy(pipe.transformer)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.9)
    dc.enable(pipe, "mask", "reuse", mask="1010", scope="denoiser")
    first = generate(pipe, call)
    pipe.update_components(
        transformer=other,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        guider=diffusers.ClassifierFreeGuidance(guidance_scale=3.0, stop=0.5),
    )
    expected = [call for call in regular("1010", GUIDED) if call.step < 2 or call.key == "pred_cond"]
    cached = generate(pipe, call)
    assert [record_of(r) for r in dc.summary(pipe).records] == expected
    dc.disable(pipe)
    with ByHand(pipe, expected):
        assert equal(generate(pipe, call), cached)
    assert not equal(first, cached)


def test_a_modular_pipeline_called_from_a_callback_of_another_that_shares_its_denoiser():
    plain = CASES["WanPipeline"]
    pipe = plain.build()
    modular, call = modular_wan()
    modular.update_components(transformer=pipe.transformer)
    uncached = generate(modular, call)
    inside = []

    def callback(pipe, step, timestep, kwargs):
        inside.append(generate(modular, call))
        return kwargs

    with dc.cached(pipe, "mask", mask="1010"):
        generate(pipe, plain.call)
        records = dc.summary(pipe).records
        with pytest.warns(DiffusionCacheWarning, match="has modules of"):
            generate(pipe, arguments(plain, callback_on_step_end=callback))
        assert dc.summary(pipe).records == records
    assert len(inside) == 4
    assert all(equal(output, uncached) for output in inside)


def skipping(*layers, **config):
    return diffusers.hooks.LayerSkipConfig(list(layers), **config)


SKIP = dict(guidance_scale=4.0, skip_layer_guidance_scale=2.0, skip_layer_config=skipping(1, fqn="blocks"))
PERTURB = dict(skip_attention=False, skip_attention_scores=True, skip_ff=False)


def steps_of(**passes):
    """Calls of each step by name of pass: '0123' for the first four."""
    return [(step, key) for step in range(8) for key, steps in passes.items() if str(step) in steps]


ALL = "01234567"


@pytest.mark.parametrize(
    ("build", "guider", "expected"),
    [
        (
            modular_wan,
            lambda: diffusers.ClassifierFreeGuidance(guidance_scale=4.0, start=0.25, stop=0.75),
            steps_of(pred_cond=ALL, pred_uncond="2345"),
        ),
        (
            modular_wan,
            lambda: diffusers.SkipLayerGuidance(skip_layer_guidance_start=0.2, skip_layer_guidance_stop=0.8, **SKIP),
            steps_of(pred_cond=ALL, pred_uncond=ALL, pred_cond_skip="2345"),
        ),
        # the second pass is the unconditional one before the middle, and the one that skips a block after it
        (
            modular_wan,
            lambda: diffusers.SkipLayerGuidance(
                skip_layer_guidance_start=0.4, skip_layer_guidance_stop=1.0, stop=0.5, **SKIP
            ),
            steps_of(pred_cond=ALL, pred_uncond="0123", pred_cond_skip="4567"),
        ),
        (
            modular_qwen,
            lambda: diffusers.PerturbedAttentionGuidance(
                guidance_scale=4.0,
                perturbed_guidance_scale=2.0,
                perturbed_guidance_config=skipping(1, fqn="transformer_blocks", **PERTURB),
                perturbed_guidance_start=0.2,
                perturbed_guidance_stop=0.8,
            ),
            steps_of(pred_cond=ALL, pred_uncond=ALL, pred_cond_skip="2345"),
        ),
        (
            modular_sdxl,
            lambda: diffusers.SmoothedEnergyGuidance(
                guidance_scale=4.0,
                seg_guidance_scale=2.0,
                seg_guidance_config=diffusers.SmoothedEnergyGuidanceConfig(
                    [0], fqn="mid_block.attentions.0.transformer_blocks"
                ),
                seg_guidance_start=0.2,
                seg_guidance_stop=0.8,
                stop=0.5,
            ),
            steps_of(pred_cond=ALL, pred_uncond="0123", pred_cond_seg="2345"),
        ),
        (
            modular_qwen,
            lambda: diffusers.AutoGuidance(
                guidance_scale=4.0, auto_guidance_config=skipping(0, 1, fqn="transformer_blocks"), stop=0.5
            ),
            steps_of(pred_cond=ALL, pred_uncond="0123"),
        ),
        (
            modular_wan,
            lambda: diffusers.AdaptiveProjectedGuidance(guidance_scale=4.0),
            steps_of(pred_cond=ALL, pred_uncond=ALL),
        ),
    ],
    ids=["classifier-free", "skip-layer", "skip-layer-after", "perturbed", "smoothed-energy", "auto", "projected"],
)
def test_guiders(build, guider, expected):
    pipe, call = build()
    denoiser = "unet" if hasattr(pipe, "unet") else "transformer"
    pipe.update_components(guider=guider())
    before = vars(type(pipe.guider)).copy()
    calls = [Call(step, key, step % 2 == 0, denoiser) for step, key in expected]
    check(pipe, lambda: call() | dict(num_inference_steps=8), "10101010", calls)
    assert vars(type(pipe.guider)) == before


def test_the_scale_of_a_guider_is_known():
    pipe, call = modular_wan()
    pipe.update_components(guider=diffusers.ClassifierFreeGuidance(guidance_scale=3.0))
    guided = _sampler_of(pipe)
    dc.enable(pipe, "interval", every=2)
    generate(pipe, call)
    run = session_of(pipe).last_run
    assert (run.guidance_scales, run.guidance_weights) == ((3.0,), {"transformer": 3.0})
    beside = diffusers.ClassifierFreeGuidance(guidance_scale=3.0, use_original_formulation=True)
    pipe.update_components(guider=beside)
    assert guidance_weights(pipe, (), {}, ["transformer"]) == {"transformer": 4.0}
    dc.disable(pipe)
    pipe.update_components(guider=diffusers.ClassifierFreeGuidance(guidance_scale=4.0))
    assert _sampler_of(pipe) != guided


def test_a_pass_that_begins_at_a_reused_step_is_computed():
    pipe, call = modular_wan()
    pipe.update_components(guider=diffusers.ClassifierFreeGuidance(guidance_scale=4.0, start=0.25))
    with dc.cached(pipe, "mask", mask="1001"):
        generate(pipe, call)
        records = dc.summary(pipe).records
    assert [(r.step, r.pass_name, r.computed, r.reason) for r in records] == [
        (0, "pred_cond", True, "schedule"),
        (1, "pred_cond", False, "schedule"),
        (1, "pred_uncond", True, "no history"),
        (2, "pred_cond", False, "schedule"),
        (2, "pred_uncond", False, "schedule"),
        (3, "pred_cond", True, "schedule"),
        (3, "pred_uncond", True, "schedule"),
    ]


# two transformers, several loops, several views


def test_two_transformers():
    case = CASES["WanPipeline-two-transformers"]
    expected = regular("1010", ("cond", "uncond"))
    expected[4:] = [Call(c.step, c.key, c.computed, "transformer_2") for c in expected[4:]]
    check(case.build(), case.call, "1010", expected)


@pytest.mark.parametrize(
    ("name", "loops", "passes", "denoiser"),
    [
        ("SkyReelsV2DiffusionForcingPipeline-long", 2, ("cond", "uncond"), "transformer"),
        ("WanAnimatePipeline-two-segments", 2, ("cond", "uncond"), "transformer"),
        ("HunyuanVideoFramepackPipeline", 2, ("0",), "transformer"),
        ("HeliosPipeline", 2, ("cond", "uncond"), "transformer"),
        ("AnimateDiffPipeline-free-init", 2, ("0",), "unet"),
    ],
)
def test_each_loop_of_a_run_begins_again(name, loops, passes, denoiser):
    case = CASES[name]
    check(case.build(), case.call, "1010", loops * regular("1010", passes, denoiser))


def test_loops_of_several_denoisers():
    case = CASES["StableUnCLIPPipeline"]
    pipe = case.build()
    with dc.cached(pipe, "mask", "reuse", mask="1010"):
        generate(pipe, case.call)
        records = dc.summary(pipe).records
    assert [record_of(r) for r in records] == regular("110", denoiser="prior") + regular("1010", denoiser="unet")


def test_loops_with_schedulers_of_their_own_do_not_reach_into_the_next_call():
    """The prior's scheduler says how many steps it makes, not the decoder's, as the last call has left that."""
    case = CASES["StableUnCLIPPipeline"]
    pipe = case.build()

    def computed(prior, decoder):
        steps = dict(prior_num_inference_steps=prior, num_inference_steps=decoder)
        pipe(**case.call() | steps)
        return [[r.computed for r in dc.summary(pipe).records if r.denoiser == name] for name in ("prior", "unet")]

    with dc.cached(pipe, "interval", every=2, last=2):
        first = computed(7, 4)
        assert first == [[True, False, True, False, True, True, True], [True, False, True, True]]
        assert computed(7, 4) == first


def test_the_length_of_all_loops_is_not_taken_for_that_of_one():
    case = CASES["AnyFlowFARPipeline-two-chunks"]
    pipe = case.build()
    with dc.cached(pipe, "mask", "reuse", mask="1010"):
        generate(pipe, case.call)
        records, told = dc.summary(pipe).records, pipe.num_timesteps
    # after its steps, the first chunk's keys and values are stored for the second
    assert [(r.step, r.computed) for r in records] == [
        (0, True), (1, False), (2, True), (3, False), (4, True),
        (0, True), (1, False), (2, True), (3, False),
    ]  # fmt: skip
    assert told == 8


@pytest.mark.parametrize(("variant", "views"), [("", 2), ("-circular", 5)])
def test_views_of_a_panorama_are_apart(variant, views):
    case = CASES[f"StableDiffusionPanoramaPipeline{variant}"]
    passes = tuple(str(view) for view in range(views))
    check(case.build(), case.call, "1010", regular("1010", passes, "unet"))


@pytest.mark.parametrize("policy", ["first_block", "teacache", "dicache"])
def test_the_stream_that_is_denoised_is_watched(policy):
    """Cosmos3's layers take the text first, by position, which is the same at every step."""
    case = CASES["Cosmos3OmniPipeline"]
    pipe = case.build()
    expected = generate(pipe, case.call)
    with dc.cached(pipe, policy, threshold=0.0):
        assert equal(generate(pipe, case.call), expected)
        assert dc.summary(pipe).reused == 0


# users swap parts


@pytest.mark.parametrize(
    ("name", "sampler", "total", "denoiser"),
    [
        ("StableDiffusion3Pipeline", "FlowMatchEulerDiscreteScheduler", 4, "transformer"),
        ("StableDiffusion3Pipeline", "FlowMatchHeunDiscreteScheduler", 7, "transformer"),
        ("StableDiffusionXLPipeline", "EulerDiscreteScheduler", 4, "unet"),
        ("StableDiffusionXLPipeline", "DPMSolverMultistepScheduler", 4, "unet"),
        ("StableDiffusionXLPipeline", "HeunDiscreteScheduler", 7, "unet"),
        ("StableDiffusionXLPipeline", "KDPM2DiscreteScheduler", 7, "unet"),
    ],
)
@pytest.mark.parametrize("after_a_run", [False, True])
def test_scheduler_swapped(name, sampler, total, denoiser, after_a_run):
    case = CASES[name]
    pipe = case.build()
    cls = getattr(diffusers, sampler)
    config = dict(pipe.scheduler.config)
    mask = ("10" * total)[:total]
    dc.enable(pipe, "mask", "reuse", mask=mask, scope="denoiser")
    if after_a_run:
        generate(pipe, case.call)
    pipe.scheduler = cls.from_config(config)
    cached = generate(pipe, case.call)
    summary = dc.summary(pipe)
    dc.disable(pipe)
    expected = regular(mask, denoiser=denoiser)
    assert [record_of(r) for r in summary.records] == expected
    assert summary.total == total
    pipe.scheduler = cls.from_config(config)
    with ByHand(pipe, expected):
        assert equal(generate(pipe, case.call), cached)


def test_second_denoiser_swapped():
    case = CASES["WanPipeline-two-transformers"]
    pipe = case.build()
    own, other = pipe.transformer_2, copy.deepcopy(pipe.transformer)
    pipe.transformer_2 = other
    with dc.cached(pipe, "mask", mask="1010"):
        expected = generate(pipe, case.call)
    pipe.transformer_2 = own
    with dc.cached(pipe, "mask", mask="1010"):
        assert not equal(generate(pipe, case.call), expected)
        records = dc.summary(pipe).records
        pipe.transformer_2 = other
        assert equal(generate(pipe, case.call), expected)
        assert dc.summary(pipe).records == records
        assert not any(intercept.is_intercepted(module, pipe._diffusion_cache) for module in own.modules())
    assert not any(intercept.ATTRIBUTE in vars(module) for module in other.modules())


def test_pipelines_that_share_a_denoiser_have_methods_of_their_own():
    text, image = CASES["StableDiffusionXLPipeline"], CASES["StableDiffusionXLImg2ImgPipeline"]
    pipe = text.build()
    other = diffusers.StableDiffusionXLImg2ImgPipeline.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    assert other.unet is pipe.unet
    methods = {pipe: ("mask", "reuse", dict(mask="1001")), other: ("interval", "taylor", dict(every=3))}
    calls = {pipe: text.call, other: image.call}
    uncached, alone = {}, {}
    for each, (policy, forecaster, options) in methods.items():
        uncached[each] = generate(each, calls[each])
        with dc.cached(each, policy, forecaster, **options):
            alone[each] = generate(each, calls[each])
        assert not equal(alone[each], uncached[each])

    for each, (policy, forecaster, options) in methods.items():
        dc.enable(each, policy, forecaster, **options)
    for _ in range(2):
        for each in methods:
            assert equal(generate(each, calls[each]), alone[each])
    assert [r.computed for r in dc.summary(pipe).records] == [True, False, False, True]
    assert [r.computed for r in dc.summary(other).records] == [True, False, False]
    assert (dc.summary(pipe).total, dc.summary(other).total) == (4, 3)
    dc.disable(pipe)
    with pytest.warns(DiffusionCacheWarning, match="has modules of"):
        assert equal(generate(pipe, text.call), uncached[pipe])
    assert equal(generate(other, image.call), alone[other])
    dc.disable(other)
    assert equal(generate(other, image.call), uncached[other])


# one's own loop, without a scheduler


class Times:
    """The timestep of each step, as loops hold it."""

    def fresh(self, step):
        return torch.tensor([900.0 - 100 * step])

    def increasing(self, step):
        return torch.tensor([0.1 * step])

    def __init__(self):
        self.one = torch.tensor([1000.0])
        self.table = torch.linspace(900, 200, 8)

    def written_in_place(self, step):
        return self.one.sub_(100)

    def entry(self, step):
        return self.table[step].expand(1)


@pytest.fixture(scope="module")
def denoiser():
    return CASES["DiTPipeline"].build().transformer


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("how", ["fresh", "increasing", "written_in_place", "entry"])
def test_own_loop(denoiser, how, mode):
    size = denoiser.config.sample_size
    x = Draw(0)(1, denoiser.config.in_channels, size, size)

    def loop():
        times, outputs = getattr(Times(), how), []
        for step in range(8):
            t = times(step)
            # the first pass has both labels in one call, the second one of them alone
            for labels in ([1, 2], [3]):
                rows = len(labels)
                given = dict(timestep=t.expand(rows), class_labels=torch.tensor(labels))
                outputs.append(denoiser(x.expand(rows, -1, -1, -1), **given).sample)
        return outputs

    with mode():
        uncached = loop()
        with dc.run(denoiser, "interval", every=1):
            assert equal(loop(), uncached)
        with dc.run(denoiser, "interval", "reuse", every=2, num_steps=8, scope="denoiser") as run:
            cached = loop()
    summary = run.summary()
    assert summary.total == 8
    assert [record_of(r) for r in summary.records] == regular("10101010", ("0", "1"), "denoiser")
    for step in range(8):
        for key in range(2):
            assert torch.equal(cached[2 * step + key], uncached[2 * (step - step % 2) + key])


def test_own_loop_that_goes_on_past_its_number_of_steps(denoiser):
    size = denoiser.config.sample_size
    given = Draw(0)(1, denoiser.config.in_channels, size, size), torch.tensor([500])

    @torch.no_grad()
    def step(run):
        run.next_step()
        return denoiser(given[0], timestep=given[1], class_labels=torch.tensor([1])).sample

    with dc.run(denoiser, "interval", "reuse", every=2, num_steps=4) as run:
        expected, *_ = [step(run) for _ in range(4)]
        with pytest.warns(DiffusionCacheWarning, match="more steps than the 4 that it was told of"):
            assert torch.equal(step(run), expected)
        records = run.summary().records
    assert [record.computed for record in records] == [True, False, True, False, True]


def test_own_loop_that_sets_its_timesteps_twice(denoiser):
    size = denoiser.config.sample_size
    scheduler = diffusers.DDIMScheduler()

    @torch.no_grad()
    def loop():
        x = Draw(0)(1, denoiser.config.in_channels, size, size)
        scheduler.set_timesteps(4)
        for t in scheduler.timesteps:
            velocity = denoiser(x, timestep=t[None], class_labels=torch.tensor([1])).sample[:, : x.shape[1]]
            x = scheduler.step(velocity, t, x).prev_sample
        return x

    with dc.run(denoiser, "interval", every=3) as run:
        first, second = loop(), loop()
        records = run.summary().records
    assert torch.equal(first, second)
    assert [record_of(r) for r in records] == 2 * regular("1001", denoiser="denoiser")
