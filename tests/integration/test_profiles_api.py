"""Profiles and plans through the front doors: enable(pipe, profile=…) and the command line."""

import itertools
import shutil
import warnings
from dataclasses import replace
from importlib import resources
from types import SimpleNamespace

import plans
import pytest
import torch
from diffusers import EulerDiscreteScheduler
from plans import STEPS
from torch._dynamo.testing import CompileCounterWithBackend
from typer.testing import CliRunner

import diffusion_cache as dc
from diffusion_cache import published, reference
from diffusion_cache.cli import app
from diffusion_cache.cli.plan import Source, _ladder, _Work
from diffusion_cache.engine import session_of
from diffusion_cache.errors import ConfigError, DiffusionCacheWarning
from diffusion_cache.plan import Quality, Speed
from diffusion_cache.planning.build import Planner, Search, psnr
from diffusion_cache.planning.choose import choose
from diffusion_cache.profile import Profile
from diffusion_cache.profiling.generation import Batch
from diffusion_cache.profiling.measure import Options, measure

NAME = "dit-digits"


def generate(pipe, name=NAME, steps=STEPS, samples=((3, 5), (8, 6))):
    return plans.batch(pipe, name, samples, steps).call().images


def test_no_prompt_is_fitted_to_and_held_out():
    source = Source(None, "abcdefghijklmnop", None, classes=False, call={})
    assert ["".join(part) for part in source.parts((32, 16, 64))] == ["abcd", "ef", "ghijklmnop"]
    assert ["".join(part) for part in replace(source, prompts="abc").parts((90, 1, 1))] == ["a", "b", "c"]
    assert replace(source, prompts=[0, 1], classes=True).parts((1, 1, 1)) == [[0, 1]] * 3
    with pytest.raises(ConfigError, match="2 prompts are too few: give at least 3 with --prompts"):
        replace(source, prompts="ab").parts((1, 1, 1))


@pytest.fixture(scope="module")
def found():
    """A profile with plans nfe-4 and nfe-3."""
    return plans.planned(NAME)


@pytest.fixture
def pipe():
    return reference.load(NAME)


@pytest.fixture
def silent():
    with warnings.catch_warnings():
        warnings.simplefilter("error", DiffusionCacheWarning)
        yield


def test_a_sampler_that_is_swapped_is_told_once(pipe):
    """Euler's steps are at DDIM's very noise levels."""

    def told(sampler):
        pipe.scheduler = sampler
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            generate(pipe, samples=((3, 5),))
        return [str(warning.message) for warning in found if "not the one that a plan was enabled" in str(warning)]

    own = pipe.scheduler
    dc.enable(pipe, profile="dit-digits-ddim", nfe=25)
    assert told(own) == []
    euler = EulerDiscreteScheduler.from_config(own.config)
    (message,) = told(euler)
    assert "scheduler is EulerDiscreteScheduler, the profile's DDIMScheduler" in message
    assert told(euler) == []
    (message,) = told(type(own).from_config(own.config, prediction_type="sample"))
    assert "prediction_type=sample" in message


@pytest.mark.parametrize("given", ["profile", "method"])
def test_another_guidance_than_the_profiles_is_told_once(found, pipe, given):
    def told(**call):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            pipe(**reference.inputs(NAME, (3,), (5,), STEPS, **call))
        return [str(warning.message) for warning in caught if "made at guidance" in str(warning.message)]

    assert found.fingerprint.guidance == reference.spec(NAME).guidance == 1.5
    dc.enable(pipe, profile=found, **({"nfe": 3} if given == "profile" else {"method": "dpcache", "nfe": 3}))
    assert told() == []
    (message,) = told(guidance=3.0)
    assert message.startswith("the plan was made at guidance 1.5, and this call is at 3: features are taken to change")
    assert told(guidance=3.0) == told() == []
    (message,) = told(guidance=1.0)
    assert "this call is at 1:" in message


