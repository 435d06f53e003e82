"""The shipped language model, its task, and the page that shows its caches."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import diffusion_cache as dc
from diffusion_cache import reference
from diffusion_cache.profile import Profile
from diffusion_cache.reference import fill_forward
from diffusion_cache.reference.fill_forward import BLOCK, DIGITS, MASK

ROOT = Path(__file__).parents[2]
SEEDS = list(range(80_000, 80_012))


@pytest.fixture(scope="module")
def pipe():
    return fill_forward.pipeline()


def test_weights_are_small_16_bit_and_finite():
    path = reference.WEIGHTS / fill_forward.NAME / "model.safetensors"
    assert path.stat().st_size <= 1.5e6
    state = load_file(path)
    assert {tensor.dtype for tensor in state.values()} == {torch.float16}
    assert all(tensor.isfinite().all() for tensor in state.values())


def test_card_says_how_it_was_made_and_that_it_passed():
    card = reference.card(fill_forward.NAME)
    assert {"steps", "batch", "seconds", "hardware", "loss"} <= set(card["training"])
    assert card["gate_samples"] == 200
    assert card["exact_match"] >= fill_forward.GATE


def test_a_problem_is_its_seed():
    digits, answers = fill_forward.problems([3, 4])
    assert torch.equal(digits[1], fill_forward.problems([4])[0][0])
    assert not torch.equal(digits[0], digits[1])
    assert digits[0].count_nonzero() < DIGITS / 2
    last = 0
    for digit, answer in zip(digits[0].tolist(), answers[0].tolist(), strict=True):
        last = digit or last
        assert answer == last > 0
    wrong = answers.clone()
    wrong[1, -1] = (wrong[1, -1] + 1) % 10
    assert fill_forward.exact([3, 4], wrong).tolist() == [True, False]


@torch.no_grad()
def test_blocks_are_trained_as_they_are_decoded(pipe, monkeypatch):
    """The logits that the loss is computed from are those of a window with finished blocks and one that is masked."""
    seen, digits = {}, fill_forward.problems([1, 2])[0]

    def drawn(n, generator):
        return digits

    def noted(logits, targets):
        seen["logits"] = logits
        return logits.sum()

    monkeypatch.setattr(fill_forward, "_draw", drawn)
    monkeypatch.setattr(fill_forward.F, "cross_entropy", noted)
    # all answers are masked: a level of one in each of four blocks
    monkeypatch.setattr(torch, "rand", lambda *shape, generator=None: torch.zeros(shape).add_(shape[-1] == 4))
    fill_forward.loss(pipe.model, 2, seed=5)
    trained = seen["logits"].view(2, DIGITS, -1)
    tokens = torch.cat([digits, fill_forward.filled(digits)], dim=1)
    for start in range(0, DIGITS, BLOCK):
        window = tokens[:, : DIGITS + start + BLOCK].clone()
        window[:, -BLOCK:] = MASK
        expected = pipe.model(window).logits[:, -BLOCK:]
        torch.testing.assert_close(trained[:, start : start + BLOCK], expected, rtol=1e-4, atol=1e-4)


def test_it_solves_most_problems_and_prefix_changes_no_answer(pipe):
    expected = pipe(**fill_forward.inputs(SEEDS)).sequences
    # of twelve problems of a model at its gate, fewer are solved once in two hundred times
    assert fill_forward.exact(SEEDS, expected).sum() >= 8
    with dc.cached(pipe, method="prefix"):
        assert torch.equal(pipe(**fill_forward.inputs(SEEDS)).sequences, expected)
        assert dc.summary(pipe).hit_rate > 0.7


@pytest.mark.parametrize("method", ["dkv", "sub_block", "elastic"])
def test_approximate_caches_run_fewer_tokens_and_solve_most_problems(pipe, method):
    with dc.cached(pipe, method="prefix"):
        pipe(**fill_forward.inputs(SEEDS))
        exact = dc.summary(pipe).executed
    with dc.cached(pipe, method=method):
        found = pipe(**fill_forward.inputs(SEEDS)).sequences
        assert dc.summary(pipe).executed < exact
    assert fill_forward.exact(SEEDS, found).sum() >= 8


@pytest.mark.slow
def test_every_line_of_the_page_runs(capsys, monkeypatch, tmp_path):
    page = (ROOT / "docs" / "language.md").read_text()
    example = "".join(re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL))
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(example, "language.md", "exec"), names)
    assert "prefix(): " in capsys.readouterr().out
    assert names["approximate"].shape == names["answers"].shape
    assert [plan.name for plan in Profile.load(tmp_path / "my-fill-forward").plans] == ["nfe-4", "nfe-6"]


@pytest.fixture
def script():
    path = ROOT / "scripts" / "measure_language.py"
    spec = importlib.util.spec_from_file_location("measure_language", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_rows_of_other_methods_stay_if_they_were_measured_alike(script, tmp_path, monkeypatch):
    out = tmp_path / "language.json"

    def run(pairs, *methods):
        row = {"decoding": next(iter(script.DECODING)), "pairs": pairs}
        monkeypatch.setattr(script, "wanted", lambda methods: [(method, "") for method in methods])
        monkeypatch.setattr(script, "measure", lambda method, *_: {"method": f"{method}()", **row})
        monkeypatch.setattr("sys.argv", ["", "--pairs", str(pairs), "--out", str(out), "--methods", *methods])
        script.main()
        return [(row["method"], row["pairs"]) for row in json.loads(out.read_text())["results"]]

    monkeypatch.setattr(script, "table", lambda report: [])
    run(2, "prefix", "dkv")
    assert run(2, "elastic", "dkv") == [("prefix()", 2), ("dkv()", 2), ("elastic()", 2)]
    before = out.read_bytes()
    with pytest.raises(SystemExit, match="other pairs: measure all"):
        run(3, "dkv")
    assert out.read_bytes() == before
    assert run(3, "prefix", "dkv", "elastic") == [("prefix()", 3), ("dkv()", 3), ("elastic()", 3)]


def test_the_page_shows_what_was_measured(script):
    report = json.loads((ROOT / "results" / "language.json").read_text())
    page = (ROOT / "docs" / "language.md").read_text().splitlines()
    lines = script.table(report)
    assert len(lines) == 2 + len(script.METHODS) * len(script.DECODING) + len(script.COUNTS) * len(script.CANDIDATES)
    assert set(lines) <= set(page)
    assert report["samples"] >= 200


def test_the_measurement_at_tiny_size(script):
    row = script.measure("prefix", "all above 0.9", samples=2, pairs=1)
    assert row["same_answers"] == 1
    assert row["exact_match"] == row["uncached_exact_match"]
    assert 0 < row["executed_share"] < 0.3
    assert row["speedup_range"][0] <= row["speedup"] <= row["speedup_range"][1]
