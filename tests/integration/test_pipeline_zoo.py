"""Many real pipeline classes, tiny: cached by a planned and an adaptive policy, counted right, and restored."""

import warnings
from typing import Any

import pipeline_zoo
import pytest
from pipeline_zoo import equal, tensors
from torch import Tensor

import diffusion_cache as dc
from diffusion_cache.models import find_denoisers

LOOKING_INSIDE = (
    "StableDiffusionSAGPipeline",
    "StableDiffusionAttendAndExcitePipeline",
    "StableDiffusionPix2PixZeroPipeline",
)
CASES = pipeline_zoo.cases()
# guidance is on at every other step: no computed step has the shapes of the reused one after it
ALTERNATING = ("AceStepPipeline-interval",)
# blocks that are run one by one, which no probe stands before
UNPROBED = ("StableCascadePriorPipeline", "StableCascadeDecoderPipeline", "StableCascadeCombinedPipeline",
            "WuerstchenDecoderPipeline", "WuerstchenCombinedPipeline")  # fmt: skip
CACHED = [case for case in CASES if case.name not in LOOKING_INSIDE]


@pytest.fixture(scope="module", params=CACHED, ids=lambda case: case.id)
def subject(request):
    return Subject(request.param)


class Subject:
    def __init__(self, case: pipeline_zoo.PipelineCase):
        self.case = case
        self.pipe = case.build()
        self.calls = 0
        hooks = [denoiser.register_forward_pre_hook(self._count) for denoiser in find_denoisers(self.pipe).values()]
        self.uncached = self.generate()
        for hook in hooks:
            hook.remove()

    def _count(self, module: Any, args: Any) -> None:
        self.calls += 1

    def generate(self) -> list[Tensor]:
        return tensors(self.pipe(**self.case.call()))


def test_there_are_many():
    assert len({case.name for case in CACHED}) >= 100
    assert len({case.id for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", [case for case in CASES if case.name in LOOKING_INSIDE], ids=lambda case: case.id)
def test_pipelines_that_look_inside_their_denoiser_are_refused(case):
    pipe = case.build()
    with pytest.raises(dc.NoSpansError, match="no block may be skipped"):
        dc.enable(pipe, "interval", every=2)
    assert tensors(pipe(**case.call()))


def test_the_table_counts_what_the_loop_does(subject):
    assert subject.calls == subject.case.iterations * subject.case.calls


def test_always_computing_is_identical_and_counted(subject):
    with dc.cached(subject.pipe, "interval", every=1):
        assert equal(subject.generate(), subject.uncached)
        summary = dc.summary(subject.pipe)
    assert summary.reused == 0
    assert len(summary.records) == subject.calls


@pytest.mark.parametrize(
    ("policy", "options"),
    [("mask", dict(mask="1010")), ("first_block", dict(threshold=1e9, max_consecutive=1))],
    ids=["mask", "first_block"],
)
def test_cached(subject, policy, options):
    if policy == "first_block" and subject.case.name in UNPROBED:
        with pytest.raises(dc.ConfigError, match="does not serve scope 'block'"):
            dc.enable(subject.pipe, policy, **options)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("error", dc.DiffusionCacheWarning)
        with dc.cached(subject.pipe, policy, "reuse", **options):
            cached = subject.generate()
            summary = dc.summary(subject.pipe)
    assert len(summary.records) == subject.calls
    assert summary.cache_bytes > 0
    assert [tensor.shape for tensor in cached] == [tensor.shape for tensor in subject.uncached]
    assert all(tensor.double().isfinite().all() for tensor in cached)
    assert (summary.reused > 0) == (subject.case.id not in ALTERNATING or policy != "mask")


def test_nothing_is_left_behind(subject):
    """By the tests above, each of which ends with the cache off."""
    assert equal(subject.generate(), subject.uncached)