@pytest.mark.parametrize("given", ["profile", "method"])
def test_another_size_than_the_profiles_is_told_once(given):
    pipe = reference.load("flux-digits")

    def told(**size):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            pipe(**{**reference.inputs("flux-digits", (3,), (5,), 20), "latents": None, **size})
        return [str(warning.message) for warning in caught if "made for latents of" in str(warning.message)]

    chosen = {"nfe": 20} if given == "profile" else {"method": "dpcache", "nfe": 20}
    dc.enable(pipe, profile="flux-digits-flow-euler", **chosen)
    assert told() == []
    (message,) = told(height=16, width=24)
    assert message.startswith("the plan was made for latents of [64, 4], and this call's are of [96, 4]: features")
    assert told(height=16, width=24) == told() == []
    dc.enable(pipe, profile="flux-digits-flow-euler", **chosen, ignore=["sample_shape"])
    assert told(height=16, width=24) == []


def kept(count=4):
    return plans.drawn(300, count)


@pytest.mark.parametrize("name", ["nfe-4", "nfe-3"])
def test_the_stated_quality_is_what_a_user_gets(found, pipe, name, silent):
    """On another instance of the pipeline, in other batches than it was measured in, by another code path."""
    plan = next(plan for plan in found.plans if plan.name == name)
    assert plan.quality.seeds == tuple(seed for _, seed in kept())
    values = []
    for sample in kept():
        uncached = reference.images(NAME, plans.batch(pipe, NAME, [sample]).call())
        with dc.cached(pipe, profile=found, plan=name):
            cached = reference.images(NAME, plans.batch(pipe, NAME, [sample]).call())
        values += psnr(cached, uncached)
    assert values == pytest.approx(plan.quality.values, abs=0.01)


@pytest.mark.parametrize(
    ("wish", "name"),
    [({"plan": "nfe-3"}, "nfe-3"), ({"nfe": 3.5}, "nfe-3"), ({"nfe": STEPS}, "nfe-4"), ({"speedup": 1.0}, "nfe-4")],
)
def test_wishes(found, pipe, wish, name, tmp_path, silent):
    timed = [replace(plan, speed=Speed(8 / plan.nfe, 1.0, 4.0, "cpu", 2)) for plan in found.plans]
    stored = found.with_plans(timed)
    stored.save(tmp_path)
    images = []
    for profile in (stored, tmp_path, str(tmp_path)):
        dc.enable(pipe, profile=profile, **wish)
        images.append(generate(pipe))
        assert dc.summary(pipe).computed == int(name[-1])
        assert f"plan '{name}'" in dc.summary(pipe).method
    dc.enable(pipe, plan=next(plan for plan in timed if plan.name == name))
    images.append(generate(pipe))
    assert all(torch.equal(image, images[0]) for image in images[1:])


def test_the_summary_is_short_and_disabling_restores(found, pipe, silent):
    uncached = generate(pipe)
    dc.enable(pipe, profile=found, nfe=4)
    assert not torch.equal(generate(pipe), uncached)
    shown = str(dc.summary(pipe))
    assert "plan 'nfe-4': 4 of 8 steps computed, on stack" in shown
    assert "4 calls computed and 4 reused" in shown
    assert len(shown) < 2000
    dc.disable(pipe)
    assert session_of(pipe) is None
    assert torch.equal(generate(pipe), uncached)


