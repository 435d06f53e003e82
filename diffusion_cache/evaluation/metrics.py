"""Metrics of each output against the uncached output of the same noise, and what a set of them says.

Everything is computed in float on unquantised outputs: a difference of two uint8 images wraps around, and unrelated
images then score about 28 dB.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor

from .. import measure
from ..errors import ConfigError
from ..measure.metrics import SSIM_MIN_SIDE
from ..reference import MODELS
from ..registry import check_options, suggest, unknown_name
from .metric_base import PerSample, Samples, frame_means, metrics
from .perceptual import Lpips
from .preference import ClipScore, ImageReward

__all__ = [
    "ClipScore",
    "ImageReward",
    "Lpips",
    "PerSample",
    "Samples",
    "check",
    "higher_is_better",
    "metrics",
    "per_sample",
    "summarise",
]

# The fifth scale must hold an 11 pixel window. The usual bound of 161 pixels is for halving that rounds up (161, 81,
# 41, 21, 11); torchmetrics' rounds down and accepts images from 11 · 2⁴ pixels on.
MS_SSIM_MIN_SIDE = 176
TAIL = 20  # one sample in this many may be worse than the "5th percentile"
OTHER_SETTINGS = {"inception"}  # what is set beside the metrics here: see `distribution`


def check(names: Sequence[str], model: str | None = None, settings: Mapping[str, Any] | None = None) -> None:
    """Prove that the metrics can be computed, loading the networks that they need, before a long run starts.

    Args:
        names: of the metrics.
        model: the name of a model that takes class labels, None for one that takes texts.
        settings: metric name -> its options.

    Raises:
        ConfigError: for an unknown metric or option (with a suggestion), a network that is not there, or a metric
            that makes no sense for the model.
    """
    known = {*metrics.names(), *OTHER_SETTINGS}
    for name in settings or ():
        if name not in known:
            raise unknown_name("metric in settings", name, known)
    for metric in _built(names, settings):
        metric.check(model)


def higher_is_better(name: str) -> bool:
    """ConfigError for an unknown metric."""
    return bool(metrics.get(name).higher_is_better)


def per_sample(
    names: Sequence[str],
    candidate: Tensor,
    reference: Tensor,
    *,
    candidate_latents: Tensor | None = None,
    reference_latents: Tensor | None = None,
    prompts: Sequence[str] | None = None,
    labels: Sequence[int] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, list[float | None]]:
    """Each named metric of each sample; None where it does not apply, infinite PSNR where a sample is identical.

    Args:
        names: of the metrics. settings: metric name -> its options.
        candidate, reference, candidate_latents, reference_latents, prompts, labels: see `Samples`.

    Raises:
        ConfigError: for an unknown metric or option, a network that is not there, or samples that do not match, are
            not finite, are quantised or in other units than [0, 1].
    """
    built = _built(names, settings)
    samples = Samples(candidate, reference, candidate_latents, reference_latents, prompts, labels)
    found = {}
    for metric in built:
        values = list(metric(samples))
        if len(values) != len(samples):
            raise ConfigError(f"metric {metric.name!r} gave {len(values)} values for {len(samples)} samples")
        found[metric.name] = [None if value is None or math.isnan(value) else float(value) for value in values]
    return found


def summarise(
    values: Sequence[float | None], seeds: Sequence[int], higher_is_better: bool
) -> dict[str, float | int | None]:
    """What a metric of several samples says, as JSON values; samples without a value (None) are left out.

    `mean` and its standard error `se` are of all values; `worst` is the worst of them, with the seed that gave it (the
    first of equals); `p5` is the bad tail: at least 95% of the values are as good or better. It is a value
    that occurred, not an interpolated one; up to 20 values it is the worst.
    `identical` counts samples that cannot be told from their reference: infinite PSNR, an error of 0. An infinite value
    makes the mean infinite, which JSON cannot say: `mean` is then None.

    Raises:
        ConfigError: if there are not as many seeds as values, or a value is NaN.
    """
    if len(values) != len(seeds):
        raise ConfigError(f"{len(values)} values but {len(seeds)} seeds: give one for each")
    scored = [(value, index) for index, value in enumerate(values) if value is not None]
    if any(math.isnan(value) for value, _ in scored):
        raise ConfigError("a metric is NaN: what does not apply must be None")
    perfect = math.inf if higher_is_better else 0.0
    found: dict[str, float | int | None] = dict.fromkeys(("mean", "se", "p5", "worst", "worst_seed"))
    found |= {"n": len(scored), "identical": sum(value == perfect for value, _ in scored)}
    if not scored:
        return found
    order = sorted(scored, key=lambda pair: pair[0] if higher_is_better else -pair[0])  # worst first, stable
    worst, index = order[0]
    found |= {
        "p5": _json(order[(len(order) - 1) // TAIL][0]),
        "worst": _json(worst),
        "worst_seed": seeds[index],
    }
    if all(math.isfinite(value) for value, _ in scored):
        found["mean"] = fmean(value for value, _ in scored)
        if len(scored) > 1:
            found["se"] = stdev(value for value, _ in scored) / math.sqrt(len(scored))
    return found


def _json(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _built(names: Sequence[str], settings: Mapping[str, Any] | None) -> list[PerSample]:
    """The metrics with their settings; ConfigError for unknown names and options."""
    built = []
    for name in names:
        cls, options = metrics.get(name), dict((settings or {}).get(name) or {})
        known = metrics.options(name)
        for option in options:
            if option not in known:
                raise ConfigError(f"Metric {name!r} has no option {option!r}. {suggest(option, known)}")
        check_options(f"metric {name!r}", cls, options)
        built.append(cls(**options))
    return built


@metrics.register("latent_error")
@dataclass(frozen=True)
class LatentError(PerSample):
    """Relative L2 error of the last latents, ‖candidate − reference‖ / ‖reference‖."""

    higher_is_better = False

    def __call__(self, samples: Samples) -> Sequence[float | None]:
        if samples.candidate_latents is None or samples.reference_latents is None:
            return samples.missing()
        return measure.latent_error(samples.candidate_latents, samples.reference_latents).tolist()


@metrics.register("psnr")
@dataclass(frozen=True)
class Psnr(PerSample):
    """Peak signal-to-noise ratio of what would be shown, values clamped to [0, 1], in dB; a video's over all frames."""

    higher_is_better = True

    def __call__(self, samples: Samples) -> Sequence[float | None]:
        return measure.psnr(*samples.clamped()).tolist()


