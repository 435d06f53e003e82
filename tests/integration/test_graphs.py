"""Generations with `cuda_graphs=True`, captured and repeated by a stand-in on the CPU: the same images as without."""

import copy
import threading
import warnings

import pytest
import torch
from recorded_graph import RecordingCapturer

import diffusion_cache as dc
from diffusion_cache import ops, reference
from diffusion_cache.engine import graphs
from diffusion_cache.errors import DiffusionCacheWarning
from diffusion_cache.plan import Plan
from diffusion_cache.schedule import Schedule

STEPS = 6
TAYLOR = dict(policy="interval", forecaster="taylor", every=2)


def planned(scope, *masks, branches=1, history=3):
    """A plan with weights of their own for every step, branch in the rows of a call, and span. masks: of each span."""
    total, spans = len(masks[0]), len(masks)
    nodes = torch.full((total, spans, history), -1, dtype=torch.int32)
    weights = torch.full((total, branches, spans, history), torch.nan, dtype=torch.float64)
    for span, mask in enumerate(masks):
        computed = [step for step in range(total) if mask[step] == "1"]
        for step in sorted({*range(total)} - {*computed}):
            last = [node for node in computed if node < step][-history:]
            given = 0.3 * torch.sin(torch.arange(branches * len(last), dtype=torch.float64) + 7 * step + 3 * span)
            given = given.view(branches, -1)
            given[:, -1] += 1 - given.sum(1)
            nodes[step, span, -len(last) :] = torch.tensor(last, dtype=torch.int32)
            weights[step, :, span] = 0.0
            weights[step, :, span, -len(last) :] = given
    schedule = Schedule(tuple((tuple(mask[step] == "1" for mask in masks),) for step in range(total)))
    return dict(plan=Plan("made up", scope, None, "auto", schedule, (), nodes, weights, row_passes=branches))


# of each run of one sample, calls of the denoiser; in float64, where weights as tensors round like weights as numbers
CASES = {
    "stack": ("flux-digits", dict(scope="stack", **TAYLOR), STEPS),
    "guidance in rows": ("dit-digits", dict(scope="block", **TAYLOR), STEPS),
    "guidance in calls": ("wan-moving-digits", dict(scope="stack", **TAYLOR), 2 * STEPS),
    "cut": ("unet-digits", dict(scope="cut", **TAYLOR), STEPS),
    "blocks of a unet": ("unet-digits", dict(scope="block", **TAYLOR), STEPS),
    "branches": ("flux-digits", dict(scope="branch", **TAYLOR), STEPS),
    "denoiser": ("dit-digits", dict(scope="denoiser", **TAYLOR), STEPS),
    "older features": ("flux-digits", dict(scope="stack", policy="interval", every=2, forecaster="hermite"), STEPS),
    "kept inputs": (
        "flux-digits",
        dict(scope="denoiser", policy="interval", every=2, forecaster="average_velocity"),
        STEPS,
    ),
    "corrected": ("dit-digits", dict(scope="stack", corrector="affine", scale=1.01, bias=0.02, **TAYLOR), STEPS),
    "growing gaps": ("dit-digits", dict(scope="stack", policy="mask", forecaster="taylor", mask="110100"), STEPS),
    "plan": ("flux-digits", planned("stack", "11010010"), 8),
    "plan for two branches": ("dit-digits", planned("stack", "11010010", branches=2), 8),
    "router": ("unet-digits", planned("block", "10101011", *["10101010"] * 5, "10101011", history=2), 8),
}


@pytest.fixture(autouse=True)
def capturers(monkeypatch):
    """The stand-ins that were made, one for each denoiser of each session."""
    made = []
    monkeypatch.setattr(graphs, "capturer", lambda device: made.append(RecordingCapturer()) or made[-1])
    return made


def load(name, dtype=torch.float64):
    return reference.load(name, dtype=dtype)


