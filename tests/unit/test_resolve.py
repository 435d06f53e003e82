"""What is said of an argument that is misspelled, that another call takes, or that another project has."""

import inspect

import pytest
from diffusers import FirstBlockCacheConfig, PyramidAttentionBroadcastConfig

import diffusion_cache as dc
from diffusion_cache import api, reference, resolve
from diffusion_cache.context import SCOPES
from diffusion_cache.errors import ConfigError
from diffusion_cache.policies import Guarded


@pytest.mark.parametrize(("door", "arguments"), [(api.enable, resolve.ARGUMENTS), (api.run, resolve.RUN_ARGUMENTS)])
def test_every_argument_of_the_front_door_is_suggested(door, arguments):
    parameters = inspect.signature(door).parameters.values()
    named = {one.name for one in parameters if one.kind is inspect.Parameter.KEYWORD_ONLY} | {"policy", "forecaster"}
    assert {*arguments, *resolve.HOW, *resolve.UNNAMED} == named


def made(policy=None, forecaster=None, scope=None, options=(), **more):
    return resolve.method(policy, forecaster, scope, None, {}, dict(options), **more)


def run(**options):
    with dc.run(reference.load("dit-digits").transformer, **options):
        pytest.fail("entered")


@pytest.mark.parametrize(
    ("act", "options"),
    [
        (run, {"method": "fora"}),
        (run, {"target_reuse": 0.5}),
        (run, {"guard": "input_turn"}),
        (run, {"strict": True}),
        (lambda **options: dc.tune(None, {}, target_reuse=0.5, **options), {"cache_dtype": "int8"}),
        (lambda **options: dc.inspect(None, **options), {"method": "fora"}),
    ],
)
def test_an_argument_of_enable_that_the_call_does_not_take(act, options):
    (name,) = options
    with pytest.raises(ConfigError) as error:
        act(**options)
    assert str(error.value) == f"{name} is an argument of enable(pipe, …), and not of this call: leave it out"


def test_a_run_suggests_its_own_arguments():
    with pytest.raises(ConfigError, match=r"Did you mean 'num_steps'\?"):
        run(num_step=3)
    with pytest.raises(ConfigError, match=r"Unknown option 'target_resue' for .*\. Known: "):
        run(target_resue=0.5)


def test_a_speedup_without_a_profile():
    with pytest.raises(ConfigError) as error:
        run(policy="first_block", speedup=2)
    other = "or a policy's threshold: run(model, policy='first_block', threshold=…)"
    assert str(error.value) == f"speedup needs a profile: run(model, profile=…, speedup=2), {other}"
    assert resolve.needs_profile("speedup", 2).endswith(", or a policy: enable(pipe, policy='first_block', speedup=2)")
    assert resolve.text_needs_profile("speedup", 2) == "speedup needs a profile: enable(pipe, profile=…, speedup=2)"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"options": {"residual_diff_threshold": 0.1}}, "Here that is 'threshold'."),
        ({"options": {"max_continuous_cached_steps": 2}}, "Here that is 'max_consecutive'."),
        ({"policy": "interval", "options": {"Fn_compute_blocks": 8}}, "Here that is 'front', of policy='dicache', "),
        ({"options": {"steps_computation_mask": [1]}}, "Here that is 'mask', of policy='mask', "),
        ({"options": {"num_inference_steps": 20}}, "The pipeline's call takes it; "),
    ],
)
def test_options_of_other_projects(given, words):
    with pytest.raises(ConfigError) as error:
        made(**given)
    assert str(error.value).startswith(f"Unknown option {next(iter(given['options']))!r} for policy ")
    assert f". {words}" in str(error.value)


@pytest.mark.parametrize(
    ("config", "closing"),
    [
        (FirstBlockCacheConfig(), "Give policy='first_block' with forecaster='reuse' instead."),
        (PyramidAttentionBroadcastConfig(), "Give policy='pab' with scope='branch' and forecaster='reuse' instead."),
    ],
)
def test_configurations_of_diffusers(config, closing):
    with pytest.raises(ConfigError) as error:
        made(config)
    assert str(error.value) == f"policy must be a name or an instance, not a {type(config).__name__}. {closing}"


def test_a_policy_for_branches_alone_asks_for_the_scope():
    with pytest.raises(ConfigError, match=r"'pab' serves no model's default scope: add scope='branch'"):
        made("pab")
    assert made("pab", scope="branch").guarded == Guarded(dc.policies.PAB())
    for name in set(dc.registry.policies.names()) - {"pab"}:
        assert dc.registry.policies.get(name).scopes & (set(SCOPES) - {"branch"}), name