def test_another_model_or_sampler_is_refused_by_name(found, pipe):
    with pytest.raises(
        ConfigError, match=r"transformer\.model is FluxTransformer2DModel, the profile's DiTTransformer2D"
    ):
        dc.enable(reference.load("flux-digits"), profile=found, nfe=4)
    other = reference.load(NAME, "dpm++")
    with pytest.raises(ConfigError, match=r"scheduler is DPMSolverMultistepScheduler, the profile's DDIMScheduler"):
        dc.enable(other, profile=found, nfe=4)
    assert session_of(other) is None
    with torch.no_grad():
        for parameter in pipe.transformer.parameters():
            parameter.mul_(1.01)
    with pytest.raises(ConfigError, match=r"(?s)transformer\.weights .*ignore=\['weights'\]"):
        dc.enable(pipe, profile=found, nfe=4)
    with pytest.raises(ConfigError, match=r"no field 'weight'.*weights"):
        dc.enable(pipe, profile=found, nfe=4, ignore=("weight",))
    dc.enable(pipe, profile=found, nfe=4, ignore=("weights",))
    generate(pipe)
    assert dc.summary(pipe).computed == 4


def test_another_sampler_runs_when_told_to(found):
    pipe = reference.load(NAME, "dpm++")
    dc.enable(pipe, profile=found, nfe=4, ignore=("scheduler",))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        generate(pipe)
    assert 3 <= dc.summary(pipe).computed <= 5


def test_another_number_of_steps_is_told_once_and_left_to_taylor(found, pipe):
    dc.enable(pipe, profile=found, nfe=4)
    with pytest.warns(DiffusionCacheWarning, match="other noise levels .8 steps; this run has 12.") as told:
        images = generate(pipe, steps=12)
    assert len([warning for warning in told if warning.category is DiffusionCacheWarning]) == 1
    records = dc.summary(pipe).records
    mask = "".join("1" if record.computed else "0" for record in records)
    assert (len(mask), mask.count("1")) == (12, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("error", DiffusionCacheWarning)
        assert torch.equal(generate(pipe, steps=12), images)
        generate(pipe)  # and its own steps again, as planned
        assert dc.summary(pipe).computed == 4
    dc.enable(pipe, "mask", "taylor", mask=mask)
    assert (generate(pipe, steps=12) - images).abs().max() <= 1e-5


def test_guards_go_with_a_plan(found, pipe):
    uncached = generate(pipe)
    dc.enable(pipe, profile=found, nfe=3, max_reused=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", DiffusionCacheWarning)
        assert torch.equal(generate(pipe), uncached)
    dc.enable(pipe, profile=found, nfe=3, last=2)
    with pytest.warns(DiffusionCacheWarning, match="more steps computed than the plan does"):
        generate(pipe)
    assert [record.computed for record in dc.summary(pipe).records[-2:]] == [True, True]


def test_a_profile_of_a_pipeline_serves_its_denoiser_in_a_loop_of_ones_own(found, pipe, silent):
    with dc.cached(pipe, profile=found, nfe=4):
        expected = generate(pipe)
    with dc.run(pipe.transformer, profile=found, nfe=4, num_steps=STEPS) as run:
        assert torch.equal(generate(pipe), expected)
    assert run.summary().computed == 4
    other = reference.load("flux-digits").transformer
    told = r"transformer\.model is FluxTransformer2DModel, the profile's DiTTransformer2DModel"
    with pytest.raises(ConfigError, match=told), dc.run(other, profile=found, nfe=4, num_steps=STEPS):
        pytest.fail("entered")


def test_published_figures_by_name(pipe):
    name = "published/fora/dit-xl-2-256-50-every-2"
    stretched = f"every-2 is for 50 steps, and this run has {STEPS}: its list is stretched"
    dc.enable(pipe, profile=name)
    with pytest.warns(DiffusionCacheWarning, match=stretched):
        images = generate(pipe)
    assert STEPS // 2 <= dc.summary(pipe).computed < STEPS
    dc.enable(pipe, "mask", "reuse", mask=published.load(name).mask(), scope="branch")
    assert torch.equal(generate(pipe), images)
    dc.enable(pipe, "mask", "taylor", mask=published.load(name).mask(), scope="branch")
    assert not torch.equal(forecast := generate(pipe), images)
    dc.enable(pipe, profile=name, forecaster="taylor")
    with pytest.warns(DiffusionCacheWarning, match=stretched):
        assert torch.equal(generate(pipe), forecast)
    with pytest.raises(ConfigError, match="scope comes from the profile"):
        dc.enable(pipe, profile=name, scope="block")
    with pytest.raises(ConfigError, match="is for DiTTransformer2DModel, and this pipeline has FluxTransformer2DModel"):
        dc.enable(reference.load("flux-digits"), profile=name)
    with pytest.raises(ConfigError, match="speedup says nothing"):
        dc.enable(pipe, profile=name, speedup=2)
    with pytest.raises(ConfigError, match="ignore says nothing"):
        dc.enable(pipe, profile=name, ignore=("weights",))
    with pytest.raises(ConfigError, match="Did you mean 'published/fora/"):
        dc.enable(pipe, profile="published/fora/dit-xl-2-256-50-every-3")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"policy": "interval"}, "policy comes from the profile"),
        ({"forecaster": "taylor"}, "forecaster comes from the profile"),
        ({"scope": "block"}, "scope comes from the profile"),
        ({"depth": 2}, "depth comes from the profile"),
        ({"nfe": None, "plan": "nfe-5"}, "no plan 'nfe-5'"),
        ({"nfe": 2}, "the cheapest, 'nfe-3', takes 3"),
        ({"nfe": None, "speedup": 100.0}, "the fastest is 'nfe-3'"),
        ({"nfe": None, "min_psnr": 20}, "measure 55 more"),
        ({"nfe": None}, "say what you want of the profile"),
        ({"plan": "nfe-4"}, "one of speedup, min_psnr, nfe, plan"),
        ({"every": 2}, "Unknown option 'every'"),
        ({"granularity": "row"}, "Unknown granularity"),
    ],
)
def test_conflicts_change_nothing(found, pipe, options, words):
    before = dc.enable(pipe, "interval", every=2)
    # the slower one is at most as fast, however busy the machine was
    timed = [replace(plan, speed=Speed(8 / plan.nfe, 1.0, 4.0, "cpu", 2)) for plan in found.plans]
    with pytest.raises(ConfigError, match=words):
        dc.enable(pipe, **{"profile": found.with_plans(timed), "nfe": 4, **options})
    assert session_of(pipe) is before


