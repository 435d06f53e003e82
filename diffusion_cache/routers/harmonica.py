"""HarmoniCa: trained step by step on the trajectory that caching leads to, weighed by the image error (2410.01723)."""

from dataclasses import dataclass

from ..registry import routers
from .base import Recipe
from .proxy import REMOVED


@routers.register("harmonica")
@dataclass(frozen=True)
class HarmoniCa(Recipe):
    """Minimise λ_t·MSE(student, teacher) + β·Σ_i r_ti at each step t of the student's trajectory, with soft gates.

    λ_t is the image-error proxy. The paper sets beta by hand (7e-8 for DiT-XL/2); here None finds it for a compute.
    """

    proxy: str = REMOVED

    paper = "HarmoniCa (ICML 2025, arXiv 2410.01723)"
