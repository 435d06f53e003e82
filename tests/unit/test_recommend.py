"""What is recommended where no profile was made: that it works, and that it is what the report's table says."""

import json
import math
import shutil
from dataclasses import asdict, replace
from importlib import resources
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import (
    DDPMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    LCMScheduler,
    StableDiffusionPipeline,
    TCDScheduler,
)

import diffusion_cache as dc
from diffusion_cache import advice, reference
from diffusion_cache.advice import Figures, Measured, Pick, _share
from diffusion_cache.engine import session_of
from diffusion_cache.errors import ConfigError, NoSpansError
from diffusion_cache.fingerprint import Fingerprint
from diffusion_cache.models import find_denoisers
from diffusion_cache.plan import Plan, Quality
from diffusion_cache.policies import MagCache
from diffusion_cache.profile import Profile, SpanFacts
from diffusion_cache.published import load
from diffusion_cache.schedule import Schedule

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def no_shipped_profiles(monkeypatch, tmp_path):
    """Whichever come with the package: the folder of this test instead."""
    monkeypatch.setattr(resources, "files", lambda name: tmp_path)
    return tmp_path


def row(model, speedup, equal="nfe", by="p5"):
    """That of the table which is for one shipped model with its first sampler."""
    (found,) = [
        pick
        for pick in json.loads(advice.PICKS.read_text())
        if [(one["model"], one["sampler"]) for one in pick["measured"]] == [(model, reference.spec(model).samplers[0])]
        and (pick["speedup"], pick["equal"], pick["by"]) == (speedup, equal, by)
    ]
    return found


def with_picks(monkeypatch, tmp_path, *picks):
    """Recommendations from these picks."""
    monkeypatch.setattr(advice, "PICKS", tmp_path / "advice.json")
    advice.PICKS.write_text(json.dumps([asdict(pick) for pick in picks]))


def measured(chosen, best=None, fewer=None, plan=None, model="a-model"):
    """Of (mean, p5) in dB, at half of the evaluations."""
    chosen, best, fewer, plan = (
        psnr and Figures(*psnr, work=0.5, speed=1.75) for psnr in (chosen, best or chosen, fewer, plan)
    )
    return Measured(model, "ddim", 40, chosen, best, fewer, plan)


def pick(every, *models, kind=None, scheduler=None, speedup=2.0, equal="nfe", by="p5"):
    call = {"policy": "interval", "every": every}
    return Pick(kind, scheduler, speedup, equal, by, "a method", "a=1", call, models)


def test_the_table_is_that_of_the_committed_report():
    assert advice.PICKS.read_text() == (ROOT / "results" / "reference_grid" / "advice.json").read_text()


@pytest.mark.parametrize("name", list(reference.MODELS))
def test_a_pipeline_like_a_shipped_model_gets_what_the_table_says_of_that(name):
    pipe = reference.load(name)
    with torch.no_grad():
        next(getattr(pipe, reference.spec(name).denoiser).parameters()).mul_(1.01)  # other weights: no profile fits
    for speedup in (1.5, 2, 3):
        found, expected = dc.recommend(pipe, speedup=speedup), row(name, speedup)
        assert found.cache
        assert {**({"policy": found.policy} if found.policy else {}), **found.options} == expected["call"]
        chosen = expected["measured"][0]["chosen"]
        assert f"{expected['method']} ({expected['settings']}) gave {chosen['mean']:.1f} dB on average" in found.reason
        assert f"{chosen['p5']:.1f} dB or more for 95% of samples" in found.reason
        dc.enable(pipe, found.policy, **found.options)
        if "target_reuse" not in found.options:  # that would be searched for first
            pipe(**reference.inputs(name, labels=[3], seeds=[0], steps=6))
            assert dc.summary(pipe).reused > 0
        dc.disable(pipe)


TRANSFORMER, UNET = "transformer with a diffusion sampler", "UNet with a diffusion sampler"


@pytest.mark.parametrize(
    ("scheduler", "every"),
    [("DDIMScheduler", 3), ("DPMSolverMultistepScheduler", 4), ("FlowMatchEulerDiscreteScheduler", 6)],
)
def test_the_closest_that_was_measured_decides(monkeypatch, tmp_path, scheduler, every):
    """The same kind and scheduler, or the same kind, or any."""
    one = measured((50.0, 45.0))
    with_picks(
        monkeypatch,
        tmp_path,
        pick(2, one, kind=UNET),
        pick(3, one, kind=TRANSFORMER, scheduler="DDIMScheduler"),
        pick(4, one, one, kind=TRANSFORMER),
        pick(5, one, kind=TRANSFORMER, scheduler="DDIMScheduler", speedup=3.0),
        pick(6, one, one),
        pick(7, one, kind=TRANSFORMER, scheduler="DDIMScheduler", equal="speed"),
        pick(8, one, kind=TRANSFORMER, scheduler="DDIMScheduler", by="mean"),
    )
    pipe = with_scheduler(reference.load("dit-digits"), getattr(diffusers, scheduler))
    assert dc.recommend(pipe).options == {"every": every}
    assert dc.recommend(reference.load("unet-digits")).options == {"every": 2}
    assert dc.recommend(reference.load("wan-moving-digits")).options == {"every": 6}