@pytest.mark.parametrize(
    "wish", [{"speedup": 2}, {"nfe": 4}, {"min_psnr": 30}, {"plan": "nfe-4"}, {"ignore": ("weights",)}]
)
def test_wishes_need_a_profile(pipe, wish):
    with pytest.raises(ConfigError, match=f"{next(iter(wish))} needs a profile"):
        dc.enable(pipe, **wish)


def test_a_plan_at_hand_leaves_nothing_to_wish_for(found, pipe):
    for given in ({}, {"profile": found}):
        with pytest.raises(ConfigError, match="this plan is given already"):
            dc.enable(pipe, plan=found.plans[0], nfe=4, **given)
    with pytest.raises(ConfigError, match="ignore needs a profile"):
        dc.enable(pipe, plan=found.plans[0], ignore=("weights",))


def test_a_denoiser_compiled_as_a_whole(found, silent):
    """No graph more, whatever the weights and steps; branches in the rows of a call keep weights of their own."""
    torch._dynamo.reset()
    assert (found.scope, found.row_passes) == ("stack", 2)
    plain, pipe = reference.load(NAME), reference.load(NAME)
    backend = CompileCounterWithBackend("eager")
    pipe.transformer = torch.compile(pipe.transformer, backend=backend, fullgraph=True)
    for name in ("nfe-4", "nfe-3"):
        dc.enable(plain, profile=found, plan=name)
        dc.enable(pipe, profile=found, plan=name)
        assert (generate(pipe) - generate(plain)).abs().max() <= 1e-5
        assert dc.summary(pipe).computed == int(name[-1])
    # one that computes, and one that reuses for each length of history
    assert backend.frame_count == 1 + len({plan.history for plan in found.plans if plan.name in ("nfe-4", "nfe-3")})
    torch._dynamo.reset()


