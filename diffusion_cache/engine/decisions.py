"""Asking the policy: beforehand, at the start of a call, or after its probe blocks and for each sample apart."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..context import KNOWN_AFTER, PassState, Past, Step, Verdict, largest
from ..errors import ConfigError, DiffusionCacheError
from ..history import row_index
from ..models import is_unconditional, unconditional_last
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
        denoisers: Mapping[str, nn.Module] | None = None,
    ):
        self.guarded = method.guarded
        self._denoisers = {} if denoisers is None else denoisers
        self.history = method.history
        self._granularity = method.granularity
        self._sync = method.sync
        self._warn = warn
        self._warn_failure = warn_failure
        self._agree = agree
        self._schedules: dict[int, Schedule | None] = {}
        self._states: dict[PassKey, list[PassState]] = {}
        self._kept: dict[PassKey, Kept] = {}
        self._passes = 0  # calls of a step, as far as was seen
        self._called: dict[PassKey, int] = {}  # the step of each pass's latest call
        self._first: dict[PassKey, int] = {}  # and of its first
        # of each pass, at which step, and what was measured of each sample, for the other passes
        self._latest: dict[PassKey, tuple[int, list[list[float]]]] = {}

    def begin_loop(self, guarded: Guarded, history: int) -> None:
        """Go by this policy from now on, with so many features kept."""
        self.history = history
        if guarded is not self.guarded:
            self.guarded = guarded
            self._schedules.clear()

    def clear(self) -> None:
        self._states.clear()
        self._kept.clear()
        self._called.clear()
        self._first.clear()
        self._latest.clear()

    def forget(self) -> None:
        """What earlier calls gave is compared with no more."""
        self._kept.clear()

    def conclude(self, key: PassKey) -> None:
        """After the last call of a pass: nothing is compared with its signals any more."""
        self._kept.pop(key, None)

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
        return schedule is None or schedule.reuses

    def patterns(self, total: int | None) -> list[tuple[bool, ...] | None]:
        """What may be computed and reused together, wherever anything is reused; None: by an adaptive policy."""
        if not self.guarded.planned:
            return [None]
        schedule = self.schedule(total)
        if schedule is None:
            return [(False,)]
        return list(dict.fromkeys(row for step in schedule.compute for row in step if not all(row)))

    def open(self, frame: Frame, position: int) -> None:
        """At the start of a call: what is known without its signals.

        Raises:
            ConfigError: where the unconditional pass is to be spared, and cannot be told.
        """
        if self.guarded.guards.unconditional_every > 1:
            self._check_passes(frame.step)
        schedule = self.schedule(frame.step.total)
        first = self._first.setdefault(frame.key, frame.step.index)
        if schedule is not None and 0 < first < frame.step.index < first + self.guarded.guards.warmup:
            frame.actions, frame.reason = (True,), "warm-up"  # of what began late, which no schedule knows
        elif schedule is not None:
            frame.stores = schedule.stores(frame.step.index, position, self.history)
            frame.actions = schedule.row(frame.step.index, position)
            frame.reason = "schedule"
        elif self.guarded.planned:
            self._decide(frame, 1, [[]])

    def _check_passes(self, step: Step) -> None:
        self._passes = max(self._passes, step.pass_index + 1)
        if step.pass_index == 0 and is_unconditional(step.pass_name):
            raise ConfigError(
                "unconditional_every is for pipelines that call the denoiser with the prompt first, and this one "
                f"begins with {step.pass_name!r}: leave it out"
            )
        if step.index == 1 and self._passes == 1:
            if len(step.rows) > 1:
                raise ConfigError(
                    "unconditional_every is for guidance branches that are calls of their own, and this pipeline "
                    f"stacks {len(step.rows)} in the rows of one call: leave it out"
                )
            self._warn("unconditional_every changes nothing, as there is one guidance branch in this run")

    def after_probe(self, frame: Frame, apart: bool) -> None:
        """With the frame's signals. apart: whether some samples can be computed and others not."""
        frame.apart = apart
        samples = samples_of(frame.step, frame.batch)
        self._decide(frame, len(samples), samples)

    def verified(self, frame: Frame) -> Frame | None:
        """At the end of a call that reused any span: the one to make in its place, where the policy decides only now
        and against it.
        """
        if not self.guarded.needs.rollback or frame.signals is None:
            return None
        samples, states = samples_of(frame.step, frame.batch), self._states[frame.key]
        verdicts = list(frame.verdicts)
        try:
            past = self._kept[frame.key].past if frame.key in self._kept else Past()
            number = self._measured(frame, frame.signals, past)
            values = [None] * len(samples) if number is None else self._values(frame, number.read(), samples)
            for i, (value, state) in enumerate(zip(values, states, strict=True)):
                if not verdicts[i].compute:
                    verdicts[i] = self.guarded.decide(frame.step, value, state)
        except DiffusionCacheError:
            raise
        except Exception as error:
            self._warn_failure("the policy", error)
            verdicts = [Verdict(True, "failure")] * len(verdicts)
        if all(before.compute == after.compute for before, after in zip(frame.verdicts, verdicts, strict=True)):
            self._settle(frame, verdicts, samples)
            return None
        again = Frame(frame.step, frame.key, frame.stores, frame.batch, frame.position)
        again.called, again.variant = frame.called, frame.variant
        again.apart, again.compared = frame.apart, frame.compared
        again.signals = {name: signal for name, signal in frame.signals.items() if name not in KNOWN_AFTER}
        self._settle(again, verdicts, samples)
        pairs = zip(frame.verdicts, verdicts, strict=True)
        again.rejected = [after.compute and not before.compute for before, after in pairs]
        again.reason = f"computed again: {again.reason}"
        return again

    def _decide(self, frame: Frame, count: int, samples: Sequence[Sequence[int]]) -> None:
        states = self._states.get(frame.key, [])
        if len(states) != count:
            # how many samples the rows make is known for sure from the first scheduler step on
            known = states[0] if states and all(state == states[0] for state in states) else None
            known = known or PassState(first=self._first.setdefault(frame.key, frame.step.index))
            states = self._states[frame.key] = [replace(known) for _ in range(count)]
        try:
            verdicts = self._verdicts(frame, states, samples)
        except DiffusionCacheError:
            raise
        except Exception as error:
            self._warn_failure("the policy", error)
            verdicts = [Verdict(True, "failure")] * count
        self._settle(frame, verdicts, samples)

    def _settle(self, frame: Frame, verdicts: list[Verdict], samples: Sequence[Sequence[int]]) -> None:
        """What the verdicts on each sample come to for the call."""
        frame.verdicts = verdicts
        frame.asking = [verdict.compute for verdict in verdicts]
        asking, count, apart = sum(frame.asking), len(verdicts), frame.apart
        frame.reason = next((v.reason for v in verdicts if v.compute), verdicts[0].reason)
        frame.actions = (asking > 0,)
        if 0 < asking < count and not apart:
            self._tell_of_neighbours()
        if apart and 0 < asking < count:
            frame.actions = (False,)
            frame.rows = sorted(row for rows, asks in zip(samples, frame.asking, strict=True) if asks for row in rows)
            frame.reason = f"{asking} of {count} samples: {frame.reason}"

    def _tell_of_neighbours(self) -> None:
        if self._granularity == "sample":
            self._warn(
                "samples of a batch cannot be told apart in this model, so a call is computed for all of them if any "
                "asks for it (granularity 'batch'): an image may depend on its neighbours in the batch"
            )

    def _verdicts(self, frame: Frame, states: Sequence[PassState], samples: Sequence[Sequence[int]]) -> list[Verdict]:
        forced = [self.guarded.guards.forced(frame.step, state) for state in states]
        values: list[float | None] = [None] * len(states)
        if frame.signals is not None:
            number = self._number(frame, frame.signals, needed=not all(forced))
            if number is not None and not all(forced):
                values = self._values(frame, number.read(), samples)
        if self.guarded.needs.verify:
            values = [value if state.consecutive else None for value, state in zip(values, states, strict=True)]
        return [self.guarded.decide(frame.step, value, state) for value, state in zip(values, states, strict=True)]

    def _number(self, frame: Frame, signals: Mapping[str, Tensor], needed: bool) -> "Number | None":
        """What to decide this step by, if there is anything yet. needed: whether it is going to be read."""
        kept = self._kept.get(frame.key)
        if kept is not None and not kept.fits(signals):
            del self._kept[frame.key]
            kept = None
        if kept is None:
            return None
        if kept.number is not None and kept.number.batch != frame.batch:
            kept.number = None  # whose rows are of other samples
        if self.guarded.needs.verify:
            return kept.number
        if self._sync != "lagged":
            return self._measured(frame, signals, kept.past) if needed else None
        # copied while this call runs, for the next one
        before, kept.number = kept.number, self._measured(frame, signals, kept.past)
        return before

    def _values(self, frame: Frame, by_row: list[float], samples: Sequence[Sequence[int]]) -> list[float | None]:
        """Each sample's number."""
        batch = sum(map(len, samples))
        if len(by_row) % batch:
            if len(samples) > 1:
                self._tell_of_neighbours()
            return [largest(by_row)] * len(samples)
        folded = len(by_row) // batch  # frames and the like, which some models fold into the batch
        by_row = [largest(by_row[row * folded : (row + 1) * folded]) for row in range(batch)]
        by_branch = [[by_row[row] for row in rows] for rows in samples]
        if self.guarded.needs.guided:
            by_branch = self._guided(frame, by_branch)
        return [self.guarded.combine(values, frame.step) for values in by_branch]

    def _guided(self, frame: Frame, own: list[list[float]]) -> list[list[float]]:
        """Each sample's numbers with those of guidance branches in calls of their own, the unconditional one first.

        Of branches that are still called, which may end before the run does.
        """
        name, step = frame.key[0], frame.step.index
        if len(frame.step.rows) > 1:
            last = unconditional_last(self._denoisers.get(name), frame.called[1])
            return [values[::-1] for values in own] if last else own
        self._latest[frame.key] = step, own
        beside = [key for key, at in self._called.items() if key[0] == name and key != frame.key and at >= step - 1]
        measured = [self._latest.get(key, (-1, own)) for key in beside]
        others = [other if at >= step - 1 and len(other) == len(own) else own for at, other in measured]
        branches = [own, *others] if is_unconditional(frame.key[1]) else [*others, own]
        return [[value for values in sample for value in values] for sample in zip(*branches, strict=True)]

    def _measured(self, frame: Frame, signals: Mapping[str, Tensor], past: Past) -> "Number | None":
        measured = self.guarded.measure(signals, past)
        if measured is None:
            return None
        return Number(measured if self._agree is None else self._agree(measured), frame.batch)

    def close(self, frame: Frame) -> None:
        """At the end of a call: remember what was computed of it."""
        self._called[frame.key] = frame.step.index
        states = self._states.get(frame.key)
        if states is None:
            states = self._states[frame.key] = [PassState()]
        all_computed = not frame.reused
        if not frame.verdicts:
            for state in states:
                state.update(frame.step.index, all_computed)
            return  # signals are taken to be decided by
        for state, verdict in zip(states, frame.verdicts, strict=True):
            asked = frame.rows is not None and verdict.compute
            state.update(frame.step.index, all_computed or asked, verdict.accumulated)
            # with all for the sake of one, a step is extra for those as well that would have reused it
            if any(v.extra for v in frame.verdicts) and (verdict.extra or (all_computed and not verdict.compute)):
                state.extra += (frame.step.index,)
        if frame.signals is None:
            return
        try:
            self._keep(frame, frame.signals)
        except DiffusionCacheError:
            raise
        except Exception as error:
            self._warn_failure("the policy", error)
            self._kept.pop(frame.key, None)

    def _keep(self, frame: Frame, signals: Mapping[str, Tensor]) -> None:
        """Keep of this call what the next ones are compared with."""
        kept, needs = self._kept.setdefault(frame.key, Kept()), self.guarded.needs
        if needs.verify and not needs.rollback:
            kept.number = self._measured(frame, signals, kept.past) if frame.reused else None
        if not frame.reused or frame.rows is not None:
            rows = frame.rows if frame.reused else None
            remembered = self.guarded.remember(signals, kept.past)
            kept.computed = _replaced(kept.computed, signals, rows)
            kept.memory = _replaced(kept.memory, remembered, rows)
        entered = {name: signal for name, signal in signals.items() if name not in KNOWN_AFTER}
        kept.steps = (entered, *kept.steps)[: int(needs.previous)]


