import dataclasses
import json
import math
import shutil
from importlib import resources
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from evaluation_profile import plan, write_profile

from diffusion_cache import api, reference, registry
from diffusion_cache.context import Condition
from diffusion_cache.engine import session_of
from diffusion_cache.errors import ConfigError
from diffusion_cache.evaluation import contenders
from diffusion_cache.evaluation.contenders import (
    Adaptive,
    ByNorms,
    FewerSteps,
    Ours,
    Rival,
    Uncached,
    call_of,
    contender,
    expand,
    measured_norms,
    measured_profile,
)
from diffusion_cache.evaluation.prompts import FITTING_SEEDS, Sample
from diffusion_cache.evaluation.runner import Job
from diffusion_cache.evaluation.subjects import Shipped
from diffusion_cache.forecasters import Taylor
from diffusion_cache.planning.select import Seen, with_selector
from diffusion_cache.policies import Interval
from diffusion_cache.systems import Parts, System

TAYLOR = {"name": "taylor", "order": 1}
NODE = {
    "kind": "ours",
    "label": None,
    "policy": {"name": "interval", "every": 2},
    "forecaster": None,
    "guards": {"warmup": None, "last": 2},
    "scope": None,
    "depth": None,
}


def test_a_grid_is_every_combination():
    node = {**NODE, "grid": {"policy.every": [2, 3], "scope": [None, "block"]}}
    found = [(one["policy"]["every"], one["scope"]) for one in expand(node, "m")]
    assert found == [(2, None), (2, "block"), (3, None), (3, "block")]
    assert all("grid" not in one for one in expand(node, "m"))
    assert NODE["policy"]["every"] == 2  # the node itself is as it was


def test_points_are_choices_of_their_own():
    node = {**NODE, "points": [{"policy.every": 4}, {"policy.every": 5, "scope": "stack"}]}
    assert [(one["policy"]["every"], one["scope"]) for one in expand(node, "m")] == [(4, None), (5, "stack")]


def test_a_model_may_have_a_grid_of_its_own():
    node = {**NODE, "grid": {"policy.every": [2]}, "models": {"m": {"grid": {"policy.every": [7, 8]}}}}
    assert [one["policy"]["every"] for one in expand(node, "m")] == [7, 8]
    assert [one["policy"]["every"] for one in expand(node, "other")] == [2]


def test_ours_with_a_corrector():
    what = contender({**NODE, "corrector": {"name": "shrink", "strength": 0.5}}, TAYLOR, 20)
    common = {"forecaster": "taylor", "order": 1, "corrector": "shrink", "strength": 0.5}
    assert what.options == {"policy": "interval", "every": 2, "last": 2, **common}
    assert what.method == "interval, taylor, shrink"
    assert what.settings == {"every": 2, "last": 2, **common}
    for corrector, message in (
        ({"name": "shrnk"}, "Unknown corrector 'shrnk'"),
        ({"name": "shrink", "strngth": 1.0}, "shrink has no option 'strngth'"),
        ({"name": "shrink", "strength": "a"}, "strength must be a number"),
    ):
        with pytest.raises(ConfigError, match=message):
            contender({**NODE, "corrector": corrector}, TAYLOR, 20)


def test_a_job_gives_its_corrector_to_methods_that_have_none():
    config = {"method": {**NODE, "grid": {"policy.every": [2, 3]}}, "model": {"name": "m"}, "sampler": {"name": None}}
    without = Job(config, Path("nowhere")).nodes
    assert without == expand(config["method"], "m")
    assert Job({**config, "corrector": {"name": None}}, Path("nowhere")).nodes == without
    shrink, affine = {"name": "shrink", "strength": 0.5}, {"name": "affine"}
    found = Job({**config, "corrector": shrink}, Path("nowhere")).nodes
    assert found == [{"corrector": shrink, **node} for node in without]
    own = {**config, "method": {**NODE, "corrector": affine}, "corrector": shrink}
    assert [node["corrector"] for node in Job(own, Path("nowhere")).nodes] == [affine]


