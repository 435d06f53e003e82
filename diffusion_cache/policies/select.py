"""Choose one of several ready plans from the prompt or class, before the first step: adaptive, and yet static.

After FiRST, which routes each input once. The score of plan k is w_k·e + b_k, where e is the condition of the run's
first denoiser call; the plan with the highest score is carried out. A run has one schedule, so that a batch takes the
plan with the highest mean score of its samples (which, the scores being linear, is the score of their mean).
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..context import SCOPES, Condition, Forecaster, Needs, PassState, Policy, Step, Verdict
from ..errors import ConfigError, DiffusionCacheWarning
from ..schedule import Schedule
from .planned import Planned


@dataclass(frozen=True, eq=False)
class Select(Policy):
    """The plan that scores highest for the prompt; `fallback` where the prompt is not known.

    plans, forecasters: one of each for a choice. weights: [K, D], bias: [K], float32. source: the argument that the
    scores are for; labels: the classes that the D columns stand for, () for an embedding. fallback: the choice that is
    best without knowing the prompt.
    """

    plans: tuple[Planned, ...]
    forecasters: tuple[Forecaster, ...]
    weights: Tensor
    bias: Tensor
    source: str
    labels: tuple[int, ...] = ()
    fallback: int = 0

    name = "select"
    scopes = frozenset(SCOPES)
    for_one_sampler = True

    @property
    def needs(self) -> Needs:
        return Needs(condition=True)

    @property
    def spans_alike(self) -> bool:
        return all(plan.spans_alike for plan in self.plans) and all(one.spans_alike for one in self.forecasters)

    def choose(
        self, condition: Condition | None, agree: Callable[[Tensor], Tensor] | None
    ) -> tuple[Planned, Forecaster]:
        found = embedded(condition, self.source, self.labels, self.weights.shape[1])
        scores = self.bias * torch.nan if found is None else self.weights @ found.mean(0) + self.bias
        if agree is not None and condition is not None:  # NaN on any rank is NaN on all
            scores = agree(scores.to(condition.values.device)).cpu()
        chosen = self.fallback
        if bool(scores.isfinite().all()):
            chosen = int(scores.argmax())
        else:
            warnings.warn(
                f"select: the plan cannot be chosen by the prompt, as the denoiser's first call has no known "
                f"{self.source}; {self.plans[chosen].plan.name!r} is taken, the best on average",
                DiffusionCacheWarning,
                stacklevel=2,
            )
        return self.plans[chosen], self.forecasters[chosen]

    def schedule(self, total: int) -> Schedule:
        return self.plans[self.fallback].schedule(total)

    def decide(self, step: Step, value: float | None, state: PassState) -> Verdict:
        raise ConfigError("select chooses a plan, which needs the run's number of steps: pass num_steps")


def embedded(condition: Condition | None, source: str, labels: tuple[int, ...], width: int) -> Tensor | None:
    """The condition of each row as float32 [rows, width], rows of unknown labels left out; None if that is not it."""
    if condition is None or condition.name != source:
        return None
    values = condition.values.cpu()
    if not labels:
        return values if values.ndim == 2 and values.shape[1] == width else None
    if values.ndim != 1:
        return None
    matches = (values[:, None] == torch.tensor(labels)).float()
    matches = matches[matches.any(1)]
    return matches if len(matches) else None
