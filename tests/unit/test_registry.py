"""Names to classes: registration from inside, outside and entry points."""

import dataclasses
import inspect
import re
import sys
import types
from dataclasses import dataclass

import pytest

import diffusion_cache as dc
from diffusion_cache import policies, registry
from diffusion_cache.context import SCOPES, Policy, Step, Verdict
from diffusion_cache.errors import ConfigError, DiffusionCacheError, DiffusionCacheWarning
from diffusion_cache.registry import Registry, suggest


@dataclass(frozen=True)
class Plain:
    rate: float
    size: int = 3


@dataclass(frozen=True)
class Other:
    pass


class EntryPoint:
    """What importlib.metadata.entry_points returns, as far as the registry reads it."""

    def __init__(self, name, result):
        self.name, self.result = name, result

    def load(self):
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


@pytest.fixture
def methods(monkeypatch):
    """A registry whose home is an empty package."""
    monkeypatch.setitem(sys.modules, "methods_home", types.ModuleType("methods_home"))
    return Registry("method", "methods_home")


@pytest.fixture
def entry_points(monkeypatch):
    """Sets the installed entry points; the list returned collects the groups that were asked for."""
    installed, asked = [], []

    def fake(group):
        asked.append(group)
        return [EntryPoint(name, result) for name, result in installed]

    monkeypatch.setattr(registry, "entry_points", fake)
    return installed, asked


def test_register_and_get(methods):
    assert methods.register("plain")(Plain) is Plain
    assert methods.get("plain") is Plain
    assert Plain.name == "plain"
    assert methods.names() == ["plain"]
    methods.register("plain")(Plain)  # once more with the same class: a module that is reloaded
    methods.register("another")(Other)
    assert methods.names() == ["another", "plain"]


def test_options_are_the_fields_and_their_defaults(methods):
    methods.register("plain")(Plain)
    assert methods.options("plain") == {"rate": dataclasses.MISSING, "size": 3}


def test_unknown_name_suggests_the_nearest(methods):
    methods.register("interval")(Plain)
    methods.register("first_block")(Other)
    with pytest.raises(ConfigError, match=r"Unknown method 'intervall'\. Did you mean 'interval'\?"):
        methods.get("intervall")
    with pytest.raises(ConfigError, match=r"Unknown method 'zzz'\. Known: first_block, interval\."):
        methods.get("zzz")
    with pytest.raises(ConfigError, match="Unknown method 'intervl'"):
        methods.options("intervl")
    assert suggest("x", []) == "Known: none."
    assert issubclass(ConfigError, DiffusionCacheError)
    assert issubclass(ConfigError, ValueError)


def test_taken_name_is_refused_and_nothing_changes(methods):
    methods.register("plain")(Plain)
    with pytest.raises(ConfigError, match=r"'plain' is already registered by Plain"):
        methods.register("plain")(Other)
    assert methods.get("plain") is Plain


@dataclass
class Mutable:
    size: int = 1


class NoDataclass:
    pass


@pytest.mark.parametrize("cls", [Mutable, NoDataclass])
def test_only_frozen_dataclasses(methods, cls):
    with pytest.raises(ConfigError, match=f"{cls.__name__} must be a frozen dataclass"):
        methods.register("bad")(cls)
    assert methods.names() == []


def test_unregister(methods):
    methods.register("plain")(Plain)
    methods.unregister("plain")
    methods.unregister("plain")
    with pytest.raises(ConfigError, match="Unknown method"):
        methods.get("plain")


def test_entry_points_are_loaded_once_and_only_when_needed(methods, entry_points):
    installed, asked = entry_points
    installed.append(("external", Plain))
    methods.register("own")(Other)
    assert methods.get("own") is Other
    assert asked == []
    assert methods.get("external") is Plain
    assert methods.names() == ["external", "own"]
    assert asked == ["methods_home"]


def test_groups_of_the_registries(entry_points, monkeypatch):
    _, asked = entry_points
    for found in (registry.policies, registry.forecasters, registry.correctors):
        monkeypatch.setattr(found, "_loaded", False)
        found.names()
    assert asked == ["diffusion_cache.policies", "diffusion_cache.forecasters", "diffusion_cache.correctors"]


