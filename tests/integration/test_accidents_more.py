"""More of what happens around a cache: interrupts, LoRA, offloading, quantised weights, copies, hooks, no memory.

Beside the cached pipeline stands a twin to which the same is done and which is enabled anew for each generation, or
not at all. As far as numbers go, nothing else may make a difference.
"""

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
from accidents import DIT, FLUX, UNET, WAN, Stop, denoiser_of, load, made, untouched, warned
from torch import nn

import diffusion_cache as dc
from diffusion_cache import history, ops, reference
from diffusion_cache.engine import frame, patches
from diffusion_cache.plan import Plan
from diffusion_cache.schedule import Schedule

STEPS = 6
CPU = torch.device("cpu")
PLANNED, ADAPTIVE = dict(policy="interval", every=2), dict(policy="first_block", threshold=0.4)
# of two samples, some calls are computed for one alone
PARTLY = {DIT: dict(policy="first_block", threshold=0.25), UNET: dict(policy="first_block", threshold=0.2)}
TWO = dict(labels=(3, 8), seeds=(5, 6), steps=10)

pytestmark = [
    pytest.mark.usefixtures("nothing_left"),
    pytest.mark.filterwarnings("error::diffusion_cache.errors.DiffusionCacheWarning"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # diffusers' own, with NumPy 2
]
each_model = pytest.mark.parametrize("name", reference.MODELS)
with_callbacks = pytest.mark.parametrize("name", [UNET, FLUX, WAN])


def all_pairs(one, other, third):
    """The values of two parameters in every combination, with those of a third in turn: any two of the three meet."""
    return [(a, b, third[(i + j) % len(third)]) for i, a in enumerate(one) for j, b in enumerate(other)]


METHODS = {"planned": PLANNED, "adaptive": ADAPTIVE}
each_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
in_any_order = pytest.mark.parametrize(
    ("first", "undone_first"),
    [(first, undone) for first in (True, False) for undone in (True, False)],
    ids=["before-before", "before-after", "after-before", "after-after"],
)


def generate(name, pipe, steps=STEPS, labels=(3,), seeds=(5,), guidance=None, **extra):
    return reference.images(name, pipe(**reference.inputs(name, labels, seeds, steps=steps, guidance=guidance) | extra))


def put(name, pipe, denoiser):
    setattr(pipe, reference.spec(name).denoiser, denoiser)


@cache
def uncached(name):
    return generate(name, load(name))


def anew(name, pipe, method=PLANNED, **given):
    """What a pipeline generates that is enabled for this one generation, with its records."""
    with dc.cached(pipe, **method):
        images = generate(name, pipe, **given)
        return images, records(pipe)


@cache
def expected_of(name):
    return anew(name, load(name))


def records(pipe):
    return [(r.step, r.pass_name, r.computed, r.reason, r.spans_reused) for r in dc.summary(pipe).records]


def partly(seen):
    """The steps that were computed for one sample of two."""
    return [step for step, _, _, reason, _ in seen if reason.startswith("1 of 2 samples")]


def computed(pipe):
    return "".join(str(int(r.computed)) for r in dc.summary(pipe).records)


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
    assert torch.equal(
        generate(name, pipe, steps=3, **at_step(0, interrupt)),
        anew(name, twin, method, steps=3, **at_step(0, interrupt))[0],
    )
    dc.disable(pipe)
    assert torch.equal(generate(name, pipe, **at_step(2, interrupt)), generate(name, twin, **at_step(2, interrupt)))
    assert torch.equal(generate(name, pipe), uncached(name))


@pytest.mark.parametrize(("name", "where", "method"), all_pairs(reference.MODELS, ["block", "denoiser"], [*METHODS]))
def test_ctrl_c(name, where, method):
    """The signal itself, in the middle of a block or before the first of them."""
    method = METHODS[method]
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("signals arrive in the main thread")
    pipe = load(name)
    expected, _ = anew(name, load(name), method)
    denoiser = denoiser_of(name, pipe)
    calls = []

    def third(*args):
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)

    dc.enable(pipe, **method)
    if where == "denoiser":
        hook = denoiser.register_forward_pre_hook(third)
    else:
        hook = next(m for m in denoiser.modules() if "Block" in type(m).__name__).register_forward_hook(third)
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            generate(name, pipe, steps=12)
    finally:
        signal.signal(signal.SIGINT, previous)
    hook.remove()
    assert patches.ACTIVE.get() is None
    assert torch.equal(generate(name, pipe), expected)
    dc.disable(pipe)
    assert torch.equal(generate(name, pipe), uncached(name))
    assert untouched(denoiser)


@each_model
def test_stopped_before_any_block(name):
    """Nothing is said of a call that did not come to its blocks: the error says it all."""
    pipe = load(name)
    dc.enable(pipe, **PLANNED)

    def fail(*args):
        raise Stop

    hook = next(denoiser_of(name, pipe).children()).register_forward_pre_hook(fail)
    with pytest.raises(Stop):
        generate(name, pipe)
    hook.remove()
    assert torch.equal(generate(name, pipe), expected_of(name)[0])


@pytest.mark.parametrize("name", PARTLY)
def test_stopped_while_only_some_samples_are_computed(name):
    pipe = load(name)
    expected, seen = anew(name, load(name), PARTLY[name], **TWO)
    assert len(partly(seen)) >= 3
    dc.enable(pipe, **PARTLY[name])
    denoiser = denoiser_of(name, pipe)
    inner = denoiser.transformer_blocks[-2] if name == DIT else denoiser.mid_block
    rows = []

    def fail(module, args):
        rows.append(len(args[0]))
        if rows.count(2) == 2:
            raise Stop

    hook = inner.register_forward_pre_hook(fail)
    with pytest.raises(Stop):
        generate(name, pipe, **TWO)
    hook.remove()
    assert rows[0] == 4
    assert torch.equal(generate(name, pipe, **TWO), expected)
    assert records(pipe) == seen


# the next call is another


