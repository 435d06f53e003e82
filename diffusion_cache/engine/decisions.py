"""Asking the policy: beforehand, at the start of a call, or after its probe blocks and for each sample apart."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from ..context import PassState, Step, Verdict
from ..errors import DiffusionCacheError
from ..history import writable
from ..policies import Guarded
from ..schedule import Schedule
from .frame import Frame, PassKey

if TYPE_CHECKING:
    from .session import Method


class Decisions:
    """What one run's policy has decided: schedules by length, and the past of every sample in every pass."""

    def __init__(
        self,
        method: "Method",
        warn: Callable[[str], None],
        warn_failure: Callable[[str, Exception], None],
        agree: Callable[[Tensor], Tensor] | None = None,
    ):
        self.guarded = method.guarded
        self.history = method.forecaster.history
        self._granularity = method.granularity
        self._warn = warn
        self._warn_failure = warn_failure
        self._agree = agree
        self._schedules: dict[int, Schedule | None] = {}
        self._states: dict[PassKey, list[PassState]] = {}
        self._kept: dict[PassKey, dict[str, Tensor]] = {}

    def begin_loop(self, guarded: Guarded, history: int) -> None:
        """Go by this policy from now on, with so many features kept."""
        self.history = history
        if guarded is not self.guarded:
            self.guarded = guarded
            self._schedules.clear()

    def clear(self) -> None:
        self._states.clear()
        self._kept.clear()

    def schedule(self, total: int | None) -> Schedule | None:
        """The whole run's schedule, if the policy knows it beforehand."""
        if total is None:
            return None
        if total not in self._schedules:
            try:
                self._schedules[total] = self.guarded.schedule(total)
            except DiffusionCacheError:
                raise
            except Exception as error:
                self._schedules[total] = Schedule.uniform([True])
                self._warn_failure("the policy", error)
        return self._schedules[total]

    def ever_reuses(self, total: int | None) -> bool:
        """Whether anything can be reused in a run of this length."""
        schedule = self.schedule(total)
        return schedule is None or not all(all(row) for step in schedule.compute for row in step)

    def patterns(self, total: int | None) -> list[tuple[bool, ...] | None]:
        """What may be computed and reused together, wherever anything is reused; None: by an adaptive policy."""
        if not self.guarded.planned:
            return [None]
        schedule = self.schedule(total)
        if schedule is None:
            return [(False,)]
        return list(dict.fromkeys(row for step in schedule.compute for row in step if not all(row)))

    def open(self, frame: Frame, position: int) -> None:
        """At the start of a call: what is known without its signals."""
        schedule = self.schedule(frame.step.total)
        if schedule is not None:
            frame.stores = schedule.stores(frame.step.index, position, self.history)
            frame.actions = schedule.row(frame.step.index, position)
            frame.reason = "schedule"
        elif self.guarded.planned:
            self._decide(frame, 1, [[]])

    def after_probe(self, frame: Frame, apart: bool) -> None:
        """With the frame's signals. apart: whether some samples can be computed and others not."""
        self._decide(frame, len(samples_of(frame.step, frame.batch)), samples_of(frame.step, frame.batch), apart)

    def _decide(self, frame: Frame, count: int, samples: Sequence[Sequence[int]], apart: bool = False) -> None:
        states = self._states.get(frame.key, [])
        if len(states) != count:
            # how many samples the rows make is known for sure from the first scheduler step on
            known = states[0] if states and all(state == states[0] for state in states) else PassState()
            states = self._states[frame.key] = [replace(known) for _ in range(count)]
        try:
            verdicts = self._verdicts(frame, states, samples)
        except DiffusionCacheError:
            raise
        except Exception as error:
            self._warn_failure("the policy", error)
            verdicts = [Verdict(True, "failure")] * count
        frame.asking = [verdict.compute for verdict in verdicts]
        frame.extra = [verdict.extra for verdict in verdicts]
        asking = sum(frame.asking)
        frame.reason = next((v.reason for v in verdicts if v.compute), verdicts[0].reason)
        frame.actions = (asking > 0,)
        if 0 < asking < count and not apart and self._granularity == "sample":
            self._warn(
                "samples of a batch cannot be told apart in this model, so a call is computed for all of them if any "
                "asks for it (granularity 'batch'): an image may depend on its neighbours in the batch"
            )
        if apart and 0 < asking < count:
            frame.actions = (False,)
            frame.rows = sorted(row for rows, asks in zip(samples, frame.asking, strict=True) if asks for row in rows)
            frame.reason = f"{asking} of {count} samples: {frame.reason}"

    def _verdicts(self, frame: Frame, states: Sequence[PassState], samples: Sequence[Sequence[int]]) -> list[Verdict]:
        forced = [self.guarded.guards.forced(frame.step, state) for state in states]
        values: list[float | None] = [None] * len(states)
        if not all(forced) and frame.signals:
            values = self._values(frame, samples)
        return [self.guarded.decide(frame.step, value, state) for value, state in zip(values, states, strict=True)]

    def _values(self, frame: Frame, samples: Sequence[Sequence[int]]) -> list[float | None]:
        kept = self._kept.get(frame.key, {})
        if not kept or any(kept[name].shape != signal.shape for name, signal in frame.signals.items()):
            return [None] * len(samples)
        measured = self.guarded.measure(frame.signals, kept)
        if measured is None:
            return [None] * len(samples)
        if self._agree is not None:
            measured = self._agree(measured)
        by_row = measured.tolist()
        batch = sum(map(len, samples))
        if len(by_row) % batch:
            return [_largest(by_row)] * len(samples)
        folded = len(by_row) // batch  # frames and the like, which some models fold into the batch
        return [_largest([x for row in rows for x in by_row[row * folded : (row + 1) * folded]]) for rows in samples]

    def close(self, frame: Frame) -> None:
        """At the end of a call: remember what was computed of it."""
        states = self._states.setdefault(frame.key, [PassState()])
        all_computed = not frame.reused
        for i, state in enumerate(states):
            asked = frame.rows is not None and frame.asking[i]
            state.update(frame.step.index, all_computed or asked)
            # with all for the sake of one, a step is extra for those as well that would have reused it
            if any(frame.extra) and (frame.extra[i] or (all_computed and not frame.asking[i])):
                state.extra += (frame.step.index,)
        kept = self._kept.get(frame.key)
        if frame.signals and self.guarded.drift is not None:
            self._kept[frame.key] = self.guarded.drift.kept(frame.signals, kept or {})
            return
        if not frame.signals or not (all_computed or frame.rows):
            return
        if frame.rows is None or all_computed or not kept:
            self._kept[frame.key] = frame.signals
            return
        for name, signal in frame.signals.items():
            kept[name] = writable(kept[name])
            kept[name][frame.rows] = signal[frame.rows]


def _largest(values: Sequence[float]) -> float:
    return max(values, key=lambda value: (math.isnan(value), value))


def samples_of(step: Step, batch: int) -> list[list[int]]:
    """The batch rows of each sample: one in each guidance branch of the call."""
    size = batch // len(step.rows)
    return [[row + group * size for group in range(len(step.rows))] for row in range(size)]
