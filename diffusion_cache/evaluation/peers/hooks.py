"""The caches among diffusers' own hooks: what they have in common."""

import contextlib
import functools
from abc import abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

from torch import nn

from ...errors import ConfigError
from .base import Loop, Peer, denoisers_of, leaving_nothing


class DiffusersPeer(Peer):
    """A cache among diffusers' own hooks, put on by its `apply_*` function (some denoisers have no `enable_cache`).

    hook_names: what its hooks are registered as.
    """

    package, module = "diffusers", "diffusers"
    hook_names: ClassVar[tuple[str, ...]]

    @abstractmethod
    def _install(self, denoiser: nn.Module, options: Any, steps: int, loop: Loop) -> None:
        """Hook one denoiser."""

    def _caching(self, hooks: list[Any]) -> list[Any]:
        """Those of its hooks that save work; there must be one."""
        return hooks

    @contextlib.contextmanager
    def _applied(self, pipe: Any, options: Any, steps: int) -> Iterator[None]:
        from diffusers.hooks import HookRegistry

        denoisers, loop = denoisers_of(pipe), Loop(pipe)
        registries: list[Any] = []
        states: list[dict[tuple[int, int], Any]] = []
        with leaving_nothing(pipe, denoisers), contextlib.ExitStack() as stack:
            for denoiser in denoisers:
                registry = HookRegistry.check_if_exists_or_initialize(denoiser)
                registries.append(registry)
                stack.callback(self._remove, registry)
                self._install(denoiser, options, steps, loop)
                registry.invalidate_child_registries_cache()
                hooks = self._hooks(denoiser)
                if not self._caching(hooks):
                    raise ConfigError(
                        f"rival {self.name!r} finds nothing to cache in {type(denoiser).__name__} with {options}: "
                        "other modules may have to be named"
                    )
                states.append(self._give_contexts(denoiser, loop, hooks, getattr(options, "per_pass", False)))

            def reset() -> None:
                # Pipelines reset hooks at their end, so not after an exception; and not on classes without CacheMixin.
                for registry in registries:
                    registry.reset_stateful_hooks(recurse=True)
                for kept in states:
                    kept.clear()

            stack.enter_context(loop.following(reset))
            yield

    def _remove(self, registry: Any) -> None:
        for name in self.hook_names:
            registry.remove_hook(name, recurse=True)
        registry.invalidate_child_registries_cache()

    def _hooks(self, denoiser: nn.Module) -> list[Any]:
        registries: list[Any] = [getattr(part, "_diffusers_hook", None) for part in denoiser.modules()]
        return [
            hook
            for registry in registries
            if registry
            for name, hook in registry.hooks.items()
            if name in self.hook_names
        ]

    @staticmethod
    def _give_contexts(denoiser: nn.Module, loop: Loop, hooks: list[Any], per_pass: bool) -> dict[tuple[int, int], Any]:
        """Enter a cache context around every call of the denoiser where the pipeline has not entered its own.

        The n-th call of a step gets the n-th context. With per_pass, hooks that keep one state whatever the context
        get one for each of a step's calls; these are what is returned, by hook and call.
        """
        from diffusers.hooks.hooks import CacheContext, StateManager, _set_cache_context

        managers = [value for hook in hooks for value in vars(hook).values() if isinstance(value, StateManager)]
        stateful = [hook for hook in hooks if hasattr(hook, "state")] if per_pass else []
        states: dict[tuple[int, int], Any] = {}
        forward = denoiser.forward

        @functools.wraps(forward)
        def with_context(*args: Any, **kwargs: Any) -> Any:
            position = loop.passes
            loop.passes += 1
            if stateful:
                for index, hook in enumerate(stateful):
                    hook.state = states.setdefault((index, position), type(hook.state)())
            if not managers or managers[0]._context is not None:
                return forward(*args, **kwargs)
            _set_cache_context(denoiser, CacheContext(f"pass {position}"))
            try:
                return forward(*args, **kwargs)
            finally:
                _set_cache_context(denoiser, None)

        denoiser.forward = with_context
        return states


def without_stack(denoiser: nn.Module) -> str | None:
    """Why the hooks that step over a whole stack of blocks cannot work on this denoiser."""
    from diffusers.hooks._common import _ALL_TRANSFORMER_BLOCK_IDENTIFIERS
    from diffusers.hooks._helpers import TransformerBlockRegistry

    children = [
        child
        for name, child in denoiser.named_children()
        if name in _ALL_TRANSFORMER_BLOCK_IDENTIFIERS and isinstance(child, nn.ModuleList)
    ]
    blocks = [block for child in children for block in child]
    if len(blocks) < 2:
        return f"{type(denoiser).__name__} has no list of transformer blocks under a name it knows"
    for block in blocks:
        try:
            TransformerBlockRegistry.get(type(block))
        except ValueError:
            return f"blocks of class {type(block).__name__} are not in its registry"
    return None


def attention_names(denoiser: nn.Module) -> list[str]:
    from diffusers.hooks._common import _ATTENTION_CLASSES

    return [name for name, part in denoiser.named_modules() if isinstance(part, _ATTENTION_CLASSES)]
