"""FiRST-style selection: one of a profile's ready plans, chosen from the prompt before the first step."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError
from ..forecasters.fitted import Fitted
from ..plain import Fields, integer, text, tuple_of
from ..plan import Plan, Quality
from ..planning.select import ARRAYS, STORED
from ..policies import Planned
from ..policies.select import Select
from ..profile import Profile
from ..registry import systems
from .base import Parts, System

MAKE = "`diffusion-cache select` makes plans to choose among and learns which suits a prompt"


@dataclass(frozen=True)
class Choice:
    """A group of plans to choose among. first: the row of its first plan in the profile's scores.

    fallback: the best on average. held_out: what the choice reached on samples kept apart, each a run of its own.
    """

    plans: tuple[Plan, ...]
    fallback: int
    first: int
    held_out: Quality | None

    @property
    def nfe(self) -> float:
        """Denoiser evaluations of the most expensive of the plans."""
        return max(plan.nfe for plan in self.plans)


@dataclass(frozen=True)
class Selector:
    """What a profile holds to choose plans by a prompt. source, labels: see `policies.Select`."""

    source: str
    labels: tuple[int, ...]
    choices: tuple[Choice, ...]

    @classmethod
    def of(cls, profile: Profile) -> "Selector":
        """As `planning.select.with_selector` has stored it.

        Raises:
            ConfigError: for a profile that holds none, or one that does not go with its plans.
        """
        stored = profile.facts.get(STORED)
        if stored is None or not set(ARRAYS) <= set(profile.arrays):
            raise ConfigError(
                f"this profile has not learned which of its plans suits a prompt: {MAKE}; or choose a plan with "
                "enable(pipe, profile=…, plan=…)"
            )
        fields = Fields(stored, f"profile: facts.{STORED}")
        source, labels = fields("source", text), fields("labels", tuple_of(integer))
        groups = fields("choices", tuple_of(lambda value, where: _read_choice(value, where, profile.plans)))
        weights, bias = (profile.arrays[name] for name in ARRAYS)
        counts = [len(plans) for plans, _, _ in groups]
        if not groups or sum(counts) != len(weights) or len(weights) != len(bias):
            raise ConfigError(
                f"the profile's scores are for {len(weights)} and {len(bias)} plans, and it names {sum(counts)} to "
                f"choose among: learn them again. {MAKE}"
            )
        if labels and len(labels) != weights.shape[1]:
            raise ConfigError(f"the profile's scores are for {weights.shape[1]} classes, and {len(labels)} are named")
        choices = [
            Choice(plans, fallback, sum(counts[:place]), held_out)
            for place, (plans, fallback, held_out) in enumerate(groups)
        ]
        return cls(source, labels, tuple(choices))


def _read_choice(value: Any, where: str, known: Sequence[Plan]) -> tuple[tuple[Plan, ...], int, Quality | None]:
    fields = Fields(value, where)
    names, fallback = fields("plans", tuple_of(text)), fields("fallback", text)
    held_out = fields.maybe("held_out", Quality.from_json)
    fields("samples", integer)
    fields.end()
    by_name = {plan.name: plan for plan in known}
    if not names or not {*names, fallback} <= set(by_name) or fallback not in names:
        raise ConfigError(
            f"the profile's scores are for the plans {', '.join(names)}, and it has {', '.join(by_name) or 'none'}: "
            f"learn them again. {MAKE}"
        )
    plans = tuple(by_name[name] for name in names)
    if len({(plan.scope, plan.depth) for plan in plans}) > 1:
        raise ConfigError("select cannot change the scope from run to run: choose plans of one scope and depth")
    return plans, names.index(fallback), held_out


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
