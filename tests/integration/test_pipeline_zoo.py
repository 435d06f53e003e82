"""Many real pipeline classes, tiny: cached by a planned and an adaptive policy, counted right, and restored."""

import contextlib
import inspect
import warnings
from functools import partial
from typing import Any

import pipeline_zoo
import pytest
from pipeline_zoo import equal, tensors
from torch import Tensor

import diffusion_cache as dc
from diffusion_cache.engine import intercept, patches
from diffusion_cache.models import find_denoisers
from diffusion_cache.summaries import Summary

LOOKING_INSIDE = (
    "StableDiffusionSAGPipeline",
    "StableDiffusionAttendAndExcitePipeline",
    "StableDiffusionPix2PixZeroPipeline",
    "LEditsPPPipelineStableDiffusion",
    "LEditsPPPipelineStableDiffusionXL",
)
CASES = pipeline_zoo.cases()
# guidance is on at every other step: no computed step has the shapes of the reused one after it
ALTERNATING = ("AceStepPipeline-interval",)
# blocks that are run one by one, which no probe stands before
UNPROBED = ("StableCascadePriorPipeline", "StableCascadeDecoderPipeline", "StableCascadeCombinedPipeline",
            "WuerstchenDecoderPipeline", "WuerstchenCombinedPipeline")  # fmt: skip
CACHED = [case for case in CASES if case.name not in LOOKING_INSIDE]


KINDS = set()  # seen so far


@pytest.fixture(scope="module", params=CACHED, ids=lambda case: case.id)
def subject(request):
    return Subject(request.param)


class Subject:
    """first: of its kind, which is as its denoisers, the calls of an iteration and its scheduler are."""

    def __init__(self, case: pipeline_zoo.PipelineCase):
        self.case = case
        self.pipe = case.build()
        self.calls = 0
        denoisers = find_denoisers(self.pipe)
        kind = (*map(type, denoisers.values()), case.calls, type(getattr(self.pipe, "scheduler", None)))
        self.first = kind not in KINDS
        KINDS.add(kind)
        self.patched = set(patches._patches)
        hooks = [denoiser.register_forward_pre_hook(self._count) for denoiser in denoisers.values()]
        self.uncached = self.generate()
        for hook in hooks:
            hook.remove()

    def _count(self, module: Any, args: Any) -> None:
        self.calls += 1

    def generate(self) -> list[Tensor]:
        return tensors(self.pipe(**self.case.call()))


@contextlib.contextmanager
def by_hand(subject: Subject, computed: list[bool]):
    """Calls that are not computed return what the one in their place of the iteration before returned."""
    outputs = []

    def call(forward, *args, **kwargs):
        index = len(outputs)
        outputs.append(forward(*args, **kwargs) if computed[index] else outputs[index - subject.case.calls])
        return outputs[index]

    forwards = [(denoiser, denoiser.forward) for denoiser in find_denoisers(subject.pipe).values()]
    for denoiser, forward in forwards:
        denoiser.forward = partial(call, forward)
        denoiser.forward.__signature__ = inspect.signature(forward)
    yield
    for denoiser, _ in forwards:
        del denoiser.forward
    assert len(outputs) == len(computed)


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


POLICIES = {"mask": dict(mask="1010"), "first_block": dict(threshold=1e9, max_consecutive=1)}


def cached_by(subject: Subject, policy: str, **options: Any) -> tuple[list[Tensor], Summary]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", dc.DiffusionCacheWarning)
        with dc.cached(subject.pipe, policy, "reuse", **POLICIES[policy], **options):
            cached = subject.generate()
            summary = dc.summary(subject.pipe)
    assert len(summary.records) == subject.calls
    assert summary.cache_bytes > 0
    assert [tensor.shape for tensor in cached] == [tensor.shape for tensor in subject.uncached]
    assert all(tensor.double().isfinite().all() for tensor in cached)
    return cached, summary


def test_cached(subject):
    """As planned; where an iteration has several calls, as by hand; and adaptively, the first of each kind."""
    _, summary = cached_by(subject, "mask")
    assert (summary.reused > 0) == (subject.case.id not in ALTERNATING)
    if subject.case.calls > 1:
        whole, summary = cached_by(subject, "mask", scope="denoiser")
        computed = [record.computed for record in summary.records]
        assert False in computed
        with by_hand(subject, computed):
            assert equal(subject.generate(), whole)
    if subject.case.name in UNPROBED:
        with pytest.raises(dc.ConfigError, match="does not serve scope 'block'"):
            dc.enable(subject.pipe, "first_block", **POLICIES["first_block"])
    elif subject.first:
        _, summary = cached_by(subject, "first_block")
        assert summary.reused > 0


def test_always_computing_is_identical_and_counted(subject):
    """After the tests above, each of which ends with the cache off: they have left nothing behind."""
    assert set(patches._patches) == subject.patched
    for denoiser in find_denoisers(subject.pipe).values():
        assert not [name for name, child in denoiser.named_modules() if intercept.ATTRIBUTE in vars(child)]
    with dc.cached(subject.pipe, "interval", every=1):
        assert equal(subject.generate(), subject.uncached)
        summary = dc.summary(subject.pipe)
    assert summary.reused == 0
    assert len(summary.records) == subject.calls
