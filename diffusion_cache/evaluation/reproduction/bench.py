"""A shipped model with one set of seeds: profiles, cached runs, and what they cost."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ... import api
from ...planning.build import psnr
from ...profile import Profile
from ...profiling.generation import Batch
from ...profiling.measure import Options, measure
from ..accounting import Accountant
from ..prompts import Sample
from ..subjects import Output, Shipped
from .claims import SeedSet

CLASSES = 10


class Ran(NamedTuple):
    """psnr: of each sample, dB. error: relative L2 of the last latents, of each. work: executed FLOPs of all
    samples over those of their uncached run. nfe: denoiser calls with anything computed, of one sample's pass."""

    psnr: tuple[float, ...]
    error: tuple[float, ...]
    work: float
    nfe: float
    images: Tensor

    @property
    def mean(self) -> float:
        return sum(self.psnr) / len(self.psnr)


class Bench:
    """One shipped model and sampler; uncached runs and profiles are made when first asked for."""

    def __init__(self, model: str, seeds: SeedSet, sampler: str | None = None, count: int | None = None):
        """count: how many of the set's seeds are used, of either part; None for all."""
        self.subject = Shipped(model, sampler)
        self.fitting = self._samples(seeds.fitting[:count])
        self.reporting = self._samples(seeds.reporting[:count])
        self._profiles: dict[tuple[Options, Any], Profile] = {}

    @staticmethod
    def _samples(seeds: Sequence[int]) -> list[Sample]:
        return [Sample(index, seed % CLASSES, seed) for index, seed in enumerate(seeds)]

    def batch(self, samples: Sequence[Sample] | None = None) -> Batch:
        """Of the fitting samples, if none are given."""
        chosen = list(self.fitting if samples is None else samples)
        return Batch(self.subject.pipe, lambda: self.subject.call(chosen), self.subject.images, len(chosen))

    def profile(
        self, scope: str | None = None, foreground: "Tensor | Literal['motion'] | None" = None, **options: Any
    ) -> Profile:
        """Of the fitting samples; foreground: see `measure`, options: of `profiling.measure.Options`."""
        wanted = Options(scope=scope, attention=foreground is not None, **options), foreground
        if wanted not in self._profiles:
            samples = {(str(sample.prompt), sample.seed): sample for sample in self.fitting}

            def make(given: Sequence[tuple[str, int]]) -> Batch:
                return self.batch([samples[prompt, seed] for prompt, seed in given])

            found = measure(make, list(samples), wanted[0], foreground=foreground)
            assert found is not None
            self._profiles[wanted] = found
        return self._profiles[wanted]

    @cached_property
    def uncached(self) -> tuple[Output, int]:
        """The reporting samples, and the FLOPs of all."""
        return self._counted()

    def _counted(self) -> tuple[Output, int]:
        accountant = Accountant(self.subject.denoisers, self.subject.blocks, self.subject.pipe.scheduler)
        with accountant.observed(flops=True) as observed:
            output = self.subject.generate(self.reporting)
        return output, observed.flops

    def run(self, **arguments: Any) -> Ran:
        """The reporting samples, with the cache that `enable` makes of these arguments."""
        uncached, flops = self.uncached
        with torch.no_grad(), api.cached(self.subject.pipe, **arguments):
            output, spent = self._counted()
            records: tuple[Any, ...] = api.summary(self.subject.pipe).records
        passes = len({(record.denoiser, record.pass_name) for record in records})
        latents = uncached.latents.flatten(1)
        difference = (output.latents.flatten(1) - latents).norm(dim=1) / latents.norm(dim=1)
        return Ran(
            psnr=tuple(psnr(output.images, uncached.images)),
            error=tuple(difference.tolist()),
            work=spent / flops,
            nfe=sum(record.computed for record in records) / passes,
            images=output.images,
        )
