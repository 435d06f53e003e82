"""Every sampler that diffusers exports: the clock's step, pass and total are those of the loop that drives it."""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, PNDMScheduler
from torch import nn

import diffusion_cache as dc
from diffusion_cache.engine.clock import begin_index, is_flow, noise_levels, scheduler_total

STEPS = 8

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of numpy, by the schedulers
    pytest.mark.filterwarnings("error::diffusion_cache.errors.DiffusionCacheWarning"),
]


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, hidden_states, shift):
        return hidden_states + torch.tanh(self.linear(self.norm(hidden_states)) + shift)


class Denoiser(nn.Module):
    """Three blocks; widen: predictions per channel. Its outputs are bounded, so that no sampler runs away."""

    def __init__(self, width=6, widen=1):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(width) for _ in range(3))
        self.out = nn.Linear(width, width * widen)

    def forward(self, hidden_states, timestep):
        shift = torch.sin(torch.as_tensor(timestep).double().reshape(-1) / 100).float()
        shift = shift.expand(len(hidden_states)).reshape(-1, *[1] * (hidden_states.ndim - 1))
        for block in self.blocks:
            hidden_states = block(hidden_states, shift)
        return torch.tanh(self.out(hidden_states))


@dataclass(frozen=True)
class Setup:
    """How a sampler differs from most. steps: asked of set_timesteps, for `STEPS` evaluations where it can. times:
    more of its arguments. ends: the list's last entry is where the sample is clean, and is not evaluated. extra: more
    of step's arguments, given scheduler, timesteps, place in them, sample and what step returned last."""

    config: dict[str, Any] = field(default_factory=dict)
    steps: int = STEPS
    times: dict[str, Any] = field(default_factory=dict)
    ends: bool = False
    shape: tuple[int, ...] = (2, 4, 6)
    widen: int = 1
    extra: Callable[..., dict[str, Any]] = lambda scheduler, timesteps, i, x, last: {}


ONE_STAGE = dict(stages=1, stage_range=[0, 1])
SETUPS = {
    "CogVideoXDPMScheduler": Setup(
        extra=lambda scheduler, timesteps, i, x, last: dict(
            old_pred_original_sample=last[1] if last else None, timestep_back=timesteps[i - 1] if i else None
        )
    ),
    "ConsistencyDecoderScheduler": Setup(steps=2),
    "DDPMWuerstchenScheduler": Setup(
        ends=True, extra=lambda scheduler, timesteps, i, x, last: dict(timestep=timesteps[i].expand(len(x)))
    ),
    "HeliosDMDScheduler": Setup(
        ONE_STAGE,
        shape=(2, 3, 2, 2, 6),
        extra=lambda scheduler, timesteps, i, x, last: dict(
            cur_sampling_step=i,
            dmd_noisy_tensor=torch.ones_like(x),
            dmd_sigmas=scheduler.sigmas,
            dmd_timesteps=scheduler.timesteps,
            all_timesteps=timesteps,
        ),
    ),
    "HeliosScheduler": Setup(ONE_STAGE),
    "MiniMaxH3Scheduler": Setup(steps=STEPS + 1),
    "PiflowScheduler": Setup(dict(n_grid=2), widen=2),
    "RFD4ProteinaScheduler": Setup(
        dict(schedule_mode="log", noise_mode="1/t", tsr_k=1.0, tsr_sigma=1.0, tail_steps=2),
        extra=lambda scheduler, timesteps, i, x, last: dict(emit_mask=torch.ones(x.shape[:2], dtype=torch.bool)),
    ),
    "RePaintScheduler": Setup(
        times=dict(jump_n_sample=1),  # else some of its timesteps are steps back, without a call of the denoiser
        extra=lambda scheduler, timesteps, i, x, last: dict(original_image=x, mask=torch.ones_like(x)),
    ),
    "SCMScheduler": Setup(times=dict(intermediate_timesteps=None), ends=True),
}

# no samplers of a continuous sample with one step after each iteration's calls
OTHERS = {
    "AmusedScheduler": "samples tokens",
    "BlockRefinementScheduler": "samples tokens",
    "DiscreteDDIMScheduler": "samples tokens",
    "EntropyBoundScheduler": "samples tokens",
    "VQDiffusionScheduler": "samples tokens",
    "KarrasVeScheduler": "noises the sample before a call and corrects it after another, between the steps",
}


def exported():
    modules = (diffusers, diffusers.schedulers)
    names = {name for module in modules for name in dir(module) if name.endswith("Scheduler")}
    classes = {name: getattr(diffusers.schedulers, name, None) or getattr(diffusers, name) for name in sorted(names)}
    # a class whose requirements are not installed is a placeholder
    return {name: cls for name, cls in classes.items() if not hasattr(cls, "_backends") and hasattr(cls, "step")}


