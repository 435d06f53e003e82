"""What the contracts run over: every registered policy × forecaster × scope it declares × shipped model.

That is CASES and PAIRS with DIFFUSION_CACHE_ALL_CASES=1 (`make contracts`). Else CASES still have every policy and
every forecaster at every scope of every model, and PAIRS every policy with every forecaster as well.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from diffusion_cache import models, reference, registry
from diffusion_cache.context import SCOPES, Needs, NoiseLevels, Policy, Verdict

STEPS = 6
NOISE_LEVELS = NoiseLevels((2.0 * step - STEPS for step in range(STEPS)), "flow")  # for loops of one's own

# options that make a policy reuse something in a run of STEPS steps, and options that make it compute every step, where
# it decides by its own decisions; a newly registered policy must be listed here
REUSING: dict[str, dict[str, Any]] = {
    "interval": {"every": 2},
    "centered": {"every": 2},
    "mask": {"mask": "101010"},
    "first_block": {"threshold": 10.0, "max_consecutive": 2},
    "dicache": {"threshold": 10.0, "max_consecutive": 2},
    "easycache": {"threshold": 10.0, "max_consecutive": 2},
    "growing_window": {"window": 2.0, "growth": 1.0},
    "magcache": {"ratios": (1.0,) * STEPS, "max_skip": 1},
    "pab": {"spatial": 2, "temporal": 2, "cross": 2, "feed_forward": 2},
    "ra_cfg": {"threshold": 1000.0, "guidance": 1.5, "max_consecutive": 2},
    "racer": {"every": 2, "threshold": 0.1},
    "seacache": {"threshold": 10.0, "max_consecutive": 2},
    "sencache": {"threshold": 10.0, "max_consecutive": 2},
    "speca": {"threshold": 10.0, "max_consecutive": 2},
    "teacache": {"threshold": 10.0, "max_consecutive": 2},
}
COMPUTING: dict[str, dict[str, Any]] = {
    "interval": {"every": 1},
    "centered": {"every": 1},
    "mask": {"mask": "1"},
    "first_block": {"threshold": 0.0},
    "dicache": {"threshold": 0.0},
    "easycache": {"threshold": 0.0},
    "growing_window": {"window": 1.0, "growth": 0.0},
    "magcache": {"ratios": (1.0,) * STEPS, "max_skip": 0},
    "pab": {"spatial": 1, "temporal": 1, "cross": 1, "feed_forward": 1},
    "ra_cfg": {"guidance": 1.5, "threshold": 0.0},
    "racer": {"every": 1},
    "seacache": {"threshold": 0.0},
    "sencache": {"threshold": 0.0},
    "speca": {"warmup": STEPS},
    "teacache": {"threshold": 0.0},
}


# forecasters that serve some samplers only, and say so elsewhere
MODELS_OF = {"average_velocity": {"flux-digits", "wan-moving-digits"}}


@dataclass(frozen=True)
class Case:
    model: str
    policy: str
    forecaster: str
    scope: str

    def __str__(self) -> str:
        return f"{self.model}-{self.policy}-{self.forecaster}-{self.scope}"

    def options(self, table: dict[str, dict[str, Any]] = REUSING) -> dict[str, Any]:
        return dict(policy=self.policy, forecaster=self.forecaster, scope=self.scope, **table[self.policy])

    @property
    def is_exact(self) -> bool:
        """Whether what stays the same is reproduced."""
        return registry.forecasters.get(self.forecaster)().exact_degree is not None


def scopes_of(model: str) -> set[str]:
    denoiser = reference.spec(model).build()
    return {"denoiser", "block", "branch", "cut" if models.default_scope(denoiser) == "cut" else "stack"}


ALL_CASES = [
    Case(model, policy, forecaster, scope)
    for model in reference.MODELS
    for available in [scopes_of(model)]
    for policy in registry.policies.names()
    for forecaster in registry.forecasters.names()
    if model in MODELS_OF.get(forecaster, {model})
    for scope in sorted(registry.policies.get(policy).scopes & registry.forecasters.get(forecaster).scopes & available)
]


def covered(case: Case) -> set[tuple[str, ...]]:
    """What a case is an example of."""
    return {(case.policy, case.scope, case.model), (case.forecaster, case.scope, case.model)}


def covered_with_pairs(case: Case) -> set[tuple[str, ...]]:
    return covered(case) | {(case.policy, case.forecaster)}


def covering(cases: list[Case], covered: Callable[[Case], set[tuple[str, ...]]]) -> list[Case]:
    """A few of the cases that cover whatever all of them do, chosen greedily."""
    missing = set().union(*map(covered, cases))
    chosen = []
    while missing:
        best = max(cases, key=lambda case: len(covered(case) & missing))
        chosen.append(best)
        missing -= covered(best)
    return sorted(chosen, key=str)  # by model, each of which is loaded once


CASES = PAIRS = ALL_CASES
if not os.environ.get("DIFFUSION_CACHE_ALL_CASES"):
    CASES, PAIRS = covering(ALL_CASES, covered), covering(ALL_CASES, covered_with_pairs)


class Subject:
    """A shipped model's pipeline with its uncached samples, and the inputs of one real denoiser call."""

    def __init__(self, name: str):
        self.name = name
        self.pipe = reference.load(name)
        self.denoiser = getattr(self.pipe, reference.spec(name).denoiser)
        calls = []
        hook = self.denoiser.register_forward_pre_hook(
            lambda module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
        )
        self.uncached = self.generate()
        hook.remove()
        self.calls = calls

    def generate(self, steps: int = STEPS, labels=(3, 8), seeds=(5, 6)) -> torch.Tensor:
        return reference.images(self.name, self.pipe(**reference.inputs(self.name, labels, seeds, steps=steps)))

    def call(self, index: int = 2) -> torch.Tensor:
        args, kwargs = self.calls[index]
        with torch.no_grad():
            output = self.denoiser(*args, **kwargs)
        return output[0]


@dataclass(frozen=True)
class Spy(Policy):
    """Computes always, and keeps what it was told."""

    steps: list = field(default_factory=list)
    signals: list = field(default_factory=list)

    name: ClassVar[str] = "spy"
    scopes = frozenset(SCOPES)

    @property
    def needs(self):
        return Needs(signals=("probe_residual",), probe=1)

    def measure(self, signals, past):
        self.signals.append(signals["probe_residual"].shape)
        return signals["probe_residual"].flatten(1).mean(1)

    def decide(self, step, value, state):
        if step not in self.steps:  # asked for every sample
            self.steps.append(step)
        return Verdict(True, "spying")
