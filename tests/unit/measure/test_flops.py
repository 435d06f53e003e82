"""Executed arithmetic: formulas by hand, and blocks that were stepped over."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from diffusion_cache.measure import count_blocks, executed_flops


def test_linear_and_convolution():
    linear, conv = nn.Linear(10, 7), nn.Conv2d(3, 5, 3, padding=1)
    assert executed_flops(lambda: linear(torch.ones(4, 10))) == 2 * 4 * 10 * 7
    assert executed_flops(lambda: conv(torch.ones(2, 3, 8, 8))) == 2 * 2 * 8 * 8 * 5 * 3 * 3 * 3


@pytest.mark.parametrize(("queries", "keys", "head_dim", "value_dim"), [(6, 6, 8, 8), (5, 9, 16, 16)])
@pytest.mark.parametrize("mask", [False, True])
def test_attention_counts_the_same_whichever_kernel_runs(queries, keys, head_dim, value_dim, mask):
    batch, heads = 2, 3
    q = torch.randn(batch, heads, queries, head_dim)
    k = torch.randn(batch, heads, keys, head_dim)
    v = torch.randn(batch, heads, keys, value_dim)
    bias = torch.zeros(batch, 1, queries, keys) if mask else None

    def attend():
        with torch.no_grad():
            F.scaled_dot_product_attention(q, k, v, attn_mask=bias)

    expected = 2 * batch * heads * queries * keys * (head_dim + value_dim)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        assert executed_flops(attend) == expected
    with sdpa_kernel(SDPBackend.MATH):
        assert executed_flops(attend) == expected


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_operators_that_are_made_of_others_count_as_torch_counts_them(mode):
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    x = torch.randn(2, 5, 8)

    def work():
        with mode():
            torch.einsum("bij,bkj->bik", layer(x), F.conv1d(x, torch.ones(3, 5, 1))).nonzero()

    with FlopCounterMode(display=False) as counter:
        work()
    assert executed_flops(work) == counter.get_total_flops() > 0


def test_errors_pass_through():
    def fail():
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        executed_flops(fail)


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x, skipped=()):
        for index, block in enumerate(self.blocks):
            x = x if index in skipped else block(x)
        return x


def test_only_executed_blocks_count():
    stack, x = Stack(), torch.ones(1, 4)
    with count_blocks(stack.blocks) as count:
        stack(x)
        stack(x, skipped=(0, 2))
        stack(x, skipped=(0,))
    assert count.per_block == [1, 3, 2]
    assert count.total == 6
    stack(x)
    assert count.total == 6  # the hooks are gone
    assert not any(block._forward_hooks for block in stack.blocks)


def test_hooks_go_when_the_body_fails():
    stack = Stack()
    with pytest.raises(RuntimeError), count_blocks(stack.blocks):
        stack(torch.ones(1, 5))
    assert not any(block._forward_hooks for block in stack.blocks)
