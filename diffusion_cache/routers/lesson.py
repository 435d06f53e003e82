"""One trajectory that a router learns from: teacher and student at every step, on the state that the gates led to."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..engine.structure import first_tensor
from ..errors import ConfigError
from ..profiling.generation import StepCall
from ..profiling.trajectory import UnfitError, aligned, combined, guidance_weights
from .mixing import Gates, Run, detached

if TYPE_CHECKING:
    from .training import Trainer


class Lesson:
    """One trajectory that a trainer learns from, of `count` samples.

    clean: noise-free latents, for one along noised images.
    """

    def __init__(self, trainer: "Trainer", count: int, clean: Tensor | None):
        self.trainer, self.count, self.clean = trainer, count, clean
        self.stored = trainer.stored
        self.losses: dict[int, float] = {}  # of each step
        self.slopes: dict[int, dict[int, Tensor]] = {}  # of each step's loss by the gates of steps, [S]
        self.changes: dict[int, Tensor] = {}  # of the weighted losses by the gates of each step, [S]
        self.calls: list[tuple[Tensor, Tensor]] = []  # what the teacher's and the student's gave in this step
        self.gates: dict[int, Gates] = {}
        self.noise: Tensor | None = None

    def call(self, step: int, position: int, run: Run) -> Any:
        trainer = self.trainer
        with trainer.accelerator.autocast():
            if step in trainer.always:
                with torch.no_grad():
                    return run(trainer.gates(step, self.stored))
            if step not in self.gates:
                with torch.enable_grad():
                    self.gates[step] = trainer.gates(step, self.stored)
            with torch.no_grad():
                teacher = first_tensor(run(None))
            with torch.enable_grad():
                student = run(self.gates[step])
        self.calls.append((teacher, first_tensor(student)))
        return detached(student)

    def stepped(self, step: int, given: StepCall) -> Any:
        if self.calls:
            self._check(step)
            with torch.enable_grad():
                self.trainer.learn(step, self._difference(given), self)
            self.calls = []
        result = given.result(given.model_output)
        return result if self.clean is None else self._noised(step, given, result)

    def _check(self, step: int) -> None:
        if not all(bool(torch.isfinite(output).all()) for outputs in self.calls for output in outputs):
            raise ConfigError(
                f"the loss of trajectory {self.trainer.done}, step {step} is not finite: training stops. The last "
                f"checkpoint is kept in {self.trainer.folder}; the same call goes on from it once the model's outputs "
                "are finite"
            )

    def _difference(self, given: StepCall) -> Tensor:
        """The student's guided output less the teacher's, [n, ...]."""
        guided = given.model_output[: self.count]
        try:
            teacher, student = (self._branches(outputs, guided.shape) for outputs in zip(*self.calls, strict=True))
            found = guidance_weights([branch.detach() for branch in student], guided)
        except UnfitError as error:
            raise ConfigError(
                f"{error}, so that the loss of a step cannot be told: train without guidance_rescale, or without "
                "guidance where the pipeline has another way to combine them"
            ) from None
        # rounded, for the last bits of a solution may depend on where in memory its system lies
        guidance = [round(w, 6) for w in found]
        return combined(student, guidance) - combined(teacher, guidance)

    def _branches(self, outputs: Sequence[Tensor], like: torch.Size) -> list[Tensor]:
        """Of each guidance branch, of which a call may have fewer once guidance ends."""
        parts = [part for output in outputs for part in output.chunk(max(1, len(output) // self.count))]
        return [aligned(part, like) for part in parts]

    def _noised(self, step: int, given: StepCall, result: Any) -> Any:
        """The next state as a training image with the noise that the trajectory began with."""
        assert self.clean is not None
        scheduler = self.trainer.mixture.pipe.scheduler
        if self.noise is None:
            self.noise = given.sample / getattr(scheduler, "init_noise_sigma", 1.0)
        if not hasattr(scheduler, "add_noise"):
            raise ConfigError(f"{type(scheduler).__name__} cannot noise images: train another kind of router")
        following = scheduler.timesteps[min(step + 1, len(scheduler.timesteps) - 1)]
        clean = self.clean.repeat(len(self.noise) // len(self.clean), *[1] * (self.clean.ndim - 1)).to(self.noise)
        state = scheduler.add_noise(clean, self.noise, following.expand(len(clean)))
        if isinstance(result, tuple):
            return (state, *result[1:])
        result.prev_sample = state
        return result
