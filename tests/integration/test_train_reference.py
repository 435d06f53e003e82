"""Training a reference model: what a checkpoint is gone on from."""

import importlib.util
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

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


def trained(script, folder, *overrides, loss=loss):
    folder.mkdir(exist_ok=True)
    config = OmegaConf.merge(SETTINGS, OmegaConf.from_dotlist(list(overrides)))
    return script.train(lambda: torch.nn.Linear(3, 1), loss, config, folder)[0].state_dict()


def test_a_stopped_training_goes_on_exactly(script, tmp_path):
    class Stop(Exception):
        pass

    def stopping(model, seed):
        if seed == 3:
            raise Stop
        return loss(model, seed)

    whole = trained(script, tmp_path / "whole")
    with pytest.raises(Stop):
        trained(script, tmp_path / "stopped", loss=stopping)
    resumed = trained(script, tmp_path / "stopped", "threads=2")  # on which nothing depends
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())


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
