"""Windows that grow: schedules by hand, and the numbers of steps that are published."""

import math

import pytest

from diffusion_cache.context import PassState, Step
from diffusion_cache.errors import ConfigError
from diffusion_cache.policies import GrowingWindow, Guarded, Guards


def computed(policy, total, **guards):
    schedule = Guarded(policy, Guards(**guards)).schedule(total)
    return "".join(str(int(row[0][0])) for row in schedule.compute)


@pytest.mark.parametrize(
    ("window", "growth", "expected"),
    [
        (2, 0.0, "1010101010"),
        (2, 1.0, "1010010001000010"),
        (2, 0.5, "1010100100100010"),  # windows of 2, 2.5, 3, 3.5, 4
        (1.5, 0.5, "1111"),  # nothing is reused that could make it grow
        (1, 0.0, "1111"),
        (5, 3.0, "10000100000001"),
    ],
)
def test_schedules(window, growth, expected):
    assert computed(GrowingWindow(window, growth), len(expected)) == expected


@pytest.mark.parametrize(("growth", "count"), [(0.75, 14), (3.0, 10)])
def test_published_numbers_of_steps(growth, count):
    """After five steps of warm-up, as the authors count: the window grows with every step that it computes."""
    window, reused, expected = 2.0, 0, "11111"
    for _ in range(45):
        compute = (reused + 1) % math.floor(window) == 0
        window, reused = (window + growth, 0) if compute else (window, reused + 1)
        expected += str(int(compute))
    assert expected.count("1") == count
    assert computed(GrowingWindow(growth=growth), 50, warmup=5) == expected


def test_steps_that_guards_compute_do_not_make_it_grow():
    assert computed(GrowingWindow(2, 1.0), 12, warmup=4) == "111101001000"
    assert computed(GrowingWindow(4, 1.0), 12, max_consecutive=1) == "101010101010"


def test_steps_that_guards_reuse_where_no_window_leaves_any():
    state = PassState(last_computed=3, reused=2)
    assert GrowingWindow(1.0, 0.0).decide(Step(4, 10, 4, None, "", (slice(None),)), None, state).compute


@pytest.mark.parametrize("options", [dict(window=0.5), dict(growth=-1.0), dict(window=math.inf), dict(growth=math.nan)])
def test_bad_options(options):
    with pytest.raises(ConfigError, match="window must be at least 1"):
        GrowingWindow(**options)
