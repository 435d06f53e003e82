"""What the table of routers (`scripts/compare_routers.py`) says of the claims of their papers, and of ours.

Its rows take hours of training, so that claims are read off the finished ones; a set of seeds is one training's.
"""

from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from typing import Any, NamedTuple

from .claims import Outcome, Statement

LIKE = ("model", "steps", "compute_asked", "seed")  # what compared rows share
PREFIX = "routers."
GAIN = 0.2  # by which ours is to be below HarmoniCa
COMPUTE_APART = 0.01  # shares of the uncached FLOPs that are no matter
Setting = tuple[str, int, float]  # model, steps, compute asked
Rows = Mapping[str, Mapping[str, Any]]  # of one setting and seed, by method


class Compared(NamedTuple):
    """One training seed's rows, by setting."""

    rows: Mapping[Setting, Rows]

    def errors(self, *methods: str) -> str:
        return self._each(lambda row: f"{row['error']:.4f}", *methods)

    def compute(self, *methods: str) -> str:
        return self._each(lambda row: f"{row['compute']:.3f}", *methods) + " of the uncached FLOPs"

    def all(self, holds: Callable[[Rows], bool]) -> bool:
        return all(holds(by_method) for by_method in self.rows.values())

    def _each(self, told: Callable[[Mapping[str, Any]], str], *methods: str) -> str:
        parts = []
        for (model, steps, compute), by_method in self.rows.items():
            values = ", ".join(f"{method} {told(by_method[method])}" for method in methods)
            parts.append(f"{model}, {steps} steps at {compute:.0%}: {values}" if len(self.rows) > 1 else values)
        return "; ".join(parts)


class RouterClaim(NamedTuple):
    """The claim is `holds` of the rows of `methods`, the first of which spends no more, in each setting of `where`."""

    name: str
    system: str
    claim: str
    methods: tuple[str, ...]
    where: tuple[Setting, ...]
    holds: Callable[[Rows], bool]
    published: str = ""
    reason: str = ""
    told: Callable[[Compared, tuple[str, ...]], str] = lambda rows, methods: rows.errors(*methods)

    def outcome(self, compared: Compared) -> Outcome:
        return Outcome(
            ours=self.told(compared, self.methods),
            equal_compute=compared.compute(*self.methods),
            holds=compared.all(self.holds) and compared.all(self._is_fair),
            figures={
                f"{model}-{steps}-{compute:g}-{method}": float(by_method[method]["error"])
                for (model, steps, compute), by_method in compared.rows.items()
                for method in self.methods
            },
        )

    def _is_fair(self, rows: Rows) -> bool:
        """Whether the first method, which is to be the better one, spends no more than the others."""
        first, *others = (rows[method]["compute"] for method in self.methods)
        return all(first <= other + COMPUTE_APART for other in others)


def _ordered(*methods: str) -> Callable[[Rows], bool]:
    """Whether each method's error is below the next one's."""

    def holds(rows: Rows) -> bool:
        errors = [rows[method]["error"] for method in methods]
        return all(less < more for less, more in pairwise(errors))

    return holds


def _cheaper(rows: Rows) -> bool:
    first, second = rows["harmonica"], rows["l2c"]
    return all(first[cost] < second[cost] for cost in ("cpu_seconds", "peak_bytes"))


def _costs(compared: Compared, methods: tuple[str, ...]) -> str:
    (by_method,) = compared.rows.values()
    return ", ".join(
        f"{method} {by_method[method]['cpu_seconds']:.0f} s, {by_method[method]['peak_bytes'] / 2**20:.0f} MiB"
        for method in methods
    )


