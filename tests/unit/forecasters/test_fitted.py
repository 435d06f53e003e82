"""Fitted weights: when they are used and when Taylor's are; and guidance branches with weights of their own."""

import warnings
from dataclasses import replace

import pytest
import small
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import diffusion_cache as dc
from diffusion_cache import reference
from diffusion_cache.context import Correction, Query
from diffusion_cache.engine import Method, Observer
from diffusion_cache.errors import ConfigError
from diffusion_cache.forecasters import Taylor
from diffusion_cache.forecasters.fitted import ANY_PASS, UNFITTED, Fit, Fitted, taylor_weights
from diffusion_cache.policies import Guarded
from diffusion_cache.policies.mask import Mask
from diffusion_cache.profiling.generation import attached

STEPS = 8
MASK = "11010010"
# the nodes of each reused step with a history of three
NODES = {2: (0, 1), 4: (0, 1, 3), 5: (0, 1, 3), 7: (1, 3, 6)}


def some_weights(step, branch, count):
    """Some that sum to one, of each step and branch their own."""
    first = [0.3 * torch.sin(torch.tensor(7.0 * step + 3 * branch + i)).item() for i in range(count - 1)]
    return (*first, 1 - sum(first))


def some_correction(step, branch, channels):
    """Of each step, branch and channel its own; none at step 4."""
    found = [0.1 * torch.cos(torch.tensor(5.0 * step + 2 * branch + i)).item() for i in range(2 * channels)]
    scale, bias = (1.0 + x for x in found[:channels]), found[channels:]
    return Correction(tuple(scale), tuple(bias)) if channels and step != 4 else None


def table(branches, alike=(), groups=1, channels=0):
    """For all reused steps but the last, which is left to Taylor; in steps of `alike` the branches share theirs.

    channels: that are corrected.
    """
    return {
        (step, group, branch): Fit(
            nodes,
            some_weights(step + 10 * group, 0 if step in alike else branch, len(nodes)),
            some_correction(step + 10 * group, branch, channels),
        )
        for step, nodes in NODES.items()
        if step != 7
        for group in range(groups)
        for branch in range(branches)
    }


# the weights


@pytest.mark.parametrize(
    ("nodes", "target", "expected"),
    [
        ((3,), 5, (1.0,)),
        ((3, 5), 6, (-0.5, 1.5)),
        ((0, 3, 5), 8, (0.0, -1.5, 2.5)),
        ((0, 1, 3, 4), 5, (0.0, 0.0, -1.0, 2.0)),
    ],
)
def test_taylor_weights(nodes, target, expected):
    assert taylor_weights(nodes, target) == pytest.approx(expected)
    assert Fitted().weights(Query(nodes, target)) == pytest.approx(expected)
    used = nodes[-2:]
    assert taylor_weights(nodes, target)[-len(used) :] == pytest.approx(Taylor(1).weights(Query(used, target)))


def test_only_the_case_that_was_fitted_has_its_weights():
    fitted = Fitted({(5, 1, 0): Fit((1, 2, 4), (0.5, -1.0, 1.5))}, groups=(0, 1, 1))
    assert fitted.weights(Query((1, 2, 4), 5, 1, 0)) == (0.5, -1.0, 1.5)
    assert fitted.weights(Query([1.0, 2.0, 4.0], 5.0, 2)) == (0.5, -1.0, 1.5)  # as the history has them
    taylor = (0.0, -0.5, 1.5)
    assert fitted.weights(Query((0, 2, 4), 5, 1, 0)) == pytest.approx(taylor)  # other steps are held
    assert fitted.weights(Query((2, 4), 5, 1, 0)) == pytest.approx(taylor[1:])  # fewer
    assert fitted.weights(Query((1, 2, 4), 6, 1, 0)) == pytest.approx((0.0, -1.0, 2.0))  # another target
    assert fitted.weights(Query((1, 2, 4), 5, 0, 0)) == pytest.approx(taylor)  # a span of another group
    assert fitted.weights(Query((1, 2, 4), 5, 1, 1)) == pytest.approx(taylor)  # another guidance branch


def test_weights_are_for_runs_of_their_number_of_steps():
    fitted = Fitted({(5, 0, 0): Fit((1, 2, 4), (0.5, -1.0, 1.5))}, total=8)
    queries = [Query((1, 2, 4), 5, total=total) for total in (8, None, 6)]
    assert [fitted.note(query) for query in queries] == ["", "", UNFITTED]
    assert fitted.weights(queries[0]) == (0.5, -1.0, 1.5)
    assert fitted.weights(queries[2]) == pytest.approx((0.0, -0.5, 1.5))


def test_a_part_of_a_run_whose_levels_are_moved_has_no_weights():
    """They were fitted to the moved path."""
    levels = tuple(map(float, range(STEPS)))
    fitted = Fitted({(5, 0, 0): Fit((3, 4), (0.5, 0.5))}, noise_levels=levels, total=STEPS)
    assert fitted.for_run(levels[2:]).table
    moved = replace(fitted, whole=True)
    assert not moved.for_run(levels[2:]).table
    assert moved.for_run(levels) is moved


