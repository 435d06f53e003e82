"""A stand-in for CUDA graphs on the CPU: operations are recorded with the memory they read and write, and repeated.

A replay runs no Python of whoever was captured. It reads what the recorded memory holds by then, and nothing of tensors
that came later, of numbers that Python held, or of weights that have moved. Memory that a graph has made holds NaN
whenever another graph of its pool was replayed since, for it may be another's by then.
"""

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
DEPENDENT = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}


class RecordedGraph(TorchDispatchMode):
    """One capture. pool: what it and the other graphs of its pool have made."""

    def __init__(self, pool):
        super().__init__()
        self.operations = []
        self.replays = 0
        self.pool = pool
        self._own = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not {torch.Tensor, torch.nn.Parameter}.issuperset(types):
            return NotImplemented  # a tensor that stands for operations: those come here as well
        if _waits(operator, args):
            raise RuntimeError(f"operation not permitted when stream is capturing: {operator}")
        before = {tensor.untyped_storage().data_ptr() for tensor in _tensors((args, kwargs))}
        fixed = _aliases((args, kwargs))  # of the memory as it is now, whatever it is given up for later
        result = operator(*args, **kwargs)
        made = [(i, leaf) for i, leaf in enumerate(pytree.tree_leaves(result)) if isinstance(leaf, torch.Tensor)]
        new = [(i, leaf.detach()) for i, leaf in made if leaf.untyped_storage().data_ptr() not in before]
        if new or operator._schema.is_mutable:
            self.operations.append((operator, *fixed, new))
        self._own += [tensor for _, tensor in new]
        return result

    def finish(self):
        self.pool += self._own

    def replay(self):
        self.replays += 1
        with torch.no_grad():
            for tensor in self.pool:
                _spoil(tensor)
            for operator, args, kwargs, new in self.operations:
                leaves = pytree.tree_leaves(operator(*args, **kwargs))
                for i, tensor in new:
                    tensor.copy_(leaves[i])


class RecordingCapturer:
    """In place of `engine.graphs.Capturer`. graphs: all that were captured."""

    def __init__(self):
        self.graphs = []

    def warm(self, body):
        return body()

    def capture(self, body, beside):
        graph = RecordedGraph([] if beside is None else beside.pool)
        with graph:
            made = body()
        graph.finish()
        self.graphs.append(graph)
        return graph, made

    @property
    def replays(self):
        return sum(graph.replays for graph in self.graphs)


def _waits(operator, args):
    """Whether the host waits for the device, or pageable memory is brought there."""
    if operator in INDEXED:
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    from_host = operator in (aten.lift_fresh.default, aten.lift_fresh_copy.default)
    return from_host or not DEPENDENT.isdisjoint(operator.tags)


def _tensors(value):
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _aliases(value):
    return pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.detach(), value)


def _spoil(tensor):
    if tensor.is_floating_point() or tensor.is_complex():
        tensor.fill_(float("nan"))
    else:
        tensor.fill_(1)
