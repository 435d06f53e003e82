"""Fingerprints: what changes them, what does not, and what their differences say."""

import copy
import json
import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from diffusion_cache.errors import ConfigError, DiffusionCacheWarning
from diffusion_cache.fingerprint import STRICT, DenoiserFacts, Difference, Fingerprint, same_levels


class Denoiser(nn.Module):
    def __init__(self, seed=0, width=100, **config):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.first = nn.Linear(width, 90)
            self.conv = nn.Conv2d(4, 6, 3)
            self.last = nn.Linear(90, 8)
        self.config = {"width": width, "_name_or_path": str(seed), **config}


class Scheduler:
    def __init__(self, sigmas=None, **config):
        self.config = {"shift": 3.0, "prediction_type": "flow", "_class_name": "Scheduler", **config}
        self.sigmas = sigmas


class Pipe:
    def __init__(self, scheduler):
        self.scheduler = scheduler


def fingerprint(model=None, scheduler=None, **run):
    return Fingerprint.of(Pipe(scheduler or Scheduler()), {"transformer": model or Denoiser()}, **run)


def named(differences):
    return {difference.field: difference.strict for difference in differences}


def test_the_same_weights_give_the_same_facts():
    facts = DenoiserFacts.of(Denoiser())
    assert facts.class_name == "Denoiser"
    assert facts.dtype == "float32"
    assert DenoiserFacts.of(Denoiser()) == facts
    assert DenoiserFacts.of(copy.deepcopy(Denoiser())) == facts
    assert DenoiserFacts.of(Denoiser().to(memory_format=torch.channels_last)) == facts


def test_compiling_changes_nothing():
    facts = DenoiserFacts.of(Denoiser())
    model = Denoiser()
    model.first = torch.compile(model.first)
    assert DenoiserFacts.of(model) == facts
    assert DenoiserFacts.of(torch.compile(Denoiser())) == facts


@pytest.mark.parametrize("name", ["first.weight", "conv.bias", "last.weight"])
def test_one_sampled_weight_changes_the_digest(name):
    model = Denoiser()
    before = DenoiserFacts.of(model)
    model.get_parameter(name).data.view(-1)[0] += 1e-6
    after = DenoiserFacts.of(model)
    assert after.weights != before.weights
    assert replace(after, weights=before.weights) == before


def test_names_and_shapes_of_all_parameters_count():
    class Many(nn.Module):
        def __init__(self, odd_name="odd", odd_size=1):
            super().__init__()
            for i in range(200):
                self.register_parameter(f"p{i:03}", nn.Parameter(torch.zeros(2)))
            # the second by name of 201: not one of the 64 that values are read from
            self.register_parameter(f"p000{odd_name}", nn.Parameter(torch.zeros(odd_size)))

    plain = DenoiserFacts.of(Many())
    assert DenoiserFacts.of(Many()) == plain
    for other in (Many(odd_name="even"), Many(odd_size=2)):
        facts = DenoiserFacts.of(other)
        assert facts.layout != plain.layout
        assert facts.weights != plain.weights


def test_few_values_are_read_whatever_the_size():
    # 2 TB of numbers in one element's memory: reading them all would take minutes
    class Huge(nn.Module):
        def __init__(self):
            super().__init__()
            for i in range(100):
                vast = torch.zeros(1).expand(10**10)
                self.register_parameter(f"p{i}", nn.Parameter(vast, requires_grad=False))

    facts = DenoiserFacts.of(Huge())
    assert facts.weights is not None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float64])
def test_every_dtype_has_a_digest_of_its_values(dtype):
    model, other = Denoiser().to(dtype), Denoiser(seed=1).to(dtype)
    facts = DenoiserFacts.of(model)
    assert facts.dtype == str(dtype).removeprefix("torch.")
    assert facts == DenoiserFacts.of(copy.deepcopy(model))
    assert facts.weights != DenoiserFacts.of(other).weights
    assert facts.layout == DenoiserFacts.of(other).layout


