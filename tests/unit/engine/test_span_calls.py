"""What the blocks of a span give while it is skipped."""

import pytest
import torch
from torch import nn

import diffusion_cache as dc

STEPS = 6


class Block(nn.Module):
    def __init__(self, channels, returns):
        super().__init__()
        self.linear = nn.Linear(channels, channels)
        self.returns = returns

    def forward(self, x):
        return self.returns(x + torch.tanh(self.linear(x)))


class Between(nn.Module):
    """Blocks, with code between them that looks at what each gives and writes into it."""

    def __init__(self, returns):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(4, each) for each in returns)
        self.seen = []

    def forward(self, sample, timestep):
        x, given = sample, []
        for block in self.blocks:
            output = block(x)
            given.append(output)
            x = output if isinstance(output, torch.Tensor) else output[0]
            if block is not self.blocks[-1]:
                x.add_(1)
        self.seen.append(given)
        return x


def tensor(x):
    return x


def pair(x):
    return x, None


def listed(x):
    return [x]


def wider(x):
    return x, torch.cat([x, x])


def reused(model):
    """What the blocks of the last, reused, step gave; its output is checked."""
    samples = [0.1 * step * torch.ones(2, 3, 4) for step in range(STEPS)]
    with torch.no_grad():
        plain = [model(sample.clone(), step) for step, sample in enumerate(samples)]
        residual = plain[STEPS - 2] - samples[STEPS - 2]
        with dc.run(model, "interval", "reuse", every=2, num_steps=STEPS, scope="stack") as run:
            for step, sample in enumerate(samples):
                run.next_step()
                output = model(sample.clone(), step)
                if step % 2 == 0:
                    assert torch.equal(output, plain[step])
    assert run.summary().warnings == ()
    assert [record.computed for record in run.summary().records] == [True, False] * (STEPS // 2)
    torch.testing.assert_close(output, samples[-1] + residual)
    return model.seen[-1]


@pytest.mark.parametrize("returns", [tensor, pair])
def test_blocks_that_return_the_like_share_what_they_give(returns):
    first, *others, last = reused(Between([returns] * 5))
    assert all(other is first for other in others)
    assert last is not first


@pytest.mark.parametrize(
    "returns", [[listed] * 5, [pair, wider, pair, wider, pair], [tensor, pair, tensor, pair, pair]]
)
def test_blocks_that_return_something_else_have_their_own(returns):
    """Lists as well, which code between the blocks may change."""
    given = reused(Between(returns))
    assert len({id(one) for one in given}) == 5
    for one, makes in zip(given, returns, strict=True):
        like = makes(torch.zeros(2, 3, 4))
        assert type(one) is type(like)
        if makes is wider:
            assert one[1].shape == like[1].shape
