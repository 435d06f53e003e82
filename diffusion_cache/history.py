"""The past features of one span in one pass: a ring of fixed slots."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import ops

# the filled slots of a batch row, oldest first: (step of the feature, slot)
Lane = list[tuple[float, int]]


CODED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SCALE_BYTES = 4  # of each row of codes


@dataclass(frozen=True)
class Leaf:
    """One tensor of a span's output: its residual against the input called `base`, or the output itself (base None).

    kept: the input that is stored beside it, where inputs are.
    """

    base: int | str | None
    kept: int | str | None = None


class History:
    """Up to `capacity` features. A feature is one tensor per leaf of the span's output, and the inputs kept with them.

    Slots are allocated once and written in place, so memory never exceeds capacity × the feature's bytes. All batch
    rows share one lane until rows are observed apart; then each has its own.
    """

    def __init__(self, capacity: int, dtype: str = "model"):
        """dtype: of what is stored, "model" for that of the tensors, or one of `ops.CODES` for one byte a number."""
        self.capacity = capacity
        self.dtype = dtype
        self.lanes: list[Lane] = [[]]
        self.slots: list[list[Tensor]] = []  # codes as bytes, and their scales behind them
        self._coded: list[torch.dtype | None] = []  # of each leaf that is stored in codes, the dtype of its values

    def __bool__(self) -> bool:
        return any(self.lanes)

    @property
    def nodes(self) -> list[float]:
        """Steps of the stored features, oldest first, where all rows share them."""
        (lane,) = self.lanes
        return [node for node, _ in lane]

    def observe(
        self,
        node: float,
        outputs: Sequence[Tensor],
        bases: Sequence[Tensor | None],
        rows: Sequence[int] | None = None,
        batch: int = 0,
    ) -> None:
        """Store outputs[i] − bases[i], or a copy of outputs[i] where there is no base, as the feature of step `node`.

        rows: of a batch of `batch`, those that the tensors hold; None for all. A feature of the same step is
        replaced. Whatever fails leaves the history empty rather than half written.
        """
        try:
            if len(self.lanes) > 1:
                if rows is None:
                    self._join_lanes()
            elif rows is not None:
                self.lanes = [list(self.lanes[0]) for _ in range(batch)]
            if rows is None and len(self.lanes) == 1:
                self._observe_all(node, outputs, bases)
            else:
                rows = range(len(self.lanes)) if rows is None else rows
                self._observe_rows([node] * len(rows), outputs, bases, rows)
        except BaseException:
            self.clear()
            raise

    def reads_to_observe(self, rows: Sequence[int] | None) -> bool:
        """Whether a further feature, of these batch rows or of all, is stored with the help of those that are there."""
        return rows is not None or len(self.lanes) > 1

    def _observe_all(self, node: float, outputs: Sequence[Tensor], bases: Sequence[Tensor | None]) -> None:
        slot = self._claim(self.lanes[0], node)
        old = self.slots[slot] if slot < len(self.slots) else []
        self.slots[slot : slot + 1] = [self._stored(outputs, bases, old)]

    def _stored(self, outputs: Sequence[Tensor], bases: Sequence[Tensor | None], old: Sequence[Tensor]) -> list[Tensor]:
        """What a slot holds of a feature, written into what it held before where that serves."""
        if self.dtype == "model":
            self._coded = [None] * len(outputs)
            slots: Sequence[Tensor | None] = old or [None] * len(outputs)
            return [store(out, base, slot) for out, base, slot in zip(outputs, bases, slots, strict=True)]
        parts: list[Tensor] = []
        self._coded = [out.dtype if self._encodes(out) else None for out in outputs]
        for out, base, coded in zip(outputs, bases, self._coded, strict=True):
            here = old[len(parts) :]
            if coded is None:
                parts.append(store(out, base, here[0] if here else None))
            else:
                parts += _store_codes(out, base, self.dtype, here[:2])
        return parts

    def encoded(
        self, outputs: Sequence[Tensor], bases: Sequence[Tensor | None]
    ) -> tuple[list[Tensor], list[torch.dtype | None]]:
        """What a slot would hold of a feature, as new tensors; and of each leaf in codes, the dtype of its values."""
        return self._stored(outputs, bases, []), self._coded

    def lend(self, slots: Sequence[Sequence[Tensor]], coded: Sequence[torch.dtype | None]) -> None:
        """Have these tensors, zeroed, as all slots of a history that is empty; coded: as `encoded` gives it."""
        self.slots, self._coded = [list(held) for held in slots], list(coded)
        for tensor in self.tensors():
            tensor.zero_()

    def claim(self, node: float) -> list[Tensor]:
        """The tensors of the slot that is to hold the feature of step `node`, to be written into now."""
        return self.slots[self._claim(self.lanes[0], node)]

    def _encodes(self, out: Tensor) -> bool:
        """Whether a tensor is stored in codes: where there is one number in a row, its scale would cost more."""
        if self.dtype == "model" or out.dtype not in CODED_DTYPES or out.ndim < 2:
            return False
        return out.shape[-1] * (out.itemsize - 1) > SCALE_BYTES

    def bytes_of(self, outputs: Sequence[Tensor]) -> int:
        """How many bytes this history takes of features like these once it is full."""
        sizes = [
            out.numel() + SCALE_BYTES * (out.numel() // out.shape[-1]) if self._encodes(out) else out.nbytes
            for out in outputs
        ]
        return self.capacity * sum(sizes)

    def reserve(self, like: Sequence[tuple[torch.Size, torch.dtype, torch.device]]) -> None:
        """Allocate all slots now, filled with zeros, for code that takes every one of them with its weight."""
        while len(self.slots) < self.capacity:
            self.slots.append([torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in like])

    def _join_lanes(self) -> None:
        """One lane again, if all rows hold the same steps; rows that hold them in other slots are moved."""
        first, *others = self.lanes
        if any([node for node, _ in lane] != [node for node, _ in first] for lane in others):
            return
        moved = [row for row, lane in enumerate(self.lanes) if lane != first]
        if moved:
            index = row_index(moved, self.slots[0][0])
            before = [[tensor.index_select(0, index) for tensor in feature] for feature in self.slots]
            for place, (_, slot) in enumerate(first):
                for i, tensor in enumerate(self.slots[slot]):
                    values = [before[self.lanes[row][place][1]][i][j] for j, row in enumerate(moved)]
                    tensor.index_copy_(0, index, torch.stack(values))
        del self.lanes[1:]

    def _claim(self, lane: Lane, node: float) -> int:
        """The slot for a lane's next feature, which is noted as filled."""
        if lane and lane[-1][0] == node:
            slot = lane.pop()[1]
        elif len(lane) == self.capacity:
            slot = lane.pop(0)[1]
        else:
            slot = min(set(range(self.capacity)) - {slot for _, slot in lane})
        lane.append((node, slot))
        return slot

    def _observe_rows(
        self,
        nodes: Sequence[float],
        outputs: Sequence[Tensor],
        bases: Sequence[Tensor | None],
        rows: Sequence[int],
    ) -> None:
        by_slot: dict[int, list[int]] = {}
        for position, (row, node) in enumerate(zip(rows, nodes, strict=True)):
            by_slot.setdefault(self._claim(self.lanes[row], node), []).append(position)
        features = self._stored(outputs, bases, [])
        while len(self.slots) <= max(by_slot):
            # zeros: a row that has not filled a slot weighs it with zero, which must not meet a NaN
            self.slots.append([feature.new_zeros(len(self.lanes), *feature.shape[1:]) for feature in features])
        for slot, positions in by_slot.items():
            self.slots[slot] = [writable(tensor) for tensor in self.slots[slot]]
            for into, feature in zip(self.slots[slot], features, strict=True):
                target = row_index([rows[position] for position in positions], feature)
                into.index_copy_(0, target, feature.index_select(0, row_index(positions, feature)))

    def taken(self, rows: Sequence[int]) -> "History":
        """A copy of these rows alone, each with its lane, in this order."""
        copy = History(self.capacity, self.dtype)
        copy.lanes, copy._coded = [self.lanes[row] for row in rows], self._coded
        index = row_index(rows, self.slots[0][0])
        copy.slots = [[tensor.index_select(0, index) for tensor in feature] for feature in self.slots]
        return copy

    def at(self, node: float) -> list[Tensor] | None:
        """The feature of a step as it is stored; zero in rows that do not hold it, None where none does."""
        held = [(row, slot) for row, lane in enumerate(self.lanes) for step, slot in lane if step == node]
        if not held or len(self.lanes) == 1:
            return self.slots[held[0][1]] if held else None
        whole = [torch.zeros_like(tensor) for tensor in self.slots[0]]
        for row, slot in held:
            for into, tensor in zip(whole, self.slots[slot], strict=True):
                into[row] = tensor[row]
        return whole

    def combined(self, weights: Sequence[Any]) -> tuple[Any, ...]:
        """Weights of what the slots of a lane hold, oldest first, from those of its features."""
        return tuple(weights)

    def restored(self, held: Sequence[Tensor]) -> list[Tensor]:
        """The features of a lane, oldest first, from what its slots hold."""
        return list(held)

    def leaf(self, index: int) -> Sequence[Tensor | ops.Coded]:
        """What the slots hold of one leaf."""
        if self.dtype == "model":
            return [held[index] for held in self.slots]
        return [self._part(held, index) for held in self.slots]

    def _part(self, held: Sequence[Tensor], index: int) -> Tensor | ops.Coded:
        """What a slot holds of one leaf, as it was stored."""
        coded = self._coded[index]
        place = sum(1 if before is None else 2 for before in self._coded[:index])
        if coded is None:
            return held[place]
        return ops.Coded(held[place].view(ops.CODES[self.dtype]), held[place + 1], coded)

    def numbers(self) -> list[Tensor]:
        """Of each leaf that holds real numbers, a tensor of its shape."""
        firsts = [self.leaf(index)[0] for index in range(len(self._coded))]
        tensors = [first.codes if isinstance(first, ops.Coded) else first for first in firsts]
        pairs = zip(tensors, self._coded, strict=True)
        return [tensor for tensor, coded in pairs if coded is not None or tensor.is_floating_point()]

    def tensors(self) -> list[Tensor]:
        """Everything that is stored."""
        return [tensor for feature in self.slots for tensor in feature]

    def clear(self) -> None:
        self.lanes = [[]]
        self.slots.clear()

    def reshaped(self) -> None:
        """The span's calls have other shapes from now on, which no feature fits."""
        self.clear()

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors())

    @property
    def feature_bytes(self) -> int:
        """Of one feature; 0 while there is none."""
        return sum(tensor.nbytes for tensor in self.slots[0]) if self.slots else 0

    @property
    def full_bytes(self) -> int:
        """Of all slots once they are filled; 0 while there is nothing to tell from."""
        return self.capacity * self.feature_bytes

    @property
    def mean_feature_bytes(self) -> int:
        """Of one feature, on average over those of a full history, rounded up."""
        return math.ceil(self.full_bytes / self.capacity)

    @property
    def on_host(self) -> bool:
        return self.slots[0][0].device.type == "cpu"


