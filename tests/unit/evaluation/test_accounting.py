"""Executed work of each step, against counts made by hand."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import diffusion_cache as dc
from diffusion_cache.engine import StepRecord
from diffusion_cache.engine.frame import SampleRecord
from diffusion_cache.evaluation.accounting import Accountant, kinds_of
from diffusion_cache.evaluation.prompts import Sample
from diffusion_cache.evaluation.subjects import Shipped
from diffusion_cache.profiling.generation import last_state


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
    assert [work.block_flops for work in found.steps] == [(block, block), (0, 0), (block, block)]
    assert (found.flops, found.block_flops) == (3 * outside + 4 * block, 4 * block)


def test_a_batch_is_priced_by_what_one_sample_showed():
    account, denoiser, scheduler = accountant()
    with account.observed() as unknown:
        generation(denoiser, scheduler, [False, True], batch=5)
    assert account.priced(unknown.kinds) is None
    with account.observed(flops=True) as counted:
        generation(denoiser, scheduler, [False, True])
    account.price(counted.kinds, counted)
    assert account.priced(unknown.kinds).steps == counted.steps


def test_what_runs_compiled_is_counted_uncompiled_and_gets_no_hooks_otherwise():
    account, denoiser, scheduler = accountant()
    with account.observed(flops=True) as plain:
        generation(denoiser, scheduler, [False, True])
    account.compiled = True
    graphs, hooks = [], []

    def backend(graph, example):
        graphs.append(graph)
        return lambda *args: hooks.append(any(m._forward_hooks for m in denoiser.modules())) or graph(*args)

    denoiser.compile(backend=backend)
    for _ in range(2):
        with account.observed() as found:
            generation(denoiser, scheduler, [False, True])
        with account.observed(flops=True) as counted:
            generation(denoiser, scheduler, [False, True])
        assert counted.steps == plain.steps
    assert len(set(found.kinds)) == 1
    assert (len(graphs), hooks) == (2, [False] * 4)


COMPUTED, REUSED, AGAIN = SampleRecord(True, 0), SampleRecord(False, 3), SampleRecord(True, 0, again=True)


def call(step, *samples, pass_name="cond"):
    reused = min((sample.spans_reused for sample in samples), default=0)
    return StepRecord(step, pass_name, "transformer", reused == 0, "", 3, reused, samples=samples)


def test_kinds_of_steps_are_those_of_the_sample_alone():
    together = [
        call(0, COMPUTED),  # of one sample or of three, which start from one noise
        call(0, COMPUTED, pass_name="uncond"),
        call(1, REUSED, COMPUTED, AGAIN),
        call(1, REUSED, REUSED, REUSED, pass_name="uncond"),
        call(2),  # decided on for all at once
    ]
    for place, own in enumerate([REUSED, COMPUTED, AGAIN]):
        alone = [*together[:2], call(1, own), call(1, REUSED, pass_name="uncond"), together[4]]
        assert kinds_of(together, 3)[place] == kinds_of(alone, 1)[0]
    assert len(set(map(tuple, kinds_of(together, 3)))) == 3
    for_the_others_sake = SampleRecord(False, 0)
    (own, coupled) = kinds_of([call(0, COMPUTED, for_the_others_sake)], 2)
    assert own != coupled
    assert coupled != kinds_of([call(0, REUSED)], 1)[0]
    assert kinds_of([call(0, COMPUTED, REUSED)], 3) is None


def test_nothing_stays_behind():
    account, denoiser, _scheduler = accountant()
    before, tolist = Scheduler.step, torch.Tensor.tolist
    with pytest.raises(RuntimeError, match="shapes"), account.observed(flops=True):
        denoiser(torch.randn(3, 5))
    assert Scheduler.step is before
    assert torch.Tensor.tolist is tolist
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in denoiser.modules())


def test_reads_are_counted():
    account, _denoiser, _scheduler = accountant()
    with account.observed(flops=True) as found:
        torch.ones(3).sum().item()
        bool(torch.ones(()) > 0)
        torch.ones(2).tolist()
        torch.ones(2).nonzero()
        torch.ones(2) + 1
    assert found.reads == 4


def test_a_skipped_forward_is_not_work():
    account, denoiser, scheduler = accountant()
    with account.observed(flops=True) as whole:
        generation(denoiser, scheduler, [False])
    denoiser.blocks[1].first.forward = lambda x: torch.zeros(*x.shape[:-1], 8)  # as rivals' hooks do
    with account.observed(flops=True) as part:
        generation(denoiser, scheduler, [False])
    assert part.steps[0].pattern == whole.steps[0].pattern
    assert part.steps[0].block_flops == (whole.steps[0].block_flops[0], whole.steps[0].block_flops[1] // 2)


@pytest.mark.parametrize(("every", "share"), [(2, 1 / 2), (3, 1 / 3)])
def test_a_cached_pipeline_executes_its_share(every, share):
    subject = Shipped("flux-digits")
    account = Accountant(subject.denoisers, subject.blocks, subject.pipe.scheduler)
    sample = [Sample(0, 3, 0)]
    with account.observed(flops=True) as whole:
        subject.generate(sample, 6)
    with dc.cached(subject.pipe, "interval", "reuse", every=every), account.observed(flops=True) as part:
        subject.generate(sample, 6)
    assert len({work.block_flops for work in whole.steps}) == 1
    assert part.block_flops == pytest.approx(whole.block_flops * share)
    executed = [sum(work.block_flops) > 0 for work in part.steps]
    assert executed == [step % every == 0 for step in range(6)]


def test_latents_are_what_the_last_step_gave():
    scheduler, other = Scheduler(), Scheduler()
    before = Scheduler.step
    with last_state(scheduler) as found:
        scheduler.step(torch.ones(4))
        last = scheduler.step(torch.full((4,), 3.0)).prev_sample
        other.step(torch.zeros(4))
        assert len(found) == 1
        assert found[0] is last
    assert Scheduler.step is before
