"""The past features of one span in one pass: a ring of fixed slots."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Leaf:
    """One tensor of a span's output: its residual against the input called `base`, or the output itself (base None)."""

    base: int | str | None


class History:
    """Up to `capacity` features, oldest first. A feature is one tensor per leaf of the span's output.

    Slots are allocated once and written in place, so memory never exceeds capacity × the feature's bytes.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.nodes: list[float] = []
        self.slots: list[list[Tensor]] = []

    def __len__(self) -> int:
        return len(self.nodes)

    def observe(self, node: float, outputs: Sequence[Tensor], bases: Sequence[Tensor | None]) -> None:
        """Store outputs[i] − bases[i], or a copy of outputs[i] where there is no base, as the feature of step `node`.

        A feature of the same step is replaced. Whatever fails leaves the history empty rather than half written.
        """
        replaced = bool(self.nodes) and self.nodes[-1] == node
        if replaced:
            slot: list[Tensor | None] = list(self.slots.pop())
            self.nodes.pop()
        elif len(self.slots) == self.capacity:
            slot = list(self.slots.pop(0))
            self.nodes.pop(0)
        else:
            slot = [None] * len(outputs)
        try:
            feature = [_store(out, base, old) for out, base, old in zip(outputs, bases, slot, strict=True)]
        except Exception:
            self.clear()
            raise
        self.slots.append(feature)
        self.nodes.append(node)

    def leaf(self, index: int) -> list[Tensor]:
        """The stored tensors of one leaf, oldest first."""
        return [feature[index] for feature in self.slots]

    def clear(self) -> None:
        self.nodes.clear()
        self.slots.clear()

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for feature in self.slots for tensor in feature)

    @property
    def on_host(self) -> bool:
        return self.slots[-1][0].device.type == "cpu"

    def is_finite(self, newest: int = 1) -> bool:
        """Whether the newest features hold only finite numbers; reads a sum of each tensor back to the host."""
        features = self.slots[-newest:]
        return all(bool(tensor.sum(dtype=torch.float32).isfinite()) for feature in features for tensor in feature)


def _store(out: Tensor, base: Tensor | None, slot: Tensor | None) -> Tensor:
    if torch.is_grad_enabled():
        out, base = out.detach(), None if base is None else base.detach()
    if slot is not None and (slot.shape != out.shape or slot.dtype != out.dtype or slot.device != out.device):
        slot = None
    if base is not None:
        return torch.sub(out, base, out=slot)
    return out.clone() if slot is None else slot.copy_(out)
