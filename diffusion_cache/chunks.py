"""Features of videos whose parts are denoised at noise levels of their own (diffusion forcing, arXiv 2407.01392).

Streaming and autoregressive models (SkyReels-V2, arXiv 2504.13074; StreamDiT, arXiv 2507.03745; StreamDiffusionV2,
arXiv 2511.07399) run one denoiser call over *chunks*, latent frames that are noisier the later they come; a long video
passes through a window of them. A step index says little of such a call: it is another step for every chunk, and after
the window has moved, the same place holds another one. Here, features are kept for each chunk of each batch row, and
their nodes are the levels that it had. Attention runs over all chunks, so that a call is computed or reused as a whole;
each chunk of it is forecast from its own past.
"""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import ops
from .errors import ConfigError
from .history import History, Lane
from .plain import check_count


@dataclass(frozen=True)
class Stream:
    """How a stream's features are kept: for each span and guidance branch, and not beyond the run that is the stream.

    capacity: chunks of each batch row at most; what is over it is dropped, first that of the chunk which was longest in
    no call. None for as many as are in a call together, and the sinks. sinks: so many first chunks of the stream are
    never dropped.
    """

    capacity: int | None = None
    sinks: int = 0

    def __post_init__(self) -> None:
        if self.capacity is not None:
            check_count("stream: capacity", self.capacity)
        check_count("stream: sinks", self.sinks, 0)

    def check(self, numbers: Sequence[int]) -> None:
        """Raises ConfigError if a call's chunks and the sinks are more than the capacity."""
        needed = len({*numbers, *range(self.sinks)})
        if self.capacity is not None and needed > self.capacity:
            raise ConfigError(
                f"stream: a call's {len(numbers)} chunks and {self.sinks} sinks need a capacity of {needed}, and it is "
                f"{self.capacity}"
            )


class Unit(NamedTuple):
    """One chunk of one batch row. number: of the chunk, counted from the start of its stream."""

    row: int
    number: int


class Ladder:
    """The levels that chunks of a stream were seen at, whichever chunks: a chunk's steps are counted on it.

    Forecasts are polynomials in these steps. As functions of the level itself features bend more: samplers space their
    levels so that about as much happens in every step.
    """

    def __init__(self) -> None:
        self._levels: list[float] = []  # negated, so that they rise

    def add(self, levels: Iterable[float]) -> None:
        for level in set(levels):
            place = bisect_left(self._levels, -level)
            if self._levels[place : place + 1] != [-level]:
                self._levels.insert(place, -level)

    def step(self, level: float) -> int:
        """How many of the levels are higher than this one."""
        return bisect_left(self._levels, -level)


@dataclass(frozen=True)
class Chunks:
    """What a denoiser call holds: the chunks in each row, and the level of each, row after row."""

    units: tuple[Unit, ...]
    levels: tuple[float, ...]
    rows: int
    ladder: Ladder

    @classmethod
    def of(cls, timestep: Any, rows: int, ladder: Ladder, numbers: Sequence[int] | None = None) -> "Chunks":
        """From a call's timestep [rows, chunks], whose levels join the ladder; reads it back.

        A chunk is what one entry is for: a latent frame, or several that enter the model as one. numbers: of the
        chunks, None for 0, 1, ….

        Raises:
            ConfigError: for a timestep that is not of chunks, or numbers that are not theirs.
        """
        if not isinstance(timestep, Tensor) or timestep.ndim != 2 or len(timestep) != rows:
            shape = tuple(timestep.shape) if isinstance(timestep, Tensor) else type(timestep).__name__
            raise ConfigError(
                "a stream goes by the noise level of each latent frame, a timestep of [rows, frames], and this "
                f"denoiser is called with {shape} for {rows} rows: leave stream out, or use a pipeline with "
                "levels of their own (SkyReelsV2DiffusionForcingPipeline)"
            )
        count = timestep.shape[1]
        if numbers is None:
            numbers = range(count)
        if len(numbers) != count or len(set(numbers)) != count:
            raise ConfigError(
                f"run.chunks named {list(numbers)}, and the call has {count} noise levels: name each of its chunks once"
            )
        units = tuple(Unit(row, number) for row in range(rows) for number in numbers)
        levels = tuple(ops.double(timestep.detach()).flatten().tolist())
        ladder.add(levels)
        return cls(units, levels, rows, ladder)

    @property
    def count(self) -> int:
        return len(self.units) // self.rows

    def divides(self, tensor: Tensor) -> bool:
        """Whether a tensor's chunks are known: tokens [rows, chunks·n, dim] or a map [rows, dim, chunks, h, w]."""
        if len(tensor) != self.rows:
            return False
        if tensor.ndim == 3:
            return tensor.shape[1] % self.count == 0
        return tensor.ndim == 5 and tensor.shape[2] == self.count

    def apart(self, tensor: Tensor) -> Tensor:
        """Every chunk a row of its own: [rows·chunks, n, dim], or [rows·chunks, dim, h, w] of a map."""
        if tensor.ndim == 3:
            return tensor.reshape(len(self.units), -1, tensor.shape[-1])
        return tensor.transpose(1, 2).flatten(0, 1)

    def together(self, tensor: Tensor) -> Tensor:
        """The reverse of `apart`."""
        if tensor.ndim == 3:
            return tensor.reshape(self.rows, -1, tensor.shape[-1])
        return tensor.unflatten(0, (self.rows, self.count)).transpose(1, 2)


