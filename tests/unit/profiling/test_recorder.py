"""What is recorded of real generations, against features that plain hooks see."""

from contextlib import ExitStack
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from diffusion_cache import reference
from diffusion_cache.engine import session_of
from diffusion_cache.errors import ConfigError
from diffusion_cache.history import Leaf
from diffusion_cache.models import Span
from diffusion_cache.profile import SpanFacts
from diffusion_cache.profiling import recorder as module
from diffusion_cache.profiling.attention import AttentionReceived
from diffusion_cache.profiling.generation import Batch
from diffusion_cache.profiling.recorder import Recorder, Survey, Watched, attention_names, per_sample, surveyed

STEPS, COUNT = 4, 2
GRAM_TOLERANCE = dict(rtol=1e-5, atol=1e-6)


def batch(name, count=COUNT, steps=STEPS, pipe=None):
    pipe = reference.load(name) if pipe is None else pipe
    given = [*range(count)], [100_000 + i for i in range(count)]
    return Batch(
        pipe,
        lambda: pipe(**reference.inputs(name, *given, steps)),
        lambda output: reference.images(name, output),
        count,
    )


def recorded(made, scope=None, depth=None, attention=False, **options):
    """Survey, recorder after the batch, and the batch's images."""
    with surveyed(made, scope, depth) as (session, survey):
        noted = AttentionReceived(attention_names(survey), survey.steps) if attention else None
        session.observer = found = Recorder(survey, made.count, attention=noted, **options)
        with found.watching():
            images = made.images(made.call())
    return survey, found, images


def watched(made, modules):
    """What each call of some modules was given and gave: {name: [(args, kwargs, output), …]}, by plain hooks."""
    seen = {name: [] for name in modules}
    with ExitStack() as stack:
        for name, part in modules.items():

            def hook(part, args, kwargs, output, name=name):
                seen[name].append((args, kwargs, output))

            stack.callback(part.register_forward_hook(hook, with_kwargs=True).remove)
        made.call()
    return seen


def flat(tensors, rows):
    """Leaves [rows·n, …] as [rows, n, elements], float64."""
    whole = torch.cat([tensor.flatten(1) for tensor in tensors], dim=1).double()
    return whole.unflatten(0, (rows, -1))


def check_moments(arrays, span, features, inputs=None):
    """features, inputs: [T, P, n, elements]."""
    count = features.shape[2]
    gram = torch.einsum("tpne,upne->ptu", features, features) / count
    torch.testing.assert_close(arrays["gram_residual"][span], gram, **GRAM_TOLERANCE)
    outputs = features if inputs is None else features + inputs
    gram = torch.einsum("tpne,upne->ptu", outputs, outputs) / count
    torch.testing.assert_close(arrays["gram_output"][span], gram, **GRAM_TOLERANCE)
    cross = torch.zeros_like(gram)
    if inputs is not None:
        cross = torch.einsum("tpne,upne->ptu", features, inputs) / count
        energy = inputs.square().sum(3).mean(2).T
        torch.testing.assert_close(arrays["input_energy"][span].double(), energy, **GRAM_TOLERANCE)
    torch.testing.assert_close(arrays["cross_input"][span], cross, rtol=1e-5, atol=1e-5 * float(gram.max()))


def test_a_stack_with_guidance_in_its_rows():
    made = batch("dit-digits")
    blocks = made.pipe.transformer.transformer_blocks
    seen = watched(made, {"first": blocks[0], "last": blocks[-1]})
    survey, found, _ = recorded(made)
    assert (survey.scope, survey.steps, survey.rows) == ("stack", STEPS, 2)
    assert survey.passes == ("0", "1")
    assert survey.sample_shape == (1, 16, 16)
    assert len(survey.noise_levels) == STEPS
    assert survey.spans[0].grid == (1, 8, 8)
    pairs = [(args[0], last[2]) for (args, _, _), last in zip(seen["first"], seen["last"], strict=True)]
    inputs = torch.stack([flat([x], 2) for x, _ in pairs])
    features = torch.stack([flat([y - x], 2) for x, y in pairs])
    arrays = found.arrays()
    check_moments(arrays, 0, features, inputs)
    by_channel = torch.stack([(y - x).unflatten(0, (2, -1)) for x, y in pairs]).double()  # [T, P, n, N, C]
    torch.testing.assert_close(
        arrays["channel_mean.0"].double().transpose(0, 1), by_channel.mean((2, 3)), **GRAM_TOLERANCE
    )
    square = by_channel.square().mean((2, 3))
    torch.testing.assert_close(arrays["channel_square.0"].double().transpose(0, 1), square, **GRAM_TOLERANCE)
    before, now = features[:-1], features[1:]
    l1 = ((now - before).abs().mean(3) / before.abs().mean(3)).mean(2).T
    torch.testing.assert_close(arrays["residual_l1"][0, :, 1:].double(), l1, rtol=1e-4, atol=0)
    l1 = ((inputs[1:] - inputs[:-1]).abs().mean(3) / inputs[:-1].abs().mean(3)).mean(2).T
    torch.testing.assert_close(arrays["input_l1"][0, :, 1:].double(), l1, rtol=1e-4, atol=0)
    assert arrays["residual_l1"][0, :, 0].isnan().all()
    assert arrays["filtered_l1"][0, :, 1:].isfinite().all()


