"""Policies and forecasters from outside the package: registered by name, they work like its own."""

import warnings
from dataclasses import FrozenInstanceError, dataclass
from importlib import import_module

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import diffusion_cache as dc
from diffusion_cache import reference, registry
from diffusion_cache.context import SCOPES, Forecaster, Needs, Policy, Verdict
from diffusion_cache.schedule import Schedule

DIT, FLUX, WAN = "dit-digits", "flux-digits", "wan-moving-digits"
STEPS = 8

pytestmark = pytest.mark.filterwarnings("error::diffusion_cache.errors.DiffusionCacheWarning")


@pytest.fixture(autouse=True)
def registered():
    """Registers classes by name; afterwards the registries are as they were."""
    before = registry.policies.names(), registry.forecasters.names()
    added = []

    def register(**classes):
        for name, cls in classes.items():
            kind = registry.policies if issubclass(cls, Policy) else registry.forecasters
            kind.register(name)(cls)
            added.append((kind, name))

    yield register
    for kind, name in added:
        kind.unregister(name)
    assert (registry.policies.names(), registry.forecasters.names()) == before


@dataclass(frozen=True)
class Powers(Policy):
    """Compute step 0 and the powers of a base (the example of CONTRIBUTING.md)."""

    base: int = 2

    scopes = frozenset(SCOPES)

    def __post_init__(self):
        if self.base < 2:
            raise dc.ConfigError(f"powers: base must be at least 2, not {self.base}")

    def decide(self, step, value, state):
        index = step.index
        while index > 1 and index % self.base == 0:
            index //= self.base
        return Verdict(index <= 1, "power")


@dataclass(frozen=True)
class PerPass(Policy):
    """A schedule of its own: the second pass is computed half as often as the first, and spans differ."""

    scopes = frozenset({"stack", "denoiser"})

    def schedule(self, total):
        return Schedule(tuple(((i % 2 == 0,), (i % 4 == 0,)) for i in range(total)))

    def decide(self, step, value, state):
        raise AssertionError("a policy with a schedule is not asked")


@dataclass(frozen=True)
class PerSpan(Policy):
    """The first span is computed at even steps, the others at every fourth."""

    spans: int

    scopes = frozenset(SCOPES)

    def schedule(self, total):
        return Schedule(tuple(((i % 2 == 0, *[i % 4 == 0] * (self.spans - 1)),) for i in range(total)))

    def decide(self, step, value, state):
        raise AssertionError("a policy with a schedule is not asked")


@dataclass(frozen=True)
class Norm(Policy):
    """Adaptive: compute when the norm of the probe's residual has changed by a factor."""

    factor: float = 1.2

    scopes = frozenset({"stack"})

    @property
    def needs(self):
        return Needs(signals=("probe_residual",), probe=2)

    def measure(self, signals, past):
        now, then = signals["probe_residual"], past.computed["probe_residual"]
        return now.flatten(1).norm(dim=1) / then.flatten(1).norm(dim=1)

    def decide(self, step, value, state):
        return Verdict(value is None or not 1 / self.factor <= value <= self.factor, "norm")


@dataclass(frozen=True)
class Mean(Forecaster):
    """The mean of the last features, each weighed by a power of `decay`."""

    count: int = 2
    decay: float = 1.0
    feature: str = "auto"

    @property
    def history(self):
        return self.count

    @property
    def exact_degree(self):
        return 0

    def weights(self, query):
        powers = [self.decay**i for i in reversed(range(len(query.nodes)))]
        return tuple(power / sum(powers) for power in powers)


def generate(name, pipe, **extra):
    return reference.images(name, pipe(**reference.inputs(name, (3,), (5,), steps=STEPS) | extra))


def computed(summary, key=None):
    return "".join(str(int(r.computed)) for r in summary.records if key in (None, r.pass_name))


class Calls(nn.Module):
    """Returns how often it was called, so that weights can be read off its output."""

    count = 0

    def forward(self, x, timestep):
        self.count += 1
        return x * 0 + float(self.count)


