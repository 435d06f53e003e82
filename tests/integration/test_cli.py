"""The command line, on the shipped models."""

import json
import math
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import diffusion_cache as dc
from diffusion_cache import published, reference
from diffusion_cache.cli import app, demo, plan, writing
from diffusion_cache.cli.results import Row
from diffusion_cache.cli.tables import COLUMNS
from diffusion_cache.errors import ConfigError
from diffusion_cache.evaluation.prompts import FITTING_SEEDS
from diffusion_cache.evaluation.report import ReportPaths
from diffusion_cache.measure import psnr, quality
from diffusion_cache.profile import Profile, shipped_profiles


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())


def test_help_needs_no_heavy_import():
    program = (
        "import sys; from typer.testing import CliRunner; from diffusion_cache.cli import app;"
        "assert 'inspect' in CliRunner().invoke(app, ['--help']).output;"
        "print([name for name in ('torch', 'diffusers', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("policies", ["interval", "every=2", "first_block", "mask"]),
        ("forecasters", ["reuse", "taylor", "order=1", "rfc", "non-linear", "denoiser"]),
        ("correctors", ["affine", "alignment", "magnitude", "ratios", "shrink", "strength=0.8"]),
        ("languages", ["prefix", "2503.09573", "dkv", "refresh=8", "elastic", "sub_block"]),
        ("guards", ["warmup", "max_consecutive", "unconditional_every", "first steps computed"]),
        ("models", list(reference.MODELS)),
        ("profiles", ["dit-digits-ddim", "FluxTransformer2DModel", "nfe-25"]),
        ("published", ["published/magcache/flux-dev-28", "FluxTransformer2DModel"]),
    ],
)
def test_list(what, expected):
    output = run("list", what)
    assert all(text in output for text in expected)


def test_published_figures_are_listed_where_they_are_a_method():
    output = run("list", "published")
    usable = [name for name in published.names() if f"published/{name} " in output]
    assert all(published.load(name).driven() for name in usable)
    others = Counter(published.load(name).method for name in {*published.names()} - {*usable})
    assert "scm" not in others
    assert all(f"{method} ({count})" in " ".join(output.split()) for method, count in others.items())
    for name in {*published.names()} - {*usable}:
        with pytest.raises(ConfigError):
            published.load(name).driven()


def test_shipped_profiles_go_by_their_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "nfe-25" in run("show", "dit-digits-ddim")
    assert [path.name for path in tmp_path.iterdir()] == ["profile-pictures"]
    assert (tmp_path / "profile-pictures" / "dit-digits-ddim" / "plans.png").is_file()
    told = run("show", "dit-digits", code=2)
    assert (
        "'dit-digits' is no folder, nor a profile that comes with the package. Did you mean 'dit-digits-ddim'?" in told
    )
    assert "say where to store it with its plans, --out FOLDER" in run("plan", "dit-digits-ddim", "--nfe", "25", code=2)
    told = run("plan", "dit-digits-ddim", "--nfe", "50", "--out", "there", code=2)
    assert "takes 50 denoiser evaluations without a cache, and nothing is reused in 50" in told


def test_version():
    assert run("--version").strip() == dc.__version__


def test_env_names_versions_and_threads():
    output = run("env")
    assert torch.__version__ in output
    assert "threads" in output
    assert not torch.cuda.is_initialized()


def test_inspect_a_shipped_model():
    assert "transformer" in run("inspect", "dit-digits")


def test_a_shipped_model_is_inspected_as_it_is():
    assert "dit-digits is a shipped model, which takes no --dtype" in run(
        "inspect", "dit-digits", "--dtype", "float32", code=2
    )


def test_inspect_a_saved_pipeline(tmp_path):
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path)
    output = run("inspect", tmp_path, "--dtype", "float32")
    assert "DDPMPipeline" in output
    assert "cut" in output


@pytest.mark.parametrize("command", [("inspect", "dit-digit"), ("demo", "--model", "dit-digit")])
def test_an_unknown_model_is_one_message_with_a_suggestion(command):
    output = run(*command, code=2)
    assert "Did you mean 'dit-digits'?" in output
    assert "Traceback" not in output


def test_a_folder_that_is_no_pipeline_is_one_message(tmp_path):
    output = run("inspect", tmp_path, code=2)
    assert "cannot be loaded" in output
    assert "Traceback" not in output


@pytest.mark.parametrize("option", [("--samples", 0), ("--steps", 3), ("--pairs", 0), ("--threads", 0), ("--seed", -1)])
def test_settings_that_cannot_work_are_refused(option, tmp_path):
    assert "must be at least" in run("demo", "--out", tmp_path, *option, code=2)