HALF = ("dit-digits", 20, 0.5)
QUARTER_CACHED = ("dit-digits", 20, 0.75)
OTHERS = (("dit-digits", 10, 0.5), ("dit-digits", 50, 0.5), ("unet-digits", 20, 0.5), ("flux-digits", 20, 0.5))
CLAIMS = (
    RouterClaim(
        "proxy",
        "harmonica",
        "With the image-error proxy, training ends nearer to the uncached output than step by step alone (SDT).",
        ("harmonica", "sdt"),
        (HALF, QUARTER_CACHED),
        _ordered("harmonica", "sdt"),
        published="HarmoniCa < SDT",
    ),
    RouterClaim(
        "step_wise",
        "harmonica",
        "Step-wise training alone finds a better mask than a random one.",
        ("sdt", "random"),
        (HALF, QUARTER_CACHED),
        _ordered("sdt", "random"),
        published="SDT < random",
        reason="With seed 0 at 50% no router that SDT found in its 40 trajectories (the paper has 2,000) was better on "
        "held-out samples than the random logits it starts from, and the best one is kept.",
    ),
    RouterClaim(
        "against_l2c",
        "harmonica",
        "HarmoniCa ends nearer to the uncached output than Learning-to-Cache.",
        ("harmonica", "l2c"),
        (QUARTER_CACHED,),
        _ordered("harmonica", "l2c"),
        published="DiT-XL/2, 20 steps, FID: 4.88 at 1.44×, Learning-to-Cache 5.34 at 1.41×",
        reason="Learning-to-Cache computes every other step whole, so that what it reuses is one step old. HarmoniCa "
        "starts from a random mask, and 40 trajectories (the paper has 2,000) do not take it far from that: evenly "
        "spaced steps are better than it as well.",
    ),
    RouterClaim(
        "cost",
        "harmonica",
        "HarmoniCa trains in less time and memory than Learning-to-Cache.",
        ("harmonica", "l2c"),
        (QUARTER_CACHED,),
        _cheaper,
        published="less time and memory, and no images",
        reason="Here images cost nothing, a pair of steps of Learning-to-Cache computes its first one whole and learns "
        "one step of two, and HarmoniCa generates for its proxy as well (3 times).",
        told=_costs,
    ),
    RouterClaim(
        "ours",
        "budgeted",
        f"(Ours.) The budgeted router's error is at least {GAIN:.0%} below HarmoniCa's.",
        ("budgeted", "harmonica"),
        (HALF,),
        lambda rows: rows["budgeted"]["error"] <= (1 - GAIN) * rows["harmonica"]["error"],
    ),
    RouterClaim(
        "ours_elsewhere",
        "budgeted",
        f"(Ours.) With other steps and models too, the budgeted router's error is {GAIN:.0%} below HarmoniCa's.",
        ("budgeted", "harmonica"),
        OTHERS,
        lambda rows: rows["budgeted"]["error"] <= (1 - GAIN) * rows["harmonica"]["error"],
    ),
    RouterClaim(
        "ours_against_planned",
        "budgeted",
        "(Ours.) A router at scope branch beats the planned schedule of whole steps of the same scope.",
        ("budgeted", "planned"),
        (HALF, QUARTER_CACHED),
        _ordered("budgeted", "planned"),
        reason="The plan has weights fitted to the trajectory and a schedule searched by running it; a router has "
        "Taylor-1. With fitted weights (`fitted`) the router is nearer, and at 50% level with the plan on one seed of "
        "three.",
    ),
    RouterClaim(
        "ours_forecasting",
        "budgeted",
        "(Ours.) Forecasting inside of the mixture ends nearer to the uncached output than reusing in it.",
        ("budgeted", "reusing"),
        (HALF,),
        _ordered("budgeted", "reusing"),
    ),
    RouterClaim(
        "ours_fitted",
        "budgeted",
        "(Ours.) Weights fitted to the trajectory after the export improve on the router's Taylor-1.",
        ("fitted", "budgeted"),
        (HALF,),
        _ordered("fitted", "budgeted"),
    ),
    RouterClaim(
        "ours_start",
        "budgeted",
        "(Ours.) Starting from the profile's schedules ends nearer to the uncached output than starting at random.",
        ("budgeted", "random_start"),
        (HALF,),
        _ordered("budgeted", "random_start"),
    ),
    RouterClaim(
        "ours_hard_gates",
        "budgeted",
        "(Ours.) Hard gates with straight-through gradients end nearer to the uncached output than annealed ones.",
        ("budgeted", "annealed"),
        (HALF,),
        _ordered("budgeted", "annealed"),
    ),
    RouterClaim(
        "ours_chosen_by_class",
        "budgeted",
        "(Ours.) Choosing one of two routers by the class ends nearer to the uncached output than the better one of "
        "them for all.",
        ("chosen", "single"),
        (HALF,),
        _ordered("chosen", "single"),
        reason="Trainings of different seeds start alike and end alike: schedules of the first two differ in 6 of 480 "
        "cells, so that there is little to choose between.",
    ),
)


def checked(table: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row of each claim that the table has all methods of, see `Claim.row`.

    table: rows with the columns of results/routers/summary.csv, numbers as numbers.

    Raises:
        ConfigError: for a claim that fails and has no reason.
    """
    by_setting: dict[tuple[Any, ...], dict[str, Mapping[str, Any]]] = {}
    for row in table:
        by_setting.setdefault(tuple(row[name] for name in LIKE), {})[row["method"]] = row
    found = []
    for claim in CLAIMS:
        outcomes = {}
        for seed in sorted({key[-1] for key in by_setting}):
            rows = {
                where: by_setting[(*where, seed)]
                for where in claim.where
                if set(claim.methods) <= by_setting.get((*where, seed), {}).keys()
            }
            if rows:
                outcomes[seed] = claim.outcome(Compared(rows))
        if outcomes:
            told = Statement(f"{PREFIX}{claim.name}", claim.system, claim.claim, claim.published, claim.reason)
            found.append(told.row(outcomes))
    return found


def is_of_routers(row: Mapping[str, Any]) -> bool:
    """Whether a published row of a claim is one of these, which checking the others again leaves as it is."""
    return row["name"].startswith(PREFIX)