@metrics.register("psnr_unclamped")
@dataclass(frozen=True)
class PsnrUnclamped(PerSample):
    """As `psnr`, of the values as they came; at most as high, and only different where some leave [0, 1]."""

    higher_is_better = True

    def __call__(self, samples: Samples) -> Sequence[float | None]:
        return measure.psnr(samples.candidate, samples.reference, check_range=False).tolist()


@metrics.register("ssim")
@dataclass(frozen=True)
class Ssim(PerSample):
    """Structural similarity (see `measure.ssim` for its window), a video's averaged over frames.

    None under 7 pixels a side.
    """

    higher_is_better = True

    def __call__(self, samples: Samples) -> Sequence[float | None]:
        if samples.side < SSIM_MIN_SIDE:
            return samples.missing()
        return measure.ssim(*samples.clamped()).tolist()


@metrics.register("ms_ssim")
@dataclass(frozen=True)
class MsSsim(PerSample):
    """Multi-scale structural similarity of Wang, Simoncelli and Bovik (2003): five scales, 11 pixel windows.

    A video's is averaged over frames. None under 176 pixels a side.
    """

    higher_is_better = True

    def __call__(self, samples: Samples) -> Sequence[float | None]:
        from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

        if samples.side < MS_SSIM_MIN_SIDE:
            return samples.missing()
        scores = []
        for sample in zip(*samples.clamped(), strict=True):
            a, b = (x.double() for x in sample)
            found = multiscale_structural_similarity_index_measure(a, b, data_range=1.0, reduction="none")
            scores += frame_means(found, 1)
        return scores


@metrics.register("psnr_worst_frame")
@dataclass(frozen=True)
class PsnrWorstFrame(PerSample):
    """The PSNR (clamped, dB) of a video's worst frame; None for images."""

    higher_is_better = True

    def __call__(self, samples: Samples) -> Sequence[float | None]:
        if not samples.is_video:
            return samples.missing()
        candidate, reference = (x.flatten(0, 1) for x in samples.clamped())
        return measure.psnr(candidate, reference).reshape(len(samples), -1).amin(1).tolist()


@metrics.register("temporal_error")
@dataclass(frozen=True)
class TemporalError(PerSample):
    """Relative L2 error of a video's frame-to-frame differences Δ, ‖Δcandidate − Δreference‖ / ‖Δreference‖.

    It sees flicker and frozen motion that leave each frame plausible. None for images and where nothing moves in
    either; infinite where only the reference stands still.
    """

    higher_is_better = False

    def __call__(self, samples: Samples) -> Sequence[float | None]:
        if not samples.is_video:
            return samples.missing()
        candidate, reference = (x.double().diff(dim=1) for x in samples.clamped())
        return measure.latent_error(candidate, reference).tolist()


@metrics.register("class_correct")
@dataclass(frozen=True)
class ClassCorrect(PerSample):
    """1 where a classifier of real digits recognises the class asked for, else 0; for the shipped models only.

    None for samples without labels.
    """

    higher_is_better = True

    def check(self, model: str | None) -> None:
        if model not in MODELS:
            raise ConfigError(f"class_correct is for the shipped models ({', '.join(MODELS)}): leave it out")

    def __call__(self, samples: Samples) -> Sequence[float | None]:
        from ..reference.data import IMAGE_SIZE
        from ..reference.gate import recognised

        if samples.labels is None:
            return samples.missing()
        if samples.reference.shape[2:] != (1, IMAGE_SIZE, IMAGE_SIZE):
            raise ConfigError(f"class_correct recognises 16×16 digits, not images of {list(samples.reference.shape)}")
        labels = torch.tensor([int(label) for label in samples.labels])
        return recognised(samples.clamped()[0].float().cpu(), labels).double().tolist()