def test_a_shipped_profile_by_its_name(found, pipe, tmp_path, monkeypatch, silent):
    found.save(tmp_path / "profiles" / "tiny-ddim")
    monkeypatch.setattr(resources, "files", lambda package: tmp_path / package.rpartition(".")[2])
    assert Profile.load("tiny-ddim").fingerprint == found.fingerprint
    dc.enable(pipe, profile="tiny-ddim", nfe=4)
    generate(pipe)
    assert dc.summary(pipe).computed == 4


def test_the_last_profile_wins_and_leaves_no_trace(found, pipe, silent):
    dc.enable(pipe, profile=found, nfe=3)
    dc.enable(pipe, profile=found, nfe=4)
    first = generate(pipe)
    with dc.cached(pipe, profile=found, nfe=3):
        assert not torch.equal(generate(pipe), first)
    assert torch.equal(generate(pipe), first)
    dc.disable(pipe)
    assert session_of(pipe) is None


# the command line


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())


@pytest.fixture
def folder(tmp_path):
    plans.profile("flux-digits").save(tmp_path / "profile")
    return tmp_path / "profile"


SMALL = ("--runs", 2, "--fitting", 2, "--tuning", 2, "--held-out", 3, "--batch", 2, "--threads", 1)


def test_plan_makes_stores_and_shows_plans(folder, tmp_path):
    before = Profile.load(folder)
    shutil.copytree(folder, tmp_path / "copy")
    output = run("plan", folder, "--nfe", "3.5", "--model", "flux-digits", *SMALL)
    (plan,) = Profile.load(folder).plans
    assert (plan.name, plan.nfe, plan.quality.n, plan.speed.batch) == ("nfe-3", 3.0, 3, 2)
    # none of the samples is another's
    assert not set(plan.quality.seeds) & {seed for _, seed in before.samples}
    assert plan.facts["fitted_on"] == plan.facts["tuned_on"] == 2
    assert "3 held-out samples cannot show what 95% of prompts reach; it takes 59" in output
    assert "nfe-3 computes 3 of 8" in output
    assert "█" in output
    # again: there already, and the model is found by itself
    assert "nfe-3 is there already" in run("plan", folder, "--nfe", "3", *SMALL)
    assert Profile.load(folder).plans[0].quality == plan.quality
    # another search replaces it; into another folder, which leaves this one as it is
    run("plan", folder, "--nfe", "3", *SMALL, "--runs", 3, "--out", tmp_path / "out")
    assert Profile.load(tmp_path / "out").plans[0].facts["search"]["runs"] == 3
    assert Profile.load(folder).plans[0].facts["search"]["runs"] == 2
    assert "nfe-3" in run("show", folder)
    assert (folder / "plans.png").is_file()