def row_index(rows: Sequence[int], like: Tensor) -> Tensor:
    """Batch rows as an index for tensors on a device."""
    return ops.shared(tuple(rows), like.device, torch.int64)


def finite(tensors: Sequence[Tensor]) -> Tensor:
    """Whether the tensors hold only finite numbers, as a bool on their device: codes tell it by their scales."""
    sums = [tensor.sum(dtype=torch.float32) for tensor in tensors if tensor.is_floating_point()]
    return torch.stack([one.to(sums[0].device) for one in sums]).isfinite().all() if sums else torch.tensor(True)


def is_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether the tensors hold only finite numbers; reads back to the host, from another device once."""
    if all([tensor.is_cpu for tensor in tensors]):  # there it takes less to read each sum than to join them
        return all([math.isfinite(tensor.sum(dtype=torch.float32)) for tensor in tensors if tensor.is_floating_point()])
    return bool(finite(tensors))


def _is_writable(tensor: Tensor) -> bool:
    """Tensors made in inference mode cannot be written into outside of it."""
    return not tensor.is_inference() or torch.is_inference_mode_enabled()


def writable(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where it cannot be written into."""
    return tensor if _is_writable(tensor) else tensor.clone()


def store(out: Tensor, base: Tensor | None, slot: Tensor | None = None) -> Tensor:
    """out − base, or out where there is no base, in a tensor of its own: `slot` where that serves."""
    if torch.is_grad_enabled():
        out, base = out.detach(), None if base is None else base.detach()
    if slot is not None and not (
        slot.shape == out.shape and slot.dtype == out.dtype and slot.device == out.device and _is_writable(slot)
    ):
        slot = None
    if base is not None:
        return torch.sub(out, base, out=slot)
    return out.clone() if slot is None else slot.copy_(out)


def _store_codes(out: Tensor, base: Tensor | None, code: str, old: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    if torch.is_grad_enabled():
        out, base = out.detach(), None if base is None else base.detach()
    into = None
    if old and old[0].shape == out.shape and old[0].device == out.device and all(map(_is_writable, old)):
        into = ops.Coded(old[0].view(ops.CODES[code]), old[1], out.dtype)
    codes, scales, _ = ops.encode_residual(out, base, code, into)
    return codes.view(torch.uint8), scales