def test_stacks_with_two_streams():
    made = batch("flux-digits")
    transformer = made.pipe.transformer
    ends = {
        "first": transformer.transformer_blocks[0],
        "last": transformer.transformer_blocks[-1],
        "single": transformer.single_transformer_blocks[0],
        "end": transformer.single_transformer_blocks[-1],
    }
    seen = watched(made, ends)
    survey, found, _ = recorded(made)
    assert [one.facts.name for one in survey.spans] == ["transformer_blocks", "single_transformer_blocks"]
    assert (survey.rows, survey.passes) == (1, ("cond",))
    assert survey.spans[0].grid == (1, 8, 8)
    arrays = found.arrays()
    for span, (start, end) in enumerate((("first", "last"), ("single", "end"))):
        features, inputs = [], []
        for (_, kwargs, _), (_, _, output) in zip(seen[start], seen[end], strict=True):
            bases = kwargs["encoder_hidden_states"], kwargs["hidden_states"]
            features.append(flat([y - x for x, y in zip(bases, output, strict=True)], 1))
            inputs.append(flat(bases, 1))
        check_moments(arrays, span, torch.stack(features), torch.stack(inputs))


def test_guidance_in_calls_of_their_own():
    made = batch("wan-moving-digits", count=1)
    blocks = made.pipe.transformer.blocks
    seen = watched(made, {"first": blocks[0], "last": blocks[-1]})
    survey, found, _ = recorded(made)
    assert (survey.rows, survey.passes) == (1, ("cond", "uncond"))
    assert survey.spans[0].grid == (7, 4, 4)
    pairs = [(args[0], last[2]) for (args, _, _), last in zip(seen["first"], seen["last"], strict=True)]
    inputs = torch.stack([flat([x], 1)[0] for x, _ in pairs]).unflatten(0, (STEPS, 2))
    features = torch.stack([flat([y - x], 1)[0] for x, y in pairs]).unflatten(0, (STEPS, 2))
    check_moments(found.arrays(), 0, features, inputs)


def test_a_cut_has_outputs_only():
    made = batch("unet-digits", count=1)
    seen = watched(made, {"last": made.pipe.unet.up_blocks[-2], "first": made.pipe.unet.down_blocks[1]})
    survey, found, _ = recorded(made, depth=1)
    assert survey.spans[0].facts.feature == "output"
    features = torch.stack([flat([output], 2) for _, _, output in seen["last"]])
    arrays = found.arrays()
    check_moments(arrays, 0, features)
    assert not arrays["input_energy"].any()
    # the input has its curve all the same
    x = torch.stack(
        [
            flat([kwargs["hidden_states"] if kwargs.get("hidden_states") is not None else args[0]], 2)
            for args, kwargs, _ in seen["first"]
        ]
    )
    l1 = ((x[1:] - x[:-1]).abs().mean(3) / x[:-1].abs().mean(3)).mean(2).T
    torch.testing.assert_close(arrays["input_l1"][0, :, 1:].double(), l1, rtol=1e-4, atol=0)