OTHERS = [
    dict(labels=(1, 2, 7), seeds=(1, 2, 3)),
    dict(steps=9),
    dict(guidance=1.0),
    dict(labels=(4, 4), seeds=(0, 0), steps=4),  # one noise for both
    dict(labels=(4, 9), seeds=(0, 0), steps=8),
]
SIZES = {UNET: dict(height=24, width=16), FLUX: dict(height=16, width=24), WAN: dict(height=32, width=16, num_frames=2)}


@pytest.mark.parametrize("granularity", ["sample", "batch"])
@each_model
def test_every_call_is_as_the_first_one(name, granularity):
    method = ADAPTIVE | dict(granularity=granularity)
    calls = [{}, *OTHERS, *([SIZES[name] | dict(labels=(3, 8), seeds=(5, 6))] if name in SIZES else [])]
    twin, pipe = load(name), load(name)
    alone = [anew(name, twin, method, **given) for given in calls]
    dc.enable(pipe, **method)
    for order in (1, -1) if granularity == "sample" else (-1,):
        for i in range(len(calls))[::order]:
            images, seen = alone[i]
            assert torch.equal(generate(name, pipe, **calls[i]), images)
            assert records(pipe) == seen


@pytest.mark.parametrize("threshold", [0.225, 0.33, 0.45])
def test_samples_that_begin_at_one_noise_are_told_apart(threshold):
    """At the first step their rows look like guidance branches; an earlier run has learned that they are not."""
    given, method = TWO | dict(seeds=(5, 5)), dict(policy="first_block", threshold=threshold)
    expected, seen = anew(DIT, load(DIT), method, **given)
    assert partly(seen)
    pipe = load(DIT)
    dc.enable(pipe, **method)
    for other in (TWO, TWO | dict(labels=(2,), seeds=(5,)), given):
        generate(DIT, pipe, **other)
        assert torch.equal(generate(DIT, pipe, **given), expected)
        assert records(pipe) == seen


def without_guidance(pipe, kwargs):
    pipe._guidance_scale = 1.0
    return dict(prompt_embeds=kwargs["prompt_embeds"].chunk(2)[1])