def test_weights_of_any_pass_are_those_of_each():
    fitted = Fitted({(5, 0, ANY_PASS): Fit((1, 4), (0.25, 0.75))})
    assert [fitted.weights(Query((1, 4), 5, 0, branch)) for branch in (0, 1)] == [(0.25, 0.75)] * 2


def test_a_correction_goes_with_its_weights():
    correction = Correction((1.5, 0.5), (0.0, -1.0))
    fitted = Fitted({(5, 1, 0): Fit((1, 4), (0.5, 0.5), correction)}, groups=(0, 1))
    assert (fitted.corrected_channels, fitted.exact_degree) == (2, None)
    assert fitted.correction(Query((1, 4), 5, 1, 0)) == correction
    for other in (Query((0, 4), 5, 1, 0), Query((1, 4), 6, 1, 0), Query((1, 4), 5, 0, 0), Query((1, 4), 5, 1, 1)):
        assert fitted.correction(other) is None
    assert Fitted(table(1)).corrected_channels == Taylor().corrected_channels == 0


def test_stacks_can_be_one_span_where_their_weights_are_the_same():
    fit = Fit((1, 4), (0.5, 0.5))
    assert Fitted({(5, 0, 0): fit}).spans_alike
    assert not Fitted({(5, 1, 0): fit}, groups=(0, 1)).spans_alike
    assert not Fitted({(5, 0, 0): replace(fit, correction=Correction((1.5, 0.5), (0.0, -1.0)))}).spans_alike


@pytest.mark.parametrize("dtype", ["model", "int8-delta"])
def test_channels_that_do_not_fit_are_computed(dtype):
    """With a warning; an output of other channels must not be stretched to those of its correction."""
    name, pipe = "dit-digits", reference.load("dit-digits")
    expected = generate(name, pipe)
    told_of = pytest.warns(dc.DiffusionCacheWarning, match="corrections are of 3 channels, and transformer_blocks")
    fitted = Fitted(table(2, channels=3), branches=2)
    with dc.cached(pipe, Mask(MASK), fitted, scope="stack", cache_dtype=dtype), told_of:
        assert (generate(name, pipe) - expected).abs().max() <= 1e-5


def test_without_groups_all_spans_share_their_weights():
    fitted = Fitted({(5, 0, 0): Fit((1, 4), (0.2, 0.8))})
    assert [fitted.weights(Query((1, 4), 5, span)) for span in (0, 3, 90)] == [(0.2, 0.8)] * 3


def test_constants_are_exact():
    """On every path: what exact_degree = 0 promises."""
    fitted = Fitted(table(2), branches=2)
    assert fitted.exact_degree == 0
    for step, nodes in NODES.items():
        for branch in range(2):
            for held in (nodes, nodes[1:], nodes[:1]):
                weights = fitted.weights(Query(held, step, 0, branch))
                assert len(weights) == len(held)
                assert sum(3.5 * weight for weight in weights) == pytest.approx(3.5)


def test_the_feature_is_checked():
    with pytest.raises(ConfigError, match="feature"):
        Fitted(feature="rest")


# guidance branches with weights of their own


class Features(Observer):
    """Of each span: features by call and step; base and output of each reuse. Tensors are lists, one per stream."""

    def __init__(self):
        self.spans, self.features, self.reused = {}, {}, []

    def run_began(self, run):
        self.spans = run.session.span_index

    def span_computed(self, frame, span, inputs, leaves, outputs):
        bases = [0 if leaf.base is None else inputs[leaf.base].double() for leaf in leaves]
        found = [out.double() - base for out, base in zip(outputs, bases, strict=True)]
        self.features[self.spans[span], frame.position, frame.step.index] = found

    def denoiser_called(self, frame, output, again):
        for visit in frame.reused:
            keys = [leaf.base for leaf in visit.state.template.leaves]
            bases = [
                torch.zeros_like(out).double() if key is None else visit.inputs[key].double()
                for key, out in zip(keys, visit.forecast, strict=True)
            ]
            given = [out.double() for out in visit.forecast]
            self.reused.append((self.spans[visit.span], frame.position, frame.step.index, bases, given))
            if visit.span.kind == "denoiser":
                assert torch.equal(visit.forecast[0], output[0])


def generate(name, pipe, labels=(3, 8), guidance=None, steps=STEPS):
    seeds = range(5, 5 + len(labels))
    return reference.images(name, pipe(**reference.inputs(name, labels, seeds, steps=steps, guidance=guidance)))


