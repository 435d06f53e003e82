"""A stand-in for a side stream: copies are made when they are waited for, and hold nonsense before."""

import torch

from diffusion_cache.offload import Carrier


class LateCarrier(Carrier):
    """made, asked: copies that were made and asked for. What is read too early is NaN, or codes of nothing."""

    def __init__(self):
        self.queue = []
        self.made = 0

    @property
    def asked(self):
        return len(self.queue)

    def out(self, tensors):
        return self._later(tensors)

    def back(self, tensors):
        return self._later(tensors), self.asked

    def wait(self, tensors, event):
        while self.made < event:
            into, tensor = self.queue[self.made]
            into.copy_(tensor)
            self.queue[self.made] = None
            self.made += 1

    def finish(self):
        self.wait([], self.asked)

    def _later(self, tensors):
        copies = [torch.full_like(tensor, float("nan") if tensor.is_floating_point() else 255) for tensor in tensors]
        self.queue += zip(copies, tensors, strict=True)
        return copies
