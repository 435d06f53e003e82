"""Sketches: inner products are kept, whatever the features look like, and memory is bounded."""

import math

import pytest
import torch

from diffusion_cache import count_sketch
from diffusion_cache.errors import ConfigError
from diffusion_cache.profiling.sketch import DEFAULT_WIDTH, CountSketch, Exact, make_sketch
from diffusion_cache.reference import inputs, load


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def gram(features):
    """[T, T] of [T, D]."""
    return features.double() @ features.double().T


def worst_entry(estimate, exact):
    """The largest error of an entry, as a share of √(G_ii·G_jj)."""
    norms = exact.diagonal().sqrt()
    return ((estimate - exact).abs() / (norms[:, None] * norms)).max().item()


def drifting(steps, elements, seed, channels=1024):
    """[T, D] features that turn slowly, with a few channels far larger than the others."""
    generator = torch.Generator().manual_seed(seed)
    ends = torch.randn(3, elements, generator=generator)
    ends[:, 7::channels] *= 40
    angle = torch.linspace(0, 2.5, steps)[:, None]
    return angle.cos() * ends[0] + angle.sin() * ends[1] + 0.1 * angle * ends[2]


def permutation(seed):
    """Of 20 runs of 256 elements."""
    return count_sketch.permutation(torch.arange(20)[:, None], 256, count_sketch.keys_of(seed, 0, 1).stages)


def test_every_run_of_elements_is_permuted():
    order = torch.arange(256)
    rows = permutation(seed=3)
    assert torch.equal(rows.sort(dim=1).values, order.expand(20, -1))
    assert len({tuple(row.tolist()) for row in rows}) == 20
    assert not torch.equal(rows, permutation(seed=4))


@pytest.mark.parametrize("elements", [1, 63, 64])
def test_features_no_wider_than_the_sketch_keep_their_inner_products(elements):
    features = torch.randn(5, elements)
    # each row a step of the same sample, hence sketched with the same number
    rows = torch.cat([CountSketch(64)([row[None]]) for row in features])
    torch.testing.assert_close(gram(rows), gram(features))


def test_profile_of_correlated_features_is_within_one_percent():
    samples, steps, elements = 16, 12, 5 * DEFAULT_WIDTH + 1000
    sketch = CountSketch()
    exact, estimate, taylor = 0, 0, []
    weights = torch.tensor([-1.0, 2.0, -1.0], dtype=torch.float64)  # a Taylor-1 forecast's error, one step ahead
    for sample in range(samples):
        features = drifting(steps, elements, sample)
        rows = torch.cat([sketch([row[None]], first=sample) for row in features])
        exact, estimate = exact + gram(features), estimate + gram(rows)
    assert worst_entry(estimate, exact) < 0.01
    for start in range(steps - 2):
        at = slice(start, start + 3)
        taylor.append(float(weights @ estimate[at, at] @ weights / (weights @ exact[at, at] @ weights)))
        assert exact[start, start] > 100 * weights @ exact[at, at] @ weights
    # errors far smaller than the features are known as well as these
    assert max(abs(ratio - 1) for ratio in taylor) < 0.03


def test_real_features_are_within_one_percent():
    """All blocks' residuals of a shipped model together, so that there are more elements than the sketch is wide."""
    steps, samples = 6, 16
    pipe = load("dit-digits")
    seen = []
    hooks = [
        block.register_forward_hook(lambda _, args, output: seen.append(output - args[0]))
        for block in pipe.transformer.transformer_blocks
    ]
    with torch.no_grad():
        pipe(**inputs("dit-digits", [i % 10 for i in range(samples)], range(samples), steps=steps, guidance=1.0))
    for hook in hooks:
        hook.remove()
    blocks = len(hooks)
    features = [torch.cat([f.flatten(1) for f in seen[i * blocks : (i + 1) * blocks]], 1) for i in range(steps)]
    assert features[0].shape == (samples, 12 * 64 * 96)
    assert features[0].shape[1] > 2 * DEFAULT_WIDTH
    sketch = CountSketch()
    exact = sum(gram(torch.stack([f[row] for f in features])) for row in range(samples))
    rows = [sketch([f]) for f in features]
    estimate = sum(gram(torch.stack([f[row] for f in rows])) for row in range(samples))
    assert worst_entry(estimate, exact) < 0.01