def generate(name, pipe, labels=(3,), steps=STEPS, seed=0, **options):
    call = reference.inputs(name, labels, range(seed, seed + len(labels)), steps=steps)
    dtype = getattr(pipe, reference.spec(name).denoiser).dtype
    call = {key: value.to(dtype) if isinstance(value, torch.Tensor) else value for key, value in call.items()}
    return reference.images(name, pipe(**{**call, **options}))


def messages(told):
    return [str(one.message) for one in told if issubclass(one.category, DiffusionCacheWarning)]


def replays(capturers):
    return sum(graph.replays for capturer in capturers for graph in capturer.graphs)


@pytest.mark.parametrize("case", CASES)
def test_images_are_the_same(case, capturers):
    name, method, calls = CASES[case]
    steps = calls // (2 if case == "guidance in calls" else 1)
    plain, pipe = load(name), load(name)
    dc.enable(plain, **method)
    dc.enable(pipe, **method, cuda_graphs=True)
    capturers.clear()
    counts = []
    with warnings.catch_warnings():
        warnings.simplefilter("error", DiffusionCacheWarning)
        for labels, seed in ((3,), 0), ((8, 1), 4), ((5,), 9):
            expected = generate(name, plain, labels, steps, seed)
            found = generate(name, pipe, labels, steps, seed)
            assert (found - expected).abs().max() <= 1e-6
            summary = dc.summary(pipe)
            assert [record.computed for record in summary.records] == [r.computed for r in dc.summary(plain).records]
            assert summary.reused > 0
            counts.append(summary.replayed)
    assert sum(counts) == replays(capturers)
    assert min(counts) > 0
    if "policy" in method:  # else there are ways of calling that come once in a run
        assert counts[2] == calls


@pytest.mark.parametrize("code", ["fp8", "int8"])
def test_features_in_codes(code, capturers):
    name, method = "flux-digits", dict(scope="block", cache_dtype=code, **TAYLOR)
    plain, pipe = load(name, torch.float32), load(name, torch.float32)
    dc.enable(plain, **method)
    dc.enable(pipe, **method, cuda_graphs=True)
    for seed in (0, 1):
        expected, found = generate(name, plain, seed=seed), generate(name, pipe, seed=seed)
        assert (found - expected).abs().max() <= 1e-3  # a code may round the other way
        assert dc.summary(pipe).cache_bytes == dc.summary(plain).cache_bytes
    assert dc.summary(pipe).replayed == STEPS
    assert replays(capturers) > STEPS


def test_a_feature_is_what_a_replay_reads(capturers):
    """The images are right because of what the slots hold: with other contents they are others."""
    name = "flux-digits"
    pipe = load(name)
    session = dc.enable(pipe, scope="stack", cuda_graphs=True, **TAYLOR)
    expected = generate(name, pipe)

    def disturb(pipe, index, timestep, kwargs):
        if index == STEPS - 2:
            for slots in session.graphs["transformer"]._slots.values():
                for tensor in (tensor for held in slots for tensor in held):
                    tensor.mul_(1.5)
        return kwargs

    assert torch.equal(generate(name, pipe), expected)
    assert (generate(name, pipe, callback_on_step_end=disturb) - expected).abs().max() > 1e-3
    assert torch.equal(generate(name, pipe), expected)


def test_nothing_is_captured_of_calls_that_do_not_come_again(capturers):
    name = "flux-digits"
    pipe = load(name)
    dc.enable(pipe, scope="stack", cuda_graphs=True, **TAYLOR)
    generate(name, pipe, steps=2)
    assert [capturer.graphs for capturer in capturers if capturer.graphs] == []
    assert dc.summary(pipe).replayed == 0


def test_after_disable_and_enabling_again(capturers):
    name = "dit-digits"
    pipe = load(name)
    uncached = generate(name, pipe)
    found = []
    for _ in range(2):
        with dc.cached(pipe, scope="stack", cuda_graphs=True, **TAYLOR):
            found += [generate(name, pipe), generate(name, pipe)]
            assert dc.summary(pipe).replayed == STEPS
        assert torch.equal(generate(name, pipe), uncached)
    assert all(torch.equal(one, found[0]) for one in found)


