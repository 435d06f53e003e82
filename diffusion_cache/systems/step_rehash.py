"""Step rehash of Streamlined Inference: a UNet's deep feature is reused for as long as it stays similar."""

from dataclasses import dataclass

import numpy as np

from ..errors import ConfigError
from ..plan import Plan
from ..planning.static import static_plan
from ..planning.surrogate import Array, cosines, mean_together, own_grams
from ..profile import Profile
from ..registry import systems
from .base import System


def similarities(profile: Profile) -> Array:
    """Cosine between the features of two steps, from their mean inner products: [T, T].

    The mean over cuts, and passes that ran at both steps; −∞ where none did.
    """
    gram = own_grams(profile)
    return mean_together(cosines(gram), gram, -np.inf)


def key_steps(similarity: Array, gamma: float) -> list[int]:
    """From key i advance while similarity[i, j] ≥ gamma, else j is a key; the first and the last step are keys."""
    last = len(similarity) - 1
    keys = [0]
    for step in range(1, last):
        if not similarity[keys[-1], step] >= gamma:
            keys.append(step)
    return list(dict.fromkeys([*keys, last]))


@systems.register("step_rehash")
@dataclass(frozen=True)
class StepRehash(System):
    """Full steps only where the cut's feature has become less similar than `gamma` to the last full step's.

    gamma: least cosine similarity that is reused. computed: number of full steps instead, taken from the largest gamma
    that needs no more. order: of a Taylor forecast of the deep feature, 0 for the paper's plain reuse. The profile is
    of the cut at the last up-block (scope cut, depth 1); the paper cuts inside that block, after its temporal layers.
    """

    gamma: float = 0.95
    computed: int | None = None
    order: int = 0

    paper = "Streamlined Inference (arXiv 2411.01171)"
    scopes = frozenset({"cut"})
    denoisers = frozenset({"unet"})

    def __post_init__(self) -> None:
        if not -1 <= self.gamma <= 1:
            raise ConfigError(f"step_rehash: gamma is a cosine from -1 to 1, not {self.gamma}")

    def plan(self, profile: Profile) -> Plan:
        similarity = similarities(profile)
        gamma = self.gamma if self.computed is None else self._gamma(similarity, self.computed)
        keys = key_steps(similarity, gamma)
        steps = np.isin(np.arange(profile.total), keys)
        return static_plan(profile, f"step rehash, {gamma:.4g}", steps, self.order, {"gamma": gamma})

    @staticmethod
    def _gamma(similarity: Array, computed: int) -> float:
        least = len(key_steps(similarity, -np.inf))
        if computed < least:
            raise ConfigError(f"step_rehash: the first and the last step are computed, so {computed} is too few")
        found = [gamma for gamma in np.unique(similarity) if len(key_steps(similarity, gamma)) <= computed]
        return float(max(found))