def test_a_pipeline_from_a_folder(tmp_path):
    """With the profile's sampler, precision and call, whatever the folder says of them."""
    from diffusers import DDIMPipeline, DDIMScheduler, DDPMScheduler, UNet2DModel

    torch.manual_seed(0)
    blocks = dict(down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"))
    sizes = dict(sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), norm_num_groups=4)
    unet = UNet2DModel(layers_per_block=1, **sizes, **blocks)
    pipe = DDIMPipeline(unet, DDPMScheduler())
    pipe.save_pretrained(tmp_path / "model")
    pipe.scheduler = DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    pipe.set_progress_bar_config(disable=True)

    def batch(samples):
        def call():
            generators = [torch.Generator().manual_seed(seed) for _, seed in samples]
            return pipe(len(samples), generators, num_inference_steps=STEPS, output_type="np", eta=0.3)

        def images(output):
            return torch.as_tensor(output.images).movedim(-1, -3)[:, None]

        return Batch(pipe, call, images, len(samples))

    options = Options(scope="denoiser", batch=2, sensitivity_samples=0)
    settings = {"model": {"kind": "hub", "call": {"eta": 0.3}}}
    measure(batch, plans.drawn(0, 2), options, settings=settings, folder=tmp_path / "profile")
    arguments = ("--nfe", 4, "--model", tmp_path / "model", "--device", "cpu", *SMALL)
    run("plan", tmp_path / "profile", *arguments)
    (plan,) = Profile.load(tmp_path / "profile").plans
    assert (plan.name, plan.scope, plan.quality.n) == ("nfe-4", "denoiser", 3)
    # what it states holds for the pipeline that was profiled
    (value,) = plan.quality.values[:1]
    sample = batch([("", plan.quality.seeds[0])])
    uncached = sample.images(sample.call())
    with dc.cached(pipe, profile=tmp_path / "profile", nfe=4):
        assert psnr(sample.images(sample.call()), uncached) == pytest.approx([value], abs=0.01)
    assert "unknown" in run("plan", tmp_path / "profile", *arguments, "--call", "hieght=3", code=2).lower()
    assert "name its folder or repository" in run("plan", tmp_path / "profile", "--nfe", 4, *SMALL, code=2)


def test_stopped_after_a_plan(folder, monkeypatch):
    made = itertools.chain(plans.planned("flux-digits", computed=(4,)).plans)

    def plan(self, computed, name=None, scopes=()):
        try:
            return next(made)
        except StopIteration:
            raise KeyboardInterrupt from None

    monkeypatch.setattr(Planner, "plan", plan)
    output = run("plan", folder, "--nfe", "4,3", *SMALL, code=130)
    assert "Finished plans are kept" in output
    assert [plan.name for plan in Profile.load(folder).plans] == ["nfe-4"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "one of --speedup 2,3, --nfe 25,17 or --min-psnr 30"),
        (("--nfe", "3", "--speedup", "2"), "one of --speedup"),
        (("--nfe", "three"), "--nfe takes numbers with commas between them"),
        (("--speedup", "0"), "numbers above 0"),
        (("--nfe", "0.5"), "the least is 1"),
        (("--nfe", "3", "--last", "9"), "no plan takes 3"),
        (("--min-psnr", "30"), "give --held-out 59 or more"),
        (("--nfe", "3", "--batch", "0"), "--batch must be 1 to"),
        (("--nfe", "3", "--scope", "stak"), "Unknown scope 'stak'. Did you mean 'stack'"),
        (("--nfe", "3", "--model", "flux-digit"), "Unknown model 'flux-digit'"),
        (("--nfe", "3", "--model", "dit-digits"), "transformer.model is DiTTransformer2DModel"),
        (("--nfe", "3", "--call", "height=64"), "takes no --call"),
        (("--nfe", "3", "--call", "height"), "--call takes NAME=VALUE"),
        (("--speedup", "50"), "no plan is 50× as fast here; the fastest reached is"),
    ],
)
def test_what_cannot_be_planned(folder, arguments, words):
    assert words in run("plan", folder, *SMALL, *arguments, code=2)
    assert not Profile.load(folder).plans


def test_no_profile(tmp_path):
    assert "profile" in run("plan", tmp_path / "none", "--nfe", 3, code=2)
    assert "profile" in run("show", tmp_path / "none", code=2)


