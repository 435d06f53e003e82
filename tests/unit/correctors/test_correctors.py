"""What each corrector does to a forecast, on weights and tensors by hand."""

import math

import pytest
import torch

from diffusion_cache import registry
from diffusion_cache.context import Correction, Query, Signals
from diffusion_cache.correctors import Affine, Alignment, Magnitude, Shrink
from diffusion_cache.engine.forecasting import Row
from diffusion_cache.errors import ConfigError

NODES = (0, 2, 3)
WEIGHTS = (0.5, -1.5, 2.0)
FEATURES = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def forecast(row, made=None):
    """The weighted sum; made: what a non-linear forecaster gives."""
    found = sum(weight * feature for weight, feature in zip(row.features, FEATURES, strict=True))
    return found if made is None else found + row.forecast[0] * made


def query(target=5, total=8, signals=None, nodes=NODES):
    return Query(nodes, target, total=total, signals=signals)


def mended(corrector, row=None, **asked):
    """The weights after correction."""
    return (Row(WEIGHTS) if row is None else row).mended(corrector.blend(query(**asked)))


def test_every_corrector_is_tested_here():
    assert set(registry.correctors.names()) == {"affine", "alignment", "magnitude", "shrink"}


@pytest.mark.parametrize("strength", [0.0, 0.3, 0.8, 1.0])
def test_shrink_goes_part_of_the_way(strength):
    plain, last = forecast(Row(WEIGHTS)), FEATURES[-1]
    expected = last + strength * (plain - last)
    torch.testing.assert_close(forecast(mended(Shrink(strength))), expected)
    made = torch.randn_like(last)
    row = mended(Shrink(strength), Row((0.0, 0.0, 0.0), forecast=(1.0,)))
    torch.testing.assert_close(forecast(row, made), last + strength * (made - last))
    assert mended(Shrink(strength), Row(WEIGHTS, inputs=(1.0, 2.0, 3.0))).inputs == (
        strength,
        2 * strength,
        3 * strength,
    )


def test_magnitude_multiplies_the_ratios_since_the_last_computed_step():
    """Steps 4 and 5 after step 3; not step 3's own, and not step 6's."""
    corrector = Magnitude((1.0, 9.0, 9.0, 9.0, 1.2, 0.7, 9.0, 9.0))
    expected = 1.2 * 0.7 * forecast(Row(WEIGHTS))
    torch.testing.assert_close(forecast(mended(corrector)), expected)
    assert Magnitude([1.0, 2.0]).ratios == (1.0, 2.0)  # as configurations have them


def test_magnitude_needs_the_length_of_runs_past_its_ratios():
    with pytest.raises(ConfigError, match="ratios are of 8 steps: pass num_steps"):
        Magnitude((1.0,) * 8).blend(query(8, None))
    assert Magnitude((1.0,) * 8).blend(query(7, None)).keep == 1.0
    # of 15 steps each second one has a ratio of its own: 4 and 5 have the third's
    assert Magnitude((1.0, 1.0, 1.5, 9.0, 9.0, 9.0, 9.0, 9.0)).blend(query(5, 15)).keep == pytest.approx(1.5**2)


@pytest.mark.parametrize("ratios", [(1.0, 0.0), (1.0, float("nan")), ("a",)])
def test_magnitude_bad_ratios(ratios):
    with pytest.raises(ConfigError, match="ratios must be one number above 0 for each step"):
        Magnitude(ratios)


@pytest.mark.parametrize("strength", [-0.1, 1.1, float("nan")])
def test_shrink_bad_strength(strength):
    with pytest.raises(ConfigError, match="strength must be from 0 to 1"):
        Shrink(strength)


