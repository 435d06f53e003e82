"""The invariants of the design, for every registered method on every scope it declares and every shipped model."""

import collections
import contextlib
import functools

import numpy as np
import pytest
import torch
from cases import (
    ALL_CASES,
    CASES,
    COMPUTING,
    FEW,
    MENDING,
    MIXED,
    NOISE_LEVELS,
    OF_ONE_LENGTH,
    PAIRS,
    REUSING,
    STEPS,
    Subject,
    covered,
    covered_with_pairs,
    in_pairs,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import diffusion_cache as dc
from diffusion_cache import registry
from diffusion_cache.engine import CacheRun, Method, intercept, patches
from diffusion_cache.engine.span_calls import SpanCalls
from diffusion_cache.history import History

TWO_STACKS = [case for case in CASES if (case.model, case.scope) == ("flux-digits", "stack")]

few_cases = pytest.mark.parametrize("case", sorted(FEW + MIXED, key=str), ids=str)


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def run_of(subject, case):
    return dc.run(subject.denoiser, num_steps=STEPS, noise_levels=NOISE_LEVELS, **case.options())


def test_everything_has_options_to_be_tested_with():
    assert set(REUSING) == set(COMPUTING) == set(registry.policies.names())
    assert set(MENDING) - {"plan"} == set(registry.correctors.names())


def test_the_cases_that_are_run_leave_nothing_out():
    for cases, what in ((FEW, in_pairs), (CASES, covered), (PAIRS, covered_with_pairs)):
        assert set().union(*map(what, cases)) == set().union(*map(what, ALL_CASES))


def test_always_computing_changes_and_stores_nothing(subject, case):
    dc.enable(subject.pipe, **case.options(COMPUTING))
    computed = subject.generate()
    summary = dc.summary(subject.pipe)
    dc.disable(subject.pipe)
    assert torch.equal(computed, subject.uncached)
    assert summary.reused == 0
    assert summary.total == STEPS
    if not registry.policies.get(case.policy)(**_own(case, COMPUTING)).needs.signals:
        assert summary.cache_bytes == 0


def _own(case, table):
    fields = registry.policies.options(case.policy)
    return {name: value for name, value in table[case.policy].items() if name in fields}


@pytest.mark.parametrize("case", PAIRS, ids=str)
def test_reuse_with_identical_inputs_reproduces_the_output(subject, case):
    """Where the forecaster promises it; a mean velocity is at least along the only one that there was."""
    expected = subject.call()
    with run_of(subject, case) as run:
        for _ in range(STEPS):
            run.next_step()
            found = subject.call()
            if not case.is_exact:
                found = found * ((found * expected).sum() / (found * found).sum())
            assert relative_error(found, expected) <= 1e-5
        assert run.summary().reused >= 2

    # the same with its features perturbed must differ, or the above proves nothing
    with run_of(subject, case) as run:
        errors = []
        for _ in range(STEPS):
            run.next_step()
            for state in run._run.spans._states.values():
                for feature in state.history.slots:
                    for tensor in feature:
                        tensor += 0.1 * tensor.abs().mean() * torch.randn_like(tensor)
            errors.append(relative_error(subject.call(), expected))
        # a policy may compute one of the two samples alone
        reused = [not record.computed or "samples" in record.reason for record in run.summary().records]
    assert [error > 1e-4 for error in errors] == reused


@few_cases
def test_runs_repeat_and_leave_nothing_behind(subject, case):
    """Whatever ran before, an interrupted run, other steps or other samples; and without the cache all is as before."""
    before = {name: dict(vars(module)) for name, module in subject.denoiser.named_modules()}
    classes = [type(subject.pipe), type(subject.denoiser), type(subject.pipe.scheduler)]
    class_attributes = [dict(vars(cls)) for cls in classes]
    dc.enable(subject.pipe, **case.options())
    try:
        assert intercept.ATTRIBUTE in vars(subject.denoiser)
        fresh = subject.generate()
        assert dc.summary(subject.pipe).reused > 0

        calls = []

        step = type(subject.pipe.scheduler).step

        def interrupted(self, *args, **kwargs):
            if len(calls) >= 3:
                raise KeyboardInterrupt
            calls.append(1)
            return step(self, *args, **kwargs)

        type(subject.pipe.scheduler).step = interrupted
        try:
            with pytest.raises(KeyboardInterrupt):
                subject.generate()
        finally:
            type(subject.pipe.scheduler).step = step
        assert torch.equal(subject.generate(), fresh)
        if case.mending not in OF_ONE_LENGTH:
            subject.generate(steps=STEPS + 3)
            assert torch.equal(subject.generate(), fresh)
        subject.generate(labels=(1, 2, 3), seeds=(1, 2, 3))
        assert torch.equal(subject.generate(), fresh)
    finally:
        dc.disable(subject.pipe)
    assert {name: dict(vars(module)) for name, module in subject.denoiser.named_modules()} == before
    assert [dict(vars(cls)) for cls in classes] == class_attributes
    assert not [name for name in vars(subject.pipe) if "diffusion_cache" in name]
    assert not [name for name in vars(subject.pipe.scheduler) if "diffusion_cache" in name]
    assert torch.equal(subject.generate(), subject.uncached)


@pytest.mark.parametrize("case", TWO_STACKS, ids=str)
def test_stacks_in_a_row_give_as_one_what_they_give_apart(subject, case, monkeypatch):
    """To rounding. Some are of each stack: racer's signal, rfc's scale, and how frequency splits what it forecasts."""
    with dc.cached(subject.pipe, **case.options()):
        found, one = subject.generate(), dc.summary(subject.pipe)
    alike = not {case.policy, case.forecaster} & {"racer", "rfc", "frequency"}
    assert one.spans == (1 if alike else 2)
    monkeypatch.setattr(Method, "spans_alike", False)
    with dc.cached(subject.pipe, **case.options()):
        expected, apart = subject.generate(), dc.summary(subject.pipe)
    assert apart.spans == 2
    assert [record.computed for record in one.records] == [record.computed for record in apart.records]
    assert one.hit_rate == apart.hit_rate > 0
    if alike:
        assert one.cache_bytes < apart.cache_bytes
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    else:
        assert torch.equal(found, expected)


def outputs(subject, case, *passes):
    """Of each pass, what it gives at each step; a pass is the indices of the calls that its inputs are those of."""
    found = [[] for _ in passes]
    with run_of(subject, case) as run:
        for step in range(STEPS):
            run.next_step()
            for into, calls in zip(found, passes, strict=True):
                into.append(subject.call(calls[step]))
        return found, run.summary()


@few_cases
def test_passes_do_not_mix(subject, case):
    """Different inputs alternate within a step, as guidance branches do: each pass goes on as without the other.

    The second one has another first beside it, as a plan has weights for each of the two. Firsts go forward in time, as
    a mean velocity takes the way that the first pass goes for that of all.
    """
    first, second = range(0, len(subject.calls), len(subject.calls) // STEPS), [-1 - step for step in range(STEPS)]
    other = [*first[1:], first[-1]]
    together, summary = outputs(subject, case, first, second)
    (alone,), _ = outputs(subject, case, first)
    (_, beside_other), _ = outputs(subject, case, other, second)
    assert all(map(torch.equal, together[0], alone))
    assert all(map(torch.equal, together[1], beside_other))
    assert all(relative_error(a, b) > 1e-2 for a, b in zip(*together, strict=True))
    assert summary.reused >= 4
    assert {record.pass_name for record in summary.records} == {"0", "1"}


aten = torch.ops.aten
READING = {
    aten._local_scalar_dense.default,
    aten._unique2.default,
    aten.allclose.default,
    aten.equal.default,
    aten.masked_select.default,
    aten.nonzero.default,
    aten.repeat_interleave.Tensor,
    aten.unique_consecutive.default,
    aten.unique_dim.default,
}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}  # by a mask they wait for its count
COPYING = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu, torch.Tensor.__array__}  # no operators on a CPU


