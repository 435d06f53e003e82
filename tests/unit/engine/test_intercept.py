"""Interception: outside hooks and compiled code, and gone without a trace."""

import copy
import functools
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from diffusion_cache.engine.intercept import (
    ATTRIBUTE,
    clear_runner,
    intercept,
    is_compiled,
    is_intercepted,
    release,
    run_uncompiled,
    runner_of,
    set_runner,
)
from diffusion_cache.engine.patches import ACTIVE


@pytest.fixture
def enter():
    """Makes a session's run the active one."""
    tokens = []

    def enter(session):
        tokens.append(ACTIVE.set(session and SimpleNamespace(session=session)))

    yield enter
    for token in reversed(tokens):
        ACTIVE.reset(token)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    yield
    torch._dynamo.reset()


def adding(amount, log=None):
    def handler(run, inner, args, kwargs):
        if log is not None:
            log.append("handler")
        return inner(*args, **kwargs) + amount

    return handler


class Layer(nn.Linear):
    """dynamo skips torch's own modules when they are the root."""

    def forward(self, x):
        return nn.functional.linear(x, self.weight, self.bias)


def linear():
    layer = Layer(3, 3).requires_grad_(False)
    layer.weight.copy_(torch.arange(9.0).reshape(3, 3))  # sums of whole numbers are exact in any order
    layer.bias.fill_(1.0)
    return layer


X = torch.ones(2, 3)


def test_only_the_active_runs_session_is_routed(enter):
    module, session = linear(), object()
    plain = module(X)
    intercept(module, session, adding(5))
    assert is_intercepted(module, session)
    assert not is_intercepted(module, object())
    assert torch.equal(module(X), plain)
    enter(session)
    assert torch.equal(module(X), plain + 5)
    enter(object())
    assert torch.equal(module(X), plain)
    enter(None)
    assert torch.equal(module(X), plain)


def test_handler_sees_run_and_arguments_and_need_not_call(enter):
    module, session, seen = linear(), object(), []

    def handler(run, inner, args, kwargs):
        seen.append((run, args, kwargs))
        return "instead"

    intercept(module, session, handler)
    enter(session)
    assert module(X, option=1) == "instead"
    ((run, args, kwargs),) = seen
    assert run.session is session
    assert args[0] is X
    assert kwargs == {"option": 1}


def test_order_relative_to_forward_hooks(enter):
    module, session, log = linear(), object(), []

    def outside(run, inner, args, kwargs):
        log.append("in")
        out = inner(*args, **kwargs)
        log.append("out")
        return out

    intercept(module, session, outside)
    module.register_forward_pre_hook(lambda *_: log.append("pre hook"))  # later than the interception, and still inside
    module.register_forward_hook(lambda *_: log.append("hook"))
    enter(session)
    module(X)
    assert log == ["in", "pre hook", "hook", "out"]
    log.clear()
    intercept(module, session, lambda run, inner, args, kwargs: X)
    module(X)
    assert log == []  # hooks run only when the module does


def test_exceptions_pass_through(enter):
    module, session = linear(), object()
    intercept(module, session, adding(1))
    enter(session)
    with pytest.raises(RuntimeError):
        module(torch.ones(2, 7))
    assert torch.equal(module(X), nn.functional.linear(X, module.weight, module.bias) + 1)


def test_two_sessions_on_one_module(enter):
    module, first, second = linear(), object(), object()
    plain = module(X)
    intercept(module, first, adding(1))
    intercept(module, second, adding(2))
    enter(first)
    assert torch.equal(module(X), plain + 1)
    enter(second)
    assert torch.equal(module(X), plain + 2)
    release(module, first)
    assert (is_intercepted(module, first), is_intercepted(module, second)) == (False, True)
    assert torch.equal(module(X), plain + 2)
    release(module, second)
    assert ATTRIBUTE not in vars(module)
    assert torch.equal(module(X), plain)


def test_removal_is_exact():
    module, session = linear(), object()
    before = dict(vars(module))
    intercept(module, session, adding(1))
    intercept(module, session, adding(2))
    assert {key for key in vars(module) if key not in before} == {ATTRIBUTE}
    release(module, object())  # of nobody
    assert is_intercepted(module, session)
    release(module, session)
    release(module, session)
    assert vars(module) == before
    assert ATTRIBUTE not in vars(module)


def running(log, amount=0):
    def runner(inner, *args, **kwargs):
        log.append("runner")
        return inner(*args, **kwargs) + amount

    return runner


@pytest.mark.parametrize("runner_first", [True, False])
def test_a_runner_is_inside_of_every_handler(enter, runner_first):
    module, session, log = linear(), object(), []
    plain, before = module(X), dict(vars(module))
    steps = [lambda: set_runner(module, running(log, 1)), lambda: intercept(module, session, adding(5, log))]
    for step in steps if runner_first else reversed(steps):
        step()
    assert torch.equal(module(X), plain + 1)  # outside of runs as well
    enter(session)
    log.clear()
    assert torch.equal(module(X), plain + 6)
    assert log == ["handler", "runner"]
    assert runner_of(module) is not None
    ways = [lambda: clear_runner(module), lambda: release(module, session)]
    first, second = ways if runner_first else reversed(ways)
    first()
    assert torch.equal(module(X), plain + (5 if runner_first else 1))
    second()
    assert runner_of(module) is None
    assert vars(module) == before


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_are_clean(copied, enter):
    module, session = linear(), object()
    intercept(module, session, lambda run, inner, args, kwargs: "instead")
    clone = copied(module)
    enter(session)
    assert ATTRIBUTE not in vars(clone)
    assert torch.equal(clone(X), nn.functional.linear(X, module.weight, module.bias))
    assert module(X) == "instead"


