"""Rivals on the shipped models: exact when they never reuse, less work when they do, gone without a trace after."""

import importlib.util
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from diffusion_cache import reference
from diffusion_cache.errors import ConfigError
from diffusion_cache.evaluation import peers as module
from diffusion_cache.evaluation.peers import peer, peers, settings_of
from diffusion_cache.measure import executed_flops

STEPS = 6
TRANSFORMERS = ("dit-digits", "flux-digits", "wan-moving-digits")
UNETS = ("unet-digits",)
MODELS = TRANSFORMERS + UNETS
# rival: (the models it serves, settings that reuse within six steps)
RIVALS = {
    "cache_dit": (TRANSFORMERS, {"threshold": 1.0, "warmup": 2}),
    "cache_dit_taylorseer": (TRANSFORMERS, {"threshold": 1.0, "warmup": 2}),
    "cache_dit_dmd": (TRANSFORMERS, {"threshold": 1.0, "warmup": 4}),
    "cache_dit_mask": (TRANSFORMERS, {"every": 2, "warmup": 1}),
    "diffusers_first_block": (TRANSFORMERS, {"threshold": 10.0}),
    "diffusers_taylorseer": (MODELS, {"interval": 2, "warmup": 2}),
    "diffusers_mag": (TRANSFORMERS, {"threshold": 10.0, "ratios": [1.0, 0.99, 0.98]}),
    "diffusers_pab": (MODELS, {"low": 0, "high": 1000}),
    "diffusers_fastercache": (TRANSFORMERS, {"high": 990}),
    "diffusers_sea": (("wan-moving-digits",), {"threshold": 10.0}),
    "deepcache": (UNETS, {"interval": 2}),
}
SERVED = [(name, model) for name, (models, _) in RIVALS.items() for model in models]
UNSERVED = [(name, model) for name, (models, _) in RIVALS.items() for model in MODELS if model not in models]
CONFIGS = Path(module.__file__).parents[3] / "configs" / "method" / "peer"


def installed(name):
    pytest.importorskip(peers[name].module)
    return peer(name)


@pytest.fixture(scope="module")
def pipes():
    """name -> (pipeline, its uncached output, the FLOPs of that), made when first asked for."""
    made = {}

    def get(name):
        if name not in made:
            pipe = reference.load(name)
            made[name] = (pipe, generate(pipe, name), executed_flops(lambda: generate(pipe, name)))
        return made[name]

    return get


def generate(pipe, name, seed=3, steps=STEPS):
    return reference.images(name, pipe(**reference.inputs(name, [seed % 10], [seed], steps=steps)))


def traces(pipe, name):
    """Everything a rival could leave: attributes of every module, their order, and those of the pipeline's class."""
    denoiser = getattr(pipe, reference.spec(name).denoiser)
    modules = [(path, {key: id(value) for key, value in vars(part).items()}) for path, part in denoiser.named_modules()]
    classes = [{key: id(value) for key, value in vars(cls).items()} for cls in (type(pipe), type(pipe.scheduler))]
    return modules, list(denoiser.state_dict()), sorted(vars(pipe)), sorted(vars(pipe.scheduler)), classes


def test_every_rival_is_tested_and_configured():
    assert set(RIVALS) == set(peers) == {path.stem for path in CONFIGS.glob("*.yaml")}
    assert all(rival.name == name for name, rival in peers.items())


@pytest.mark.parametrize(("name", "model"), SERVED)
def test_exact_when_never_reusing_cheaper_when_reusing_and_gone_afterwards(name, model, pipes):
    rival, settings = installed(name), RIVALS[name][1]
    pipe, uncached, full = pipes(model)
    assert rival.why_not(pipe) is None
    before = traces(pipe, model)
    with rival.apply(pipe, rival.never(settings), STEPS):
        assert torch.equal(generate(pipe, model), uncached)
    assert traces(pipe, model) == before
    with rival.apply(pipe, settings, STEPS):
        outputs = []
        work = executed_flops(lambda: outputs.append(generate(pipe, model)))
        assert torch.equal(generate(pipe, model), outputs[0])  # the second starts as clean as the first
    assert traces(pipe, model) == before
    assert not torch.equal(outputs[0], uncached)
    assert work < 0.97 * full
    assert torch.equal(generate(pipe, model), uncached)


@pytest.mark.parametrize(("name", "model"), UNSERVED)
def test_says_why_it_cannot_run(name, model, pipes):
    rival = installed(name)
    pipe = pipes(model)[0]
    reason = rival.why_not(pipe)
    assert reason
    with pytest.raises(ConfigError, match="cannot run on"):
        rival.apply(pipe, {}, STEPS)


class Interrupted(Exception):
    pass


def interrupt_at(call):
    """A forward hook that raises at that call."""
    calls = []

    def hook(*_):
        calls.append(1)
        if len(calls) == call:
            raise Interrupted

    return hook


