"""Profiling from the command line to a stored profile: interruptions, several processes, bad input."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import diffusers
import pytest
import torch
from children import interruptible
from hydra import compose, initialize_config_module

from diffusion_cache import reference
from diffusion_cache.cli import fit_signal, hydra_app
from diffusion_cache.cli import profile as command
from diffusion_cache.engine import session_of
from diffusion_cache.errors import ConfigError
from diffusion_cache.evaluation.prompts import FITTING_SEEDS
from diffusion_cache.models import find_denoisers
from diffusion_cache.plan import Plan
from diffusion_cache.profile import Profile
from diffusion_cache.profiling import measure as module
from diffusion_cache.profiling.foreground import latent_motion
from diffusion_cache.profiling.generation import Batch, teach
from diffusion_cache.profiling.measure import Options, Work, measure
from diffusion_cache.schedule import Schedule

STEPS = 4
GIVEN = [(str(i), FITTING_SEEDS + i) for i in range(4)]
SMALL = ["steps=4", "num_samples=4", "batch=2", "sensitivity.samples=1", "sensitivity.steps=2"]
QUICK = Options(batch=2, sensitivity_samples=1, sensitivity_steps=2)
LAUNCHER = """
import sys
from diffusion_cache.cli.profile import profile
profile(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def pipe():
    return reference.load("dit-digits")


def batches(pipe, name="dit-digits", steps=STEPS):
    def make(given):
        labels, seeds = [int(prompt) for prompt, _ in given], [seed for _, seed in given]
        return Batch(
            pipe,
            lambda: pipe(**reference.inputs(name, labels, seeds, steps)),
            lambda output: reference.images(name, output),
            len(given),
        )

    return make


@pytest.fixture(scope="module")
def whole(pipe):
    """An uninterrupted profile."""
    return measure(batches(pipe), GIVEN, QUICK)


def same(one, other):
    assert one.arrays.keys() == other.arrays.keys()
    for name, values in one.arrays.items():
        torch.testing.assert_close(other.arrays[name], values, rtol=0, atol=0, equal_nan=True, msg=name)
    for name in ("fingerprint", "scope", "depth", "spans", "passes", "row_passes", "samples"):
        assert getattr(one, name) == getattr(other, name), name
    facts = [{key: value for key, value in made.facts.items() if key != "seconds"} for made in (one, other)]
    assert facts[0] == facts[1]
    return True


def stopping(after):
    """A progress callback that is interrupted at one of its calls."""
    news = []

    def progress(*told):
        news.append(told)
        if len(news) > after:
            raise KeyboardInterrupt

    return progress


def plan(steps=STEPS):
    nodes = torch.full((steps, 1, 1), -1, dtype=torch.int32)
    weights = torch.full((steps, 1, 1, 1), torch.nan, dtype=torch.float64)
    return Plan("all", "stack", None, "auto", Schedule.uniform([True] * steps), (), nodes, weights)


# what is measured


def test_a_profile_says_what_was_measured(pipe, whole, tmp_path):
    assert (whole.scope, whole.depth, whole.total, whole.passes, whole.row_passes) == ("stack", None, 4, ("0", "1"), 2)
    assert whole.samples == tuple(GIVEN)
    assert whole.arrays["gram_residual"].dtype == torch.float64
    assert whole.arrays["gram_residual"].shape == (1, 2, 4, 4)
    assert torch.linalg.eigvalsh(whole.arrays["gram_residual"]).min() > 0
    assert whole.arrays["sensitivity"].shape == (1, 4)
    assert whole.arrays["sensitivity_sampled"].tolist() == [[0, 1, 0, 1]]
    assert whole.fingerprint.sample_shape == (1, 16, 16)
    assert len(whole.noise_levels) == 4
    assert list(whole.noise_levels) == sorted(whole.noise_levels)
    assert whole.facts["sketch"] == "exact"
    assert (whole.facts["samples"], whole.facts["batch"], whole.facts["shares"]) == (4, 2, "flops")
    assert whole.facts["sensitivity"]["samples"] == 1
    assert whole.facts["sensitivity"]["additivity"]["pairs"] == 1
    assert whole.facts["seconds"] > 0
    # two samples' features and inputs in two passes, and the last step of each, at the least
    assert whole.facts["bytes"] >= 2 * 2 * (2 * STEPS + 2) * 4 * whole.spans[0].elements
    assert [d for d in whole.matches(pipe, find_denoisers(pipe)) if d.strict] == []
    whole.save(tmp_path)
    assert same(whole, Profile.load(tmp_path))
    assert session_of(pipe) is None


def test_it_does_not_matter_how_samples_are_batched(pipe, whole):
    options = Options(batch=3, sensitivity_samples=0)
    other = measure(batches(pipe), GIVEN, options)
    assert other.arrays.keys() == whole.arrays.keys() - {"sensitivity", "sensitivity_sampled"}
    assert "sensitivity" not in other.facts
    for name, values in other.arrays.items():
        torch.testing.assert_close(values, whole.arrays[name], rtol=1e-4, atol=1e-4, equal_nan=True)


def test_features_that_do_not_fit_are_sketched(pipe, whole):
    memory = 2 * 2 * 2 * STEPS * 4 * 2048  # so wide for 2 samples, in 2 passes, features and inputs
    made = measure(batches(pipe), GIVEN, Options(batch=2, sensitivity_samples=0, memory=memory))
    assert made.facts["sketch"] == {"width": 2048, "spans": ["transformer_blocks"]}
    exact, near = whole.arrays["gram_residual"], made.arrays["gram_residual"]
    energy = exact.diagonal(dim1=2, dim2=3)
    error = (near - exact) / (energy[..., None] * energy[..., None, :]).sqrt()
    assert 0 < float(error.abs().max()) < 4 * (2 / 2048 / 4) ** 0.5
    with pytest.raises(ConfigError, match="make the batch smaller, or allow more memory"):
        measure(batches(pipe), GIVEN, Options(batch=2, memory=memory // 4))


def test_attention_and_foreground(pipe):
    mask = torch.zeros(64, dtype=torch.bool)
    mask[:32] = True
    options = Options(scope="block", batch=2, sensitivity_samples=0, attention=True)
    made = measure(batches(pipe), GIVEN[:2], options, foreground=mask)
    assert made.arrays["attention_received.11"].shape == (4, 64)
    torch.testing.assert_close(made.arrays["attention_received.3"].sum(1), torch.ones(4))
    share = made.arrays["foreground_share"]
    assert share.shape == (12, 4)
    other = measure(batches(pipe), GIVEN[:2], options, foreground=~mask).arrays["foreground_share"]
    torch.testing.assert_close(share + other, torch.ones(12, 4))
    # one mask for both samples, or the same for each; and each sample its own, measured in one batch or apart
    both = torch.stack([mask, ~mask])
    shares = []
    for masks, size in ((torch.stack([mask, mask]), 2), (both, 2), (both, 1)):
        found = measure(batches(pipe), GIVEN[:2], replace(options, batch=size), foreground=masks)
        shares.append(found.arrays["foreground_share"])
    assert torch.equal(shares[0], share)
    torch.testing.assert_close(shares[1], shares[2])
    whole = measure(batches(pipe), GIVEN[:2], replace(options, attention_top=1.0), foreground=mask)
    assert torch.equal(whole.arrays["foreground_share"], torch.full((12, 4), 0.5))
    with pytest.raises(ConfigError, match="block by block"):
        measure(batches(pipe), GIVEN[:2], Options(attention=True))
    refused = [
        (dict(foreground=mask), Options(), "set attention as well"),
        (dict(foreground="movement"), options, "Unknown foreground 'movement'"),
        (dict(foreground="motion"), options, r"motion needs videos, and a sample's latents are \[1, 16, 16\]"),
        (dict(foreground=mask.float()), options, "of bool values"),
        (dict(foreground=torch.stack([mask] * 3)), options, "of 3 samples, and 2 are profiled"),
    ]
    for given, how, message in refused:
        with pytest.raises(ConfigError, match=message):
            measure(batches(pipe), GIVEN[:2], how, **given)


def test_foreground_of_a_video_that_moves():
    """The tokens that change hold most of the digit; text is no part of this self-attention."""
    wan = reference.load("wan-moving-digits")
    options = Options(scope="block", batch=2, sensitivity_samples=0, attention=True)
    made = measure(batches(wan, "wan-moving-digits", 6), GIVEN[:2], options, foreground="motion")
    assert made.arrays["foreground_share"].shape == (10, 6)
    teacher = teach(batches(wan, "wan-moving-digits", 6)(GIVEN[:2]))
    masks = latent_motion(teacher.states[-1], (7, 4, 4))
    again = measure(batches(wan, "wan-moving-digits", 6), GIVEN[:2], options, foreground=masks)
    assert torch.equal(made.arrays["foreground_share"], again.arrays["foreground_share"])


def test_a_single_step_has_no_sensitivity():
    flux = reference.load("flux-digits")
    made = measure(batches(flux, "flux-digits", 1), GIVEN[:1])
    assert made.arrays["gram_residual"].shape == (2, 1, 1, 1)
    assert "sensitivity" not in made.arrays


# again, and after an interruption


def test_going_on_after_an_interruption_gives_the_same(pipe, whole, tmp_path):
    folder = tmp_path / "profile"
    news = []
    # at the second batch, at the second sensitivity, at the end
    for after in (2, 5, 8):
        with pytest.raises(KeyboardInterrupt):
            measure(batches(pipe), GIVEN, QUICK, folder=folder, progress=stopping(after))
        assert session_of(pipe) is None
        assert not folder.exists()
    kept = sorted(path.name for path in (tmp_path / "profile.partial").glob("*/*"))
    assert kept == ["batch-00000.safetensors", "batch-00001.safetensors", "sensitivity-1.json"]
    calls = []

    def make(given):
        calls.append(len(given))
        return batches(pipe)(given)

    made = measure(make, GIVEN, QUICK, folder=folder, progress=lambda *told: news.append(told))
    assert calls == [1, 1]  # to look at the pipeline, and the uncached path; nothing was measured again
    assert news[-1] == ("measured", 10, 10)
    assert same(made, whole)
    assert same(Profile.load(folder), whole)
    assert [path.name for path in tmp_path.iterdir()] == ["profile"]


def test_damaged_work_is_done_again(pipe, whole, tmp_path):
    folder = tmp_path / "profile"
    with pytest.raises(KeyboardInterrupt):
        measure(batches(pipe), GIVEN, QUICK, folder=folder, progress=stopping(6))
    (work,) = (tmp_path / "profile.partial").iterdir()
    path = work / "batch-00001.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    (work / "sensitivity-1.json").write_text("{half of")
    assert same(measure(batches(pipe), GIVEN, QUICK, folder=folder), whole)


def test_work_for_other_settings_is_left_alone(pipe, whole, tmp_path):
    folder = tmp_path / "profile"
    with pytest.raises(KeyboardInterrupt):
        measure(batches(pipe), GIVEN[::-1], QUICK, folder=folder, progress=stopping(2))
    (other,) = (tmp_path / "profile.partial").iterdir()
    assert same(measure(batches(pipe), GIVEN, QUICK, folder=folder), whole)
    assert list((tmp_path / "profile.partial").iterdir()) == [other]


def test_batches_shared_by_processes_give_the_same(pipe, whole, tmp_path):
    folder = tmp_path / "profile"
    met = []
    assert measure(batches(pipe), GIVEN, QUICK, folder=folder, rank=1, world=2, meet=lambda: met.append(1)) is None
    assert len(list((tmp_path / "profile.partial").glob("*/*"))) == 1
    assert same(measure(batches(pipe), GIVEN, QUICK, folder=folder, world=2, meet=lambda: met.append(0)), whole)
    assert met == [1, 0]
    with pytest.raises(ConfigError, match="lacks batch 1: all processes must see the same folder"):
        measure(batches(pipe), GIVEN, QUICK, folder=tmp_path / "other", rank=0, world=2)
    with pytest.raises(ConfigError, match="several processes meet in a folder"):
        measure(batches(pipe), GIVEN, QUICK, world=2)


def test_a_finished_profile_is_not_made_again(pipe, whole, tmp_path, monkeypatch):
    first = measure(batches(pipe), GIVEN, QUICK, folder=tmp_path / "p")
    first.with_plans([plan()]).save(tmp_path / "p")
    with monkeypatch.context() as patch:
        patch.setattr(module, "Recorder", None)  # nobody may measure
        again = measure(batches(pipe), GIVEN, QUICK, folder=tmp_path / "p")
    assert same(again, whole)
    assert [made.name for made in again.plans] == ["all"]
    with pytest.raises(ConfigError, match="of other settings, and plans made from it"):
        measure(batches(pipe), GIVEN[:2], QUICK, folder=tmp_path / "p")
    again.with_plans([]).save(tmp_path / "p")
    assert measure(batches(pipe), GIVEN[:2], QUICK, folder=tmp_path / "p").samples == tuple(GIVEN[:2])
    (tmp_path / "p" / "profile.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"Delete .* to have its profile made anew"):
        measure(batches(pipe), GIVEN[:2], QUICK, folder=tmp_path / "p")


# what cannot work


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 0}, "batch must be a whole number of at least 1"),
        ({"sensitivity_steps": 0}, "sensitivity_steps"),
        ({"sensitivity_samples": -1}, "sensitivity_samples"),
        ({"memory": 1.5}, "memory"),
        ({"scope": "blok"}, "Did you mean 'block'"),
        ({"feature": "reidual"}, "Did you mean 'residual'"),
        ({"depth": 2}, "depth is for scope 'cut'"),
    ],
)
def test_options_that_cannot_be(pipe, options, message):
    with pytest.raises(ConfigError, match=message):
        measure(batches(pipe), GIVEN, Options(**options))


def test_no_samples(pipe):
    with pytest.raises(ConfigError, match="at least one sample"):
        measure(batches(pipe), [])


def test_a_folder_that_cannot_be_written(pipe, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write to"):
        measure(batches(pipe), GIVEN[:1], folder=tmp_path / "file" / "profile")


def test_a_full_disk(tmp_path, monkeypatch):
    work = Work(tmp_path / "p", "key")
    work.prepare()

    def full(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(tmp_path), "write_bytes", full)
    with pytest.raises(ConfigError, match=r"No space left on device.*goes on from there"):
        work.keep(0, {"a": torch.zeros(1)}, {})
    assert work.batch(0) is None
    assert list(work.folder.iterdir()) == []


def test_values_that_are_not_finite(pipe, tmp_path):
    calls = []

    def poison(part, args, output):
        calls.append(1)
        return output + torch.inf if len(calls) > STEPS + 1 else None

    handle = pipe.transformer.transformer_blocks[0].register_forward_hook(poison)
    try:
        with pytest.raises(ConfigError, match="NaN or infinity at step"):
            measure(batches(pipe), GIVEN, QUICK, folder=tmp_path / "p")
    finally:
        handle.remove()
    assert not (tmp_path / "p").exists()


# the command


def run(*arguments):
    with initialize_config_module(command.CONFIGS, version_base="1.3"):
        config = compose("profile", [*SMALL, *arguments])
    command.run_configured(config)


def started(tmp_path, *arguments, launcher=(), **options):
    script = tmp_path / "profile_command.py"
    script.write_text(LAUNCHER)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    call = [*(launcher or [sys.executable]), str(script), *SMALL, *arguments]
    return subprocess.Popen(
        call,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        cwd=tmp_path,
        preexec_fn=interruptible,
        **options,
    )


def test_the_command_profiles_a_shipped_model(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    run("model=flux-digits")
    made = Profile.load(tmp_path / "profiles-local" / "flux-digits-flow-euler")
    assert made.samples == tuple(GIVEN)
    assert made.fingerprint.guidance == reference.spec("flux-digits").guidance
    assert made.facts["settings"]["model"]["name"] == "flux-digits"
    assert made.total == 4
    told = capfd.readouterr().err.replace("\n", " ")
    assert "flux-digits, flow-euler, 4 steps: profile of 2 spans at scope stack in profiles-local" in told
    assert [path.name for path in tmp_path.iterdir()] == ["profiles-local"]
    run("model=flux-digits")  # which is there
    with pytest.raises(ConfigError, match=r"flux-digits-flow-euler holds a profile of other settings: .*\(out=…"):
        run("model=flux-digits", "num_samples=2")
    assert same(Profile.load(tmp_path / "profiles-local" / "flux-digits-flow-euler"), made)


def test_the_command_profiles_a_pipeline_from_a_folder(tmp_path):
    torch.manual_seed(0)
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=5, norm_num_groups=2,
        sample_size=8,
    )  # fmt: skip
    autoencoder = diffusers.AutoencoderKL(
        block_out_channels=(4,), latent_channels=4, norm_num_groups=2, sample_size=8,
        down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
    )  # fmt: skip
    pipe = diffusers.DiTPipeline(transformer, autoencoder, diffusers.DDIMScheduler(clip_sample=False))
    pipe.save_pretrained(tmp_path / "model")
    hub = ["model=hub", f"model.repository={tmp_path / 'model'}", "model.dtype=float32", "model.device=cpu"]
    run(*hub, "model.call={guidance_scale: 3.0}", "scope=block", f"out={tmp_path / 'made'}")
    made = Profile.load(tmp_path / "made")
    assert [span.name for span in made.spans] == [f"transformer_blocks.{i}" for i in range(5)]
    assert made.fingerprint.guidance == 3.0
    assert made.samples == tuple(GIVEN)
    assert made.arrays["sensitivity"].shape == (3, 4)
    with pytest.raises(ConfigError, match="takes class labels"):
        run(*hub, "prompts=builtin")


@pytest.mark.slow
def test_two_processes_give_the_profile_of_one(tmp_path):
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    launcher += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    process = started(tmp_path, f"out={tmp_path / 'two'}", launcher=launcher)
    told = process.communicate(timeout=300)[0]
    assert process.returncode == 0, told
    assert not (tmp_path / "two.partial").exists()
    run(f"out={tmp_path / 'one'}")
    assert same(Profile.load(tmp_path / "two"), Profile.load(tmp_path / "one"))


@pytest.mark.slow
def test_ctrl_c_keeps_what_is_done(tmp_path):
    process = started(tmp_path, f"out={tmp_path / 'p'}", "num_samples=60", "steps=50", start_new_session=True)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if len(list((tmp_path / "p.partial").glob("*/batch-*.safetensors"))) > 1:
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    told = process.communicate(timeout=60)[0]
    assert process.returncode == 130, told
    assert "goes on from there" in told
    assert len(list((tmp_path / "p.partial").glob("*/batch-*.safetensors"))) > 1
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("modl=dit-digits", "Did you mean 'model'"),
        ("model=dit-digit", "Did you mean 'dit-digits'"),
        ("num_sample=4", "Did you mean 'num_samples'"),
        ("sensitivity.step=4", "Did you mean 'sensitivity.steps'"),
        ("model=dit-digits,unet-digts", "Did you mean 'unet-digits'"),
    ],
)
def test_misspelled_keys_are_told_with_a_suggestion(override, message):
    with pytest.raises(ConfigError, match=message):
        hydra_app.check("profile", [override], command.GROUPS)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["steps=0"], "steps must be a whole number of at least 1"),
        (["num_samples=none"], "num_samples must be a whole number"),
        (["threads=0"], "threads must be"),
        (["batch=0"], "batch must be"),
        (["memory=0"], "memory must be a number of GiB above 0"),
        (["sensitivity.samples=-1"], "sensitivity_samples must be"),
        (["sensitivity=null"], "sensitivity is a group with samples and steps, not None"),
        (["prompts.first_seed=null"], "first_seed must be a whole number"),
        (["model=unet-digits", "depth=0"], "depth must be a whole number of at least 1, not 0"),
        (["model=unet-digits", "depth=a"], "depth must be a whole number of at least 1, not 'a'"),
        (["sampler=unipc"], "has the samplers"),
        (["prompts=builtin"], "takes class labels"),
        (["model=random", "model.name=dit-xl-2"], "kind of model"),
        (["scope=blok"], "Did you mean 'block'"),
        (["attention=true"], "block by block"),
        (["attention_top=0"], "attention_top must be a share"),
        (["attention_offset=-1"], "attention_offset must be"),
        (["foreground=motion"], "set attention as well"),
        (["foreground=motion", "attention=true", "scope=block"], "motion needs videos"),
        (["foreground=mask.txt"], r"an \.npy file"),
        (["foreground=nowhere.npy"], r"nowhere\.npy cannot be read"),
    ],
)
def test_what_cannot_work_is_told(tmp_path, overrides, message):
    with pytest.raises(ConfigError, match=message):
        run(f"out={tmp_path / 'p'}", *overrides)
    assert list(tmp_path.iterdir()) == []