def test_after_a_run_that_fails(capturers):
    name = "wan-moving-digits"
    pipe = load(name)
    dc.enable(pipe, scope="stack", cuda_graphs=True, **TAYLOR)
    expected = generate(name, pipe)

    def fail(pipe, index, timestep, kwargs):
        if index == 3:
            raise KeyboardInterrupt
        return kwargs

    with pytest.raises(KeyboardInterrupt):
        generate(name, pipe, labels=(8,), callback_on_step_end=fail)
    assert (generate(name, pipe) - expected).abs().max() <= 1e-6
    assert dc.summary(pipe).replayed == 2 * STEPS


def test_more_ways_than_are_kept(capturers, monkeypatch):
    name = "flux-digits"
    monkeypatch.setattr(graphs, "MAX_GRAPHS", 1)
    plain, pipe = load(name), load(name)
    dc.enable(plain, scope="stack", **TAYLOR)
    dc.enable(pipe, scope="stack", cuda_graphs=True, **TAYLOR)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for labels in ((3,), (3,), (1, 2), (1, 2)):
            assert (generate(name, pipe, labels) - generate(name, plain, labels)).abs().max() <= 1e-6
            # the calls of an earlier run's size have made room
            assert 0 < dc.summary(pipe).replayed < STEPS
    (message,) = messages(told)
    assert "in more than 1 ways in a run: the others go without" in message


def test_values_that_are_not_finite(capturers):
    """Told as without graphs, with the same pixels lost."""
    name = "dit-digits"
    found = []
    for options in ({}, dict(cuda_graphs=True)):
        pipe = load(name)
        generated = []
        with dc.cached(pipe, scope="block", **options, **TAYLOR):
            generated.append(generate(name, pipe))
            pipe.transformer.transformer_blocks[0].register_forward_hook(
                lambda module, args, output: output * torch.nan
            )
            with pytest.warns(DiffusionCacheWarning, match="not finite"):
                generated.append(generate(name, pipe))
        found.append(torch.stack(generated))
    assert (found[0].nan_to_num(2) - found[1].nan_to_num(2)).abs().max() <= 1e-6


def test_nothing_that_is_not_finite_stays_in_slots(capturers):
    name = "flux-digits"
    pipe = load(name)
    dc.enable(pipe, scope="stack", cuda_graphs=True, **TAYLOR)
    generate(name, pipe)
    expected = generate(name, pipe)
    with pytest.warns(DiffusionCacheWarning, match="not finite"):
        generate(name, pipe, prompt_embeds=torch.full((1, 4, 64), torch.nan, dtype=torch.float64))
    assert torch.equal(generate(name, pipe), expected)
    assert dc.summary(pipe).replayed == STEPS


def without_and_with(name):
    """Two pipelines alike, the second one with graphs that were replayed, and what that gave."""
    plain, pipe = load(name), load(name)
    dc.enable(plain, scope="stack", **TAYLOR)
    dc.enable(pipe, scope="stack", cuda_graphs=True, **TAYLOR)
    generate(name, pipe)
    return plain, pipe, generate(name, pipe)


def test_weights_that_change_where_they_are(capturers):
    """As fusing a LoRA changes them."""
    name = "flux-digits"
    plain, pipe, before = without_and_with(name)
    for changed in (plain, pipe):
        changed.transformer.transformer_blocks[1].attn.to_q.weight.data.mul_(1.5)
    found = generate(name, pipe)
    assert dc.summary(pipe).replayed == STEPS
    assert (found - before).abs().max() > 1e-4
    assert (found - generate(name, plain)).abs().max() <= 1e-6


def moved(pipe):
    weight = pipe.transformer.transformer_blocks[1].attn.to_q.weight
    weight.data = weight.data * 1.5


def hooked(pipe):
    pipe.transformer.transformer_blocks[1].register_forward_hook(
        lambda module, args, output: tuple(x * 1.1 for x in output)
    )


