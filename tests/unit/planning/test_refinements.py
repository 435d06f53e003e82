"""What plans for language models state."""

from types import SimpleNamespace

import pytest
import torch

from diffusion_cache.measure import PairedTiming
from diffusion_cache.plan import Plan
from diffusion_cache.planning import refinements
from diffusion_cache.schedule import Schedule


@pytest.mark.parametrize(
    ("device", "ratio"), [(torch.device("cpu"), 2.0), ("cpu", 2.0), (torch.device("cuda", 0), 4.0)]
)
def test_speed_is_cpu_time_only_where_the_cpu_does_the_work(monkeypatch, device, ratio):
    timing = PairedTiming(a_wall=(4.0, 8.0, 3.0), b_wall=(1.0, 2.0, 1.0), a_cpu=(2.0, 4.0, 1.0), b_cpu=(1.0, 2.0, 1.0))
    monkeypatch.setattr(refinements, "paired", lambda *given: timing)
    monkeypatch.setattr(refinements, "_same", lambda *given: torch.ones(1))
    plan = Plan("two", "block", None, "auto", Schedule.uniform([True, False]), ())
    found = refinements._measured(SimpleNamespace(device=device), plan, [{}], [torch.zeros(1, 4)])
    assert (found.speed.ratio, found.speed.device) == (ratio, str(device))