class Toy:
    """A planner whose plans have a made-up speed and quality: 60 dB when half is computed, 6 dB a step."""

    def __init__(self, profile, reused=0.1, noise=0.0, scopes=("stack",), outside=0.0):
        """outside: of the denoiser, what a reused step still runs at scope stack."""
        self.profile, self.reused, self.noise, self.outside = profile, reused, noise, outside
        self.search, self.steps, self.least, self.scopes = Search(), profile.total, 1, scopes
        self.asked, self.looked = [], []
        self.template = plans.planned(NAME).plans[0]

    def made(self, plan):
        return True

    def timed_here(self, plan):
        return plan

    def nfe(self, computed, scope=None):
        return computed + (self.outside if scope == "stack" else 0.0) * (self.steps - computed)

    def ratio(self, computed, scope=None):
        return self.steps / (self.nfe(computed, scope) + self.reused * (self.steps - computed))

    def timed(self, computed, scope):
        return SimpleNamespace(ratio=self.ratio(computed, scope) + self.noise)

    def plan(self, computed, name, scopes=()):
        self.asked.append(computed)
        self.looked.append(list(scopes))
        ratio = max(self.ratio(computed, scope) for scope in scopes or self.scopes)
        values = [60.0 + 6 * (computed - self.steps / 2) - sample / 100 for sample in range(64)]
        speed, quality = Speed(ratio, ratio, ratio, "cpu", 1), Quality.of("psnr", values, range(64))
        return replace(self.template, name=name, nfe=float(computed), speed=speed, quality=quality)


def work(tmp_path, **fields):
    toy = Toy(plans.profile(NAME), **fields)
    return _Work(toy.profile, toy, tmp_path, lambda what, done, of: None), toy


@pytest.mark.parametrize(("speedup", "computed"), [(1.1, 7), (1.2, 6), (2.0, 3), (3.0, 2), (4.0, 1)])
def test_a_speed_takes_the_most_steps_that_are_as_fast(tmp_path, speedup, computed):
    planned, toy = work(tmp_path)
    assert toy.ratio(computed) >= speedup > toy.ratio(computed + 1)
    plan = planned.faster_than(speedup)
    assert (plan.name, toy.asked) == (f"nfe-{computed}", [computed])
    assert choose(Profile.load(tmp_path).plans, speedup=speedup).name == plan.name


def test_a_speed_that_was_timed_too_high_is_tried_again(tmp_path):
    planned, toy = work(tmp_path, noise=0.5)
    assert planned.faster_than(2.0).name == "nfe-3"
    assert toy.asked == [5, 3]


def test_a_speed_out_of_reach_names_the_fastest(tmp_path):
    planned, toy = work(tmp_path)
    with pytest.raises(ConfigError, match=f"the fastest reached is {toy.ratio(1):.2f}×, with 1 of 8"):
        planned.faster_than(5.0)
    assert not toy.asked


def test_one_scope_that_meets_a_wish_is_enough(tmp_path):
    """At the other a reused step runs too much of the denoiser, in whichever order they are named."""
    for scopes in (("stack", "denoiser"), ("denoiser", "stack")):
        planned, toy = work(tmp_path / scopes[0], scopes=scopes, outside=0.5)
        assert planned.at_most(3.0).name == "nfe-3"
        assert planned.faster_than(4.0).name == "nfe-1"
        assert toy.looked == [["denoiser"]] * 2
        assert planned.at_most(7.9).name == "nfe-7"
        assert toy.looked[-1] == [scope for scope in scopes if toy.nfe(7, scope) <= 7.9]


def test_a_quality_takes_plans_down_to_the_first_that_misses_it(tmp_path):
    planned, toy = work(tmp_path)
    assert planned.as_good_as(60.0).name == "nfe-5"  # nfe-4 has 60 dB for one sample
    assert toy.asked == [7, 6, 5, 4]
    with pytest.raises(ConfigError, match="ask for at most"):
        work(tmp_path / "other")[0].as_good_as(90.0)


@pytest.mark.parametrize(("steps", "least"), [(50, 1), (8, 1), (8, 3), (250, 5), (2, 1)])
def test_rungs_are_close(steps, least):
    rungs = list(_ladder(steps, least))
    assert rungs == sorted(set(rungs), reverse=True)
    assert rungs[-1] == least
    assert all(above - below <= max(1, 0.15 * above) for above, below in itertools.pairwise([steps, *rungs]))
