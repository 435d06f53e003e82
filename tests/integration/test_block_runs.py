"""Runs of neighbouring blocks as one span: the same images as block by block, from less memory."""

from dataclasses import dataclass

import pytest
import torch

import diffusion_cache as dc
from diffusion_cache import published, reference
from diffusion_cache.context import SCOPES, PassState, Policy, Step, Verdict
from diffusion_cache.errors import ConfigError
from diffusion_cache.forecasters import Reuse
from diffusion_cache.models import find_layout
from diffusion_cache.policies import Mask
from diffusion_cache.schedule import Schedule

STEPS, MASK = 6, "110100"
CHOSEN = {
    "dit-digits": [f"transformer_blocks.{i}" for i in (0, 1, 2, 5, 7, 8)],  # one run begins at block 0
    "flux-digits": [f"transformer_blocks.{i}" for i in (0, 1, 2)]
    + [f"single_transformer_blocks.{i}" for i in (0, 1, 4, 5, 6)],
    "wan-moving-digits": [f"blocks.{i}" for i in (0, 1, 3, 4)],
}


@dataclass(frozen=True)
class BlockByBlock(Policy):
    """The mask for each chosen block apart; the others are computed."""

    mask: str
    chosen: tuple[bool, ...]

    scopes = frozenset(SCOPES)

    def schedule(self, total):
        return Schedule(tuple((tuple(entry == "1" or not reused for reused in self.chosen),) for entry in self.mask))

    def decide(self, step: Step, value: float | None, state: PassState) -> Verdict:
        raise AssertionError("planned")


def generate(pipe, name):
    return reference.images(name, pipe(**reference.inputs(name, [3, 8], [5, 6], steps=STEPS)))


@pytest.mark.parametrize("name", CHOSEN)
def test_a_run_is_its_blocks_reused_together(name):
    pipe = reference.load(name)
    denoiser = getattr(pipe, reference.spec(name).denoiser)
    uncached = generate(pipe, name)
    names = [span.name for span in find_layout(denoiser, "block").spans]
    images, sizes, hits = [], [], []
    apart = BlockByBlock(MASK, tuple(block in CHOSEN[name] for block in names))
    for policy in (apart, Mask(MASK, CHOSEN[name])):
        with dc.cached(pipe, policy=policy, forecaster=Reuse(), scope="block"):
            images.append(generate(pipe, name))
            summary = dc.summary(pipe)
            sizes.append(summary.cache_bytes)
            hits.append(sum(record.spans_reused for record in summary.records))
    by_block, by_run = images
    torch.testing.assert_close(by_run, by_block, rtol=1e-3, atol=1e-4)
    assert (by_block - uncached).abs().max() > 0.01
    layout = find_layout(denoiser, "block", blocks=CHOSEN[name])
    assert hits[1] * len(CHOSEN[name]) == hits[0] * len(layout.spans)
    assert sizes[1] < 0.75 * sizes[0]
    assert torch.equal(generate(pipe, name), uncached)


def test_the_published_list_drives_the_blocks_it_was_published_for(monkeypatch):
    """On a FLUX, which has single blocks as well; HunyuanVideo has 40 of them."""
    entry = published.load("profilingdit/hunyuanvideo-50")
    assert len(entry.blocks) == 24
    assert entry.blocks[0] == "single_transformer_blocks.0"
    pipe = reference.load("flux-digits")
    with pytest.raises(ConfigError, match="is for HunyuanVideoTransformer3DModel"):
        dc.enable(pipe, profile="published/profilingdit/hunyuanvideo-50")
    figures = {**entry.figures, "cached_single_blocks": [0, 1, 4]}
    other = published.Published(**{**vars(entry), "figures": figures, "transformer": None})
    monkeypatch.setattr(published, "load", lambda name: other)
    with dc.cached(pipe, profile="published/profilingdit/hunyuanvideo-50"):
        pipe(**reference.inputs("flux-digits", [3], [5], steps=50))
        summary = dc.summary(pipe)
    assert summary.spans == 2  # 0 and 1 together, 4
    assert [record.step for record in summary.records if record.computed] == [*range(7), 18, 26, 32, 38, 42, 46, 48]
