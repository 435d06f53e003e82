"""A failure inside the cache gives the uncached output with a warning, and the next generation is as any."""

import pytest
import torch
from accidents import warned
from cases import REUSING, Subject

import diffusion_cache as dc
from diffusion_cache import history, ops, registry

# warnings of policies that look at forecasts as well, which fails apart from reusing them
TOLD = {("racer", "forecast"): 2, ("speca", "store"): 2}


@pytest.fixture(scope="module")
def subject():
    return Subject("flux-digits")


def no_room(*args, **kwargs):
    raise torch.OutOfMemoryError("no room")


each_policy = pytest.mark.parametrize("policy", registry.policies.names())


@pytest.fixture
def enabled(subject, policy):
    scopes = registry.policies.get(policy).scopes
    scope = "stack" if "stack" in scopes else min(scopes)
    with dc.cached(subject.pipe, policy, "taylor", scope=scope, **REUSING[policy]):
        yield subject


@each_policy
@pytest.mark.parametrize(("module", "name"), [(history, "store"), (ops, "forecast")])
def test_no_memory(enabled, policy, module, name, monkeypatch):
    cached = enabled.generate()
    with monkeypatch.context() as patch:
        patch.setattr(module, name, no_room)
        with warned(TOLD.get((policy, name), 1), "OutOfMemoryError: no room"):
            assert torch.equal(enabled.generate(), enabled.uncached)
    assert torch.equal(enabled.generate(), cached)


@each_policy
def test_values_that_are_not_finite(enabled, policy, monkeypatch):
    """Each span is told of."""
    cached, observe = enabled.generate(), history.History.observe

    def poisoned(self, *args):
        observe(self, *args)
        for feature in self.slots:
            for tensor in feature:
                tensor *= float("nan")

    with monkeypatch.context() as patch:
        patch.setattr(history.History, "observe", poisoned)
        with warned(dc.summary(enabled.pipe).spans, "not finite"):
            assert torch.equal(enabled.generate(), enabled.uncached)
    assert torch.equal(enabled.generate(), cached)
