"""Watching a session's runs from outside: what profiling records and fitting needs."""

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from ..history import Leaf
from ..models import Span
from .frame import Frame
from .structure import Inputs


class Again(Protocol):
    """Makes a denoiser call once more, with other arguments where they are given."""

    def __call__(self, compute: bool = False, given: tuple[tuple, dict[str, Any]] | None = None) -> Any: ...


class Observer:
    """Does nothing; what it is told of must not be changed in place. What it raises ends the generation.

    Calls that fill a model's own cache of keys and values are no part of any history, and it is not told of them.
    """

    def run_began(self, run: Any) -> None:
        """A CacheRun is about to generate."""

    def span_computed(
        self, frame: Frame, span: Span, inputs: Inputs, leaves: Sequence[Leaf], outputs: Sequence[Tensor]
    ) -> None:
        """A span was computed: outputs are its tensors, leaves[i].base the key of the input outputs[i] continues."""

    def denoiser_called(self, frame: Frame, output: Any, again: Again) -> None:
        """A denoiser call is over. again() makes the same call once more: the same spans reused from the same history.

        With compute=True all spans are computed; given: positional and named arguments in place of the call's own. It
        may be used until the scheduler's step; what a computed span gives then is not stored.
        """