def test_what_else_there_is(monkeypatch, tmp_path):
    one, faster = measured((50.0, 45.0), fewer=(40.0, 35.0), plan=(58.0, 52.5)), measured((41.0, 36.0))
    same = pick(2, one, kind=UNET, by="mean")
    with_picks(monkeypatch, tmp_path, pick(2, one, kind=UNET), same, pick(3, faster, kind=UNET, equal="speed"))
    found = dc.recommend(reference.load("unet-digits"))
    assert (
        "Like a-model (ddim), a UNet with a diffusion sampler: a method (a=1) gave 50.0 dB on average" in found.reason
    )
    assert "Fewer sampler steps gave 40.0 dB on average and 35.0 dB or more" in found.reason
    profile, time = found.alternatives
    assert profile.endswith(": +7.5 dB on a-model, for 95% of samples")
    assert time.startswith("2× as fast in time, too: dc.enable(pipe, policy='interval', every=3). ")
    assert "41.0 dB on average" in time
    fewer = dc.recommend(reference.load("unet-digits"), 20).reason
    assert "That was in 40 steps or more: of 20," in fewer


def test_a_model_like_none_gets_what_loses_least(monkeypatch, tmp_path):
    models = (measured((50.0, 45.0), best=(55.0, 47.5)), measured((60.0, 52.0), best=(62.0, 58.0), model="other"))
    with_picks(monkeypatch, tmp_path, pick(2, *models))
    reason = dc.recommend(reference.load("unet-digits")).reason
    assert reason.startswith("Of no kind that was measured (a-model (ddim), other (ddim)):")
    assert "falls short of the best method of each by 6.0 dB at most" in reason
    assert "45.0 of 47.5 dB on a-model; 52.0 of 58.0 dB on other" in reason


@pytest.mark.parametrize(
    ("good", "one"),
    [
        (True, measured((40.0, 30.0), fewer=(39.0, 29.9))),
        (False, measured((40.0, 29.9), fewer=(30.0, 20.0))),  # too many samples are far off
        (False, measured((50.0, 45.0), fewer=(40.0, 45.0))),  # fewer steps do as well
    ],
)
def test_where_nothing_is_good_it_says_so(monkeypatch, tmp_path, good, one):
    with_picks(monkeypatch, tmp_path, pick(2, one, kind=UNET))
    found = dc.recommend(reference.load("unet-digits"))
    assert found.cache == good
    assert ("Without a profile nothing was good at 2×. What leaves more than 5%" in found.reason) != good
    assert ("the best of them: dc.enable(pipe, policy='interval', every=2)" in found.alternatives) != good


def test_a_speedup_at_which_there_is_nothing(monkeypatch, tmp_path):
    with_picks(monkeypatch, tmp_path, pick(2, measured((50.0, 45.0))))
    found = dc.recommend(reference.load("unet-digits"), speedup=3)
    assert not found.cache
    assert found.reason.startswith("No method that needs no profile was measured to do 3× less work")


@pytest.mark.parametrize("speedup", [0, 1, math.inf, math.nan, "2", None])
def test_speedups_that_are_none(speedup):
    with pytest.raises(ConfigError, match="speedup must be a number above 1, not "):
        dc.recommend(reference.load("dit-digits"), speedup=speedup)


def test_speedups_that_were_not_measured_on_other_models():
    with pytest.raises(ConfigError, match=r"speedup must be 1.5, 2, 3, which were measured on other models, not 2.5"):
        dc.recommend(reference.load("dit-digits"), speedup=2.5)


def test_it_reads_as_the_call_to_make(monkeypatch, tmp_path):
    with_picks(monkeypatch, tmp_path, pick(2, measured((50.0, 45.0))))
    text = str(dc.recommend(reference.load("unet-digits")))
    assert text.splitlines()[0] == "dc.enable(pipe, policy='interval', every=2)"
    assert "diffusion-cache profile" in text
    few = str(dc.recommend(reference.load("unet-digits"), 4))
    assert few.startswith("Do not cache.\nIt takes 4 steps.")
    assert "enable" not in few


def test_it_is_enabled_in_one_piece(monkeypatch, tmp_path):
    with_picks(monkeypatch, tmp_path, pick(3, measured((50.0, 45.0))))
    pipe = reference.load("unet-digits")
    found = dc.recommend(pipe)
    assert found.arguments() == {"policy": "interval", "every": 3}
    for given, every, dtype in [({}, 3, "model"), ({"every": 2, "cache_dtype": "int8"}, 2, "int8")]:
        method = dc.enable(pipe, found, **given).method
        assert (method.guarded.policy, method.cache_dtype) == (dc.policies.Interval(every), dtype)
    with dc.cached(pipe, found, "reuse"):
        assert session_of(pipe).method.forecaster.name == "reuse"
    dc.disable(pipe)
    with pytest.raises(ConfigError, match=r"^the recommendation is not to cache, .* It takes 4 steps\. "):
        dc.enable(pipe, dc.recommend(pipe, 4))
    assert session_of(pipe) is None


