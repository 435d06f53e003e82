"""A plan: which steps to compute, with what the others are forecast, and how good and fast that was measured to be."""

import hashlib
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import ConfigError
from .fingerprint import same_levels, start_in
from .plain import Fields, integer, json_object, number, optional, plain_json, text, tuple_of
from .registry import unknown_name
from .schedule import Schedule

FEATURES = ("auto", "residual", "output")
GUARD_SIGNALS = ("input_l1", "input_turn")
HELD_OUT_PROMPTS = "held_out_prompts"  # the names of facts
FITTED_PROMPTS = "fitted_prompts"
REFITTED = "refitted_on"  # of a plan whose weights were fitted to a kind of prompts
LEAST_SPREAD = 0.01  # of a signal, relative to its mean
MAX_HISTORY = 8
MAX_STEPS = 10_000
MAX_CHANNELS = 65_536
MAX_CELLS = 10_000_000  # numbers in one tensor of a plan; steps × passes × spans of its schedule

TENSORS = {"nodes": torch.int32, "weights": torch.float64, "compute": torch.uint8, "correction": torch.float64}
OPTIONAL_TENSORS = frozenset({"correction"})


@dataclass(frozen=True)
class Quality:
    """A metric (higher is better) of held-out samples against their uncached outputs.

    p5: the highest value that fewer than 5% of the samples miss. worst, worst_seed: the lowest value and its seed.
    """

    metric: str
    mean: float
    p5: float
    worst: float
    worst_seed: int
    n: int
    values: tuple[float, ...]
    seeds: tuple[int, ...]

    @classmethod
    def of(cls, metric: str, values: Sequence[float], seeds: Sequence[int]) -> "Quality":
        """From one value and seed a sample; infinity (PSNR of an identical image) is a value, NaN is not.

        Raises:
            ConfigError: without values, for a NaN, or another number of seeds than of values.
        """
        values, seeds = tuple(float(value) for value in values), tuple(int(seed) for seed in seeds)
        if not values or len(values) != len(seeds):
            raise ConfigError(f"{metric}: {len(values)} values and {len(seeds)} seeds; give one of each a sample")
        if any(math.isnan(value) for value in values):
            raise ConfigError(f"{metric} of seed {seeds[[math.isnan(v) for v in values].index(True)]} is NaN")
        ranked = sorted(values)
        return cls(
            metric=metric,
            mean=statistics.fmean(values),
            p5=ranked[(len(values) - 1) // 20],
            worst=ranked[0],
            worst_seed=seeds[values.index(ranked[0])],
            n=len(values),
            values=values,
            seeds=seeds,
        )

    def to_json(self) -> dict[str, Any]:
        return plain_json({"metric": self.metric, "values": self.values, "seeds": self.seeds})

    @classmethod
    def from_json(cls, value: Any, where: str) -> "Quality":
        """The figures are computed again from the values, so that they cannot disagree with them."""
        fields = Fields(value, where)
        stored = fields("metric", text), fields("values", tuple_of(number)), fields("seeds", tuple_of(integer))
        fields.end()
        return cls.of(*stored)


@dataclass(frozen=True)
class Speed:
    """Uncached time over the plan's time: median over pairs of runs, with the spread of the pairs."""

    ratio: float
    low: float
    high: float
    device: str
    batch: int

    def __post_init__(self) -> None:
        if not 0 < self.low <= self.ratio <= self.high < math.inf:
            raise ConfigError(f"a speed of {self.ratio} cannot have a spread from {self.low} to {self.high}")

    def to_json(self) -> dict[str, Any]:
        return plain_json(vars(self))

    @classmethod
    def from_json(cls, value: Any, where: str) -> "Speed":
        fields = Fields(value, where)
        speed = cls(
            ratio=fields("ratio", number),
            low=fields("low", number),
            high=fields("high", number),
            device=fields("device", text),
            batch=fields("batch", integer),
        )
        fields.end()
        return speed


@dataclass(frozen=True)
class Band:
    """What a signal was at each step of calibration runs that went by the plan.

    signal: of the spans' input x, per sample. "input_l1": mean|x_t − x_{t−1}| / mean|x_{t−1}|; "input_turn": with
    d_t = x_t − x_{t−1}, mean|d_t − d_{t−1}| / mean|d_{t−1}|, which tells when forecasts and computed steps disagree.
    mean, spread (standard deviation): over samples, one a step, NaN where nothing was measured. samples: how many.
    """

    signal: str
    mean: tuple[float, ...]
    spread: tuple[float, ...]
    samples: int

    def __post_init__(self) -> None:
        if self.signal not in GUARD_SIGNALS:
            raise unknown_name("guard signal", self.signal, GUARD_SIGNALS)
        _need("guard", "band", len(self.mean) == len(self.spread), "a mean and a spread for each step")
        _need("guard", "spread", not any(spread < 0 for spread in self.spread), "no negative number")
        _need("guard", "samples", self.samples >= 2, f"at least 2, not {self.samples}")

    def limit(self, step: int, factor: float) -> float | None:
        """The most that the signal may be, `factor` spreads above the mean; None where nothing is known."""
        # where forecasts go on as before, the signal is the same for all samples, to within rounding
        spread = max(self.spread[step], LEAST_SPREAD * self.mean[step])
        limit = self.mean[step] + factor * spread
        return None if math.isnan(limit) else limit

    def to_json(self) -> dict[str, Any]:
        return plain_json(vars(self))

    @classmethod
    def from_json(cls, value: Any, where: str) -> "Band":
        fields = Fields(value, where)
        band = cls(
            signal=fields("signal", text),
            mean=fields("mean", tuple_of(number)),
            spread=fields("spread", tuple_of(number)),
            samples=fields("samples", integer),
        )
        fields.end()
        return band


@dataclass(frozen=True, eq=False)
class Plan:
    """A schedule with the forecaster weights fitted for it. T steps, P passes, S spans, K features.

    schedule: compute[T][P][S]. noise_levels: log-SNR of each step, [T], or empty if the sampler does not tell.
    nodes: int32 [T, S, K], the steps whose features the weights are for, oldest first, −1 in front where there are
    fewer than K. weights: float64 [T, P, S, K], NaN where the step is computed or left to Taylor; without both, all
    are left to it. correction: float64 [T, P, S, 2, C], the scale and the bias that turn a forecast output y into
    scale·y + bias, C = 1 or one for each of its channels, NaN where it stays as it is; None for no correction anywhere.
    An axis of length one stands for all passes or spans. row_passes: guidance branches stacked in the rows of one call.
    sigmas: where the plan moves the sampler's noise levels to, in its own unit, [T], if it moves them; noise_levels are
    those it has by itself.
    nfe: denoiser evaluations per pass, spans counted by their share; None for those of the schedule. facts: JSON
    values on how it was made. quality, speed: measured on held-out samples, None if they were not. guard: what a run
    must keep to, if it is to be watched; for plans that compute all of a step or nothing.
    """

    name: str
    scope: str
    depth: int | None
    feature: str
    schedule: Schedule
    noise_levels: tuple[float, ...]
    nodes: Tensor = None  # type: ignore[assignment]  # __post_init__ makes those of a plan without weights
    weights: Tensor = None  # type: ignore[assignment]
    correction: Tensor | None = None
    row_passes: int = 1
    sigmas: tuple[float, ...] | None = None
    nfe: float = None  # type: ignore[assignment]  # __post_init__ counts the schedule's
    facts: Mapping[str, Any] = field(default_factory=dict)
    quality: Quality | None = None
    speed: Speed | None = None
    guard: Band | None = None

    def __repr__(self) -> str:
        return f"Plan({self.name!r}, scope={self.scope!r}, {self.nfe:.4g} evaluations in {self.total} steps)"

    def __post_init__(self) -> None:
        if self.nfe is None:
            object.__setattr__(self, "nfe", self.schedule.nfe)
        if self.nodes is None and self.weights is None:
            nothing = torch.full((self.total, 1, 1, 1), math.nan, dtype=torch.float64)
            object.__setattr__(self, "nodes", torch.full((self.total, 1, 1), -1, dtype=torch.int32))
            object.__setattr__(self, "weights", nothing)
        if self.nodes is None or self.weights is None:
            raise ConfigError(f"plan {self.name!r}: nodes and weights belong together, give both or neither")
        self._check()

    def _check(self) -> None:
        where, steps, compute = f"plan {self.name!r}", self.total, self.schedule.compute
        shapes = {(len(row), *map(len, row)) for row in compute}
        passes, *spans = next(iter(shapes))
        if len(shapes) > 1 or len(set(spans)) != 1 or not passes or not spans[0]:
            raise ConfigError(f"{where}: the schedule must have the same passes and spans at each step")
        if self.feature not in FEATURES:
            raise ConfigError(f"{where}: feature must be one of {', '.join(FEATURES)}, not {self.feature!r}")
        if steps > MAX_STEPS or steps * passes * spans[0] > MAX_CELLS:
            raise ConfigError(f"{where}: {steps} steps × {passes} passes × {spans[0]} spans are too many for a plan")
        _need(where, "noise levels", len(self.noise_levels) in (0, steps), f"one for each of {steps} steps")
        _need(where, "noise levels", not any(map(math.isnan, self.noise_levels)), "no NaN")
        _need(where, "NFE", 0 < self.nfe < math.inf, f"a positive number, not {self.nfe}")
        _need(where, "depth", self.depth is None or self.depth >= 0, f"0 or more, not {self.depth}")
        _need(where, "row passes", self.row_passes >= 1, f"at least 1, not {self.row_passes}")
        if self.sigmas is not None:
            _need(where, "sigmas", len(self.sigmas) == steps, f"one for each of {steps} steps")
            _need(where, "sigmas", all(map(math.isfinite, self.sigmas)), "finite numbers")
        check_facts(self.facts, where)
        if self.guard is not None:
            _need(where, "guard", len(self.guard.mean) == steps, f"a band for each of {steps} steps")
            _need(where, "guard", passes == spans[0] == 1, "a schedule that computes all of a step or nothing")

        for name, tensor in self._stored().items():
            _need(where, name, tensor.dtype == TENSORS[name], f"dtype {TENSORS[name]}, not {tensor.dtype}")
            _need(where, name, tensor.numel() <= MAX_CELLS, f"at most {MAX_CELLS:,} numbers, not {tensor.numel():,}")
        nodes, weights = self.nodes, self.weights
        _need(where, "nodes", nodes.ndim == 3 and weights.ndim == 4, "3 axes [T, S, K], and 4 [T, P, S, K] for weights")
        history = nodes.shape[2]
        _need(where, "nodes", 1 <= history <= MAX_HISTORY, f"1 to {MAX_HISTORY} a step")
        axes = [{1, size, count} for size, count in zip((passes, spans[0]), weights.shape[1:3], strict=True)]
        fitting = all(len(sizes - {1}) <= 1 and 0 not in sizes for sizes in axes)
        fitting = fitting and (*weights.shape[:3], history) == weights.shape
        if not fitting or nodes.shape[:2] != (steps, weights.shape[2]) or len(weights) != steps:
            found = f"{tuple(nodes.shape)} and {tuple(weights.shape)}"
            raise ConfigError(
                f"{where}: nodes [T, S, K] and weights [T, P, S, K] have shapes {found}, "
                f"the schedule has T={steps}, P={passes}, S={spans[0]}"
            )
        self._check_values(where)

    def _check_values(self, where: str) -> None:
        nodes, weights = self.nodes, self.weights
        given = nodes >= 0
        in_order = (nodes[..., 1:] > nodes[..., :-1]) | (nodes[..., :-1] == -1)
        earlier = nodes < torch.arange(len(nodes))[:, None, None]
        _need(where, "nodes", bool(in_order.all() and earlier.all() and (nodes >= -1).all()), "earlier steps, in order")

        fitted = torch.isfinite(weights).any(dim=3)  # [T, P, S]
        slots = given[:, None].expand_as(weights)
        complete = torch.where(slots, torch.isfinite(weights), weights.isnan() | (weights == 0)).all(dim=3)
        _need(where, "weights", bool((fitted & complete | weights.isnan().all(dim=3)).all()), "finite at each node")
        computed = self.computed()
        reused = _where_any(~computed, weights)
        _need(where, "weights", bool((reused | ~fitted).all()), "NaN where the step is computed")
        # a node's feature exists only in passes and spans that computed it
        step, pass_index, span, slot = torch.nonzero(fitted[..., None] & slots, as_tuple=True)
        known = _where_any(computed, weights)[nodes[step, span, slot].long(), pass_index, span]
        _need(where, "nodes", bool(known.all()), "computed steps")
        if self.correction is not None:
            shape = self.correction.shape
            sound = len(shape) == 5 and shape[:4] == (*weights.shape[:3], 2) and 1 <= shape[4] <= MAX_CHANNELS
            _need(where, "correction", sound, f"[T, P, S, 2, C] with the weights' T, P and S, not {list(shape)}")
            corrected = torch.isfinite(self.correction).all(dim=(3, 4))
            whole = corrected | self.correction.isnan().all(dim=4).all(dim=3)
            _need(where, "correction", bool(whole.all()), "all of an entry finite, or all of it NaN")
            _need(where, "correction", bool((fitted | ~corrected).all()), "NaN where there are no weights")

    @property
    def total(self) -> int:
        """Steps."""
        return self.schedule.total

    @property
    def passes(self) -> int:
        """Passes told apart; one stands for all."""
        return max(len(self.schedule.compute[0]), self.weights.shape[1])

    @property
    def spans(self) -> int:
        """Spans told apart; one stands for all."""
        return max(len(self.schedule.compute[0][0]), self.weights.shape[2])

    @property
    def history(self) -> int:
        """Features that the weights are for."""
        return self.nodes.shape[2]

    @property
    def held_out_prompts(self) -> int | None:
        """How many different texts the samples behind `quality` are of, if that was told."""
        told = self.facts.get(HELD_OUT_PROMPTS)
        return told if isinstance(told, int) else None

    def fitted_to(self, prompts: Iterable[str]) -> "Plan":
        """The plan with a note of texts that it was fitted or chosen on, as digests, beside those noted before."""
        told = self._fitted_prompts | {_digest(prompt) for prompt in prompts}
        return replace(self, facts={**self.facts, FITTED_PROMPTS: sorted(told)})

    def is_fitted_to(self, prompt: str) -> bool:
        """Whether it was fitted or chosen on this text, as far as it was told."""
        return _digest(prompt) in self._fitted_prompts

    @property
    def _fitted_prompts(self) -> frozenset[str]:
        told = self.facts.get(FITTED_PROMPTS)
        return (
            frozenset(one for one in told if isinstance(one, str)) if isinstance(told, (list, tuple)) else frozenset()
        )

    def stating(self, quality: Quality, prompts: int | None) -> "Plan":
        """The plan with what was measured now. prompts: how many different texts it is of; None for classes."""
        facts = {name: fact for name, fact in self.facts.items() if name != HELD_OUT_PROMPTS}
        told = {} if prompts is None else {HELD_OUT_PROMPTS: prompts}
        return replace(self, quality=quality, facts={**facts, **told})

    def computed(self) -> Tensor:
        """The schedule as a bool tensor [T, P, S]."""
        return torch.tensor(self.schedule.compute, dtype=torch.bool)

    def resampled(self, noise_levels: Sequence[float]) -> "Plan":
        """The plan for a run with other noise levels (log-SNR, one a step): another number of steps, another shift.

        Where they are this plan's own to within 1e-3 step by step, the plan itself. Where they are a part of its own
        (image to image, a run that ends early), its steps there, and the weights that are for features of these alone.
        Otherwise the share of computed steps and the noise levels where they are dense are kept, of those that the run
        goes through, while the weights (Taylor takes their place), their corrections, moved sigmas and what was
        measured are dropped. A plan without noise levels is stretched to the number of steps.
        """
        if self.noise_levels and same_levels(self.noise_levels, noise_levels):
            return self
        total, history = len(noise_levels), self.history
        places = positions(self.noise_levels, noise_levels, self.total)
        first = start_in(self.noise_levels, noise_levels)
        if first is not None:
            return self._part(first, first + total)

        @cache
        def lane(steps: tuple[int, ...]) -> frozenset[int]:
            return frozenset(_resampled_steps(steps, places))

        computed = self.computed()
        _, passes, spans = computed.shape
        after = torch.zeros(total, passes, spans, dtype=torch.bool)
        for p in range(passes):
            for s in range(spans):
                after[list(lane(tuple(computed[:, p, s].nonzero().flatten().tolist()))), p, s] = True
        shape = (total, self.weights.shape[1], self.weights.shape[2], history)
        nodes = torch.full((total, shape[2], history), -1, dtype=torch.int32)
        return self._for_levels(noise_levels, after, nodes, torch.full(shape, math.nan, dtype=torch.float64))

    def _part(self, first: int, end: int) -> "Plan":
        """The plan for a run of some of its steps in succession, the first of which is computed."""
        computed = self.computed()[first:end]
        computed[0] = True
        nodes, weights = self.nodes[first:end], self.weights[first:end].clone()
        held = ((nodes == -1) | (nodes >= first)).all(dim=2)  # [T, S]
        held[0] = False
        held &= self.sigmas is None  # which the weights were chosen with
        weights[~held[:, None, :, None].expand_as(weights)] = math.nan
        nodes = torch.where(held[..., None] & (nodes >= 0), nodes - first, -1)
        correction = None if self.correction is None else self.correction[first:end].clone()
        if correction is not None:
            correction[weights.isnan().all(dim=3)] = math.nan
        return self._for_levels(self.noise_levels[first:end], computed, nodes, weights, correction)

    def _for_levels(
        self,
        noise_levels: Sequence[float],
        computed: Tensor,
        nodes: Tensor,
        weights: Tensor,
        correction: Tensor | None = None,
    ) -> "Plan":
        """For another kind of run, without what was measured."""
        schedule = _schedule(computed)
        return replace(
            self,
            schedule=schedule,
            noise_levels=tuple(float(level) for level in noise_levels),
            nodes=nodes,
            weights=weights,
            correction=correction,
            sigmas=None,
            nfe=self._nfe_of(schedule),
            facts={**self.facts, "resampled_from_steps": self.total},
            quality=None,
            speed=None,
            guard=None,
        )

    def _nfe_of(self, schedule: Schedule) -> float:
        """A reused step costs the same share of an evaluation as in this plan."""
        computed, reused = self.schedule.nfe, self.total - self.schedule.nfe
        share = (self.nfe - computed) / reused if reused else 0.0
        return schedule.nfe + share * (schedule.total - schedule.nfe)

    def to_json(self) -> dict[str, Any]:
        """All but the tensors, as plain JSON values."""
        names = ("name", "scope", "depth", "feature", "noise_levels", "row_passes", "sigmas", "nfe", "facts")
        stored = {name: plain_json(getattr(self, name)) for name in names}
        stored["quality"] = self.quality and self.quality.to_json()
        stored["speed"] = self.speed and self.speed.to_json()
        if self.guard is not None:
            stored["guard"] = self.guard.to_json()
        return stored

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that belong to `to_json`: the plan's own, and the schedule as compute (uint8 [T, P, S])."""
        return {**self._stored(), "compute": self.computed().byte()}

    def _stored(self) -> dict[str, Tensor]:
        stored = {"nodes": self.nodes, "weights": self.weights}
        return stored if self.correction is None else {**stored, "correction": self.correction}

    @classmethod
    def from_json(cls, value: Any, tensors: Mapping[str, Tensor], where: str = "plan") -> "Plan":
        """Raises ConfigError where value and tensors are not what `to_json` and `tensors` make."""
        fields = Fields(value, where)
        compute = tensors["compute"]
        if compute.ndim != 3 or compute.shape[0] > MAX_STEPS or not 0 < compute.numel() <= MAX_CELLS:
            raise ConfigError(f"{where}: a schedule of shape {tuple(compute.shape)} is none: expected [T, P, S]")
        if bool((compute > 1).any()):
            raise ConfigError(f"{where}: the schedule holds other values than 0 and 1")
        plan = cls(
            name=fields("name", text),
            scope=fields("scope", text),
            depth=fields("depth", optional(integer)),
            feature=fields("feature", text),
            schedule=_schedule(compute.bool()),
            noise_levels=fields("noise_levels", tuple_of(number)),
            nodes=tensors["nodes"],
            weights=tensors["weights"],
            correction=tensors.get("correction"),
            row_passes=fields("row_passes", integer),
            sigmas=fields("sigmas", optional(tuple_of(number))),
            nfe=fields("nfe", number),
            facts=fields("facts", json_object),
            quality=fields("quality", optional(Quality.from_json)),
            speed=fields("speed", optional(Speed.from_json)),
            guard=fields.maybe("guard", Band.from_json),
        )
        fields.end()
        return plan


def check_facts(facts: Mapping[str, Any], where: str) -> None:
    """ConfigError for facts that JSON cannot hold."""
    try:
        json.dumps(facts, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: its facts cannot be stored as JSON: {error}") from error


def positions(old: Sequence[float], new: Sequence[float], total: int) -> "np.ndarray[Any, Any]":
    """Where new noise levels (log-SNR, noisiest first) stand among old ones: positions in old steps, 0 … total − 1.

    Linear in log-SNR between old steps; clamped beyond their ends; never decreasing. An infinite level at an end is
    taken to lie as far from its neighbour as the next one does. With no (finite) old levels, by the share of the run.

    Raises:
        ConfigError: for no new levels, more than 10,000, or a NaN among them.
    """
    if not 1 <= len(new) <= MAX_STEPS or any(math.isnan(level) for level in new):
        raise ConfigError(f"cannot resample to {len(new)} noise levels: give 1 to {MAX_STEPS:,} numbers, none NaN")
    levels = np.array(old, dtype=np.float64)
    finite = levels[np.isfinite(levels)]
    if not len(finite):
        return np.linspace(0, total - 1, len(new))
    gaps = [gap for gap in np.diff(finite) if gap > 0] or [1.0]
    levels[levels == -math.inf] = finite[0] - gaps[0]
    levels[levels == math.inf] = finite[-1] + gaps[-1]
    levels = np.maximum.accumulate(levels)
    found = np.interp(np.array(new, dtype=np.float64), levels, np.arange(total))
    return np.maximum.accumulate(found)


def _resampled_steps(computed: Sequence[int], places: "np.ndarray[Any, Any]") -> list[int]:
    """New steps for the computed ones of old steps; places: where each new step stands among the old."""
    # of the old steps, those that the new ones go through; the first is computed whatever it was
    first, end = math.floor(places[0] + 1e-6), math.ceil(places[-1] - 1e-6) + 1
    kept = [first, *(step for step in computed if first < step < end)]
    count = min(len(places), max(1, math.floor(len(kept) * len(places) / (end - first) + 0.5)))
    # evenly in the rank of computed steps, which keeps them dense where they were; of several, the last one is kept
    if len(kept) > 1 and count > 1:
        ranks = np.linspace(0, len(kept) - 1, count)
    else:
        ranks = np.arange(count) / count
    wanted = np.interp(ranks, np.arange(len(kept) + 1), [*kept, end])
    steps: list[int] = []
    for i, place in enumerate(wanted):
        nearest = int(np.argmin(np.abs(places - place))) if i else 0
        earliest = steps[-1] + 1 if steps else 0
        steps.append(min(max(nearest, earliest), len(places) - (count - i)))
    return steps


def _where_any(mask: Tensor, weights: Tensor) -> Tensor:
    """A mask [T, P, S] with the passes and spans of weights [T, P', S', K]: true where any that they share is."""
    for axis in (1, 2):
        if weights.shape[axis] == 1:
            mask = mask.any(dim=axis, keepdim=True)
    return mask.expand(weights.shape[:3])


def _schedule(computed: Tensor) -> Schedule:
    return Schedule(tuple(tuple(tuple(row) for row in step) for step in computed.tolist()))


def _digest(prompt: str) -> str:
    return hashlib.sha256(prompt.encode()).hexdigest()[:16]


def _need(where: str, what: str, condition: bool, wanted: str) -> None:
    if not condition:
        raise ConfigError(f"{where}: {what}: expected {wanted}")
