"""What the contracts run over: every registered policy × forecaster × scope it declares × shipped model.

With DIFFUSION_CACHE_ALL_CASES=1 (`make contracts`) that is all of them, on the models as they are shipped. Else it is
a part, on shorter models: CASES have every policy and every forecaster at every scope of every model, PAIRS every
policy with every forecaster as well, and FEW every policy and every forecaster at every scope and on every model.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import diffusers
import torch
from torch import nn

from diffusion_cache import models, reference, registry
from diffusion_cache.context import SCOPES, Needs, NoiseLevels, Policy, Verdict
from diffusion_cache.plan import Plan
from diffusion_cache.schedule import Schedule

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
    "spaced": {"share": 0.5, "exponent": 0.6},
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
    "spaced": {"share": 1.0},
    "speca": {"warmup": STEPS},
    "teacache": {"threshold": 0.0},
}


# options with which a forecaster promises to reproduce what stays the same
EXACT = {"chebyshev": {"anchored": True}}

# forecasters that serve some samplers only, and say so elsewhere
MODELS_OF = {"average_velocity": {"flux-digits", "wan-moving-digits"}}


# correctors with their options, or a plan instead of policy and forecaster; and where features are kept and as what
MENDING: dict[str, dict[str, Any]] = {
    "affine": {"corrector": "affine", "scale": 0.9, "bias": 0.01},
    "alignment": {"corrector": "alignment"},
    "magnitude": {"corrector": "magnitude", "ratios": (1.0,) + (0.9,) * (STEPS - 1)},
    "shrink": {"corrector": "shrink", "strength": 0.5},
    "plan": {},
}
STORING: dict[str, dict[str, Any]] = {
    "int8": {"cache_dtype": "int8"},
    "fp8-delta": {"cache_dtype": "fp8-delta"},
    "host": {"cache_device": "cpu"},
}
OF_ONE_LENGTH = {"magnitude"}  # serve runs of STEPS steps only
SIGNALS_FROM = {"alignment": "dicache"}
MENDS = {"alignment": "reuse", "magnitude": "reuse"}


@dataclass(frozen=True)
class Case:
    model: str
    policy: str
    forecaster: str
    scope: str
    mending: str = ""
    storing: str = ""

    def __str__(self) -> str:
        return "-".join(filter(None, vars(self).values()))

    def options(self, table: dict[str, dict[str, Any]] = REUSING) -> dict[str, Any]:
        more = MENDING.get(self.mending, {}) | STORING.get(self.storing, {})
        if self.mending == "plan":
            return {"plan": plan(self.scope, row_passes=2 if self.model in ROW_PASSES else 1), **more}
        more |= EXACT.get(self.forecaster, {}) | table[self.policy]
        return dict(policy=self.policy, forecaster=self.forecaster, scope=self.scope, **more)

    def inspected(self) -> dict[str, Any]:
        """What `inspect` is given instead of the options: all but where features are kept, and what keeps as many."""
        if self.mending == "plan":
            return dict(policy="interval", every=2, forecaster="taylor", order=2, scope=self.scope)
        return replace(self, storing="").options()

    @property
    def is_exact(self) -> bool:
        """Whether what stays the same is reproduced."""
        forecaster = registry.forecasters.get(self.forecaster)
        return forecaster(**EXACT.get(self.forecaster, {})).exact_degree is not None


ROW_PASSES = {"dit-digits", "unet-digits"}  # guidance branches are rows of a call, not calls


def plan(scope: str, row_passes: int) -> Plan:
    """Of three computed steps and two guidance branches, with weights of each branch's own and some corrections."""
    nodes = torch.full((STEPS, 1, 3), -1, dtype=torch.int32)
    weights = torch.full((STEPS, 2, 1, 3), math.nan, dtype=torch.float64)
    correction = torch.full((STEPS, 2, 1, 2, 1), math.nan, dtype=torch.float64)
    for step, held in {2: (0, 1), 4: (0, 1, 3), 5: (0, 1, 3)}.items():
        first = 3 - len(held)
        nodes[step, 0, first:] = torch.tensor(held)
        weights[step, :, 0] = torch.tensor([[0.0, -0.3, 1.3], [0.0, -0.1 * step, 1 + 0.1 * step]])
        weights[step, :, 0, :first] = math.nan
        if step != 4:
            correction[step, :, 0, :, 0] = torch.tensor([[1.1, 0.02], [0.95, -0.01 * step]])
    schedule = Schedule.uniform(step in (0, 1, 3) for step in range(STEPS))
    depth = 1 if scope == "cut" else None
    return Plan("of two branches", scope, depth, "auto", schedule, (), nodes, weights, correction, row_passes)


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


