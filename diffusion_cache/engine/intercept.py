"""Interception of module calls, outside whatever compiles or hooks the module.

`nn.Module.__call__` hands the call to `self._compiled_call_impl` where that is set; `module.compile()` uses it.
Taking that place puts us outside compiled code and outside forward hooks (offloading, LoRA scaling), which then run
only when the module really does. The attribute is no part of a module's state: it is not saved, pickled or deep-
copied.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..models import unwrap
from .patches import ACTIVE

ATTRIBUTE = "_compiled_call_impl"
Handler = Callable[[Any, Callable[..., Any], tuple, dict[str, Any]], Any]


class Interceptor:
    """Stands in for one module's call; routes it to the handler of the active run's session, if it has one."""

    __slots__ = ("handlers", "inner", "module", "previous")

    def __init__(self, module: nn.Module):
        self.module = module
        self.handlers: dict[Any, Handler] = {}
        self.install()

    def install(self) -> None:
        """Take the module's call, keeping what compiles it, if anything, inside."""
        self.previous = vars(self.module).get(ATTRIBUTE)
        self.inner = self.previous or self.module._call_impl
        setattr(self.module, ATTRIBUTE, self)

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
        if torch.compiler.is_compiling():
            return self.inner(*args, **kwargs)  # part of something larger that is compiled: see compiled.py
        run = ACTIVE.get()
        if run is not None:
            handler = self.handlers.get(run.session)
            if handler is not None:
                return handler(run, self.inner, args, kwargs)
        return self.inner(*args, **kwargs)


def intercept(module: nn.Module, session: Any, handler: Handler) -> None:
    """Route the module's calls inside this session's runs to the handler."""
    current = vars(module).get(ATTRIBUTE)
    interceptor = current if isinstance(current, Interceptor) else Interceptor(module)
    interceptor.handlers[session] = handler


def is_intercepted(module: nn.Module, session: Any) -> bool:
    current = vars(module).get(ATTRIBUTE)
    return isinstance(current, Interceptor) and session in current.handlers


def is_compiled(module: nn.Module) -> bool:
    """Whether calls of the module itself run compiled, by `torch.compile(module)` or `module.compile()`."""
    current = vars(module).get(ATTRIBUTE)
    inner = current.previous if isinstance(current, Interceptor) else current
    return inner is not None or unwrap(module) is not module


def release(module: nn.Module, session: Any) -> None:
    """Take this session's handler off the module; the last one leaves it as it was."""
    current = vars(module).get(ATTRIBUTE)
    if isinstance(current, Interceptor):
        current.handlers.pop(session, None)
        if not current.handlers:
            current.remove()
