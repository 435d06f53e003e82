"""A profile's features made small by the kernel, and without."""

import torch

from diffusion_cache import ops
from diffusion_cache.profiling.sketch import CountSketch


def test_sketches_are_the_same_with_the_kernel(monkeypatch):
    leaves = [torch.randn(3, 5, 40), torch.randn(3, 70)]
    launched, find = [], ops._kernel

    def counted(kernel):
        launched.append(kernel)
        return find(kernel)

    monkeypatch.setattr(ops, "_kernel", counted)
    sketch = CountSketch(64, seed=5)
    with_kernel = sketch(leaves, first=22)
    assert launched.count("count_sketch") == len(leaves)
    monkeypatch.setattr(ops, "_MODE", "off")
    torch.testing.assert_close(sketch(leaves, first=22), with_kernel)