@pytest.mark.parametrize("scope", ["denoiser", "block", "branch"])
def test_every_scope(scope):
    made = batch("dit-digits", count=1)
    blocks = made.pipe.transformer.transformer_blocks
    part, place = {
        "denoiser": (made.pipe.transformer, 0),
        "block": (blocks[5], 5),
        "branch": (blocks[5].attn1, 10),
    }[scope]
    seen = watched(made, {"part": part})["part"]
    survey, found, _ = recorded(made, scope)
    facts = [one.facts for one in survey.spans]
    assert len(facts) == {"denoiser": 1, "block": 12, "branch": 24}[scope]
    outputs = [output.sample if scope == "denoiser" else output for _, _, output in seen]
    inputs = None
    features = torch.stack([flat([y], 2) for y in outputs])
    if scope == "block":
        inputs = torch.stack([flat([args[0]], 2) for args, _, _ in seen])
        features = torch.stack([flat([y - args[0]], 2) for y, (args, _, _) in zip(outputs, seen, strict=True)])
    assert facts[place].feature == ("residual" if scope == "block" else "output")
    assert facts[place].elements == features.shape[-1]
    check_moments(found.arrays(), place, features, inputs)


def test_shares_are_of_the_denoisers_operations():
    made = batch("dit-digits", count=1, steps=2)
    with surveyed(made, "stack") as (_, survey):
        whole = survey.spans[0].facts.share
    assert survey.shares == "flops"
    with surveyed(made, "block") as (_, survey):
        shares = [one.facts.share for one in survey.spans]
    assert sum(shares) == pytest.approx(whole)
    assert shares == pytest.approx([whole / 12] * 12)
    assert 0.9 < whole < 1
    with surveyed(made, "branch") as (_, survey):
        assert 0.9 * whole < sum(one.facts.share for one in survey.spans) < whole
    with surveyed(made, "denoiser") as (_, survey):
        assert survey.spans[0].facts.share == 1


def test_shares_of_parameters_where_operations_cannot_be_counted(monkeypatch):
    made = batch("dit-digits", count=1, steps=2)
    monkeypatch.setattr(module, "is_compiled", lambda part: True)
    with surveyed(made, "block") as (_, survey):
        shares = [one.facts.share for one in survey.spans]
    assert survey.shares == "parameters"
    total = sum(p.numel() for p in made.pipe.transformer.parameters())
    block = sum(p.numel() for p in made.pipe.transformer.transformer_blocks[3].parameters())
    assert shares[3] == pytest.approx(block / total)


