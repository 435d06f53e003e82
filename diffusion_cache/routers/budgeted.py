"""Ours: from the profile's best schedule, trained on the hard schedule of a given compute."""

from dataclasses import dataclass

from ..registry import routers
from .base import STRAIGHT_THROUGH, Recipe
from .proxy import REMOVED


@routers.register("budgeted")
@dataclass(frozen=True)
class Budgeted(Recipe):
    """HarmoniCa's loss, with what is known beforehand put in: the profile, the compute, and how a run will forecast.

    The logits start from the optimal schedule for the profile's surrogate; each trajectory runs the hard schedule of
    the compute asked for, with slopes taken halfway between a gate's ends; reused spans are forecast by Taylor-1, and
    in the plan by weights fitted to the trajectory where these are better.
    """

    lr: float = 0.05
    start: str = "profile"
    gates: str = STRAIGHT_THROUGH
    proxy: str = REMOVED
    order: int = 1
    threshold: float = 0.5
    fitted: bool = True
