"""Fitting TeaCache's polynomial: the change of the output that goes with one of the signal (arXiv 2411.19108)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..context import Past
from ..engine import Method, Observer
from ..engine.frame import Frame
from ..engine.structure import first_tensor
from ..errors import ConfigError
from ..forecasters import Reuse
from ..policies import Guarded, Guards, TeaCache
from ..signals import relative_l1
from .generation import Batch, attached


@dataclass(frozen=True)
class Change:
    """Relative L1 changes of one batch row from one step to the next: of the signal and of the denoiser's output."""

    signal: float
    output: float


@dataclass(frozen=True)
class Fit:
    """A polynomial and how well it foretells changes of the output.

    coefficients: highest power first. r2: of the fitting changes, the share of variance that is explained;
    held_out_r2: of changes that were not fitted, which can be negative. held_out_error: mean |foretold − true| over the
    mean true change; held_out_unfitted: the same of the best multiple of the signal alone.
    """

    coefficients: tuple[float, ...]
    r2: float
    held_out_r2: float
    held_out_error: float
    held_out_unfitted: float
    changes: int
    held_out_changes: int


class _Changes(Observer):
    def __init__(self) -> None:
        self.policy = TeaCache()
        self.found: list[Change] = []
        self.before: dict[Any, tuple[int, dict[str, Tensor], Tensor]] = {}

    def denoiser_called(self, frame: Frame, output: Any, again: Any) -> None:
        given = first_tensor(output)
        assert frame.signals is not None
        index, signals, earlier = self.before.get(frame.key, (-1, {}, given))
        if frame.step.index == index + 1 and index >= 0 and earlier.shape == given.shape:
            moved = self.policy.measure(frame.signals, Past(previous=signals)).tolist()
            changed = relative_l1(given, earlier).tolist()
            if len(moved) == len(changed):
                self.found += map(Change, moved, changed)
        self.before[frame.key] = frame.step.index, frame.signals, given.detach().clone()


def changes(batch: Batch) -> list[Change]:
    """What changes from step to step of every row of a batch's uncached generation.

    Raises:
        ConfigError: for a model in which the signal is not found, or in which nothing changes that is finite.
    """
    watching = _Changes()
    method = Method(Guarded(TeaCache(), Guards(max_reused=0)), Reuse(), "stack")
    with attached(batch.pipe, method, watching):
        batch.call()
    found = [change for change in watching.found if np.isfinite((change.signal, change.output)).all()]
    if not found:
        raise ConfigError(
            f"{type(batch.pipe).__name__}: no two neighbouring steps of one size were seen, so there is nothing to fit"
        )
    return found


def fit(fitting: Sequence[Change], held_out: Sequence[Change], degree: int = 4) -> Fit:
    """The least-squares polynomial of a degree (TeaCache takes 4), judged on changes of other samples.

    Raises:
        ConfigError: for a degree that so many different changes cannot determine.
    """
    x, y = _columns(fitting)
    if isinstance(degree, bool) or not isinstance(degree, int) or not 1 <= degree < len(np.unique(x)):
        raise ConfigError(f"degree must be a whole number of at least 1, with more different changes, not {degree!r}")
    # fitted in a variable from −1 to 1, for its powers are nearly equal in the narrow range that signals have
    polynomial = np.polynomial.Polynomial.fit(x, y, degree).convert()
    other_x, other_y = _columns(held_out)
    scaled = other_x * float(x @ y / (x @ x))
    return Fit(
        coefficients=tuple(map(float, polynomial.coef[::-1])),
        r2=_explained(polynomial(x), y),
        held_out_r2=_explained(polynomial(other_x), other_y),
        held_out_error=_error(polynomial(other_x), other_y),
        held_out_unfitted=_error(scaled, other_y),
        changes=len(x),
        held_out_changes=len(other_x),
    )


Values = NDArray[np.float64]


def _columns(found: Sequence[Change]) -> tuple[Values, Values]:
    return np.array([change.signal for change in found]), np.array([change.output for change in found])


def _explained(foretold: Values, true: Values) -> float:
    return float(1 - np.square(foretold - true).sum() / np.square(true - true.mean()).sum())


def _error(foretold: Values, true: Values) -> float:
    return float(np.abs(foretold - true).mean() / np.abs(true).mean())
