import torch

from diffusion_cache.evaluation.reproduction import seed_sets, taylor
from diffusion_cache.evaluation.reproduction.bench import Ran


def test_orders_are_compared_in_order(monkeypatch):
    means = {1: 30.0, 2: 29.0, 3: 28.0}
    monkeypatch.setattr(
        taylor, "taylor", lambda seeds, every, order: Ran((means[order],), (0.1,), 0.5, 20.0, torch.empty(0))
    )
    assert taylor.orders(seed_sets()[0], 8, (1, 2, 3)).holds
    assert not taylor.orders(seed_sets()[0], 8, (1, 3, 2)).holds