@pytest.mark.parametrize("change", [moved, hooked])
def test_what_moves_between_runs_is_captured_anew(change, capturers):
    name = "flux-digits"
    plain, pipe, before = without_and_with(name)
    for changed in (plain, pipe):
        change(changed)
    with pytest.warns(DiffusionCacheWarning, match="have changed: its graphs are captured anew"):
        found = generate(name, pipe)
    assert 0 < dc.summary(pipe).replayed < STEPS
    assert (found - before).abs().max() > 1e-4
    expected = generate(name, plain)
    assert (found - expected).abs().max() <= 1e-6
    assert (generate(name, pipe) - expected).abs().max() <= 1e-6
    assert dc.summary(pipe).replayed == STEPS


def test_calls_that_cannot_be_captured(capturers):
    """A block that waits for the device: told once, and the images are right."""
    name = "dit-digits"
    plain, pipe = load(name), load(name)
    for one in (plain, pipe):
        one.transformer.transformer_blocks[0].register_forward_hook(
            lambda module, args, output: output * (1.0 + 0.01 * float(output.mean()))
        )
    dc.enable(plain, scope="stack", **TAYLOR)
    dc.enable(pipe, scope="stack", cuda_graphs=True, **TAYLOR)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(2):
            assert (generate(name, pipe) - generate(name, plain)).abs().max() <= 1e-6
    (message,) = messages(told)
    assert "could not be captured" in message
    assert "RuntimeError: operation not permitted when stream is capturing" in message
    records = dc.summary(pipe).records
    assert [record.replayed for record in records] == [not record.computed for record in records]


def cast(pipe):
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float64)


def put_elsewhere(pipe):
    """A weight gets new memory in each call, by a hook of which nothing is known."""
    pipe.transformer.proj_out.register_forward_hook(
        lambda module, args, output: setattr(module.weight, "data", module.weight.data.clone())
    )


@pytest.mark.parametrize(
    ("change", "later", "told"),
    [
        (cast, False, "layerwise casting gives the weights new memory"),
        (cast, True, "layerwise casting gives the weights new memory"),
        (put_elsewhere, False, "weights, modules or settings change while it runs"),
    ],
)
def test_weights_that_move_while_the_denoiser_runs(change, later, told, capturers):
    """No graphs, told once, and the weights stay what they are."""
    name = "flux-digits"
    plain, pipe = load(name), load(name)
    if later:
        dc.enable(pipe, scope="stack", cuda_graphs=True, **TAYLOR)
        generate(name, pipe)
        generate(name, pipe)
    for changed in (plain, pipe):
        change(changed)
    without = generate(name, plain)
    dc.enable(plain, scope="stack", **TAYLOR)
    expected = generate(name, plain)
    if not later:
        dc.enable(pipe, scope="stack", cuda_graphs=True, **TAYLOR)
    with warnings.catch_warnings(record=True) as known:
        warnings.simplefilter("always")
        for _ in range(3):
            assert (generate(name, pipe) - expected).abs().max() <= 1e-6
            assert dc.summary(pipe).replayed == 0
    assert sum(told in message for message in messages(known)) == 1
    dc.disable(pipe)
    assert torch.equal(generate(name, pipe), without)


def in_training(denoiser):
    denoiser.train()
    return torch.no_grad()


def with_gradients(denoiser):
    return torch.enable_grad()


@pytest.mark.parametrize(
    ("way", "told"),
    [(in_training, "in training mode"), (with_gradients, "gradients are on")],
)
def test_calls_that_go_without(way, told, capturers):
    denoiser, calls = recorded_calls()
    with way(denoiser), pytest.warns(DiffusionCacheWarning, match=told):
        found = in_a_loop(denoiser, calls, cuda_graphs=True)
    with way(denoiser):
        expected = in_a_loop(denoiser, calls)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert replays(capturers) == 0


def test_under_autocast(capturers):
    denoiser, calls = recorded_calls()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.warns(DiffusionCacheWarning, match="autocast is on"):
            found = in_a_loop(denoiser, calls, cuda_graphs=True)
        expected = in_a_loop(denoiser, calls)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert replays(capturers) == 0


