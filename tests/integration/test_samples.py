"""Batches do not couple: with an adaptive policy an image does not depend on its neighbours."""

import warnings

import pytest
import torch
from torch import nn

import diffusion_cache as dc
from diffusion_cache import reference
from diffusion_cache.policies import FirstBlock

STEPS = 10
LABELS, SEEDS = (3, 8, 1, 5), (5, 6, 7, 8)
# thresholds between the samples' own changes, so that some of a batch are computed and others not
THRESHOLDS = {"dit-digits": 0.5, "unet-digits": 0.5, "flux-digits": 0.5, "wan-moving-digits": 0.12}


def generate(name, pipe, labels=LABELS, seeds=SEEDS):
    return reference.images(name, pipe(**reference.inputs(name, labels, seeds, steps=STEPS)))


@pytest.mark.parametrize("forecaster", ["reuse", "taylor"])
@pytest.mark.parametrize("name", sorted(reference.MODELS))
def test_an_image_of_a_mixed_batch_equals_the_image_alone(name, forecaster):
    pipe = reference.load(name)
    options = dict(policy="first_block", forecaster=forecaster, threshold=THRESHOLDS[name])
    with warnings.catch_warnings():
        warnings.simplefilter("error", dc.DiffusionCacheWarning)
        with dc.cached(pipe, **options):
            together = generate(name, pipe)
            records = dc.summary(pipe).records
            alone = []
            for i, (label, seed) in enumerate(zip(LABELS, SEEDS, strict=True)):
                alone.append(generate(name, pipe, (label,), (seed,)))
                own = [record.samples for record in dc.summary(pipe).records]
                assert own == [(record.samples[i],) for record in records]
    mixed = [record for record in records if "of 4 samples" in record.reason]
    assert len(mixed) >= 2
    assert any(not record.computed for record in records)
    for i, image in enumerate(alone):
        assert (together[i] - image[0]).abs().max() <= 1e-4


def test_samples_that_begin_at_one_noise_do_not_couple():
    name = "flux-digits"
    pipe = reference.load(name)
    seeds = (5, 5, 5, 5)
    with dc.cached(pipe, "first_block", "reuse", threshold=THRESHOLDS[name]):
        together = generate(name, pipe, seeds=seeds)
        records = dc.summary(pipe).records
        again = generate(name, pipe, seeds=seeds)
        alone = [generate(name, pipe, (label,), (5,)) for label in LABELS]
    assert [record for record in records if "of 4 samples" in record.reason]
    assert torch.equal(again, together)
    assert all((together[i] - image[0]).abs().max() <= 1e-4 for i, image in enumerate(alone))


def test_whole_batches_couple_where_asked_for():
    name = "flux-digits"
    pipe = reference.load(name)
    with dc.cached(pipe, "first_block", "reuse", threshold=THRESHOLDS[name], granularity="batch"):
        together = generate(name, pipe)
        records = dc.summary(pipe).records
        alone = [generate(name, pipe, (label,), (seed,)) for label, seed in zip(LABELS, SEEDS, strict=True)]
    assert not [record for record in records if "samples" in record.reason]
    assert max((together[i] - image[0]).abs().max() for i, image in enumerate(alone)) > 1e-3


def test_only_the_samples_that_ask_are_computed():
    name = "flux-digits"
    pipe = reference.load(name)
    block = pipe.transformer.single_transformer_blocks[2]
    rows = []
    with dc.cached(pipe, "first_block", "reuse", threshold=THRESHOLDS[name]):
        generate(name, pipe)  # finds out that rows are independent
        hook = block.register_forward_pre_hook(lambda m, args, kwargs: rows.append(len(kwargs["hidden_states"])),
                                               with_kwargs=True)  # fmt: skip
        generate(name, pipe)
        hook.remove()
        records = dc.summary(pipe).records
    asked = [int(record.reason.split(" of ")[0]) if " of 4 samples" in record.reason else 4 for record in records]
    assert rows == [count for count, record in zip(asked, records, strict=True) if record.computed]
    assert min(rows) < 4


class Block(nn.Module):
    def __init__(self, mixing: bool):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.mixing = mixing

    def forward(self, x, table):
        y = self.linear(x) + table.mean()
        return x + (y - y.mean(0) if self.mixing else y)


class Model(nn.Module):
    """Blocks that take a table whose length is the batch's by chance; some mix the samples of a batch."""

    def __init__(self, *mixing: bool):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(mixes) for mixes in mixing)

    def forward(self, x, timestep):
        table = torch.arange(3.0) * timestep
        for block in self.blocks:
            x = block(x, table)
        return x


def mixed_run(model, granularity):
    """Only the second sample changes, from step 2 on."""
    outputs = []
    with dc.run(model, FirstBlock(threshold=0.05), "reuse", num_steps=6, granularity=granularity) as run:
        for step in range(6):
            run.next_step()
            x = torch.arange(1.0, 13.0).reshape(3, 4) / 6
            x[1] += 0.5 * max(step - 1, 0)
            outputs.append(model(x, torch.tensor(1.0)))
        return outputs, run.summary().records


@torch.no_grad()
@pytest.mark.parametrize("mixing", [(False, False, True), (False, True, False)])
def test_samples_that_cannot_be_told_apart_are_computed_together(mixing):
    model = Model(*mixing)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", dc.DiffusionCacheWarning)
        apart, records = mixed_run(model, "sample")
    told = [str(w.message) for w in caught if issubclass(w.category, dc.DiffusionCacheWarning)]
    assert len(told) == 1
    assert "cannot be told apart" in told[0]
    together, _ = mixed_run(model, "batch")
    assert all(map(torch.equal, apart, together))
    assert [record.computed for record in records] == [True, False, True, True, True, True]


def test_unknown_granularity():
    with pytest.raises(dc.ConfigError, match=r"Unknown granularity 'samples'.*sample"):
        dc.enable(reference.load("flux-digits"), granularity="samples")
