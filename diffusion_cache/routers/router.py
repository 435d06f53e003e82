"""A router: which spans to compute at which steps, as logits that learn."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..errors import ConfigError
from ..planning.coupled import couple
from ..planning.static import marks
from ..planning.surrogate import cell_errors, edge_powers
from ..profile import Profile
from ..schedule import spaced

LIMIT = 5.0  # of a logit's size
CERTAIN = 1.0  # the logit that a start from a profile computes with
ROUNDING = 1e-9
EXPONENTS = (0.7, 1.0, 1.4)  # of schedules spaced by a power law


class Router(nn.Module):
    """T steps × S spans of logits; a span's gate is their sigmoid.

    One parameter a step, so that an optimiser's momentum does not move the logits of steps that were not visited.
    """

    def __init__(self, logits: Tensor, always: Sequence[int] = (0,)):
        """always: steps that compute all; their logits stay at LIMIT."""
        super().__init__()
        rows = logits.float().clamp(-LIMIT, LIMIT)
        rows[list(always)] = LIMIT
        self.rows = nn.ParameterList(
            [nn.Parameter(row.clone(), requires_grad=step not in always) for step, row in enumerate(rows)]
        )

    @property
    def logits(self) -> Tensor:
        """[T, S]."""
        return torch.stack([row.detach() for row in self.rows])

    @torch.no_grad()
    def clamp(self, step: int) -> None:
        self.rows[step].clamp_(-LIMIT, LIMIT)


def random_logits(profile: Profile, seed: int) -> Tensor:
    """Standard normal, [T, S]."""
    shape = profile.total, len(profile.spans)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def starts(profile: Profile, compute: float, order: int) -> list[Tensor]:
    """Logits of good schedules at this compute, ±CERTAIN where they compute and reuse, [T, S] each.

    The best one for the profile's surrogate, which is that of system "laptop": sensitivity × relative error, from the
    Gram matrices, is added up within a gap between computed steps, and its squares over gaps and spans. Then ones with
    all spans alike, the steps spaced by power laws. Which is best only a run can tell.

    Raises:
        ConfigError: for a profile without sensitivities, and a compute out of reach.
    """
    shares = [span.share for span in profile.spans]
    budget = budget_of(profile, compute)
    damages = (edge_powers(damage, 2.0) for damage in cell_errors(profile, order))
    chosen = [np.array([best.compute for best in couple(damages, shares, budget).schedules]).T]
    count = math.ceil(budget / sum(shares) - ROUNDING)
    for exponent in EXPONENTS:
        steps = spaced(profile.total, count, exponent)
        chosen.append(marks(profile.total, [steps] * len(shares)))
    return [torch.where(torch.from_numpy(compute), CERTAIN, -CERTAIN) for compute in chosen]


def budget_of(profile: Profile, compute: float, always: int = 1) -> float:
    """What spans may take of `compute` times an uncached generation, in denoiser evaluations.

    Raises:
        ConfigError: for a compute out of reach: so many steps, and what lies outside the spans, run in any case.
    """
    spans = sum(span.share for span in profile.spans)
    budget = profile.total * (compute - 1 + spans)
    if not 0 < compute <= 1 or budget < spans * always * (1 - ROUNDING):
        least = 1 - spans + spans * always / profile.total
        raise ConfigError(
            f"compute is a share of the uncached run's, from {least:.3f} (what lies outside the spans of scope "
            f"{profile.scope}, and {always} of {profile.total} steps, run in any case) to 1, not {compute:g}"
        )
    return budget


def ranked(logits: Tensor, profile: Profile, compute: float, always: Sequence[int] = (0,)) -> NDArray[np.bool_]:
    """The cells with the highest logits that together take this share of an uncached run's compute: bool [T, S].

    always: steps that are among them in any case. What is left of the budget is less than any other cell costs.

    Raises:
        ConfigError: for a compute out of reach.
    """
    shares = np.array([span.share for span in profile.spans])
    left = budget_of(profile, compute, len(always)) * (1 + ROUNDING) - shares.sum() * len(always)
    chosen = np.zeros(logits.shape, dtype=bool)
    chosen[list(always)] = True
    for cell in torch.argsort(logits.flatten(), descending=True, stable=True).tolist():
        step, span = divmod(cell, len(shares))
        if not chosen[step, span] and shares[span] <= left:
            chosen[step, span] = True
            left -= shares[span]
    return chosen


def above(logits: Tensor, threshold: float) -> NDArray[np.bool_]:
    """The cells whose gate is above the threshold: bool [T, S]."""
    return (logits.sigmoid() > threshold).numpy()
