"""What is found for a pipeline survives the process; what else lies there does no harm."""

import json
import sys
from pathlib import Path

import pytest

from diffusion_cache.errors import DiffusionCacheWarning
from diffusion_cache.planning import kept as module
from diffusion_cache.planning.kept import Tuned, folder, keep, kept

FOUND = Tuned(0.25, 0.5, 20, 7)


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv(module.VARIABLE, str(tmp_path / "new"))
    return tmp_path / "new"


def test_what_is_kept_is_found_again(place):
    assert kept("a") is None
    assert keep("a", FOUND) == place / "a.json"
    assert kept("a") == FOUND
    assert kept("b") is None
    infinite = Tuned(float("inf"), 0.9, 20, 1)
    keep("a", infinite)
    assert kept("a") == infinite
    assert [path.name for path in place.iterdir()] == ["a.json"]


STORED = {"format": module.FORMAT, "value": 0.25, "reuse": 0.5, "steps": 20, "tried": 7}


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[1]",
        "{" * 20000,
        json.dumps({**STORED, "format": "another"}),
        json.dumps({**STORED, "value": "0.25"}),
        json.dumps({**STORED, "value": "nan"}),
        json.dumps({**STORED, "reuse": 1.5}),
        json.dumps({**STORED, "more": 1}),
        b"\xff\xfe",
    ],
)
def test_what_is_corrupt_or_foreign_is_ignored_and_replaced(place, content):
    place.mkdir()
    (place / "a.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.warns(DiffusionCacheWarning, match=r"a\.json is ignored"):
        assert kept("a") is None
    keep("a", FOUND)
    assert kept("a") == FOUND


def test_it_can_be_switched_off(monkeypatch):
    monkeypatch.setenv(module.VARIABLE, "")
    assert folder() is None
    assert keep("a", FOUND) is None
    assert kept("a") is None


def test_where_nothing_can_be_written_it_says_so(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(module.VARIABLE, str(tmp_path / "file"))
    with pytest.warns(DiffusionCacheWarning, match="cannot be kept"):
        assert keep("a", FOUND) is None


@pytest.mark.parametrize(
    ("platform", "variables", "expected"),
    [
        ("linux", {"XDG_CACHE_HOME": "/x"}, Path("/x/diffusion_cache")),
        ("linux", {}, Path.home() / ".cache/diffusion_cache"),
        ("darwin", {}, Path.home() / "Library/Caches/diffusion_cache"),
        ("win32", {"LOCALAPPDATA": "/l"}, Path("/l/diffusion_cache")),
    ],
)
def test_the_platform_says_where(monkeypatch, platform, variables, expected):
    for name in (module.VARIABLE, "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", platform)
    assert folder() == expected
