"""torch.compile: of the whole denoiser or of its blocks, before or after enabling."""

import copy
import warnings

import diffusers
import pytest
import small
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import diffusion_cache as dc
from diffusion_cache import reference
from diffusion_cache.plan import Plan
from diffusion_cache.schedule import Schedule

STEPS = 8


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def generate(name, pipe, steps=STEPS, labels=(3,)):
    return reference.images(name, pipe(**reference.inputs(name, labels, range(len(labels)), steps=steps)))


def denoiser_name(name):
    return reference.spec(name).denoiser


def wrap(name, pipe, backend):
    denoiser = getattr(pipe, denoiser_name(name))
    setattr(pipe, denoiser_name(name), torch.compile(denoiser, backend=backend, fullgraph=True))


def in_place(name, pipe, backend):
    getattr(pipe, denoiser_name(name)).compile(backend=backend, fullgraph=True)


def by_forward(name, pipe, backend):
    denoiser = getattr(pipe, denoiser_name(name))
    denoiser.forward = torch.compile(denoiser.forward, backend=backend, fullgraph=True)


def repeated_blocks(name, pipe, backend):
    getattr(pipe, denoiser_name(name)).compile_repeated_blocks(backend=backend, fullgraph=True)


def counting(backend="eager"):
    return CompileCounterWithBackend(backend)


def cached_uncompiled(name, steps, load=small.load, **method):
    pipe = load(name)
    with dc.cached(pipe, **method):
        return generate(name, pipe, steps)


@pytest.mark.parametrize(
    ("load", "name", "scope", "compile_it", "before"),
    [
        (reference.load, "flux-digits", "stack", wrap, True),
        (small.load, "dit-digits", "stack", in_place, True),
        (small.load, "dit-digits", "stack", by_forward, False),
        (small.load, "wan-moving-digits", "stack", wrap, False),
        (small.load, "flux-digits", "denoiser", wrap, True),
        (small.load, "unet-digits", "denoiser", in_place, False),
    ],
)
def test_a_whole_denoiser_has_two_graphs_and_no_break(load, name, scope, compile_it, before):
    method = dict(policy="interval", forecaster="taylor", every=2, scope=scope)
    expected, longer = (cached_uncompiled(name, steps, load, **method) for steps in (STEPS, STEPS + 3))
    # aot_eager functionalises as the real backends do: writes into what blocks pass on would be seen
    pipe, backend = load(name), counting("aot_eager" if compile_it is wrap else "eager")
    attributes = {key: dict(vars(module)) for key, module in getattr(pipe, denoiser_name(name)).named_modules()}
    uncached = generate(name, pipe)
    if before:
        compile_it(name, pipe, backend)
    dc.enable(pipe, **method)
    if not before:
        compile_it(name, pipe, backend)
    with warnings.catch_warnings():
        warnings.simplefilter("error", dc.DiffusionCacheWarning)
        assert (generate(name, pipe) - expected).abs().max() <= 1e-5
        assert backend.frame_count == (2 if scope == "stack" else 1)
        assert [r.computed for r in dc.summary(pipe).records][:: passes(name)] == [True, False] * (STEPS // 2)
        # other step indices, history lengths and weights
        assert (generate(name, pipe) - expected).abs().max() <= 1e-5
        assert (generate(name, pipe, STEPS + 3) - longer).abs().max() <= 1e-5
    assert backend.frame_count == (2 if scope == "stack" else 1)
    if load is reference.load:  # of many blocks, and none of them in the graph of a reused step
        sizes = [sum(node.op == "call_function" for node in graph.graph.nodes) for graph in backend.graphs]
        reused, computed = sorted(sizes)
        assert reused < 0.2 * computed
    dc.disable(pipe)
    own = getattr(pipe, denoiser_name(name))
    assert (generate(name, pipe) - uncached).abs().max() <= 1e-5
    for key, module in getattr(own, "_orig_mod", own).named_modules():
        if key:
            assert dict(vars(module)) == attributes[key]


def passes(name):
    return 2 if name == "wan-moving-digits" else 1


@pytest.mark.slow
def test_another_size_is_learned_anew():
    name, method = "flux-digits", dict(policy="interval", forecaster="taylor", every=2, scope="stack")
    plain = small.load(name)
    pipe, backend = small.load(name), counting()
    wrap(name, pipe, backend)
    dc.enable(plain, **method)
    dc.enable(pipe, **method)
    for labels in ((3,), (1, 2)):
        assert (generate(name, pipe, labels=labels) - generate(name, plain, labels=labels)).abs().max() <= 1e-5


def test_a_mask_with_a_long_warmup():
    name = "dit-digits"
    method = dict(policy="mask", forecaster="taylor", mask="11110100", scope="stack")
    pipe, backend = small.load(name), counting()
    wrap(name, pipe, backend)
    dc.enable(pipe, **method)
    assert (generate(name, pipe) - cached_uncompiled(name, STEPS, **method)).abs().max() <= 1e-5
    assert backend.frame_count <= 2


def test_always_computing_compiles_once():
    name = "flux-digits"
    pipe, backend = small.load(name), counting()
    uncached = generate(name, pipe)
    wrap(name, pipe, backend)
    with dc.cached(pipe, "interval", every=1, scope="stack"):
        assert (generate(name, pipe) - uncached).abs().max() <= 1e-5
        assert dc.summary(pipe).reused == 0
    assert backend.frame_count == 1


@pytest.mark.parametrize("before", [True, False], ids=["compiled first", "enabled first"])
@pytest.mark.parametrize(
    "method",
    [
        dict(policy="interval", forecaster="taylor", every=2, scope="block"),
        dict(policy="first_block", forecaster="taylor", threshold=0.3),
        dict(policy="teacache", forecaster="taylor", threshold=0.3),
    ],
    ids=["block", "adaptive", "looking-inside"],
)
def test_compiled_blocks(method, before):
    """Each block has its one graph; decisions, adaptive ones as well, stay outside."""
    name = "flux-digits"
    pipe, backend = small.load(name), counting()
    uncompiled = cached_uncompiled(name, STEPS, **method)
    if before:
        repeated_blocks(name, pipe, backend)
        generate(name, pipe)
        count = backend.frame_count
    dc.enable(pipe, **method)
    if not before:
        repeated_blocks(name, pipe, backend)
    assert (generate(name, pipe) - uncompiled).abs().max() <= 1e-5
    assert dc.summary(pipe).reused > 0
    if before:
        assert backend.frame_count == count
    count = backend.frame_count
    assert (generate(name, pipe) - uncompiled).abs().max() <= 1e-5
    assert backend.frame_count == count


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("flux-digits", dict(policy="interval", every=2, scope="block")),
        ("flux-digits", dict(policy="interval", every=2, scope="branch")),
        ("flux-digits", dict(policy="first_block", threshold=0.3)),
        ("unet-digits", dict(policy="interval", every=2, scope="cut")),
    ],
    ids=["block", "branch", "adaptive", "cut"],
)
def test_what_a_whole_compiled_denoiser_hides_is_told(name, method):
    pipe = small.load(name)
    uncached = generate(name, pipe)
    wrap(name, pipe, "eager")
    with dc.cached(pipe, **method), pytest.warns(dc.DiffusionCacheWarning, match="compiled as a whole"):
        assert (generate(name, pipe) - uncached).abs().max() <= 1e-5
    with dc.cached(pipe, **method):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", dc.DiffusionCacheWarning)
            generate(name, pipe)
        assert dc.summary(pipe).reused == 0