def test_state_dict_and_modules_are_untouched():
    module, session = nn.Sequential(linear(), nn.ReLU()), object()
    names, keys = [name for name, _ in module.named_modules()], list(module.state_dict())
    intercept(module[0], session, adding(1))
    assert [name for name, _ in module.named_modules()] == names
    assert list(module.state_dict()) == keys


# module.compile()


def test_compiled_before_stays_inside(enter):
    """The handler counts in Python at every call, and yet one graph serves all: it is not traced."""
    module, session, counter, log = linear(), object(), CompileCounter(), []
    plain = module(X)
    module.compile(backend=counter, fullgraph=True)
    compiled = vars(module)[ATTRIBUTE]
    intercept(module, session, adding(5, log))
    enter(session)
    for _ in range(4):
        assert torch.equal(module(X), plain + 5)
    assert len(log) == 4
    assert (counter.frame_count, counter.op_count) == (1, 1)  # the linear layer alone, without + 5
    release(module, session)
    assert vars(module)[ATTRIBUTE] is compiled
    assert torch.equal(module(X), plain)
    assert counter.frame_count == 1


def test_compiled_after_is_taken_back_by_intercepting_again(enter):
    module, session, counter, log = linear(), object(), CompileCounter(), []
    plain = module(X)
    intercept(module, session, adding(5, log))
    module.compile(backend=counter, fullgraph=True)
    compiled = vars(module)[ATTRIBUTE]
    enter(session)
    assert not is_intercepted(module, session)  # what the session looks for at each run's start
    assert torch.equal(module(X), plain)
    assert log == []
    intercept(module, session, adding(5, log))
    for _ in range(3):
        assert torch.equal(module(X), plain + 5)
    assert len(log) == 3
    assert (counter.frame_count, counter.op_count) == (1, 1)
    release(module, session)
    assert vars(module)[ATTRIBUTE] is compiled


def test_compiled_after_and_never_taken_back_stays_compiled():
    module, session = linear(), object()
    plain = module(X)
    intercept(module, session, adding(5))
    module.compile(backend="eager")
    compiled = vars(module)[ATTRIBUTE]
    release(module, session)
    assert vars(module)[ATTRIBUTE] is compiled
    assert torch.equal(module(X), plain)


@pytest.mark.parametrize("intercepted_first", [True, False])
def test_members_of_a_compiled_parent_are_not_reached(intercepted_first, enter):
    """dynamo inlines them past their interceptors: one graph, never broken, and nothing of it can be skipped."""

    class Parent(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = linear()

        def forward(self, x):
            return self.block(x).relu()

    parent, session, counter, log = Parent(), object(), CompileCounter(), []
    plain = parent(X)
    steps = [
        lambda: intercept(parent.block, session, adding(5, log)),
        lambda: parent.compile(backend=counter, fullgraph=True),
    ]
    for step in steps if intercepted_first else steps[::-1]:
        step()
    intercept(parent, session, adding(1))
    enter(session)
    for _ in range(3):
        assert torch.equal(parent(X), plain + 1)
    assert log == []
    assert counter.frame_count == 1


def compiled_by_forward(module, backend):
    module.forward = torch.compile(module.forward, backend=backend)
    return module


def compiled_in_place(module, backend):
    module.compile(backend=backend)
    return module


def compiled_by_wrapping(module, backend):
    return torch.compile(module, backend=backend)


@pytest.mark.parametrize("compiled", [compiled_by_forward, compiled_in_place, compiled_by_wrapping])
def test_what_is_compiled_can_run_uncompiled(compiled):
    counter, plain = CompileCounter(), linear()
    assert not is_compiled(plain)
    module = compiled(linear(), counter)
    assert is_compiled(module)
    assert torch.equal(run_uncompiled(module, X), plain(X))
    assert counter.frame_count == 0
    assert torch.equal(module(X), plain(X))
    assert counter.frame_count == 1


def test_what_is_wrapped_around_a_compiled_forward_stays():
    module, plain = compiled_by_forward(linear(), "eager"), linear()
    forward = module.forward

    @functools.wraps(forward)
    def doubled(x):
        return 2 * forward(x)

    module.forward = doubled
    assert torch.equal(run_uncompiled(module, X), 2 * plain(X))
    module.forward = functools.update_wrapper(functools.partial(doubled), forward)
    assert torch.equal(run_uncompiled(module, X), 2 * plain(X))
    plain.forward = torch.compiler.disable(plain.forward)
    assert not is_compiled(plain)
