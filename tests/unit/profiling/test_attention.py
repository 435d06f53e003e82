"""Attention received per token, against float64 formulas and on the shipped models."""

import math
from contextlib import ExitStack

import pytest
import torch
import torch.nn.functional as F

from diffusion_cache.errors import ConfigError, DiffusionCacheWarning
from diffusion_cache.models.spans import find_layout
from diffusion_cache.profiling import attention as module
from diffusion_cache.profiling.attention import AttentionReceived
from diffusion_cache.reference import inputs, load


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def received_in_full(query, key, bias=None, scale=None):
    """[B, L] of [B, H, L, d] in float64; bias: added to the logits."""
    logits = query.double() @ key.double().mT * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    return (logits if bias is None else logits + bias).softmax(-1).mean((1, 2))


def observe(received, *args, block="a", step=0, **kwargs):
    """The result of one attention call inside a block."""
    with received, received.block(block, step):
        return F.scaled_dot_product_attention(*args, **kwargs)


def only(received, step=0):
    (value,) = received.result().values()
    return value[step]


def qkv(*shape):
    return torch.randn(3, *shape).unbind()


def close(got, expected):
    torch.testing.assert_close(got, expected.float(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("chunk", [1, 500, 2**24])
def test_mean_over_samples_heads_and_queries(chunk, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", chunk)
    received = AttentionReceived(["a"], 2)
    calls = [qkv(batch, 4, 19, 8) for batch in (2, 1)]
    for q, k, v in calls:
        assert torch.equal(observe(received, q, k, v, step=1), F.scaled_dot_product_attention(q, k, v))
    close(only(received, 1), torch.cat([received_in_full(q, k) for q, k, _ in calls]).mean(0))
    assert only(received, 1).sum().item() == pytest.approx(1)
    assert only(received, 1).std() > 0.003  # over keys instead of queries it would be constant
    assert only(received, 0).isnan().all()


def boolean(batch, heads, length):
    mask = torch.rand(batch, 1, length, length) > 0.4
    return mask | torch.eye(length, dtype=torch.bool)


@pytest.mark.parametrize("chunk", [1, 100, 2**24])
def test_masks_scales_and_grouped_heads(chunk, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", chunk)
    q, k, v = qkv(2, 4, 9, 8)
    minus = torch.tensor(-torch.inf, dtype=torch.float64)
    mask = boolean(2, 4, 9)
    padding = torch.ones(2, 1, 1, 9, dtype=torch.bool)
    padding[1, ..., 6:] = False
    additive = torch.randn(9, 9)
    causal = torch.ones(9, 9, dtype=torch.bool).tril()

    def as_bias(allowed):
        return torch.where(allowed, 0.0, minus)

    cases = [
        (dict(attn_mask=mask), dict(bias=as_bias(mask))),
        (dict(attn_mask=padding), dict(bias=as_bias(padding))),
        (dict(attn_mask=additive, scale=0.2), dict(bias=additive, scale=0.2)),
        (dict(is_causal=True), dict(bias=as_bias(causal))),
    ]
    for options, formula in cases:
        received = AttentionReceived(["a"], 1)
        got = observe(received, query=q, key=k, value=v, **options)
        assert torch.equal(got, F.scaled_dot_product_attention(q, k, v, **options))
        close(only(received), received_in_full(q, k, **formula).mean(0))
    received = AttentionReceived(["a"], 1)
    observe(received, q, k[:, :2], v[:, :2], enable_gqa=True)
    close(only(received), received_in_full(q, k[:, :2].repeat_interleave(2, 1)).mean(0))


def test_other_numbers_of_dimensions_and_precisions():
    q, k, v = qkv(6, 9, 8)
    flat, deep, half = (AttentionReceived(["a"], 1) for _ in range(3))
    observe(flat, q, k, v)
    close(only(flat), received_in_full(q[:, None], k[:, None]).mean(0))
    observe(deep, *(x.view(2, 3, 1, 9, 8) for x in (q, k, v)), attn_mask=torch.ones(9, 9).tril() > 0)
    bias = torch.where(torch.ones(9, 9).tril() > 0, 0.0, -torch.inf).double()
    close(only(deep), received_in_full(q[:, None], k[:, None], bias).mean(0))
    q, k, v = (x.to(torch.bfloat16)[None] for x in (q, k, v))
    assert observe(half, q, k, v).dtype == torch.bfloat16
    close(only(half), received_in_full(q, k).mean(0))


def test_queries_that_may_attend_to_nothing_give_nothing():
    q, k, v = qkv(1, 2, 8, 4)
    mask = torch.ones(1, 1, 8, 8, dtype=torch.bool)
    mask[..., 6:, :] = False
    received = AttentionReceived(["a"], 1)
    observe(received, q, k, v, attn_mask=mask)
    close(only(received), received_in_full(q[:, :, :6], k).mean(0) * 6 / 8)


def test_text_is_left_out_but_takes_its_part_of_the_softmax():
    q, k, v = qkv(2, 3, 12, 8)
    for offset, tokens in ((4, None), (4, 8), (0, 8), (2, 8)):
        received = AttentionReceived(["a"], 1, offset=offset, tokens=tokens)
        observe(received, q, k, v)
        image = slice(offset, 12 if tokens is None else offset + tokens)
        close(only(received), received_in_full(q[:, :, image], k).mean(0)[image])
        assert 0.3 < only(received).sum() < 0.9
    short = AttentionReceived(["a"], 1, offset=4, tokens=9)
    observe(short, q, k, v)
    with pytest.raises(ConfigError, match="no self-attention was seen"):
        short.result()


def test_part_of_the_queries():
    q, k, v = qkv(1, 2, 1000, 4)
    received = AttentionReceived(["a"], 1, max_queries=10)
    observe(received, q, k, v)
    rows = torch.arange(10) * 111
    close(only(received), received_in_full(q[:, :, rows], k).mean(0))
    assert only(received).sum().item() == pytest.approx(1)


def test_what_is_passed_over():
    q, k, v = qkv(1, 2, 9, 8)
    received = AttentionReceived(["a", "b"], 1)
    with received:
        F.scaled_dot_product_attention(q, k, v)  # in no block
        with received.block("a", 0):
            F.scaled_dot_product_attention(q, k[:, :, :5], v[:, :, :5])  # cross-attention
    with received.block("a", 0):
        F.scaled_dot_product_attention(q, k, v)  # outside the context
    assert not received.sums
    with received, received.block("a", 0):
        with received.block("b", 0):
            F.scaled_dot_product_attention(q, k, v)
        assert list(received.sums) == ["1.sum", "1.count"]
        F.scaled_dot_product_attention(k, q, v)
    close(received.result()["attention_received.0"][0], received_in_full(k, q).mean(0))
    close(received.result()["attention_received.1"][0], received_in_full(q, k).mean(0))


def test_gradients_flow_as_without_it():
    q, k, v = (x.requires_grad_() for x in qkv(1, 2, 9, 8))
    received = AttentionReceived(["a"], 1)
    observe(received, q, k, v).sum().backward()
    assert not received.sums["0.sum"].requires_grad
    with_it = v.grad.clone()
    v.grad = None
    F.scaled_dot_product_attention(q, k, v).sum().backward()
    assert torch.equal(v.grad, with_it)


def test_foreground_share():
    """Each row against the foreground of its own sample, counted by hand; [cond of both samples, null of both]."""
    q, k, v = qkv(4, 2, 10, 8)
    ranked = received_in_full(q, k).argsort(dim=1, descending=True)
    masks = torch.rand(2, 10, generator=torch.Generator().manual_seed(3)) > 0.6
    for top, count in ((0.2, 2), (0.25, 3), (1.0, 10), (0.01, 1)):
        received = AttentionReceived(["a", "b", "c"], 2, top=top)
        with received, received.block("b", 1):
            F.scaled_dot_product_attention(q, k, v)
        received.compare(masks)
        shares = received.foreground_share()
        by_row = [masks[row % 2, ranked[row, :count]].double().mean() for row in range(4)]
        assert shares.shape == (3, 2)
        assert shares[1, 1].item() == pytest.approx(float(sum(by_row) / 4))
        assert shares.isnan().sum() == 5


def test_foregrounds_that_do_not_fit():
    q, k, v = qkv(3, 2, 10, 8)
    received = AttentionReceived(["a"], 1, top=0.2)
    observe(received, q, k, v)
    with pytest.raises(ConfigError, match="mask has 9 tokens, but a attends over 10"):
        received.compare(torch.ones(3, 9, dtype=torch.bool))
    with pytest.raises(ConfigError, match="3 rows for 2 samples"):
        received.compare(torch.ones(2, 10, dtype=torch.bool))
    with pytest.raises(ConfigError, match="share of top tokens"):
        AttentionReceived(["a"], 1, top=0.0)


def test_misuse_is_refused():
    q, k, v = qkv(1, 2, 9, 8)
    received = AttentionReceived(["a"], 1)
    for block, step in (("z", 0), ("a", 1)):
        with pytest.raises(ConfigError, match="announced"), received.block(block, step):
            pass
    observe(received, q, k, v)
    with pytest.raises(ConfigError, match="over 9 and over 5 tokens"):
        observe(received, *(x[:, :, :5] for x in (q, k, v)))
    with pytest.raises(ConfigError, match="NaN at step 0"):
        observe(received, q * torch.nan, k, v)
    two = AttentionReceived(["a", "b"], 1)
    observe(two, q, k, v)
    with pytest.warns(DiffusionCacheWarning, match="1 of 2 blocks, as b"):
        two.result()


def test_parts_merge_and_resume():
    calls = [qkv(2, 2, 9, 8) for _ in range(2)]
    whole, first, second, resumed = (AttentionReceived(["a"], 1) for _ in range(4))
    for call in calls:
        observe(whole, *call)
    observe(first, *calls[0])
    observe(second, *calls[1])
    resumed.load_state_dict(first.state_dict())
    observe(resumed, *calls[1])
    first.merge(second)
    for other in (first, resumed):
        close(only(other), only(whole))
    with pytest.raises(ConfigError, match="cannot merge what was measured of the attention of b"):
        whole.merge(AttentionReceived(["b"], 1))


def watch(denoiser, received, stack):
    """Announce each of the denoiser's blocks to `received` while it runs; returns the list of steps that ran."""
    steps = []
    for index, span in enumerate(find_layout(denoiser, "block").spans):
        (block,) = span.members

        def before(module, args, index=index, name=span.name):
            if index == 0:
                steps.append(len(steps))
            entered = ExitStack()
            entered.enter_context(received.block(name, steps[-1]))
            module._entered = entered

        stack.callback(block.register_forward_pre_hook(before).remove)
        stack.callback(block.register_forward_hook(lambda module, args, output: module._entered.close()).remove)
    return steps


@pytest.mark.parametrize(
    ("name", "tokens", "passes"), [("dit-digits", 64, 1), ("flux-digits", 68, 1), ("wan-moving-digits", 112, 2)]
)
def test_shipped_models(name, tokens, passes):
    """All blocks' attention goes the way that is watched, and the images stay what they are, bit for bit."""
    pipe = load(name)
    blocks = [span.name for span in find_layout(pipe.transformer, "block").spans]
    received = AttentionReceived(blocks, 2 * passes)

    def images():
        output = pipe(**inputs(name, [3, 8], [0, 1], steps=2))
        return torch.as_tensor(output.images if hasattr(output, "images") else output.frames)

    plain = images()
    with ExitStack() as stack:
        steps = watch(pipe.transformer, received, stack)
        stack.enter_context(received)
        assert torch.equal(images(), plain)
    assert len(steps) == 2 * passes
    result = received.result()
    assert len(result) == len(blocks)
    for value in result.values():
        assert value.shape == (2 * passes, tokens)
        torch.testing.assert_close(value.sum(1), torch.ones(2 * passes))
        assert value.min() >= 0
        assert value.std() > 1e-4


def test_a_block_of_a_shipped_model_in_float64():
    pipe = load("dit-digits")
    block = pipe.transformer.transformer_blocks[5]
    received = AttentionReceived(["x", "transformer_blocks.5"], 1)
    attention, seen = block.attn1, []
    with ExitStack() as stack:

        def before(module, args):
            seen.append(args[0].double())
            stack.enter_context(received.block("transformer_blocks.5", 0))

        stack.callback(attention.register_forward_pre_hook(before).remove)
        stack.callback(attention.register_forward_hook(lambda *_: received.__setattr__("_current", None)).remove)
        stack.enter_context(received)
        pipe(**inputs("dit-digits", [3, 8, 1], [0, 1, 2], steps=1))
    (hidden,) = seen
    assert hidden.shape == (6, 64, 96)
    with torch.no_grad():
        q, k = (
            (hidden @ layer.weight.double().T + layer.bias.double()).unflatten(-1, (3, 32)).transpose(1, 2)
            for layer in (attention.to_q, attention.to_k)
        )
    with pytest.warns(DiffusionCacheWarning, match="1 of 2 blocks"):
        close(received.result()["attention_received.1"][0], received_in_full(q, k).mean(0))