class Operators(TorchDispatchMode):
    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        by_mask = func in INDEXING and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        if func in READING or by_mask:
            self.found.append(func)
        return func(*args, **(kwargs or {}))


class Methods(TorchFunctionMode):
    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in COPYING:
            self.found.append(func)
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def reads():
    """A list of what reads a tensor back to the host from here on."""
    found = []
    with Operators(found), Methods(found):
        yield found


def forget_before_the_first_call(denoiser, found):
    def first_call(module, args):
        hook.remove()
        found.clear()

    hook = denoiser.register_forward_pre_hook(first_call)


@functools.cache
def uncached_reads(subject):
    with reads() as found:
        forget_before_the_first_call(subject.denoiser, found)
        subject.generate()
    return found


@few_cases
def test_planned_policies_add_no_host_sync(subject, case, monkeypatch):
    if registry.policies.get(case.policy)(**_own(case, REUSING)).needs.signals:
        pytest.skip("adaptive policies read their signal back")
    monkeypatch.setattr(History, "on_host", False)  # on the CPU reading back is free, and done
    finish, before_the_end = CacheRun.finish, []

    def finished(run):
        before_the_end.extend(cached)
        finish(run)

    uncached = uncached_reads(subject)
    with dc.cached(subject.pipe, **case.options()):
        subject.generate()  # a session's first run looks at what it reuses
        monkeypatch.setattr(CacheRun, "finish", finished)
        with reads() as cached:
            forget_before_the_first_call(subject.denoiser, cached)
            subject.generate()
        assert dc.summary(subject.pipe).reused > 0
    assert before_the_end == uncached


