"""What a cache for diffusion language models is to the rest of the package: which tokens each refinement computes."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor


@dataclass(frozen=True)
class View:
    """What a method sees before a refinement: of every token of the window, bool [n, tokens].

    masked: whether it is still to be decoded; was_masked: whether it was at the refinement before. changed: whether it
    is another than the one whose keys and values are kept. unsettled: whether what is kept of it can differ from what
    computing everything would give; a *refresh* computes all of these. age: refinements between the last refresh and
    this one. refinement: which of its block's this is, counted from 0.
    """

    masked: Tensor
    was_masked: Tensor
    changed: Tensor
    unsettled: Tensor
    age: int
    refinement: int


class Watcher(ABC):
    """What a method has measured in one run, where it looks at attention weights to refresh single layers.

    Told of one layer after the other in each refinement. Weights are the layer's, averaged over its heads
    [n, queries, tokens]; places say which token each query is, [n, queries].
    """

    @abstractmethod
    def tracked(self) -> Tensor | None:
        """Tokens that every refinement has to compute besides those of `rows`, bool [n, tokens]; None for none."""

    @abstractmethod
    def refreshed(self, layer: int, weights: Tensor, places: Tensor, samples: Tensor, lasting: Tensor) -> None:
        """Of these samples, bool [n], all unsettled tokens were computed in the layer.

        lasting: tokens that stay unsettled while the block is decoded, bool [n, tokens].
        """

    @abstractmethod
    def drifted(self, layer: int, weights: Tensor, places: Tensor) -> Tensor:
        """Whether the layers after this one are to be refreshed, bool [n]."""


class LanguageCache(ABC):
    """A method that keeps keys and values between refinements; a frozen dataclass whose fields are its options.

    paper: name and number of the paper. exact: whether it changes no logits, for which attention must never look at
    later blocks.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    exact: ClassVar[bool] = False

    def __str__(self) -> str:
        fields = ", ".join(f"{key}={value!r}" for key, value in vars(self).items())
        return f"{self.name}({fields})"

    @abstractmethod
    def rows(self, view: View) -> Tensor:
        """The tokens to compute, bool [n, tokens]. Keys and values of all others are as they were computed last.

        It is asked at every refinement but the first of each block, which is a refresh. Tokens that are settled are not
        computed, whatever it says. A masked token that is not computed is not decoded by this refinement, unless no
        masked one of its sample is.
        """

    def watcher(self) -> Watcher | None:
        """A new run begins: what is to look at its attention weights, if anything."""
        return None