def test_packed_weights():
    torch.manual_seed(0)

    class Packed(nn.Module):
        def __init__(self, value):
            super().__init__()
            self.weight = nn.Parameter(torch.full((64,), value, dtype=torch.uint8), requires_grad=False)

    assert DenoiserFacts.of(Packed(3)).weights != DenoiserFacts.of(Packed(4)).weights
    assert DenoiserFacts.of(Packed(3)).dtype == "uint8"


def test_tensors_made_of_others_are_read_by_their_parts():
    from torch.testing._internal.two_tensor import TwoTensor

    class Quantised(nn.Module):
        def __init__(self, scale):
            super().__init__()
            self.weight = nn.Parameter(TwoTensor(torch.ones(8), torch.full((8,), scale)))

    assert DenoiserFacts.of(Quantised(2.0)) == DenoiserFacts.of(Quantised(2.0))
    assert DenoiserFacts.of(Quantised(2.0)).dtype == "TwoTensor(float32)"
    assert DenoiserFacts.of(Quantised(2.0)).weights != DenoiserFacts.of(Quantised(3.0)).weights


def test_offloaded_weights_are_said_to_be_unknown():
    model = Denoiser()
    expected = DenoiserFacts.of(model)
    with pytest.warns(DiffusionCacheWarning, match="offloaded"):
        offloaded = fingerprint(model.to("meta"))
    facts = offloaded.denoisers["transformer"]
    assert facts.weights is None
    assert facts.layout == expected.layout
    (difference,) = fingerprint().differences(offloaded)
    assert (difference.field, difference.found, difference.strict) == ("transformer.weights", "unknown", False)


def test_config_counts_without_private_keys():
    facts = DenoiserFacts.of(Denoiser())
    assert DenoiserFacts.of(Denoiser(heads=3)).config != facts.config
    assert DenoiserFacts.of(Denoiser(_hidden=3)).config == facts.config


def test_how_a_language_model_was_loaded_does_not_count(tmp_path):
    config = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, use_cache=False
    )
    model = LlamaForCausalLM(config)
    facts = DenoiserFacts.of(model)
    model.save_pretrained(tmp_path)
    assert DenoiserFacts.of(LlamaForCausalLM.from_pretrained(tmp_path)) == facts
    halved = DenoiserFacts.of(LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16))
    assert (halved.config, halved.dtype) == (facts.config, "bfloat16")
    stored = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**stored, "transformers_version": "0.1", "architectures": None}))
    assert DenoiserFacts.of(LlamaForCausalLM.from_pretrained(tmp_path)) == facts
    (tmp_path / "config.json").write_text(json.dumps({**stored, "rms_norm_eps": 0.5}))
    assert DenoiserFacts.of(LlamaForCausalLM.from_pretrained(tmp_path)).config != facts.config


def with_lora(seed=0, name="style"):
    peft = pytest.importorskip("peft")
    model = Denoiser()
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=2, target_modules=["first", "last"], init_lora_weights=False)
    return peft.inject_adapter_in_model(config, model, adapter_name=name)


def tuner_layers(model):
    return [module for module in model.modules() if hasattr(module, "base_layer")]


def test_lora_is_kept_apart_from_the_weights():
    plain = DenoiserFacts.of(Denoiser())
    facts = DenoiserFacts.of(with_lora())
    assert facts.lora == ("style",)
    assert facts.lora_weights is not None
    assert replace(facts, lora=(), lora_weights=None) == plain
    assert DenoiserFacts.of(with_lora(seed=1)).lora_weights != facts.lora_weights
    assert DenoiserFacts.of(with_lora(name="other")).lora_weights == facts.lora_weights  # the name does nothing

    found = named(fingerprint().differences(fingerprint(with_lora())))
    assert found == {"transformer.lora": True}
    assert not fingerprint(with_lora()).differences(fingerprint(with_lora(name="other")))


def test_lora_scale_counts_and_disabling_is_as_none():
    plain = DenoiserFacts.of(Denoiser())
    model = with_lora()
    facts = DenoiserFacts.of(model)
    for layer in tuner_layers(model):
        layer.scale_layer(0.5)
    assert DenoiserFacts.of(model).lora_weights != facts.lora_weights
    for layer in tuner_layers(model):
        layer.enable_adapters(False)
    assert DenoiserFacts.of(model) == plain


