"""Moments of a span over a profiling pass, against plain sums over all features in float64."""

import pytest
import torch

from diffusion_cache.errors import ConfigError
from diffusion_cache.profiling.moments import SpanMoments, channel_moments


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def run_of(batch, steps, *shapes):
    """{step: (outputs, inputs)}, one tensor of each shape; outputs stay near the inputs, as residuals do."""
    run = {}
    for step in range(steps):
        inputs = [torch.randn(batch, *shape) for shape in shapes]
        run[step] = ([x + 0.3 * torch.randn_like(x) + 0.1 for x in inputs], inputs)
    return run


def feed(moments, run):
    for step, (outputs, inputs) in run.items():
        moments.observe(step, outputs, inputs)
    moments.end_run()
    return moments


def flat(tensors):
    return torch.cat([t.flatten(1) for t in tensors], 1).double()


def expected(runs, steps, left, right):
    """Mean over samples of the inner products of what `left` and `right` take from a step's outputs and inputs."""
    samples = sum(len(run[0][0][0]) for run in runs)
    result = torch.zeros(steps, steps, dtype=torch.float64)
    for run in runs:
        for i in range(steps):
            for j in range(steps):
                result[i, j] += (left(*run[i]) * right(*run[j])).sum() / samples
    return result


def residual(outputs, inputs):
    return flat([y - x for y, x in zip(outputs, inputs, strict=True)])