class Setting:
    """What may change without a graph noticing."""


def test_arguments_that_cannot_be_compared(capturers):
    denoiser, calls = recorded_calls()
    denoiser.register_forward_pre_hook(
        lambda m, args, kwargs: (args, dict(kwargs, joint_attention_kwargs=None)), with_kwargs=True
    )
    given = [dict(call, joint_attention_kwargs={"odd": Setting()}) for call in calls]
    with (
        torch.no_grad(),
        pytest.warns(DiffusionCacheWarning, match="whether a Setting among the arguments has changed"),
    ):
        in_a_loop(denoiser, given, cuda_graphs=True)
    assert replays(capturers) == 0


def test_a_loop_of_ones_own(capturers):
    denoiser, calls = recorded_calls()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            expected = in_a_loop(denoiser, calls)
            before = replays(capturers)
            found = in_a_loop(denoiser, calls, cuda_graphs=True)
        assert replays(capturers) > before
        assert all((a - b).abs().max() <= 1e-6 for a, b in zip(found, expected, strict=True))


def test_outputs_stay_as_they_were_given(capturers):
    denoiser, calls = recorded_calls()
    with torch.no_grad():
        found = in_a_loop(denoiser, calls * 2, cuda_graphs=True, keep=lambda output: output)
        kept = in_a_loop(denoiser, calls * 2, cuda_graphs=True, keep=torch.clone)
    assert replays(capturers) > 0
    assert all(torch.equal(a, b) for a, b in zip(found, kept, strict=True))


def recorded_calls():
    """A denoiser and the arguments that a pipeline gives it at each step."""
    pipe, calls = load("flux-digits"), []
    hook = pipe.transformer.register_forward_pre_hook(lambda m, args, kwargs: calls.append(kwargs), with_kwargs=True)
    generate("flux-digits", pipe)
    hook.remove()
    return pipe.transformer, calls


def in_a_loop(denoiser, calls, keep=torch.clone, **options):
    found = []
    with dc.run(denoiser, num_steps=len(calls), scope="stack", **TAYLOR, **options) as run:
        for call in calls:
            found.append(keep(denoiser(**call)[0]))
            run.next_step()
    return found


def test_runs_beside_each_other(capturers):
    """The memory is one run's at a time: another goes without graphs, and neither sees the other's features."""
    name = "flux-digits"
    pipe, plain = load(name), load(name)
    dc.enable(plain, scope="stack", **TAYLOR)
    session = dc.enable(pipe, scope="stack", cuda_graphs=True, **TAYLOR)
    generate(name, pipe)
    expected = [generate(name, plain), generate(name, plain, labels=(8,), seed=5)]
    found, summaries = {}, {}

    def beside():
        pipe.scheduler = copy.deepcopy(pipe.scheduler)  # which counts the outer run's steps
        found["inner"] = generate(name, pipe, labels=(8,), seed=5)
        summaries["inner"] = session.last_run.records

    def interrupt(pipe, index, timestep, kwargs):
        if index == 2:
            scheduler = pipe.scheduler
            thread = threading.Thread(target=beside)
            thread.start()
            thread.join()
            pipe.scheduler = scheduler
        return kwargs

    with pytest.warns(DiffusionCacheWarning, match="a run has begun before another of the same denoiser is over"):
        found["outer"] = generate(name, pipe, callback_on_step_end=interrupt)
    assert (found["outer"] - expected[0]).abs().max() <= 1e-6
    assert (found["inner"] - expected[1]).abs().max() <= 1e-6
    assert not any(record.replayed for record in summaries["inner"])
    assert dc.summary(pipe).replayed == STEPS
    assert (generate(name, pipe) - expected[0]).abs().max() <= 1e-6