@pytest.mark.parametrize(("step", "threshold"), [(1, 0.4), (2, 0.2), (4, 0.1)])
def test_half_the_rows_from_some_step_on(step, threshold):
    """Guidance ends within a run: what has been learned of the larger batch fits no more."""
    given = dict(labels=(1, 7), seeds=(5, 6), steps=10) | at_step(step, without_guidance)
    given |= dict(callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"])
    twin, pipe = load(UNET), load(UNET)
    plain = generate(UNET, twin, **given)
    images, seen = anew(UNET, twin, dict(policy="first_block", threshold=threshold), **given)
    assert images.shape == plain.shape
    assert (images - plain).abs().mean() < 0.1
    dc.enable(pipe, "first_block", threshold=threshold)
    for _ in range(2):
        assert torch.equal(generate(UNET, pipe, **given), images)
        assert records(pipe) == seen


def test_nan_of_one_run_teaches_nothing_about_batches():
    """Rows that are not finite equal no others; that does not make them depend on each other."""
    images, seen = anew(DIT, load(DIT), PARTLY[DIT], **TWO)
    assert partly(seen)
    pipe = load(DIT)
    dc.enable(pipe, **PARTLY[DIT])
    hook = pipe.transformer.transformer_blocks[5].register_forward_hook(lambda m, args, output: output * float("nan"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dc.DiffusionCacheWarning)
        generate(DIT, pipe, **TWO)
    hook.remove()
    assert torch.equal(generate(DIT, pipe, **TWO), images)
    assert records(pipe) == seen


@each_method
@each_model
def test_moved_between_calls_and_within_one(name, method):
    pipe = load(name)
    expected, _ = anew(name, load(name), method)
    dc.enable(pipe, **method)
    generate(name, pipe, steps=2)
    pipe.to("cpu")
    pipe.to(torch.float64)
    pipe.to(torch.float32)  # the shipped weights have 16 bits: nothing is lost
    assert torch.equal(generate(name, pipe), expected)
    if name != DIT:
        assert torch.equal(generate(name, pipe, **at_step(2, lambda pipe, kwargs: pipe.to("cpu") and None)), expected)
    dc.disable(pipe)
    assert torch.equal(generate(name, pipe), uncached(name))


# enabled and disabled within a call


@with_callbacks
def test_enabled_anew_in_its_own_callback(name):
    """The rest of that call is computed; the next is the new method's."""
    twin, pipe = load(name), load(name)
    expected, _ = anew(name, twin, PLANNED | dict(forecaster="reuse", end=0.5))
    dc.enable(pipe, **PLANNED, forecaster="reuse")

    def replace(pipe, kwargs):
        dc.enable(pipe, "interval", every=3)

    assert torch.equal(generate(name, pipe, **at_step(2, replace)), expected)
    with pytest.raises(dc.ConfigError, match="nothing was generated"):
        dc.summary(pipe)
    assert torch.equal(generate(name, pipe), anew(name, twin, dict(policy="interval", every=3))[0])
    dc.disable(pipe)
    assert untouched(denoiser_of(name, pipe))
    assert torch.equal(generate(name, pipe), uncached(name))


@with_callbacks
def test_enabled_for_the_first_time_in_a_callback(name):
    pipe = load(name)
    assert torch.equal(
        generate(name, pipe, **at_step(1, lambda pipe, kwargs: dc.enable(pipe, **PLANNED) and None)), uncached(name)
    )
    assert torch.equal(generate(name, pipe), expected_of(name)[0])


@with_callbacks
def test_looked_at_in_a_callback(name):
    pipe = load(name)
    expected, _ = expected_of(name)
    dc.enable(pipe, **PLANNED)
    before = generate(name, pipe, steps=3)
    seen = []

    def look(pipe, kwargs):
        seen.append((len(dc.summary(pipe).records), dc.inspect(pipe).cache_bytes))

    assert torch.equal(generate(name, pipe, **at_step(2, look)), expected)
    assert seen[0][0] % 3 == 0
    assert seen[0][1] > 0
    assert torch.equal(generate(name, pipe, steps=3), before)


# LoRA


@cache
def adapter(name, seed):
    """A small adapter for the attention of a shipped model, as pipelines load it from a file."""
    peft = pytest.importorskip("peft")
    denoiser = reference.denoiser(name)
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=2, lora_alpha=2, init_lora_weights=False, target_modules=["to_q", "to_v", "to_out.0"])
    denoiser.add_adapter(config)
    prefix = reference.spec(name).denoiser
    return {f"{prefix}.{key}": 2 * value for key, value in peft.get_peft_model_state_dict(denoiser).items()}


def lora(name, seed):
    return {key: value.clone() for key, value in adapter(name, seed).items()}


LORA = {
    "load": lambda name, pipe: pipe.load_lora_weights(lora(name, 0), adapter_name="one"),
    "load another": lambda name, pipe: pipe.load_lora_weights(lora(name, 1), adapter_name="two"),
    "both": lambda name, pipe: pipe.set_adapters(["one", "two"], [0.7, 0.4]),
    "off": lambda name, pipe: pipe.disable_lora(),
    "on": lambda name, pipe: pipe.enable_lora(),
    "fuse": lambda name, pipe: pipe.fuse_lora(components=[reference.spec(name).denoiser], adapter_names=["one"]),
    "unfuse": lambda name, pipe: pipe.unfuse_lora(components=[reference.spec(name).denoiser]),
    "delete": lambda name, pipe: pipe.delete_adapters(["two"]),
    "unload": lambda name, pipe: pipe.unload_lora_weights(),
}


IN_FULL = [(UNET, None), (FLUX, "block"), (WAN, "denoiser")]


@pytest.mark.parametrize(("name", "scope"), [*IN_FULL, (UNET, "block"), (FLUX, "denoiser"), (WAN, None)])
def test_lora_after_enabling(name, scope):
    method = PLANNED | dict(scope=scope)
    twin, pipe = load(name), load(name)
    first, _ = anew(name, twin, method)
    dc.enable(pipe, **method)
    assert torch.equal(generate(name, pipe), first)
    before = first
    for what in LORA if (name, scope) in IN_FULL else ("load", "fuse", "unfuse", "unload"):
        for adapted in (twin, pipe):
            LORA[what](name, adapted)
        images = generate(name, pipe)
        expected, seen = anew(name, twin, method)
        assert torch.equal(images, expected), what
        assert records(pipe) == seen, what
        if what not in ("fuse", "unfuse", "delete"):
            assert (images - before).abs().max() > 1e-3, what
        before = images
    torch.testing.assert_close(before, first, rtol=0, atol=1e-3)  # fused and unfused: the weights are rounded
    dc.disable(pipe)
    assert torch.equal(generate(name, pipe), generate(name, twin))
    assert untouched(denoiser_of(name, pipe))


@with_callbacks
def test_lora_before_enabling(name):
    plain, pipe = load(name), load(name)
    for loaded in (plain, pipe):
        LORA["load"](name, loaded)
    adapted = generate(name, plain)
    dc.enable(pipe, **PLANNED)
    assert torch.equal(generate(name, pipe), anew(name, plain)[0])
    LORA["unload"](name, pipe)
    assert torch.equal(generate(name, pipe), expected_of(name)[0])
    LORA["load"](name, pipe)
    dc.disable(pipe)
    assert torch.equal(generate(name, pipe), adapted)
    LORA["unload"](name, pipe)
    assert torch.equal(generate(name, pipe), uncached(name))


# parameters that are elsewhere or in another form between calls; here onto the one device there is


def offload_model(name, pipe):
    pipe.enable_model_cpu_offload(device="cpu")
    return pipe.remove_all_hooks


def offload_sequentially(name, pipe):
    from accelerate import cpu_offload
    from accelerate.hooks import remove_hook_from_module

    denoiser = denoiser_of(name, pipe)
    cpu_offload(denoiser, execution_device=CPU)
    assert {parameter.device.type for parameter in denoiser.parameters()} == {"meta"}
    return lambda: remove_hook_from_module(denoiser, recurse=True)


def offload_groups(**options):
    def offload(name, pipe):
        from diffusers.hooks import HookRegistry, apply_group_offloading
        from diffusers.hooks.group_offloading import _GROUP_OFFLOADING

        denoiser = denoiser_of(name, pipe)
        apply_group_offloading(denoiser, onload_device=CPU, offload_device=CPU, **options)
        return lambda: HookRegistry.check_if_exists_or_initialize(denoiser).remove_hook(_GROUP_OFFLOADING)

    return offload


OFFLOAD = {
    "model": offload_model,
    "sequential": offload_sequentially,
    "blocks": offload_groups(offload_type="block_level", num_blocks_per_group=2),
    "leaves": offload_groups(offload_type="leaf_level"),
}


@pytest.mark.parametrize("how", OFFLOAD)
@pytest.mark.parametrize(
    ("name", "first", "undone_first"),
    [(WAN, first, undone) for first in (True, False) for undone in (True, False)]
    + [(DIT, True, False), (UNET, False, True), (FLUX, False, False)],
)
def test_offloading(name, how, first, undone_first, monkeypatch):
    pipe, others = load(name), {}
    monkeypatch.setattr(type(pipe), "_execution_device", CPU)  # it asks the autoencoder, which stays
    acts = [lambda: others.update(undo=OFFLOAD[how](name, pipe)), lambda: dc.enable(pipe, **PLANNED)]
    for act in acts if first else acts[::-1]:
        act()
    expected, seen = expected_of(name)
    assert torch.equal(generate(name, pipe), expected)
    assert records(pipe) == seen
    assert torch.equal(generate(name, pipe), expected)
    if undone_first:
        others["undo"]()
        assert torch.equal(generate(name, pipe), expected)
        dc.disable(pipe)
    else:
        dc.disable(pipe)
        assert torch.equal(generate(name, pipe), uncached(name))
        others["undo"]()
    assert torch.equal(generate(name, pipe), uncached(name))
    assert untouched(denoiser_of(name, pipe))


@pytest.mark.parametrize("how", OFFLOAD)
def test_offloading_where_only_some_samples_are_computed(how, monkeypatch):
    pipe = load(DIT)
    monkeypatch.setattr(type(pipe), "_execution_device", CPU)
    expected, seen = anew(DIT, load(DIT), PARTLY[DIT], **TWO)
    assert partly(seen)
    OFFLOAD[how](DIT, pipe)
    dc.enable(pipe, **PARTLY[DIT])
    for _ in range(2):
        assert torch.equal(generate(DIT, pipe, **TWO), expected)
        assert records(pipe) == seen


def offload_to_nan(name, pipe, size, folder, monkeypatch):
    """Offload groups of blocks, with NaN for weights until they are loaded; those still loaded at the ends of calls."""
    from diffusers.hooks.group_offloading import ModuleGroup

    load, offload = ModuleGroup.onload_, ModuleGroup.offload_
    loaded, left = set(), []

    def onload_(group):
        load(group)
        if len(group.modules) > 1 and group.onload_leader in group.modules:
            loaded.add(group)

    def offload_(group):
        offload(group)
        for tensor in group.tensor_to_key:
            if tensor.is_floating_point():
                tensor.data.fill_(torch.nan)
        loaded.discard(group)

    monkeypatch.setattr(ModuleGroup, "onload_", onload_)
    monkeypatch.setattr(ModuleGroup, "offload_", offload_)
    monkeypatch.setattr(type(pipe), "_execution_device", CPU)
    options = dict(offload_type="block_level", num_blocks_per_group=size, offload_to_disk_path=str(folder))
    offload_groups(**options)(name, pipe)
    denoiser_of(name, pipe).register_forward_hook(lambda *args: left.extend(loaded))
    return left


def every_other_block():
    """Of a reused step the second block of each pair is computed, of the next one the first."""
    rows = [[step % 3 == 0 or (block + step) % 2 == 0 for block in range(10)] for step in range(STEPS)]
    return dict(plan=Plan("half", "block", None, "auto", Schedule(tuple((tuple(row),) for row in rows)), ()))


@pytest.mark.parametrize(
    ("name", "method", "size"),
    [
        (WAN, ADAPTIVE, 2),
        (WAN, dict(policy="speca", threshold=0.9), 2),
        (WAN, dict(policy="teacache", threshold=0.3), 2),
        (WAN, every_other_block(), 2),
        (UNET, PLANNED, 2),
        (UNET, PLANNED, 3),
    ],
    ids=["probe", "tail", "begun", "blocks", "first-of-cut", "last-of-cut"],
)
def test_groups_of_which_some_blocks_are_skipped(name, method, size, tmp_path, monkeypatch):
    """Each block that runs has its weights, and no group stays loaded."""
    expected, seen = anew(name, load(name), method)
    assert any(reused for *_, reused in seen)
    pipe = load(name)
    left = offload_to_nan(name, pipe, size, tmp_path, monkeypatch)
    assert torch.equal(generate(name, pipe), uncached(name))
    assert torch.equal(anew(name, pipe, method)[0], expected)
    assert not left
    assert torch.equal(generate(name, pipe), uncached(name))


def offload_ahead(name, pipe, monkeypatch, **options):
    """Offload to the meta device, each group loaded by the one before it, as `use_stream=True` has it on a GPU.

    Those still loaded at the ends of calls.
    """
    from diffusers.hooks import group_offloading

    away, left = {}, []

    def tensors(group):
        parts = [part for module in group.modules for part in (*module.parameters(), *module.buffers())]
        return [*group.parameters, *group.buffers, *parts]

    def onload_(group):
        for tensor in tensors(group):
            if tensor.is_meta:
                torch.utils.swap_tensors(tensor, away.pop(id(tensor)))

    def offload_(group):
        for tensor in tensors(group):
            if not tensor.is_meta:
                away[id(tensor)] = tensor.to("meta")
                torch.utils.swap_tensors(tensor, away[id(tensor)])

    def look(denoiser, args, output):
        left.extend(name for name, parameter in denoiser.named_parameters() if not parameter.is_meta)

    monkeypatch.setattr(group_offloading.ModuleGroup, "onload_", onload_)
    monkeypatch.setattr(group_offloading.ModuleGroup, "offload_", offload_)
    monkeypatch.setattr(type(pipe), "_execution_device", CPU)
    denoiser = denoiser_of(name, pipe)
    group_offloading.apply_group_offloading(denoiser, CPU, torch.device("meta"), **options)
    root = group_offloading.ModuleGroup([], torch.device("meta"), CPU, denoiser, denoiser)
    config = group_offloading._get_top_level_group_offload_hook(denoiser).config
    group_offloading._apply_lazy_group_offloading_hook(denoiser, root, config=config)
    denoiser.register_forward_hook(look)
    return left


BLOCKS, LEAVES = dict(offload_type="block_level", num_blocks_per_group=1), dict(offload_type="leaf_level")


@pytest.mark.parametrize(
    ("name", "method", "options"),
    [
        (FLUX, PLANNED, BLOCKS),
        (WAN, ADAPTIVE, BLOCKS),
        (WAN, every_other_block(), BLOCKS),
        (WAN, dict(policy="teacache", threshold=0.3), BLOCKS),
        (DIT, dict(scope="branch", **PLANNED), LEAVES),
        (WAN, dict(policy="teacache", threshold=0.3), LEAVES),
    ],
    ids=["stack", "probe", "blocks", "begun", "leaves", "leaves-begun"],
)
def test_groups_that_are_loaded_ahead(name, method, options, monkeypatch):
    """Blocks that run have their weights, and none that was loaded to be skipped stays loaded."""
    expected, seen = anew(name, load(name), method)
    assert any(reused for *_, reused in seen)
    pipe = load(name)
    left = offload_ahead(name, pipe, monkeypatch, **options)
    assert torch.equal(generate(name, pipe), uncached(name))
    assert torch.equal(anew(name, pipe, method)[0], expected)
    assert not left


@pytest.mark.parametrize(
    ("name", "cast_first", "storage"),
    all_pairs(reference.MODELS, [True, False], [torch.float8_e4m3fn, torch.bfloat16]),
)
def test_layerwise_casting(name, cast_first, storage):
    def cast(pipe):
        denoiser_of(name, pipe).enable_layerwise_casting(storage_dtype=storage, compute_dtype=torch.float32)

    twin, pipe = load(name), load(name)
    cast(twin)
    plain = generate(name, twin)
    if not cast_first:
        dc.enable(pipe, **PLANNED)
        generate(name, pipe)
    cast(pipe)
    dc.enable(pipe, **PLANNED)
    assert torch.equal(generate(name, pipe), anew(name, twin)[0])
    dc.disable(pipe)
    assert torch.equal(generate(name, pipe), plain)
    assert not torch.equal(plain, uncached(name))


# quantised weights


def quantized_by_torchao(name):
    torchao = pytest.importorskip("torchao.quantization")

    def quantize(pipe):
        torchao.quantize_(denoiser_of(name, pipe), torchao.Int8WeightOnlyConfig())

    return quantize


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("name", "quantized_first", "method"), all_pairs(reference.MODELS, [True, False], [*METHODS]))
def test_torchao_int8_weights(name, quantized_first, method):
    method = METHODS[method]
    quantize = quantized_by_torchao(name)
    twin, pipe = load(name), load(name)
    quantize(twin)
    linears = [module for module in denoiser_of(name, twin).modules() if isinstance(module, nn.Linear)]
    assert {type(module.weight.data).__name__ for module in linears} == {"Int8Tensor"}
    plain = generate(name, twin)
    if not quantized_first:
        dc.enable(pipe, **method)
        generate(name, pipe)
    quantize(pipe)
    if quantized_first:
        dc.enable(pipe, **method)
    expected, seen = anew(name, twin, method)
    assert torch.equal(generate(name, pipe), expected)
    assert records(pipe) == seen
    assert any(reused for *_, reused in seen)
    dc.disable(pipe)
    assert torch.equal(generate(name, pipe), plain)
    assert not torch.equal(plain, uncached(name))


