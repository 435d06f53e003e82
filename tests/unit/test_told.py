"""What is told where a call cannot do what was asked, or does it otherwise."""

import warnings

import pytest
import torch
from diffusers import DDPMScheduler, EulerAncestralDiscreteScheduler, FluxPipeline

import diffusion_cache as dc
from diffusion_cache import published, reference
from diffusion_cache.advice import _is_stochastic
from diffusion_cache.errors import ConfigError, DiffusionCacheWarning
from diffusion_cache.policies import Mask
from diffusion_cache.profile import Profile


@pytest.fixture(scope="module")
def flux():
    return reference.load("flux-digits")


@pytest.fixture(scope="module")
def unet():
    return reference.load("unet-digits")


def test_published_masks_in_runs_of_other_lengths_are_told():
    mask = Mask("100100", others=("1010",), source="theirs")
    assert mask.departure(6) == mask.departure(4) == mask.departure(None) == ""
    assert "theirs is for 6 steps, and this run has 9" in mask.departure(9)
    assert Mask("100100").departure(9) == ""  # one's own, for runs that start late as well
    listed = published.load("lemica/flux-dev-10of50").driven()
    assert "lemica/flux-dev-10of50 is for 50 steps, and this run has 7" in Mask(**listed.options).departure(7)


def test_a_loop_that_goes_on_past_its_number_of_steps_is_told(flux):
    calls = []
    hook = flux.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True
    )
    flux(**reference.inputs("flux-digits", [1], [0], steps=1))
    hook.remove()
    with torch.no_grad(), dc.run(flux.transformer, "interval", every=2, num_steps=4) as run:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(4):
                run.next_step()
                flux.transformer(**calls[0])
        run.next_step()
        with pytest.warns(DiffusionCacheWarning, match="more steps than the 4 that it was told of"):
            flux.transformer(**calls[0])


@pytest.mark.parametrize(
    ("wrong", "meant"), [("polciy", "policy"), ("profil", "profile"), ("target_resue", "target_reuse")]
)
def test_misspelled_arguments_of_enable(flux, wrong, meant):
    with pytest.raises(ConfigError, match=f"Unknown option '{wrong}'.*Did you mean '{meant}'"):
        dc.enable(flux, **{wrong: "interval"})


def test_what_a_speedup_needs(flux):
    with pytest.raises(
        ConfigError, match=r"speedup needs a profile: .* or a policy: .*policy='first_block', speedup=2"
    ):
        dc.enable(flux, speedup=2)


@pytest.mark.parametrize("policy", ["teacache", "dicache", "speca"])
def test_policies_of_transformers_on_a_unet(unet, policy):
    options = {"coefficients": (1.0, 0.0)} if policy == "teacache" else {}
    with pytest.raises(ConfigError, match="which no UNet has: take 'first_block' or 'seacache'"):
        dc.enable(unet, policy=policy, **options)


def test_names_of_published_figures_are_suggested_as_they_are_given(flux):
    with pytest.raises(ConfigError, match="'published/magcache/flux-dev-28'"):
        dc.enable(flux, profile="published/magcache/flux-dev-2")


def test_shipped_profiles_are_loaded_by_name():
    assert Profile.load("flux-digits-flow-euler").plans


def test_recommendations_for_samplers_that_draw_noise_say_so(unet):
    own = unet.scheduler
    assert "nothing was measured with such" not in dc.recommend(unet, 30).reason
    try:
        for cls in (EulerAncestralDiscreteScheduler, DDPMScheduler):
            unet.scheduler = cls.from_config(own.config)
            assert _is_stochastic(unet.scheduler)
            assert "nothing was measured with such" in dc.recommend(unet, 30).reason
    finally:
        unet.scheduler = own


def test_routers_are_not_recommended(flux):
    assert "router" not in str(dc.recommend(flux, 20).options)


def test_shipped_pipelines_can_be_saved_and_loaded(flux, tmp_path):
    flux.save_pretrained(tmp_path)
    absent = {name: None for name, part in flux.components.items() if part is None}
    found = FluxPipeline.from_pretrained(tmp_path, **absent)
    images = [torch.as_tensor(pipe(**reference.inputs("flux-digits", [3], [0], 2)).images) for pipe in (flux, found)]
    assert torch.equal(*images)
