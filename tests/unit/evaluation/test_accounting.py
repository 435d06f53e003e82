"""Executed work of each step, against counts made by hand."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import diffusion_cache as dc
from diffusion_cache.evaluation.accounting import Accountant
from diffusion_cache.evaluation.prompts import Sample
from diffusion_cache.evaluation.subjects import Shipped, last_latents


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.first, self.second = nn.Linear(width, 2 * width, bias=False), nn.Linear(2 * width, width, bias=False)

    def forward(self, x):
        return self.second(self.first(x))


class Denoiser(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(4, 4, bias=False)
        self.blocks = nn.ModuleList([Block(4), Block(4)])
        self.skipped = False

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = x if self.skipped else block(x)
        return x


class Scheduler:
    def step(self, x):
        return SimpleNamespace(prev_sample=(x @ torch.eye(4)) * 0.5)  # operations of its own


def accountant():
    denoiser, scheduler = Denoiser(), Scheduler()
    blocks = {f"blocks.{i}": block for i, block in enumerate(denoiser.blocks)}
    return Accountant({"denoiser": denoiser}, blocks, scheduler), denoiser, scheduler


def generation(denoiser, scheduler, skipped, batch=1):
    x = torch.randn(batch, 3, 4)
    x = x @ torch.eye(4)  # a text encoder
    for skip in skipped:
        denoiser.skipped = skip
        x = scheduler.step(denoiser(x)).prev_sample


def test_operations_of_each_step_equal_an_analytic_count():
    account, denoiser, scheduler = accountant()
    with account.observed(flops=True) as found:
        generation(denoiser, scheduler, [False, True, False])
    outside, block = 2 * 3 * 4 * 4, 2 * (2 * 3 * 4 * 8)
    assert [work.flops for work in found.steps] == [outside + 2 * block, outside, outside + 2 * block]
    assert [work.block_flops for work in found.steps] == [2 * block, 0, 2 * block]
    assert [account.executed(work) for work in found.steps] == [
        [192, 192],
        [0, 0],
        [192, 192],
    ]  # 64 weights at 3 positions


def test_a_batch_is_priced_by_what_one_sample_showed():
    account, denoiser, scheduler = accountant()
    with account.observed() as unknown:
        generation(denoiser, scheduler, [False, True], batch=5)
    assert account.priced(unknown) is None
    with account.observed(flops=True) as counted:
        generation(denoiser, scheduler, [False, True])
    assert account.priced(unknown).steps == counted.steps


def test_nothing_stays_behind():
    account, denoiser, _scheduler = accountant()
    before = Scheduler.step
    with pytest.raises(RuntimeError, match="shapes"), account.observed(flops=True):
        denoiser(torch.randn(3, 5))
    assert Scheduler.step is before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in denoiser.modules())


def test_reads_are_counted():
    account, _denoiser, _scheduler = accountant()
    with account.observed(flops=True) as found:
        torch.ones(3).sum().item()
        bool(torch.ones(()) > 0)
    assert found.reads == 2


@pytest.mark.parametrize(("every", "share"), [(2, 1 / 2), (3, 1 / 3)])
def test_a_cached_pipeline_executes_its_share(every, share):
    subject = Shipped("flux-digits")
    account = Accountant(subject.denoisers, subject.blocks, subject.pipe.scheduler)
    sample = [Sample(0, 3, 0)]
    with account.observed(flops=True) as whole:
        subject.generate(sample, 6)
    with dc.cached(subject.pipe, "interval", "reuse", every=every), account.observed(flops=True) as part:
        subject.generate(sample, 6)
    inside = [work.block_flops for work in whole.steps]
    assert len(set(inside)) == 1
    assert sum(work.block_flops for work in part.steps) == pytest.approx(sum(inside) * share)
    executed = [sum(account.executed(work)) > 0 for work in part.steps]
    assert executed == [step % every == 0 for step in range(6)]


def test_latents_are_what_the_last_step_gave():
    scheduler, other = Scheduler(), Scheduler()
    before = Scheduler.step
    with last_latents(scheduler) as found:
        scheduler.step(torch.ones(4))
        last = scheduler.step(torch.full((4,), 3.0)).prev_sample
        other.step(torch.zeros(4))
        assert len(found) == 1
        assert found[0] is last
    assert Scheduler.step is before
