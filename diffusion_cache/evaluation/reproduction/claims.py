"""What a claim is, and how it is checked."""

import math
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from ...errors import ConfigError
from ...plain import plain_json
from ...registry import unknown_name
from ..prompts import FITTING_SEEDS

SETS = 3
REPORTED = 16  # seeds of a set that claims report on
FITTED = 16  # seeds of a set that claims fit on
FIRST_REPORTED, FIRST_FITTED = 60_000, FITTING_SEEDS + 60_000


@dataclass(frozen=True)
class SeedSet:
    """Seeds that no other set has, and no seed is in both parts."""

    index: int
    fitting: tuple[int, ...]
    reporting: tuple[int, ...]


def seed_sets(sets: int = SETS) -> tuple[SeedSet, ...]:
    """Disjoint sets of FITTED and REPORTED seeds."""
    return tuple(
        SeedSet(
            index,
            tuple(range(FIRST_FITTED + index * FITTED, FIRST_FITTED + (index + 1) * FITTED)),
            tuple(range(FIRST_REPORTED + index * REPORTED, FIRST_REPORTED + (index + 1) * REPORTED)),
        )
        for index in range(sets)
    )


@dataclass(frozen=True)
class Outcome:
    """What one set of seeds says.

    ours: the figures that decide, as a reader wants them. equal_compute: what the compared have spent, as measured.
    holds: whether the claim does. figures: all numbers behind it.
    """

    ours: str
    equal_compute: str
    holds: bool
    figures: Mapping[str, float]

    def __post_init__(self) -> None:
        for name, value in self.figures.items():
            if math.isnan(value):
                raise ConfigError(f"the figure {name} of an outcome is NaN, so that nothing can be said")


@dataclass(frozen=True)
class Statement:
    """name: of its module and function. published: the paper's figure, "" where it gives none. reason: what looking
    into it has shown, where it does not hold (or only on some sets)."""

    name: str
    system: str
    claim: str
    published: str
    reason: str

    def row(self, outcomes: Mapping[int, Outcome]) -> dict[str, Any]:
        """The claim with what the sets of seeds (by index) have said, as plain JSON values.

        Raises:
            ConfigError: without an outcome, or where the claim fails and no reason was looked for.
        """
        if not outcomes:
            raise ConfigError(f"{self.name} was checked with no set of seeds")
        holds = all(outcome.holds for outcome in outcomes.values())
        if not holds and not self.reason:
            raise ConfigError(
                f"{self.name} does not hold: look into it and give its decorator the reason\n"
                + "\n".join(f"  seeds {index}: {outcome.ours}" for index, outcome in sorted(outcomes.items()))
            )
        ordered = [outcomes[index] for index in sorted(outcomes)]
        return plain_json(
            {
                "name": self.name,
                "system": self.system,
                "claim": self.claim,
                "published": self.published,
                "ours": [outcome.ours for outcome in ordered],
                "equal_compute": [outcome.equal_compute for outcome in ordered],
                "seeds": sorted(outcomes),
                "holds": holds,
                "held": [outcome.holds for outcome in ordered],
                "reason": "" if holds else self.reason,
                "figures": [dict(outcome.figures) for outcome in ordered],
            }
        )


@dataclass(frozen=True)
class Claim(Statement):
    """A statement that is checked with one set of seeds at a time."""

    check: Callable[[SeedSet], Outcome]


CLAIMS: dict[str, Claim] = {}


def claim(
    *, system: str, claim: str, published: str = "", reason: str = ""
) -> Callable[[Callable[[SeedSet], Outcome]], Callable[[SeedSet], Outcome]]:
    """Decorator of a function that checks a claim with one set of seeds; see `Claim`."""

    def decorate(check: Callable[[SeedSet], Outcome]) -> Callable[[SeedSet], Outcome]:
        name = f"{check.__module__.rpartition('.')[2]}.{check.__name__}"
        if name in CLAIMS and CLAIMS[name].check is not check:
            raise ConfigError(f"there are two claims called {name}")
        CLAIMS[name] = Claim(name, system, claim, published, reason, check)
        return check

    return decorate


def load_claims(chosen: Iterable[str] = ()) -> list[Claim]:
    """The claims of all modules beside this one; chosen: names of modules or claims, () for all.

    Raises:
        ConfigError: for a name that is none.
    """
    package = __name__.rpartition(".")[0]
    for module in pkgutil.iter_modules(import_module(package).__path__):
        import_module(f"{package}.{module.name}")
    known = {name.partition(".")[0] for name in CLAIMS} | set(CLAIMS)
    found: dict[str, Claim] = {}
    for wanted in tuple(chosen) or sorted(CLAIMS):
        if wanted not in known:
            raise unknown_name("claim", wanted, known)
        found |= {name: claim for name, claim in CLAIMS.items() if wanted in (name, name.partition(".")[0])}
    return list(found.values())
