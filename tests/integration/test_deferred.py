"""Branches whose forecast is made where their block uses it, as on a GPU: the same outputs as when made at once."""

import pytest
import torch
import zoo
from torch import nn

import diffusion_cache as dc
from diffusion_cache import ops, reference

STEPS = 4
CASES = {case.id: case for case in zoo.cases()}
# operations of a reused step, read from the source of the blocks: (gated, added without a gate, made plainly)
ZOO = {
    "FluxTransformer2DModel": (12, 0, 4),  # single blocks put attention and feed-forward side by side
    "SD3Transformer2DModel": (14, 0, 0),
    "DiTTransformer2DModel": (6, 0, 0),
    "PixArtTransformer2DModel": (6, 3, 0),
    "WanTransformer3DModel": (8, 4, 0),
}
SHIPPED = {"dit-digits": "gated", "flux-digits": "gated", "wan-moving-digits": "gated", "unet-digits": "added"}


@pytest.fixture
def counted(monkeypatch):
    """How often each operation ran, and a switch for leaving forecasts to the blocks on the CPU."""
    counts, forecast, gated_forecast = {"gated": 0, "added": 0, "plain": 0}, ops.forecast, ops.gated_forecast

    def counted_forecast(base, *arguments):
        counts["plain" if base is None else "added"] += 1
        return forecast(base, *arguments)

    def counted_gated(*arguments):
        counts["gated"] += 1
        return gated_forecast(*arguments)

    monkeypatch.setattr(ops, "forecast", counted_forecast)
    monkeypatch.setattr(ops, "gated_forecast", counted_gated)

    def switch(on):
        counts.update(gated=0, added=0, plain=0)
        shape = lambda feature: feature.codes.shape if isinstance(feature, ops.Coded) else feature.shape  # noqa: E731
        monkeypatch.setattr(ops, "fuses", lambda features: on and len(shape(features[0])) == 3)
        return counts

    return switch


@pytest.mark.parametrize("case", ZOO)
def test_denoisers(case, counted):
    model = zoo.build(CASES[case])

    def outputs():
        with torch.no_grad(), dc.run(model, "interval", "taylor", every=2, scope="branch", num_steps=STEPS) as run:
            found = []
            for step in range(STEPS):
                found += zoo.flat(model(**CASES[case].inputs(zoo.Draw(step))))
                run.next_step()
            return found

    counts = counted(False)
    expected = outputs()
    assert (counts["gated"], counts["added"]) == (0, 0)
    assert counts["plain"] >= 2 * sum(ZOO[case])  # some that no one uses among them (SD3's last text stream)
    counts = counted(True)
    given = outputs()
    assert tuple(counts.values()) == tuple(2 * count for count in ZOO[case])
    for found, plain in zip(given, expected, strict=True):
        assert type(found) is torch.Tensor
        assert (found - plain).abs().max() <= 1e-5 * plain.abs().max()


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, "model") for name in SHIPPED), ("flux-digits", "int8"), ("flux-digits", "int8-delta")]
)
def test_shipped_models(name, dtype, counted):
    def images():
        pipe = reference.load(name)
        with dc.cached(pipe, policy="interval", forecaster="taylor", every=2, scope="branch", cache_dtype=dtype):
            found = reference.images(name, pipe(**reference.inputs(name, (3, 8), (5, 6), steps=STEPS)))
            assert dc.summary(pipe).reused > 0
        return found

    counted(False)
    expected = images()
    counts = counted(True)
    found = images()
    assert counts[SHIPPED[name]] > 0
    # a number in codes may round the other way, by 1/127 of the largest one in its row
    assert (found - expected).abs().max() <= (1e-5 if dtype == "model" else 1e-3)


class Keeping(nn.Module):
    """A block that keeps what its branch gave, beside using it."""

    def __init__(self):
        super().__init__()
        self.ff = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        self.kept = []

    def forward(self, x):
        branch = self.ff(x)
        self.kept += [branch, 0.5 * torch.ones(8) * branch]
        return x + branch


class Denoiser(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Keeping(), Keeping()])

    def forward(self, x, timestep):
        for block in self.blocks:
            x = block(x)
        return x


def test_what_a_block_keeps_does_not_change_with_later_features(counted):
    torch.manual_seed(0)
    model, inputs = Denoiser(), torch.randn(STEPS + 2, 1, 4, 8)

    def kept():
        model.blocks[0].kept.clear()
        with torch.no_grad(), dc.run(model, "interval", "taylor", every=2, scope="branch", num_steps=STEPS + 2) as run:
            for step, x in enumerate(inputs):
                model(x, torch.tensor([step]))
                run.next_step()
        return [tensor.clone() for tensor in model.blocks[0].kept]

    counted(False)
    expected = kept()
    counted(True)
    for found, plain in zip(kept(), expected, strict=True):
        assert torch.allclose(found, plain, atol=1e-6)
