from dataclasses import dataclass
from importlib import resources

import pytest
import torch

import diffusion_cache as dc
from diffusion_cache import reference, registry
from diffusion_cache.errors import ConfigError
from diffusion_cache.forecasters import Taylor
from diffusion_cache.plan import Plan
from diffusion_cache.policies import Interval
from diffusion_cache.profile import Profile
from diffusion_cache.schedule import Schedule
from diffusion_cache.systems import Parts, System

MODEL = "dit-digits"


@dataclass(frozen=True)
class EveryOther(System):
    """Computes every n-th step."""

    n: int = 2

    paper = "none"
    scopes = frozenset({"stack"})
    denoisers = frozenset({"transformer"})
    needs_profile = False

    def parts(self, profile):
        return Parts(Interval(every=self.n), Taylor(1), "stack", None)


@dataclass(frozen=True)
class FirstHalf(System):
    """Computes the first half of the steps."""

    paper = "none"
    scopes = frozenset({"denoiser", "stack"})

    def plan(self, profile):
        self.require(profile, "sensitivity")
        total = profile.total
        return Plan(
            name="first half",
            scope=profile.scope,
            depth=None,
            feature="auto",
            schedule=Schedule.uniform(step < total // 2 for step in range(total)),
            noise_levels=profile.noise_levels,
        )


@pytest.fixture(scope="module")
def pipe():
    return reference.load(MODEL)


@pytest.fixture(scope="module")
def profile():
    return Profile.load(resources.files("diffusion_cache.profiles") / f"{MODEL}-ddim")


def generate(pipe, steps=6):
    return pipe(**reference.inputs(MODEL, labels=[3], seeds=[0], steps=steps)).images


def test_a_system_without_a_profile(pipe):
    with dc.cached(pipe, method=EveryOther()):
        generate(pipe)
        assert [record.computed for record in dc.summary(pipe).records] == [True, False] * 3


def test_its_options_and_the_guards(pipe, monkeypatch):
    monkeypatch.setitem(registry.systems._classes, "every_other", EveryOther)
    with dc.cached(pipe, method="every_other", n=3, last=1):
        generate(pipe)
        computed = [record.computed for record in dc.summary(pipe).records]
    assert computed == [True, False, False, True, False, True]


def test_a_system_with_a_profile(pipe, profile):
    with dc.cached(pipe, method=FirstHalf(), profile=profile):
        generate(pipe, profile.total)
        computed = [record.computed for record in dc.summary(pipe).records]
    half = profile.total // 2
    assert computed == [True] * half + [False] * (profile.total - half)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "every_othr"}, "Unknown system 'every_othr'"),
        ({"method": FirstHalf()}, "plans from measurements"),
        ({"method": EveryOther(), "scope": "stack"}, "scope comes from the method"),
        ({"method": EveryOther(), "policy": "interval"}, "policy comes from the method"),
        ({"method": EveryOther(), "every": 3}, "Unknown option 'every' for system"),
        ({"method": EveryOther(), "profile": f"{MODEL}-ddim"}, "needs no profile"),
        ({"method": 3}, "must be a name or an instance"),
    ],
)
def test_bad_wishes_leave_the_pipeline_as_it_was(pipe, arguments, message):
    before = generate(pipe)
    with pytest.raises(ConfigError, match=message):
        dc.enable(pipe, **arguments)
    with pytest.raises(ConfigError, match="not enabled"):
        dc.summary(pipe)
    assert torch.equal(torch.as_tensor(generate(pipe)), torch.as_tensor(before))


def test_a_denoiser_of_another_kind():
    unet = reference.load("unet-digits")
    with pytest.raises(ConfigError, match="is for a transformer, and UNet2DConditionModel is a unet"):
        dc.enable(unet, method=EveryOther())


def test_an_array_that_a_profile_lacks(pipe, profile):
    arrays = {name: tensor for name, tensor in profile.arrays.items() if not name.startswith("sensitivity")}
    poorer = Profile(
        profile.fingerprint, "stack", None, profile.spans[:1], profile.passes, profile.row_passes, profile.samples,
        {name: tensor[:1] for name, tensor in arrays.items() if name.startswith("gram")},
    )  # fmt: skip
    with pytest.raises(ConfigError, match="reads sensitivity, which this profile does not have"):
        FirstHalf().made_for({"transformer": pipe.transformer}, poorer)


def test_a_profile_of_another_scope(pipe, profile):
    @dataclass(frozen=True)
    class OfBlocks(FirstHalf):
        scopes = frozenset({"block"})

    with pytest.raises(ConfigError, match="needs a profile at scope block, and this one is at scope"):
        dc.enable(pipe, method=OfBlocks(), profile=profile)
