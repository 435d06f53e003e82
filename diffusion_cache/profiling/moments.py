"""Second moments of one span's features over a profiling pass: Gram matrices over step pairs, and channel moments."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import ops
from ..errors import ConfigError
from .sketch import DEFAULT_WIDTH, CountSketch, Exact, make_sketch

Leaves = Tensor | Sequence[Tensor | None]


class Sums:
    """Named float64 sums on the host. Sums over disjoint sets of samples add up to the sums over all of them."""

    def __init__(self, name: str):
        self.name = name
        self.sums: dict[str, Tensor] = {}

    def add(self, key: str, value: Tensor, at: tuple[int, ...] = (), shape: Sequence[int] | None = None) -> None:
        """Add a value to a sum, or to its entry `at`; shape: of a sum that may not exist yet, default the value's."""
        if key not in self.sums:
            with torch.inference_mode(False):  # a tensor made in inference mode could not be added to outside of it
                self.sums[key] = torch.zeros(tuple(value.shape if shape is None else shape), dtype=torch.float64)
        self.sums[key][at] += value.to("cpu", torch.float64)

    def merge(self, other: "Sums") -> None:
        """Add what another process summed over other samples.

        Raises:
            ConfigError: if the two do not describe the same span at the same size and number of steps.
        """
        if other.name != self.name:
            raise ConfigError(f"cannot merge what was measured of {other.name} into {self.name}")
        self._check(other.sums)
        for key, value in other.sums.items():
            self.add(key, value)

    def state_dict(self) -> dict[str, Tensor]:
        """The sums of all finished runs, as flat named tensors."""
        return {key: value.clone() for key, value in self.sums.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Replace the sums by stored ones.

        Raises:
            ConfigError: if they are of another span size or number of steps.
        """
        self._check(state)
        self.sums = {key: value.to("cpu", torch.float64, copy=True) for key, value in state.items()}

    def _check(self, state: Mapping[str, Tensor]) -> None:
        for key, value in state.items():
            own = self.sums.get(key)
            if own is not None and own.shape != value.shape:
                raise ConfigError(
                    f"{self.name}: {key} is {tuple(value.shape)} where {tuple(own.shape)} was expected: profile all "
                    "samples with one size, number of steps and guidance"
                )

    @property
    def nbytes(self) -> int:
        return sum(value.nbytes for value in self.sums.values())


def ran(grams: Any) -> NDArray[np.bool_]:
    """The steps that were seen, bool [..., T], by Gram matrices [..., T, T] of `SpanMoments`, 0 where none was."""
    return np.asarray(grams).diagonal(axis1=-2, axis2=-1) > 0


class Observed(NamedTuple):
    """What is kept of one step until the run ends; inputs None where no leaf has one. Sums over the batch."""

    features: Tensor
    inputs: Tensor | None
    mean: Tensor
    square: Tensor


class SpanMoments(Sums):
    """Inner products of one span's features in one pass over all pairs of steps, and their moments per channel.

    The features of a run's steps wait on the host, whole while those of one sample take at most `exact_bytes` over
    all steps, else as count-sketches (`sketch.py`), until `end_run` folds them into float64 sums over samples: what
    is held depends on the number of steps and the batch, not on the size of a sketched feature.

    A feature is the residual y − x of each leaf that has an input of its shape, in the arithmetic of the model as a
    history stores it, else the output y. A step that was skipped (guidance off, another denoiser) counts as missing and
    is 0 in the results.

    name: of the span and pass, for messages. seed: of the sketch; give processes that profile different samples seeds
    of their own, so that their errors are independent.
    """

    def __init__(
        self,
        name: str,
        steps: int,
        *,
        width: int = DEFAULT_WIDTH,
        exact_bytes: int = 2**23,
        seed: int = 0,
    ):
        super().__init__(name)
        self.steps = steps
        self.width, self.exact_bytes, self.seed = width, exact_bytes, seed
        for key in ("features", "cross", "inputs", "pairs"):  # sums of ⟨f_i, f_j⟩, ⟨f_i, x_t⟩, ⟨x_i, x_j⟩; samples
            self.sums[key] = torch.zeros(steps, steps, dtype=torch.float64)
        self.sums["samples"] = torch.zeros((), dtype=torch.float64)
        self._run: dict[int, Observed] = {}
        self._sketch: Exact | CountSketch | None = None
        self._elements = 0

    @property
    def samples(self) -> int:
        """Samples of all finished runs."""
        return int(self.sums["samples"])

    @property
    def nbytes(self) -> int:
        """Bytes held on the host: the sums, and the features of the unfinished run."""
        return super().nbytes + sum(t.nbytes for seen in self._run.values() for t in seen if t is not None)

    def observe(self, step: int, outputs: Leaves, inputs: Leaves | None = None) -> None:
        """Take in what the span computed at one step of the current run.

        outputs: [B, ...] for each leaf. inputs: for each leaf the input that its residual is taken against; None,
        or one of another shape, where there is no residual. Leaves that are None are left out.

        Raises:
            ConfigError: for a NaN or infinity, a step that was seen already, or one that is out of range; for a
                feature or a batch of another size than the run's others.
        """
        if not 0 <= step < self.steps:
            raise ConfigError(f"{self.name}: step {step} is outside the profile's {self.steps} steps")
        if step in self._run:
            raise ConfigError(f"{self.name} ran twice at step {step}: end each run with end_run()")
        features, bases = _features(outputs, inputs)
        sketch = self._sketch_for(sum(leaf[0].numel() for leaf in features))
        held = sketch(features, self.samples).cpu()
        if not held.isfinite().all():
            raise ConfigError(
                f"{self.name} gave NaN or infinity at step {step}: nothing can be measured from that; try the model in "
                "bfloat16 or float32"
            )
        if self._run and len(held) != len(next(iter(self._run.values())).features):
            raise ConfigError(f"{self.name}: the batch changed its size at step {step}; end each run with end_run()")
        base = None
        if any(leaf is not None for leaf in bases):
            # sketching is linear: a leaf without an input stands for itself with zeros
            whole = [
                out.new_zeros(()).expand_as(out) if x is None else x for out, x in zip(features, bases, strict=True)
            ]
            base = sketch(whole, self.samples).cpu()
        moments = [channel_moments(leaf) for leaf in features]
        mean, square = (torch.cat(parts, dim=1).cpu().double().sum(0) for parts in zip(*moments, strict=True))
        self._run[step] = Observed(held, base, mean, square)

    def end_run(self) -> None:
        """Fold the run's batch into the sums, and drop its features."""
        if not self._run:
            return
        batch = len(next(iter(self._run.values())).features)
        seen = dict(sorted(self._run.items()))
        at = torch.tensor([*seen])
        here = (at[:, None], at)
        for row in range(batch):
            features = torch.stack([item.features[row] for item in seen.values()]).double()
            self.sums["features"][here] += features @ features.T
            if any(item.inputs is not None for item in seen.values()):
                nothing = torch.zeros(features.shape[1])
                rows = [nothing if item.inputs is None else item.inputs[row] for item in seen.values()]
                inputs = torch.stack(rows).double()
                self.sums["cross"][here] += features @ inputs.T
                self.sums["inputs"][here] += inputs @ inputs.T
        self.sums["pairs"][here] += batch
        for step, item in seen.items():
            shape = (self.steps, len(item.mean))
            self.add("channel_mean", item.mean, (step,), shape)
            self.add("channel_square", item.square, (step,), shape)
        self.sums["samples"] += batch
        self._run.clear()

    def merge(self, other: Sums) -> None:
        self._check_finished()
        super().merge(other)

    def state_dict(self) -> dict[str, Tensor]:
        self._check_finished()
        return super().state_dict()

    def result(self) -> dict[str, Tensor]:
        """Means over samples, in squared units of the feature, float64; 0 where no sample ran a step.

        gram_residual[i,j] = ⟨f_i, f_j⟩ and gram_output[i,j] = ⟨y_i, y_j⟩, [T, T], summed over a sample's elements
        (equal where the span has no residual); cross_input[i,t] = ⟨f_i, x_t⟩, [T, T]; input_energy ⟨x_t, x_t⟩, [T]
        (both 0 without a residual); channel_mean and channel_square of the feature, [T, C], the leaves' channels one
        after another.

        Raises:
            ConfigError: if no run was finished.
        """
        self._check_finished()
        if not self.samples:
            raise ConfigError(f"{self.name} was not seen in any finished run: nothing was measured")
        count = self.sums["pairs"].clamp(min=1)
        features, cross, inputs = (self.sums[key] / count for key in ("features", "cross", "inputs"))
        counts = count.diagonal()[:, None]
        return {
            "gram_residual": features,
            "gram_output": features + cross + cross.T + inputs,  # y = f + x
            "cross_input": cross,
            "input_energy": inputs.diagonal(),
            "channel_mean": self.sums["channel_mean"] / counts,
            "channel_square": self.sums["channel_square"] / counts,
        }

    def _sketch_for(self, elements: int) -> Exact | CountSketch:
        if self._sketch is None:
            exact_below = self.exact_bytes // (4 * self.steps)
            self._elements = elements
            self._sketch = make_sketch(elements, exact_below, self.width, self.seed)
        elif elements != self._elements:
            raise ConfigError(
                f"{self.name}: its feature has {elements} elements a sample, but had {self._elements}: "
                "profile all samples at one size"
            )
        return self._sketch

    def _check_finished(self) -> None:
        if self._run:
            raise ConfigError(f"{self.name}: a run is not finished; call end_run() first")


def as_leaves(value: Leaves | None, count: int) -> list[Tensor | None]:
    if value is None:
        return [None] * count
    return [value] if isinstance(value, Tensor) else list(value)


def _features(outputs: Leaves, inputs: Leaves | None) -> tuple[list[Tensor], list[Tensor | None]]:
    """The feature of each leaf that is not None, and the input that it is a residual against."""
    outs = as_leaves(outputs, 1)
    pairs = [
        (out.detach(), None if base is None or base.shape != out.shape else base.detach())
        for out, base in zip(outs, as_leaves(inputs, len(outs)), strict=True)
        if out is not None
    ]
    return [out if base is None else out - base for out, base in pairs], [base for _, base in pairs]


def channel_moments(leaf: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and mean square over positions of each sample's channels: [B, C] each, float32."""
    keep = ops.channel_axis(leaf) % leaf.ndim
    over = [dim for dim in range(1, leaf.ndim) if dim != keep]
    if not over:
        return leaf.float(), leaf.float().square()
    positions = leaf[0].numel() // leaf.shape[keep]
    # a norm, as a square would make a copy of the whole feature
    norm = torch.linalg.vector_norm(leaf, dim=over, dtype=ops.at_least_float32(leaf.dtype)).float()
    return leaf.mean(over, dtype=torch.float32), norm.square() / positions