@pytest.mark.parametrize(
    ("name", "scope", "calls", "rows", "groups", "channels"),
    [
        ("dit-digits", "denoiser", 1, 2, (), 0),
        ("dit-digits", "stack", 1, 2, (), 0),
        ("dit-digits", "stack", 1, 2, (), 96),
        ("unet-digits", "denoiser", 1, 2, (), 1),
        ("unet-digits", "cut", 1, 2, (), 0),
        ("wan-moving-digits", "stack", 2, 1, (), 0),
        ("wan-moving-digits", "stack", 2, 1, (), 1),
        ("dit-digits", "block", 1, 2, (0, 1) * 6, 1),
        ("flux-digits", "stack", 1, 1, (0, 1), 0),
        ("flux-digits", "stack", 1, 1, (0, 1), 96),
        ("flux-digits", "denoiser", 1, 1, (), 4),
    ],
)
def test_each_guidance_branch_has_its_own_weights(name, scope, calls, rows, groups, channels):
    """Against a sum by hand over the features that the spans were seen to have; and so with its own corrections."""
    branches = calls * rows
    fits = table(branches, groups=len(set(groups)) or 1, channels=channels)
    pipe, seen = reference.load(name), Features()
    method = Method(Guarded(Mask(MASK)), Fitted(fits, 3, groups, rows), scope, granularity="batch")
    with attached(pipe, method, seen) as session:
        generate(name, pipe)
        count = len(session.span_index)
    assert len(seen.reused) == count * calls * len(NODES)
    for span, position, step, bases, given in seen.reused:
        group, nodes = groups[span] if groups else 0, NODES[step]
        for stream, (base, output) in enumerate(zip(bases, given, strict=True)):
            for row, (expected, part) in enumerate(zip(base.chunk(rows), output.chunk(rows), strict=True)):
                key = step, group, position * rows + row
                weights = fits[key].weights if key in fits else taylor_weights(nodes, step)
                held = [seen.features[span, position, node][stream].chunk(rows)[row] for node in nodes]
                expected = expected + sum(w * feature for w, feature in zip(weights, held, strict=True))
                if key in fits and fits[key].correction:
                    # tokens' channels are their last axis, images' the second one
                    scale, bias = torch.tensor(fits[key].correction, dtype=torch.float64)
                    spread = (-1, *[1] * (expected.ndim - 2)) if expected.ndim > 3 else (-1,)
                    expected = scale.reshape(spread) * expected + bias.reshape(spread)
                assert (part - expected).norm() <= 2e-6 * expected.norm()


@pytest.mark.parametrize(("name", "rows"), [("dit-digits", 2), ("wan-moving-digits", 1)])
def test_the_branches_weights_matter(name, rows):
    """Exchanged, they give other images; the same for both, the images of a forecaster without branches."""
    pipe, fits = reference.load(name), table(2)
    exchanged = {(step, group, 1 - branch): fit for (step, group, branch), fit in fits.items()}
    alike = {key: fits[key[0], key[1], 0] for key in fits}

    def images(entries, branches):
        with dc.cached(pipe, Mask(MASK), Fitted(entries, branches=branches), scope="stack"):
            return generate(name, pipe)

    assert (images(fits, rows) - images(exchanged, rows)).abs().max() > 1e-3
    if rows == 2:
        single = {key: fit for key, fit in alike.items() if key[2] == 0}
        assert torch.equal(images(alike, 2), images(single, 1))


def test_rows_that_are_no_multiple_of_the_branches_are_told():
    """The weights of the first branch are taken then."""
    name, fits = "dit-digits", table(2)
    pipe = reference.load(name)
    options = dict(labels=(3, 8, 1), guidance=1.0)
    told_of = pytest.warns(dc.DiffusionCacheWarning, match="2 guidance branches.*3 rows")
    with dc.cached(pipe, Mask(MASK), Fitted(fits, branches=2), scope="stack"), told_of:
        told = generate(name, pipe, **options)
    with dc.cached(pipe, Mask(MASK), Fitted(fits), scope="stack"), warnings.catch_warnings():
        warnings.simplefilter("error", dc.DiffusionCacheWarning)
        assert torch.equal(told, generate(name, pipe, **options))


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("name", "rows", "channels"), [("dit-digits", 2, 0), ("dit-digits", 2, 96), ("wan-moving-digits", 1, 1)]
)
def test_branches_of_a_denoiser_compiled_as_a_whole(name, rows, channels, fresh_compiler):
    """At some steps their weights differ or outputs are corrected, at others not: two graphs serve all."""
    method = (Mask(MASK), Fitted(table(2, alike=(4,), channels=channels), branches=rows))
    plain = small.load(name)
    with dc.cached(plain, *method, scope="stack"):
        expected = generate(name, plain)
    pipe, backend = small.load(name), CompileCounterWithBackend("eager")
    pipe.transformer.compile(backend=backend, fullgraph=True)
    with dc.cached(pipe, *method, scope="stack"), warnings.catch_warnings():
        warnings.simplefilter("error", dc.DiffusionCacheWarning)
        for _ in range(2):
            assert (generate(name, pipe) - expected).abs().max() <= 1e-5
            assert dc.summary(pipe).reused == len(NODES) * (2 if rows == 1 else 1)
    assert backend.frame_count == 2