def test_entry_point_cannot_replace_another_method(methods, entry_points):
    entry_points[0].append(("plain", Other))
    methods.register("plain")(Plain)
    with pytest.warns(DiffusionCacheWarning, match="'plain' is already registered by Plain"):
        assert methods.names() == ["plain"]
    assert methods.get("plain") is Plain


def test_failing_entry_point_is_told_and_hides_no_other(methods, entry_points):
    entry_points[0].extend([("broken", ImportError("no module")), ("healthy", Plain)])
    message = r"^method of another package cannot be loaded: 'broken' \(ImportError: no module\)$"
    with pytest.warns(DiffusionCacheWarning, match=message) as caught:
        assert methods.get("healthy") is Plain
    assert methods.names() == ["healthy"]
    assert len(caught) == 1


def test_home_is_imported_only_when_a_name_is_not_known_yet(tmp_path, monkeypatch):
    (tmp_path / "lazy_home.py").write_text("loaded = True")
    monkeypatch.syspath_prepend(tmp_path)
    lazy = Registry("method", "lazy_home")
    lazy.register("plain")(Plain)
    assert lazy.get("plain") is Plain
    assert "lazy_home" not in sys.modules
    assert lazy.names() == ["plain"]
    assert sys.modules.pop("lazy_home").loaded


def test_policy_of_another_package():
    @registry.policies.register("only_even")
    @dataclass(frozen=True)
    class OnlyEven(Policy):
        offset: int = 0
        scopes = frozenset(SCOPES)

        def decide(self, step, signals, state):
            return Verdict((step.index + self.offset) % 2 == 0, "even")

    try:
        policy = registry.policies.get("only_even")(offset=0)
        schedule = policies.Guarded(policy).schedule(5)
        assert [schedule.row(i, 0) for i in range(5)] == [(True,), (False,), (True,), (False,), (True,)]
        assert policy.decide(Step(3, 5, 3, None, "", ()), {}, None) == Verdict(False, "even")
        assert "only_even" in registry.policies.names()
    finally:
        registry.policies.unregister("only_even")


def test_built_in_methods():
    import diffusion_cache.forecasters  # noqa: F401

    assert {"first_block", "interval", "mask"} <= set(registry.policies.names())
    assert {"reuse", "taylor", "taylor_paper"} <= set(registry.forecasters.names())
    for found in (registry.policies, registry.forecasters, registry.correctors):
        assert all(found.get(name).name == name for name in found.names())


def test_a_published_system_is_pointed_to_where_it_can_be_asked_for():
    with pytest.raises(ConfigError, match=r"for pipelines: enable\(pipe, method='fora'\)\.$"):
        registry.policies.get("fora")
    with pytest.raises(ConfigError, match=r"Give forecaster='taylor' instead\.$"):
        registry.policies.get("taylorseer")


@pytest.mark.parametrize(
    ("name", "closing"),
    [
        ("TeaCache", "Did you mean 'teacache'?"),
        ("PAB", "Did you mean 'pab'?"),
        ("first-block", "Did you mean 'first_block'?"),
        ("Taylor", "Give forecaster='taylor' instead."),
        ("DeepCache", "enable(pipe, method='deepcache')."),
        ("smoothcache", "enable(pipe, method='smooth_cache')."),
        ("FirstBlockCache", "Give policy='first_block' with forecaster='reuse' instead."),
        ("sea", "Give policy='seacache' instead."),
        ("SCM", "Give policy='mask' with mask=… instead."),
        ("steps_mask", "Give policy='mask' with mask=… instead."),
        ("AdaCache", "It is not here; the nearest is policy='first_block'."),
        ("FasterCache", "and unconditional_every=… for its guidance part."),
    ],
)
def test_names_of_other_projects(name, closing):
    with pytest.raises(ConfigError) as error:
        registry.policies.get(name)
    assert str(error.value).startswith(f"Unknown policy {name!r}. ")
    assert str(error.value).endswith(closing)


def test_a_name_of_its_own_kind_is_a_misspelling():
    with pytest.raises(ConfigError, match=r"Unknown system 'DeepCache'\. Did you mean 'deepcache'\?"):
        registry.systems.get("DeepCache")
    with pytest.raises(ConfigError, match=r"Unknown system 'PAB'\. Give policy='pab' instead\."):
        registry.systems.get("PAB")