def test_affine_is_a_correction_of_the_output():
    assert Affine(2.0, (0.5, 1.0)).correction(query()) == Correction((2.0, 2.0), (0.5, 1.0))
    assert Affine((2.0, 3.0), [0.0, 1.0]).correction(query()) == Correction((2.0, 3.0), (0.0, 1.0))
    assert (Affine(2.0).corrected_channels, Affine((1.0, 1.0), 0.5).corrected_channels) == (1, 2)
    assert (Affine().corrected_channels, Affine((1.0, 1.0)).corrected_channels) == (0, 0)
    assert Affine().correction(query()) is None
    assert Affine(2.0).blend(query()) is None
    listed = Affine([2.0, 3.0])  # read once, for it is asked for at every reused span
    assert (listed.scale, listed.bias) == ((2.0, 3.0), (0.0,))
    assert listed.correction(query()) is listed.correction(query(target=6))


@pytest.mark.parametrize(
    "options",
    [
        {"scale": ()},
        {"scale": "2"},
        {"bias": (1.0, "a")},
        {"scale": math.inf},
        {"scale": (1.0, 2.0), "bias": (0.0,) * 3},
    ],
)
def test_affine_bad_options(options):
    with pytest.raises(ConfigError, match=r"^affine: (scale|bias) (must be|is of)"):
        Affine(**options)


def residuals(*sizes):
    """Probe residuals [rows, 3, 2] whose rows are filled with these numbers."""
    return torch.tensor(sizes).reshape(-1, 1, 1).expand(-1, 3, 2)


def test_alignment_goes_as_far_as_the_probe_has_gone():
    """Row by row: 1.25 times as far, less far than before (held at 1), much further (held at 1.5)."""
    first, a, b = residuals(7.0, 7.0, 7.0), residuals(0.0, 0.0, 1.0), residuals(4.0, 4.0, -1.0)
    now = residuals(5.0, 2.0, -100.0)
    signals = {"probe_residual": Signals(now, (first, a, b))}
    row = mended(Alignment(), Row((0.0, 0.0, 1.0)), signals=signals)
    expected = torch.tensor([1.25, 1.0, 1.5])
    torch.testing.assert_close(row.features[2], expected)
    torch.testing.assert_close(row.features[1], 1 - expected)
    torch.testing.assert_close(row.features[0], torch.zeros(3))


def test_alignment_of_any_forecast_starts_from_the_older_feature():
    signals = {"probe_residual": Signals(residuals(1.4), (residuals(9.0), residuals(0.0), residuals(1.0)))}
    plain = forecast(Row(WEIGHTS))
    expected = FEATURES[1] + 1.4 * (plain - FEATURES[1])
    torch.testing.assert_close(forecast(mended(Alignment(), signals=signals)), expected, rtol=1e-6, atol=1e-6)


def test_alignment_where_the_probe_stands_still():
    still = residuals(1.0, 1.0)
    moved = {"probe_residual": Signals(residuals(1.0, 2.0), (still, still))}
    factor = Alignment().blend(query(signals=moved, nodes=NODES[1:])).keep
    torch.testing.assert_close(factor, torch.tensor([1.0, 1.5]))
    assert Alignment().blend(query(nodes=(3,))) is None
    with pytest.raises(ConfigError, match="0 ≤ least ≤ most"):
        Alignment(2.0, 1.0)


IDENTITIES = {
    "affine": Affine(1.0, 0.0),
    "alignment": Alignment(1.0, 1.0),
    "magnitude": Magnitude((1.0,) * 8),
    "shrink": Shrink(1.0),
}


@pytest.mark.parametrize("name", registry.correctors.names())
def test_identities_change_no_bit(name):
    """Of linear forecasts, of those from inputs, and of non-linear ones."""
    corrector = IDENTITIES[name]
    signals = {"probe_residual": Signals(residuals(3.0), (residuals(1.0),) * 3)}
    assert corrector.correction(query()) is None
    for row in (Row(WEIGHTS), Row(WEIGHTS, inputs=(0.25, 0.5, -3.0)), Row((0.0, 0.0, 0.0), forecast=(1.0,))):
        blend = corrector.blend(query(signals=signals))
        found = row if blend is None else row.mended(blend)
        assert [float(weight) for weight in found.flat] == torch.tensor(row.flat).tolist()
