"""Training a router on a pipeline's own generations.

Each trajectory is one call of the pipeline, on samples that no other trajectory has. At every step the denoiser runs
twice on the state that the gates have led to: without a cache (the teacher, without gradients) and with mixed spans
(the student), whose guided outputs are compared; the step's logits are updated, and the sampler goes on from the
student's. No graph outlives its step; of features, those are held that forecasts can still depend on,
and of every step while the image-error proxy is measured.
"""

import json
import math
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..context import Feature
from ..errors import ConfigError
from ..files import written
from ..fingerprint import Fingerprint
from ..models import Span, find_denoisers
from ..ops import double
from ..plain import digest, plain_json
from ..plan import Plan
from ..planning.static import evaluations, static_plan
from ..policies import Planned
from ..processes import accelerator as new_accelerator
from ..profile import Profile
from ..profiling import trajectory
from ..profiling.generation import Batch, Teacher, attached, last_state, plan_method, teach
from ..profiling.measure import Given, MakeBatch, Options
from ..profiling.recorder import surveyed
from .base import HARD, Recipe
from .lesson import Lesson
from .mixing import Gates, Mixture
from .proxy import image_errors
from .router import Router, above, budget_of, ranked

TINY = 1e-30
NO_LOSS = 1e-8  # in units of the largest loss of a trajectory's steps
CHECKPOINT, LOG = "checkpoint.pt", "training.json"
PRICE_RATE = 2.0  # how the price answers to compute above the target: by exp(rate × what is too much)
MOST_HELD_OUT = 1000  # samples from this number on are trained on
TOGETHER = 16  # samples generated in one call where nothing is learned
Each = TypeVar("Each")
Samples = Callable[[Sequence[int]], Sequence[Given]]  # prompt and seed of samples by number
Clean = Callable[[Sequence[int]], Tensor]  # noise-free latents of the same, [n, ...]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Settings:
    """How long, and on what, a router is trained.

    compute: share of the uncached run's arithmetic that its schedule takes, or None for whatever its gates and the
    recipe's beta lead to. trajectories: pipeline calls at most, of `batch` samples over all processes. accumulation:
    trajectories that an update takes the mean gradient of (the last update those that are left, and the first one
    without the trajectory that finds what compute costs). refreshes: how often the image-error proxy is measured.
    evaluate_every: trajectories between looks at the hard schedule's error on `held_out` samples; training ends after
    `patience` looks without a better one, and the best one's router is kept (without a compute, the last). seed: of the
    samples and random logits.
    """

    compute: float | None = 0.5
    trajectories: int = 40
    batch: int = 4
    accumulation: int = 1
    refreshes: int = 3
    evaluate_every: int = 4
    held_out: int = 16
    patience: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            least = 0 if name == "seed" else 1
            if name != "compute" and (not isinstance(value, int) or value < least):
                raise ConfigError(f"{name} must be a whole number of at least {least}, not {value!r}")
        if self.held_out > MOST_HELD_OUT:
            raise ConfigError(f"held_out may be {MOST_HELD_OUT} at most, not {self.held_out}")


@dataclass(frozen=True)
class Result:
    """plan: of the best router. error: relative L2 distance of its last states to the uncached run's, geometric mean.

    log: of each trajectory, its number and loss, the compute that the gates keep, the price, CPU seconds and peak bytes
    so far, and the error where it was measured.
    """

    plan: Plan
    error: float
    log: tuple[Mapping[str, Any], ...]


def train(
    make_batch: MakeBatch,
    samples: Samples,
    profile: Profile,
    recipe: Recipe,
    settings: Settings | None = None,
    *,
    folder: Path,
    clean: Clean | None = None,
    accelerator: Any = None,
    progress: Progress = lambda what, done, of: None,
) -> Result:
    """Train a router for what a profile was made of, and give its hard schedule as a plan of that profile.

    make_batch: the batch that generates given samples, always on the profiled pipeline, sampler and steps. clean: for a
    recipe that trains on images. accelerator: of `accelerate`, whose processes share every batch. Checkpoints in
    `folder` after every update let an interrupted training go on, to the same router bit for bit on the CPU.

    Raises:
        ConfigError: for settings that cannot work or a compute out of reach, a pipeline other than the profile's,
            a folder with another training's checkpoint, and a loss that is not finite: the last checkpoint is kept.
        NoSpansError: if the pipeline has no spans at the profile's scope.
    """
    accelerator = accelerator or new_accelerator()
    trainer = Trainer(
        make_batch, samples, profile, recipe, settings or Settings(), folder, clean, accelerator, progress
    )
    return trainer.run()


