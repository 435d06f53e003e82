"""Training a router from the command line, and running its plan."""

import json
from types import SimpleNamespace

import plans
import pytest
from hydra import compose, initialize_config_module
from typer.testing import CliRunner

import diffusion_cache as dc
from diffusion_cache import reference
from diffusion_cache.cli import app, hydra_app
from diffusion_cache.cli import train_router as command
from diffusion_cache.errors import ConfigError, DiffusionCacheWarning
from diffusion_cache.evaluation.prompts import FITTING_SEEDS
from diffusion_cache.plan import Plan
from diffusion_cache.profile import Profile
from diffusion_cache.registry import routers
from diffusion_cache.schedule import Schedule

STEPS = 4
SMALL = [
    "model=flux-digits",
    "scope=stack",
    f"steps={STEPS}",
    "profile.num_samples=2",
    "profile.sensitivity.samples=1",
    "profile.sensitivity.steps=2",
    "training.trajectories=2",
    "training.batch=2",
    "training.held_out=2",
    "training.evaluate_every=1",
    "held_out=3",
]


def configured(*overrides):
    command.register_routers()
    with initialize_config_module("diffusion_cache.configs", version_base="1.3"):
        return compose("train_router", [*SMALL, *overrides])


def test_a_trained_router_runs_as_a_plan(tmp_path, capsys):
    folder = tmp_path / "profile"
    command.run_configured(configured(f"out={folder}", "compute=0.75", "router.fitted=true"))
    # the second one is stored beside the first, on the same profile
    command.run_configured(configured(f"out={folder}", "compute=0.6", "router=sdt"))
    profile = Profile.load(folder)
    names = [plan.name for plan in profile.plans]
    assert [name.partition("-")[0] for name in names] == ["budgeted", "sdt"]
    for plan, compute in zip(profile.plans, (0.75, 0.6), strict=True):
        cell = max(span.share for span in profile.spans)
        assert 0 <= compute * STEPS - plan.nfe <= max(0.01 * STEPS, cell) + 1e-6
        assert [seed % command.ROUTER_SEEDS for seed in plan.quality.seeds] == [command.HELD_OUT + i for i in range(3)]
        assert plan.quality.mean > 15
        assert plan.speed.ratio > 0
    pipe = reference.load("flux-digits")
    with dc.cached(pipe, profile=folder, plan=names[0]):
        pipe(**reference.inputs("flux-digits", [3], [5], STEPS))
        summary = dc.summary(pipe)
    reused = int((~profile.plans[0].computed()).sum())
    assert sum(record.spans_reused for record in summary.records) == reused > 0
    for name in ("budgeted-0.75-seed0", "sdt-0.6-seed0"):
        assert (folder / name / "curves.png").read_bytes().startswith(b"\x89PNG")
        assert [row["trajectory"] for row in json.loads((folder / name / "training.json").read_text())] == [0, 1, 2]


@pytest.mark.parametrize(("learned", "texts"), [((), 2), (("3", "4"), 1), (None, None)])
def test_a_plan_states_of_how_many_texts_its_samples_are(learned, texts):
    """Those that the router was trained on, or the profile is of (0 and 1), do not count."""
    profile, pipe = plans.profile("flux-digits"), reference.load("flux-digits")
    schedule = Schedule.uniform(step < 2 for step in range(plans.STEPS))
    plan = Plan("early", "stack", None, "auto", schedule, profile.noise_levels, facts={"held_out_prompts": 60})

    def make(samples):
        return plans.batch(pipe, "flux-digits", samples)

    with plans.quickly_timed():
        given = [("3", 1), ("8", 2), ("1", 3)]
        made = command.stated(plan, profile, make, given, learned, lambda *told: None)
    assert (made.quality.seeds, made.held_out_prompts) == ((1, 2, 3), texts)