def test_the_demo_does_not_report_seeds_that_fitting_uses(tmp_path):
    told = run("demo", "--out", tmp_path, "--seed", FITTING_SEEDS - 9, "--samples", 10, code=2)
    assert "seeds 99991 to 100000 are asked for; those from 100000 on are for fitting" in told
    demo.Settings(seed=FITTING_SEEDS - 10, samples=10)


def test_a_folder_that_cannot_be_made_is_one_message(tmp_path):
    (tmp_path / "file").touch()
    assert "choose another folder with --out" in run("demo", "--out", tmp_path / "file" / "demo", code=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--guard", "input_trn"), "Did you mean 'input_turn'?"),
        (("--device", "cuda:1"), "takes no --device"),
        (("--offload", "model"), "takes no --offload"),
    ],
)
def test_plan_refuses_before_it_generates(options, message, monkeypatch):
    monkeypatch.setattr("diffusion_cache.cli.plan.teach", lambda batch: pytest.fail("generated"))
    profile = shipped_profiles()["flux-digits-flow-euler"]
    assert message in run("plan", profile, "--nfe", 20, *options, code=2)


def test_prompts_for_plans_come_from_the_column_named(tmp_path, monkeypatch):
    # one text twice could be both fitted on and held out
    (tmp_path / "prompts.csv").write_text("prompt,caption\na boat,a fox\na ship,a cow\na car,a fox\n")
    pipeline = SimpleNamespace(pipe=lambda: None, classes=None, video=False)
    monkeypatch.setattr(plan, "_pretrained", lambda *given: pipeline)
    profile = Profile.load(shipped_profiles()["dit-digits-ddim"])
    settings = plan.Settings(prompts=tmp_path / "prompts.csv", column="caption")
    assert plan.source_of(profile, str(tmp_path), settings).prompts == ["a fox", "a cow"]
    with pytest.raises(ConfigError, match="takes no --column"):
        plan.source_of(profile, "dit-digits", plan.Settings(column="caption"))


def profiled(**loaded):
    profile = Profile.load(shipped_profiles()["dit-digits-ddim"])
    return replace(profile, facts={**profile.facts, "settings": {"model": loaded}})


def test_a_pipeline_is_loaded_as_it_was_profiled(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "Pretrained", lambda options, sampler: options)
    loaded = profiled(dtype="bfloat16", variant="fp16", call={"height": 64})
    found = plan._pretrained(loaded, "org/model", plan.Settings())
    assert (found["dtype"], found["variant"], found["call"]) == ("bfloat16", "fp16", {"height": 64})
    # a folder that was saved without variants
    assert plan._pretrained(loaded, str(tmp_path), plan.Settings())["variant"] is None
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "diffusion_pytorch_model.fp16.safetensors").touch()
    assert plan._pretrained(loaded, str(tmp_path), plan.Settings())["variant"] == "fp16"
    found = plan._pretrained(profiled(), "org/model", plan.Settings())
    assert (found["dtype"], found["variant"]) == ("float32", None)  # the fingerprint's


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "cuda:99"}, "^--device=cuda:99 is not there"),
        ({"device": "gpu"}, "^--device must be auto or a device of torch"),
        ({"offload": "modl"}, "^Unknown --offload 'modl'. Did you mean 'model'"),
        ({"column": "caption"}, "^--column names a column of the table in --prompts: give that too"),
    ],
)
def test_options_that_cannot_be_are_told_by_their_own_names(options, message):
    with pytest.raises(ConfigError, match=message):
        plan.source_of(profiled(dtype="float32"), "org/model", plan.Settings(**options))


def full(*args, **kwargs):
    raise OSError(28, "No space left on device")


def test_the_demo_sees_that_it_can_write_before_it_measures(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "measure_model", lambda *given: pytest.fail("measured"))
    monkeypatch.setattr(writing, "TemporaryFile", full)
    told = run("demo", "--out", tmp_path / "demo", code=2)
    assert "No space left on device; choose another folder with --out" in told


def test_what_cannot_be_written_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "figures.json"
    writing.write(path, "ä", "folder with --out")
    monkeypatch.setattr(type(tmp_path), "write_bytes", full)
    with pytest.raises(ConfigError, match=r"figures\.json: No space left on device; choose another folder with --out"):
        writing.write(path, "b", "folder with --out")
    assert [file.read_text(encoding="utf-8") for file in tmp_path.iterdir()] == ["ä"]


