"""Summaries as they are shown."""

import io

import pytest
from rich.console import Console

from diffusion_cache.summaries import Inspection, SpanInfo, Summary

TEXT = "a[b][/c]"
SHOWN = {
    "summary": Summary(TEXT, ("stack",), 1, None, (), 0, 0, (TEXT,)),
    "inspection": Inspection(TEXT, (SpanInfo(TEXT, TEXT, TEXT, 1, 1, None),), 1),
}


@pytest.mark.parametrize(("name", "times"), [("summary", 2), ("inspection", 4)])
def test_brackets_are_no_markup(name, times):
    assert str(SHOWN[name]).count(TEXT) == times
    file = io.StringIO()
    Console(file=file, width=200).print(SHOWN[name])
    assert file.getvalue().count(TEXT) == times
