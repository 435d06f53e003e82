import csv
import json
from pathlib import Path

import pytest

from diffusion_cache.errors import ConfigError
from diffusion_cache.evaluation.finalists import COLUMNS, NEEDED, finalists

# kind, method, settings, nfe, speed, mean, p5
PLAN = ("ours", "plan", {"nfe": 25, "plan": "nfe-25"}, 0.5, 2.0, 60.0, 50.0)
BEST = ("ours", "RACER", {"threshold": 0.1}, 0.5, 1.5, 50.0, 40.0)


def summary(folder: Path, *rows: tuple) -> Path:
    path = folder / "summary.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*NEEDED, *COLUMNS])
        writer.writeheader()
        for kind, method, settings, nfe, speed, mean, p5 in rows:
            line = {"model": "dit-digits", "sampler": "ddim", "kind": kind, "method": method, "correct": "true"}
            line |= {"scope": "auto", "settings": json.dumps(settings), "nfe_ratio": nfe}
            line |= {"speed_ratio": speed, "cpu_ratio": speed, "psnr_mean": mean, "psnr_p5": p5}
            writer.writerow(line)
    return path


def kept(folder: Path, *rows: tuple, within: float = 2.0, each: bool = False) -> set[str]:
    found = finalists(summary(folder, PLAN, BEST, *rows), "dit-digits", "ddim", within, each)
    return {method for _, method, *_ in found}


@pytest.mark.parametrize(
    ("row", "stays"),
    [
        (("ours", "near", {}, 0.5, 1.5, 48.1, 30.0), True),
        (("ours", "far", {}, 0.5, 1.5, 47.9, 30.0), False),
        (("ours", "near in its tail", {}, 0.5, 1.5, 30.0, 38.1), True),
        (("ours", "too dear", {}, 0.54, 1.5, 55.0, 45.0), False),
        (("ours", "dear and fast", {}, 0.9, 1.9, 55.0, 45.0), True),
        (("ours", "the best at a third", {}, 0.33, 1.5, 20.0, 10.0), True),
        (("baseline", "fewer steps", {"steps": 25}, 0.5, 1.5, 10.0, 5.0), True),
        (("rival", "theirs", {}, 0.5, 1.5, 10.0, 5.0), True),
        (("ours", "select", {"nfe": 25}, 0.5, 1.5, 50.0, 40.0), False),
    ],
    ids=lambda given: given[1] if isinstance(given, tuple) else "",
)
def test_who_is_run_again(tmp_path, row, stays):
    assert (row[1] in kept(tmp_path, row)) == stays
    assert "RACER" in kept(tmp_path, row)


def test_others_are_compared_with_others_only(tmp_path):
    """A plan that is far ahead leaves none of them out."""
    assert kept(tmp_path) == {"RACER"}
    assert kept(tmp_path, ("ours", "near", {}, 0.5, 1.5, 49.5, 39.0), within=0.0) == {"RACER"}


def test_each_method_at_its_best(tmp_path):
    """At every budget; of ours, each rival and coded plans, and of those that take plans by the prompt."""
    rows = [
        ("ours", "far", {"every": 2}, 0.5, 1.5, 20.0, 10.0),
        ("ours", "far", {"every": 3}, 0.33, 1.5, 15.0, 10.0),
        ("ours", "far", {"every": 4}, 0.33, 1.5, 14.0, 9.0),
        ("ours", "too dear", {}, 0.6, 1.5, 20.0, 10.0),
        ("rival", "theirs", {}, 0.5, 1.5, 12.0, 5.0),
        ("rival", "theirs too", {}, 0.5, 1.5, 10.0, 5.0),
        ("ours", "select", {"nfe": 25}, 0.5, 1.5, 50.0, 40.0),
        ("ours", "plan, coded", {"plan": "nfe-25", "cache_dtype": "int8"}, 0.5, 1.5, 59.0, 49.0),
        ("ours", "plan, coded", {"plan": "nfe-25", "cache_dtype": "fp8"}, 0.5, 1.5, 58.0, 48.0),
    ]
    found = finalists(summary(tmp_path, PLAN, BEST, *rows), "dit-digits", "ddim", 0.0, each=True)
    assert {(method, settings) for _, method, _, settings in found} == {
        ("plan", '{"nfe": 25, "plan": "nfe-25"}'),
        ("RACER", '{"threshold": 0.1}'),
        ("far", '{"every": 2}'),
        ("far", '{"every": 3}'),
        ("theirs", "{}"),
        ("theirs too", "{}"),
        ("select", '{"nfe": 25}'),
        ("plan, coded", '{"cache_dtype": "int8", "plan": "nfe-25"}'),
    }
    assert kept(tmp_path, *rows, within=0.0) == {"RACER", "theirs", "far"}  # of ours, the best at a third


def test_as_fast_as_the_best_plan_is_enough(tmp_path):
    """Not as the fastest one of them."""
    cheap = ("ours", "plan", {"nfe": 15, "plan": "nfe-15"}, 0.3, 3.5, 40.0, 30.0)
    assert "dear and fast" in kept(tmp_path, cheap, ("ours", "dear and fast", {}, 0.9, 1.9, 55.0, 45.0))


def test_bad_summaries_are_told(tmp_path):
    with pytest.raises(ConfigError, match="cannot read"):
        finalists(tmp_path, "dit-digits", "ddim", 2.0)
    path = summary(tmp_path, BEST)
    with pytest.raises(ConfigError, match="no correct runs of dit-digits with dpm"):
        finalists(path, "dit-digits", "dpm++", 2.0)
    path.write_text("model,sampler\n")
    with pytest.raises(ConfigError, match="no column 'kind'"):
        finalists(tmp_path, "dit-digits", "ddim", 2.0)
