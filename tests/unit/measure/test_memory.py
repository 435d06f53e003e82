"""Live bytes, by hand."""

import torch

from diffusion_cache.measure import LiveBytes, peak_bytes

X = torch.ones(100)  # 400 bytes


def test_tensors_count_while_they_live():
    with LiveBytes() as made:
        a = X + 1
        b = a * 2
        assert (made.live, made.peak) == (800, 800)
        del b
        assert (made.live, made.peak) == (400, 800)
        c = a.double()
        assert (made.live, made.peak) == (1200, 1200)
        del a, c
    assert (made.live, made.peak) == (0, 1200)


def test_views_and_what_was_there_before_do_not_count():
    with LiveBytes() as made:
        view = X.view(10, 10)
        X.mul_(1)
        assert made.live == 0
        made_here = view + 0
        other = made_here.t()[2:]
        made_here.add_(1)
        assert made.live == 400
        del made_here
        assert made.live == 400  # a view holds the whole storage
        del other
    assert (made.live, made.peak) == (0, 400)


def test_peak_counts_what_is_freed_inside():
    def call():
        return ((X + 1) * 2).sum()

    assert peak_bytes(call) == 800
    with torch.inference_mode():
        assert peak_bytes(call) == 800
    with LiveBytes() as outer:
        kept = X + 1
        assert peak_bytes(call) == 800
        assert outer.peak == 1200
    del kept