Covered = Callable[[Case], set[tuple[tuple[str, str], ...]]]


def of_every(*combined: tuple[str, ...]) -> Covered:
    """What a case is an example of: its values of the fields that are combined."""
    return lambda case: {tuple((name, getattr(case, name)) for name in names) for names in combined}


METHODS = "policy", "forecaster"
in_pairs = of_every(*[(kind, of) for kind in METHODS for of in ("scope", "model")], ("scope", "model"))
covered = of_every(*[(kind, "scope", "model") for kind in METHODS])
covered_with_pairs = of_every(*[(kind, "scope", "model") for kind in METHODS], METHODS)


def covering(cases: list[Case], covered: Covered) -> list[Case]:
    """A few of the cases that cover whatever all of them do, chosen greedily."""
    examples = {case: covered(case) for case in cases}
    missing = set().union(*examples.values())
    chosen = []
    while missing:
        best = max(cases, key=lambda case: len(examples[case] & missing))
        chosen.append(best)
        missing -= examples[best]
    return sorted(chosen, key=str)  # by model, each of which is loaded once


# the others, one policy and forecaster each
MIXED = covering(
    [
        Case(model, policy, MENDS.get(mending, "taylor"), scope, mending, storing)
        for model in reference.MODELS
        for available in [scopes_of(model)]
        for mending in MENDING
        for storing in ("", *STORING)
        for policy in [SIGNALS_FROM.get(mending, "interval")]
        for scope in sorted(registry.policies.get(policy).scopes & available)
    ],
    of_every(*[(kind, of) for kind in ("mending", "storing") for of in ("scope", "model")], ("mending", "storing")),
)
WHOLE = bool(os.environ.get("DIFFUSION_CACHE_ALL_CASES"))
if named := os.environ.get("DIFFUSION_CACHE_CASES"):
    ALL_CASES = [case for case in ALL_CASES if str(case) in named.split(",")]
CASES = PAIRS = FEW = ALL_CASES
if not WHOLE:
    FEW, CASES, PAIRS = (covering(ALL_CASES, what) for what in (in_pairs, covered, covered_with_pairs))


def load(name: str) -> Any:
    """A shipped model's pipeline, of the same weights every time.

    Unless WHOLE, with three blocks a stack, for a probe, a span and a tail, or with a tiny UNet.
    """
    pipe = reference.load(name)
    if WHOLE:
        return pipe
    denoiser = getattr(pipe, reference.spec(name).denoiser)
    if models.default_scope(denoiser) == "cut":
        return reference.assemble(name, tiny_unet())
    for stack in denoiser.children():
        if isinstance(stack, nn.ModuleList):
            del stack[3:]
    return pipe


def tiny_unet(seed: int = 0) -> nn.Module:
    """Two levels, untrained, with the inputs of the shipped one."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return diffusers.UNet2DConditionModel(
            sample_size=16,
            in_channels=1,
            out_channels=1,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=64,
            attention_head_dim=2,
            norm_num_groups=8,
        ).eval()


class Subject:
    """A model's pipeline with its uncached samples, and the inputs of one real denoiser call."""

    def __init__(self, name: str):
        self.name = name
        self.pipe = load(name)
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
