"""Learning-to-Cache: pairs of steps on noised training images (2406.01733)."""

from dataclasses import dataclass

from ..registry import routers
from .base import Recipe


@routers.register("l2c")
@dataclass(frozen=True)
class L2C(Recipe):
    """Minimise MSE(student, teacher) + β·Σ_i r_ti at every second step, after a step that computes all.

    The states of a pair are one training image with one noise at two adjacent noise levels, so that at least half of
    all steps are computed.
    """

    paper = "Learning-to-Cache (NeurIPS 2024, arXiv 2406.01733)"
    images = True