def has(package):
    return importlib.util.find_spec(package) is not None


def check_quantised_anew(name, denoiser, tmp_path, config, device, **options):
    """A denoiser that is read from a file in another form, cached by every scope."""
    twin, pipe = load(name), load(name)
    for loaded in (twin, pipe):
        put(name, loaded, type(denoiser).from_pretrained(tmp_path, quantization_config=config, **options))
        loaded.to(device)
    given = {
        key: value.to(device)
        for key, value in reference.inputs(name, (3,), (5,), steps=STEPS).items()
        if isinstance(value, torch.Tensor)
    }
    plain = generate(name, twin, **given)
    for scope in ("stack", "block", "denoiser"):
        method = PLANNED | dict(scope=scope)
        dc.enable(pipe, **method)
        assert torch.equal(generate(name, pipe, **given), anew(name, twin, method, **given)[0])
        assert dc.summary(pipe).hit_rate == 0.5
    dc.disable(pipe)
    assert torch.equal(generate(name, pipe, **given), plain)


@pytest.mark.gpu
@pytest.mark.skipif(not has("bitsandbytes"), reason="needs bitsandbytes, which diffusers loads only with a GPU")
@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes(bits, tmp_path):
    denoiser = reference.denoiser(FLUX)
    denoiser.save_pretrained(tmp_path)
    config = diffusers.BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    check_quantised_anew(FLUX, denoiser, tmp_path, config, "cuda", torch_dtype=torch.float16)