def test_shares_of_parameters_where_counting_fails(monkeypatch):
    made = batch("dit-digits", count=1, steps=2)

    class Counter(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            raise TypeError("no implementation found")

    monkeypatch.setattr(module, "FlopCounter", Counter)
    with surveyed(made, "block") as (_, survey):
        assert survey.shares == "parameters"
    assert survey.steps == 2
    monkeypatch.undo()
    made.pipe.transformer.register_forward_pre_hook(lambda part, args: 1 / 0)
    with pytest.raises(ZeroDivisionError), surveyed(made, "block"):
        pass
    assert session_of(made.pipe) is None


def test_guidance_that_ends_before_the_last_step():
    pipe = reference.load("unet-digits")

    def end_guidance(pipe, step, timestep, kwargs):
        if step == 1:
            pipe._guidance_scale = 1.0
            kwargs["prompt_embeds"] = kwargs["prompt_embeds"].chunk(2)[-1]
        return kwargs

    def call():
        given = reference.inputs("unet-digits", [0, 1], [100_000, 100_001], STEPS)
        return pipe(**given, callback_on_step_end=end_guidance, callback_on_step_end_tensor_inputs=["prompt_embeds"])

    made = Batch(pipe, call, lambda output: reference.images("unet-digits", output), 2)
    outputs = [output for _, _, output in watched(made, {"last": pipe.unet.up_blocks[-2]})["last"]]
    assert [len(output) for output in outputs] == [4, 4, 2, 2]
    survey, found, _ = recorded(made)
    assert (survey.rows, survey.passes) == (2, ("0", "1"))
    gram = found.arrays()["gram_output"][0]
    # as in a history: rows that are there at every step are the first branch's
    first = torch.stack([flat([output[:2]], 1)[0] for output in outputs])
    torch.testing.assert_close(gram[0], torch.einsum("tne,une->tu", first, first) / 2, **GRAM_TOLERANCE)
    second = torch.stack([flat([output[2:]], 1)[0] for output in outputs[:2]])
    torch.testing.assert_close(gram[1, :2, :2], torch.einsum("tne,une->tu", second, second) / 2, **GRAM_TOLERANCE)
    assert not gram[1, 2:].any()


def test_passes_may_differ_in_size():
    made = batch("dit-digits", count=1, steps=2)
    with surveyed(made, None) as (_, survey):
        found = Recorder(replace(survey, rows=1), 1)
    span = survey.spans[0].span
    features = {0: torch.rand(2, 5, 3), 1: torch.rand(2, 7, 3)}  # by pass: [steps, tokens, channels]
    with found.watching():
        for step in range(2):
            for position, feature in features.items():
                frame = SimpleNamespace(
                    step=SimpleNamespace(index=step), reason="", counts={}, batch=1, position=position
                )
                found.span_computed(frame, span, {"x": torch.ones(1, 2)}, [Leaf(None)], [feature[step : step + 1]])
    arrays = found.arrays()
    for index, feature in features.items():
        flattened = feature.flatten(1).double()
        torch.testing.assert_close(arrays["gram_residual"][0, index], flattened @ flattened.T)
        torch.testing.assert_close(arrays["channel_mean.0"][index], feature.mean(1))


def test_spans_that_never_run_keep_their_place():
    made = batch("flux-digits", count=1, steps=2)
    with surveyed(made, None) as (session, survey):
        absent = Watched(
            Span("absent", "stack", ()), replace(survey.spans[0].facts, elements=1, share=0.0), None, False
        )
        survey = replace(survey, spans=(survey.spans[0], absent, survey.spans[1]))
        session.observer = found = Recorder(survey, 1)
        with found.watching():
            made.call()
    arrays, plain = found.arrays(), recorded(made)[1].arrays()
    for name in ("gram_residual", "cross_input", "input_energy"):
        assert torch.equal(arrays[name][[0, 2]], plain[name])
        assert not arrays[name][1].any()
    assert arrays["norm_ratio"][1].isnan().all()
    assert torch.equal(arrays["channel_mean.2"], plain["channel_mean.1"])
    assert "channel_mean.1" not in arrays


def test_nothing_is_changed_and_nothing_stays_behind():
    made = batch("flux-digits")
    before = made.images(made.call())
    _, _, images = recorded(made, attention=True, scope="block")
    assert torch.equal(images, before)
    assert session_of(made.pipe) is None
    assert torch.equal(made.images(made.call()), before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in made.pipe.transformer.modules())


def test_parts_add_up():
    made = batch("dit-digits", count=2, steps=3)
    whole = recorded(made)[1]
    with surveyed(made, None) as (session, survey):
        total = Recorder(survey)
        for row in range(2):
            given = [row], [100_000 + row]
            session.observer = part = Recorder(survey, 1, seed=row)
            with part.watching():
                made.pipe(**reference.inputs("dit-digits", *given, 3))
            again = Recorder(survey)
            again.load_state_dict(part.state_dict())
            total.merge(again)
    for name, values in total.arrays().items():
        torch.testing.assert_close(values, whole.arrays()[name], rtol=1e-3, atol=1e-5, equal_nan=True)


def test_sketches_stay_near_and_small():
    made = batch("dit-digits", count=4)
    exact, wide = recorded(made)[1], recorded(made, exact_bytes=0, width=1024, seed=3)[1]
    gram, near = exact.arrays()["gram_residual"][0], wide.arrays()["gram_residual"][0]
    energy = gram.diagonal(dim1=1, dim2=2)
    error = (near - gram) / (energy[:, :, None] * energy[:, None]).sqrt()
    assert 0 < float(error.abs().max()) < 4 * (2 / 1024 / 4) ** 0.5
    assert wide.peak_bytes < exact.peak_bytes / 2
    # two passes of features and inputs, and the last step of each pass beside
    assert wide.peak_bytes < 2 * 2 * STEPS * 4 * 1024 * 4 + 2 * 2 * 4 * 6144 * 4 + 2**17


def test_attention_belongs_to_its_block(monkeypatch):
    made = batch("dit-digits", count=1)
    _, found, _ = recorded(made, "block", attention=True)
    seen = []
    plain = F.scaled_dot_product_attention

    def attention(query, key, value, *args, **kwargs):
        seen.append((query @ key.mT / query.shape[-1] ** 0.5).softmax(-1).mean((0, 1, 2)))
        return plain(query, key, value, *args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    made.call()
    assert len(seen) == 12 * STEPS
    received = found.attention.result()
    assert len(received) == 12
    for block in (0, 7):
        expected = torch.stack([seen[12 * step + block] for step in range(STEPS)])
        torch.testing.assert_close(received[f"attention_received.{block}"], expected, rtol=1e-4, atol=1e-6)


# what cannot be recorded


def test_a_nan_is_told_with_its_step():
    made = batch("dit-digits", count=1)
    calls = []

    def poison(part, args, output):
        calls.append(part)
        return output * torch.nan if len(calls) == 3 else None

    with surveyed(made, None) as (session, survey):
        handle = made.pipe.transformer.transformer_blocks[4].register_forward_hook(poison)
        session.observer = found = Recorder(survey, 1)
        told = pytest.raises(ConfigError, match=r"transformer_blocks \(pass 0\) gave NaN or infinity at step 2")
        with told, found.watching():
            made.call()
        handle.remove()
    assert session_of(made.pipe) is None


def test_other_rows_than_before():
    made = batch("dit-digits", count=1)
    other = batch("dit-digits", 2, pipe=made.pipe)
    with surveyed(made, None) as (session, survey):
        session.observer = found = Recorder(survey, 1)
        told = pytest.raises(ConfigError, match="called with 4 rows for 1 samples in at most 2 guidance branches")
        with told, found.watching():
            other.call()


def test_other_steps_than_before():
    made = batch("dit-digits", count=1)
    with surveyed(made, None) as (session, survey):
        session.observer = found = Recorder(survey, 1)
        told = pytest.raises(ConfigError, match=r"\(pass 0\): step 4 is outside the profile's 4 steps")
        with told, found.watching():
            batch("dit-digits", 1, steps=6, pipe=made.pipe).call()


def test_several_loops_in_one_call():
    made = batch("dit-digits", count=1, steps=2)
    with surveyed(made, None) as (_, survey):
        found = Recorder(survey, 1)

    def computed(index):
        frame = SimpleNamespace(step=SimpleNamespace(index=index), counts={}, batch=2, position=0)
        found.span_computed(frame, survey.spans[0].span, {"x": torch.ones(2, 3)}, [Leaf("x")], [torch.rand(2, 3)])

    computed(0)
    computed(1)
    with pytest.raises(ConfigError, match="several denoising loops"):
        computed(0)


def test_stored_sums_of_something_else():
    made = batch("dit-digits", count=1, steps=2)
    _, found, _ = recorded(made)
    _, blocks, _ = recorded(made, "block")
    with pytest.raises(ConfigError, match=r"moments\.1\.0"):
        found.load_state_dict(blocks.state_dict())


# parts


def test_rows_of_samples():
    images = torch.arange(2 * 3 * 4 * 5 * 5).view(6, 4, 5, 5)  # 3 frames of each sample
    whole = per_sample(images, 2, "span")
    assert whole.shape == (2, 4, 3, 5, 5)
    assert torch.equal(whole[1, :, 2], images[5])
    tokens = torch.arange(6 * 7 * 4).view(6, 7, 4)
    assert torch.equal(per_sample(tokens, 2, "span")[1], tokens[3:].flatten(0, 1))
    assert per_sample(tokens, 6, "span") is tokens
    assert per_sample(torch.ones(6, 4), 6, "span").shape == (6, 1, 4)
    assert per_sample(torch.ones(6, 4), 2, "span").shape == (2, 3, 4)
    assert per_sample(torch.ones(6), 2, "span").shape == (2, 1, 3)
    with pytest.raises(ConfigError, match="cannot be told apart"):
        per_sample(tokens, 4, "span")


def test_videos_may_come_frames_first(monkeypatch):
    """A denoiser that takes [B, F, C, H, W], as CogVideoX, is measured by its channels and along its frames."""
    seen = []
    monkeypatch.setattr(module.SignalCurves, "observe", lambda self, *given: seen.append(given))
    span = Span("denoiser", "denoiser", ())
    facts = SpanFacts("denoiser", "transformer", "denoiser", "residual", 12, 1.0)
    survey = Survey(
        "denoiser", (Watched(span, facts, None, True),), 2, 1, ("0",), (), (3, 4, 2, 2), (4, 3, 2, 2), {4}, "flops", {}
    )
    found = Recorder(survey, 1)
    x, y = torch.rand(2, 1, 3, 4, 2, 2)
    frame = SimpleNamespace(step=SimpleNamespace(index=0), counts={}, batch=1, position=0)
    found.span_computed(frame, span, {"x": x}, [Leaf("x")], [y])
    ((_, _, (output,), (base,)),) = seen
    assert torch.equal(output, y.transpose(1, 2))
    assert torch.equal(base, x.transpose(1, 2))
    found.moments[0][0].end_run()
    torch.testing.assert_close(found.arrays()["channel_mean.0"][0, 0], (y - x).mean(dim=(0, 1, 3, 4)))
