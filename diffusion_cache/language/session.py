"""A language cache attached to one pipeline, from enable to disable."""

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..engine import session_of
from ..engine.attached import Attached, bracket
from ..engine.intercept import intercept, is_intercepted, release
from ..errors import ConfigError, DiffusionCacheError, DiffusionCacheWarning
from .base import LanguageCache
from .decoder import Decoder
from .run import LanguageRun


def serves(pipe: Any) -> bool:
    """Whether a pipeline decodes masked tokens block by block with a `model`, as diffusers' LLaDA2Pipeline does."""
    components = getattr(pipe, "components", None)
    if not isinstance(components, dict) or not isinstance(components.get("model"), nn.Module):
        return False
    return {"mask_token_id", "block_length"} <= set(inspect.signature(type(pipe).__call__).parameters)


def decoding(pipe: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[int, int]:
    """Tokens in a block, and the mask token, of a call of the pipeline with these arguments."""
    given = inspect.signature(type(pipe).__call__).bind_partial(pipe, *args, **kwargs).arguments
    mask_token = given.get("mask_token_id")
    block = given.get("block_length") or pipe.scheduler.config.block_length
    return block, pipe.mask_token_id if mask_token is None else mask_token


@contextmanager
def enabled(pipe: Any, method: LanguageCache | None) -> Iterator[None]:
    """This method (None for no cache) inside the block; what was enabled before comes back."""
    before, session = session_of(pipe), None
    if method is not None:
        session = LanguageSession(method)
        session.attach_pipeline(pipe)
    elif before is not None:
        before.detach_pipeline(pipe)
    try:
        yield
    finally:
        if session is not None and session_of(pipe) is session:  # the block may have put another in its place, or none
            session.detach_pipeline(pipe)
        if before is not None:
            before.attach_pipeline(pipe)


class LanguageSession(Attached):
    """An interceptor on the pipeline's model and a bracket on its class, installed together and removed exactly."""

    def __init__(self, method: LanguageCache):
        super().__init__()
        self.method = method
        self.model: Any = None
        self.decoder: Decoder | None = None

    def __str__(self) -> str:
        return str(self.method)

    def attach_pipeline(self, pipe: Any) -> None:
        """Attach to a pipeline's model, which is tried out before anything changes.

        Raises:
            ConfigError: for a model that cannot be run in parts, or, where the method is exact on block-causal
                attention alone, whose logits depend on later blocks.
        """
        self._bind(pipe)
        self._patch(type(pipe), "__call__", bracket)
        self._settle(pipe)

    def begin(self, pipe: Any, args: tuple, kwargs: dict[str, Any]) -> LanguageRun | None:
        """Start a run with the arguments of the pipeline's call; None where its model was swapped for an unfit one."""
        if pipe.model is not self.model or not is_intercepted(pipe.model, self):  # swapped or compiled since
            try:
                self._bind(pipe)
            except DiffusionCacheError as error:
                warnings.warn(
                    f"running without the cache, which cannot be attached any more: {error}",
                    DiffusionCacheWarning,
                    stacklevel=4,
                )
                return None
        assert self.decoder is not None
        return LanguageRun(self, self.decoder, pipe, *decoding(pipe, args, kwargs))

    def finish(self, run: LanguageRun) -> None:
        self.last_run = run
        run.finish()

    def _bind(self, pipe: Any) -> None:
        model: Any = pipe.model
        watching = self.method.watcher() is not None
        decoder = Decoder(model, pipe.scheduler.config.block_length, watching)
        if self.method.exact and decoder.reach is None:
            raise ConfigError(
                f"{self.method.name} keeps finished blocks, which is exact where no token looks at later ones; in "
                f"{decoder.name} the logits of the first token change with the last: take dkv or elastic"
            )
        self._unbind()
        intercept(model, self, _handle)
        self.model, self.decoder = model, decoder

    def _unbind(self) -> None:
        if self.model is not None:
            release(self.model, self)
        self.model = self.decoder = None

    def _detach(self) -> None:
        self._unbind()
        super()._detach()


def _handle(run: LanguageRun, inner: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
    return run.model_call(inner, args, kwargs)
