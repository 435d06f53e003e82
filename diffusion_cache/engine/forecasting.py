"""What a reused span's output is forecast from: the weights of its stored features, and what mends them."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..context import Blend, Correction, NonLinear, Query, Signals
from ..errors import ConfigError
from ..history import History, row_index
from ..models import Span
from .frame import Frame, PassKey
from .structure import Inputs, flatten, row_output

if TYPE_CHECKING:
    from .cache_run import CacheRun


class Row(NamedTuple):
    """What one batch row, or all of them, is forecast with: weights of the features, of the inputs stored with them,
    and of what a non-linear forecaster makes. Numbers, or tensors [rows] of all rows' own.
    """

    features: tuple[float | Tensor, ...]
    inputs: tuple[float | Tensor, ...] = ()
    forecast: tuple[float | Tensor, ...] = ()

    @property
    def flat(self) -> tuple[Any, ...]:
        return (*self.features, *self.inputs, *self.forecast)

    def mended(self, blend: Blend) -> "Row":
        features = tuple(blend.keep * w + anchor for w, anchor in zip(self.features, blend.anchors, strict=True))
        inputs, forecast = (tuple(blend.keep * w for w in part) for part in (self.inputs, self.forecast))
        return Row(features, inputs, forecast)

    def held(self, history: History) -> "Row":
        """Weights of what the slots of a history hold."""
        return Row(history.combined(self.features), history.combined(self.inputs), self.forecast)

    def placed(self, slots: Sequence[int], count: int) -> "Row":
        """With a weight for each of `count` slots: of those named, in the weights' order, theirs, else 0."""

        def whole(weights: tuple[float | Tensor, ...]) -> tuple[float | Tensor, ...]:
            by_slot = dict(zip(slots, weights, strict=True))
            return tuple(by_slot.get(slot, 0.0) for slot in range(count))

        return Row(whole(self.features), whole(self.inputs) if self.inputs else (), self.forecast)


