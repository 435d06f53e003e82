"""A small profile of a shipped model, with plans that reuse the last computed step's features, for the tests."""

import math
from pathlib import Path

import torch

from diffusion_cache import reference
from diffusion_cache.fingerprint import Fingerprint
from diffusion_cache.models import find_denoisers
from diffusion_cache.plan import Plan
from diffusion_cache.profile import Profile, SpanFacts
from diffusion_cache.schedule import Schedule

COMPUTED = {"three": (0, 2, 4), "two": (0, 3), "one": (0,)}


def plan(name: str, steps: int, computed: tuple[int, ...], **fields: object) -> Plan:
    nodes = torch.full((steps, 1, 1), -1, dtype=torch.int32)
    weights = torch.full((steps, 1, 1, 1), math.nan, dtype=torch.float64)
    for step in set(range(steps)) - set(computed):
        nodes[step] = max(node for node in computed if node < step)
        weights[step] = 1.0
    schedule = Schedule.uniform(step in computed for step in range(steps))
    return Plan(name, "stack", None, "auto", schedule, (), nodes, weights, **fields)


def write_profile(folder: Path, model: str = "dit-digits", sampler: str | None = None, **fields: object) -> Profile:
    """Store and return a profile of six steps, with a plan for each of COMPUTED. fields: of the profile."""
    pipe = reference.load(model, sampler)
    gram = torch.eye(6).expand(1, 1, 6, 6).contiguous()
    given = {
        "fingerprint": Fingerprint.of(pipe, find_denoisers(pipe), steps=6),
        "scope": "stack",
        "depth": None,
        "spans": (SpanFacts("transformer_blocks", "transformer", "stack", "residual", 784, 0.98),),
        "passes": ("all",),
        "row_passes": 1,
        "samples": (("3", 1000),),
        "arrays": {"gram_residual": gram, "gram_output": gram},
        "plans": tuple(plan(name, 6, computed) for name, computed in COMPUTED.items()),
    }
    made = Profile(**{**given, **fields})
    made.save(folder)
    return made
