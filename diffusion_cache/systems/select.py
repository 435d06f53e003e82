"""FiRST-style selection: one of a profile's ready plans, chosen from the prompt before the first step."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import ConfigError
from ..forecasters.fitted import Fitted
from ..planning.selector import ARRAYS, Choice, Selector
from ..policies import Planned
from ..policies.select import Select
from ..profile import Profile
from ..registry import systems
from .base import Parts, System


@systems.register("select")
@dataclass(frozen=True)
class Selection(System):
    """Choose one of a profile's plans by the prompt or class, before the first step.

    nfe: denoiser evaluations that the plans to choose among may take; None for the most expensive group.

    `diffusion-cache select` makes such profiles. A batch of several prompts runs the plan with the highest mean score;
    prompts that cannot be read run the plan that is best on average, with a warning.
    """

    nfe: float | None = None

    paper = "after FiRST (input-adaptive routing): one of a few ready plans for each prompt"
    scopes = frozenset({"denoiser", "stack", "block", "branch", "cut"})
    by_prompt = True

    def parts(self, profile: Profile | None) -> Parts:
        assert profile is not None
        selector = Selector.of(profile)
        choice = self._choice(selector.choices)
        rows = slice(choice.first, choice.first + len(choice.plans))
        weights, bias = (profile.arrays[name][rows] for name in ARRAYS)
        forecasters = tuple(map(Fitted.of, choice.plans))
        policy = Select(
            tuple(map(Planned, choice.plans)),
            forecasters,
            weights,
            bias,
            selector.source,
            selector.labels,
            choice.fallback,
        )
        return Parts(policy, forecasters[choice.fallback], choice.plans[0].scope, choice.plans[0].depth)

    def _choice(self, choices: Sequence[Choice]) -> Choice:
        """The group of most evaluations among those of at most `nfe`."""
        affordable = [choice for choice in choices if self.nfe is None or choice.nfe <= self.nfe + 1e-6]
        if not affordable:
            offered = ", ".join(f"{choice.nfe:.4g}" for choice in choices)
            raise ConfigError(f"no plans to choose among take {self.nfe:g} evaluations or fewer; there are {offered}")
        return max(affordable, key=lambda choice: choice.nfe)
