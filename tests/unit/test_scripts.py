"""Every script in scripts/ can be imported: what it uses of the package is there."""

import runpy
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.mark.parametrize("script", sorted(SCRIPTS.glob("*.py")), ids=lambda path: path.stem)
def test_it_imports(script, monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)  # where Python finds one script from another
    assert "main" in runpy.run_path(str(script), run_name="imported")