class Forecasts:
    """How the spans of one run are forecast, and the signals that are kept beside their features for that."""

    def __init__(self, run: "CacheRun"):
        self._run = run
        self._corrector = run.method.corrector
        self._tails: dict[PassKey, History] = {}  # of the blocks after the spans: to be compared, never reused
        self._compared: dict[PassKey, History] = {}  # the corrector's signals at the steps of the features

    def release(self) -> None:
        self._tails.clear()
        self._compared.clear()

    def conclude(self, key: PassKey) -> None:
        """After the last call of a pass."""
        self._tails.pop(key, None)
        self._compared.pop(key, None)

    def weights(self, frame: Frame, span: Span, history: History) -> tuple[Sequence[float] | Tensor, list[int]]:
        """A weight for the feature of each of the slots named, for their inputs where those are kept, and for what is
        forecast otherwise; [rows, weights] where rows differ in theirs.
        """
        feature = history.slots[0][0]
        self._learn_direction(span, history)
        if len(history.lanes) == 1:
            (lane,) = history.lanes
            table = [row.held(history).flat for row in self._branch_weights(frame, span, *frame.query(history, 0))]
            slots = [slot for _, slot in lane]
            if len(table) == 1 and not any(isinstance(weight, Tensor) for weight in table[0]):
                return table[0], slots
            return _table(_spread(table, len(feature)), feature), slots
        # rows that were computed at the same steps share what the forecaster says
        known: dict[tuple[tuple[float, ...], float], list[Row]] = {}
        slots = list(range(len(history.slots)))
        by_row = []
        for place, lane in enumerate(history.lanes):
            asked = frame.query(history, place)
            if asked not in known:
                known[asked] = self._branch_weights(frame, span, *asked)
            rows = known[asked]
            row = rows[place * len(rows) // len(history.lanes)].held(history)
            by_row.append(row.placed([slot for _, slot in lane], len(slots)).flat)
        return _table(by_row, feature), slots

    def slot_numbers(self, frame: Frame, span: Span, history: History) -> tuple[list[Any], list[Any] | None]:
        """Where every slot is taken: weights [slots] or [rows, slots], and a correction [1 or rows, 2, channels], which
        is given at each reused step by what makes any.
        """
        (lane,) = history.lanes
        self._learn_direction(span, history)
        table = self._branch_weights(frame, span, *frame.query(history, 0))
        correction = self._correction_numbers(frame, span, history, always=True)
        slots = [slot for _, slot in lane]
        whole = [row.placed(slots, history.capacity).flat for row in table]
        if self._run.forecaster.row_passes == 1:
            return list(whole[0]), correction
        # the same shape whether branches differ or not: another one would be compiled anew
        return _spread(whole, len(history.slots[0][0])), correction

    def features(
        self, frame: Frame, span: Span, history: History, leaf: int, slots: Sequence[int], inputs: int | None = None
    ) -> list[Tensor]:
        """What of a leaf the weights of `weights` are for; inputs: which leaf holds those stored with it, if any."""
        stored: list[Any] = list(history.leaf(leaf))
        if isinstance(self._run.forecaster, NonLinear):
            stored = [ops.decoded(feature) for feature in stored]
        features = [stored[slot] for slot in slots]
        if inputs is not None:
            features += [history.leaf(inputs)[slot] for slot in slots]
        if isinstance(self._run.forecaster, NonLinear):
            features.append(self._forecast_rows(self._run.forecaster, frame, span, history, stored))
        return features

    def _forecast_rows(
        self, forecaster: NonLinear, frame: Frame, span: Span, history: History, stored: Sequence[Tensor]
    ) -> Tensor:
        """What a forecaster makes of one leaf's slots, each batch row from its own lane."""
        rows_of: dict[tuple[tuple[float, int], ...], list[int]] = {}
        for row, own in enumerate(history.lanes):
            rows_of.setdefault(tuple(own), []).append(row)
        whole = torch.empty_like(stored[0])
        for lane, rows in rows_of.items():
            lane = lane[-forecaster.history :]
            (query,) = self._queries(frame, span, tuple(node for node, _ in lane), frame.step.index)
            index = row_index(rows, whole) if len(rows_of) > 1 else None
            held = [stored[slot] if index is None else stored[slot].index_select(0, index) for _, slot in lane]
            features = history.restored(held)
            made = features[-1]
            if made.is_floating_point():
                made = forecaster.forecast(query, [ops.wide(feature) for feature in features]).to(whole.dtype)
            if index is None:
                return made
            whole.index_copy_(0, index, made)
        return whole

    def correction(self, frame: Frame, span: Span, history: History) -> Tensor | None:
        """Scale and bias of the forecast output, [1 or rows, 2, channels]; None where nothing is corrected."""
        numbers = self._correction_numbers(frame, span, history)
        return None if numbers is None else as_tensor(numbers, history.slots[0][0])

    def _correction_numbers(self, frame: Frame, span: Span, history: History, always: bool = False) -> list[Any] | None:
        """The numbers of `correction`. always: neutral ones where nothing is corrected, unless neither forecaster nor
        corrector ever corrects.
        """
        forecaster, corrector = self._run.forecaster, self._corrector
        corrects = forecaster if corrector is None or not corrector.corrected_channels else corrector
        channels = corrects.corrected_channels
        if not channels:
            return None
        if channels > 1 and any(ops.channels(leaf) != channels for leaf in history.numbers()):
            raise ConfigError(f"corrections are of {channels} channels, and {span.name} gives others")
        found: list[Correction | None] = []
        seen = forecaster.history if corrects is forecaster else history.capacity
        for place, lane in enumerate(history.lanes):
            asked = self._queries(frame, span, tuple(node for node, _ in lane[-seen:]), frame.step.index)
            if len(history.lanes) > 1:
                asked = [asked[place * len(asked) // len(history.lanes)]]
            found += [corrects.correction(query) for query in asked]
        if not always and not any(found):
            return None
        neutral = Correction((1.0,) * channels, (0.0,) * channels)
        feature = history.slots[0][0]
        # the same shape whether branches differ or not, as for weights
        rows = len(feature) if len(history.lanes) > 1 or forecaster.row_passes > 1 else 1
        return _spread([one or neutral for one in found], rows)

    def _branch_weights(self, frame: Frame, span: Span, nodes: tuple[float, ...], target: float) -> "list[Row]":
        """Mended weights, once for all rows or once for each guidance branch that is stacked in the rows."""
        forecaster, corrector = self._run.forecaster, self._corrector
        own = nodes[-forecaster.history :]  # of those kept, what this forecaster goes by
        older = (0.0,) * (len(nodes) - len(own))
        queries = self._queries(frame, span, own, target)
        frame.note = forecaster.note(queries[0])
        signals = self._signals(frame, nodes)
        table = []
        for query in queries:
            if isinstance(forecaster, NonLinear):
                row = Row((0.0,) * len(nodes), forecast=(1.0,))
            elif forecaster.keeps_inputs:
                row = Row(older + forecaster.weights(query), older + forecaster.input_weights(query))
            else:
                row = Row(older + forecaster.weights(query))
            blend = None if corrector is None else corrector.blend(query._replace(nodes=nodes, signals=signals))
            table.append(row if blend is None else row.mended(blend))
        if corrector is not None and not corrector.static:
            return table  # rows differ
        return table[:1] if all(row == table[0] for row in table[1:]) else table

    def _queries(self, frame: Frame, span: Span, nodes: tuple[float, ...], target: float) -> list[Query]:
        """One for all rows, or one for each guidance branch that is stacked in the rows."""
        forecaster = self._run.forecaster
        count = forecaster.row_passes
        if count > 1 and frame.batch % count:
            self._run.warn(
                f"{forecaster.name} has weights for {count} guidance branches in one call, but its {frame.batch} rows "
                "are no multiple of that: the weights of the first are taken for all"
            )
            count = 1
        index = self._run.session.span_index[span]
        first = frame.position * forecaster.row_passes
        direction = self._run.session.directions.get(span, 0.0)
        total, times = frame.step.total, self._run.times
        return [
            Query(nodes, target, index, pass_index=first + i, total=total, times=times, direction=direction)
            for i in range(count)
        ]

    def _learn_direction(self, span: Span, history: History) -> None:
        """Which way a span's outputs point along the path that its inputs took: read back once, at the first run."""
        directions = self._run.session.directions
        if not self._run.forecaster.keeps_inputs or span in directions:
            return
        row, lane = next(((row, lane) for row, lane in enumerate(history.lanes) if len(lane) > 1), (0, None))
        if lane is None:
            return
        count, along = len(history.numbers()) // 2, 0.0  # outputs, and behind them as many inputs
        for i in range(count):
            outputs, inputs = ([ops.decoded(history.leaf(leaf)[slot]) for _, slot in lane] for leaf in (i, count + i))
            outputs, inputs = history.restored(outputs), history.restored(inputs)
            moved, first = (ops.wide(inputs[-1]) - ops.wide(inputs[0])), ops.wide(outputs[0])
            if len(history.lanes) > 1:
                moved, first = moved[row], first[row]
            along += float((moved * first).sum())
        if math.isfinite(along) and along:
            directions[span] = -math.copysign(1.0, along)  # the variable falls

    # signals

    def note_tail(self, frame: Frame, output: Any, inputs: Inputs) -> None:
        """What the blocks after the spans give is a signal, and so is what is forecast of it.

        Forecast as the spans are, from what was given at their computed steps; NaN where that cannot be.
        """
        assert frame.signals is not None
        tail = self._tails.setdefault(frame.key, History(self._run.history))
        try:
            tensors = [leaf for leaf in flatten(output)[0] if isinstance(leaf, Tensor)]
            given = row_output(tensors, inputs, self._run.layouts[frame.key[0]].tail).detach()
            frame.signals["tail_output"] = given.clone()
            if frame.reused:
                frame.signals["tail_forecast"] = torch.full_like(given, math.nan)
            if tail and tail.slots[0][0].shape != given.shape:
                tail.clear()
            if frame.reused and tail:
                weights, slots = self.weights(frame, frame.reused[-1].span, tail)
                features = self.features(frame, frame.reused[-1].span, tail, 0, slots)
                frame.signals["tail_forecast"] = ops.forecast(None, features, weights)
            if not frame.reused:
                tail.observe(frame.step.index, [given], [None])
            elif frame.rows is not None:
                rows = given.index_select(0, row_index(frame.rows, given))
                tail.observe(frame.step.index, [rows], [None], frame.rows, frame.batch)
        except Exception as error:
            tail.clear()
            self._run.warn_failure("forecasting the last blocks", error)

    def keep_compared(self, frame: Frame) -> None:
        """At the end of a call: keep the signals that the corrector compares, beside the features, if it computed."""
        if not any(frame.stores) or (frame.reused and frame.rows is None):
            return
        rows = frame.rows if frame.reused else None
        signals = list(frame.compared.values())
        kept = self._compared.setdefault(frame.key, History(self._run.history))
        try:
            if kept.slots and [tensor.shape for tensor in kept.slots[0]] != [tensor.shape for tensor in signals]:
                kept.clear()
            if rows is not None:
                signals = [tensor.index_select(0, row_index(rows, tensor)) for tensor in signals]
            kept.observe(frame.step.index, signals, [None] * len(signals), rows, frame.batch)
        except Exception as error:
            kept.clear()
            self._run.warn_failure("keeping signals", error)

    def _signals(self, frame: Frame, nodes: tuple[float, ...]) -> dict[str, Signals]:
        """What the corrector compares, of this step and of the nodes, by name."""
        kept = [self._compared[frame.key].at(node) for node in nodes] if frame.compared else []
        if None in kept:
            raise LookupError(f"no signals are kept of a step among {nodes}")
        return {
            name: Signals(now, tuple(signals[i] for signals in kept if signals is not None))
            for i, (name, now) in enumerate(frame.compared.items())
        }


def _spread(table: Sequence[Any], rows: int) -> list[Any]:
    """Each entry for its share of the rows."""
    return [table[row * len(table) // rows] for row in range(rows)]


def _table(rows: Sequence[Sequence[float | Tensor]], feature: Tensor) -> Tensor:
    """[rows, weights] of weights that are numbers or tensors [rows], of which each row takes its own."""
    known = tuple(tuple(0.0 if isinstance(w, Tensor) else w for w in row) for row in rows)
    numbers = ops.shared(known, feature.device, wide_dtype(feature))
    tensors = {id(w): w for row in rows for w in row if isinstance(w, Tensor)}
    if not tensors:
        return numbers
    places = {w: 1 + place for place, w in enumerate(tensors)}  # 0: a number
    chosen = ops.shared(tuple(tuple(places.get(id(w), 0) for w in row) for row in rows), feature.device, torch.int64)
    by_row = torch.stack([numbers.new_zeros(len(rows)), *(w.to(numbers) for w in tensors.values())], dim=1)
    return torch.where(chosen > 0, by_row.gather(1, chosen), numbers)


def as_tensor(weights: Sequence[Any], feature: Tensor) -> Tensor:
    """Weights for features like this one, on its device; not shared, or compiled code would be specialised."""
    return ops.on_device(weights, feature.device, wide_dtype(feature))


def wide_dtype(feature: Tensor) -> torch.dtype:
    """Of numbers that features like this one are multiplied by."""
    return torch.float64 if feature.dtype == torch.float64 else torch.float32