@pytest.mark.parametrize("key", ["policy.evry.x", "polcy.every", "scop"])
def test_a_grid_over_what_is_not_there(key):
    with pytest.raises(ConfigError, match="is not in the method"):
        expand({**NODE, "grid": {key: [1]}}, "m")


def test_a_grid_that_is_no_grid():
    with pytest.raises(ConfigError, match="must map keys to lists"):
        expand({**NODE, "grid": {"policy.every": 3}}, "m")


def test_ours_with_the_common_forecaster():
    what = contender(NODE, TAYLOR, 20)
    assert type(what) is Ours
    assert what.method == "interval, taylor"
    assert what.options == {"policy": "interval", "every": 2, "last": 2, "forecaster": "taylor", "order": 1}
    assert what.control == {**what.options, "max_reused": 0}  # the same, told to reuse nothing
    assert what.batchable
    assert what.uniform


def test_adaptive_methods_decide_on_the_samples_of_a_batch_apart():
    what = contender({**NODE, "policy": {"name": "first_block", "threshold": 0.1}}, TAYLOR, 20)
    assert type(what) is Adaptive
    assert what.batchable
    assert not what.uniform


def test_a_policy_is_left_out_where_it_serves_no_span():
    unet = Shipped("unet-digits")
    teacache, seacache = (
        contender({**NODE, "policy": {"name": name}}, TAYLOR, 20) for name in ("teacache", "seacache")
    )
    assert teacache.why_not(unet) == "it serves scope stack, and UNet2DConditionModel has cut"
    assert seacache.why_not(unet) is None  # at scope denoiser
    assert teacache.why_not(SimpleNamespace(denoisers={})) is None


@pytest.mark.parametrize(
    ("change", "arguments"),
    [
        ({}, {"policy": "interval", "every": 2, "last": 2}),
        ({"scope": "denoiser", "guards": {}}, {"policy": "interval", "every": 2, "scope": "denoiser"}),
        ({"forecaster": {"name": "taylor", "order": 2}}, {"policy": "interval", "every": 2, "last": 2, "order": 2}),
        ({"forecaster": {"name": "reuse"}}, {"policy": "interval", "every": 2, "last": 2, "forecaster": "reuse"}),
        (
            {"policy": {"name": "spaced", "share": 1 / 3, "exponent": 2.0}},
            {"policy": "spaced", "share": 1 / 3, "exponent": 2.0, "last": 2},
        ),
        (
            {"policy": {"name": "first_block", "threshold": 0.1}},
            {"policy": "first_block", "last": 2, "target_reuse": 0.47},
        ),
        (
            {"policy": None, "profile": None, "system": {"name": "deepcache", "every": 2, "spacing": "uniform"}},
            {"method": "deepcache", "every": 2, "last": 2},
        ),
        ({"policy": None, "profile": None, "system": {"name": "dpcache", "nfe": 4}}, None),  # plans from a profile
        ({"policy": {"name": "magcache", "threshold": 0.1}, "profile": "a-profile"}, None),
        ({"policy": None, "share": 0.5, "profile": "a-profile", "digest": "0"}, None),
        ({"policy": {"name": "no_longer_there"}}, None),
        ({"kind": "rival", "peer": "deepcache", "settings": {}}, None),
    ],
)
def test_the_call_that_does_the_same_with_no_profile(change, arguments):
    node = {**NODE, "forecaster": TAYLOR, **change}
    call = call_of({key: value for key, value in node.items() if key != "policy" or value is not None}, 8)
    assert (call and call.reusing(0.466)) == arguments
    if call is not None:
        assert call.tuned == ("threshold" if "target_reuse" in arguments else None)


