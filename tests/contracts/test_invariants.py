"""The invariants of the design, for every registered method on every scope it declares and every shipped model."""

import pytest
import torch
from cases import ALL_CASES, CASES, COMPUTING, NOISE_LEVELS, REUSING, STEPS, Subject, covered
from torch.utils._python_dispatch import TorchDispatchMode

import diffusion_cache as dc
from diffusion_cache import registry
from diffusion_cache.engine import CacheRun, intercept
from diffusion_cache.history import History


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def run_of(subject, case):
    return dc.run(subject.denoiser, num_steps=STEPS, noise_levels=NOISE_LEVELS, **case.options())


def test_every_policy_has_options_to_be_tested_with():
    assert set(REUSING) == set(COMPUTING) == set(registry.policies.names())


def test_the_cases_that_are_run_leave_nothing_out():
    assert set().union(*map(covered, CASES)) == set().union(*map(covered, ALL_CASES))


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
    assert torch.equal(subject.generate(), subject.uncached)


def _own(case, table):
    fields = registry.policies.options(case.policy)
    return {name: value for name, value in table[case.policy].items() if name in fields}


def test_disable_leaves_nothing_behind(subject, case):
    before = {name: dict(vars(module)) for name, module in subject.denoiser.named_modules()}
    classes = [type(subject.pipe), type(subject.denoiser), type(subject.pipe.scheduler)]
    class_attributes = [dict(vars(cls)) for cls in classes]
    dc.enable(subject.pipe, **case.options())
    assert intercept.ATTRIBUTE in vars(subject.denoiser)
    subject.generate(steps=2)
    dc.disable(subject.pipe)
    assert {name: dict(vars(module)) for name, module in subject.denoiser.named_modules()} == before
    assert [dict(vars(cls)) for cls in classes] == class_attributes
    assert not [name for name in vars(subject.pipe) if "diffusion_cache" in name]
    assert not [name for name in vars(subject.pipe.scheduler) if "diffusion_cache" in name]


def test_reuse_with_identical_inputs_reproduces_the_output(subject, case):
    if not case.is_exact:
        pytest.skip("the forecaster does not promise it")
    expected = subject.call()
    with run_of(subject, case) as run:
        for _ in range(STEPS):
            run.next_step()
            assert relative_error(subject.call(), expected) <= 1e-5
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


def test_runs_repeat_and_do_not_depend_on_what_ran_before(subject, case):
    dc.enable(subject.pipe, **case.options())
    try:
        fresh = subject.generate()
        assert dc.summary(subject.pipe).reused > 0
        assert torch.equal(subject.generate(), fresh)

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
        subject.generate(steps=STEPS + 3)
        assert torch.equal(subject.generate(), fresh)
        subject.generate(labels=(1, 2, 3), seeds=(1, 2, 3))
        assert torch.equal(subject.generate(), fresh)
    finally:
        dc.disable(subject.pipe)


def test_passes_do_not_mix(subject, case):
    """Two different inputs alternate within a step, as guidance branches do."""
    if not case.is_exact:
        pytest.skip("the forecaster does not promise to reproduce anything")
    first, second = subject.call(0), subject.call(-1)
    assert relative_error(first, second) > 1e-2
    with run_of(subject, case) as run:
        for _ in range(STEPS):
            run.next_step()
            assert relative_error(subject.call(0), first) <= 1e-5
            assert relative_error(subject.call(-1), second) <= 1e-5
        summary = run.summary()
    assert summary.reused >= 4
    assert {record.pass_name for record in summary.records} == {"0", "1"}


READING = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default)


class Reads(TorchDispatchMode):
    """Counts how often a tensor is read back to the host."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in READING
        return func(*args, **(kwargs or {}))


def test_planned_policies_add_no_host_sync(subject, case, monkeypatch):
    if registry.policies.get(case.policy)(**_own(case, REUSING)).needs.signals:
        pytest.skip("adaptive policies read their signal back")
    monkeypatch.setattr(History, "on_host", False)  # on the CPU reading back is free, and done
    finish, before_the_end = CacheRun.finish, []

    def finished(run):
        before_the_end.append(cached.count)
        finish(run)

    with Reads() as uncached:
        subject.generate()
    with dc.cached(subject.pipe, **case.options()):
        subject.generate()  # a session's first run looks at what it reuses
        monkeypatch.setattr(CacheRun, "finish", finished)
        with Reads() as cached:
            subject.generate()
        assert dc.summary(subject.pipe).reused > 0
    assert before_the_end[0] <= uncached.count


def test_reads_are_counted():
    subject = Subject("flux-digits")
    with Reads() as uncached:
        subject.generate()
    with dc.cached(subject.pipe, "first_block", threshold=10.0), Reads() as cached:
        subject.generate()
    assert cached.count >= uncached.count + STEPS - 2


def test_history_stays_within_its_stated_bytes(subject, case):
    stated = dc.inspect(
        subject.pipe,
        dc.reference.inputs(subject.name, (3, 8), (5, 6)),
        **case.options(),
    ).cache_bytes
    with dc.cached(subject.pipe, **case.options()):
        subject.generate(steps=2 * STEPS)
        used = dc.summary(subject.pipe).cache_bytes
    assert stated is not None
    assert 0 < used <= stated