@pytest.mark.parametrize("name", RIVALS)
def test_an_interrupted_generation_leaves_nothing_for_the_next(name, pipes):
    rival, (models, settings) = installed(name), RIVALS[name]
    pipe = pipes(models[0])[0]
    with rival.apply(pipe, settings, STEPS):
        fresh = generate(pipe, models[0])
        denoiser = getattr(pipe, reference.spec(models[0]).denoiser)
        handle = denoiser.register_forward_hook(interrupt_at(4))
        with pytest.raises(Interrupted):
            generate(pipe, models[0], seed=8)
        handle.remove()
        assert torch.equal(generate(pipe, models[0]), fresh)


@pytest.mark.parametrize("name", RIVALS)
def test_gone_after_an_exception_inside_the_block(name, pipes):
    rival, (models, settings) = installed(name), RIVALS[name]
    pipe = pipes(models[0])[0]
    before = traces(pipe, models[0])
    with pytest.raises(Interrupted), rival.apply(pipe, settings, STEPS):
        raise Interrupted
    assert traces(pipe, models[0]) == before


@pytest.mark.parametrize("name", RIVALS)
def test_bad_settings_are_errors(name, pipes):
    rival, (models, settings) = installed(name), RIVALS[name]
    pipe = pipes(models[0])[0]
    known = next(iter(settings))
    with pytest.raises(ConfigError, match=f"Unknown setting '{known}s' of rival '{name}'. Did you mean '{known}'"):
        rival.apply(pipe, {f"{known}s": 1}, STEPS)
    number = next(key for key, value in settings.items() if isinstance(value, int | float))
    with pytest.raises(ConfigError, match=number):
        rival.apply(pipe, {**settings, number: "many"}, STEPS)
    with pytest.raises(ConfigError, match="steps"):
        rival.apply(pipe, settings, 0)


@pytest.mark.parametrize(
    ("name", "model", "settings", "message"),
    [
        ("diffusers_taylorseer", "dit-digits", {"modules": "default"}, "nothing to cache"),
        ("diffusers_taylorseer", "dit-digits", {"cache": ["blocks"]}, "nothing to cache"),
        ("diffusers_taylorseer", "dit-digits", {"skip": [r"transformer_blocks\.\d+"]}, "nothing to cache"),
        ("diffusers_pab", "dit-digits", {"spatial": None, "cross": 2}, "nothing to cache"),
        ("diffusers_mag", "dit-digits", {}, "calibrate"),
        ("cache_dit", "dit-digits", {"fn": 8, "bn": 4}, "of 12 blocks leave none"),
        ("deepcache", "unet-digits", {"branch": 9}, "branches 0 to 8"),
    ],
)
def test_settings_that_would_cache_nothing_are_errors(name, model, settings, message, pipes):
    rival = installed(name)
    pipe = pipes(model)[0]
    before = traces(pipe, model)
    with pytest.raises(ConfigError, match=message), rival.apply(pipe, settings, STEPS):
        pass
    assert traces(pipe, model) == before


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("diffusers_taylorseer", {"interval": 0}, "interval must be at least 1"),
        ("diffusers_taylorseer", {"modules": "branch"}, "Did you mean 'branches'"),
        ("diffusers_taylorseer", {"cache": ["("]}, "no regular expression"),
        ("diffusers_mag", {"ratios": [float("nan")]}, "finite"),
        ("diffusers_pab", {"spatial": None}, "set spatial"),
        ("diffusers_fastercache", {"layout": "BCWH"}, "Did you mean 'BCHW'"),
        ("diffusers_sea", {"order": 2}, "order must be 0 or 1"),
        ("cache_dit", {"fn": 0}, "fn must be at least 1"),
        ("cache_dit_dmd", {"history": 3}, "history must be at least 4"),
        ("cache_dit_mask", {"policy": "fst"}, "Did you mean 'fast'"),
        ("cache_dit_mask", {"policy": None}, "set policy or every"),
        ("cache_dit_mask", {"forecaster": "taylor"}, "Did you mean 'taylorseer'"),
    ],
)
def test_values_that_cannot_be_are_errors(name, settings, message):
    with pytest.raises(ConfigError, match=message):
        peers[name].options(settings)


def test_masks():
    rival = installed("cache_dit_mask")
    assert rival.mask(rival.options({"every": 3, "warmup": 2}), 9) == [1, 1, 0, 0, 1, 0, 0, 1, 0]
    assert rival.mask(rival.options({"every": 1, "warmup": 4}), 7) == [1] * 7
    fast = rival.mask(rival.options({"policy": "fast"}), 28)
    assert len(fast) == 28
    assert sum(fast) == 11
    with pytest.raises(ConfigError, match="mask of 5 steps"):
        rival.mask(rival.options({"policy": "fast"}), 5)