def test_baselines():
    assert type(contender({"kind": "baseline", "label": "uncached", "steps_ratio": 1}, TAYLOR, 20)) is Uncached
    fewer = contender({"kind": "baseline", "label": None, "steps_ratio": 1 / 3}, TAYLOR, 50)
    assert type(fewer) is FewerSteps
    assert fewer.steps(50) == 17
    assert fewer.settings == {"steps": 17}
    assert fewer.method == "fewer steps"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"policy": {"name": "intervl"}}, "Did you mean 'interval'"),
        ({"policy": {"name": "interval", "evry": 2}}, "Did you mean 'every'"),
        ({"policy": {"name": "interval", "every": "two"}}, "whole number"),
        ({"policy": {"name": "interval", "every": 0}}, "at least 1"),
        ({"forecaster": {"name": "tailor"}}, "Did you mean 'taylor'"),
        ({"guards": {"warmup": 0}}, "warmup must be at least 1"),
    ],
)
def test_bad_settings_are_told(change, message):
    with pytest.raises(ConfigError, match=message):
        contender({**NODE, **change}, TAYLOR, 20)


@pytest.mark.parametrize("ratio", [0, 1.5, "half"])
def test_a_share_of_steps_must_be_one(ratio):
    with pytest.raises(ConfigError, match="above 0 and at most 1"):
        contender({"kind": "baseline", "label": None, "steps_ratio": ratio}, TAYLOR, 20)


def test_rivals_keep_their_settings():
    node = {"kind": "rival", "label": None, "peer": "deepcache", "settings": {"interval": 5}}
    what = contender(node, TAYLOR, 20)
    assert type(what) is Rival
    assert (what.kind, what.method, what.settings) == ("rival", "deepcache", {"interval": 5})


# plans

