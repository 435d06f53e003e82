"""slice_features: exact, within its bytes, refused where it cannot work, and gone without a trace."""

import copy
import warnings

import pytest
import torch
import zoo
from torch import nn
from zoo_checks import sliced

import diffusion_cache as dc
from diffusion_cache.measure import LiveBytes, peak_bytes
from diffusion_cache.slicing import runner
from diffusion_cache.slicing.runner import FRAME

NAMES = ("UNetMotionModel", "UNetSpatioTemporalConditionModel", "WanTransformer3DModel", "UNet3DConditionModel")
CASES = [case for case in zoo.cases() if case.name in NAMES and case.variant not in ("controlnet", "first-last")]
BY_ID = {case.id: case for case in zoo.cases()}


@pytest.fixture(scope="module")
def built():
    """A model and its inputs by the case's name, made once."""
    made = {}

    def build(name):
        if name not in made:
            made[name] = zoo.build(BY_ID[name]), BY_ID[name].inputs(zoo.Draw(1))
        return made[name]

    return build


@torch.no_grad()
def call(model, inputs):
    return model(**inputs)[0]


def error(output, expected):
    return ((output - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_the_smallest_slices_change_nothing(case):
    found = sliced(case, zoo.build(case))
    assert found.error <= 1e-5
    assert found.restored


def test_models_with_the_same_feed_forward_and_empty_inputs():
    for name in ("FluxTransformer2DModel", "GlmImageTransformer2DModel-kv_write"):
        found = sliced(BY_ID[name], zoo.build(BY_ID[name]))
        assert found.error <= 1e-5
        assert found.modules >= 3


@pytest.mark.parametrize("name", NAMES[:3])
def test_no_slice_takes_more_than_it_may(built, monkeypatch, name):
    model, inputs = built(name)
    taken = []
    inside = runner._inside

    def measured(frame, run, part):
        with LiveBytes() as made:
            output = inside(frame, run, part)
        taken.append((part.stop - part.start, made.peak))
        return output

    expected, whole = call(model, inputs), peak_bytes(lambda: call(model, inputs))
    limit = whole // 4
    with dc.slice_features(model, limit) as features:
        call(model, inputs)
        assert 0 < features.least_bytes <= limit
        monkeypatch.setattr(runner, "_inside", measured)
        assert error(call(model, inputs), expected) <= 1e-5
    assert max(peak for _, peak in taken) <= limit
    assert max(size for size, _ in taken) > 1


@pytest.mark.parametrize(("name", "saved"), [("UNetMotionModel", 0.35), ("UNetSpatioTemporalConditionModel", 0.6)])
def test_the_peak_falls(built, name, saved):
    model, inputs = built(name)
    whole = peak_bytes(lambda: call(model, inputs))
    with dc.slice_features(model, whole // 6):
        call(model, inputs)
        assert peak_bytes(lambda: call(model, inputs)) <= (1 - saved) * whole


def test_consecutive_operators_of_one_kind_run_as_one(built):
    """Between a resnet and the attention behind it nothing is whole: in slices of one frame, one after the other."""
    model, inputs = built("UNetMotionModel")
    block = model.down_blocks[0]
    order = []

    class Noting(nn.Module):
        def __init__(self, name, module):
            super().__init__()
            self.name, self.module = name, module

        def forward(self, x):
            order.append((self.name, len(x)))
            return self.module(x)

    noted = copy.deepcopy(model)
    resnet, attention = noted.down_blocks[0].resnets[0], noted.down_blocks[0].attentions[0]
    resnet.conv1, attention.proj_in = Noting("resnet", resnet.conv1), Noting("attention", attention.proj_in)
    assert type(block).__name__ == "CrossAttnDownBlockMotion"
    with dc.slice_features(noted, 10**9) as features:
        call(noted, inputs)
        least = features.least_bytes
    order.clear()
    with dc.slice_features(noted, least):
        call(noted, inputs)
    frames = inputs["sample"].shape[0] * inputs["sample"].shape[2]
    assert [name for name, _ in order] == ["resnet", "attention"] * (len(order) // 2)
    assert sum(rows for name, rows in order if name == "resnet") == frames
    assert len(order) > 2


def test_what_does_not_fit_is_told_with_the_least_that_does(built):
    model, inputs = built("UNetMotionModel")
    expected = call(model, inputs)
    with dc.slice_features(model, 1000) as features:
        with pytest.raises(dc.ConfigError, match="max_bytes=1000: at this size, the least that works") as told:
            call(model, inputs)
        with pytest.raises(dc.ConfigError):
            call(model, inputs)
    least = features.least_bytes
    assert str(told.value).endswith(f"max_bytes={least}")
    assert torch.equal(call(model, inputs), expected)
    with dc.slice_features(model, least):
        assert error(call(model, inputs), expected) <= 1e-5
    with dc.slice_features(model, least - 1), pytest.raises(dc.ConfigError, match=f"max_bytes={least}$"):
        call(model, inputs)
    assert FRAME.get() is None


def test_bad_input_is_refused_and_leaves_nothing(built):
    model, _ = built("UNetMotionModel")
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    for wrong, message in ((0, "at least 1"), (1.5, "at least 1"), ("1G", "at least 1")):
        with pytest.raises(dc.ConfigError, match=message):
            dc.slice_features(model, wrong)
    with pytest.raises(dc.ConfigError, match="nothing that can run in slices"):
        dc.slice_features(nn.Sequential(nn.Linear(2, 2)), 100)
    with pytest.raises(dc.ConfigError, match=r"pipe\.unet"):
        dc.slice_features(object(), 100)
    with pytest.raises(dc.ConfigError, match="compiled"):
        dc.slice_features(torch.compile(nn.Linear(2, 2)), 100)
    features = dc.slice_features(model, 10**9)
    for again in (model, model.down_blocks[0]):
        with pytest.raises(dc.ConfigError, match="already"):
            dc.slice_features(again, 100)
    features.remove()
    features.remove()
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before


def test_another_size_and_a_direct_call_of_a_block(built):
    model, inputs = built("WanTransformer3DModel")
    smaller = inputs | {"hidden_states": inputs["hidden_states"][:1, :, :2], "timestep": inputs["timestep"][:1]}
    smaller["encoder_hidden_states"] = inputs["encoder_hidden_states"][:1]
    expected = [call(model, given) for given in (inputs, smaller)]
    with dc.slice_features(model, 20_000):
        for given, output in zip((inputs, smaller, inputs), (*expected, expected[0]), strict=True):
            assert error(call(model, given), output) <= 1e-5
        ff, x = model.blocks[0].ffn, torch.randn(1, 5, 24)
        assert torch.equal(ff(x), ff._call_impl(x))  # outside of the denoiser's calls nothing is sliced


@pytest.mark.parametrize("name", NAMES[:2])
def test_a_longer_text_is_measured_anew(built, name):
    model, inputs = built(name)
    text = inputs["encoder_hidden_states"]
    longer = inputs | {"encoder_hidden_states": text.repeat(1, 1000, 1)}
    with dc.slice_features(model, 10**9) as fresh:
        call(model, longer)
    with dc.slice_features(model, 10**9) as features:
        call(model, inputs)
        assert features.least_bytes < fresh.least_bytes
        call(model, longer)
    assert features.least_bytes == fresh.least_bytes


def test_hooked_modules_run_whole_and_say_so(built):
    model, inputs = built("WanTransformer3DModel")
    expected, shapes = call(model, inputs), []
    hooks = [
        block.register_forward_hook(lambda module, args, output: shapes.append(output.shape)) for block in model.blocks
    ]
    with dc.slice_features(model, 10_000), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(2):
            assert error(call(model, inputs), expected) <= 1e-5
    for hook in hooks:
        hook.remove()
    assert [str(w.message).split()[0] for w in told] == [f"blocks.{i}" for i in range(len(model.blocks))]
    tokens = shapes[0][1]
    assert [shape[1] for shape in shapes] == [tokens] * 2 * len(model.blocks)


@pytest.mark.parametrize("name", NAMES[1:3])
def test_gradients_are_those_of_the_whole(built, name):
    model, inputs = built(name)
    key = "sample" if "sample" in inputs else "hidden_states"

    def gradient():
        sample = inputs[key].clone().requires_grad_()
        model(**inputs | {key: sample})[0].square().sum().backward()
        return sample.grad

    expected = gradient()
    with dc.slice_features(model, 400_000):
        gradient()
        assert error(gradient(), expected) <= 1e-4


def test_copies_are_not_sliced(built):
    model, inputs = built("WanTransformer3DModel")
    expected = call(model, inputs)
    with dc.slice_features(model, 10_000):
        assert torch.equal(call(copy.deepcopy(model), inputs), expected)