def test_errors_have_the_stated_size_and_no_bias():
    elements, width = 20_000, 1024
    x = torch.randn(elements)
    x[5::100] *= 20
    energy = float(x.double() @ x.double())
    errors = torch.tensor([float(CountSketch(width, seed)([x[None]]).double().square().sum()) for seed in range(300)])
    errors = errors / energy - 1
    bound = math.sqrt(2 / width)
    assert 0.6 * bound < errors.std() < 1.15 * bound
    assert errors.mean().abs() < 4 * bound / math.sqrt(300)


def test_samples_of_different_numbers_err_independently():
    """The same feature in every sample: only then does one set of signs for all show."""
    width, samples = 256, 200
    x = torch.randn(1, 5000).expand(samples, -1)
    energies = CountSketch(width)([x], first=10).square().sum(1) / x[0].square().sum()
    errors = energies - 1
    assert 0.6 < errors.std() / math.sqrt(2 / width) < 1.3
    assert len(errors.unique()) == samples
    assert errors.mean().abs() < 4 * math.sqrt(2 / width / samples)
    for lag in (1, 24):
        assert (errors[lag:] * errors[:-lag]).mean().abs() < 4 * errors.var() / math.sqrt(samples)


def test_batch_leaves_and_chunks_do_not_matter(monkeypatch):
    leaves = [torch.randn(30, 5, 100), torch.randn(30, 70)]
    sketch = CountSketch(64, seed=5)
    whole = sketch(leaves, first=20)
    parts = [sketch([leaf[i : i + 7] for leaf in leaves], first=20 + i) for i in range(0, 30, 7)]
    torch.testing.assert_close(torch.cat(parts), whole)
    monkeypatch.setattr(count_sketch, "CHUNK", 64 * 3 * 30)
    torch.testing.assert_close(sketch(leaves, first=20), whole)
    # leaves do not share signs and buckets with one another
    swapped = sketch([leaves[0], leaves[0][:, :1, :70]], first=20) - sketch([leaves[0]], first=20)
    assert not torch.allclose(swapped, sketch([leaves[0][:, :1, :70]], first=20))


def test_it_is_linear_and_takes_any_dtype():
    x, y = torch.randn(2, 3, 500)
    sketch = CountSketch(32)
    torch.testing.assert_close(sketch([x - 2 * y]), sketch([x]) - 2 * sketch([y]), atol=1e-4, rtol=1e-4)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        low = x.to(dtype)
        assert sketch([low]).dtype == torch.float32
        torch.testing.assert_close(sketch([low]), sketch([low.float()]))


def test_the_hash_is_fixed():
    """Sketches are resumed from files and merged between processes, so the same seed must mean the same map."""
    values = CountSketch(8, seed=1)([torch.arange(1.0, 21)[None]])[0]
    assert values.tolist() == [-9, -8, 12, 16, -28, -1, 15, -5]


def test_small_features_are_kept_whole():
    leaves = [torch.randn(2, 3, 4), torch.randn(2, 5)]
    sketch = make_sketch(17, exact_below=17)
    assert isinstance(sketch, Exact)
    assert torch.equal(sketch(leaves), torch.cat([leaves[0].flatten(1), leaves[1]], 1))
    assert isinstance(make_sketch(18, exact_below=17, width=8), CountSketch)


def test_bad_width_is_refused():
    for width in (0, 1, 1000):
        with pytest.raises(ConfigError, match="power of two"):
            CountSketch(width)


@pytest.mark.gpu
def test_devices_agree():
    leaf = torch.randn(2, 200_000)
    on_cpu, on_gpu = CountSketch(4096, seed=9)([leaf]), CountSketch(4096, seed=9)([leaf.cuda()])
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, atol=1e-4, rtol=1e-4)
