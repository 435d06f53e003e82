"""The front door: slice_features."""

from collections.abc import Callable
from types import TracebackType
from typing import Any

from torch import nn

from ..engine.intercept import clear_runner, is_compiled, runner_of, set_runner
from ..errors import ConfigError
from ..models import unwrap
from .runner import FRAME, Chain, Frame, Runner
from .table import CHAINS, FORWARDS


class SlicedFeatures:
    """A denoiser whose operators run in slices, until `remove` or the end of the `with` block.

    denoiser: the module. max_bytes: see `slice_features`. modules: names of those that can run in slices. least_bytes:
    the least max_bytes that the calls so far could have done with, 0 before the first.
    """

    def __init__(self, denoiser: nn.Module, max_bytes: int):
        self.denoiser = denoiser
        self.max_bytes = max_bytes
        self.least_bytes = 0
        named = [(name, module) for name, module in denoiser.named_modules() if module is not denoiser]
        runners = {
            module: Runner(name, module, FORWARDS[_class(module)])
            for name, module in named
            if _class(module) in FORWARDS
        }
        if not runners:
            known = ", ".join(sorted(name.rsplit(".", 1)[1] for name in FORWARDS))
            raise ConfigError(
                f"{type(denoiser).__name__} has nothing that can run in slices; modules that can are {known}"
            )
        self.modules = tuple(runner.name for runner in runners.values())
        self._taken: list[nn.Module] = []
        for module, runner in runners.items():
            self._take(module, runner)
        for _, block in named:
            if _class(block) in CHAINS:
                first, second = (getattr(block, name) for name in CHAINS[_class(block)])
                for module, follower in zip(first, second, strict=False):  # the middle block has one resnet more
                    runners[module].follower = runners.get(follower)
                self._take(block, Chain(block))
        self._take(denoiser, self._denoise)

    def remove(self) -> None:
        """Run everything whole again; all modules are as they were. Nothing happens the second time."""
        while self._taken:
            clear_runner(self._taken.pop())

    def __enter__(self) -> "SlicedFeatures":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()

    def _take(self, module: nn.Module, runner: Callable[..., Any]) -> None:
        set_runner(module, runner)
        self._taken.append(module)

    def _denoise(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        frame = Frame(self.max_bytes)
        token = FRAME.set(frame)
        try:
            output = inner(*args, **kwargs)
        finally:
            FRAME.reset(token)
        self.least_bytes = max(self.least_bytes, frame.least)
        if frame.least > self.max_bytes:
            raise ConfigError(
                f"a slice of {type(self.denoiser).__name__} cannot be made to fit in max_bytes={self.max_bytes}: at "
                f"this size, the least that works is max_bytes={frame.least}"
            )
        return output


def slice_features(denoiser: nn.Module, max_bytes: int) -> SlicedFeatures:
    """Make a denoiser take less memory: run its operators on slices of their inputs, one after the other.

    Spatial layers run on slices of batch·frames, temporal layers on slices of positions with the statistics of their
    norms taken over all of them, Wan's blocks and feed-forwards on slices of tokens; consecutive operators that are
    sliced alike run as one group on each slice (feature slicer and operator grouping of Streamlined Inference, NeurIPS
    2024). The output is the same up to rounding. It works beside every cache: where a cache stores something from
    inside a group, the group's parts are sliced instead. Compiled regions, and modules with hooks, run whole.

        with dc.slice_features(pipe.unet, max_bytes=256 * 2**20):
            frames = pipe(image).frames

    Args:
        denoiser: the transformer or UNet. It stays sliced until `remove()` of what is returned, or the `with` block's
            end.
        max_bytes: the most bytes that a group may take for one slice, beside its own input and output, which are
            there whole. Slices are as large as that allows; what one takes is measured in the first call of each size.

    Raises:
        ConfigError: for anything but a denoiser, one that is sliced already or compiled, one in which nothing is known
            that can be sliced, and a max_bytes that is no positive number. From the denoiser's call, if slices of one
            take more than max_bytes: it names the least that works.
    """
    if not isinstance(denoiser, nn.Module):
        raise ConfigError(
            f"slice_features takes a denoiser, such as pipe.unet or pipe.transformer, not {type(denoiser).__name__}"
        )
    if not isinstance(max_bytes, int) or max_bytes < 1:
        raise ConfigError(f"max_bytes must be a number of bytes, at least 1, not {max_bytes!r}")
    if is_compiled(denoiser):
        raise ConfigError(
            f"{type(unwrap(denoiser)).__name__} is compiled, and compiled code runs whole: slice it before, or instead"
        )
    if any(runner_of(module) is not None for module in denoiser.modules()):
        raise ConfigError(f"{type(denoiser).__name__} or a part of it runs in slices already: remove() that first")
    return SlicedFeatures(denoiser, max_bytes)


def _class(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"
