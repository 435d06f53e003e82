"""A schedule: which spans are computed at which steps."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from .errors import ConfigError


@dataclass(frozen=True)
class Schedule:
    """compute[step][pass][span], bool. An axis of length one stands for all passes or all spans.

    The first step is always computed: there is nothing to reuse yet.
    """

    compute: tuple[tuple[tuple[bool, ...], ...], ...]

    def __post_init__(self) -> None:
        if not self.compute:
            raise ConfigError("a schedule needs at least one step")
        if not all(span for row in self.compute[0] for span in row):
            raise ConfigError("a schedule must compute its first step: there is nothing to reuse yet")

    @classmethod
    def uniform(cls, computed: Iterable[bool]) -> "Schedule":
        """One decision a step, for all passes and spans."""
        return cls(tuple(((bool(value),),) for value in computed))

    @property
    def total(self) -> int:
        return len(self.compute)

    def row(self, step: int, pass_index: int) -> tuple[bool, ...]:
        """The decisions for the spans at a step, or (True,) past the schedule's end."""
        if step >= self.total:
            return (True,)
        passes = self.compute[step]
        return passes[min(pass_index, len(passes) - 1)]

    @cached_property
    def nfe(self) -> float:
        """Computed steps, averaged over passes and spans."""
        return sum(sum(sum(row) / len(row) for row in step) / len(step) for step in self.compute)

    def stores(self, step: int, pass_index: int, history: int) -> bool:
        """Whether a feature observed at this step serves a later reuse, with the last `history` features kept."""
        keep = self._useful(pass_index, history)
        return step < len(keep) and keep[step]

    def _useful(self, pass_index: int, history: int) -> Sequence[bool]:
        key = (pass_index, history)
        if key not in self._useful_cache:
            useful = [False] * self.total
            recent: list[int] = []
            for step in range(self.total):
                row = self.row(step, pass_index)
                if not all(row):
                    for kept in recent:
                        useful[kept] = True
                if any(row):
                    recent = [*recent, step][-history:]
            self._useful_cache[key] = useful
        return self._useful_cache[key]

    @cached_property
    def _useful_cache(self) -> dict[tuple[int, int], Sequence[bool]]:
        return {}