def test_a_run_that_was_refused_stays_so():
    """Its features are in memory of its own."""
    first, second = CacheRunLike(), CacheRunLike()
    kept = graphs.Graphs(torch.nn.Linear(2, 2))
    assert kept.serves(first)
    with pytest.warns(DiffusionCacheWarning, match="goes without graphs"):
        assert not kept.serves(second)
    assert kept.serves(first)
    kept.release(second)
    assert kept.serves(first)
    kept.release(first)
    assert not kept.serves(second)
    assert kept.serves(CacheRunLike())


class CacheRunLike:
    """What a run is for who has the memory: itself."""


def test_forecasts_that_blocks_make(monkeypatch, capturers):
    """As on a GPU, where a branch's gate is part of its forecast."""
    name, method = "flux-digits", dict(scope="branch", **TAYLOR)
    plain, pipe = load(name), load(name)
    dc.enable(plain, **method)
    expected = generate(name, plain)
    gated = []
    of_branch = ops.gated_forecast
    monkeypatch.setattr(ops, "fuses", lambda features: features[0].ndim == 3)
    monkeypatch.setattr(ops, "gated_forecast", lambda *given: gated.append(given[3]) or of_branch(*given))
    dc.enable(pipe, cuda_graphs=True, **method)
    with warnings.catch_warnings():
        warnings.simplefilter("error", DiffusionCacheWarning)
        for _ in range(2):
            assert (generate(name, pipe) - expected).abs().max() <= 1e-6
    assert dc.summary(pipe).replayed == STEPS
    assert any(isinstance(weights, torch.Tensor) for weights in gated)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (dict(policy="first_block"), "policy 'first_block' decides in the middle of a call"),
        (dict(policy="interval", every=2, forecaster="rfc"), "forecaster 'rfc' is no weighted sum"),
        (dict(cache_dtype="int8-delta", **TAYLOR), "moves features from slot to slot.*take 'int8'"),
        (dict(cache_device="cpu", **TAYLOR), "cache_device is not for CUDA graphs"),
        (dict(max_cache_bytes=1000, **TAYLOR), "max_cache_bytes is not for CUDA graphs"),
        (dict(stream=dc.Stream(), **TAYLOR), "stream is not for CUDA graphs"),
        (dict(unconditional_every=2, **TAYLOR), "unconditional_every takes one pass for another's input"),
    ],
)
def test_what_graphs_do_not_go_with(options, problem):
    pipe = load("flux-digits")
    with pytest.raises(dc.ConfigError, match=problem):
        dc.enable(pipe, cuda_graphs=True, **options)
    assert not [name for name in vars(pipe) if "diffusion_cache" in name]


def test_a_denoiser_compiled_as_a_whole():
    pipe = load("flux-digits")
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    with pytest.raises(dc.ConfigError, match=r"compiled as a whole: .*reduce-overhead"):
        dc.enable(pipe, cuda_graphs=True, **TAYLOR)


def test_without_a_cuda_device(monkeypatch):
    monkeypatch.undo()
    pipe = load("flux-digits")
    with pytest.raises(dc.ConfigError, match="stays on a CUDA device, and this one is on cpu"):
        dc.enable(pipe, cuda_graphs=True, **TAYLOR)
    assert not [name for name in vars(pipe) if "diffusion_cache" in name]
    with pytest.raises(dc.ConfigError, match="cuda_graphs must be True or False, not 'yes'"):
        dc.enable(pipe, cuda_graphs="yes", **TAYLOR)


def test_a_denoiser_that_is_moved_away(capturers, monkeypatch):
    name = "flux-digits"
    pipe = load(name)
    dc.enable(pipe, scope="stack", cuda_graphs=True, **TAYLOR)
    generate(name, pipe)
    expected = generate(name, pipe)
    monkeypatch.setattr(graphs, "device_of", lambda denoiser: torch.device("cuda", 1))
    monkeypatch.setattr(graphs, "capturer", refused)
    with pytest.warns(DiffusionCacheWarning, match="no graphs there: such calls go without graphs"):
        assert (generate(name, pipe) - expected).abs().max() <= 1e-6
    assert dc.summary(pipe).replayed == 0


def refused(device):
    raise dc.ConfigError("no graphs there")
