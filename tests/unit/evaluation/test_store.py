import json

import pytest
import torch

from diffusion_cache.errors import ConfigError
from diffusion_cache.evaluation.store import Store, fingerprint, json_safe, write_json
from diffusion_cache.files import read_tensors, write_tensors

CONFIG = {"model": {"name": "m"}, "contender": {"kind": "ours", "every": 2}}


def test_fingerprint_depends_on_values_and_not_on_order():
    assert fingerprint({"a": 1, "b": {"c": 2, "d": 3}}) == fingerprint({"b": {"d": 3, "c": 2}, "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})
    assert len(fingerprint(CONFIG)) == 16


def test_fingerprint_refuses_what_json_cannot_hold():
    with pytest.raises(ConfigError, match="cannot be stored as JSON"):
        fingerprint({"a": object()})


def test_json_has_null_for_infinity(tmp_path):
    assert json_safe({"a": [float("inf"), float("nan"), 1.5]}) == {"a": [None, None, 1.5]}
    write_json(tmp_path / "x.json", {"a": float("-inf")})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": None}
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]  # no draft is left


def test_tensors_come_back_with_their_facts(tmp_path):
    path = tmp_path / "part.safetensors"
    assert read_tensors(path) is None
    write_tensors(path, {"x": torch.arange(3.0)}, {"rows": [{"psnr": float("inf")}]})
    tensors, facts = read_tensors(path)
    assert torch.equal(tensors["x"], torch.arange(3.0))
    assert facts == {"rows": [{"psnr": float("inf")}]}
    path.write_bytes(path.read_bytes()[:20])
    assert read_tensors(path) is None


def test_a_run_is_complete_or_not_there(tmp_path):
    import pyarrow.parquet as pq

    store = Store(tmp_path / "experiment")
    assert not store.is_finished(CONFIG)
    (store.partial(CONFIG) / "part-0of1.safetensors").write_bytes(b"")
    assert not store.is_finished(CONFIG)
    rows = [{"index": 0, "prompt": "3", "seed": 5, "psnr": float("inf")}]
    store.finish(CONFIG, rows, {"n": 1}, {"worst.candidate": torch.zeros(1, 1, 2, 2)}, {})
    assert store.is_finished(CONFIG)
    folder = store.path(CONFIG)
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "environment.json",
        "images.safetensors",
        "rows.parquet",
        "summary.json",
    ]
    assert pq.read_table(folder / "rows.parquet").to_pylist() == rows
    assert not folder.with_suffix(".partial").exists()


def test_a_run_whose_summary_was_deleted_is_made_again(tmp_path):
    store = Store(tmp_path)
    store.finish(CONFIG, [{"index": 0}], {"n": 1}, {}, {})
    (store.path(CONFIG) / "summary.json").unlink()
    assert not store.is_finished(CONFIG)
    store.finish(CONFIG, [{"index": 0}], {"n": 2}, {}, {})
    assert json.loads((store.path(CONFIG) / "summary.json").read_text()) == {"n": 2}


def test_two_processes_cannot_make_one_run(tmp_path):
    first, second = Store(tmp_path), Store(tmp_path)
    with (
        first.claimed(CONFIG),
        pytest.raises(ConfigError, match=r"two sweeps share this folder.*out="),
        second.claimed(CONFIG),
    ):
        pass
    with second.claimed(CONFIG) as folder:
        assert folder.is_dir()


def test_a_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="choose another with out="):
        Store(tmp_path / "file" / "experiment")