PLANNED = {"kind": "ours", "label": "plan", "profile": None, "sampler": None, "share": 0.5}


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A folder with a profile of dit-digits with its first sampler, six steps."""
    folder = tmp_path_factory.mktemp("stored") / "profile"
    write_profile(folder)
    return folder


@pytest.fixture
def shipped(stored, tmp_path, monkeypatch):
    """The folder that shipped profiles are looked for in."""
    found = resources.files
    monkeypatch.setattr(resources, "files", lambda name: tmp_path if name.endswith(".profiles") else found(name))
    shutil.copytree(stored, tmp_path / "dit-digits-ddim")
    return tmp_path


def planned(node, steps=6, model="dit-digits"):
    return [contender(one, TAYLOR, steps) for one in expand(node, model)]


def test_plans_for_shares_of_the_steps(stored):
    found = planned({**PLANNED, "profile": str(stored), "grid": {"share": [0.5, 1 / 3, 0.25, 0.2]}})
    assert [type(what) for what in found] == [Ours] * 4
    assert [what.settings for what in found] == [
        {"nfe": 3, "plan": "three"},
        {"nfe": 2, "plan": "two"},
        {"nfe": 1, "plan": "one"},  # 1.5 and 1.2, rounded down
        {"nfe": 1, "plan": "one"},
    ]
    assert {(what.kind, what.method, what.scope, what.batchable) for what in found} == {("ours", "plan", "stack", True)}


def test_a_share_that_is_a_whole_number_of_steps_but_for_rounding(tmp_path):
    write_profile(tmp_path, plans=(plan("two", 6, (0, 3)), plan("one", 6, (0,))))
    (what,) = planned({**PLANNED, "profile": str(tmp_path), "share": 1 / 3 - 1e-12})
    assert what.settings == {"nfe": 2, "plan": "two"}


def test_no_share_is_less_than_a_step(stored):
    (what,) = planned({**PLANNED, "profile": str(stored), "share": 0.01})
    assert what.settings == {"nfe": 1, "plan": "one"}


def test_a_plan_is_put_on_and_its_control_reuses_nothing(stored):
    (what,) = planned({**PLANNED, "profile": str(stored)})
    subject = SimpleNamespace(pipe=reference.load("dit-digits"))
    for applied, computed in ((what.applied, [0, 2, 4]), (what.never, list(range(6)))):
        with applied(subject, 6):
            subject.pipe(**reference.inputs("dit-digits", [3], [0], 6))
            records = session_of(subject.pipe).last_run.records
        assert [record.step for record in records if record.computed] == computed
    assert session_of(subject.pipe) is None


def test_a_plan_with_features_in_codes(stored):
    (what,) = planned({**PLANNED, "profile": str(stored), "cache_dtype": "int8"})
    assert what.settings == {"nfe": 3, "plan": "three", "cache_dtype": "int8"}
    subject = SimpleNamespace(pipe=reference.load("dit-digits"))
    for applied in (what.applied, what.never):
        with applied(subject, 6):
            assert session_of(subject.pipe).method.cache_dtype == "int8"


def test_with_other_steps_the_share_is_kept(stored):
    """As the plan will be resampled, which must not compute more than the share either."""
    for steps in (8, 10, 50, 100):
        for share in (0.5, 1 / 3, 0.25):
            (what,) = planned({**PLANNED, "profile": str(stored), "share": share}, steps)
            assert what.settings["nfe"] == int(steps * share + 1e-9)
            plan = next(plan for plan in what.options["profile"].plans if plan.name == what.settings["plan"])
            assert plan.resampled((0.0,) * steps).schedule.nfe <= what.settings["nfe"]


def test_the_shipped_profile_of_the_model_and_its_sampler(shipped):
    (first,) = expand(PLANNED, "dit-digits")
    assert first["profile"] == "dit-digits-ddim"
    assert "sampler" not in first
    (named,) = expand({**PLANNED, "sampler": "ddim"}, "dit-digits")
    assert named == first
    (shipped / "dit-digits-ddim").rename(shipped / "dit-digits-dpm++")
    (other,) = expand({**PLANNED, "sampler": "dpm++"}, "dit-digits")
    assert other["profile"] == "dit-digits-dpm++"
    assert contender(other, TAYLOR, 6).settings["plan"] == "three"
    shutil.copytree(shipped / "dit-digits-dpm++", shipped / "dit-digits-dpm++-router")
    (router,) = expand({**PLANNED, "sampler": "dpm++", "variant": "router"}, "dit-digits")
    assert router == {**other, "profile": "dit-digits-dpm++-router"}


def test_the_digest_tells_profiles_apart(stored, tmp_path):
    shutil.copytree(stored, tmp_path / "same")
    write_profile(tmp_path / "other", facts={"note": "made again"})
    names = [stored, tmp_path / "same", tmp_path / "other"]
    digests = [expand({**PLANNED, "profile": str(name)}, "dit-digits")[0]["digest"] for name in names]
    assert digests[0] == digests[1] != digests[2]
    assert digests[0] == json.loads((stored / "profile.json").read_text())["digest"]


def test_the_digest_tells_a_systems_profiles_apart(tmp_path):
    node = {"system": "meancache", "kind": "ours", "label": None, "profile": str(tmp_path)}
    digests = []
    for note in ("first", "second", "second"):
        write_profile(tmp_path, facts={"note": note})
        (found,) = expand(node, "dit-digits")
        digests.append(found["digest"])
    assert digests[0] != digests[1] == digests[2]
    assert "digest" not in expand({**node, "profile": None}, "dit-digits")[0]


def test_a_label_of_plans_says_so(stored):
    node = {**PLANNED, "profile": str(stored)}
    names = [planned({**node, "label": label})[0].method for label in (None, "my plans", "fitted")]
    assert names == ["plan", "my plans", "plan, fitted"]


@pytest.mark.parametrize(
    ("change", "model", "message"),
    [
        ({}, "dit-digits", r"there is no profile 'dit-digits-ddim'.*diffusion-cache profile.*diffusion-cache plan"),
        ({}, "some/model", r"no profile of some/model comes with the package: give a folder, method\.profile="),
        ({"profile": "/nowhere"}, "dit-digits", "there is no profile '/nowhere'"),
    ],
)
def test_a_missing_profile_is_told(tmp_path, monkeypatch, change, model, message):
    found = resources.files
    monkeypatch.setattr(resources, "files", lambda name: tmp_path if name.endswith(".profiles") else found(name))
    with pytest.raises(ConfigError, match=message):
        expand({**PLANNED, **change}, model)


@pytest.mark.parametrize("text", ["", "[]", '{"digest"', "{}"])
def test_a_damaged_profile_is_told(tmp_path, text):
    (tmp_path / "profile.json").write_text(text)
    with pytest.raises(ConfigError, match=r"profile\.json is not a profile's, or damaged"):
        expand({**PLANNED, "profile": str(tmp_path)}, "dit-digits")


def test_a_profile_that_changes_on_the_way_is_told(stored, tmp_path):
    folder = tmp_path / "profile"
    shutil.copytree(stored, folder)
    (node,) = expand({**PLANNED, "profile": str(folder)}, "dit-digits")
    write_profile(folder, facts={"note": "made again"})
    with pytest.raises(ConfigError, match="changed while it was evaluated"):
        contender(node, TAYLOR, 6)


def test_plans_that_there_are_not(tmp_path):
    write_profile(tmp_path / "dear", plans=(plan("three", 6, (0, 2, 4)),))
    with pytest.raises(ConfigError, match=r"no plan takes 2 denoiser evaluations or fewer; the cheapest, 'three'"):
        planned({**PLANNED, "profile": str(tmp_path / "dear"), "share": 1 / 3})
    write_profile(tmp_path / "none", plans=())
    with pytest.raises(ConfigError, match="holds no plans: make some with `diffusion-cache plan`"):
        planned({**PLANNED, "profile": str(tmp_path / "none")})


@pytest.mark.parametrize("share", [0, 1.5, "half", True, None])
def test_a_share_must_be_one(stored, share):
    with pytest.raises(ConfigError, match=r"method\.share must be above 0 and at most 1"):
        planned({**PLANNED, "profile": str(stored), "share": share})


def test_a_profile_is_read_once_for_all_its_plans(stored, monkeypatch):
    contenders._profile.cache_clear()
    read = []
    load = contenders.Profile.load
    monkeypatch.setattr(contenders.Profile, "load", lambda folder: read.append(folder) or load(folder))
    planned({**PLANNED, "profile": str(stored), "grid": {"share": [0.5, 1 / 3]}})
    assert read == [stored]


def test_a_policy_takes_what_it_can_from_a_profile(tmp_path):
    gram, ratios = torch.eye(6).expand(1, 1, 6, 6).contiguous(), [1.0, 0.9, 0.875, 1.0, 0.5, 1.0]
    arrays = {"gram_residual": gram, "gram_output": gram, "norm_ratio": torch.tensor([[[math.nan, *ratios[1:]]]])}
    write_profile(tmp_path, arrays=arrays)
    policy = {"name": "magcache", "threshold": 0.15, "max_skip": 4, "retention": 0.1}
    node = {**NODE, "policy": policy, "profile": str(tmp_path), "guards": {}}
    (one,) = expand({**node, "sampler": "DDIMScheduler"}, "dit-digits")
    what = contender(one, {"name": "reuse"}, 6)
    assert what.options["ratios"] == (pytest.approx(tuple(ratios)),)
    assert what.scope == "stack"
    assert what.settings == {"threshold": 0.15, "max_skip": 4, "retention": 0.1, "forecaster": "reuse"}
    subject = Shipped("dit-digits")
    with what.applied(subject, 6):
        subject.call([Sample(0, 3, 0)], 6)
        records = api.summary(subject.pipe).records
    # |1 − 0.9| is reused, and |1 − 0.9·0.875| more is not; the same again from step 2 on
    assert [record.computed for record in records] == [True, False, True, False, True, False]
    with pytest.raises(ConfigError, match="not of this model"):
        what.applied(Shipped("flux-digits"), 6)  # a profile of another model
    (other,) = expand({**node, "policy": {"name": "interval", "every": 2}}, "dit-digits")
    with pytest.raises(ConfigError, match=r"interval takes nothing from a profile: leave method\.profile out"):
        contender(other, TAYLOR, 6)


def test_norms_are_measured_first_on_samples_that_are_not_reported(monkeypatch):
    monkeypatch.setattr(contenders, "PROFILED", 2)
    node = {**NODE, "policy": {"name": "sencache", "threshold": 0.15}, "guards": {}, "norms": True}
    what = contender(node, {"name": "reuse"}, 3)
    assert (type(what), what.call) == (ByNorms, None)
    assert what.settings == {"threshold": 0.15, "forecaster": "reuse", "norms": "measured"}
    subject = Shipped("dit-digits")
    seeds, inputs = [], subject.inputs
    subject.inputs = lambda samples, steps: seeds.extend(s.seed for s in samples) or inputs(samples, steps)
    found = measured_norms(subject, 3)
    assert seeds == [FITTING_SEEDS, FITTING_SEEDS + 1]
    for _ in range(2):
        with what.applied(subject, 3):
            policy = session_of(subject.pipe).method.guarded.policy
            assert vars(policy) == {"threshold": 0.15, **vars(found)}
    assert len(seeds) == 2  # measured once
    assert type(contender({**node, "norms": False}, TAYLOR, 3)) is Adaptive
    subject.classes = False
    assert "takes prompts" in what.why_not(subject)


def test_a_rival_without_what_is_measured_of_the_sampler_is_left_out():
    """Rather than recorded as incorrect at each of its settings."""
    rival = {"kind": "rival", "peer": "diffusers_mag", "settings": {"threshold": 0.1, "ratios": []}}
    models = {"dit-digits/ddim": {"settings": {"ratios": [1.0, 0.9]}}}
    reasons = {}
    for sampler in ("ddim", "dpm++"):
        (node,) = expand({**rival, "models": models}, "dit-digits", sampler)
        reasons[sampler] = contender(node, {}, 2).why_not(Shipped("dit-digits", sampler))
    assert reasons["ddim"] is None
    assert reasons["dpm++"] == "no ratios for dit-digits/dpm++: give them as method.settings.ratios"


# published systems


@dataclasses.dataclass(frozen=True)
class EveryOther(System):
    """Computes every n-th step, at scope stack."""

    n: int = 2

    paper = "none"
    scopes = frozenset({"stack"})
    denoisers = frozenset({"transformer"})
    needs_profile = False

    def parts(self, profile):
        return Parts(Interval(every=self.n), Taylor(1), "stack", None)


@dataclasses.dataclass(frozen=True)
class OfBlocks(System):
    """Plans from a profile at scope block."""

    paper = "none"
    scopes = frozenset({"block"})


@pytest.fixture
def systems(monkeypatch):
    for name, cls in (("every_other", EveryOther), ("of_blocks", OfBlocks)):
        monkeypatch.setitem(registry.systems._classes, name, cls)
        monkeypatch.setattr(cls, "name", name)


def system_node(name, **system):
    node = {"kind": "ours", "label": None, "system": {"name": name, **system}, "guards": {"last": 1, "warmup": None}}
    return {**node, "profile": None, "profile_scope": None}


def test_a_published_system_is_a_contender(systems):
    subject = Shipped("dit-digits")
    what = contender(system_node("every_other", n=3), TAYLOR, 6)
    assert (what.kind, what.method, what.scope, what.settings) == ("ours", "every_other", "stack", {"n": 3, "last": 1})
    samples = [Sample(0, 3, 0)]
    with what.applied(subject, 6):
        subject.call(samples, 6)
        records = api.summary(subject.pipe).records
    assert [record.computed for record in records] == [True, False, False, True, False, True]
    with what.never(subject, 6):
        subject.call(samples, 6)
        assert api.summary(subject.pipe).reused == 0
    assert what.why_not(subject) is None
    assert "every_other is for a transformer" in what.why_not(Shipped("unet-digits"))


def test_an_option_of_a_system_can_be_a_share_of_the_steps():
    node = {**system_node("dpcache"), "of_steps": {"nfe": 1 / 3}}
    assert [contender(node, TAYLOR, steps).system.nfe for steps in (50, 40, 6, 2)] == [16, 13, 2, 1]
    for wrong in (0, 1.5, "half"):
        with pytest.raises(ConfigError, match=r"method\.of_steps\.nfe must be above 0 and at most 1"):
            contender({**node, "of_steps": {"nfe": wrong}}, TAYLOR, 50)


def test_a_system_that_looks_for_motion_is_for_videos():
    node = system_node("profiling_dit", full_steps=2)
    assert "needs a profile with a foreground mask" in contender(node, TAYLOR, 6).why_not(Shipped("dit-digits"))
    assert contender(node, TAYLOR, 6).why_not(Shipped("wan-moving-digits")) is None
    assert contender({**node, "profile": "mine"}, TAYLOR, 6).why_not(Shipped("dit-digits")) is None


def test_selection_takes_the_shipped_profile_that_has_learned_to_choose(shipped, systems):
    node = {**system_node("select"), "variant": "select", "sampler": None, "of_steps": {"nfe": 0.5}}
    (without,) = expand(node, "dit-digits")
    reason = contender(without, TAYLOR, 6).why_not(SimpleNamespace(name="dit-digits", sampler="ddim"))
    assert reason.startswith("no profile that has learned to choose by the prompt comes with the package for dit-dig")
    assert "`diffusion-cache select` makes one" in reason
    (elsewhere,) = expand(node, "some/model")
    assert "some/model with none" in contender(elsewhere, TAYLOR, 6).why_not(
        SimpleNamespace(name="some/model", sampler="none")
    )

    found = write_profile(shipped / "dit-digits-ddim-select")
    choices = [Condition("class_labels", torch.tensor([label])) for label in (3, 8)]
    seen = Seen(found.plans[1:], tuple(choices), np.array([[20.0, 30], [30, 20]]))
    with_selector(found, seen).save(shipped / "dit-digits-ddim-select")
    (node,) = expand(node, "dit-digits")
    assert node["profile"] == "dit-digits-ddim-select"
    what = contender(node, TAYLOR, 6)
    assert (what.settings, what.batchable) == ({"last": 1, "nfe": 3}, False)
    subject = Shipped("dit-digits")
    assert what.why_not(subject) is None
    for digit, steps in ((3, [0, 5]), (8, [0, 3, 5])):
        with what.applied(subject, 6):
            subject.call([Sample(0, digit, 0)], 6)
            records = api.summary(subject.pipe).records
        assert [record.step for record in records if record.computed] == steps
    assert contender(system_node("every_other"), TAYLOR, 6).batchable


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (system_node("every_othr"), "Unknown system 'every_othr'"),
        (system_node("every_other", m=3), "every_other has no option 'm'"),
        (system_node("every_other", n="three"), "n must be a whole number"),
        ({**system_node("of_blocks"), "profile_scope": "stack"}, "needs a profile at scope block, not 'stack'"),
    ],
)
def test_systems_that_cannot_be(systems, node, message):
    with pytest.raises(ConfigError, match=message):
        contender(node, TAYLOR, 6)


def test_a_profile_is_measured_where_none_is_given():
    subject = Shipped("dit-digits")
    profile = measured_profile(subject, 3, "denoiser")
    assert (profile.total, profile.scope, len(profile.samples)) == (3, "denoiser", 16)
    assert min(seed for _, seed in profile.samples) >= FITTING_SEEDS
    assert measured_profile(subject, 3, "denoiser") is profile
    subject.classes = False
    with pytest.raises(ConfigError, match="needs a profile at scope stack: give its folder"):
        measured_profile(subject, 3, "stack")
