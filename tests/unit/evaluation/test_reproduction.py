import json
from dataclasses import replace

import pytest

from diffusion_cache import __version__
from diffusion_cache.errors import ConfigError
from diffusion_cache.evaluation.reproduction import CLAIMS, Outcome, claim, claims, load_claims, seed_sets
from diffusion_cache.evaluation.reproduction.bench import Bench
from diffusion_cache.evaluation.reproduction.publish import markdown, merged, publish, run


@pytest.fixture
def made(monkeypatch):
    """Two claims of this module; the second one fails on the seeds of set 1."""
    monkeypatch.setattr("diffusion_cache.evaluation.reproduction.claims.CLAIMS", CLAIMS.copy())
    asked = []

    def holding(seeds):
        asked.append(seeds.index)
        return Outcome(f"{seeds.index} > -1", "same", True, {"index": float(seeds.index)})

    def failing(seeds):
        return Outcome(f"{seeds.index} | 1", "same", seeds.index != 1, {})

    claim(system="one", claim="Holds.")(holding)
    claim(system="two", claim="Fails.", published="2×", reason="Set 1 is odd.")(failing)
    found = [claims.CLAIMS[f"test_reproduction.{name}"] for name in ("holding", "failing")]
    return found, asked


def test_seed_sets_are_disjoint_and_fitting_is_apart():
    sets = seed_sets()
    seeds = [seed for each in sets for seed in (*each.fitting, *each.reporting)]
    assert len(sets) == 3
    assert len(set(seeds)) == len(seeds)
    assert all(min(each.fitting) >= 100_000 > max(each.reporting) for each in sets)


def test_rows_and_page(made, tmp_path):
    rows = run(made[0], seed_sets(), tmp_path)
    assert [row["holds"] for row in rows] == [True, False]
    assert rows[1]["held"] == [True, False, True]
    assert rows[0]["reason"] == ""
    page = markdown(rows)
    assert "| one | Holds. | – | 0 > -1<br>1 > -1<br>2 > -1 | same | yes |" in page
    assert "| two | Fails. | 2× | 0 \\| 1<br>1 \\| 1<br>2 \\| 1 | same | on 2 of 3 (1) |" in page
    assert "1. Fails. Set 1 is odd." in page


def test_what_stays_is_published_beside_new_rows(made, tmp_path):
    old, new = run(made[0], seed_sets(), tmp_path)
    figures, page = tmp_path / "results" / "reproduction.json", tmp_path / "docs" / "reproduction.md"
    figures.parent.mkdir()
    page.parent.mkdir()
    gone = {**old, "name": "gone"}
    figures.write_text(json.dumps([gone, old]))
    rows = publish(tmp_path, [new], lambda row: row["name"] != "gone")
    assert rows == merged([old], [new]) == json.loads(figures.read_text(encoding="utf-8"))
    assert page.read_text(encoding="utf-8") == markdown(rows)
    assert sorted(path.name for path in figures.parent.iterdir()) == ["reproduction.json"]


def test_outcomes_are_kept(made, tmp_path):
    first = run(made[0], seed_sets(), tmp_path)
    assert run(made[0], seed_sets(), tmp_path) == first
    assert made[1] == [0, 1, 2]


def test_what_an_outcome_was_made_with_is_kept(made, tmp_path):
    (row,) = run(made[0][:1], seed_sets(1), tmp_path)
    (environment,) = row["environments"]
    assert environment["versions"]["diffusion-cache"] == __version__
    assert {"cpu", "gpu", "threads", "git"} < environment.keys()
    (path,) = tmp_path.iterdir()
    kept = json.loads(path.read_text())
    assert kept.pop("environment") == environment
    path.write_text(json.dumps(kept))  # as an earlier version left it
    assert run(made[0][:1], seed_sets(1), tmp_path) == [{**row, "environments": [None]}]
    assert made[1] == [0]


def test_a_failure_without_a_reason_is_told(made, tmp_path):
    unexplained = replace(made[0][1], reason="")
    with pytest.raises(ConfigError, match="does not hold: look into it"):
        run([unexplained], seed_sets(), tmp_path)


def test_an_outcome_of_nan_says_nothing():
    with pytest.raises(ConfigError, match="the figure psnr of an outcome is NaN"):
        Outcome("", "", True, {"psnr": float("nan")})


def test_all_claims_or_those_of_a_system():
    found = [claim.name for claim in load_claims(iter(()))]
    assert found == sorted(CLAIMS)
    assert len(found) > 20
    assert {name.partition(".")[0] for name in (claim.name for claim in load_claims(["bac"]))} == {"bac"}


def test_a_claim_that_there_is_not():
    with pytest.raises(ConfigError, match="Unknown claim"):
        load_claims(["no_such_claim"])


def test_a_bench_measures_what_is_spent():
    bench = Bench("dit-digits", seed_sets()[0], count=2)
    whole = bench.run(policy="interval", every=1)
    half = bench.run(policy="interval", every=2)
    assert (whole.work, whole.nfe) == (1.0, bench.subject.steps)
    assert min(whole.psnr) == 120.0
    assert half.nfe == bench.subject.steps / 2
    assert 0.5 < half.work < 0.55
    assert len(half.psnr) == len(half.error) == 2
    assert 20 < half.mean < 80


def test_a_bench_profiles_its_fitting_samples():
    seeds = seed_sets()[1]
    bench = Bench("dit-digits", seeds, count=2)
    profile = bench.profile("denoiser", sensitivity_samples=0)
    assert [seed for _, seed in profile.samples] == list(seeds.fitting[:2])
    assert bench.profile("denoiser", sensitivity_samples=0) is profile


def test_rows_are_put_beside_those_published():
    published = [{"name": "a.one", "ours": 1}, {"name": "c.one", "ours": 1}]
    assert merged(published, [{"name": "c.one", "ours": 2}, {"name": "b.one", "ours": 2}]) == [
        {"name": "a.one", "ours": 1},
        {"name": "b.one", "ours": 2},
        {"name": "c.one", "ours": 2},
    ]