def read(steps, *args, **kwargs):
    model = Calls()
    with dc.run(model, *args, num_steps=steps, **kwargs) as run:
        found = []
        for step in range(steps):
            run.next_step()
            found.append(model(torch.ones(1), step).item())
    return found, run


# they work


def test_a_policy_by_name(registered):
    registered(powers=Powers)
    assert "powers" in registry.policies.names()
    assert registry.policies.options("powers") == {"base": 2}
    assert Powers().name == "powers"
    pipe = reference.load(WAN)
    with dc.cached(pipe, "powers", "reuse"):
        by_name = generate(WAN, pipe)
        assert computed(dc.summary(pipe), "cond") == computed(dc.summary(pipe), "uncond") == "11101000"
        assert "powers(base=2) + reuse" in dc.summary(pipe).method
    with dc.cached(pipe, "mask", "reuse", mask="11101000"):
        assert torch.equal(generate(WAN, pipe), by_name)
    with dc.cached(pipe, Powers(base=3), "reuse"):
        generate(WAN, pipe)
        assert computed(dc.summary(pipe), "cond") == "11010000"


ANOTHER_MODULE = """
from __future__ import annotations
from dataclasses import dataclass
from typing import TYPE_CHECKING
from diffusion_cache.context import SCOPES, Policy, Verdict
if TYPE_CHECKING:
    from collections.abc import Sequence

@dataclass(frozen=True)
class At(Policy):
    steps: Sequence[int] = (0,)
    scopes = frozenset(SCOPES)

    def decide(self, step, value, state):
        return Verdict(step.index in self.steps, "listed")
"""


