"""The shipped model of streams, what is claimed of streams with it, and the page."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffusion_cache import ConfigError, reference
from diffusion_cache.chunks import Stream
from diffusion_cache.evaluation.reproduction import SeedSet, seed_sets, streams
from diffusion_cache.reference import rolling

ROOT = Path(__file__).parents[2]
PACE = dict(frames=3, steps=4, lag=2)  # 8 calls


@pytest.fixture(scope="module")
def model():
    return rolling.load()


def test_weights_are_small_16_bit_and_finite():
    path = reference.WEIGHTS / rolling.NAME / "model.safetensors"
    assert path.stat().st_size <= 3e6
    state = load_file(path)
    assert {tensor.dtype for tensor in state.values()} == {torch.float16}
    assert all(tensor.isfinite().all() for tensor in state.values())


def test_card_says_how_it_was_made_and_that_it_passed():
    card = reference.card(rolling.NAME)
    assert {"steps", "batch", "seconds", "hardware", "loss"} <= set(card["training"])
    assert card["gate_samples"] == 200
    assert card["class_accuracy"] >= rolling.GATE


def test_digits_bounce_inside_the_frame():
    videos, labels = rolling.bouncing_digits(4, 30, torch.Generator().manual_seed(0))
    assert videos.shape == (4, 1, 30, 16, 16)
    ink = ((videos + 1) / 2).clamp(min=0.5).sub(0.5)
    totals = ink.sum(dim=(1, 3, 4))
    assert (totals.amin(dim=1) > 0.6 * totals.amax(dim=1)).all()  # a digit that left would take its ink along
    columns = (ink.sum(dim=(1, 3)) * torch.arange(16)).sum(-1) / totals
    assert ((columns.diff(dim=1) > 0.1).any(dim=1) & (columns.diff(dim=1) < -0.1).any(dim=1)).any()
    assert labels.shape == (4,)


@torch.no_grad()
def test_training_has_taught_levels_that_differ(model):
    """On batches that it was not trained on, against the model that its training started from."""
    losses = [[rolling.loss(each, 8, seed).item() for seed in (10_001, 10_002)] for each in (model, rolling.build())]
    assert sum(losses[0]) < 0.8 * sum(losses[1])


def test_a_video_is_its_seed_and_its_first_frames_are_finished(model):
    videos = rolling.generate(model, [3, 7], [1, 2], **PACE)
    assert videos.shape == (2, 3, 1, 16, 16)
    assert torch.allclose(rolling.generate(model, [7], [2], **PACE)[0], videos[1], atol=1e-5)
    assert not torch.equal(videos[0], videos[1])


def test_the_loop_tells_its_steps_and_chunks(model):
    class Told:
        steps, held = 0, []

        def next_step(self):
            self.steps += 1

        def chunks(self, numbers):
            self.held.append((numbers[0], len(numbers)))

    told = Told()
    rolling.generate(model, [3], [1], told, True, **PACE)
    assert told.steps == 8
    # the window moves when its second frame is clean, two calls after the first was
    assert told.held == [(0, rolling.WINDOW)] * 6 + [(1, rolling.WINDOW)] * 2


def test_more_steps_than_the_window_holds_are_refused(model):
    with pytest.raises(ConfigError, match="a lag of at least 3"):
        rolling.generate(model, [3], [1], frames=3, steps=13, lag=2)


def test_a_claim_compares_at_equal_calls(monkeypatch):
    seeds, stream = seed_sets()[0], streams.Rolled(torch.zeros(1), 30.0, 5, 10, 100)
    monkeypatch.setattr(streams, "cached", lambda seeds, stream_: stream)
    assert streams.outcome(seeds, "other", 29.0, 5).holds
    assert not streams.outcome(seeds, "other", 31.0, 5).holds
    assert not streams.outcome(seeds, "other", 29.0, 4).holds


def test_a_claim_of_one_short_video(monkeypatch):
    """Everything kept is more, and gives the same video."""
    monkeypatch.setattr(streams, "FRAMES", 3)
    alone = SeedSet(99, (), seed_sets()[0].reporting[:1])
    found = streams.dropping_what_has_left_changes_nothing(alone)
    assert found.holds
    assert found.equal_compute == "16 and 16 of 32 calls computed"
    assert streams.cached(alone, Stream()).psnr > 20


@pytest.fixture
def script():
    path = ROOT / "scripts" / "measure_streams.py"
    spec = importlib.util.spec_from_file_location("measure_streams", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_rows_of_other_settings_stay_if_they_were_measured_alike(script, tmp_path, monkeypatch):
    out = tmp_path / "streams.json"

    def run(samples, pairs, *settings):
        monkeypatch.setattr(
            script, "measure", lambda setting, samples, pairs, model: [{"setting": setting, "samples": samples}]
        )
        given = ["--samples", str(samples), "--pairs", str(pairs), "--out", str(out)]
        monkeypatch.setattr("sys.argv", ["", *given, "--settings", *settings])
        script.main()
        return [(row["setting"], row["samples"]) for row in json.loads(out.read_text())["results"]]

    monkeypatch.setattr(script, "table", lambda report: [])
    run(2, 1, "window")
    assert run(2, 1, "pipeline") == [("window", 2), ("pipeline", 2)]
    for samples, pairs, said in ((2, 3, "pairs"), (4, 1, "samples")):
        with pytest.raises(SystemExit, match=f"other {said}: measure all"):
            run(samples, pairs, "pipeline")
    assert run(4, 3, "window", "pipeline") == [("window", 4), ("pipeline", 4)]


def test_the_page_shows_what_was_measured(script):
    report = json.loads((ROOT / "results" / "streams.json").read_text())
    page = (ROOT / "docs" / "streams.md").read_text().splitlines()
    assert set(script.table(report)) <= set(page)
    assert all(row["samples"] >= 16 for row in report["results"])
