"""Features that wait in host memory between the calls that use them.

What a span stores is copied out as soon as it is stored, and brought back shortly before the span is reused, beside
what the device is doing: by a stream of its own, which is waited for by events alone, never by the host. What was
brought back is let go of as soon as it is used, so that only the features of the spans that run now and next are on
the device.
"""

import copy
import functools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .history import History, finite

MOST_LEAVING = 2  # features at a time: the device waits for an older one to be copied


class Carrier(ABC):
    """Copies tensors from a device to the host and back, in the order of its calls and beside the device's own work."""

    @property
    def leaving_bytes(self) -> int:
        """Of what `out` was given and keeps on the device."""
        return 0

    @abstractmethod
    def out(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Host tensors that will hold what these hold now. They are not to be written into any more."""

    @abstractmethod
    def back(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], Any]:
        """Device tensors that will hold what these host tensors will, and the event to wait for before reading them."""

    @abstractmethod
    def wait(self, tensors: Sequence[Tensor], event: Any) -> None:
        """Have the device's work from here on find these tensors, of `back`, filled."""

    @abstractmethod
    def finish(self) -> None:
        """Wait for all copies, so that the host may read what `out` gave."""


class HostCarrier(Carrier):
    """Plain copies, for a denoiser that is on the host itself."""

    def out(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [tensor.clone() for tensor in tensors]

    def back(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], Any]:
        return [tensor.clone() for tensor in tensors], None

    def wait(self, tensors: Sequence[Tensor], event: Any) -> None:
        pass

    def finish(self) -> None:
        pass


class Leaving(NamedTuple):
    """Tensors on their way to the host, the stream that their memory is given again on, and the event of the copies."""

    tensors: list[Tensor]
    stream: Any
    copied: Any


class CudaCarrier(Carrier):
    """Copies between a CUDA device and pinned host memory, all on one side stream, so that they keep their order.

    Memory is let go of in one of two ways, with no `record_stream`, for what that withholds until an event is completed
    cannot be had again by a host that runs ahead. What leaves is kept until its stream has been told to wait for the
    copy. What came back is let go of by whoever used it, and the side stream is told to wait for all use so far before
    it writes into memory that it got.
    """

    def __init__(self, device: torch.device):
        self._device = device
        current = torch.cuda.current_stream(device)
        self._stream = _side_stream(current)
        self._users = {current}  # streams that use what comes back, also what other runs brought there
        self._left = 0  # how often `out` was called
        self._leaving: dict[int, Leaving] = {}  # by the number of that call

    @property
    def leaving_bytes(self) -> int:
        return sum(tensor.nbytes for leaving in self._leaving.values() for tensor in leaving.tensors)

    def out(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            host = [torch.empty_like(tensor, device="cpu", pin_memory=True) for tensor in tensors]
            for into, tensor in zip(host, tensors, strict=True):
                into.copy_(tensor, non_blocking=True)
        self._left += 1
        self._leaving[self._left] = Leaving([*tensors], current, self._stream.record_event())
        self._let_go(self._left - MOST_LEAVING)
        return host

    def back(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], Any]:
        with torch.cuda.stream(self._stream):
            here = [torch.empty_like(tensor, device=self._device) for tensor in tensors]
            for user in self._users:  # after the memory was got: all use of what it held before is enqueued by now
                self._stream.wait_stream(user)
            for into, tensor in zip(here, tensors, strict=True):
                into.copy_(tensor, non_blocking=True)
            return here, (self._stream.record_event(), self._left)

    def wait(self, tensors: Sequence[Tensor], event: Any) -> None:
        filled, left = event
        current = torch.cuda.current_stream(self._device)
        self._users.add(current)
        current.wait_event(filled)
        self._let_go(left)  # copied before these tensors were

    def finish(self) -> None:
        self._stream.synchronize()
        self._leaving.clear()

    def _let_go(self, last: int) -> None:
        """Of what left by that call of `out` or before it."""
        for number in [number for number in self._leaving if number <= last]:
            leaving = self._leaving.pop(number)
            leaving.stream.wait_event(leaving.copied)


@functools.cache
def _side_stream(current: torch.cuda.Stream) -> torch.cuda.Stream:
    """One for all runs on a stream: memory is given again only on the stream that it was got on."""
    return torch.cuda.Stream(current.device)


def release_pinned() -> None:
    """Have the system take back the pinned memory that no tensor holds."""
    release = getattr(torch._C, "_host_emptyCache", None)
    if release is not None and torch.cuda.is_initialized():
        release()


def carrier(device: torch.device) -> Carrier:
    return CudaCarrier(device) if device.type == "cuda" else HostCarrier()


class Arrival(NamedTuple):
    """The slots of a history on the device, or on their way there until the event."""

    slots: list[list[Tensor]]
    event: Any

    @property
    def tensors(self) -> list[Tensor]:
        return [tensor for slot in self.slots for tensor in slot]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


class Offload:
    """Where the features of one run are: their histories hold host tensors, and arrivals what was asked for of them.

    resident_bytes: the most that features have taken on the device at once, those of the last span used among them and
        those on their way to the host.
    finite: of each history, whether all that was ever stored is, as a bool on its device.
    """

    def __init__(self) -> None:
        self.resident_bytes = 0
        self.finite: dict[History, Tensor] = {}
        self._carriers: dict[torch.device, Carrier] = {}
        self._device: dict[History, torch.device] = {}
        self._arrivals: dict[History, Arrival] = {}
        self._used = 0  # bytes of what was handed out last

    def observe(
        self,
        history: History,
        node: float,
        outputs: Sequence[Tensor],
        bases: Sequence[Tensor | None],
        rows: Sequence[int] | None = None,
        batch: int = 0,
    ) -> None:
        """`History.observe`, and what was stored on its way to the host."""
        device = self._device[history] = outputs[0].device
        if device not in self._carriers:
            self._carriers[device] = carrier(device)
        waiting = history.slots
        if history and history.reads_to_observe(rows):
            history.slots = self.held(history).slots
        else:
            history.slots = [[] for _ in waiting]  # what is stored anew is not written over what waits
        self.drop(history)
        history.observe(node, outputs, bases, rows, batch)
        here = finite(history.tensors())
        self.finite[history] = here & self.finite[history] if history in self.finite else here
        self._used = history.nbytes
        self._count()
        history.slots = [
            self._carriers[device].out(slot) if slot else waiting[i] for i, slot in enumerate(history.slots)
        ]
        self._used = 0

    def fetch(self, history: History) -> None:
        """Have a history's features brought to the device, if they are not on their way."""
        if not history or history in self._arrivals:
            return
        sizes = [len(slot) for slot in history.slots]
        tensors, event = self._carriers[self._device[history]].back(history.tensors())
        self._arrivals[history] = Arrival([[tensors.pop(0) for _ in range(size)] for size in sizes], event)
        self._count()

    def held(self, history: History) -> History:
        """What a history holds, on the device, for the work that is asked of it now."""
        self._used = 0
        self.fetch(history)
        arrival = self._arrivals.pop(history)
        self._carriers[self._device[history]].wait(arrival.tensors, arrival.event)
        self._used = arrival.nbytes
        here = copy.copy(history)
        here.slots = arrival.slots
        return here

    def drop(self, history: History) -> None:
        """What was asked for is of no use any more."""
        self._arrivals.pop(history, None)

    def finish(self) -> None:
        """Bring all to rest, so that the host may read what histories hold."""
        self._arrivals.clear()
        for each in self._carriers.values():
            each.finish()

    def release(self) -> None:
        """After `finish`, let go of all histories."""
        self._device.clear()
        self.finite.clear()

    def _count(self) -> None:
        taken = self._used + sum(arrival.nbytes for arrival in self._arrivals.values())
        taken += sum(each.leaving_bytes for each in self._carriers.values())
        self.resident_bytes = max(self.resident_bytes, taken)
