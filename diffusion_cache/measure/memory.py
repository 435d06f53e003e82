"""Bytes that tensors take while something runs."""

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors made inside the `with` block while they live, on any device.

    A storage counts from the operation that returns it until nothing holds it any more; what existed before does not
    count, nor does what a kernel allocates for itself. live: bytes now. peak: the most at any moment.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._known: dict[int, weakref.ref] = {}  # by the address of the storage

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._add((args, kwargs), made=False)
        result = func(*args, **kwargs)
        self._add(result, made=True)
        self.peak = max(self.peak, self.live)
        return result

    def _add(self, values: Any, made: bool) -> None:
        for value in tree_iter(values):
            if isinstance(value, Tensor) and value.layout is torch.strided:
                storage = value.untyped_storage()
                address = storage._cdata
                if address not in self._known:
                    size = storage.nbytes() if made else 0
                    self.live += size
                    self._known[address] = weakref.ref(storage, functools.partial(self._freed, address, size))

    def _freed(self, address: int, size: int, _: weakref.ref) -> None:
        del self._known[address]
        self.live -= size


def peak_bytes(call: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """The most bytes that call() takes at a time beside what was there before.

    On a CUDA device by its allocator, workspaces of kernels included (the allocator's peak statistics start anew);
    elsewhere by `LiveBytes`.
    """
    device = torch.device(device)
    if device.type != "cuda":
        with LiveBytes() as bytes_of:
            call()
        return bytes_of.peak
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
