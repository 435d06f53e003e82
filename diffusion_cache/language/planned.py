"""A plan: which refinements of a block are computed, settled beforehand from a profile."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigError
from ..plan import Plan
from ..registry import languages
from .base import LanguageCache, View

SCOPE = "layer"  # of profiles and plans of language models: their spans are layers, and their steps refinements


@languages.register("planned")
@dataclass(frozen=True)
class Planned(LanguageCache):
    """Compute the current block at the refinements that the plan says, and at those beyond its last.

    At the others nothing is run, and the next token is decoded by the logits that are there.
    """

    plan: Plan

    paper = "ours"

    def __post_init__(self) -> None:
        if self.plan.scope != SCOPE or self.plan.spans > 1:
            raise ConfigError(
                f"plan {self.plan.name!r} is for {self.plan.spans} spans at scope {self.plan.scope}; one for text "
                f"decides for all layers at once, at scope {SCOPE}: make it with `planning.refinements`"
            )

    def __str__(self) -> str:
        return f"planned({self.plan.name!r}: {self.plan.schedule.nfe:g} of {self.plan.total} refinements)"

    def rows(self, view: View) -> Tensor:
        (computed,) = self.plan.schedule.row(view.refinement, 0)
        return view.unsettled if computed else torch.zeros_like(view.unsettled)
