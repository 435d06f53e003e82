"""More of what happens around a cache: interrupts, LoRA, offloading, quantised weights, copies, hooks, no memory.

Beside the cached pipeline stands a twin to which the same is done and which is enabled anew for each generation, or
not at all. As far as numbers go, nothing else may make a difference.
"""

import contextlib
import copy
import importlib.util
import io
import pickle
import signal
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import diffusers
import pytest
import torch
from torch import nn

import diffusion_cache as dc
from diffusion_cache import history, ops, reference
from diffusion_cache.engine import intercept, patches

DIT, UNET, FLUX, WAN = "dit-digits", "unet-digits", "flux-digits", "wan-moving-digits"
STEPS = 6
CPU = torch.device("cpu")
PLANNED, ADAPTIVE = dict(policy="interval", every=2), dict(policy="first_block", threshold=0.3)

pytestmark = [
    pytest.mark.filterwarnings("error::diffusion_cache.errors.DiffusionCacheWarning"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # diffusers' own, with NumPy 2
]
each_model = pytest.mark.parametrize("name", reference.MODELS)
with_callbacks = pytest.mark.parametrize("name", [UNET, FLUX, WAN])
each_method = pytest.mark.parametrize("method", [PLANNED, ADAPTIVE], ids=["planned", "adaptive"])
in_any_order = pytest.mark.parametrize(
    ("first", "undone_first"),
    [(first, undone) for first in (True, False) for undone in (True, False)],
    ids=["before-before", "before-after", "after-before", "after-after"],
)


def generate(name, pipe, steps=STEPS, labels=(3,), seeds=(5,), guidance=None, **extra):
    return reference.images(name, pipe(**reference.inputs(name, labels, seeds, steps=steps, guidance=guidance) | extra))


_made = []


def made(pipe):
    _made.append(pipe)
    return pipe


def load(name, **options):
    return made(reference.load(name, **options))


@pytest.fixture(autouse=True)
def nothing_left():
    """Whatever a test did: once everything is disabled, no class is patched that was not before."""
    before = set(patches._patches)
    yield
    for pipe in _made:
        dc.disable(pipe)
    _made.clear()
    assert set(patches._patches) == before


def denoiser_of(name, pipe):
    return getattr(pipe, reference.spec(name).denoiser)


def put(name, pipe, denoiser):
    setattr(pipe, reference.spec(name).denoiser, denoiser)


def untouched(module):
    return not [name for name, child in module.named_modules() if intercept.ATTRIBUTE in vars(child)]


@cache
def uncached(name):
    return generate(name, load(name))


def anew(name, pipe, method=PLANNED, **given):
    """What a pipeline generates that is enabled for this one generation, with its records."""
    with dc.cached(pipe, **method):
        images = generate(name, pipe, **given)
        return images, records(pipe)


def records(pipe):
    return [(r.step, r.pass_name, r.computed, r.reason, r.spans_reused) for r in dc.summary(pipe).records]


def computed(pipe):
    return "".join(str(int(r.computed)) for r in dc.summary(pipe).records)


@contextlib.contextmanager
def warned(count, match):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    messages = [str(w.message) for w in caught if issubclass(w.category, dc.DiffusionCacheWarning)]
    assert len(messages) == count, messages
    assert all(match in message for message in messages)


class Stop(Exception):
    pass


def at_step(step, act):
    def callback(pipe, index, timestep, kwargs):
        if index == step:
            return act(pipe, kwargs) or kwargs
        return kwargs

    return dict(callback_on_step_end=callback)


# stopped


def interrupt(pipe, kwargs):
    pipe._interrupt = True


@each_method
@with_callbacks
def test_interrupted(name, method):
    """What was denoised up to the interrupt comes out; the next call knows nothing of it."""
    twin, pipe = load(name), load(name)
    whole, _ = anew(name, twin, method)
    part, seen = anew(name, twin, method, **at_step(2, interrupt))
    dc.enable(pipe, **method)
    assert torch.equal(generate(name, pipe, **at_step(2, interrupt)), part)
    assert records(pipe) == seen
    assert dc.summary(pipe).total == STEPS
    assert {step for step, *_ in seen} == {0, 1, 2}
    assert torch.equal(generate(name, pipe), whole)
    assert torch.equal(generate(name, pipe, steps=3, **at_step(0, interrupt)), anew(name, twin, method, steps=3, **at_step(0, interrupt))[0])
    dc.disable(pipe)
    assert torch.equal(generate(name, pipe, **at_step(2, interrupt)), generate(name, twin, **at_step(2, interrupt)))
    assert torch.equal(generate(name, pipe), uncached(name))


@each_method
@each_model
@pytest.mark.parametrize("where", ["block", "step"])
def test_ctrl_c(name, method, where):
    """The signal itself, in the middle of a block or of a scheduler's step."""
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("signals arrive in the main thread")
    pipe = load(name)
    whole, _ = anew(name, load(name), method)
    blocks = [module for module in denoiser_of(name, pipe).modules() if "Block" in type(module).__name__]
    calls = []

    def third(*args):
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)

    dc.enable(pipe, **method)
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        if where == "block":
            hook = blocks[-1].register_forward_hook(third)
        else:
            step = pipe.scheduler.scale_model_input if hasattr(pipe.scheduler, "scale_model_input") else None
            hook = denoiser_of(name, pipe).register_forward_pre_hook(third) if step is None else None
            if step is not None:
                pipe.scheduler.scale_model_input = lambda *args: (third(), step(*args))[1]
        with pytest.raises(KeyboardInterrupt):
            generate(name, pipe, steps=12)
        if hook is not None:
            hook.remove()
        else:
            del pipe.scheduler.scale_model_input
    finally:
        signal.signal(signal.SIGINT, previous)
    assert patches.ACTIVE.get() is None
    assert torch.equal(generate(name, pipe), whole)
    dc.disable(pipe)
    assert torch.equal(generate(name, pipe), uncached(name))
    assert untouched(denoiser_of(name, pipe))


@pytest.mark.parametrize("name", [DIT, UNET])
def test_stopped_while_only_some_samples_are_computed(name):
    batch, pipe = dict(labels=(3, 8), seeds=(5, 6), steps=10), load(name)
    whole, seen = anew(name, load(name), ADAPTIVE, **batch)
    partly = [i for i, (_, _, _, reason, _) in enumerate(seen) if reason.startswith("1 of 2 samples")]
    assert partly
    dc.enable(pipe, **ADAPTIVE)
    last = dc.inspect(pipe).spans[-1]
    module = list(denoiser_of(name, pipe).modules())[-1] if last is None else denoiser_of(name, pipe)
    calls = []

    def fail(child, args):
        calls.append(child)
        if len(calls) == partly[0] + 1:
            raise Stop

    inner = module.transformer_blocks[-1] if name == DIT else module.mid_block
    rows = []
    hook = inner.register_forward_pre_hook(lambda child, args: rows.append(len(args[0])) if args else None)
    hook_root = module.register_forward_pre_hook(fail)
    with pytest.raises(Stop):
        generate(name, pipe, **batch)
    hook.remove()
    hook_root.remove()
    assert torch.equal(generate(name, pipe, **batch), whole)
    assert records(pipe) == seen