def test_runs_of_a_bare_denoiser_share_their_graphs():
    name = "flux-digits"
    pipe, backend = small.load(name), counting()
    calls = []
    hook = pipe.transformer.register_forward_pre_hook(lambda m, args, kwargs: calls.append(kwargs), with_kwargs=True)
    generate(name, pipe)
    hook.remove()
    model = pipe.transformer
    model.compile(backend=backend, fullgraph=True)
    outputs = []
    for _ in range(12):  # more than the compiler would compile anew
        with torch.no_grad(), dc.run(model, "interval", "taylor", every=2, num_steps=4, scope="stack") as run:
            outputs.append([model(**call)[0] for call in calls[:4] if run.next_step() is None])
            assert [record.computed for record in run.summary().records] == [True, False, True, False]
    assert backend.frame_count == 2
    assert all((a - b).abs().max() <= 1e-5 for later in outputs[1:] for a, b in zip(outputs[0], later, strict=True))
    assert not [key for block in model.transformer_blocks for key in vars(block) if key == "forward"]


def test_features_of_a_compiled_denoiser_are_released():
    name = "flux-digits"
    pipe = small.load(name)
    wrap(name, pipe, "eager")
    dc.enable(pipe, "interval", "taylor", every=2, scope="stack")
    generate(name, pipe)
    (compiled,) = vars(pipe)["_diffusion_cache"].compiled.values()
    assert all(
        (cell.slots, cell.bases, cell.weights, cell.feature) == ([], [], None, None) for cell in compiled.cells.values()
    )


