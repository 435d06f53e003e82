"""Sliced and cached at once equals cached alone, at every scope and in every order of switching on and off."""

import pytest
import torch
import zoo

import diffusion_cache as dc
from diffusion_cache.measure import peak_bytes

STEPS = 4
CASES = {case.id: case for case in zoo.cases()}
UNET, TRANSFORMER = ("denoiser", "cut", "block", "branch"), ("denoiser", "stack", "block", "branch")
SCOPES = {
    "UNetMotionModel": UNET,
    "UNetSpatioTemporalConditionModel": UNET,
    "WanTransformer3DModel": TRANSFORMER,
}
# small enough that slices, and not what the cache holds, take the most memory
MAX_BYTES = {"UNetMotionModel": 180_000, "UNetSpatioTemporalConditionModel": 180_000, "WanTransformer3DModel": 5_000}
INTERVAL = {"policy": "interval", "forecaster": "taylor", "every": 2}
FIRST_BLOCK = {"policy": "first_block", "forecaster": "reuse", "threshold": 1e9, "max_consecutive": 1}


@pytest.fixture(scope="module")
def subject():
    made = {}

    def subject(name):
        if name not in made:
            given = [CASES[name].inputs(zoo.Draw(seed)) for seed in range(STEPS)]
            made[name] = zoo.build(CASES[name]), given
        return made[name]

    return subject


@torch.no_grad()
def outputs(model, given, options):
    """Of one cached run, another input at every step; and which calls were computed."""
    with dc.run(model, num_steps=STEPS, **options) as run:
        found = []
        for inputs in given:
            found.append(model(**inputs)[0])
            run.next_step()
        return torch.stack(found), [record.computed for record in run.summary().records]


METHODS = [(name, {"scope": scope, **INTERVAL}) for name, scopes in SCOPES.items() for scope in scopes]
METHODS.append(("WanTransformer3DModel", {"scope": "stack", **FIRST_BLOCK}))


@pytest.mark.parametrize(("name", "options"), METHODS, ids=lambda value: str(value))
def test_sliced_and_cached_is_cached(subject, name, options):
    model, given = subject(name)
    expected, computed = outputs(model, given, options)
    peak = peak_bytes(lambda: outputs(model, given[:1], options))
    with dc.slice_features(model, max_bytes=MAX_BYTES[name]) as features:
        found, sliced = outputs(model, given, options)
        assert features.least_bytes > 0
        of_slices = peak_bytes(lambda: outputs(model, given[:1], options))
        if (name, options["scope"]) == ("WanTransformer3DModel", "branch"):  # the features take the most
            assert of_slices <= peak
        else:
            assert of_slices < peak
    assert ((found - expected).norm() / expected.norm()).item() <= 1e-5
    assert sliced == computed
    assert not all(computed)
    again, _ = outputs(model, given, options)
    assert torch.equal(again, expected)


@pytest.mark.parametrize("slices_first", [True, False])
@pytest.mark.parametrize("slices_last", [True, False])
def test_switched_on_and_off_in_any_order(subject, slices_first, slices_last):
    model, given = subject("WanTransformer3DModel")
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    run = dc.run(model, num_steps=STEPS, scope="block", **INTERVAL)
    if slices_first:
        features = dc.slice_features(model, max_bytes=20_000)
        run.__enter__()
    else:
        run.__enter__()
        features = dc.slice_features(model, max_bytes=20_000)
    with torch.no_grad():
        model(**given[0])
    if slices_last:
        run.__exit__(None, None, None)
        features.remove()
    else:
        features.remove()
        run.__exit__(None, None, None)
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before


def test_an_impossible_limit_is_told_through_a_cache(subject):
    model, given = subject("UNetMotionModel")
    with dc.slice_features(model, max_bytes=1), pytest.raises(dc.ConfigError, match="least that works"):
        outputs(model, given, {"scope": "cut", **INTERVAL})
    expected, _ = outputs(model, given, {"scope": "cut", **INTERVAL})
    with dc.slice_features(model, max_bytes=10**9):
        found, _ = outputs(model, given, {"scope": "cut", **INTERVAL})
    assert ((found - expected).norm() / expected.norm()).item() <= 1e-5