CLASSES = exported()
NAMES = [name for name in CLASSES if name not in OTHERS]


def setup(name):
    return SETUPS.get(name, Setup())


def make(name, **config):
    return CLASSES[name](**setup(name).config | config)


def start(name, scheduler, **times):
    """The timesteps that a loop goes over."""
    given = setup(name)
    scheduler.set_timesteps(**times or dict(num_inference_steps=given.steps, **given.times))
    return scheduler.timesteps[:-1] if given.ends else scheduler.timesteps


def sample(name, scheduler, timesteps, denoise):
    """A user's loop. denoise is told the place in the list beside what the denoiser takes."""
    torch.manual_seed(1)
    given, last = setup(name), None
    x = torch.randn(given.shape)
    for i, t in enumerate(timesteps):
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        arguments = dict(model_output=denoise(i, scaled, t), timestep=t, sample=x, return_dict=False)
        last = scheduler.step(**arguments | given.extra(scheduler, timesteps, i, x, last))
        x = last[0]
    return x


class Counted:
    """Calls the denoiser once or twice an iteration, and counts by itself."""

    def __init__(self, model, passes=1):
        self.model, self.passes, self.calls = model, passes, []

    def __call__(self, i, x, t):
        outputs = []
        for number in range(self.passes):
            self.calls.append((i, str(number)))
            outputs.append(self.model(x if number == 0 else 0.5 * x, t))
        return outputs[0] if len(outputs) == 1 else outputs[1] + 1.5 * (outputs[0] - outputs[1])


def counted(summary):
    return [(record.step, record.pass_name) for record in summary.records]


@torch.no_grad()
def run(name, passes=1, **options):
    """The bare denoiser's sample and, if cached, its summary, and what the loop counted."""
    model, scheduler = Denoiser(setup(name).shape[-1], setup(name).widen), make(name)
    timesteps, denoise = start(name, scheduler), Counted(model, passes)
    if not options:
        return sample(name, scheduler, timesteps, denoise), None, denoise.calls
    with dc.run(model, forecaster="reuse", num_steps=len(timesteps), **options) as cached:
        return sample(name, scheduler, timesteps, denoise), cached.summary(), denoise.calls


# which there are


def test_every_sampler_is_run_or_listed():
    assert OTHERS.keys() <= CLASSES.keys()
    assert SETUPS.keys() <= set(NAMES)
    assert len(NAMES) > 35


def test_samplers_of_tokens_are_listed():
    def samples_tokens(cls):
        sample = inspect.signature(cls.step).parameters.get("sample")
        return sample is not None and "LongTensor" in str(sample.annotation)

    found = {name for name, cls in CLASSES.items() if samples_tokens(cls)}
    assert found == {name for name, reason in OTHERS.items() if reason == "samples tokens"}


def test_karras_ve_takes_other_samples():
    assert {"sample_hat", "sigma_prev"} <= inspect.signature(CLASSES["KarrasVeScheduler"].step).parameters.keys()


# bare denoisers


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_calls_of_a_bare_denoiser_are_counted(name, passes):
    uncached, _, _ = run(name, passes)
    assert uncached.isfinite().all()
    output, summary, calls = run(name, passes, policy="interval", every=1, scope="stack")
    assert torch.equal(output, uncached)
    assert counted(summary) == calls
    assert summary.reused == 0
    for scope in ("stack", "denoiser"):
        output, summary, calls = run(name, passes, policy="interval", every=2, scope=scope)
        assert counted(summary) == calls
        assert summary.total * passes == len(calls)
        assert [record.computed for record in summary.records] == [i % 2 == 0 for i, _ in calls]
        assert output.isfinite().all()


# pipelines


class Loop(DiffusionPipeline):
    """As pipelines are: it may begin in the midst of the schedule, and tells its length in one of several ways."""

    def __init__(self, transformer, scheduler):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)
        self.set_progress_bar_config(disable=True)

    @torch.no_grad()
    def __call__(self, strength=1.0, passes=1, tells="nothing", copies=False, **times):
        name, scheduler = type(self.scheduler).__name__, self.scheduler
        timesteps = start(name, scheduler, **times)
        steps = times.get("num_inference_steps", setup(name).steps)
        first = (steps - int(steps * strength)) * (getattr(scheduler, "order", None) or 1)
        timesteps = timesteps[first:]
        if hasattr(scheduler, "set_begin_index") and strength < 1:
            scheduler.set_begin_index(first)
        if copies:
            timesteps = timesteps.clone()
        denoise = Counted(self.transformer, passes)
        if tells == "attribute":
            self._num_timesteps = len(timesteps)
        if tells == "iterable":
            timesteps = Told(self.progress_bar(timesteps), timesteps)
        if tells in ("attribute", "steps"):
            with self.progress_bar(total=steps):
                sample(name, scheduler, timesteps, denoise)
        else:
            sample(name, scheduler, timesteps, denoise)
        return denoise.calls, len(timesteps)