def test_result_is_the_mean_over_samples():
    steps = 4
    runs = [run_of(batch, steps, (5, 6), (3, 6)) for batch in (2, 3, 1)]
    moments = SpanMoments("blocks.0", steps)
    for run in runs:
        feed(moments, run)
    result = moments.result()
    assert moments.samples == 6
    outputs, inputs = (lambda y, x: flat(y)), (lambda y, x: flat(x))
    close = dict(rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(result["gram_residual"], expected(runs, steps, residual, residual), **close)
    torch.testing.assert_close(result["gram_output"], expected(runs, steps, outputs, outputs), **close)
    torch.testing.assert_close(result["cross_input"], expected(runs, steps, residual, inputs), **close)
    energy = expected(runs, steps, inputs, inputs).diagonal()
    torch.testing.assert_close(result["input_energy"], energy, **close)
    for power, key in ((1, "channel_mean"), (2, "channel_square")):
        assert result[key].shape == (steps, 12)
        for t in range(steps):
            parts = [
                torch.cat([(run[t][0][leaf] - run[t][1][leaf]).double() ** power for run in runs]).mean((0, 1))
                for leaf in range(2)
            ]
            torch.testing.assert_close(result[key][t], torch.cat(parts), **close)


def test_outputs_without_an_input_are_features_themselves():
    """The second leaf has no input, the third one of another shape (a learned sigma); a fourth stream is absent."""
    steps = 3
    moments = SpanMoments("denoiser", steps)
    seen = []
    for step in range(steps):
        x, y = torch.randn(2, 2, 4, 5), torch.randn(2, 2, 4, 5)
        alone, wide = torch.randn(2, 6), torch.randn(2, 4, 4, 5)
        moments.observe(step, [y, alone, wide, None], [x, None, x, None])
        seen.append((flat([y - x, alone, wide]), flat([y, alone, wide]), flat([x, 0 * alone, 0 * wide])))
    moments.end_run()
    result = moments.result()
    features, outputs, inputs = (torch.stack(part, 1) for part in zip(*seen, strict=True))  # [B, T, D]
    close = dict(rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(result["gram_residual"], (features @ features.mT).mean(0), **close)
    torch.testing.assert_close(result["gram_output"], (outputs @ outputs.mT).mean(0), **close)
    torch.testing.assert_close(result["cross_input"], (features @ inputs.mT).mean(0), **close)
    assert result["channel_mean"].shape == (steps, 2 + 6 + 4)

    bare = SpanMoments("denoiser", 1)
    bare.observe(0, y)
    bare.end_run()
    assert torch.equal(bare.result()["gram_residual"], bare.result()["gram_output"])
    assert bare.result()["gram_output"].item() == pytest.approx(float(y.double().square().sum()) / 2)
    assert bare.result()["cross_input"].item() == bare.result()["input_energy"].item() == 0


def test_sketched_moments_are_near_the_exact_ones():
    steps, samples = 6, 24
    exact, sketched = SpanMoments("s", steps), SpanMoments("s", steps, exact_bytes=0, width=2**13)
    for _ in range(samples):
        start, turn = torch.randn(2, 1, 400, 100)
        for step in range(steps):
            x = start + 0.2 * step * turn
            y = x + 0.5 * (x + 0.1 * torch.randn_like(x)).tanh()
            exact.observe(step, y, x)
            sketched.observe(step, y, x)
        exact.end_run()
        sketched.end_run()
    one, two = exact.result(), sketched.result()
    norms = {"gram_residual": ("gram_residual",) * 2, "gram_output": ("gram_output",) * 2}
    for key, (left, right) in norms.items():
        scale = (one[left].diagonal()[:, None] * one[right].diagonal()).sqrt()
        error = (one[key] - two[key]).abs() / scale
        assert 0 < error.max() < 0.01
    scale = (one["gram_residual"].diagonal()[:, None] * one["input_energy"]).sqrt()
    assert ((one["cross_input"] - two["cross_input"]).abs() / scale).max() < 0.01
    assert torch.equal(one["channel_square"], two["channel_square"])


def held(elements, steps, **options):
    moments = SpanMoments("s", steps, **options)
    for step in range(steps):
        x = torch.randn(1, elements // 10, 10)
        moments.observe(step, x + 1, x)
    within = moments.nbytes
    moments.end_run()
    return within, moments.nbytes


def test_memory_does_not_grow_with_the_feature_once_sketched():
    options = dict(width=1024, exact_bytes=4 * 4 * 4000)
    exact, after = held(4000, 4, **options)
    assert exact - after >= 2 * 4 * 4 * 4000  # residual and input, 4 steps, 4 bytes
    sketched, small = held(4010, 4, **options)
    assert sketched - small <= 2 * 4 * 4 * 1024 + 4 * 2 * 8 * 10
    assert held(400_000, 4, **options) == (sketched, small)
    # between runs only T², T·C numbers are kept
    assert small == 8 * (4 * 4 * 4 + 1 + 2 * 4 * 10)


def test_parts_merge_and_resume_exactly():
    steps = 3
    runs = [run_of(2, steps, (4, 6)) for _ in range(4)]
    for options in ({}, dict(exact_bytes=0, width=16)):
        whole, first, second = (SpanMoments("s", steps, **options) for _ in range(3))
        for run in runs:
            feed(whole, run)
        for run in runs[:2]:
            feed(first, run)
        resumed = SpanMoments("s", steps, **options)
        resumed.load_state_dict(first.state_dict())
        for run in runs[2:]:
            feed(second, run)
            feed(resumed, run)
        for key, value in whole.result().items():
            assert torch.equal(resumed.result()[key], value), key
        before = first.state_dict()
        parts = {key: value + second.sums[key] for key, value in before.items()}
        first.merge(second)
        assert first.samples == 8
        assert all(torch.equal(first.sums[key], value) for key, value in parts.items())
        if not options:
            for key, value in whole.result().items():
                torch.testing.assert_close(first.result()[key], value, rtol=1e-13, atol=1e-13)
        empty = SpanMoments("s", steps, **options)
        empty.merge(whole)
        assert all(torch.equal(value, whole.result()[key]) for key, value in empty.result().items())


def test_steps_that_a_run_skipped_do_not_dilute_the_others():
    steps = 3
    full, partial = run_of(2, steps, (4, 6)), run_of(2, steps, (4, 6))
    del partial[2]
    one = feed(SpanMoments("s", steps), full).result()
    both = feed(feed(SpanMoments("s", steps), full), partial).result()
    # step 2 was seen in the first run alone
    torch.testing.assert_close(both["gram_output"][2], one["gram_output"][2])
    torch.testing.assert_close(both["channel_mean"][2], one["channel_mean"][2])
    assert not torch.allclose(both["gram_output"][:2, :2], one["gram_output"][:2, :2])
    never = feed(SpanMoments("s", steps), {0: full[0], 2: full[2]}).result()
    assert never["gram_residual"][1].abs().max() == 0
    assert never["gram_residual"][0, 2] == one["gram_residual"][0, 2]


def test_what_was_observed_may_be_overwritten():
    run = run_of(1, 2, (40, 6))
    kept = feed(SpanMoments("s", 2), {key: ([y.clone()], [x.clone()]) for key, ([y], [x]) in run.items()})
    moments = SpanMoments("s", 2)
    for step, ([y], [x]) in run.items():
        moments.observe(step, y, x)
        y.fill_(7)
        x.fill_(8)
    moments.end_run()
    assert all(torch.equal(value, kept.result()[key]) for key, value in moments.result().items())


def test_inference_mode():
    run = run_of(1, 2, (40, 6))
    plain, moments = feed(SpanMoments("s", 2), run), SpanMoments("s", 2)
    with torch.inference_mode():
        for step, ([y], [x]) in run.items():
            moments.observe(step, y.clone(), x.clone())
        moments.end_run()
    feed(moments, run)
    torch.testing.assert_close(moments.result()["channel_mean"], plain.result()["channel_mean"])
    torch.testing.assert_close(moments.result()["cross_input"], plain.result()["cross_input"])


@pytest.mark.parametrize("exact_bytes", [0, 2**20])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_named(value, exact_bytes):
    moments = SpanMoments("transformer_blocks.7", 5, exact_bytes=exact_bytes, width=64)
    y, x = torch.randn(2, 2, 300, 8)
    moments.observe(2, y, x)
    y[1, 200, 3] = value
    with pytest.raises(ConfigError, match=r"transformer_blocks\.7 gave NaN or infinity at step 3"):
        moments.observe(3, y, x)


def test_misuse_is_refused():
    moments = SpanMoments("s", 2)
    x = torch.randn(2, 3, 4)
    with pytest.raises(ConfigError, match="not seen in any finished run"):
        moments.result()
    with pytest.raises(ConfigError, match="outside the profile's 2 steps"):
        moments.observe(2, x)
    moments.observe(0, x)
    with pytest.raises(ConfigError, match="ran twice at step 0"):
        moments.observe(0, x)
    with pytest.raises(ConfigError, match="batch changed"):
        moments.observe(1, x[:1])
    with pytest.raises(ConfigError, match="16 elements a sample, but had 12"):
        moments.observe(1, torch.randn(2, 4, 4))
    for unfinished in (moments.result, moments.state_dict, lambda: moments.merge(SpanMoments("s", 2))):
        with pytest.raises(ConfigError, match="not finished"):
            unfinished()
    moments.end_run()
    with pytest.raises(ConfigError, match="cannot merge"):
        moments.merge(SpanMoments("other", 2))
    with pytest.raises(ConfigError, match="number of steps"):
        moments.merge(SpanMoments("s", 3))
    with pytest.raises(ConfigError, match="number of steps"):
        SpanMoments("s", 3).load_state_dict(moments.state_dict())


def test_channel_moments_by_number_of_dimensions():
    for shape, dim in (((2, 8), 1), ((2, 5, 8), 2), ((2, 8, 4, 4), 1), ((2, 8, 3, 4, 4), 1)):
        leaf = torch.randn(shape)
        mean, square = channel_moments(leaf)
        moved = leaf.movedim(dim, 1).reshape(2, 8, -1)
        torch.testing.assert_close(mean, moved.mean(2))
        torch.testing.assert_close(square, moved.square().mean(2))
    half = torch.randn(2, 5000, 8).to(torch.bfloat16)
    torch.testing.assert_close(channel_moments(half)[1], half.float().square().mean(1))
    double = torch.randn(2, 5, 8, dtype=torch.float64)
    for found, expected in zip(channel_moments(double), (double.mean(1), double.square().mean(1)), strict=True):
        torch.testing.assert_close(found, expected.float())
