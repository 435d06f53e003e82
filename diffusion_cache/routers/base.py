"""What ways to train a router have in common."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..errors import ConfigError
from ..profile import Profile
from ..registry import unknown_name
from .mixing import Gates
from .proxy import VARIANTS
from .router import random_logits, starts

SOFT, ANNEALED, HARD = "soft", "annealed", "hard"
STARTS, GATES, PROXIES = ("random", "profile"), (SOFT, ANNEALED, HARD), ("none", *VARIANTS)
COLDEST = 0.1  # temperature that annealed gates end with


@dataclass(frozen=True)
class Recipe:
    """One way to train a router.

    lr: Adam's learning rate. beta: what a computed span of mean cost adds to the loss, or None to find it by dual
    ascent to the compute asked for. start: of the logits, "random", or
    "profile" for the best of some schedules (`router.starts`). gates: in training, "soft" (sigmoid),
    "annealed" (with a temperature that falls from 1 to 0.1) or "hard" (the schedule as it would run, with the changes
    that flipping a gate would make to the losses of its own step and of those that forecast from it). proxy: what
    weighs the steps' losses, "none" or a variant of the image-error proxy. order: of the forecast, 0 for reuse or 1 for
    Taylor-1. backtrack: after a look that found no better router, go on from the best one with half the learning rate.
    threshold: a span is computed where its gate is above it. fitted: give the exported plan weights that are
    fitted to the trajectory, if they are better on the held-out samples.
    """

    lr: float = 0.2
    beta: float | None = None
    start: str = "random"
    gates: str = SOFT
    proxy: str = "none"
    order: int = 0
    backtrack: bool = False
    threshold: float = 0.1
    fitted: bool = False

    name: ClassVar[str]
    paper: ClassVar[str] = ""
    images: ClassVar[bool] = False  # whether it trains on noised images, every second step, with the others computed

    def __post_init__(self) -> None:
        for field, known in (("start", STARTS), ("gates", GATES), ("proxy", PROXIES)):
            if getattr(self, field) not in known:
                raise unknown_name(f"{field} of a router", getattr(self, field), known)
        if not self.lr > 0 or (self.beta is not None and not self.beta >= 0):
            raise ConfigError(f"{self.name}: lr must be above 0 and beta at least 0, not {self.lr} and {self.beta}")
        if self.order not in (0, 1) or not 0 < self.threshold < 1:
            raise ConfigError(f"{self.name}: order must be 0 or 1 and threshold between 0 and 1")

    def always(self, total: int) -> tuple[int, ...]:
        """The steps that compute all."""
        return tuple(range(0, total, 2)) if self.images else (0,)

    def logits(self, profile: Profile, compute: float | None, seed: int) -> list[Tensor]:
        """What training may begin with, [T, S] each; the one whose hard schedule is best counts."""
        if self.start == "random":
            return [random_logits(profile, seed)]
        if compute is None:
            raise ConfigError(f"{self.name} starts from schedules at a compute: give compute")
        return starts(profile, compute, self.order)

    def gated(self, row: Tensor, hard: Tensor, progress: float) -> Gates:
        """The gates of a step. row: its logits, [S]; hard: bool [S], where its spans are computed as things stand.

        progress: of the training, 0 to 1.
        """
        if self.gates == HARD:
            mix = hard.to(row).requires_grad_()
            return Gates(mix, hard.tolist(), mix)
        return Gates((row / COLDEST**progress if self.gates == ANNEALED else row).sigmoid(), hard.tolist())