def test_samples_are_for_fitting_alone():
    from diffusion_cache.evaluation.subjects import Shipped

    subject = Shipped("flux-digits")
    prompts = {"kind": "classes", "n": 32, "n_video": None, "first_seed": 0}
    ranges = [
        {seed for _, seed in command.training_samples(prompts, subject, seed)(range(0, 5000, 7))} for seed in (0, 1)
    ]
    assert not ranges[0] & ranges[1]
    assert min(map(min, ranges)) > FITTING_SEEDS + 100_000
    assert [label for label, _ in command.training_samples(prompts, subject, 0)(range(9, 12))] == ["9", "0", "1"]


def test_texts_are_trained_on_or_held_out(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join("abcdefghij"))
    prompts = {"kind": "file", "path": str(path), "column": "prompt", "n": None, "n_video": None, "first_seed": 0}
    subject = SimpleNamespace(classes=0, video=False)
    samples = command.training_samples(prompts, subject, 0, (160, 16, 64))
    ranges = [range(16), range(1000, 1160), range(command.HELD_OUT, command.HELD_OUT + 64)]
    chosen, trained, held_out = ({prompt for prompt, _ in samples(numbers)} for numbers in ranges)
    assert trained == set("abcdef")  # the profile's come first among the prompts
    assert (len(chosen | held_out), chosen & held_out) == (4, set())
    path.write_text("a\nb")
    with pytest.warns(DiffusionCacheWarning, match="2 prompts are too few to train on some and hold others out"):
        samples = command.training_samples(prompts, subject, 0, (160, 16, 64))
    assert {prompt for prompt, _ in samples(range(command.HELD_OUT, command.HELD_OUT + 4))} == {"a", "b"}


def test_clean_latents_are_of_the_samples_classes():
    from diffusion_cache.reference.data import digit_images

    clean = command.clean_latents({"kind": "shipped", "name": "dit-digits"}, lambda numbers: [("7", 3), ("2", 4)])
    images, labels = digit_images()
    for found, label in zip(clean([0, 1]), (7, 2), strict=True):
        assert label in labels[(images == found).flatten(1).all(1)].tolist()
    assert command.clean_latents({"kind": "shipped", "name": "flux-digits"}, None) is None


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["compute=0.01"], "compute is a share"),
        (["compute=half"], "compute must be a number or null"),
        (["steps=0"], "steps must be a whole number"),
        (["mixed_precision=bf61"], "Did you mean 'bf16'"),
        (["router.lr=fast"], "lr must be a number"),
        (["training.batch=0"], "batch must be a whole number"),
    ],
)
def test_what_cannot_be_trained(overrides, said, tmp_path):
    with pytest.raises(ConfigError, match=said):
        command.run_configured(configured(f"out={tmp_path / 'profile'}", *overrides))


def test_unknown_names_are_told_before_anything_runs():
    command.register_routers()
    with pytest.raises(ConfigError, match="Did you mean 'harmonica'"):
        hydra_app.check("train_router", ["router=harmonika"], command.GROUPS)
    with pytest.raises(ConfigError, match=r"training\.patience"):
        hydra_app.check("train_router", ["training.patients=3"], command.GROUPS)


def test_a_number_of_prompts_that_would_do_nothing_is_told():
    with pytest.raises(ConfigError, match=r"^prompts\.n does nothing here: .* profile\.num_samples, .* to say"):
        command.train_router(["prompts.n=4"])


def test_the_default_folder_is_named_after_what_is_trained(monkeypatch):
    what = SimpleNamespace(name="./models/my model:1", sampler="ddim", classes=True, video=False)
    folders = []

    def measured(*given):
        folders.append(given[5])
        raise ConfigError("far enough")

    monkeypatch.setattr("diffusion_cache.evaluation.subjects.subject", lambda *given: what)
    monkeypatch.setattr("diffusion_cache.cli.profile.measured", measured)
    with pytest.raises(ConfigError, match="far enough"):
        command.run_configured(configured())
    assert folders == [command.FOLDER / "models-my-model-1-ddim-4-stack"]


def test_routers_are_listed():
    shown = CliRunner().invoke(app, ["list", "routers"], env={"COLUMNS": "200"})
    assert shown.exit_code == 0
    assert all(name in shown.output for name in routers.names())
