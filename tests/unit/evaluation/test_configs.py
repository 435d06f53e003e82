"""The configuration files: every option of every group composes, and rivals' files name what rivals have."""

import dataclasses
import json
from importlib.resources import files
from pathlib import Path

import pytest
import yaml
from evaluation_profile import write_profile
from hydra import compose, initialize_config_module

from diffusion_cache import reference, registry
from diffusion_cache.cli import evaluate as command
from diffusion_cache.errors import ConfigError
from diffusion_cache.evaluation.contenders import DEFAULT_SCOPE, FewerSteps, Uncached, contender, expand
from diffusion_cache.evaluation.finalists import finalists
from diffusion_cache.evaluation.peers import peers
from diffusion_cache.evaluation.report import BUDGETS, TOLERANCE
from diffusion_cache.evaluation.runner import Job
from diffusion_cache.policies import Guarded

CONFIGS = files("diffusion_cache.configs")
GIVEN = {"scheduler": "DDIMScheduler", "random": "dit-xl-2", "file": "prompts.txt", "hub": "folder", "mask": "'10'"}
PARTS = ("online", "system")
MISSING = {"scheduler": "sampler.name", "random": "model.name", "file": "prompts.path", "hub": "model.repository"}


def options(group):
    return sorted(
        entry.name.removesuffix(".yaml") for entry in (CONFIGS / group).iterdir() if entry.name[-5:] == ".yaml"
    )


def methods():
    """Every file of the group, but those of rivals."""
    return [*options("method"), *(f"{part}/{name}" for part in PARTS for name in options(f"method/{part}"))]


def composed(*overrides):
    command.register_methods()
    with initialize_config_module(command.CONFIGS, version_base="1.3"):
        return command.resolved(compose("evaluate", list(overrides)))


@pytest.mark.parametrize("group", ["model", "sampler", "prompts", "metrics", "timing"])
def test_every_option_composes(group):
    found = options(group)
    assert found
    for name in found:
        more = [f"{MISSING[name]}={GIVEN[name]}"] if name in MISSING else []
        assert group in composed(f"{group}={name}", *more)


