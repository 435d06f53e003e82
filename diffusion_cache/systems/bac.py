"""BAC: each branch is updated at the steps that keep its reused outputs most alike, and the worst with what follows.

Ji et al., Block-wise Adaptive Caching for Accelerating Diffusion Policy (ICLR 2026, arXiv 2506.13456). Its adaptive
caching scheduler gives each branch of each block `updates` steps, of which step 0 is one, so that the similarities of
reused outputs to the ones they are taken from add up to the most: Σ_t S[a(t), t] with S the cosine between the branch's
outputs at two steps and a(t) the last update. That is `planning.dynamic` with the damage 1 − S. Bubbling union: of the
`upstream` branches whose outputs differ most between steps, each is also updated whenever a feed-forward branch behind
it is, which by then may have taken over updates itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..context import branch_kind
from ..errors import ConfigError
from ..plan import Plan
from ..planning.dynamic import best_schedule
from ..planning.static import marks, static_plan
from ..planning.surrogate import cosines, mean_together, own_grams
from ..profile import Profile
from ..registry import systems
from .base import System

FEED_FORWARD = "feed-forward"


@systems.register("bac")
@dataclass(frozen=True)
class BAC(System):
    """Updates each branch at its own best steps, and the worst ones with the feed-forwards behind them.

    updates: steps that a branch computes, before the union. upstream: branches that the union is made for, 0 for none.
    unified: one schedule for all branches, best for their mean similarity.
    """

    updates: int = 10
    upstream: int = 3
    unified: bool = False

    paper = "BAC (ICLR 2026, arXiv 2506.13456)"
    scopes = frozenset({"branch"})

    def __post_init__(self) -> None:
        if self.updates < 1 or self.upstream < 0:
            raise ConfigError(
                f"{self.name} needs updates ≥ 1 and upstream ≥ 0: updates={self.updates}, upstream={self.upstream}"
            )

    def plan(self, profile: Profile) -> Plan:
        if len({span.denoiser for span in profile.spans}) > 1:
            raise ConfigError(f"{self.name} is for one denoiser, and this profile has spans of several")
        if self.updates > profile.total:
            raise ConfigError(f"{self.name}: updates must be from 1 to the run's {profile.total} steps")
        grams = torch.from_numpy(own_grams(profile))
        alike = similarity(grams)
        if self.unified:
            steps = [update_steps(alike.mean(dim=0), self.updates)] * len(profile.spans)
        else:
            steps = [update_steps(values, self.updates) for values in alike]
        apart = spread(grams, [span.elements for span in profile.spans])
        worst = sorted(apart.argsort(descending=True)[: self.upstream].tolist())
        names = [span.name for span in profile.spans]
        forward = [place for place, name in enumerate(names) if branch_kind(name) == FEED_FORWARD]
        computed = marks(profile.total, bubbling_union(steps, worst, forward))
        facts = {"updates": self.updates, "upstream": [names[place] for place in worst]}
        return static_plan(profile, f"{self.name}-{self.updates}", computed, facts=facts)


def similarity(gram: Tensor) -> Tensor:
    """Cosine between a span's features at two steps, from inner products [S, P, T, T]: [S, T, T].

    The mean over passes that ran at both steps; 1 where none did.
    """
    grams = gram.double().numpy()[:, None]  # each span by itself
    return torch.from_numpy(np.stack([mean_together(cosines(own), own, 1.0) for own in grams]))


def update_steps(alike: Tensor, updates: int) -> frozenset[int]:
    """The `updates` steps, 0 among them, with the largest Σ_t S[a(t), t]; alike: S, [T, T].

    Raises:
        ConfigError: for more updates than steps, and similarities that are not finite.
    """
    damage = 1.0 - alike.double().numpy()[None]
    return frozenset(best_schedule(damage, range(updates, updates + 1))[updates].computed)


def spread(gram: Tensor, elements: Sequence[int]) -> Tensor:
    """How far a branch's outputs lie apart, [S]: root mean square over elements, mean over pairs of steps and passes.

    gram: inner products, [S, P, T, T]; elements: numbers in an output of each branch. The paper takes the mean absolute
    difference over elements, which inner products do not tell.
    """
    energy = gram.double().diagonal(dim1=-2, dim2=-1)
    squares = energy[..., :, None] + energy[..., None, :] - 2 * gram
    pairs = max(gram.shape[-1] * (gram.shape[-1] - 1), 1) * gram.shape[1]
    distances = (squares.clamp_min(0) / torch.tensor(elements)[:, None, None, None]).sqrt()
    return distances.sum(dim=(1, 2, 3)) / pairs


def bubbling_union(
    steps: Sequence[frozenset[int]], worst: Sequence[int], feed_forward: Sequence[int]
) -> list[frozenset[int]]:
    """The update steps of each branch, in the order they run, where the worst take over those of feed-forwards behind.

    From the last branch on, so that what a feed-forward has taken over itself is passed on.
    """
    found = list(steps)
    for branch in sorted(worst, reverse=True):
        found[branch] = found[branch].union(*(found[place] for place in feed_forward if place > branch))
    return found
