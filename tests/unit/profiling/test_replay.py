"""Repeating the beginning of a generation: the same samples, for less work."""

import pytest
import torch
from plans import batch, drawn

from diffusion_cache import reference
from diffusion_cache.engine import Method
from diffusion_cache.engine.intercept import ATTRIBUTE
from diffusion_cache.forecasters.fitted import Fit, Fitted
from diffusion_cache.measure import count_blocks
from diffusion_cache.policies import Guarded
from diffusion_cache.policies.mask import Mask
from diffusion_cache.profiling.generation import attached
from diffusion_cache.profiling.replay import Replay

MASK = Mask("11010010")
CASES = [
    ("flux-digits", "flow-euler", "stack"),
    ("flux-digits", "flow-euler", "denoiser"),
    ("dit-digits", "dpm++", "stack"),
    ("dit-digits", "ddim", "branch"),
    ("unet-digits", "ddim", "cut"),
    ("wan-moving-digits", "unipc", "block"),
]


class Generations:
    """Generations of one batch, with weights that differ at a step."""

    def __init__(self, name, sampler, scope):
        self.pipe = reference.load(name, sampler)
        self.batch = batch(self.pipe, name, drawn(0, 2))
        self.scope = scope
        denoiser = self.pipe.components.get("unet") or self.pipe.transformer
        self.leaves = [module for module in denoiser.modules() if not list(module.children())]

    def method(self, step=None):
        table = {}
        if step is not None:
            nodes = {2: (0, 1), 4: (0, 1, 3), 7: (1, 3, 6)}[step]
            table = {
                (step, 0, row): Fit(nodes, (0.3,) * (len(nodes) - 1) + (1.3 - 0.3 * len(nodes),)) for row in (0, 1)
            }
        return Method(Guarded(MASK), Fitted(table, 3), self.scope, granularity="batch")

    def __call__(self, step=None):
        """Samples with other weights at a step, and how many leaf modules were executed."""
        with attached(self.pipe, self.method(step)), count_blocks(self.leaves) as count, torch.no_grad():
            images = self.batch.images(self.batch.call()).clone()
        return images, count.total


@pytest.mark.parametrize(("name", "sampler", "scope"), CASES)
def test_what_follows_a_repeated_beginning_is_the_same(name, sampler, scope):
    generate = Generations(name, sampler, scope)
    replay = Replay(generate.pipe, generate.method())
    with replay.noted():
        base, whole = generate()
    assert torch.equal(base, generate()[0])
    work = []
    for step in (7, 4, 2, 7):
        expected, usual = generate(step)
        assert usual == whole
        with replay.until(step):
            images, executed = generate(step)
        assert torch.equal(images, expected)
        assert not torch.equal(images, base)
        work.append(executed / usual)
    assert work[0] == work[3] < work[1] < work[2] < 1
    assert work[0] < 0.75


def test_nothing_is_left_on_the_modules():
    generate = Generations("flux-digits", "flow-euler", "stack")
    replay = Replay(generate.pipe, generate.method())
    with pytest.raises(RuntimeError, match="amiss"), replay.noted():
        raise RuntimeError("amiss")
    with replay.noted():
        generate()
    with replay.until(4):
        generate(4)
    assert not [module for module in generate.pipe.transformer.modules() if ATTRIBUTE in vars(module)]


@pytest.mark.parametrize("calls", [0, 1, 5])
def test_what_does_not_fit_is_computed(calls):
    """Of the calls of two stacks of two streams each, so many are kept; only whole steps are repeated."""
    generate = Generations("flux-digits", "flow-euler", "stack")
    one = 2 * 64 * 128 * 4
    replay = Replay(generate.pipe, generate.method(), limit=calls * one)
    with replay.noted():
        _, whole = generate()
    expected = generate(7)[0]
    with replay.until(7):
        images, executed = generate(7)
    assert torch.equal(images, expected)
    assert (executed == whole) == (calls < 4)


def test_it_can_be_noted_anew():
    generate = Generations("flux-digits", "flow-euler", "stack")
    replay = Replay(generate.pipe, generate.method())
    for base in (None, 2):
        with replay.noted():
            generate(base)
    expected = generate(2)[0]
    with replay.until(8):
        assert torch.equal(generate(2)[0], expected)
