"""Interception of module calls, outside whatever compiles or hooks the module.

`nn.Module.__call__` hands the call to `self._compiled_call_impl` where that is set; `module.compile()` uses it.
Taking that place puts us outside compiled code and outside forward hooks (offloading, LoRA scaling), which then run
only when the module really does. The attribute is no part of a module's state: it is not saved, pickled or deep-
copied.
"""

import functools
from collections.abc import Callable
from types import FunctionType
from typing import Any

from torch import nn
from torch.compiler import is_dynamo_compiling

from ..models import unwrap
from .patches import ACTIVE

ATTRIBUTE = "_compiled_call_impl"
Handler = Callable[[Any, Callable[..., Any], tuple, dict[str, Any]], Any]
Runner = Callable[..., Any]


class Interceptor:
    """Stands in for one module's call; routes it to the handler of the active run's session, if it has one.

    runner: what carries the module out where it is not simply called, as runner(inner, *args, **kwargs); inside of
    every handler, whichever came first. carry_out: the call of the module by it.
    """

    __slots__ = ("carry_out", "handlers", "inner", "module", "previous", "runner")

    def __init__(self, module: nn.Module):
        self.module = module
        self.handlers: dict[Any, Handler] = {}
        self.runner: Runner | None = None
        self.install()

    def install(self) -> None:
        """Take the module's call, keeping what compiles it, if anything, inside."""
        self.previous = vars(self.module).get(ATTRIBUTE)
        self.inner = self.previous or self.module._call_impl
        self.run_by(self.runner)
        setattr(self.module, ATTRIBUTE, self)

    def run_by(self, runner: Runner | None) -> None:
        self.runner = runner
        self.carry_out = self.inner if runner is None else functools.partial(runner, self.inner)

    @property
    def installed(self) -> bool:
        return vars(self.module).get(ATTRIBUTE) is self

    def remove(self) -> None:
        if not self.installed:
            return  # compiled since: what stands there now holds nothing of ours
        if self.previous is None:
            delattr(self.module, ATTRIBUTE)
        else:
            setattr(self.module, ATTRIBUTE, self.previous)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if is_dynamo_compiling():
            return self.inner(*args, **kwargs)  # part of something larger that is compiled: see compiled.py
        run = ACTIVE.get()
        while run is not None:
            handler = self.handlers.get(run.session)
            if handler is not None:
                return handler(run, self.carry_out, args, kwargs)
            run = getattr(run, "outer", None)  # of another denoiser, in a loop with several
        return self.carry_out(*args, **kwargs)


def intercept(module: nn.Module, session: Any, handler: Handler) -> None:
    """Route the module's calls inside this session's runs to the handler."""
    _interceptor(module).handlers[session] = handler


def set_runner(module: nn.Module, runner: Runner) -> None:
    """Carry the module out by runner(inner, *args, **kwargs), in runs of sessions and outside of them."""
    _interceptor(module).run_by(runner)


def runner_of(module: nn.Module) -> Runner | None:
    """What carries the module out, None where it is simply called."""
    current = vars(module).get(ATTRIBUTE)
    return current.runner if isinstance(current, Interceptor) else None


def clear_runner(module: nn.Module) -> None:
    """Simply call the module again; it is as it was if no session intercepts it."""
    current = vars(module).get(ATTRIBUTE)
    if isinstance(current, Interceptor):
        current.run_by(None)
        _remove_unused(current)


def sessions_on(module: nn.Module) -> tuple[Any, ...]:
    """The sessions that intercept the module's calls."""
    current = vars(module).get(ATTRIBUTE)
    return tuple(current.handlers) if isinstance(current, Interceptor) else ()


def is_intercepted(module: nn.Module, session: Any) -> bool:
    return session in sessions_on(module)


def is_compiled(module: nn.Module) -> bool:
    """Whether calls of the module itself run compiled.

    By `torch.compile(module)`, `module.compile()` or `module.forward = torch.compile(module.forward)`.
    """
    current = vars(module).get(ATTRIBUTE)
    inner = current.previous if isinstance(current, Interceptor) else current
    return inner is not None or unwrap(module) is not module or _uncompiled(vars(module).get("forward")) is not None


def run_uncompiled(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Call the module itself without what compiles it, or intercepts it."""
    module = unwrap(module)
    compiled: Any = vars(module).get("forward")
    forward = _uncompiled(compiled)
    if forward is None:
        return module._call_impl(*args, **kwargs)
    module.forward = forward
    try:
        return module._call_impl(*args, **kwargs)
    finally:
        module.forward = compiled


def _uncompiled(forward: Any) -> Callable[..., Any] | None:
    """What was compiled to be a module's `forward`, None where that is not compiled itself."""
    if not isinstance(forward, FunctionType) or getattr(forward, "_torchdynamo_disable", False):
        return None
    if getattr(forward, "_torchdynamo_wrapper_id", id(forward)) != id(forward):
        return None  # a function around a compiled one, with its attributes
    return getattr(forward, "_torchdynamo_orig_callable", None)


def release(module: nn.Module, session: Any) -> None:
    """Take this session's handler off the module; the last one leaves it as it was."""
    current = vars(module).get(ATTRIBUTE)
    if isinstance(current, Interceptor):
        current.handlers.pop(session, None)
        _remove_unused(current)


def _interceptor(module: nn.Module) -> Interceptor:
    current = vars(module).get(ATTRIBUTE)
    return current if isinstance(current, Interceptor) else Interceptor(module)


def _remove_unused(interceptor: Interceptor) -> None:
    if not interceptor.handlers and interceptor.runner is None:
        interceptor.remove()