class Told:
    """Timesteps that are gone over through a progress bar."""

    def __init__(self, bar, timesteps):
        self.bar, self.timesteps = bar, timesteps

    def __iter__(self):
        return iter(self.bar)

    def __len__(self):
        return len(self.timesteps)

    def __getitem__(self, index):
        return self.timesteps[index]


def check(name, config=None, **options):
    pipe = Loop(Denoiser(setup(name).shape[-1], setup(name).widen), make(name, **config or {}))
    with dc.cached(pipe, "interval", "reuse", every=2, scope="stack"):
        calls, iterations = pipe(**options)
        summary = dc.summary(pipe)
    assert counted(summary) == calls
    assert summary.total == iterations == calls[-1][0] + 1
    return summary


ENDS = {name for name in NAMES if setup(name).ends}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("tells", "passes"), [("attribute", 1), ("iterable", 2), ("nothing", 2)])
def test_calls_of_a_pipeline_are_counted(name, tells, passes):
    if name in ENDS and tells == "nothing":
        tells = "iterable"  # their pipelines do tell: the list alone does not say that its last entry is not evaluated
    check(name, tells=tells, passes=passes)


@pytest.mark.parametrize("name", NAMES)
def test_a_progress_bar_of_steps(name):
    # as many of diffusers' pipelines do it, without a number of timesteps, also where there are more iterations
    check(name, tells="steps")


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ENDS and name != "RFD4ProteinaScheduler"])
@pytest.mark.parametrize("copies", [False, True])
def test_a_pipeline_that_begins_in_the_middle(name, copies):
    """RFD4Proteina's does so by an argument of set_timesteps: it takes its steps from the first on only."""
    whole = len(start(name, make(name)))
    half = check(name, strength=0.5, copies=copies)
    assert 0 < half.total < whole


def test_a_protein_that_begins_in_the_middle():
    check("RFD4ProteinaScheduler", num_inference_steps=10, start_time=0.5)


@pytest.mark.parametrize("skip_prk_steps", [True, False])
@pytest.mark.parametrize("first", range(6))
def test_pndm_begins_at_either_of_equal_timesteps(first, skip_prk_steps):
    """It is told no begin index, and repeats the second timestep (or, in its Runge-Kutta steps, all)."""
    scheduler = PNDMScheduler(skip_prk_steps=skip_prk_steps)
    scheduler.set_timesteps(STEPS)
    assert len(scheduler.timesteps.unique()) < len(scheduler.timesteps)
    for t in (scheduler.timesteps[first:][0], scheduler.timesteps[first].expand(2)):
        assert begin_index(scheduler, t) == first
        assert scheduler_total(scheduler, t) == len(scheduler.timesteps) - first
    check("PNDMScheduler", dict(skip_prk_steps=True), strength=1 - first / STEPS)


TIMESTEPS = [899, 699, 399, 99, 19]
SIGMAS = [1.0, 0.8, 0.5, 0.2, 0.1]
CUSTOM = {
    "CMStochasticIterativeScheduler": [dict(timesteps=[35, 20, 11, 5, 1])],
    "DDPMParallelScheduler": [dict(timesteps=TIMESTEPS)],
    "DDPMScheduler": [dict(timesteps=TIMESTEPS)],
    "DDPMWuerstchenScheduler": [dict(timesteps=[1.0, 0.7, 0.4, 0.1, 0.0])],
    "DPMSolverMultistepScheduler": [dict(timesteps=TIMESTEPS)],
    "DPMSolverSinglestepScheduler": [dict(timesteps=TIMESTEPS)],
    "EDMEulerScheduler": [dict(num_inference_steps=5, sigmas=torch.linspace(0, 1, 5) ** 2)],
    "EulerDiscreteScheduler": [dict(timesteps=TIMESTEPS), dict(sigmas=[14.0, 5.0, 2.0, 0.6, 0.1, 0.0])],
    "FlowMapEulerDiscreteScheduler": [dict(sigmas=SIGMAS), dict(timesteps=[float(t) for t in TIMESTEPS])],
    "FlowMatchEulerDiscreteScheduler": [dict(sigmas=SIGMAS), dict(timesteps=[float(t) for t in TIMESTEPS])],
    "FlowMatchLCMScheduler": [dict(sigmas=SIGMAS), dict(timesteps=[float(t) for t in TIMESTEPS])],
    "HeliosDMDScheduler": [dict(num_inference_steps=5, sigmas=np.float32(SIGMAS))],
    "HeliosScheduler": [dict(num_inference_steps=5, sigmas=np.float32(SIGMAS))],
    "HeunDiscreteScheduler": [dict(timesteps=TIMESTEPS)],
    "LCMScheduler": [dict(timesteps=TIMESTEPS)],
    "LTXEulerAncestralRFScheduler": [dict(sigmas=[*SIGMAS, 0.0])],
    "MiniMaxH3Scheduler": [dict(sigmas=[*SIGMAS, 0.0])],
    "PiflowScheduler": [],  # it has the arguments and refuses them
    "SCMScheduler": [
        dict(
            num_inference_steps=4,
            timesteps=[1.5, 1.1, 0.7, 0.3, 0.0],
            max_timesteps=None,
            intermediate_timesteps=None,
        )
    ],
    "TCDScheduler": [dict(timesteps=TIMESTEPS)],
    "UniPCMultistepScheduler": [dict(num_inference_steps=5, sigmas=np.float32(SIGMAS))],
}


