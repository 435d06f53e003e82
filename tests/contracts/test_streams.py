"""Streams: every policy, and every forecaster, in diffusers' pipeline with a noise level for each latent frame.

What does not serve a stream is refused and leaves the pipeline as it was. What does gives the uncached output where it
reuses nothing, is alike in every generation, and leaves no trace.
"""

import pytest
import torch
from cases import COMPUTING, REUSING
from pipelines_video import WAN_CASES

import diffusion_cache as dc
from diffusion_cache import registry

POLICIES = registry.policies.names()
FORECASTERS = registry.forecasters.names()
# policies that look at no signals, with forecasters that go by nothing but noise levels
SERVING = (
    {"interval", "centered", "spaced", "mask", "growing_window", "magcache", "pab"},
    {"reuse", "taylor", "taylor_paper"},
)
# what the policies that serve streams amount to in the eight steps of a window's chunks
MASKS = {
    "interval": "10101010",
    "centered": "11010100",
    "spaced": "10010101",
    "mask": "11010100",
    "growing_window": "10100100",
    "magcache": "11010101",
    "pab": "10101010",
}
PAIRS = [(policy, "taylor") for policy in POLICIES] + [("interval", name) for name in FORECASTERS if name != "taylor"]


@pytest.fixture(scope="module")
def asynchronous():
    case = next(case for case in WAN_CASES if case.variant == "asynchronous")
    pipe = case.build()
    return pipe, lambda: torch.as_tensor(pipe(**case.call()).frames)


@pytest.fixture(scope="module")
def uncached(asynchronous):
    return asynchronous[1]()


def state(pipe):
    return {name: dict(vars(module)) for name, module in pipe.transformer.named_modules()}


@pytest.mark.filterwarnings("ignore::diffusion_cache.DiffusionCacheWarning")
@pytest.mark.parametrize(("policy", "forecaster"), PAIRS)
def test_streams(asynchronous, uncached, policy, forecaster):
    pipe, generate = asynchronous
    before = state(pipe)
    scopes = registry.policies.get(policy).scopes
    scope = "stack" if "stack" in scopes else min(scopes)
    options = dict(policy=policy, forecaster=forecaster, scope=scope, stream=dc.Stream())
    if policy not in SERVING[0] or forecaster not in SERVING[1]:
        why = "compares one step with another" if policy not in SERVING[0] else "goes by step numbers"
        with pytest.raises(dc.ConfigError, match=why):
            dc.enable(pipe, **options, **REUSING[policy])
    else:
        with dc.cached(pipe, **options, **COMPUTING[policy]):
            assert torch.equal(generate(), uncached)
        with dc.cached(pipe, **options, **REUSING[policy]):
            first = generate()
            assert torch.equal(generate(), first)
            records = dc.summary(pipe).records
        for name in {record.pass_name for record in records}:
            assert [r.computed for r in records if r.pass_name == name] == [step == "1" for step in MASKS[policy]]
        with dc.cached(pipe, **options | dict(policy="mask"), mask=MASKS[policy]):
            assert torch.equal(generate(), first)
        assert not torch.equal(first, uncached)
    assert state(pipe) == before
    assert torch.equal(generate(), uncached)