def test_brackets_in_a_path_are_no_markup(tmp_path, monkeypatch):
    paths = ReportPaths(*(tmp_path / "a[b]" / str(place) for place in range(6)))
    monkeypatch.setattr("diffusion_cache.evaluation.report.write_report", lambda folder, out: paths)
    assert str(paths.csv) in run("report", tmp_path)


def test_demo_writes_pictures_page_and_figures(tmp_path):
    steps, samples = 8, 2
    sizes = ("--steps", steps, "--samples", samples, "--pairs", 1)
    output = run("demo", "--model", "dit-digits", "--out", tmp_path, *sizes)
    assert str(tmp_path / "demo.png") in output

    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["versions"]["torch"] == torch.__version__
    assert summary["hardware"]
    (model,) = summary["models"]
    assert model["steps"] == steps
    assert not set(model["reporting_seeds"]) & set(model["fitting_seeds"])
    rows = {(row["label"], row["every"]): row for row in model["rows"]}
    assert len(rows) == 5 * len(demo.INTERVALS)
    for (label, every), row in rows.items():
        assert row["problem"] is None
        assert row["timing"]["wall_ratio"] > 0
        assert row["quality"]["n"] == samples
        assert row["quality"]["psnr_worst"] <= row["quality"]["psnr_p5"] <= row["quality"]["psnr_mean"]
        assert 0 < row["flops"] < 1
        if label in (demo.UNIFORM_REUSE, demo.UNIFORM_TAYLOR, demo.SPACED_TAYLOR):
            computed = math.ceil(steps / every)
            assert row["nfe"] == computed
            assert row["blocks"] == pytest.approx(computed / steps)  # stack scope: a reused step runs no block
            assert row["flops"] > row["blocks"]  # embeddings and the output layer always run
        elif label == demo.FIRST_BLOCK:
            blocks = reference.denoiser("dit-digits").config.num_layers
            # the first of the samples tries one batch row alone at its first step, behind the probe
            tried = (blocks - 1) / blocks / samples
            assert row["blocks"] == pytest.approx((row["nfe"] + (steps - row["nfe"]) / blocks + tried) / steps)
        else:
            assert row["nfe"] == row["options"]["num_inference_steps"]
    assert rows[demo.SPACED_TAYLOR, 2]["options"]["share"] == 0.5

    for name in ("demo.png", "dit-digits.png"):
        with Image.open(tmp_path / name) as picture:
            picture.verify()
    page = (tmp_path / "index.html").read_text()
    assert page.count("data:image/png;base64,") == 1
    assert "http" not in page.replace("http-equiv", "")  # nothing is fetched
    table = (tmp_path / "table.md").read_text()
    assert all(header in table for header in COLUMNS)
    assert table.count("| 1 in 3 |") + table.count("| **1 in 3** |") == 5 + 1  # and in the overview


def test_the_demo_goes_by_the_shipped_plan_of_so_many_evaluations():
    """Where there is one: a run of another length has none."""
    (method,) = demo.planned_method(demo.Subject("dit-digits"), 17)
    assert method.options == {"profile": "dit-digits-ddim", "plan": "nfe-17"}
    assert demo.planned_method(demo.Subject("dit-digits", steps=8), 4) == ()
    subject, samples = demo.Subject("dit-digits"), demo.Samples.numbered(1, 0)
    assert demo.altering_methods(subject, samples, [method]) == set()
    run = subject.generate_cached(samples, method.options)
    assert run.nfe == 17
    assert psnr(run.images, subject.call(samples)).item() > 35


def test_no_speed_for_a_method_that_changes_the_image_when_it_computes_everything(monkeypatch):
    every_other = {"policy": "interval", "every": 2}
    broken = demo.Method(demo.SPACED_TAYLOR, every_other, control=every_other)
    monkeypatch.setattr(demo, "budget_methods", lambda *args: (broken,))
    monkeypatch.setattr(demo, "BISECTIONS", 1)
    result = demo.measure_model(demo.Settings(samples=1, steps=4, pairs=1), "dit-digits", lambda stage: None)
    (row, _) = [row for row in result.rows if row.label == demo.SPACED_TAYLOR]
    assert "differs" in row.problem
    assert row.timing is None
    assert COLUMNS["wall"](row) == "–"


def test_identical_outputs_are_stored_without_infinity():
    images = torch.rand(2, 1, 1, 8, 8)
    row = Row("x", 2, {}, 4.0, 0.5, 0.5, quality(images, images), None, None)
    stored = json.loads(json.dumps(row.to_json(), allow_nan=False))
    assert stored["quality"]["psnr_mean"] is None
    assert stored["quality"]["identical"] == 2
    assert COLUMNS["PSNR mean"](row) == "∞"