class ChunkHistory(History):
    """Up to `capacity` features of each chunk, whose nodes are its levels: a lane for each.

    The rows of a slot are places that chunks take: in order of their first call, later that of a dropped one.
    """

    def __init__(self, capacity: int, stream: Stream, dtype: str = "model"):
        super().__init__(capacity, dtype)
        self._stream = stream
        self.clear()

    def clear(self) -> None:
        super().clear()
        self.lanes = []
        self._places: dict[Unit, int] = {}  # those that were longest in no call first
        self._like: tuple[Any, ...] = ()  # what chunks must have in common to be kept together

    def reshaped(self) -> None:
        """Other shapes are other numbers of chunks, and their features stay."""

    def observe_chunks(self, chunks: Chunks, output: Tensor, base: Tensor | None) -> None:
        """Store output − base, or the output where there is no base, for each chunk at its level.

        A feature of the same level is replaced: the chunk rests. Where its levels turn round it begins anew.
        """
        output, base = chunks.apart(output), None if base is None else chunks.apart(base)
        like = chunks.rows, output.shape[1:], output.dtype, output.device
        try:
            if like != self._like:
                self.clear()
                self._like = like
            places = self._claim_places(chunks)
            for place, level in zip(places, chunks.levels, strict=True):
                if not continues(self.lanes[place], level):
                    self.lanes[place].clear()
            self._observe_rows(chunks.levels, [output], [base], places)
        except BaseException:
            self.clear()
            raise

    def of(self, chunks: Chunks) -> History | None:
        """What is stored of these chunks, rows and lanes in their order; None where one of them has nothing."""
        self._touch(chunks)
        places = [self._places.get(unit) for unit in chunks.units]
        known = [place for place in places if place is not None]
        if len(known) < len(places) or not all(
            self.lanes[place] and continues(self.lanes[place], level)
            for place, level in zip(known, chunks.levels, strict=True)
        ):
            return None
        if known == [*range(len(self.lanes))]:
            return self
        return self.taken(known)

    def _touch(self, chunks: Chunks) -> None:
        for unit in chunks.units:
            if unit in self._places:
                self._places[unit] = self._places.pop(unit)

    def _claim_places(self, chunks: Chunks) -> list[int]:
        """A place for each of the chunks, empty where it had none."""
        self._touch(chunks)
        held = set(chunks.units)
        sinks = {unit for unit in self._places if unit.number < self._stream.sinks}
        limit = len(held | sinks) if self._stream.capacity is None else chunks.rows * self._stream.capacity
        dropped = [unit for unit in self._places if unit not in held | sinks]
        missing = [unit for unit in chunks.units if unit not in self._places]
        self._grow(min(limit, len(self._places) + len(missing)))
        free = sorted({*range(len(self.lanes))} - {*self._places.values()})
        for unit in missing:
            if not free:
                free.append(self._places.pop(dropped.pop(0)))
                self.lanes[free[-1]].clear()
            self._places[unit] = free.pop(0)
        return [self._places[unit] for unit in chunks.units]

    def _grow(self, places: int) -> None:
        more = places - len(self.lanes)
        if more > 0:
            self.lanes += [[] for _ in range(more)]
            self.slots = [
                [torch.cat([part, part.new_zeros(more, *part.shape[1:])]) for part in slot] for slot in self.slots
            ]


def continues(lane: Lane, level: float) -> bool:
    """Whether a chunk with these nodes may have come to this level: it rests at the last one, or goes on as before."""
    if len(lane) < 2 or level == lane[-1][0]:
        return True
    return (level - lane[-1][0]) * (lane[-1][0] - lane[-2][0]) > 0