def test_a_guidance_that_is_no_number():
    with pytest.raises(ConfigError, match=r"model\.call\.guidance_scale must be a number, not 'high'"):
        command.guidance_of({"kind": "hub", "call": {"guidance_scale": "high"}})


def test_brackets_in_a_folder_are_no_markup(monkeypatch, capfd):
    made = SimpleNamespace(spans=(1,), scope="stack")
    monkeypatch.setattr(command, "measured", lambda *given: made)
    run("out='some[bold]where'")
    assert "in some[bold]where" in " ".join(capfd.readouterr().err.split())


@pytest.mark.parametrize("key", ["prompts.n", "+prompts.n_video"])
@pytest.mark.parametrize(("module", "name"), [(command, "profile"), (fit_signal, "fit_signal")])
def test_a_number_of_prompts_that_would_do_nothing_is_told(module, name, key):
    told = rf"^{key.strip('+')} does nothing here: .* is for {module.COUNTED_BY} to say"
    with pytest.raises(ConfigError, match=told):
        getattr(module, name)([f"{key}=4"])


def test_errors_of_the_command_are_messages(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        command.profile([*SMALL, "sampler=unipc", "out=p"])
    assert ended.value.code == 1
    told = capfd.readouterr().err
    assert "Error: dit-digits has the samplers" in told
    assert "Traceback" not in told
    assert list(tmp_path.iterdir()) == []