def test_each_guidance_pass_has_its_own_state(pipes):
    # with one state for both of Wan's passes, the second always reuses what the first computed
    rival = installed("diffusers_pab")
    pipe, uncached, _ = pipes("wan-moving-digits")
    errors = {}
    for per_pass in (True, False):
        with rival.apply(pipe, {"spatial": 2, "low": 0, "high": 1000, "per_pass": per_pass}, STEPS):
            errors[per_pass] = (generate(pipe, "wan-moving-digits") - uncached).square().mean()
    assert errors[True] < errors[False]


def test_calibrated_ratios_compare_residuals_of_neighbouring_steps(pipes):
    rival = installed("diffusers_mag")
    pipe, uncached, _ = pipes("wan-moving-digits")
    denoiser = pipe.transformer
    residuals = {"cond": [], "uncond": []}
    inputs = []
    calls = [denoiser.blocks[0].register_forward_pre_hook(lambda block, args: inputs.append(args[0]))]

    def record(block, args, output):
        list(residuals.values())[(len(inputs) - 1) % 2].append(output - inputs[-1])

    calls.append(denoiser.blocks[-1].register_forward_hook(record))
    assert torch.equal(generate(pipe, "wan-moving-digits"), uncached)
    for handle in calls:
        handle.remove()
    expected = [
        sum((now.norm(dim=-1) / before.norm(dim=-1)).mean() for now, before in pairs) / 2
        for pairs in zip(*(zip(each[1:], each[:-1], strict=True) for each in residuals.values()), strict=True)
    ]
    before = traces(pipe, "wan-moving-digits")
    ratios = rival.calibrate(pipe, lambda: generate(pipe, "wan-moving-digits"), STEPS)
    assert traces(pipe, "wan-moving-digits") == before
    torch.testing.assert_close(torch.tensor(ratios), torch.stack([torch.tensor(1.0), *expected]))
    with pytest.raises(ConfigError, match="needs a generation of 6 steps"):
        rival.calibrate(pipe, lambda: None, STEPS)


def test_names_and_packages(monkeypatch):
    with pytest.raises(ConfigError, match="Did you mean 'cache_dit'"):
        peer("cachedit")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"cache-dit: pip install 'diffusion-cache\[peers\]'"):
        peer("cache_dit")


def test_a_denoiser_of_another_kind_is_served_by_none():
    class Pipeline:
        def __init__(self):
            self.transformer = nn.Linear(2, 2)
            self.components = {"transformer": self.transformer}

    for name in RIVALS:
        assert installed(name).why_not(Pipeline())
    assert "expected a diffusers pipeline" in peers["diffusers_first_block"].why_not(object())


@pytest.mark.parametrize("name", RIVALS)
def test_shipped_grids(name):
    config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    assert (config["kind"], config["peer"]) == ("rival", name)
    for model in RIVALS[name][0]:
        points = settings_of(config, model, reference.spec(model).samplers[0])
        options = [peers[name].options(point) for point in points]
        assert 12 <= len(options) == len(set(options)) <= 16
        if name == "diffusers_mag":
            for sampler in reference.spec(model).samplers:
                measured = {peers[name].options(point).ratios for point in settings_of(config, model, sampler)}
                assert [len(ratios) for ratios in measured] == [reference.spec(model).steps]


def test_grids_and_points():
    config = {
        "kind": "rival",
        "peer": "x",
        "settings": {"a": 1},
        "grid": {"b": [1, 2], "c": [3, 4]},
        "models": {"m": {"settings": {"a": 2}}, "n": {"points": [{"b": 9}]}},
    }
    assert settings_of(config, "other") == [{"a": 1, "b": b, "c": c} for b in (1, 2) for c in (3, 4)]
    assert settings_of(config, "m") == [{"a": 2, "b": b, "c": c} for b in (1, 2) for c in (3, 4)]
    assert settings_of(config, "n") == [{"a": 1, "b": 9}]
    assert settings_of({"settings": {"a": 1}}, "m") == [{"a": 1}]
    sampled = {"settings": {"a": 1}, "models": {"m/ddim": {"settings": {"a": 2}}}}
    assert [settings_of(sampled, "m", sampler) for sampler in ("ddim", "unipc")] == [[{"a": 2}], [{"a": 1}]]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"grids": {}}, "Did you mean 'grid'"),
        ({"models": {"m": {"setting": {}}}}, "Did you mean 'settings'"),
        ({"grid": {"a": [1]}, "points": [{"a": 1}]}, "not both"),
        ({"grid": {"a": 1}}, "list of values"),
        ({"grid": {"a": []}}, "list of values"),
        ({"points": {"a": 1}}, "list of settings"),
        ({"settings": [1]}, "must map names"),
    ],
)
def test_bad_grids_are_errors(config, message):
    with pytest.raises(ConfigError, match=message):
        settings_of(config, "m")
