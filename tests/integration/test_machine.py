"""Random sequences of what users do to pipelines, against twins that nothing was done to.

An uncached pipeline must generate what one that was never enabled does, and a cached one what a new one does, bit by
bit, whatever came before. DIFFUSION_CACHE_EXAMPLES=200 tries that many random sequences instead of a few fixed ones.
"""

import contextlib
import copy
import gc
import os
import weakref
from typing import Any, NamedTuple

import diffusers
import pytest
import torch
from cases import tiny_unet
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import diffusion_cache as dc
from diffusion_cache import models, reference
from diffusion_cache.engine import intercept, patches
from diffusion_cache.engine.session import MARK, SESSION

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("error::diffusion_cache.errors.DiffusionCacheWarning"),
    pytest.mark.filterwarnings("ignore:nothing is reused in a run of"),  # by the guards that it draws
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # diffusers' own, with NumPy 2
]

EXAMPLES = os.environ.get("DIFFUSION_CACHE_EXAMPLES")
SETTINGS = settings(
    max_examples=int(EXAMPLES or 5),
    stateful_step_count=30 if EXAMPLES else 12,
    derandomize=EXAMPLES is None,
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
SLOTS = st.sampled_from((0, 1))
WEIGHTS = st.sampled_from((0, 1))  # seeds of denoisers


class Stop(Exception):
    pass


class Scheduler(NamedTuple):
    cls: str
    options: tuple[tuple[str, Any], ...] = ()

    def build(self):
        return getattr(diffusers, self.cls)(**dict(self.options))


class Method(NamedTuple):
    """Arguments of `enable`. computes: whether every step is, so that images are those of an uncached pipeline."""

    policy: tuple[tuple[str, Any], ...]
    forecaster: tuple[tuple[str, Any], ...]
    scope: str | None
    granularity: str
    guards: tuple[tuple[str, Any], ...]

    @property
    def computes(self):
        return ("every", 1) in self.policy or ("mask", "1") in self.policy or ("warmup", 9) in self.guards

    def enable(self, pipe):
        options = dict(self.policy + self.forecaster + self.guards)
        return dc.enable(pipe, scope=self.scope, granularity=self.granularity, **options)


class Call(NamedTuple):
    """One call of a pipeline. same_seed: all samples begin at one noise. inference: under torch.inference_mode."""

    steps: int
    labels: tuple[int, ...]
    seed: int
    same_seed: bool
    guidance: float
    size: int
    inference: bool


class Event(NamedTuple):
    """Something that happens in a callback of a call, at the end of a step."""

    what: str  # fail, ctrl-c, interrupt, disable, enable
    step: int
    method: Method | None = None


def table(**options):
    return tuple(options.items())


def methods(planned_scopes, adaptive_scopes):
    planned = st.sampled_from(
        [table(policy="interval", every=n) for n in (1, 2, 3)]
        + [table(policy="mask", mask=mask) for mask in ("1", "1010", "1101001")]
    )
    adaptive = st.sampled_from(
        [table(policy="first_block", threshold=value) for value in (0.0, 0.1, 0.2, 0.29, 0.38, 0.45, 1e9)]
    )
    forecasters = st.sampled_from(
        [table(forecaster="reuse")]
        + [table(forecaster="taylor", order=order) for order in (1, 2)]
        + [table(forecaster="taylor_paper", order=1)]
    )
    guards = st.sampled_from(
        [(), (), table(warmup=2), table(last=1), table(max_consecutive=1), table(start=0.2, end=0.8), table(warmup=9)]
    )
    granularity = st.sampled_from(("sample", "sample", "batch"))
    return st.builds(Method, planned, forecasters, planned_scopes, granularity, guards) | st.builds(
        Method, adaptive, forecasters, adaptive_scopes, granularity, guards
    )


CALLS = st.builds(
    Call,
    steps=st.integers(1, 7),
    labels=st.sampled_from(((3,), (8,), (1, 7), (4, 4), (2, 5, 9))),
    seed=st.sampled_from((0, 1)),
    same_seed=st.booleans(),
    guidance=st.sampled_from((1.0, 3.0)),
    size=st.sampled_from((16, 16, 24)),
    inference=st.booleans(),
)


class Machine(RuleBasedStateMachine):
    """Two pipelines of one class, and what is known of each."""

    name: str
    schedulers: tuple[Scheduler, ...]
    expected: dict  # over all examples, for they are pure functions of their keys

    @staticmethod
    def denoiser(seed):
        raise NotImplementedError

    def __init__(self):
        super().__init__()
        self.patches_before = set(patches._patches)
        self.attribute = reference.spec(self.name).denoiser
        self.pipes, self.weights, self.sampler, self.methods = [], [], [], []
        self.denoisers, self.built = weakref.WeakSet(), weakref.WeakSet()  # copies of schedulers keep their mark
        for _ in range(2):
            self.pipes.append(self.fresh(0, self.schedulers[0]))
            self.weights.append(0)
            self.sampler.append(self.schedulers[0])
            self.methods.append(None)
            self.built.add(self.pipes[-1].scheduler)

    @classmethod
    def fresh(cls, weights, scheduler):
        pipe = reference.assemble(cls.name, cls.denoiser(weights))
        pipe.scheduler = scheduler.build()
        return pipe

    @classmethod
    def run(cls, pipe, call, event=None):
        """The images or the name of the error that stopped the call, what was computed, and if the event took place."""
        happened = []

        def callback(pipe, index, timestep, kwargs):
            if event is not None and index == event.step:
                happened.append(index)
                if event.what == "fail":
                    raise Stop
                if event.what == "ctrl-c":
                    raise KeyboardInterrupt
                if event.what == "interrupt":
                    pipe._interrupt = True
                elif event.what == "disable":
                    dc.disable(pipe)
                elif event.what == "enable":
                    event.method.enable(pipe)
            return kwargs

        seeds = [call.seed if call.same_seed else call.seed + i for i in range(len(call.labels))]
        given = reference.inputs(cls.name, call.labels, seeds, steps=call.steps, guidance=call.guidance)
        given |= dict(height=call.size, width=call.size, callback_on_step_end=callback)
        mode = torch.inference_mode() if call.inference else contextlib.nullcontext()
        try:
            with mode:
                images = reference.images(cls.name, pipe(**given))
        except (Stop, KeyboardInterrupt) as error:
            images = type(error).__name__
        session = vars(pipe).get(SESSION)
        run = None if session is None else session.last_run
        return images, None if run is None else list(run.records), bool(happened)

    @classmethod
    def twin(cls, weights, scheduler, method, call, event=None):
        """What a new pipeline gives."""
        if method is not None and method.computes and event is None:
            method = None
        key = weights, scheduler, method, call._replace(inference=False), event
        if key not in cls.expected:
            pipe = cls.fresh(weights, scheduler)
            if method is not None:
                method.enable(pipe)
            try:
                cls.expected[key] = cls.run(pipe, key[3], event)
            finally:
                dc.disable(pipe)
        return cls.expected[key]

    def check(self, slot, call, event=None):
        pipe, method = self.pipes[slot], self.methods[slot]
        expected, records, _ = self.twin(self.weights[slot], self.sampler[slot], method, call, event)
        images, found, happened = self.run(pipe, call, event)
        if isinstance(expected, str):
            assert images == expected
        else:
            assert isinstance(images, torch.Tensor)
            assert torch.equal(images, expected), (images - expected).abs().max()
        if happened and event.what in ("disable", "enable"):
            self.methods[slot] = event.method
        elif records is not None and method is not None:
            assert found == records
        if method is not None and self.methods[slot] is method:
            run = vars(pipe)[SESSION].last_run
            assert not run.spans._states  # nothing of a finished run takes memory
            if method.computes:
                assert not any(record.spans_reused for record in run.records)

    # what users do

    @rule(slot=SLOTS, data=st.data())
    def enable(self, slot, data):
        method = data.draw(self.method_strategy)
        method.enable(self.pipes[slot])
        self.methods[slot] = method

    @rule(slot=SLOTS)
    def disable(self, slot):
        dc.disable(self.pipes[slot])
        self.methods[slot] = None

    @rule(slot=SLOTS, call=CALLS)
    def generate(self, slot, call):
        self.check(slot, call)

    @rule(
        slot=SLOTS, call=CALLS, what=st.sampled_from(("fail", "ctrl-c", "interrupt", "disable")), step=st.integers(0, 6)
    )
    def disturb(self, slot, call, what, step):
        self.check(slot, call, Event(what, step))

    @rule(slot=SLOTS, call=CALLS, step=st.integers(0, 6), data=st.data())
    def enable_in_a_callback(self, slot, call, step, data):
        self.check(slot, call, Event("enable", step, data.draw(self.method_strategy)))

    @rule(slot=SLOTS, call=CALLS, nth=st.integers(0, 12), which=st.integers(0, 7))
    def fail_inside_a_block(self, slot, call, nth, which):
        pipe = self.pipes[slot]
        modules = [module for module in getattr(pipe, self.attribute).modules() if "Block" in type(module).__name__]
        count = []

        def fail(module, args):
            count.append(module)
            if len(count) > nth:
                raise Stop

        hook = modules[which % len(modules)].register_forward_pre_hook(fail)
        try:
            self.run(pipe, call)
        finally:
            hook.remove()

    @precondition(lambda self: self.pipes[0].scheduler is not self.pipes[1].scheduler)
    @rule(slot=SLOTS, call=CALLS, inner=CALLS, step=st.integers(0, 6))
    def preview_with_the_other(self, slot, call, inner, step):
        """The other pipeline is called from this one's callback."""
        expected, *_ = self.twin(self.weights[slot], self.sampler[slot], self.methods[slot], call)
        other = 1 - slot

        def preview(pipe, index, timestep, kwargs):
            if index == step:
                self.check(other, inner._replace(inference=False))
            return kwargs

        seeds = [call.seed if call.same_seed else call.seed + i for i in range(len(call.labels))]
        given = reference.inputs(self.name, call.labels, seeds, steps=call.steps, guidance=call.guidance)
        given |= dict(height=call.size, width=call.size, callback_on_step_end=preview)
        assert torch.equal(reference.images(self.name, self.pipes[slot](**given)), expected)

    @rule(slot=SLOTS, data=st.data(), after_use=st.booleans(), call=CALLS)
    def change_scheduler(self, slot, data, after_use, call):
        self.sampler[slot] = data.draw(st.sampled_from(self.schedulers))
        self.pipes[slot].scheduler = self.sampler[slot].build()
        self.built.add(self.pipes[slot].scheduler)
        if after_use:
            self.check(slot, call)

    @rule(slot=SLOTS)
    def share_scheduler(self, slot):
        self.pipes[slot].scheduler = self.pipes[1 - slot].scheduler
        self.sampler[slot] = self.sampler[1 - slot]

    @rule(slot=SLOTS, weights=WEIGHTS)
    def swap_denoiser(self, slot, weights):
        setattr(self.pipes[slot], self.attribute, self.denoiser(weights))
        self.weights[slot] = weights

    @rule(slot=SLOTS)
    def share_denoiser(self, slot):
        setattr(self.pipes[slot], self.attribute, getattr(self.pipes[1 - slot], self.attribute))
        self.weights[slot] = self.weights[1 - slot]

    @rule(slot=SLOTS)
    def become_a_deep_copy_of_the_other(self, slot):
        """What was in its place is dropped, perhaps while it is enabled."""
        other = 1 - slot
        self.pipes[slot] = copy.deepcopy(self.pipes[other])
        self.weights[slot], self.sampler[slot], self.methods[slot] = self.weights[other], self.sampler[other], None
        gc.collect()

    @rule(slot=SLOTS)
    def take_a_deep_copy_of_the_others_denoiser(self, slot):
        setattr(self.pipes[slot], self.attribute, copy.deepcopy(getattr(self.pipes[1 - slot], self.attribute)))
        self.weights[slot] = self.weights[1 - slot]

    @rule(slot=SLOTS)
    def take_a_deep_copy_of_the_others_scheduler(self, slot):
        self.pipes[slot].scheduler = copy.deepcopy(self.pipes[1 - slot].scheduler)
        self.sampler[slot] = self.sampler[1 - slot]

    # what always holds

    @invariant()
    def no_run_is_active(self):
        self.denoisers.update(getattr(pipe, self.attribute) for pipe in self.pipes)
        assert patches.ACTIVE.get() is None

    @invariant()
    def sessions_are_where_they_were_enabled(self):
        for pipe, method in zip(self.pipes, self.methods, strict=True):
            assert (vars(pipe).get(SESSION) is not None) == (method is not None)
        if self.methods == [None, None]:
            assert set(patches._patches) == self.patches_before
            assert not [m for denoiser in self.denoisers for m in denoiser.modules() if intercept.ATTRIBUTE in vars(m)]

    def teardown(self):
        for pipe in self.pipes:
            dc.disable(pipe)
        gc.collect()
        assert set(patches._patches) == self.patches_before
        for denoiser in self.denoisers:
            assert not [name for name, m in denoiser.named_modules() if intercept.ATTRIBUTE in vars(m)]
        assert not [pipe for pipe in self.pipes if vars(pipe).get(SESSION) is not None]
        assert not [scheduler for scheduler in self.built if MARK in vars(scheduler)]
        for slot, pipe in enumerate(self.pipes):
            call = Call(4, (3, 8), 0, False, 3.0, 16, False)
            expected, *_ = self.twin(self.weights[slot], self.sampler[slot], None, call)
            assert torch.equal(self.run(pipe, call)[0], expected)


class FluxMachine(Machine):
    """A transformer with two stacks; guidance is a second call."""

    name = "flux-digits"
    schedulers = (
        Scheduler("FlowMatchEulerDiscreteScheduler", table(shift=3.0)),
        Scheduler("FlowMatchEulerDiscreteScheduler", table(shift=1.0)),
        Scheduler("UniPCMultistepScheduler", table(prediction_type="flow_prediction", use_flow_sigmas=True)),
    )
    expected: dict = {}  # noqa: RUF012
    method_strategy = methods(st.sampled_from((None, "stack", "block", "denoiser")), st.sampled_from((None, "stack")))

    @staticmethod
    def denoiser(seed):
        torch.manual_seed(seed)
        return diffusers.FluxTransformer2DModel(
            patch_size=1,
            in_channels=4,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=64,
            pooled_projection_dim=64,
            axes_dims_rope=(4, 6, 6),
        ).eval()


class UNetMachine(Machine):
    """A UNet, of which a cut is cached; guidance branches are rows of one batch."""

    name = "unet-digits"
    schedulers = (
        Scheduler("DDIMScheduler", table(prediction_type="v_prediction", clip_sample=False)),
        Scheduler("EulerDiscreteScheduler"),
        Scheduler("PNDMScheduler", table(skip_prk_steps=True)),
        Scheduler("HeunDiscreteScheduler"),
        Scheduler("DPMSolverMultistepScheduler"),
    )
    expected: dict = {}  # noqa: RUF012
    method_strategy = methods(st.sampled_from((None, "cut", "block", "denoiser")), st.sampled_from((None, "cut")))

    denoiser = staticmethod(tiny_unet)


TestFlux, TestUNet = FluxMachine.TestCase, UNetMachine.TestCase
TestFlux.settings = TestUNet.settings = SETTINGS


def test_the_smallest_models_are_cached_at_every_scope():
    for machine, scopes in ((FluxMachine, ("stack", "block", "denoiser")), (UNetMachine, ("cut", "block", "denoiser"))):
        denoiser = machine.denoiser(0)
        for scope in scopes:
            assert models.find_layout(denoiser, scope).spans