def accepts_custom(name):
    parameters = inspect.signature(CLASSES[name].set_timesteps).parameters
    return "timesteps" in parameters or "sigmas" in parameters


def test_every_sampler_with_custom_timesteps_is_listed():
    assert {name for name in NAMES if accepts_custom(name)} == CUSTOM.keys()


@pytest.mark.parametrize(("name", "times"), [(name, times) for name, given in CUSTOM.items() for times in given])
def test_custom_timesteps(name, times):
    config = dict(use_flow_sigmas=True) if name == "UniPCMultistepScheduler" else {}
    check(name, config, tells="iterable" if name in ENDS else "nothing", **times)


# noise levels

SILENT = {  # no sigmas and no products of alphas
    "ConsistencyDecoderScheduler",
    "DDPMWuerstchenScheduler",
    "IPNDMScheduler",
    "RFD4ProteinaScheduler",
    "SCMScheduler",
}


@pytest.mark.parametrize("name", NAMES)
def test_noise_falls_over_a_run(name):
    """Of order 2, and PNDM, evaluate some levels twice. Inversions add noise."""
    scheduler = make(name)
    timesteps = start(name, scheduler)
    levels = noise_levels(scheduler, timesteps[0])
    if name in SILENT:
        assert levels == []
        return
    assert len(levels) == len(timesteps)
    assert all(map(math.isfinite, levels[1:]))
    assert math.isfinite(levels[0]) or (levels[0] == -math.inf and scheduler.sigmas[0] == 1)  # nothing but noise
    if "Inverse" in name:
        levels = levels[::-1]
    if getattr(scheduler, "order", 1) == 2 or name == "PNDMScheduler":
        assert levels == sorted(levels)
        assert len(set(levels)) >= STEPS
    else:
        assert all(a < b for a, b in pairwise(levels))


FLOW = {
    "FlowMapEulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "FlowMatchLCMScheduler",
    "HeliosDMDScheduler",
    "HeliosScheduler",
    "LTXEulerAncestralRFScheduler",
    "MiniMaxH3Scheduler",
    "PiflowScheduler",
}


@pytest.mark.parametrize("name", NAMES)
def test_flow_is_told_from_variance_exploding(name):
    scheduler = make(name)
    start(name, scheduler)
    assert (getattr(scheduler, "sigmas", None) is not None and is_flow(scheduler)) == (name in FLOW)


UNNOISING = {  # no method that noises a sample at a timestep
    "DDIMInverseScheduler",
    "HeliosDMDScheduler",
    "HeliosScheduler",
    "LTXEulerAncestralRFScheduler",
    "PiflowScheduler",
    "RePaintScheduler",
}


@pytest.mark.parametrize("name", [name for name in NAMES if name not in SILENT | UNNOISING])
def test_noise_levels_are_the_ratio_that_is_mixed(name):
    scheduler = make(name)
    mixed = mixture(name, scheduler)
    levels = noise_levels(scheduler, start(name, scheduler)[0])
    wide = [(a, b) for a, b in zip(levels, mixed, strict=True) if abs(b) < 9]  # float32 cancels in 1 − σ
    assert len(wide) >= len(levels) // 2
    assert [a for a, _ in wide] == pytest.approx([b for _, b in wide], abs=0.02)


def mixture(name: str, scheduler: Any) -> list[float]:
    """log-SNR, measured by noising a one with a zero and a zero with a one."""
    one, zero = torch.ones(1, 1, 1), torch.zeros(1, 1, 1)
    found = []
    for t in start(name, scheduler).clone():
        parts = []
        for data, noise in ((one, zero), (zero, one)):
            if hasattr(scheduler, "scale_noise"):
                start(name, scheduler)  # FlowMatchHeun's noises at the timestep it has come to
                parts.append(scheduler.scale_noise(data, t[None], noise).double().item())
            else:
                parts.append(scheduler.add_noise(data, noise, t[None]).double().item())
        found.append(2 * (math.log(parts[0]) - math.log(parts[1])) if min(parts) > 0 else math.inf)
    return found
