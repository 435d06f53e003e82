"""Observers: what they are told, that watching changes nothing, and calls that are made again."""

import copy
import warnings

import pytest
import small
import torch

import diffusion_cache as dc
from diffusion_cache import reference
from diffusion_cache.engine import Method, Observer
from diffusion_cache.engine.structure import flatten
from diffusion_cache.forecasters import Reuse, Taylor
from diffusion_cache.policies import Guarded, Interval
from diffusion_cache.policies.mask import Mask
from diffusion_cache.profiling.generation import attached

STEPS = 8
MASK = "11010010"
COMPUTED = (0, 1, 3, 6)
# scope, and denoiser calls in a step
SUBJECTS = [
    ("dit-digits", "denoiser", 1),
    ("dit-digits", "stack", 1),
    ("flux-digits", "stack", 1),
    ("flux-digits", "block", 1),
    ("wan-moving-digits", "branch", 2),
    ("unet-digits", "cut", 1),
]


def generate(name, pipe, steps=STEPS):
    output = pipe(**reference.inputs(name, [3, 8], [5, 6], steps=steps))
    return reference.images(name, output)


def tensors(value):
    return [leaf for leaf in flatten(value)[0] if isinstance(leaf, torch.Tensor)]


def method(scope, policy=None, forecaster=None):
    return Method(Guarded(policy or Mask(MASK)), forecaster or Taylor(1), scope, granularity="batch")


class Watching(Observer):
    """Keeps copies of what it is told."""

    def __init__(self):
        self.runs, self.told, self.called = [], [], []

    def run_began(self, run):
        self.runs.append(run)

    def span_computed(self, frame, span, inputs, leaves, outputs):
        bases = [None if leaf.base is None else inputs[leaf.base].clone() for leaf in leaves]
        given = {key: tensor.clone() for key, tensor in inputs.items()}
        self.told.append((frame.step.index, frame.position, span, given, bases, [out.clone() for out in outputs]))

    def denoiser_called(self, frame, output, again):
        reused = [visit.span for visit in frame.reused]
        self.called.append((frame.step.index, frame.position, reused, [leaf.clone() for leaf in tensors(output)]))


@pytest.fixture
def seen():
    """watch(spans): what modules at the ends of spans truly received and returned, in the order they ran."""
    handles = []

    def watch(spans):
        received, returned = [], []

        def before(span):
            def hook(module, args, kwargs):
                received.append((span, [t.clone() for t in [*tensors(args), *tensors(kwargs)]]))

            return hook

        def after(span):
            def hook(module, args, output):
                returned.append((span, [t.clone() for t in tensors(output)]))

            return hook

        for span in spans:
            handles.append(span.members[0].register_forward_pre_hook(before(span), with_kwargs=True))
            handles.append(span.members[-1].register_forward_hook(after(span)))
        return received, returned

    yield watch
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize(("name", "scope", "calls"), SUBJECTS)
def test_all_computed_spans_are_told_and_nothing_is_stored(name, scope, calls, seen):
    pipe = reference.load(name)
    uncached, watching = generate(name, pipe), Watching()
    with attached(pipe, method(scope, Interval(1), Reuse()), watching) as session:
        (layout,) = session.layouts.values()
        received, returned = seen(layout.spans)
        images = generate(name, pipe)
        assert session.last_run.cache_bytes == 0
        assert session.last_run.records == [r._replace(computed=True, spans_reused=0) for r in session.last_run.records]
    assert torch.equal(images, uncached)
    assert watching.runs == [session.last_run]
    assert len(watching.told) == STEPS * calls * len(layout.spans) == len(received)
    by_span = {span: [told for told in watching.told if told[2] is span] for span in layout.spans}
    for span, told in by_span.items():
        assert [(step, position) for step, position, *_ in told] == [(s, p) for s in range(STEPS) for p in range(calls)]
        ins = [given for owner, given in received if owner is span]
        outs = [given for owner, given in returned if owner is span]
        for (_, _, _, inputs, bases, outputs), true_in, true_out in zip(told, ins, outs, strict=True):
            assert len(inputs) == len(true_in)
            assert all(map(torch.equal, inputs.values(), true_in))
            floating = [out for out in true_out if out.is_floating_point()]
            assert all(any(torch.equal(out, true) for true in floating) for out in outputs)
            assert len(bases) == len(outputs) >= 1
            if span.stores_residual:
                assert all(
                    base is not None and base.shape == out.shape for base, out in zip(bases, outputs, strict=True)
                )
                assert all(any(torch.equal(base, true) for true in true_in) for base in bases)
            else:
                assert bases == [None] * len(outputs)


def check_plain(plain, watched, name, scope):
    """Where nobody watches each of them, stacks in a row are one span, which adds up in another order."""
    if (name, scope) == ("flux-digits", "stack"):
        torch.testing.assert_close(plain, watched, rtol=0, atol=2e-6)
    else:
        assert torch.equal(plain, watched)


