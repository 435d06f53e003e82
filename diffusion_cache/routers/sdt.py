"""Step-wise denoising training: HarmoniCa without its image-error proxy (2410.01723)."""

from dataclasses import dataclass

from ..registry import routers
from .base import Recipe


@routers.register("sdt")
@dataclass(frozen=True)
class SDT(Recipe):
    """Minimise MSE(student, teacher) + β·Σ_i r_ti at each step t of the student's trajectory, with soft gates."""

    paper = "HarmoniCa's ablation (ICML 2025, arXiv 2410.01723)"
