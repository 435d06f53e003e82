"""A history whose newest feature is stored as it is, and each older one as its difference to the next newer one.

Features change little from one computed step to the next, so that one byte a number says more of a difference than of a
feature: its step is the difference's largest magnitude in a row over 127, not the feature's. A sum over features is one
over what is held, with other weights: with D_j = F_j − F_{j+1} and F_K the newest,
Σ_j w_j F_j = (Σ_j w_j) F_K + Σ_{j<K} (w_1 + … + w_j) D_j, so nothing needs to be restored to forecast.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from torch import Tensor

from . import ops
from .history import History, Lane, row_index, store, writable

DIFFERENCES = {"int8-delta": "int8", "fp8-delta": "fp8"}  # of a cache_dtype, the code of the differences
NEWEST = 0  # the slot of every lane's newest feature


class DifferenceHistory(History):
    """Up to `capacity` features: the newest, and `capacity − 1` differences in codes.

    An older feature carries the rounding of each difference that it is reached by. While one is stored, the newest
    before it is held beside it. Differences of leaves that are not worth codes keep the leaf's dtype.
    """

    def combined(self, weights: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(accumulate(weights))

    def restored(self, held: Sequence[Tensor]) -> list[Tensor]:
        return [*accumulate(reversed(held))][::-1]

    def leaf(self, index: int) -> Sequence[Tensor | ops.Coded]:
        newest, *differences = self.slots
        return [newest[index], *(self._part(held, index) for held in differences)]

    def numbers(self) -> list[Tensor]:
        return [tensor for tensor in self.slots[NEWEST] if tensor.is_floating_point()]

    def bytes_of(self, outputs: Sequence[Tensor]) -> int:
        differences = (self.capacity - 1) * super().bytes_of(outputs) // self.capacity
        return sum(out.nbytes for out in outputs) + differences

    @property
    def full_bytes(self) -> int:
        return self.bytes_of(self.slots[NEWEST]) if self.slots else 0

    def reads_to_observe(self, rows: Sequence[int] | None) -> bool:
        return True

    def _observe_all(self, node: float, outputs: Sequence[Tensor], bases: Sequence[Tensor | None]) -> None:
        newest = [store(out, base) for out, base in zip(outputs, bases, strict=True)]
        if self.slots and [_like(tensor) for tensor in newest] != [_like(tensor) for tensor in self.slots[NEWEST]]:
            self.clear()
        slot, replaces = self._shift(self.lanes[0], node)
        if slot is not None:
            held = self.slots[slot] if slot < len(self.slots) else []
            before = self.slots[NEWEST] if not replaces else self._second(slot)
            self.slots[slot : slot + 1] = [self._stored(before, newest, held)]
        self.slots[NEWEST : NEWEST + 1] = [newest]

    def _observe_rows(
        self,
        nodes: Sequence[float],
        outputs: Sequence[Tensor],
        bases: Sequence[Tensor | None],
        rows: Sequence[int],
    ) -> None:
        newest = [store(out, base) for out, base in zip(outputs, bases, strict=True)]
        if not self.slots:
            self.slots.append([part.new_zeros(len(self.lanes), *part.shape[1:]) for part in newest])
        groups: dict[tuple[int, bool], list[int]] = {}
        for position, (row, node) in enumerate(zip(rows, nodes, strict=True)):
            slot, replaces = self._shift(self.lanes[row], node)
            if slot is not None:
                groups.setdefault((slot, replaces), []).append(position)
        for (slot, replaces), positions in sorted(groups.items()):
            before = self._second(slot) if replaces else self.slots[NEWEST]
            given = row_index(positions, newest[0])
            target = row_index([rows[position] for position in positions], newest[0])
            older = [tensor.index_select(0, target) for tensor in before]
            parts = self._stored(older, [tensor.index_select(0, given) for tensor in newest], [])
            if slot == len(self.slots):
                # zeros: a row that has not filled a slot weighs it with zero, which must not meet a NaN
                self.slots.append([part.new_zeros(len(self.lanes), *part.shape[1:]) for part in parts])
            self._write(slot, target, parts)
        self._write(NEWEST, row_index(rows, newest[0]), newest)

    def _write(self, slot: int, rows: Tensor, parts: Sequence[Tensor]) -> None:
        self.slots[slot] = [writable(tensor) for tensor in self.slots[slot]]
        for into, part in zip(self.slots[slot], parts, strict=True):
            into.index_copy_(0, rows, part)

    def _second(self, slot: int) -> list[Tensor]:
        """The features before the newest ones, from their differences in a slot."""
        held = self.slots[slot]
        return [newest + ops.decoded(self._part(held, i)) for i, newest in enumerate(self.slots[NEWEST])]

    def _shift(self, lane: Lane, node: float) -> tuple[int | None, bool]:
        """Note a lane's next feature as its newest: the slot for the difference to it of the feature before, if one is
        kept, and whether that slot holds the difference to the feature that is replaced.
        """
        replaces = bool(lane) and lane[-1][0] == node
        slot: int | None
        if replaces:
            lane.pop()
            slot = lane[-1][1] if lane else None
        elif lane and self.capacity > 1:
            before, _ = lane.pop()
            oldest = lane.pop(0)[1] if len(lane) == self.capacity - 1 else None
            slot = min({*range(1, self.capacity)} - {slot for _, slot in lane}) if oldest is None else oldest
            lane.append((before, slot))
        else:
            lane.clear()
            slot = None
        lane.append((node, NEWEST))
        return slot, replaces


def _like(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.dtype, tensor.device