@dataclass
class Kept:
    """What one pass keeps of earlier calls, see `Past`. number: of the last step, where decisions lag by one or wait
    for what it gave.
    """

    computed: dict[str, Tensor] = field(default_factory=dict)
    memory: dict[str, Tensor] = field(default_factory=dict)
    steps: tuple[Mapping[str, Tensor], ...] = ()
    number: "Number | None" = None

    @property
    def past(self) -> Past:
        previous, *earlier = self.steps or ({},)
        return Past(self.computed, previous, self.memory, tuple(earlier))

    def fits(self, signals: Mapping[str, Tensor]) -> bool:
        """Whether this is of calls of the same shapes."""
        return all(
            kept[name].shape == signal.shape
            for kept in (self.computed, *self.steps)
            for name, signal in signals.items()
            if name in kept
        )


class Number:
    """A measured number per row of a call on its way to the host. batch: rows of the call's sample.

    On CUDA the copy is asynchronous, and reading waits for its event: never for whether it happens to be there.
    """

    def __init__(self, measured: Tensor, batch: int):
        self.batch = batch
        self._event: Any = None
        self._host = measured
        if measured.is_cuda:
            self._host = torch.empty(measured.shape, dtype=measured.dtype, device="cpu", pin_memory=True)
            self._host.copy_(measured, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(measured.device))

    def read(self) -> list[float]:
        if self._event is not None:
            self._event.synchronize()
        return self._host.tolist()


def _replaced(kept: Mapping[str, Tensor], new: Mapping[str, Tensor], rows: Sequence[int] | None) -> dict[str, Tensor]:
    """The new tensors, or only those rows of them among what was kept. Rows never known are NaN."""
    if rows is None:
        return dict(new)
    whole = {}
    for name, tensor in new.items():
        index = row_index(rows, tensor)
        # not in place: a step may be kept as the previous one as well
        base = kept[name] if name in kept else torch.full_like(tensor, math.nan)
        whole[name] = base.index_copy(0, index, tensor.index_select(0, index))
    return {**kept, **whole}


def samples_of(step: Step, batch: int) -> list[list[int]]:
    """The batch rows of each sample: one in each guidance branch of the call."""
    size = batch // len(step.rows)
    return [[row + group * size for group in range(len(step.rows))] for row in range(size)]