WAYS = {
    "item": lambda x: x[0].item(),
    "bool": lambda x: bool(x[0]),
    "int": lambda x: int(x[0]),
    "tolist": lambda x: x.tolist(),
    "numpy": lambda x: x.numpy(),
    "array": lambda x: np.asarray(x),
    "cpu": lambda x: x.cpu(),
    "equal": lambda x: torch.equal(x, x),
    "allclose": lambda x: torch.allclose(x, x),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 0),
    "a mask": lambda x: x[x > 0],
    "to a mask": lambda x: x.index_put_((x > 0,), x + 1),
    "unique": lambda x: x.unique(),
    "runs": lambda x: x.unique_consecutive(),
    "repeats": lambda x: x.repeat_interleave(x.long()),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_read_is_seen(way):
    with reads() as found:
        WAYS[way](torch.ones(3))
    assert found


def test_reads_are_counted():
    subject = Subject("flux-digits")
    with reads() as uncached:
        subject.generate()
    with dc.cached(subject.pipe, "first_block", threshold=10.0), reads() as cached:
        subject.generate()
    assert len(cached) >= len(uncached) + STEPS - 2


NOT_COUNTED = {
    "frame",  # of the call that runs
    "decisions",  # signals of the last computed step
    "_tails",  # what a policy that verifies keeps of the tail blocks
    "_compared",  # signals that a corrector goes by
}


def held_bytes(root) -> int:
    """Of the different storages that can be reached from a run, without the modules."""
    seen, storages, found = set(), {}, [root]
    while found:
        value = found.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, dict):
            found += value.values()
        elif isinstance(value, (list, tuple, set, frozenset, collections.deque)):
            found += value
        elif type(value).__module__.startswith("diffusion_cache") and not isinstance(value, torch.nn.Module):
            names = {name for cls in type(value).__mro__ for name in getattr(cls, "__slots__", ())}
            names |= set(getattr(value, "__dict__", ()))
            found += [getattr(value, name) for name in names - NOT_COUNTED if hasattr(value, name)]
    return sum(storages.values())


SMALL = 1024  # bytes of what is no feature: timesteps, the numbers of a plan


@few_cases
def test_history_stays_within_its_stated_bytes(subject, case, monkeypatch):
    """Which are not far too many, and those that are told are those that were held."""
    stated = dc.inspect(
        subject.pipe,
        dc.reference.inputs(subject.name, (3, 8), (5, 6)),
        **case.inspected(),
    ).cache_bytes
    finish, conclude, held = CacheRun.finish, SpanCalls.conclude, []

    def finished(run):
        held.append(held_bytes(run))
        finish(run)

    def concluded(spans, frame):
        held.append(held_bytes(spans._run))
        conclude(spans, frame)

    monkeypatch.setattr(CacheRun, "finish", finished)
    monkeypatch.setattr(SpanCalls, "conclude", concluded)
    hook = subject.denoiser.register_forward_pre_hook(lambda *_: held.append(held_bytes(patches.ACTIVE.get())))
    with dc.cached(subject.pipe, **case.options()):
        subject.generate(steps=STEPS if case.mending in OF_ONE_LENGTH else 2 * STEPS)
        summary = dc.summary(subject.pipe)
    hook.remove()
    used = summary.cache_bytes
    loaded = summary.resident_bytes if case.storing == "host" else 0  # copies
    assert 0 <= max(held) - used <= loaded + SMALL
    assert 0 < used <= stated
    assert stated <= 2 * used or case.storing  # codes take less
