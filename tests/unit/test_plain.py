import json
import math

import numpy as np
import pytest
import torch

from diffusion_cache.errors import ConfigError
from diffusion_cache.plain import Fields, integer, number, plain_json, rounded_down, rounded_up, text, tuple_of


def test_plain_json():
    value = {1: (torch.tensor([1.0, float("inf")]), {"b", "a"}), "x": [float("nan"), None, True], "y": len}
    plain = plain_json(value)
    assert plain == {"1": [[1.0, "inf"], ["a", "b"]], "x": ["nan", None, True], "y": "builtin_function_or_method"}
    json.dumps(plain, allow_nan=False)


@pytest.mark.parametrize(
    ("read", "value"),
    [
        (text, 1),
        (text, None),
        (text, "\ud800"),
        (integer, 1.0),
        (integer, True),
        (integer, 10**400),
        (number, "1"),
        (number, float("inf")),  # only spelt out: JSON has no such number
        (number, 10**400),
        (number, True),
        (tuple_of(number), "12"),
        (tuple_of(number), [1.0, None]),
    ],
)
def test_readers_refuse_what_they_do_not_expect(read, value):
    with pytest.raises(ConfigError, match="the place"):
        read(value, "the place")


def test_readers_return_what_they_expect():
    assert text("ü", "") == "ü"
    assert integer(-3, "") == -3
    assert number(2, "") == 2.0
    assert tuple_of(number)([1.5, "-inf"], "") == (1.5, -float("inf"))
    fields = Fields({"a": 1}, "here")
    assert fields("a", integer) == 1
    fields.end()


@pytest.mark.parametrize(
    ("value", "down", "up"),
    [(30.0155, 30.01, 30.02), (2.0, 2.0, 2.0), (-0.001, -0.01, 0.0), (np.nextafter(2.01, 0), 2.0, 2.01)],
)
def test_bounds_hold_as_they_are_shown(value, down, up):
    assert (rounded_down(value), rounded_up(value)) == (down, up)
    assert rounded_down(-math.inf) == -math.inf


def test_fields_must_be_all_there_and_no_more():
    with pytest.raises(ConfigError, match="here: b is missing"):
        Fields({"a": 1}, "here")("b", integer)
    with pytest.raises(ConfigError, match="here: unknown 'a'"):
        Fields({"a": 1}, "here").end()
    with pytest.raises(ConfigError, match="expected an object"):
        Fields([], "here")
