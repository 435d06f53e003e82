"""Agreement between ranks that must decide alike.

Sharded denoisers meet in collectives inside their blocks. A block that one rank computes and another skips leaves the
first waiting for ever, and each rank measures its own part of the sequence, so what they measure is made equal first.
"""

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import ConfigError
from ..models import unwrap

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Agree = Callable[[Tensor], Tensor]


def agreement(denoisers: Iterable[nn.Module], group: "ProcessGroup | None" = None) -> Agree | None:
    """What makes measured values [rows] equal on all ranks that must decide alike, with one all-reduce.

    group: of ranks that the user says must; the largest value counts, so that a call is computed everywhere if any
    rank asks for it. Else the group over which diffusers has sharded one of the denoisers, the largest where there
    are several; the mean counts, which is nearest to what an unsharded denoiser would measure. In both, NaN on any
    rank is NaN on all.

    Returns None where no rank shares the work: nothing is sharded, or the group is of one rank. Ranks of plain data
    parallel inference meet nowhere and need no agreement.
    """
    if group is not None:
        return partial(_largest, group=group) if group.size() > 1 else None
    groups = [found for denoiser in denoisers if (found := sharding_group(denoiser)) is not None]
    return partial(_mean, group=max(groups, key=lambda found: found.size())) if groups else None


def sharding_group(denoiser: nn.Module) -> "ProcessGroup | None":
    """The ranks over which diffusers' `enable_parallelism` has split a denoiser's sequence or weights, if any."""
    config = getattr(unwrap(denoiser), "_parallel_config", None)
    context, tensor = (getattr(config, f"{kind}_parallel_config", None) for kind in ("context", "tensor"))
    mesh = context._flattened_mesh if context is not None else tensor._mesh if tensor is not None else None
    return mesh.get_group() if mesh is not None and mesh.size() > 1 else None


def checked_group(group: Any) -> "ProcessGroup | None":
    """The group as it is, or None for None.

    Raises:
        ConfigError: if it is no process group, or this rank is not in it.
    """
    if group is None or (dist.is_available() and isinstance(group, dist.ProcessGroup)):
        return group
    raise ConfigError(
        f"group must be a torch.distributed.ProcessGroup that this rank belongs to, not {group!r}; "
        "a device mesh's is mesh.get_group()"
    )


def _mean(measured: Tensor, group: "ProcessGroup") -> Tensor:
    shared = measured.float() / group.size()  # a sum carries NaN along by itself
    dist.all_reduce(shared, group=group)
    return shared


def _largest(measured: Tensor, group: "ProcessGroup") -> Tensor:
    values = measured.float()
    unknown = values.isnan()  # sent along: what the maximum of a NaN is depends on the backend
    both = torch.stack([values.masked_fill(unknown, -math.inf), unknown.float()])
    dist.all_reduce(both, dist.ReduceOp.MAX, group=group)
    return both[0].masked_fill(both[1] > 0, math.nan)
