"""Ours: from the profile's best schedule, trained on the hard schedule of a given compute."""

from dataclasses import dataclass

from ..registry import routers
from .base import HARD, Recipe
from .proxy import REMOVED


@routers.register("budgeted")
@dataclass(frozen=True)
class Budgeted(Recipe):
    """Losses as in HarmoniCa, with what is known beforehand put in: the profile, the compute, how a run will forecast.

    The logits start from the best of the profile's optimal schedule and evenly spaced ones. Each trajectory runs the
    hard schedule of the compute asked for, and a cell's logit moves by what computing it would change there and at the
    later steps that forecast from it. Reused spans are forecast by Taylor-1.
    """

    start: str = "profile"
    gates: str = HARD
    proxy: str = REMOVED
    order: int = 1
    backtrack: bool = True
    threshold: float = 0.5
