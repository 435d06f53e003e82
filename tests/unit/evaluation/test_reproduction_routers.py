import importlib.util
from pathlib import Path

import pytest

from diffusion_cache.errors import ConfigError
from diffusion_cache.evaluation.reproduction import routers
from diffusion_cache.evaluation.reproduction.routers import RouterClaim, checked, is_of_routers


def row(method, error, compute=0.5, seed=0, **costs):
    return {
        "model": "dit-digits", "steps": 20, "compute_asked": 0.5, "seed": seed, "method": method,
        "error": error, "compute": compute, **costs,
    }  # fmt: skip


@pytest.fixture
def claims(monkeypatch):
    where = (("dit-digits", 20, 0.5),)
    order = routers._ordered("a", "b")
    made = [RouterClaim("order", "harmonica", "Less error.", ("a", "b"), where, order, "<", "One is odd.")]
    monkeypatch.setattr(routers, "CLAIMS", made)
    return made


def test_a_claim_is_read_off_each_seed(claims):
    (found,) = checked([row("a", 0.1), row("b", 0.2), row("a", 0.3, seed=1), row("b", 0.2, seed=1)])
    assert found["name"] == "routers.order"
    assert is_of_routers(found)
    assert found["held"] == [True, False]
    assert found["seeds"] == [0, 1]
    assert found["reason"] == "One is odd."
    assert found["ours"] == ["a 0.1000, b 0.2000", "a 0.3000, b 0.2000"]
    assert found["equal_compute"][0] == "a 0.500, b 0.500 of the uncached FLOPs"
    assert found["figures"][1] == {"dit-digits-20-0.5-a": 0.3, "dit-digits-20-0.5-b": 0.2}


def test_what_spends_more_is_no_better(claims):
    assert checked([row("a", 0.1, compute=0.505), row("b", 0.2)])[0]["holds"]
    assert not checked([row("a", 0.1, compute=0.52), row("b", 0.2)])[0]["holds"]
    assert checked([row("a", 0.1), row("b", 0.2, compute=0.6)])[0]["holds"]


def test_nothing_is_said_without_all_methods(claims):
    assert checked([row("a", 0.1), row("b", 0.2, seed=1)]) == []


def test_a_failure_without_a_reason_is_told(claims, monkeypatch):
    monkeypatch.setattr(routers, "CLAIMS", [claims[0]._replace(reason="")])
    with pytest.raises(ConfigError, match="look into it"):
        checked([row("a", 0.3), row("b", 0.2)])


def test_costs_need_both_to_be_less():
    cost = next(claim for claim in routers.CLAIMS if claim.name == "cost")
    dear = {"cpu_seconds": 20.0, "peak_bytes": 2**21}
    cheap, slow = {"cpu_seconds": 10.0, "peak_bytes": 2**20}, {"cpu_seconds": 30.0, "peak_bytes": 2**20}
    assert cost.holds({"harmonica": cheap, "l2c": dear})
    assert not cost.holds({"harmonica": slow, "l2c": dear})


@pytest.fixture(scope="module")
def script():
    path = Path(__file__).parents[3] / "scripts" / "compare_routers.py"
    spec = importlib.util.spec_from_file_location("compare_routers", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_trainings_are_averaged_and_the_best_comes_first(script):
    rows = [row("a", 0.2), row("a", 0.4, seed=1), row("b", 0.1, cpu_seconds=7.0), row("b", 0.5, compute_asked=0.75)]
    lines = script.mean_table(rows).splitlines()[-3:]
    assert [line.split(" | ")[2:] for line in lines] == [
        ["0.5", "`b`", "1", "0.500", "0.1000", "7 |"],
        ["0.5", "`a`", "2", "0.500", "0.3000", " |"],
        ["0.75", "`b`", "1", "0.500", "0.5000", " |"],
    ]


def test_the_methods_of_claims_are_rows_of_the_comparison(script):
    compared = script.settings()
    for claim in routers.CLAIMS:
        for model, steps, compute in claim.where:
            made = [methods for setting, methods in compared.items() if setting[:3] == (model, steps, compute)]
            assert any(set(claim.methods) <= set(methods) for methods in made), claim.name