@pytest.mark.skipif(not has("gguf"), reason="needs the gguf package")
def test_gguf(tmp_path):
    import gguf
    from diffusers.quantizers.gguf.utils import _replace_with_gguf_linear

    def quantize(pipe):
        """As diffusers does when it reads a .gguf file: linear layers that hold packed weights."""
        denoiser = pipe.transformer
        weights = {f"{n}.weight": m.weight for n, m in denoiser.named_modules() if isinstance(m, nn.Linear)}
        kind = gguf.GGMLQuantizationType.Q8_0
        packed = {
            key: diffusers.quantizers.gguf.utils.GGUFParameter(
                torch.from_numpy(gguf.quants.quantize(weight.detach().numpy(), kind)), quant_type=kind
            )
            for key, weight in weights.items()
            if weight.shape[-1] % 32 == 0
        }
        biases = {n: m.bias for n, m in denoiser.named_modules() if f"{n}.weight" in packed}
        _replace_with_gguf_linear(denoiser, torch.float32, packed)
        for key, parameter in packed.items():
            module = denoiser.get_submodule(key.removesuffix(".weight"))
            module.weight, module.bias = parameter, biases[key.removesuffix(".weight")]
        assert len(packed) > 20

    twin, pipe = load(FLUX), load(FLUX)
    quantize(twin)
    plain = generate(FLUX, twin)
    assert not torch.equal(plain, uncached(FLUX))
    torch.testing.assert_close(plain, uncached(FLUX), rtol=0, atol=0.2)
    dc.enable(pipe, **PLANNED)
    generate(FLUX, pipe)
    quantize(pipe)
    assert torch.equal(generate(FLUX, pipe), anew(FLUX, twin)[0])
    assert dc.summary(pipe).hit_rate == 0.5
    dc.disable(pipe)
    assert torch.equal(generate(FLUX, pipe), plain)


# copies and files