class Trainer:
    """One process's part of a training."""

    def __init__(
        self,
        make_batch: MakeBatch,
        samples: Samples,
        profile: Profile,
        recipe: Recipe,
        settings: Settings,
        folder: Path,
        clean: Clean | None,
        accelerator: Any,
        progress: Progress,
    ):
        self.make_batch, self.samples, self.profile = make_batch, samples, profile
        self.recipe, self.settings, self.folder, self.clean = recipe, settings, folder, clean
        self.accelerator, self.progress = accelerator, progress
        self.always = recipe.always(profile.total)
        self._check()
        shares = torch.tensor([span.share for span in profile.spans])
        self.costs = shares / shares.mean()
        self.starts = recipe.logits(profile, settings.compute, settings.seed)
        self.router = Router(self.starts[0], self.always)
        self.optimizers = {
            step: torch.optim.Adam([row], lr=recipe.lr)
            for step, row in enumerate(self.router.rows)
            if row.requires_grad
        }
        self.price = recipe.beta
        self.weights = torch.ones(profile.total, dtype=torch.float64)
        self.measured: Tensor | None = None  # the image-error proxy, in the trajectory that it is of
        self.done, self.waited = 0, 0
        self.since = 0  # the first trajectory of which gradients are held
        self.best, self.best_logits = math.inf, self.router.logits
        self.log: list[dict[str, Any]] = []
        self.spent, self.began = 0.0, time.process_time()  # CPU seconds of earlier processes, and when this one began

    def _check(self) -> None:
        recipe, settings, profile, world = self.recipe, self.settings, self.profile, self.accelerator.num_processes
        if recipe.beta is None and settings.compute is None:
            raise ConfigError(f"{recipe.name} needs a compute to find its beta for, or a beta")
        if settings.compute is not None:
            budget_of(profile, settings.compute, len(self.always))
        if len({span.denoiser for span in profile.spans}) > 1:
            raise ConfigError("a router decides for one denoiser; this pipeline has several")
        if profile.total < 2 or not any(span.share > 0 for span in profile.spans):
            raise ConfigError(
                "there is no span to train: the profile has one step, or none of its spans does any arithmetic"
            )
        if recipe.images and self.clean is None:
            raise ConfigError(f"{recipe.name} trains on images: give clean, or take another recipe")
        for name in ("batch", "held_out"):
            if getattr(settings, name) % world:
                raise ConfigError(f"{name} must be a multiple of the {world} processes, not {getattr(settings, name)}")

    def run(self) -> Result:
        first = self._batch(range(1))
        denoisers = find_denoisers(first.pipe)
        self.profile.check(first.pipe, denoisers)
        self.fingerprint = replace(Fingerprint.of(first.pipe, denoisers), versions={})
        spans = self._spans(first)
        parameters = [p for module in denoisers.values() for p in module.parameters()]
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        for parameter in trained:
            parameter.requires_grad_(False)
        try:
            self.mixture = Mixture(first.pipe, spans, self.recipe.order, self._feature)
            held_out = self._mine(range(self.settings.held_out))
            self.teachers = [teach(self._batch(part)) for part in parts(held_out, self.profile)]
            self._resume()
            return self._trained()
        finally:
            for parameter in trained:
                parameter.requires_grad_(True)

    @property
    def _feature(self) -> Feature:
        return self.profile.facts.get("feature", "auto")

    def _spans(self, batch: Batch) -> list[Span]:
        """The pipeline's spans, as the profile has them."""
        profile = self.profile
        with surveyed(batch, profile.scope, profile.depth, self._feature) as (_, survey):
            names = [watched.facts.name for watched in survey.spans]
        if survey.steps != profile.total:
            raise ConfigError(
                f"the profile has {profile.total} steps and the generation {survey.steps}: profile again, or train "
                "with the profile's number of steps"
            )
        if names != [span.name for span in profile.spans]:
            raise ConfigError("the pipeline has other spans than the profile: profile this model")
        unusable = [name for name in names if name in survey.unusable]
        if unusable:
            raise ConfigError(f"{unusable[0]} {survey.unusable[unusable[0]]}: choose another scope")
        return [watched.span for watched in survey.spans]

    def _mine(self, numbers: Sequence[int]) -> Sequence[int]:
        return numbers[self.accelerator.process_index :: self.accelerator.num_processes]

    def _batch(self, numbers: Sequence[int]) -> Batch:
        return self.make_batch(self.samples(numbers))

    # training

    def _trained(self) -> Result:
        settings = self.settings
        if not self.log:
            self._begin()
        while self.done < settings.trajectories and self.waited < settings.patience:
            every = -(-settings.trajectories // settings.refreshes)
            first = MOST_HELD_OUT + self.done * settings.batch
            numbers = self._mine(range(first, first + settings.batch))
            batch = self._batch(numbers)
            if self.recipe.proxy != "none" and self.done % every == 0:
                self._weigh(batch)
            clean = None if self.clean is None or not self.recipe.images else self.clean(numbers)
            lesson = Lesson(self, batch.count, clean)
            self.mixture.generate(batch, lesson)
            if self.recipe.gates == HARD:
                self._learn_hard(lesson)
            self._paid(lesson)
            self.measured = None
            self.done += 1
            loss = sum(lesson.losses.values()) / len(lesson.losses)
            self.log.append({"trajectory": self.done, "loss": self._mean(loss)})
            if self.done % settings.evaluate_every == 0 or self.done == settings.trajectories:
                self._look()
            self.log[-1] |= {
                "compute": self.compute,
                "price": self.price,
                "seconds": self.spent + time.process_time() - self.began,
                # of this process, and of those that it goes on from
                "peak_bytes": max(
                    self.log[-2].get("peak_bytes", 0), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
                ),
            }
            if self._completes(self.done):
                self._keep()
        hard = self.hard(self.best_logits)
        facts = {
            "router": self.recipe.name,
            "recipe": plain_json(asdict(self.recipe)),
            "settings": plain_json(asdict(settings)),
            "trajectories": self.done,
            "error": self.best,
        }
        plan, error = self.plan(hard, facts), self.best
        if self.recipe.fitted:
            plan, error = min([(plan, error), self._fitted(plan)], key=lambda found: found[1])
            plan = replace(plan, facts={**plan.facts, "error": error})
        return Result(plan, error, tuple(self.log))

    def _fitted(self, plan: Plan) -> tuple[Plan, float]:
        """The plan with weights fitted to the trajectory for each span, on samples of their own; and its error."""
        first = MOST_HELD_OUT + self.settings.trajectories * self.settings.batch
        teacher = teach(self._batch(range(first, first + self.settings.held_out)))
        groups = tuple(range(len(self.profile.spans)))
        settings = trajectory.Settings(
            plan.scope, plan.depth, self.recipe.order + 1, groups=groups, feature=self._feature
        )
        found = trajectory.fit(teacher, Planned(plan), settings)
        nodes, weights, _ = found.forecaster.as_tensors(plan.total, teacher.branches)
        facts = {**plan.facts, "left_to_taylor": {str(step): why for step, why in sorted(found.notes.items())}}
        plan = replace(plan, nodes=nodes, weights=weights, row_passes=teacher.rows, facts=facts)
        return plan, self.error(plan)

    def _begin(self) -> None:
        """Start with the logits whose hard schedule is best."""
        for logits in self.starts:
            self.router.load_state_dict(Router(logits, self.always).state_dict())
            self._look()
        self.waited = 0
        self.router.load_state_dict(Router(self.best_logits, self.always).state_dict())

    def learn(self, step: int, difference: Tensor, lesson: Lesson) -> None:
        """Note what the loss of a step says of gates, and update what depends on no later step.

        difference: of the guided outputs, [n, ...].
        """
        lesson.losses[step] = float(difference.detach().square().mean())
        lesson.slopes[step] = dict(zip(*self._changes(step, difference, lesson.gates), strict=True))
        if self.recipe.gates == HARD:
            return
        if self.measured is not None:
            self.weights[step] = self.measured[step]  # what the cache at this step does to the sample
        lesson.changes[step] = lesson.slopes[step][step] * float(self.weights[step])
        self._update(step, lesson.changes[step], lesson.gates[step].mix)

    def _learn_hard(self, lesson: Lesson) -> None:
        """Update by the losses of a whole trajectory, each of which tells of the gates of several steps."""
        if self.measured is not None:
            self._weigh_losses(lesson.losses, self.measured)
        for step, changes in lesson.slopes.items():
            for place, change in changes.items():
                weighted = change * float(self.weights[step])
                lesson.changes[place] = lesson.changes[place] + weighted if place in lesson.changes else weighted
        for step, change in lesson.changes.items():
            self._update(step, change, self.router.rows[step].sigmoid())

    def _weigh_losses(self, losses: Mapping[int, float], measured: Tensor) -> None:
        """Weigh steps by what the cache there does to the sample, per unit of the loss that does it.

        A step that is wholly computed has neither, but would have: it gets what lies between its neighbours' weights.
        """
        steps = torch.tensor([*losses])
        found = self._reduced(torch.tensor([*losses.values()], dtype=torch.float64))
        lossy = found > NO_LOSS * found.max()
        if lossy.any():
            known, weights = steps[lossy], measured[steps[lossy]] / found[lossy]
            self.weights[steps] = torch.from_numpy(np.interp(steps.numpy(), known.numpy(), weights.numpy()))

    def _changes(
        self, step: int, difference: Tensor, gates: Mapping[int, Gates]
    ) -> tuple[Sequence[int], Sequence[Tensor]]:
        """Steps, and the loss's derivative by their gates, [S] each: where the gates stand, or for hard ones halfway.

        In one gate the loss is a parabola, as far as the denoiser is linear, and its slope at 1/2 is what opening the
        gate changes. Where the gate stands, at an end, it lacks half the curvature 2‖J_i‖²/n, J_i being the derivative
        of the outputs; the square of that of their product with a standard normal vector is ‖J_i‖² in the mean.
        """
        count = difference.numel()
        total = difference.square().sum()  # not the mean, whose gradient 16 bits may round to nothing
        if self.recipe.gates != HARD:
            (slope,) = torch.autograd.grad(total, gates[step].mix)
            return [step], [slope / count]
        mixes = [gate.mix for gate in gates.values()]
        slopes = torch.autograd.grad(total, mixes, retain_graph=True, materialize_grads=True)
        seed = (self.settings.seed * self.settings.trajectories + self.done) * self.profile.total + step
        generator = torch.Generator().manual_seed(
            seed * self.accelerator.num_processes + self.accelerator.process_index
        )
        probe = torch.randn(difference.shape, generator=generator).to(difference)
        along = torch.autograd.grad((difference * probe).sum(), mixes, materialize_grads=True)
        return list(gates), [
            (slope + (0.5 - mix.detach()) * 2 * other.square()) / count
            for slope, mix, other in zip(slopes, mixes, along, strict=True)
        ]

    def _update(self, step: int, change: Tensor, mix: Tensor) -> None:
        """One step of the optimiser, once a gradient of all trajectories that it is the mean of is there."""
        row = self.router.rows[step]
        mix.backward(change + (self.price or 0.0) * self.costs)
        if row.grad is not None and self._completes(self.done + 1) and self.price is not None:
            first = max(self.done - self.done % self.settings.accumulation, self.since)
            row.grad = self._reduced(row.grad) / (self.done + 1 - first)
            self.optimizers[step].step()
            row.grad = None
            self.router.clamp(step)

    def _completes(self, made: int) -> bool:
        """Whether so many trajectories end with the last one that an update takes the mean gradient of."""
        return made % self.settings.accumulation == 0 or made == self.settings.trajectories

    def _paid(self, lesson: Lesson) -> None:
        """The price that compute will have: what the last cell of the budget is worth, and then by dual ascent."""
        if self.recipe.beta is not None:
            return
        assert self.settings.compute is not None
        if self.price is not None:
            self.price *= math.exp(PRICE_RATE * (self.compute - self.settings.compute))
            return
        changes = self._reduced(torch.stack([*lesson.changes.values()]))
        worth, order = (-changes / self.costs).flatten().sort(descending=True)
        left = budget_of(self.profile, self.settings.compute, len(self.always))
        left -= len(self.always) * sum(span.share for span in self.profile.spans)
        shares = torch.tensor([span.share for span in self.profile.spans]).repeat(len(changes))[order]
        last = min(int((shares.cumsum(0) <= left).sum()), len(worth) - 1)
        self.price = max(float(worth[last]), 0.01 * float(changes.abs().mean()))
        self._drop_gradients(self.done + 1)

    def _drop_gradients(self, since: int) -> None:
        """since: the first trajectory that the next update takes the mean of."""
        self.since = since
        for row in self.router.rows:
            row.grad = None

    @property
    def compute(self) -> float:
        """The share of an uncached run's arithmetic that the gates keep, open as far as they are."""
        shares = torch.tensor([span.share for span in self.profile.spans])
        return 1 - float(((1 - self.router.logits.sigmoid()) @ shares).sum()) / self.profile.total

    def _weigh(self, batch: Batch) -> None:
        """Measure the image-error proxy; the weights of the steps have mean one."""
        stored = self.stored
        with torch.no_grad():
            gates = [self.gates(step, stored)._replace(keep=None) for step in range(self.profile.total)]
        found = self._reduced(image_errors(self.mixture, batch, gates, self.recipe.proxy))
        mean = float(found[1:].mean())
        if mean > 0:  # else nothing is reused, and all steps count alike
            self.measured = found / mean

    def _reduced(self, value: Tensor) -> Tensor:
        """The mean over processes."""
        return self.accelerator.reduce(value.to(self.accelerator.device), "mean").to(value.device)

    def _mean(self, value: float) -> float:
        return float(self._reduced(torch.tensor(value, dtype=torch.float64)))

    # schedules

    def gates(self, step: int, stored: Tensor) -> Gates:
        """Of a step in training. stored: bool [T, S], the spans whose features are kept."""
        if step in self.always:
            return Gates.computing(len(self.costs))
        progress = self.done / self.settings.trajectories
        return self.recipe.gated(self.router.rows[step], stored[step], progress)

    @property
    def stored(self) -> Tensor:
        """The features that are kept in training as things stand, bool [T, S]."""
        logits = self.router.logits
        hard = self.recipe.gates == HARD
        return torch.from_numpy(self.hard(logits) if hard else above(logits, self.recipe.threshold))

    def hard(self, logits: Tensor) -> NDArray[np.bool_]:
        """What is computed without gates in between, bool [T, S]."""
        if self.settings.compute is None:
            return above(logits, self.recipe.threshold)
        return ranked(logits, self.profile, self.settings.compute, self.always)

    def plan(self, hard: NDArray[np.bool_], facts: Mapping[str, Any] | None = None) -> Plan:
        share = evaluations(self.profile, hard) / self.profile.total
        return static_plan(self.profile, f"{self.recipe.name}-{share:.0%}", hard, self.recipe.order, facts)

    def error(self, plan: Plan) -> float:
        """Relative L2 distance of the last state to the uncached run's, geometric mean over held-out samples.

        In an arithmetic mean the few samples that end as another image would decide.
        """
        found = torch.cat([last_error(teacher, plan) for teacher in self.teachers])
        return math.exp(self._mean(float(found.clamp_min(TINY).log().mean())))

    def _look(self) -> None:
        logits = self.router.logits
        error = self.error(self.plan(self.hard(logits)))
        better = error < self.best or self.settings.compute is None  # then the last one counts, at its own compute
        if not self.done:
            self.log = [{"trajectory": 0, "error": min(error, self.best)}]
        else:
            self.log[-1]["error"] = error
        self.waited = 0 if better else self.waited + 1
        if better:
            self.best, self.best_logits = error, logits
        loss = self.log[-1].get("loss")
        shown = "" if loss is None else f"loss {loss:.3g}, "
        what = f"{shown}compute {self.compute:.3f}, hard error {error:.4f}"
        self.progress(what, self.done, self.settings.trajectories)
        if self.recipe.backtrack and self.done and not better:
            self._go_back()

    def _go_back(self) -> None:
        """Go on from the best router so far with half the learning rate, and with new momentum."""
        self.router.load_state_dict(Router(self.best_logits, self.always).state_dict())
        for step, optimizer in self.optimizers.items():
            lr = optimizer.param_groups[0]["lr"] / 2
            self.optimizers[step] = torch.optim.Adam([self.router.rows[step]], lr=lr)
        self._drop_gradients(self.done)

    # keeping

    @cached_property
    def key(self) -> dict[str, Any]:
        """What a checkpoint must agree in to be gone on from."""
        asked = range(self.settings.held_out), range(MOST_HELD_OUT, MOST_HELD_OUT + self.settings.batch)
        value = {
            "model": digest([each.to_json() for each in (self.profile.fingerprint, self.fingerprint)]),
            "steps": self.profile.total,
            "spans": [span.name for span in self.profile.spans],
            "profile": self.profile.facts.get("key"),
            "recipe": {"name": self.recipe.name, **asdict(self.recipe)},
            "settings": asdict(self.settings),
            "precision": self.accelerator.mixed_precision,
            "processes": self.accelerator.num_processes,
            "samples": digest([[list(given) for given in self.samples(numbers)] for numbers in asked]),
        }
        return json.loads(json.dumps(value))

    def _keep(self) -> None:
        if not self.accelerator.is_main_process:
            return
        state = {
            "key": self.key,
            "router": self.router.state_dict(),
            "optimizers": {step: optimizer.state_dict() for step, optimizer in self.optimizers.items()},
            "best_logits": self.best_logits,
            "weights": self.weights,
            **{name: getattr(self, name) for name in ("price", "done", "waited", "best", "log")},
        }
        path = self.folder / CHECKPOINT
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with written(path) as draft:
                torch.save(state, draft)
            (self.folder / LOG).write_text(json.dumps(plain_json(self.log), indent=1) + "\n")
        except OSError as error:
            raise ConfigError(f"cannot write {path}: {error.strerror or error}") from error

    def _resume(self) -> None:
        path = self.folder / CHECKPOINT
        if not path.is_file():
            return
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            other = [name for name, value in self.key.items() if state["key"].get(name) != value]
        except Exception as error:
            raise ConfigError(f"{path} cannot be read: {error}. Delete it to begin anew") from error
        if other:
            raise ConfigError(
                f"{path} is of a training with another {' and '.join(other)}: choose another folder, or delete it"
            )
        self.router.load_state_dict(state["router"])
        for step, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][step])
        for name in ("best_logits", "weights", "price", "done", "waited", "best", "log"):
            setattr(self, name, state[name])
        self.spent, self.began = self.log[-1]["seconds"], time.process_time()


def parts(samples: Sequence[Each], profile: Profile) -> list[Sequence[Each]]:
    """Samples as they are generated where nothing is learned: TOGETHER at once, or the batch of a profile that has
    smaller ones than by default.
    """
    batch = profile.facts.get("batch", TOGETHER)
    size = TOGETHER if batch >= Options().batch else batch
    return [samples[i : i + size] for i in range(0, len(samples), size)]


def last_error(teacher: Teacher, plan: Plan) -> Tensor:
    """Relative L2 distance of each sample's last state to the uncached run's, when the batch runs by a plan, [n]."""
    batch = teacher.batch
    with torch.no_grad(), attached(batch.pipe, plan_method(plan)), last_state(batch.pipe.scheduler) as state:
        batch.call()
    whole = double(teacher.states[-1][: batch.count].flatten(1))
    return (double(state[-1][: batch.count].flatten(1)) - whole).norm(dim=1) / whole.norm(dim=1)