@pytest.mark.slow
def test_calls_from_outside_the_run_pass_through():
    """An uncached pipeline on the same compiled transformer, called from a callback, gives what it always gives."""
    name = "flux-digits"
    pipe, other = small.load(name), small.load(name)
    wrap(name, pipe, "eager")
    other.transformer = pipe.transformer
    expected = generate(name, other, 2)
    seen = []

    def look(pipe, index, timestep, kwargs):
        seen.append(generate(name, other, 2))
        return kwargs

    with dc.cached(pipe, "interval", "taylor", every=2, scope="stack"):
        pipe(**reference.inputs(name, (3,), (0,), steps=6), callback_on_step_end=look)
        assert (generate(name, other, 2) - expected).abs().max() <= 1e-5
    assert len(seen) == 6
    assert all((image - expected).abs().max() <= 1e-5 for image in seen)


def test_forwards_replaced_in_the_meantime_stay():
    name = "flux-digits"
    pipe = small.load(name)
    wrap(name, pipe, "eager")
    block = pipe.transformer.transformer_blocks[1]
    with dc.cached(pipe, "interval", "taylor", every=2, scope="stack"):
        generate(name, pipe)
        inner, calls = block.forward, []

        def hooked(*args, **kwargs):
            calls.append(1)
            return inner(*args, **kwargs)

        block.forward = hooked
    assert block.forward is hooked
    torch._dynamo.reset()
    pipe.transformer = pipe.transformer._orig_mod
    expected = generate(name, small.load(name))
    assert torch.equal(generate(name, pipe), expected)
    assert len(calls) == STEPS


def test_each_forecaster_keeps_its_own_features():
    name = "flux-digits"
    pipe = small.load(name)
    wrap(name, pipe, "eager")
    for feature in ("residual", "output", "residual"):
        method = dict(policy="interval", forecaster="reuse", feature=feature, every=2, scope="stack")
        with dc.cached(pipe, **method):
            found = generate(name, pipe)
        assert (found - cached_uncompiled(name, STEPS, **method)).abs().max() <= 1e-5


def test_the_second_denoiser_is_cached_in_every_run():
    """It starts in the middle of the mask, where nothing is planned to be computed."""
    name = "wan-moving-digits"

    def pair():
        pipe = small.load(name)
        parts = {**pipe.components, "transformer_2": copy.deepcopy(pipe.transformer)}
        both = diffusers.WanPipeline(**parts, boundary_ratio=0.8)
        both.set_progress_bar_config(disable=True)
        return both

    def records(pipe):
        pipe(**reference.inputs(name, (3,), (0,), STEPS, guidance=1.0))
        return [(r.denoiser, r.computed) for r in dc.summary(pipe).records]

    method = dict(policy="mask", forecaster="reuse", mask="1" + "0" * (STEPS - 1), scope="stack")
    plain, pipe = pair(), pair()
    for own in ("transformer", "transformer_2"):
        setattr(pipe, own, torch.compile(getattr(pipe, own), backend="eager"))
    dc.enable(plain, **method)
    dc.enable(pipe, **method)
    expected = records(plain)
    assert [computed for _, computed in expected].count(True) == 2
    assert [records(pipe) for _ in range(2)] == [expected] * 2


def test_a_feature_that_is_not_finite_is_computed_once_more():
    model = small.load("dit-digits").transformer
    model.compile(backend="eager")
    x, again = torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(0)), []
    for _ in range(2):
        with torch.no_grad(), dc.run(model, "mask", "reuse", mask="110000", num_steps=6, scope="stack") as run:
            for step in range(6):
                run.next_step()
                given = x * float("nan") if step == 1 else x
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", dc.DiffusionCacheWarning)
                    model(given, timestep=torch.tensor([500]), class_labels=torch.tensor([3]))
            again.append([record.computed for record in run.summary().records])
    assert again == [[True, True, True, False, False, False]] * 2


def test_spans_that_are_always_computed_take_no_memory():
    name = "flux-digits"
    rows = [(True, step % 2 == 0) for step in range(STEPS)]
    plan = Plan("second", "stack", None, "auto", Schedule(tuple((row,) for row in rows)), ())
    plain, pipe = small.load(name), small.load(name)
    wrap(name, pipe, "eager")
    for each in (plain, pipe):
        dc.enable(each, plan=plan)
    for _ in range(2):  # all are stored at the first step, to learn from
        assert (generate(name, pipe) - generate(name, plain)).abs().max() <= 1e-5
    assert dc.summary(pipe).cache_bytes == dc.summary(plain).cache_bytes > 0
    assert [r.spans_reused for r in dc.summary(pipe).records] == [0, 1] * (STEPS // 2)