LAUNCHERS = {
    "basic": "hydra._internal.core_plugins.basic_launcher.BasicLauncher",
    "joblib": "hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher",
    "submitit": "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher",
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("config", ["evaluate", "profile", "fit_signal"])
def test_every_launcher_composes(config, launcher):
    pytest.importorskip(LAUNCHERS[launcher].rpartition(".")[0])
    assert sorted(LAUNCHERS) == options("launcher")
    command.register_methods()
    with initialize_config_module(command.CONFIGS, version_base="1.3"):
        found = compose(config, [f"launcher={launcher}"], return_hydra_config=True)
    assert found.hydra.launcher._target_ == LAUNCHERS[launcher]


@pytest.mark.parametrize("name", [*registry.policies.names(), *methods()])
def test_every_method_expands_into_contenders(name, tmp_path):
    required = {"mask": "method.policy.mask='10'", "magcache": "method.policy.ratios=[1.0, 0.9]"}
    more = [required[name]] if name in required else []
    if name.startswith("planned"):
        write_profile(tmp_path)
        more = [f"method.profile='{tmp_path}'"]
    config = composed(f"method={name}", *more)
    made = [contender(node, config["forecaster"], 50) for node in expand(config["method"], "dit-digits")]
    assert made
    told = [(what.method, what.scope, str(what.settings)) for what in made]
    assert len(set(told)) == len(told)  # no two choices look the same in a table


@pytest.mark.parametrize("name", sorted(peers))
def test_every_rival_has_a_fair_grid_and_names_its_own_settings(name):
    node = yaml.safe_load((CONFIGS / "method" / "peer" / f"{name}.yaml").read_text())
    known = {field.name for field in dataclasses.fields(peers[name].Settings)}
    assert node["peer"] == name
    assert set(node["settings"]) == known
    choices = expand(node, "dit-digits")
    assert len(choices) >= 12
    assert all(set(choice["settings"]) == known for choice in choices)
    assert composed(f"peer={name}")["method"]["peer"] == name


def test_the_experiments_sweep_over_everything():
    command.register_methods()
    with initialize_config_module(command.CONFIGS, version_base="1.3"):
        config = compose("evaluate", ["experiment=reference_grid"], return_hydra_config=True)
    params = config.hydra.sweeper.params
    every = [(spec.name, sampler) for spec in reference.MODELS.values() for sampler in spec.samplers]
    assert subjects_of(config) == every
    swept = [method.strip() for method in params.method.split(",")]
    assert {"uncached", "fewer_steps", "uniform_reuse", "uniform_taylor"} <= set(swept)
    assert sorted([*swept, "router"]) == sorted([*methods(), *(f"peer/{name}" for name in peers)])
    with initialize_config_module(command.CONFIGS, version_base="1.3"):
        routers = compose("evaluate", ["experiment=routers"], return_hydra_config=True)
    assert (routers.steps, routers.hydra.sweeper.params.method.split(",")[-1]) == (20, "router")  # they are of as many
    with initialize_config_module(command.CONFIGS, version_base="1.3"):
        given = compose("evaluate", ["experiment=methods"], return_hydra_config=True)
    assert dict(given.hydra.sweeper.params) == {"method": params.method}  # models come with their samplers
    assert given.name == config.name == "reference_grid"
    with initialize_config_module(command.CONFIGS, version_base="1.3"):
        chosen = compose("evaluate", ["experiment=reference_all"], return_hydra_config=True)
    assert chosen.hydra.sweeper.params.method == params.method
    assert subjects_of(chosen) == [(spec.name, spec.samplers[0]) for spec in reference.MODELS.values()]
    assert (chosen.name, chosen.finalists.of) == ("reference_all", "results/reference_grid")
    assert chosen.prompts.first_seed >= config.prompts.first_seed + config.prompts.n  # settings were chosen by those
    apart = {"name": 0, "prompts": 0, "finalists": 0, "hydra": 0}
    assert {**chosen, **apart} == {**config, **apart}


def subjects_of(config):
    """The models and samplers that an experiment sweeps over."""
    jobs = [Job(composed(f"model={one}"), Path("nowhere")) for one in config.hydra.sweeper.params.model.split(",")]
    return [(job.config["model"]["name"], job.sampler) for job in jobs]


def test_runs_with_a_second_sampler_are_one_however_it_was_chosen():
    node = {"kind": "ours"}
    by_model, by_sampler, other, first = (
        Job(composed(*given), Path("nowhere")).run_config(node)
        for given in (
            ["model=dit-digits-dpmpp"],
            ["model=dit-digits", "sampler=dpmpp"],
            ["model=dit-digits-dpmpp", "sampler=ddim"],
            ["model=dit-digits"],
        )
    )
    assert by_model == by_sampler
    assert by_model["model"] == first["model"]
    assert (by_model["sampler"]["name"], other["sampler"]["name"], first["sampler"]["name"]) == ("dpm++", "ddim", None)


@pytest.mark.parametrize("name", reference.MODELS)
def test_samplers_of_the_shipped_models_have_files_by_which_plans_find_profiles(name):
    files_of = {
        yaml.safe_load((CONFIGS / "sampler" / f"{option}.yaml").read_text())["name"]: option
        for option in options("sampler")
    }
    for sampler in reference.MODELS[name].samplers:
        config = composed("method=planned", f"model={name}", f"sampler={files_of[sampler]}")
        assert (config["method"]["sampler"], config["method"]["profile"]) == (sampler, None)


@pytest.mark.parametrize("name", ["fewer_steps", "uniform_reuse", "uniform_taylor", "spaced_taylor", "branch_taylor"])
def test_grids_have_a_choice_within_every_budget(name):
    """And plans, which keep within theirs."""
    config = composed(f"method={name}")
    for steps in (40, 50):
        shares = []
        for node in expand(config["method"], "dit-digits"):
            what = contender(node, config["forecaster"], steps)
            if isinstance(what, FewerSteps):
                shares.append(what.steps(steps) / steps)
            else:
                cls = registry.policies.get(what.options["policy"])
                own = {field.name for field in dataclasses.fields(cls)} & set(what.options)
                made = Guarded(cls(**{name: what.options[name] for name in own}))
                shares.append(made.schedule(steps).nfe / steps)
        for budget in BUDGETS.values():
            assert any(0.94 * budget <= share <= TOLERANCE * budget for share in shares), (steps, budget)


def test_full_is_all_with_more_samples():
    full, some = composed("experiment=reference_full"), composed("experiment=reference_all")
    assert full["prompts"]["n"] >= 256
    assert full["prompts"]["n_video"] >= 32
    assert {**full, "name": 0, "prompts": 0, "timing": 0} == {**some, "name": 0, "prompts": 0, "timing": 0}


def test_jobs_take_only_what_was_near_the_best():
    """By the committed results, whose settings must be found again."""

    def nodes(*overrides: str) -> list[dict]:
        return Job(composed("experiment=finals", "model=dit-digits", *overrides), Path("nowhere")).nodes

    assert nodes("method=uncached")
    assert len(nodes("method=planned")) == len(nodes("method=planned", "finalists.of=null"))
    assert nodes("method=planned_coded") == []
    assert 0 < len(nodes("method=online/racer")) <= len(nodes("method=online/racer", "finalists.of=null"))
    assert 0 < len(nodes("method=peer/diffusers_taylorseer")) < 12
    assert nodes("method=system/laptop") == []
    with pytest.raises(ConfigError, match=r"finalists\.within"):
        nodes("method=uncached", "finalists.within=-1")
    with pytest.raises(ConfigError, match=r"finalists\.each must be true or false, not 'all'"):
        nodes("method=uncached", "finalists.each=all")
    unnamed = {
        **composed("experiment=finals", "model=dit-digits", "method=uncached", "steps=4"),
        "model": {"name": "a/b"},
    }
    with pytest.raises(ConfigError, match=r"add sampler=scheduler sampler\.name="):
        _ = Job({**unnamed, "sampler": {"name": None}}, Path("nowhere")).nodes


@pytest.mark.parametrize("model", ["unet-digits", "wan-moving-digits"])
def test_jobs_take_the_best_of_every_method_that_has_any(model):
    """Every finalist of the committed grid is found among the settings of its method."""
    found, spec = Path("results/reference_grid"), reference.spec(model)
    expected = finalists(found, model, spec.samplers[0], 0, each=True)
    kept = set()
    for method in [*methods(), *(f"peer/{name}" for name in peers)]:
        if method == "router":
            continue
        config = composed("experiment=reference_all", f"model={model}", f"method={method}")
        for node in Job(config, Path("nowhere")).nodes:
            what = contender(node, config["forecaster"], spec.steps)
            if not isinstance(what, Uncached):
                settings = json.dumps(what.settings, sort_keys=True)
                kept.add((what.kind, what.method, what.scope or DEFAULT_SCOPE, settings))
    assert expected - kept == set()
    assert {key[1] for key in kept - expected} <= {"plan"}


def test_finals_are_the_full_comparison_of_other_settings():
    full, finals = composed("experiment=reference_full"), composed("experiment=finals")
    apart = {"finalists": 0, "name": 0, "timing": 0}
    assert {**finals, **apart} == {**full, **apart}
    assert full["finalists"]["of"] == finals["finalists"]["of"]
    command.register_methods()
    with initialize_config_module(command.CONFIGS, version_base="1.3"):
        grid, last = (
            compose("evaluate", [f"experiment={name}"], return_hydra_config=True)
            for name in ("reference_grid", "finals")
        )
    assert last.hydra.sweeper.params == grid.hydra.sweeper.params
