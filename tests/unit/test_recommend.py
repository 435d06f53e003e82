"""What is recommended where no profile was made: that it works, and that its figures are those that were measured."""

import csv
import json
from dataclasses import replace
from importlib import resources
from pathlib import Path

import pytest
import torch
from diffusers import (
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    LCMScheduler,
    StableDiffusionPipeline,
    TCDScheduler,
)

import diffusion_cache as dc
from diffusion_cache import advice, reference
from diffusion_cache.errors import ConfigError, NoSpansError
from diffusion_cache.fingerprint import Fingerprint
from diffusion_cache.models import find_denoisers
from diffusion_cache.plan import Plan, Quality
from diffusion_cache.profile import Profile, SpanFacts
from diffusion_cache.published import load
from diffusion_cache.schedule import Schedule

SUMMARY = Path(__file__).parents[2] / "results" / "reference_all" / "summary.csv"
ROWS = [value for value in vars(advice).values() if isinstance(value, advice.Measured)]
SIMPLE = ("first block", "uniform Taylor", "uniform reuse")  # that fit no schedule to a model


@pytest.fixture(autouse=True)
def no_shipped_profiles(monkeypatch, tmp_path):
    """Whichever come with the package: the folder of this test instead."""
    monkeypatch.setattr(resources, "files", lambda name: tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def measured():
    with SUMMARY.open() as file:
        return [row for row in csv.DictReader(file) if row["psnr_mean"] not in ("", "inf")]


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_the_figures_are_those_of_the_committed_results(row, measured):
    (found,) = [
        r
        for r in measured
        if (r["model"], r["method"], r["scope"]) == (row.model, row.method, row.scope)
        and json.loads(r["settings"]) == row.settings
        and r["sampler"] == reference.spec(row.model).samplers[0]
    ]
    assert float(found["nfe_ratio"]) == pytest.approx(row.nfe, abs=0.005)
    assert float(found["psnr_mean"]) == pytest.approx(row.mean, abs=0.5)
    assert float(found["psnr_p5"]) == pytest.approx(row.p5, abs=0.5)


@pytest.mark.parametrize("row", [advice.UNET, advice.DIFFUSION, advice.FLOW, advice.VIDEO], ids=lambda row: row.model)
def test_what_is_recommended_was_best_at_about_half_the_evaluations(row, measured):
    rivals = [
        float(r["psnr_mean"])
        for r in measured
        if r["model"] == row.model and r["method"] in SIMPLE and 0.4 <= float(r["nfe_ratio"]) <= 0.55
    ]
    assert len(rivals) >= 3
    assert row.mean == pytest.approx(max(rivals), abs=0.05)


@pytest.mark.parametrize(
    ("name", "policy", "options", "row"),
    [
        ("dit-digits", "interval", {"every": 2}, advice.DIFFUSION),
        ("unet-digits", "interval", {"every": 2, "scope": "denoiser"}, advice.UNET),
        ("flux-digits", "first_block", {"threshold": 0.1}, advice.FLOW),
        ("wan-moving-digits", "first_block", {"threshold": 0.06}, advice.VIDEO),
    ],
)
def test_each_kind_gets_what_was_best_on_its_small_model(name, policy, options, row):
    pipe = reference.load(name)
    found = dc.recommend(pipe)
    assert found.cache
    assert (found.policy, dict(found.options)) == (policy, options)
    # what is said is what was measured, and what is done is what was measured
    assert row.model in found.reason
    assert str(row) in found.reason
    session = dc.enable(pipe, found.policy, **found.options)
    chosen = {**vars(session.method.guarded.policy), **vars(session.method.forecaster)}
    assert {key: chosen[key] for key in row.settings if key in chosen} == {
        key: value for key, value in row.settings.items() if key in chosen
    }
    assert session.method.forecaster.name == row.settings["forecaster"]
    assert (session.method.scope or "auto") == row.scope
    dc.disable(pipe)


def test_it_reads_as_the_call_to_make():
    text = str(dc.recommend(reference.load("unet-digits")))
    assert text.splitlines()[0] == "dc.enable(pipe, policy='interval', every=2, scope='denoiser')"
    assert "diffusion-cache profile" in text
    few = str(dc.recommend(reference.load("unet-digits"), 4))
    assert few.startswith("Do not cache.\nIt takes 4 steps.")
    assert "enable" not in few


@pytest.mark.parametrize("name", list(reference.MODELS))
@pytest.mark.parametrize("steps", [1, 4, 8])
def test_few_steps_are_not_cached(name, steps):
    found = dc.recommend(reference.load(name), steps)
    assert not found.cache
    assert (found.policy, dict(found.options)) == (None, {})
    assert f"takes {steps} step" in found.reason


@pytest.mark.parametrize("steps", [9, 19])
def test_between_few_and_measured_it_is_careful_and_says_so(steps):
    pipe = reference.load("dit-digits")
    found = dc.recommend(pipe, steps)
    assert (found.policy, dict(found.options)) == ("first_block", {"threshold": 0.03})
    assert f"Nothing was measured at {steps} steps" in found.reason
    dc.enable(pipe, found.policy, **found.options)
    dc.disable(pipe)


def with_scheduler(pipe, cls, **config):
    pipe.scheduler = cls.from_config(pipe.scheduler.config, **config)
    return pipe


def named(pipe, name):
    pipe.register_to_config(_name_or_path=name)
    return pipe


def lcm_unet():
    pipe = reference.load("unet-digits")
    pipe.unet.register_to_config(time_cond_proj_dim=256)
    return pipe


def with_adapter(name):
    pipe = reference.load("dit-digits")
    pipe.transformer._hf_peft_config_loaded = True
    object.__setattr__(pipe.transformer, "active_adapters", lambda: [name])
    return pipe


FEW_STEP = {
    "LCMScheduler": lambda: with_scheduler(reference.load("unet-digits"), LCMScheduler),
    "TCDScheduler": lambda: with_scheduler(reference.load("unet-digits"), TCDScheduler),
    "turbo": lambda: named(reference.load("unet-digits"), "stabilityai/sd-turbo"),
    "lightning": lambda: named(reference.load("unet-digits"), "/models/SDXL-Lightning"),
    "schnell": lambda: named(reference.load("flux-digits"), "/c/models--bfl--FLUX.1-schnell/snapshots/0123"),
    "4step": lambda: named(reference.load("flux-digits"), "someone/flux-distilled-4step"),
    "time_cond_proj_dim": lcm_unet,
    "Flux schnell": lambda: with_scheduler(reference.load("flux-digits"), FlowMatchEulerDiscreteScheduler, shift=1.0),
    "lcm": lambda: with_adapter("lcm-lora"),
}


@pytest.mark.parametrize("word", list(FEW_STEP))
def test_models_made_for_few_steps_are_recognised(word):
    pipe = FEW_STEP[word]()
    found = dc.recommend(pipe)
    assert not found.cache
    assert word in found.reason
    assert dc.recommend(pipe, 30).cache  # told otherwise


@pytest.mark.parametrize(
    "name",
    ["stabilityai/stable-diffusion-xl-base-1.0", "me/turbine-photos-45steps", "me/dmdtrained", "a/flux-50-steps"],
)
def test_other_names_are_not_mistaken(name):
    assert dc.recommend(named(reference.load("unet-digits"), name)).cache


def test_a_pipelines_own_default_counts(monkeypatch):
    pipe = with_scheduler(reference.load("unet-digits"), EulerDiscreteScheduler)
    assert dc.recommend(pipe).cache

    def call(self, prompt=None, num_inference_steps: int = 4):
        raise AssertionError("nothing is run")

    monkeypatch.setattr(StableDiffusionPipeline, "__call__", call)
    assert not dc.recommend(pipe).cache


def test_what_was_published_for_this_very_model():
    pipe = named(reference.load("flux-digits"), "black-forest-labs/FLUX.1-dev")
    found = dc.recommend(pipe, 28)
    name = found.options["profile"]
    entry = load(name)
    assert (entry.model, entry.steps) == ("black-forest-labs/FLUX.1-dev", 28)
    assert entry.source in found.reason
    assert "Not measured here" in found.reason
    dc.enable(pipe, found.policy, **found.options)
    dc.disable(pipe)
    longer = load(dc.recommend(pipe, 50).options["profile"])
    assert longer.steps == 50
    assert 20 <= longer.mask(50).count("1") <= 26  # about half
    # of the same class, but of another model: no more than a hint
    other = dc.recommend(reference.load("flux-digits"), 28)
    assert other.policy == "first_block"
    assert any("FLUX.1-dev" in text for text in other.alternatives)


def test_names_with_diffusers_in_them():
    pipe = named(reference.load("wan-moving-digits"), "Wan-AI/Wan2.1-T2V-1.3B-Diffusers")
    assert load(dc.recommend(pipe, 50).options["profile"]).model == "Wan-AI/Wan2.1-T2V-1.3B"


def small_profile(pipe, steps):
    """With plans of 6, 4 and 3 evaluations, the one of 4 at 45 dB."""
    gram = torch.eye(steps)[None, None]
    nodes = torch.full((steps, 1, 1), -1, dtype=torch.int32)
    weights = torch.full((steps, 1, 1, 1), float("nan"), dtype=torch.float64)

    def plan(computed, psnr):
        schedule = Schedule.uniform(step < computed for step in range(steps))
        quality = Quality.of("psnr", [psnr], [0])
        return Plan(f"nfe-{computed}", "stack", None, "auto", schedule, (), nodes, weights, quality=quality)

    return Profile(
        fingerprint=Fingerprint.of(pipe, find_denoisers(pipe), steps=steps),
        scope="stack",
        depth=None,
        spans=(SpanFacts("transformer_blocks", "transformer", "stack", "residual", 8, 1.0),),
        passes=("0",),
        row_passes=1,
        samples=(("0", 0),),
        arrays={"gram_residual": gram, "gram_output": gram},
        plans=(plan(6, 50), plan(4, 45), plan(3, 40)),
    )


def test_a_shipped_profile_of_these_very_weights(no_shipped_profiles):
    pipe = reference.load("dit-digits")
    profile = small_profile(pipe, 9)
    profile.save(no_shipped_profiles / "tiny-ddim")
    for found in (dc.recommend(pipe), dc.recommend(pipe, 9)):
        assert found.policy is None
        assert dict(found.options) == {"profile": "tiny-ddim", "plan": "nfe-4"}
        assert "45.0 dB" in found.reason
        assert found.alternatives == ("another of its plans: nfe-6, nfe-3",)
    # other steps, another sampler, other weights: what holds for the kind
    assert dc.recommend(pipe, 50).policy == "interval"
    assert dc.recommend(reference.load("dit-digits", "dpm++")).policy == "interval"
    with torch.no_grad():
        for parameter in pipe.transformer.parameters():
            parameter.mul_(1.01)
    assert dc.recommend(pipe, 50).policy == "interval"
    assert dc.recommend(pipe, 9).policy == "first_block"


def test_a_profile_without_plans_says_nothing(no_shipped_profiles):
    pipe = reference.load("dit-digits")
    replace(small_profile(pipe, 50), plans=()).save(no_shipped_profiles / "tiny-ddim")
    assert dc.recommend(pipe).policy == "interval"


@pytest.mark.parametrize("steps", [0, -1, 2.5, True, "50"])
def test_steps_that_cannot_be(steps):
    with pytest.raises(ConfigError, match="steps must be a whole number"):
        dc.recommend(reference.load("dit-digits"), steps)


def test_what_has_no_denoiser():
    with pytest.raises(ConfigError, match="expected a diffusers pipeline"):
        dc.recommend(torch.nn.Linear(2, 2))
    pipe = reference.load("flux-digits")
    empty = FluxPipeline(pipe.scheduler, pipe.vae, None, None, None, None, None)
    with pytest.raises(NoSpansError, match="no denoiser"):
        dc.recommend(empty)


def test_nothing_changes():
    pipe = reference.load("dit-digits")
    before = {name: dict(vars(module)) for name, module in pipe.transformer.named_modules()}
    dc.recommend(pipe)
    assert all(dict(vars(module)) == before[name] for name, module in pipe.transformer.named_modules())