METHODS = {"policy": registry.policies, "forecaster": registry.forecasters}


def options_of_all():
    """Options of methods and guards, and arguments of `enable`."""
    found = {field.name for field in dataclasses.fields(policies.Guards)} | set(inspect.signature(dc.enable).parameters)
    for methods in (*METHODS.values(), registry.correctors, registry.systems):
        for name in methods.names():
            found |= set(methods.options(name))
    return found


@pytest.mark.parametrize("advice", [*registry.ALIASES.values(), *registry.NEAREST.values()])
def test_what_names_of_other_projects_point_to_is_there(advice):
    given = re.findall(r"(\w+)='([^']+)'", advice)
    assert given
    for keyword, name in given:
        if keyword in METHODS:
            assert name in METHODS[keyword].names()
        elif keyword == "scope":
            assert name in SCOPES
        elif keyword == "profile":
            assert any(f"published/{entry}".startswith(name[:-1]) for entry in dc.published.names())
    own = [set(METHODS[keyword].options(name)) for keyword, name in given if keyword in METHODS]
    guards = {field.name for field in dataclasses.fields(policies.Guards)}
    assert set(re.findall(r"(\w+)=…", advice)) <= guards.union(*own)


def test_what_options_of_other_projects_point_to_is_there():
    known = options_of_all()
    assert set(registry.OPTION_ALIASES.values()) <= known
    for note in registry.OPTION_NOTES.values():
        assert set(re.findall(r"(\w+)=", note)) <= known | {"num_steps"}
    assert not known & {*registry.OPTION_ALIASES, *registry.OPTION_NOTES}
    assert not set(registry.OPTION_ALIASES) & set(registry.OPTION_NOTES)


def test_the_options_of_other_projects_are_theirs():
    """Of those that are installed."""
    theirs = set()
    for path, names in {
        "diffusers": ("FirstBlockCacheConfig", "TaylorSeerCacheConfig", "MagCacheConfig", "FasterCacheConfig"),
        "diffusers.hooks": ("PyramidAttentionBroadcastConfig", "SeaCacheConfig"),
        "cache_dit": ("DBCacheConfig", "TaylorSeerCalibratorConfig"),
    }.items():
        module = pytest.importorskip(path)
        theirs |= {field.name for name in names for field in dataclasses.fields(getattr(module, name))}
    others = {
        *("cache_interval", "cache_branch_id"),  # DeepCache's helper
        *("rel_l1_thresh", "skip_interval", "warmup_steps"),  # TeaCache's code and others'
        *("n_derivatives", "skip_interval_steps", "cache_config", "calibrator_config"),  # cache-dit's functions
    }
    assert {*registry.OPTION_ALIASES, *registry.OPTION_NOTES} <= theirs | others


def test_options_of_other_projects():
    assert registry.suggest_option("residual_diff_threshold", ["threshold", "warmup"]) == "Here that is 'threshold'."
    told = registry.suggest_option("cache_interval", ["threshold"])
    assert told.startswith("Here that is 'every', of policy='centered', policy='interval', ")
    assert told.endswith("method='deepcache', method='fora'.")
    assert registry.suggest_option("enable_separate_cfg", []).endswith("leave it out.")
    assert registry.suggest_option("evry", ["every"]) == "Did you mean 'every'?"


def test_no_option_has_the_name_of_another_argument():
    """They are all keywords of one call, and a guard or an argument of `enable` and `run` would take it."""
    taken = {field.name for field in dataclasses.fields(policies.Guards)}
    for door in (dc.enable, dc.run):
        taken |= set(inspect.signature(door).parameters)
    for found in (registry.policies, registry.forecasters, registry.correctors):
        for name in found.names():
            assert not taken & set(found.options(name)), name


def test_forecasters_share_no_option_with_policies_or_correctors():
    """The policy would take it. (A corrector may share options with the policy, and is given them as well.)"""
    own = {option for name in registry.forecasters.names() for option in registry.forecasters.options(name)}
    for found in (registry.policies, registry.correctors):
        for name in found.names():
            assert not own & set(found.options(name)), name