@each_model
def test_a_saved_pipeline_reloads_uncached_and_can_be_enabled(name, tmp_path):
    pipe = load(name)
    expected, _ = expected_of(name)
    dc.enable(pipe, **PLANNED)
    generate(name, pipe)
    pipe.save_pretrained(tmp_path)
    assert not [path for path in tmp_path.rglob("*.json") if "diffusion_cache_mark" in path.read_text()]
    assert torch.equal(generate(name, pipe), expected)  # saving has changed nothing
    missing = {part: None for part, component in pipe.components.items() if component is None}
    other = made(type(pipe).from_pretrained(tmp_path, vae=pipe.vae, **missing))
    other.set_progress_bar_config(disable=True)
    assert untouched(denoiser_of(name, other))
    # equal weights read from a file lie elsewhere in memory, which alone changes how sums are rounded
    torch.testing.assert_close(generate(name, other), uncached(name), rtol=0, atol=1e-4)
    dc.enable(other, **PLANNED)
    torch.testing.assert_close(generate(name, other), expected, rtol=0, atol=1e-4)
    assert torch.equal(generate(name, pipe), expected)


def by_pickle(denoiser):
    return pickle.loads(pickle.dumps(denoiser))


def by_file(denoiser):
    file = io.BytesIO()
    torch.save(denoiser, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


DUPLICATES = [copy.deepcopy, copy.copy, by_pickle, by_file]


@pytest.mark.parametrize(
    ("name", "duplicate", "within"),
    all_pairs([UNET, FLUX, WAN], DUPLICATES, [True, False])
    + [(DIT, duplicate, False) for duplicate in DUPLICATES],  # DiTPipeline has no callbacks
)
def test_a_copy_of_the_denoiser_runs_on_its_own(name, duplicate, within):
    """Made between calls or within one, it is uncached, and can be cached by another pipeline."""
    pipe, copies = load(name), []
    expected, _ = expected_of(name)
    dc.enable(pipe, **PLANNED)

    def take(pipe, kwargs):
        copies.append(duplicate(denoiser_of(name, pipe)))

    if within:
        assert torch.equal(generate(name, pipe, **at_step(2, take)), expected)
    else:
        generate(name, pipe)
        take(pipe, {})
    other = load(name)
    put(name, other, copies[0])
    atol = 1e-4 if duplicate in (by_pickle, by_file) else 0  # weights lie elsewhere in memory
    torch.testing.assert_close(generate(name, other), uncached(name), rtol=0, atol=atol)
    dc.enable(other, **PLANNED)
    torch.testing.assert_close(generate(name, other), expected, rtol=0, atol=atol)
    dc.disable(pipe)
    torch.testing.assert_close(generate(name, other), expected, rtol=0, atol=atol)
    assert torch.equal(generate(name, pipe), uncached(name))
    dc.disable(other)
    assert untouched(denoiser_of(name, pipe))
    assert untouched(copies[0])


# hooks


class Counting(diffusers.hooks.ModelHook):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def pre_forward(self, module, *args, **kwargs):
        self.calls += 1
        return args, kwargs


@in_any_order
@each_model
def test_diffusers_hooks_in_any_order(name, first, undone_first):
    from diffusers.hooks import HookRegistry

    pipe = load(name)
    denoiser = denoiser_of(name, pipe)
    modules = [denoiser, *(module for module in denoiser.modules() if "Block" in type(module).__name__)]
    forwards = [module.forward.__func__ for module in modules]
    hooks = {module: Counting() for module in modules}

    def hook():
        for module, own in hooks.items():
            HookRegistry.check_if_exists_or_initialize(module).register_hook(own, "counting")

    def unhook():
        for module in hooks:
            HookRegistry.check_if_exists_or_initialize(module).remove_hook("counting", recurse=False)

    acts = [hook, lambda: dc.enable(pipe, **PLANNED)]
    for act in acts if first else acts[::-1]:
        act()
    expected, seen = expected_of(name)
    assert torch.equal(generate(name, pipe), expected)
    assert records(pipe) == seen
    calls = [own.calls for own in hooks.values()]
    assert calls[0] == len(seen)  # the denoiser itself runs at every step, its blocks at the computed ones
    assert min(calls) == sum(done for _, _, done, *_ in seen) == calls[0] // 2
    if undone_first:
        unhook()
        assert torch.equal(generate(name, pipe), expected)
        dc.disable(pipe)
    else:
        dc.disable(pipe)
        assert torch.equal(generate(name, pipe), uncached(name))
        assert [own.calls - before for own, before in zip(hooks.values(), calls, strict=True)] == [len(seen)] * len(
            calls
        )
        unhook()
    assert torch.equal(generate(name, pipe), uncached(name))
    assert [module.forward.__func__ for module in modules] == forwards
    assert untouched(denoiser)


# modes of torch


@pytest.mark.parametrize("forecaster", ["reuse", "taylor"])
@pytest.mark.parametrize("method", [PLANNED, dict(policy="first_block", threshold=0.02)], ids=["planned", "adaptive"])
def test_inference_mode_comes_and_goes_within_a_run(method, forecaster):
    """What was stored in inference mode cannot be written into outside of it."""
    denoiser = reference.denoiser(DIT)
    noise = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    samples = [noise + step * torch.tensor([0.2, 0.0]).reshape(2, 1, 1, 1) for step in range(8)]

    def outputs(modes):
        with dc.run(denoiser, forecaster=forecaster, num_steps=8, **method) as run:
            found = []
            for sample, mode in zip(samples, modes, strict=True):
                run.next_step()
                with mode():
                    found.append(denoiser(sample, torch.tensor([500, 500]), class_labels=torch.tensor([1, 2])).sample)
            return found, [(r.reason, r.spans_reused) for r in run.summary().records]

    expected, seen = outputs([torch.no_grad] * 8)
    assert len({reason for reason, _ in seen}) > 1 or method is PLANNED
    for mixed in ("nniinnii", "iinnnini", "innnnnni", "ngingigi"):
        modes = [dict(n=torch.no_grad, i=torch.inference_mode, g=torch.enable_grad)[letter] for letter in mixed]
        found, said = outputs(modes)
        assert said == seen
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


class Chain(nn.Module):
    """Three residual blocks between two layers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.leave = nn.Linear(4, 8), nn.Linear(8, 4)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)) for _ in range(3))
        self.around = nn.ModuleList(Residual(block) for block in self.blocks)
        del self.blocks

    def forward(self, x, timestep):
        x = self.enter(x)
        for block in self.around:
            x = block(x)
        return self.leave(torch.tanh(x))


class Residual(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return x + self.inner(x)


def gradients(output, *wanted):
    weights = torch.linspace(-1, 1, output.numel()).reshape(output.shape)
    return torch.autograd.grad((output * weights).sum(), wanted, allow_unused=True, retain_graph=True)


@pytest.mark.parametrize("forecaster", ["reuse", "taylor"])
@pytest.mark.parametrize("scope", ["stack", "block"])
def test_a_reused_step_has_the_gradient_of_base_plus_a_constant(scope, forecaster):
    """What a span adds to its input was computed at other steps, and is constant to this one."""
    model = Chain()
    samples = [torch.randn(2, 4, generator=torch.Generator().manual_seed(i), requires_grad=True) for i in range(4)]
    constants = []
    with dc.run(model, "mask", forecaster, mask="1110", num_steps=4, scope=scope) as run:
        outputs = []
        for step, sample in enumerate(samples):
            run.next_step()
            outputs.append(model(sample, step))
        assert [r.spans_reused for r in run.summary().records] == [0, 0, 0, 1 if scope == "stack" else 3]
    for step in range(3):
        plain = model(samples[step], step)
        assert torch.equal(outputs[step], plain)
        wanted = (samples[step], *model.parameters())
        for found, expected in zip(gradients(outputs[step], *wanted), gradients(plain, *wanted), strict=True):
            assert torch.equal(found, expected)

    x = samples[3]
    entered = model.enter(x)
    with torch.no_grad():
        states = [[model.enter(sample)] for sample in samples[:3]]
        for state in states:
            for block in model.around:
                state.append(block(state[-1]))
        parts = [(0, 3)] if scope == "stack" else [(0, 1), (1, 2), (2, 3)]
        for start, end in parts:
            features = [state[end] - state[start] for state in states]
            constants.append(features[2] if forecaster == "reuse" else 2 * features[2] - features[1])
    by_hand = model.leave(torch.tanh(entered + sum(constants)))
    torch.testing.assert_close(outputs[3], by_hand)
    wanted = (x, *model.enter.parameters(), *model.leave.parameters())
    for found, expected in zip(gradients(outputs[3], *wanted), gradients(by_hand, *wanted), strict=True):
        assert expected.abs().max() > 0
        torch.testing.assert_close(found, expected)
    inside = list(model.around.parameters())
    assert gradients(outputs[3], *inside) == (None,) * len(inside)


def test_gradients_where_only_some_samples_are_computed():
    """Rows that are computed have their own gradient, the others that of base plus a constant."""
    model = Chain()
    moved, still = torch.randn(2, 1, 4, generator=torch.Generator().manual_seed(0))
    samples = [torch.cat([moved + step * torch.linspace(0, 1, 4), still]).requires_grad_() for step in range(4)]
    with dc.run(model, "first_block", "reuse", threshold=0.01, num_steps=4) as run:
        outputs = []
        for step, sample in enumerate(samples):
            run.next_step()
            outputs.append(model(sample, step))
        reasons = [r.reason for r in run.summary().records]
    assert [reason.startswith("1 of 2 samples") for reason in reasons] == [False, True, True, True]
    for step in range(1, 4):
        wanted = (samples[step], *model.around[1].parameters())
        plain = model(samples[step], step)
        torch.testing.assert_close(outputs[step], plain)
        found, expected = gradients(outputs[step][:1], *wanted), gradients(plain[:1], *wanted)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)
        assert found[0][1].abs().max() == 0  # a row takes nothing from the others
        assert gradients(outputs[step][1:], *wanted[1:])[0].abs().max() == 0
        assert gradients(outputs[step][1:], samples[step])[0][1].abs().max() > 0


def test_a_whole_loop_is_differentiated_with_checkpoints():
    """Computed blocks run once more on the way back, when the run is over; reused ones have nothing to run again.

    So it is with non-reentrant checkpoints, which are diffusers'. Reentrant ones run reused blocks as well.
    """
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(Chain):
        def forward(self, x, timestep):
            x = self.enter(x)
            for block in self.around:
                x = checkpoint(block, x, use_reentrant=False)
            return self.leave(torch.tanh(x))

    def loop(model):
        x = start = torch.randn(2, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
        with dc.run(model, "interval", "reuse", every=2, scope="block", num_steps=6) as run:
            for step in range(6):
                run.next_step()
                x = x - 0.1 * model(x, step)
            assert [r.spans_reused for r in run.summary().records] == [0, 3] * 3
        (x * torch.linspace(-1, 1, 8).reshape(2, 4)).sum().backward()
        return [tensor.grad for tensor in (start, *model.parameters())]

    for found, expected in zip(loop(Checkpointed()), loop(Chain()), strict=True):
        assert expected.abs().max() > 0
        torch.testing.assert_close(found, expected)


# threads


@each_method
@pytest.mark.parametrize("name", [UNET, FLUX])
def test_enabling_and_disabling_in_another_thread(name, method):
    """Another pipeline around the same denoiser comes and goes while this one runs."""
    first = load(name)
    second = made(type(first).from_pipe(first, vae=first.vae, scheduler=copy.deepcopy(first.scheduler)))
    second.set_progress_bar_config(disable=True)
    expected, seen = anew(name, load(name), method)
    dc.enable(first, **method)
    barrier, results = threading.Barrier(2), []

    def meet(pipe, kwargs):
        barrier.wait(timeout=60)

    def everywhere(pipe, index, timestep, kwargs):
        meet(pipe, kwargs)
        return kwargs

    def come_and_go():
        for _ in range(STEPS // 3):
            dc.enable(second, "interval", every=3)
            barrier.wait(timeout=60)
            results.append(generate(name, second, steps=3))
            barrier.wait(timeout=60)
            dc.disable(second)
            barrier.wait(timeout=60)

    with ThreadPoolExecutor(2) as pool:
        works = [pool.submit(generate, name, first, callback_on_step_end=everywhere), pool.submit(come_and_go)]
        images, _ = [work.result(timeout=120) for work in works]
    assert torch.equal(images, expected)
    assert records(first) == seen
    other, _ = anew(name, load(name), dict(policy="interval", every=3), steps=3)
    assert all(torch.equal(result, other) for result in results)
    dc.disable(first)
    assert untouched(denoiser_of(name, first))


def test_two_threads_differentiate_one_denoiser():
    model = Chain()
    barrier = threading.Barrier(2)

    def work(seed):
        x = torch.randn(2, 4, generator=torch.Generator().manual_seed(seed), requires_grad=True)
        with dc.run(model, "interval", "reuse", every=2 + seed, num_steps=6) as run:
            total = 0.0
            for step in range(6):
                run.next_step()
                if barrier.parties > 1:
                    barrier.wait(timeout=60)
                total = total + model(x * (1 + step), step)
            return [total, *gradients(total, x)], [r.computed for r in run.summary().records]

    with ThreadPoolExecutor(2) as pool:
        together = [future.result(timeout=60) for future in [pool.submit(work, seed) for seed in (0, 1)]]
    barrier = threading.Barrier(1)
    for (values, steps), (expected, expected_steps) in zip(together, [work(0), work(1)], strict=True):
        assert steps == expected_steps
        assert all(torch.equal(a, b) for a, b in zip(values, expected, strict=True))
    assert together[0][1] == [True, False] * 3
    assert together[1][1] == [True, False, False] * 2
    assert untouched(model)


# no memory


def out_of_memory(function, calls):
    """The function, but for the given calls of it."""
    count = iter(range(10**6))

    def fails(*args, **kwargs):
        if next(count) in calls:
            raise torch.OutOfMemoryError("no room")
        return function(*args, **kwargs)

    return fails


@pytest.mark.parametrize("forecaster", ["reuse", "taylor"])
@each_model
def test_no_room_for_one_feature(name, forecaster, monkeypatch):
    """That step is computed all the same, and the next one too: as with a mask that says so."""
    method = dict(policy="interval", every=2, forecaster=forecaster, scope="denoiser")
    per_step = len(expected_of(name)[1]) // STEPS
    missing = set(range(per_step, 2 * per_step))  # those of the second computed step
    mask = dict(policy="mask", mask="101110", forecaster=forecaster, scope="denoiser")
    expected, _ = anew(name, load(name), mask)
    if forecaster == "taylor":  # at its last step it knows the two steps before, as the cached run does
        assert not torch.equal(expected, anew(name, load(name), mask | dict(forecaster="reuse"))[0])
    pipe = load(name)
    dc.enable(pipe, **method)
    before = generate(name, pipe)
    with monkeypatch.context() as patch:
        patch.setattr(history, "store", out_of_memory(history.store, missing))
        with warned(1, "OutOfMemoryError: no room"):
            assert torch.equal(generate(name, pipe), expected)
    assert computed(pipe)[::per_step] == "101110"
    assert torch.equal(generate(name, pipe), before)
    dc.disable(pipe)
    assert torch.equal(generate(name, pipe), uncached(name))


FAILING = {"storing": (history, "store"), "forecasting": (ops, "forecast")}


@pytest.mark.parametrize(("name", "what", "method"), all_pairs(reference.MODELS, FAILING, [*METHODS]))
def test_no_room_at_all(name, what, method, monkeypatch):
    given, pipe = dict(labels=(3, 8), seeds=(5, 6)), load(name)
    what, method = FAILING[what], METHODS[method]
    plain = generate(name, pipe, **given)
    dc.enable(pipe, **method)
    before = generate(name, pipe, **given)
    assert not torch.equal(before, plain)
    with monkeypatch.context() as patch:
        patch.setattr(*what, out_of_memory(getattr(*what), range(10**6)))
        with warned(1, "OutOfMemoryError: no room"):
            assert torch.equal(generate(name, pipe, **given), plain)
    assert dc.summary(pipe).hit_rate == 0
    assert torch.equal(generate(name, pipe, **given), before)


@pytest.mark.parametrize("nth", [0, 3])
@pytest.mark.parametrize("name", PARTLY)
def test_no_room_where_only_some_samples_are_computed(name, nth, monkeypatch):
    """Their call goes on with what was computed and forecast; the next one is computed for all."""
    pipe = load(name)
    images, seen = anew(name, load(name), PARTLY[name], **TWO)
    step = partly(seen)[nth]
    dc.enable(pipe, **PARTLY[name])
    observe_rows, failed = history.History._observe_rows, []

    def fails(self, nodes, *args):
        if nodes[0] == step and not failed:
            failed.append(step)
            raise torch.OutOfMemoryError("no room")
        return observe_rows(self, nodes, *args)

    with monkeypatch.context() as patch:
        patch.setattr(history.History, "_observe_rows", fails)
        with warned(1, "OutOfMemoryError: no room"):
            stopped = generate(name, pipe, **TWO)
    assert failed == [step]
    found = records(pipe)
    assert found[: step + 1] == seen[: step + 1]
    assert found[step + 1][2] is True
    assert found[step + 1][4] == 0
    assert (stopped - generate(name, load(name), **TWO)).abs().mean() < 0.1
    assert torch.equal(generate(name, pipe, **TWO), images)
    assert records(pipe) == seen


def test_inputs_of_spans_that_store_nothing_are_not_copied_in_inference_mode(monkeypatch):
    steps, mark_of = [], frame.mark_of

    def noted(tensor):
        steps.append(patches.ACTIVE.get().frame.step.index)
        return mark_of(tensor)

    monkeypatch.setattr(frame, "mark_of", noted)
    pipe = load(FLUX)
    schedule = Schedule(tuple(((True, step % 2 == 0),) for step in range(STEPS)))
    with torch.inference_mode(), dc.cached(pipe, plan=Plan("second", "stack", None, "auto", schedule, ())):
        generate(FLUX, pipe)
        assert [row.spans_reused for row in dc.summary(pipe).records] == [0, 1] * (STEPS // 2)
    assert set(steps) == {0}  # of the second stack, of which nothing is known yet
