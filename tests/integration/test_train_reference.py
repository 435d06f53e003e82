"""Training a reference model: what a checkpoint is gone on from, and what is stored."""

import importlib.util
import platform
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from diffusion_cache import reference

SCRIPT = Path(__file__).parents[2] / "scripts" / "train_reference.py"
SETTINGS = {
    "reference": {"name": "tiny", "steps": 4, "batch": 2, "lr": 0.1},
    "seed": 0, "threads": 1, "ema": 0.9, "weight_decay": 0.0, "warmup": 1, "null_fraction": 0.1,
    "checkpoint_every": 2, "device": "cpu",
}  # fmt: skip


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("train_reference", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def loss(model, seed):
    given = torch.randn(2, 3, generator=torch.Generator().manual_seed(seed))
    return model(given).square().mean()


def configured(*overrides):
    return OmegaConf.merge(SETTINGS, OmegaConf.from_dotlist(list(overrides)))


def trained(script, folder, *overrides, loss=loss):
    folder.mkdir(exist_ok=True)
    model, facts = script.train(lambda: torch.nn.Linear(3, 1), loss, configured(*overrides), folder)
    return model.state_dict(), facts


def test_a_stopped_training_goes_on_exactly(script, tmp_path):
    class Stop(Exception):
        pass

    def stopping(model, seed):
        if seed == 3:
            raise Stop
        return loss(model, seed)

    whole, _ = trained(script, tmp_path / "whole")
    with pytest.raises(Stop):
        trained(script, tmp_path / "stopped", loss=stopping)
    resumed, facts = trained(script, tmp_path / "stopped", "threads=2")  # on which nothing depends
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())
    ran = f"CPU {platform.machine()}, 1 thread(s); CPU {platform.machine()}, 2 thread(s)"
    assert (facts["hardware"], facts["torch"]) == (ran, torch.__version__)
    # a card that is written later is of the same training
    assert trained(script, tmp_path / "stopped", "threads=3")[1]["hardware"] == ran


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("seed=1", r"seed 0 \(now 1\): delete it"),
        ("reference.lr=0.2", r"lr 0\.1 \(now 0\.2\)"),
        ("reference.batch=4", r"batch 2 \(now 4\)"),
        ("reference.steps=8", r"steps 4 \(now 8\)"),
        ("ema=0.5", r"ema 0\.9 \(now 0\.5\)"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused(script, tmp_path, override, said):
    trained(script, tmp_path)
    with pytest.raises(SystemExit, match=said):
        trained(script, tmp_path, override)


@pytest.mark.parametrize("score", [0.4, float("nan"), 0.6])
def test_only_a_model_that_passes_its_gate_is_stored(script, tmp_path, monkeypatch, score):
    monkeypatch.setattr(reference, "WEIGHTS", tmp_path / "weights")
    judged = []

    def judge(model, samples):
        judged.append(model.weight.clone())
        return score

    bare = script.Bare(
        lambda: torch.nn.Linear(3, 1), lambda model, n, seed, device: loss(model, seed), "Data.", "share", judge, 0.5
    )
    config = configured("reference.name=reacher", "gate_samples=7")
    folder = tmp_path / "weights" / "reacher"
    if not score > bare.gate:
        with pytest.raises(SystemExit, match="not stored"):
            script.make_bare(bare, config, tmp_path)
        assert not folder.exists()
        return
    script.make_bare(bare, config, tmp_path)
    stored = load_file(folder / "model.safetensors")["weight"]
    assert torch.equal(stored.float(), judged[0])
    card = reference.card("reacher")
    assert (card["share"], card["gate_samples"], card["training"]["steps"]) == (0.6, 7, 4)