@pytest.mark.parametrize("name", list(reference.MODELS))
@pytest.mark.parametrize("steps", [1, 4, 8])
def test_few_steps_are_not_cached(name, steps):
    found = dc.recommend(reference.load(name), steps)
    assert not found.cache
    assert (found.policy, dict(found.options)) == (None, {})
    assert f"takes {steps} step" in found.reason


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


@pytest.mark.parametrize(
    ("name", "few"),
    [
        ("someone/flux-4-steps", True),
        ("someone/sdxl-8step-lora", True),
        ("someone/wan-v2-step-1000", False),
        ("someone/dit-v1_step_2000", False),
        ("someone/model-1000-steps", False),
    ],
)
def test_names_of_models_made_for_few_steps(name, few):
    assert bool(advice.FEW_STEP_NAME.search(name)) == few


def test_what_was_published_for_this_very_model():
    pipe = named(reference.load("flux-digits"), "black-forest-labs/FLUX.1-dev")
    found = dc.recommend(pipe, 28)
    name = found.options["profile"]
    entry = load(name)
    assert (entry.model, entry.steps) == ("black-forest-labs/FLUX.1-dev", 28)
    assert entry.source in found.reason
    assert f"It computes {_share(entry, 28):.0%} of the steps. Not measured here" in found.reason
    dc.enable(pipe, found.policy, **found.options)
    dc.disable(pipe)
    longer = load(dc.recommend(pipe, 50).options["profile"])
    assert longer.steps == 50
    assert 0.4 <= _share(longer, 50) <= 0.52  # about half
    for speedup in (1.5, 2.0, 3.0, 5.0):
        assert _share(load(dc.recommend(pipe, 50, speedup=speedup).options["profile"]), 50) <= 1.06 / speedup
    with pytest.raises(ConfigError, match=r"not 12\.0"):  # none spares as much
        dc.recommend(pipe, 50, speedup=12.0)
    # MagCache's steps and shares are those that its policy computes, of each guidance branch apart
    wan = load("magcache/wan2.1-t2v-1.3b-50")
    schedule = MagCache(**wan.driven().options).schedule(50)
    assert [len(step) for step in schedule.compute] == [2] * 50
    assert _share(wan, 50) == pytest.approx(sum(compute for step in schedule.compute for (compute,) in step) / 100)
    listed = load("scm/slow-15")
    assert _share(listed, 12) == sum(listed.figures["masks_by_steps"]["12"]) / 12
    assert _share(listed, 30) == pytest.approx(listed.mask().count("1") / 15)
    # of the same class, but of another model: no more than a hint
    other = dc.recommend(reference.load("flux-digits"), 28)
    assert "profile" not in other.options
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
        assert dc.enable(pipe, found).method.guarded.policy.plan.name == "nfe-4"
        dc.disable(pipe)
        assert dict(found.options) == {"profile": "tiny-ddim", "plan": "nfe-4"}
        assert "45.0 dB" in found.reason
        assert found.alternatives == ("another of its plans: nfe-6, nfe-3",)
    # other steps, another sampler, other weights: what holds for the kind
    assert dc.recommend(pipe, 9, speedup=1.5).options["plan"] == "nfe-6"
    assert dc.recommend(pipe, 9, speedup=1.45).options["plan"] == "nfe-6"  # of the profile's own
    cheapest = dc.recommend(pipe, 9, speedup=3)
    assert cheapest.options["plan"] == "nfe-3"
    assert "None of its plans" not in cheapest.reason
    replace(profile, plans=profile.plans[:2]).save(no_shipped_profiles / "tiny-ddim")
    assert "None of its plans does 3× less work; this does least." in dc.recommend(pipe, 9, speedup=3).reason
    assert "profile" not in dc.recommend(pipe, 50).options
    assert "profile" not in dc.recommend(reference.load("dit-digits", "dpm++")).options
    with torch.no_grad():
        for parameter in pipe.transformer.parameters():
            parameter.mul_(1.01)
    assert "profile" not in dc.recommend(pipe, 9).options


def test_routers_are_not_recommended(no_shipped_profiles):
    own = Path(__file__).parents[2] / "profiles" / "flux-digits-flow-euler-router"
    shutil.copytree(own, no_shipped_profiles / own.name)
    recommended = dc.recommend(reference.load("flux-digits"))
    assert "profile" not in recommended.options
    assert "router" not in str(recommended.options)


@pytest.mark.parametrize("cls", [EulerAncestralDiscreteScheduler, DDPMScheduler])
def test_samplers_that_draw_noise_are_told(cls):
    pipe = reference.load("unet-digits")
    assert "nothing was measured with such" not in dc.recommend(pipe, 30).reason
    pipe.scheduler = cls.from_config(pipe.scheduler.config)
    assert "nothing was measured with such" in dc.recommend(pipe, 30).reason


def test_a_profile_without_plans_says_nothing(no_shipped_profiles):
    pipe = reference.load("dit-digits")
    replace(small_profile(pipe, 50), plans=()).save(no_shipped_profiles / "tiny-ddim")
    assert "profile" not in dc.recommend(pipe).options


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