def test_lora_of_another_precision_or_offloaded_cannot_be_compared():
    own = fingerprint(with_lora())
    lenient = {"transformer.weights": False, "transformer.lora": False}
    assert named(own.differences(fingerprint(with_lora().bfloat16()))) == {"transformer.dtype": False, **lenient}
    with pytest.warns(DiffusionCacheWarning, match="offloaded"):
        offloaded = fingerprint(with_lora().to("meta"))
    assert named(own.differences(offloaded)) == lenient
    assert named(offloaded.differences(own)) == lenient
    # what can be told apart is
    for other in (with_lora(name="other"), Denoiser()):
        assert named(own.differences(fingerprint(other.bfloat16())))["transformer.lora"]
    assert named(own.differences(fingerprint(with_lora(seed=1)))) == {"transformer.lora": True}


def test_fused_lora_is_other_weights():
    model = with_lora()
    for layer in tuner_layers(model):
        layer.merge()
    facts, plain = DenoiserFacts.of(model), DenoiserFacts.of(Denoiser())
    assert facts.lora == ()
    assert facts.weights != plain.weights
    assert facts.layout == plain.layout


def test_fingerprint_of_a_run():
    sigmas = torch.tensor([1.0, 0.5, 0.0])
    found = fingerprint(
        scheduler=Scheduler(sigmas),
        steps=2,
        noise_levels=[-float("inf"), 0.0],
        guidance=3.5,
        sample_shape=torch.Size([4, 8, 8]),
    )
    assert (found.pipeline, found.scheduler, found.steps) == ("Pipe", "Scheduler", 2)
    assert found.scheduler_config == {"shift": 3.0, "prediction_type": "flow"}
    assert (found.sigmas, found.timesteps) == ((1.0, 0.5, 0.0), None)
    assert found.noise_levels == (-float("inf"), 0.0)
    assert (found.guidance, found.sample_shape) == (3.5, (4, 8, 8))
    assert found.versions["torch"] == torch.__version__
    assert set(found.versions) == {"torch", "diffusers", "diffusion_cache"}
    assert Fingerprint.from_json(json.loads(json.dumps(found.to_json(), allow_nan=False))) == found


def test_a_shipped_pipeline_has_a_fingerprint():
    from diffusion_cache import reference

    pipe = reference.load("dit-digits")
    found = Fingerprint.of(pipe, {"transformer": pipe.transformer})
    assert found.denoisers["transformer"].class_name == "DiTTransformer2DModel"
    assert found.scheduler == type(pipe.scheduler).__name__
    assert json.loads(json.dumps(found.to_json()))["scheduler_config"]["num_train_timesteps"] == 1000
    assert not found.differences(Fingerprint.of(pipe, {"transformer": pipe.transformer}))
    assert Fingerprint.from_json(found.to_json()) == found


def test_a_bare_denoiser_has_one_too():
    found = Fingerprint.of(None, {"model": Denoiser()})
    assert (found.pipeline, found.scheduler, found.scheduler_config) == ("", "", {})


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ({"steps": 0}, "at least one step"),
        ({"steps": 3, "noise_levels": [1.0]}, "1 noise levels for 3 steps"),
        ({"steps": 1, "noise_levels": [float("nan")]}, "NaN"),
    ],
)
def test_impossible_runs_are_refused(run, message):
    with pytest.raises(ConfigError, match=message):
        fingerprint(**run)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (Denoiser(seed=1), {"transformer.weights": True}),
        (Denoiser(heads=2), {"transformer.config": True}),
        (Denoiser(width=101, heads=1), {"transformer.config": True, "transformer.layout": True}),
        (Denoiser().bfloat16(), {"transformer.dtype": False, "transformer.weights": False}),
        (nn.Linear(1, 1), {"transformer.model": True}),
    ],
)
def test_differences_of_the_model(model, expected):
    assert named(fingerprint().differences(fingerprint(model))) == expected