def test_a_policy_of_a_module_with_postponed_annotations(registered, tmp_path, monkeypatch):
    (tmp_path / "policy_of_another_module.py").write_text(ANOTHER_MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    registered(at=import_module("policy_of_another_module").At)
    pipe = reference.load(DIT)
    try:
        dc.enable(pipe, "at", steps=(0, 1, 5))
        generate(DIT, pipe)
        assert computed(dc.summary(pipe)) == "11000100"
    finally:
        dc.disable(pipe)


def test_a_policy_as_an_instance_needs_no_registration():
    assert "powers" not in registry.policies.names()

    @dataclass(frozen=True)
    class Own(Powers):
        name = "own"

    pipe = reference.load(DIT)
    with dc.cached(pipe, Own(base=3)):
        generate(DIT, pipe)
        assert computed(dc.summary(pipe)) == "11010000"
        assert "own(base=3)" in dc.summary(pipe).method


def test_guards_wrap_a_policy_from_outside(registered):
    registered(powers=Powers)
    pipe = reference.load(DIT)
    with dc.cached(pipe, "powers", base=5, warmup=3, last=1, max_consecutive=2):
        generate(DIT, pipe)
        assert computed(dc.summary(pipe)) == "11100101"


def test_a_policy_with_a_schedule_of_its_own(registered):
    registered(per_pass=PerPass)
    pipe = reference.load(WAN)
    with dc.cached(pipe, "per_pass", "reuse"):
        generate(WAN, pipe)
        summary = dc.summary(pipe)
    assert computed(summary, "cond") == "10101010"
    assert computed(summary, "uncond") == "10001000"


@pytest.mark.parametrize(("scope", "spans"), [("stack", 2), ("block", 11)])
def test_a_policy_that_tells_spans_apart(registered, scope, spans):
    registered(per_span=PerSpan)
    pipe = reference.load(FLUX)
    first, second = pipe.transformer.transformer_blocks, pipe.transformer.single_transformer_blocks
    calls = dict.fromkeys([*first, *second], 0)

    def count(module, args):
        calls[module] += 1

    for block in calls:
        block.register_forward_pre_hook(count)
    with dc.cached(pipe, "per_span", spans=spans, scope=scope):
        generate(FLUX, pipe)
        summary = dc.summary(pipe)
    often = 3 if scope == "stack" else 1
    assert list(calls.values()) == [4] * often + [2] * (11 - often)
    assert computed(summary) == "10101010"
    assert [r.spans_reused for r in summary.records] == [0, spans, spans - 1, spans] * 2
    assert summary.hit_rate == pytest.approx(1 - (4 + 2 * (spans - 1)) / (8 * spans))


def test_an_adaptive_policy(registered):
    registered(norm=Norm)
    pipe = reference.load(DIT)
    calls = []
    pipe.transformer.transformer_blocks[1].register_forward_pre_hook(lambda module, args: calls.append("probe"))
    pipe.transformer.transformer_blocks[2].register_forward_pre_hook(lambda module, args: calls.append("span"))
    uncached = generate(DIT, pipe)
    calls.clear()
    with dc.cached(pipe, "norm", factor=1e9, granularity="batch"):
        generate(DIT, pipe)
        assert computed(dc.summary(pipe)) == "10000000"
        assert [r.reason for r in dc.summary(pipe).records] == ["warm-up"] + ["norm"] * 7
    assert (calls.count("probe"), calls.count("span")) == (8, 1)
    with dc.cached(pipe, "norm", factor=1.0):
        assert torch.equal(generate(DIT, pipe), uncached)
        assert computed(dc.summary(pipe)) == "1" * 8
    with pytest.raises(dc.ConfigError, match=r"'norm' does not serve scope 'block'.*it serves stack"):
        dc.enable(pipe, "norm", scope="block")


def test_a_forecaster_by_name(registered):
    registered(mean=Mean)
    assert "mean" in registry.forecasters.names()
    assert registry.forecasters.options("mean") == {"count": 2, "decay": 1.0, "feature": "auto"}
    found, _ = read(7, "mask", "mean", mask="1101001", count=3, decay=0.5)
    # the calls give 1, 2, 3, 4; weights of 1, 1/2, 1/4 from the newest back
    after_two, after_three = (2 + 0.5 * 1) / 1.5, (3 + 0.5 * 2 + 0.25 * 1) / 1.75
    assert found == pytest.approx([1, 2, after_two, 3, after_three, after_three, 4])


def test_a_forecasters_history_bounds_the_bytes(registered):
    registered(mean=Mean)
    pipe = reference.load(DIT)
    used = []
    for count in (1, 2, 4):
        with dc.cached(pipe, "interval", "mean", every=2, count=count):
            generate(DIT, pipe)
            used.append(dc.summary(pipe).cache_bytes)
    assert used == [used[0], 2 * used[0], 4 * used[0]]
    assert used[0] > 0
    assert dc.inspect(pipe, forecaster=Mean(count=3)).history == 3


def test_a_mean_of_one_is_reuse(registered):
    registered(mean=Mean)
    pipe = reference.load(DIT)
    with dc.cached(pipe, "interval", "reuse", every=3):
        expected = generate(DIT, pipe)
    with dc.cached(pipe, "interval", "mean", every=3, count=1):
        assert torch.equal(generate(DIT, pipe), expected)
    with dc.cached(pipe, "interval", "mean", every=3, count=2):
        assert not torch.equal(generate(DIT, pipe), expected)


def test_both_at_once_and_their_options_are_split(registered):
    registered(powers=Powers, mean=Mean)
    pipe = reference.load(DIT)
    session = dc.enable(
        pipe, "powers", "mean", base=3, count=4, decay=0.5, feature="output", warmup=2, max_reused=3, scope="block"
    )
    dc.disable(pipe)
    method = session.method
    assert method.guarded.policy == Powers(base=3)
    assert method.forecaster == Mean(count=4, decay=0.5, feature="output")
    assert (method.guarded.guards.warmup, method.guarded.guards.max_reused) == (2, 3)
    assert method.scope == "block"
    with pytest.raises(FrozenInstanceError):
        method.forecaster.count = 5


def test_listed_on_the_command_line(registered):
    from diffusion_cache.cli import app

    registered(powers=Powers, mean=Mean)
    policies = CliRunner().invoke(app, ["list", "policies"])
    forecasters = CliRunner().invoke(app, ["list", "forecasters"])
    assert (policies.exit_code, forecasters.exit_code) == (0, 0)
    assert "powers" in policies.output
    assert "base=2" in policies.output
    assert "mean" in forecasters.output
    assert "decay=1.0" in forecasters.output


# errors


def test_errors_of_methods_from_outside(registered):
    registered(powers=Powers, mean=Mean)
    pipe = reference.load(DIT)
    for options, message in [
        (dict(policy="power"), "Unknown policy 'power'. Did you mean 'powers'?"),
        (dict(policy="powers", base=1), "powers: base must be at least 2, not 1"),
        (dict(policy="powers", bas=3), "Unknown option 'bas' for policy 'powers'.*Did you mean 'base'?"),
        (dict(policy="powers", forecaster="meen"), "Unknown forecaster 'meen'. Did you mean 'mean'?"),
        (dict(policy="powers", forecaster="mean", dcay=1), "Unknown option 'dcay'.*'mean'. Did you mean 'decay'?"),
        (dict(policy="powers", forecaster="mean", feature="x"), "mean: feature must be one of auto"),
    ]:
        with pytest.raises(dc.ConfigError, match=message.replace("?", r"\?")):
            dc.enable(pipe, **options)
    uncached = generate(DIT, pipe)
    dc.enable(pipe, "powers")
    assert not torch.equal(generate(DIT, pipe), uncached)
    dc.disable(pipe)


def test_an_option_without_a_default(registered):
    registered(per_span=PerSpan)
    with pytest.raises(dc.ConfigError, match=r"policy 'per_span' needs the option 'spans'"):
        dc.enable(reference.load(FLUX), "per_span")


def test_unregistered_names_are_unknown(registered):
    registered(powers=Powers)
    registry.policies.unregister("powers")
    pipe = reference.load(DIT)
    with pytest.raises(dc.ConfigError, match="Unknown policy 'powers'"):
        dc.enable(pipe, "powers")
    dc.enable(pipe, Powers(base=2))  # an instance is its own definition
    dc.disable(pipe)


@dataclass
class Unfrozen:
    name = "unfrozen"


class Plain:
    name = "plain"


@pytest.mark.parametrize("cls", [Unfrozen, Plain])
@pytest.mark.parametrize("kind", [registry.policies, registry.forecasters])
def test_only_frozen_dataclasses_can_be_registered(cls, kind):
    with pytest.raises(dc.ConfigError, match=f"{cls.__name__} must be a frozen dataclass"):
        kind.register("other")(cls)
    assert "other" not in kind.names()


@pytest.mark.parametrize(("kind", "name"), [(registry.policies, "interval"), (registry.forecasters, "taylor")])
def test_names_of_the_package_cannot_be_taken(kind, name):
    own = kind.get(name)
    with pytest.raises(dc.ConfigError, match=f"'{name}' is already registered by {own.__name__}"):
        kind.register(name)(Powers)
    assert kind.get(name) is own


def test_a_policy_that_lacks_its_decision(registered):
    @dataclass(frozen=True)
    class Undecided(Policy):
        scopes = frozenset(SCOPES)

    registered(undecided=Undecided)
    with pytest.raises(dc.ConfigError, match=r"undecided.*decide"):
        dc.enable(reference.load(DIT), "undecided")


def test_a_forecaster_that_lacks_its_weights(registered):
    @dataclass(frozen=True)
    class Weightless(Forecaster):
        feature: str = "auto"
        history = 1
        exact_degree = 0

    registered(weightless=Weightless)
    with pytest.raises(dc.ConfigError, match=r"weightless.*weights"):
        dc.enable(reference.load(DIT), "interval", "weightless")


@dataclass(frozen=True)
class NoPolicy:
    """A frozen dataclass, but no policy."""

    every: int = 2


def test_a_class_that_is_no_policy():
    registry.policies.register("no_policy")(NoPolicy)
    try:
        with pytest.raises(dc.ConfigError, match="no_policy"):
            dc.enable(reference.load(DIT), "no_policy")
    finally:
        registry.policies.unregister("no_policy")


def test_a_policy_that_names_no_scopes(registered):
    @dataclass(frozen=True)
    class Scopeless(Policy):
        def decide(self, step, value, state):
            return Verdict(True, "")

    registered(scopeless=Scopeless)
    with pytest.raises(dc.ConfigError, match="scope"):
        dc.enable(reference.load(DIT), "scopeless")


def test_a_policy_that_needs_an_unknown_signal(registered):
    @dataclass(frozen=True)
    class Curious(Policy):
        scopes = frozenset(SCOPES)

        @property
        def needs(self):
            return Needs(signals=("no_such_signal",))

        def measure(self, signals, past):
            return signals["no_such_signal"]

        def decide(self, step, value, state):
            return Verdict(value is None, "")

    registered(curious=Curious)
    with pytest.raises(dc.ConfigError, match="no_such_signal"):
        dc.enable(reference.load(DIT), "curious")


class NoDataclass(Policy):
    name = "no_dataclass"
    scopes = frozenset(SCOPES)

    def decide(self, step, value, state):
        return Verdict(step.index % 2 == 0, "even")


def test_an_instance_that_is_no_dataclass():
    with pytest.raises(dc.ConfigError, match="must be a frozen dataclass"):
        dc.enable(reference.load(DIT), NoDataclass())


@dataclass(frozen=True)
class Nameless(Powers):
    """Never registered, and without a name of its own."""


def test_an_instance_without_a_name():
    pipe = reference.load(DIT)
    with pytest.raises(dc.ConfigError, match="Unknown option 'bas' for policy 'Nameless'"):
        dc.enable(pipe, Nameless(base=3), bas=4)
    with dc.cached(pipe, Nameless(base=3)):
        generate(DIT, pipe)
        assert "Nameless(base=3)" in dc.summary(pipe).method


def failing(error):
    @dataclass(frozen=True)
    class Failing(Policy):
        scopes = frozenset(SCOPES)

        @property
        def needs(self):
            return Needs(signals=("probe_residual",), probe=1)

        def measure(self, signals, past):
            return signals["probe_residual"].flatten(1).mean(1)

        def decide(self, step, value, state):
            raise error

    return Failing


def test_a_policy_that_fails_is_computed_instead(registered):
    registered(failing=failing(ZeroDivisionError("float division by zero")))
    pipe = reference.load(DIT)
    uncached = generate(DIT, pipe)
    dc.enable(pipe, "failing")
    try:
        with pytest.warns(dc.DiffusionCacheWarning, match="ZeroDivisionError"):
            assert torch.equal(generate(DIT, pipe), uncached)
    finally:
        dc.disable(pipe)


def test_a_planned_policy_that_fails_is_computed_instead(registered):
    @dataclass(frozen=True)
    class FailingPlan(Policy):
        scopes = frozenset(SCOPES)

        def decide(self, step, value, state):
            raise ZeroDivisionError("float division by zero")

    registered(failing=FailingPlan)
    pipe = reference.load(DIT)
    uncached = generate(DIT, pipe)
    dc.enable(pipe, "failing")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert torch.equal(generate(DIT, pipe), uncached)
        messages = [str(w.message) for w in caught if w.category is dc.DiffusionCacheWarning]
        assert len(messages) == 1, messages
        assert "ZeroDivisionError" in messages[0]
        assert computed(dc.summary(pipe)) == "1" * STEPS
    finally:
        dc.disable(pipe)


@dataclass(frozen=True)
class Short(Powers):
    """A schedule for three steps, whatever the run's."""

    def schedule(self, total):
        return Schedule.uniform([True, False, False])


def test_a_schedule_that_is_too_short_computes_the_rest(registered):
    registered(short=Short)
    pipe = reference.load(DIT)
    with dc.cached(pipe, "short"):
        generate(DIT, pipe)
        assert computed(dc.summary(pipe)) == "10011111"


def test_a_schedule_for_another_number_of_spans(registered):
    registered(per_span=PerSpan)
    pipe = reference.load(FLUX)
    uncached = generate(FLUX, pipe)
    with dc.cached(pipe, "per_span", spans=3, scope="block"), pytest.warns(dc.DiffusionCacheWarning, match="schedule"):
        assert torch.equal(generate(FLUX, pipe), uncached)