@pytest.mark.parametrize(("name", "scope", "calls"), SUBJECTS)
def test_watching_does_not_change_the_images(name, scope, calls):
    pipe, watching = reference.load(name), Watching()
    with attached(pipe, method(scope), Observer()) as session:
        expected = generate(name, pipe)
        records, stored = session.last_run.records, session.last_run.cache_bytes
    with dc.cached(pipe, Mask(MASK), Taylor(1), scope=scope, granularity="batch"):
        check_plain(generate(name, pipe), expected, name, scope)
    with attached(pipe, method(scope), watching) as session:
        (layout,) = session.layouts.values()
        assert torch.equal(generate(name, pipe), expected)
        assert (session.last_run.records, session.last_run.cache_bytes) == (records, stored)
    assert stored > 0
    told = [(step, position, span) for step, position, span, *_ in watching.told]
    assert sorted(told, key=lambda t: t[:2]) == told
    assert {t[:2] for t in told} == {(step, position) for step in COMPUTED for position in range(calls)}
    assert len(told) == len(COMPUTED) * calls * len(layout.spans)
    assert [(step, position) for step, position, *_ in watching.called] == [
        (step, position) for step in range(STEPS) for position in range(calls)
    ]
    for step, _, reused, _ in watching.called:
        assert len(reused) == (0 if step in COMPUTED else len(layout.spans))


class Again(Watching):
    """Makes every call again, and notes whether that left a trace."""

    def __init__(self):
        super().__init__()
        self.repeated, self.traces = [], []

    def state(self, frame):
        run, history = self.runs[-1], [visit.state.history for visit in frame.visits.values()]
        return (
            torch.get_rng_state().tolist(),
            list(run.records),
            run.frame,
            [copy.deepcopy(h.lanes) for h in history],
            [t.clone() for h in history for t in h.tensors()],
        )

    def denoiser_called(self, frame, output, again):
        super().denoiser_called(frame, output, again)
        before = self.state(frame)
        outputs = [tensors(again()) for _ in range(2)]
        after = self.state(frame)
        self.repeated += [(frame.step.index, bool(frame.reused), repeated) for repeated in outputs]
        same = [torch.equal(a, b) for a, b in zip(before[-1], after[-1], strict=True)]
        self.traces.append((before[:-1] == after[:-1] and all(same), torch.get_rng_state()))


@pytest.mark.parametrize(("name", "scope", "calls"), SUBJECTS)
def test_a_call_made_again_gives_the_same_and_leaves_no_trace(name, scope, calls):
    pipe, watching = reference.load(name), Again()
    denoiser = getattr(pipe, reference.spec(name).denoiser)
    # something in every call, outside of all spans but the whole denoiser, draws random numbers
    last = [module for module in denoiser.children() if not isinstance(module, torch.nn.ModuleList)][-1]
    drawing = last.register_forward_hook(lambda module, args, output: (torch.rand(3), output)[1])
    try:
        torch.manual_seed(3)
        before = torch.get_rng_state()
        with attached(pipe, method(scope), watching) as session:
            images = generate(name, pipe)
            assert len(session.last_run.records) == STEPS * calls
    finally:
        drawing.remove()
    plain = reference.load(name)
    with dc.cached(plain, Mask(MASK), Taylor(1), scope=scope, granularity="batch"):
        check_plain(generate(name, plain), images, name, scope)
    assert all(kept for kept, _ in watching.traces)
    assert len(watching.repeated) == 2 * STEPS * calls
    assert not torch.equal(before, watching.traces[-1][1]), "nothing was drawn, so the test proves nothing"
    for (step, reused, repeated), (_, _, _, output) in zip(
        watching.repeated, [called for called in watching.called for _ in range(2)], strict=True
    ):
        assert reused == (step not in COMPUTED)
        assert all(map(torch.equal, repeated, output))


def test_what_again_gives_hangs_on_the_history():
    """A changed feature shows, so the blocks are really skipped; and the call after it is as if nothing was."""
    name, found = "dit-digits", []

    class Changing(Observer):
        def denoiser_called(self, frame, output, again):
            if frame.reused:
                (visit,) = frame.reused
                feature = visit.state.history.tensors()[0]
                kept = feature.clone()
                feature.add_(1.0)
                changed = again()[0]
                feature.copy_(kept)
                found.append((torch.equal(changed, output[0]), torch.equal(again()[0], output[0])))

    pipe = reference.load(name)
    with attached(pipe, method("stack"), Changing()):
        generate(name, pipe)
    assert found == [(False, True)] * (STEPS - len(COMPUTED))


def test_a_failing_observer_ends_the_generation():
    class Failing(Observer):
        def denoiser_called(self, frame, output, again):
            raise RuntimeError("enough")

    name = "dit-digits"
    pipe = reference.load(name)
    uncached = generate(name, pipe)
    with attached(pipe, method("stack"), Failing()), pytest.raises(RuntimeError, match="enough"):
        generate(name, pipe)
    assert torch.equal(generate(name, pipe), uncached)


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_a_call_of_a_compiled_denoiser_made_again(fresh_compiler):
    """Of reused steps alone, as fitting does."""
    name, found = "dit-digits", []

    class AgainWhereReused(Observer):
        def denoiser_called(self, frame, output, again):
            if frame.reused:
                nodes = [list(visit.state.history.nodes) for visit in frame.reused]
                repeated = again()[0]
                kept = nodes == [list(visit.state.history.nodes) for visit in frame.reused]
                found.append((frame.step.index, kept, torch.equal(repeated, output[0])))

    pipe = small.load(name)
    pipe.transformer.compile(backend="eager")
    with attached(pipe, method("stack"), Observer()):
        expected = generate(name, pipe)
    with warnings.catch_warnings():
        warnings.simplefilter("error", dc.DiffusionCacheWarning)
        with attached(pipe, method("stack"), AgainWhereReused()):
            assert torch.equal(generate(name, pipe), expected)
    assert found == [(step, True, True) for step in range(STEPS) if step not in COMPUTED]