def test_denoisers_that_only_one_side_has():
    one = fingerprint()
    two = Fingerprint.of(Pipe(Scheduler()), {"transformer": Denoiser(), "transformer_2": Denoiser()})
    (difference,) = one.differences(two)
    assert (difference.field, difference.expected, difference.found) == ("transformer_2.model", "absent", "Denoiser")
    (difference,) = two.differences(one)
    assert (difference.expected, difference.found, difference.strict) == ("Denoiser", "absent", True)


def test_differences_of_the_sampler():
    one = fingerprint()
    (difference,) = one.differences(fingerprint(scheduler=Scheduler(prediction_type="v")))
    assert difference.strict
    assert (difference.expected, difference.found) == ("prediction_type=flow", "prediction_type=v")

    class Other(Scheduler):
        pass

    assert named(one.differences(fingerprint(scheduler=Other()))) == {"scheduler": True}
    # the shift only places the noise levels
    assert named(one.differences(fingerprint(scheduler=Scheduler(shift=1.0)))) == {"spacing": False}
    spaced = [fingerprint(scheduler=Scheduler(use_lu_lambdas=value)) for value in (False, True)]
    assert named(spaced[0].differences(spaced[1])) == {"spacing": False}


def test_options_that_a_version_of_diffusers_brought_are_no_strict_difference():
    old = replace(fingerprint(), versions={"diffusers": "0.1"})
    new = fingerprint(Denoiser(newly=1), Scheduler(newly=True))
    assert named(old.differences(new)) == {"transformer.config": False, "scheduler_config": False}
    changed = fingerprint(scheduler=Scheduler(prediction_type="v"))
    assert named(old.differences(changed)) == {"scheduler_config": True}


def test_differences_of_the_run():
    run = {"steps": 3, "noise_levels": [-1.0, 0.0, 1.0], "guidance": 5.0, "sample_shape": (4, 8, 8)}
    one = fingerprint(**run)
    assert not one.differences(fingerprint(**{**run, "noise_levels": [-1.0, 0.0005, 1.0]}))
    assert named(one.differences(fingerprint(**{**run, "noise_levels": [-1.0, 0.01, 1.0]}))) == {"noise_levels": False}
    other = fingerprint(steps=2, noise_levels=[0.0, 1.0], guidance=None, sample_shape=(4, 8, 16))
    assert named(one.differences(other)) == {"steps": False, "guidance": False, "sample_shape": False}
    assert not one.differences(fingerprint())  # nothing is known yet of the run


def test_strictness_can_be_chosen():
    other = fingerprint(Denoiser(seed=1))
    assert named(fingerprint().differences(other, strict=STRICT - {"weights"})) == {"transformer.weights": False}
    other = replace(fingerprint(), pipeline="Another")
    assert named(fingerprint().differences(other)) == {"pipeline": False}
    assert named(fingerprint().differences(other, strict={"pipeline"})) == {"pipeline": True}


def test_differences_are_sentences():
    difference = Difference("steps", "50", "20", "measurements must be resampled", False)
    assert str(difference) == "steps is 20, the profile's 50: measurements must be resampled"
    levels = [float(i) for i in range(30)]
    one, other = fingerprint(steps=30, noise_levels=levels), fingerprint(steps=30, noise_levels=[*levels[1:], 40.0])
    (difference,) = one.differences(other)
    assert (difference.expected, difference.found) == ("0, 1, 2, …, 29", "1, 2, 3, …, 40")


def test_same_levels():
    inf = float("inf")
    assert same_levels([-inf, 0.0, inf], [-inf, 0.001, inf])
    assert not same_levels([-inf, 0.0], [-30.0, 0.0])
    assert not same_levels([0.0, 1.0], [0.0, 1.0, 2.0])
    assert not same_levels([0.0, 1.0], [0.0, 1.002])


@pytest.mark.gpu
def test_the_device_does_not_matter():
    for dtype in (torch.float32, torch.bfloat16, torch.float8_e4m3fn):
        model = Denoiser().to(dtype)
        assert DenoiserFacts.of(copy.deepcopy(model).cuda()) == DenoiserFacts.of(model)


def test_nothing_is_warned_of_without_reason():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fingerprint()
