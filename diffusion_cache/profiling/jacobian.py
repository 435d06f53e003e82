"""How much a denoiser's output changes with its input and with the noise level: what SenCache decides by."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..context import noise_share
from ..engine import Method, Observer
from ..engine.frame import Frame
from ..engine.observer import Again
from ..engine.structure import first_tensor, sample_of, with_sample
from ..errors import ConfigError
from ..forecasters import Reuse
from ..policies import Guarded, Interval
from .generation import Batch, attached


@dataclass(frozen=True)
class Norms:
    """Options of policy sencache, by their names: one norm for each of the noise levels (log-SNR) of a run's steps."""

    input_norm: tuple[float, ...]
    time_norm: tuple[float, ...]
    levels: tuple[float, ...]


class _Call(NamedTuple):
    step: int
    time: float
    sample: Tensor
    output: Tensor


class _Norms(Observer):
    def __init__(self) -> None:
        self.before: dict[Any, _Call] = {}
        self.by_step: dict[int, list[Tensor]] = defaultdict(list)  # [2, rows] each
        self.levels: dict[int, float] = {}

    def denoiser_called(self, frame: Frame, output: Any, again: Again) -> None:
        sample, level = sample_of(*frame.called), frame.step.noise_level
        if not isinstance(sample, Tensor) or level is None:
            raise ConfigError(
                "norms are measured where the sample is one tensor and the sampler tells its noise levels"
            )
        given = first_tensor(output).detach().clone()
        now = _Call(frame.step.index, noise_share(level), sample.detach().clone(), given)
        before = self.before.get(frame.key)
        if before is not None and before.step == now.step - 1 and before.sample.shape == now.sample.shape:
            # from one step to the next by way of the old input at the new time: what either has done to the output
            between = first_tensor(again(True, with_sample(*frame.called, before.sample))).detach()
            by_input = _size(now.output - between) / _size(now.sample - before.sample)
            by_time = _size(between - before.output) / abs(now.time - before.time)
            self.by_step[now.step].append(torch.stack([by_input, by_time]).cpu())
        self.before[frame.key] = now
        self.levels[now.step] = level


def norms(batches: Sequence[Batch]) -> Norms:
    """‖J_z‖ and |J_t| at each step of uncached generations, by finite differences along their own path.

    Sizes are root mean squares over elements. At step s, ‖J_z‖ = |v(z_s, t_s) − v(z_{s−1}, t_s)| / |z_s − z_{s−1}| and
    |J_t| = |v(z_{s−1}, t_s) − v(z_{s−1}, t_{s−1})| / |t_s − t_{s−1}|, means over samples and passes; one call of the
    denoiser more for each. Step 0, which is never reused, takes those of step 1. batches: of fitting samples.

    Raises:
        ConfigError: for runs of one step, samplers that tell no noise levels, and values that are not finite.
    """
    watching = _Norms()
    for batch in batches:
        watching.before.clear()
        with attached(batch.pipe, Method(Guarded(Interval(1)), Reuse(), "denoiser"), watching):
            batch.call()
    steps = range(1, max(watching.levels, default=0) + 1)
    if not steps or not all(watching.by_step[step] for step in steps):
        raise ConfigError("norms are measured from step to step: there must be two or more, of one size")
    means = [torch.cat(watching.by_step[step], dim=1).mean(1) for step in steps]
    found = torch.stack([means[0], *means], dim=1)  # [2, T]
    if not bool(found.isfinite().all()):
        raise ConfigError("the uncached generations are not finite, or stand still: no norms can be measured of them")
    levels = tuple(watching.levels[step] for step in range(len(means) + 1))
    return Norms(tuple(found[0].tolist()), tuple(found[1].tolist()), levels)


def _size(difference: Tensor) -> Tensor:
    return difference.float().flatten(1).square().mean(1).sqrt()
