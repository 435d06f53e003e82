"""What a profile holds to choose among its plans by a prompt."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError
from ..plain import Fields, integer, text, tuple_of
from ..plan import Plan, Quality
from ..profile import Profile

STORED, ARRAYS = "select", ("select_weights", "select_bias")  # a fact and arrays of a profile
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
