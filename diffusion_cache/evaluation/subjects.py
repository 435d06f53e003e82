"""What an evaluation generates with: a shipped model, or any diffusers pipeline from a folder or the hub."""

import inspect
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import reference
from ..errors import ConfigError
from ..models import find_denoisers, unwrap
from ..profiling.generation import Batch, last_state
from ..profiling.measure import Given, MakeBatch
from ..registry import unknown_name
from .prompts import Sample

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
OFFLOADS = ("none", "model", "sequential")
COMPILES = ("none", "blocks", "denoiser")
# arguments of a pipeline's call that an evaluation gives itself, and what they are chosen by
OWN = {
    "prompt": "prompts=builtin or prompts=file",
    "class_labels": "prompts=classes",
    "generator": "prompts.first_seed=…",
    "num_inference_steps": "steps=…",
    "batch_size": "batch=…",
}


class Output(NamedTuple):
    """images: float [n, frames, c, h, w] in [0, 1]; latents: float [n, ...], what the last scheduler step gave."""

    images: Tensor
    latents: Tensor

    def each(self) -> list["Output"]:
        """The outputs one by one."""
        return [Output(*pair) for pair in zip(self.images.split(1), self.latents.split(1), strict=True)]


class Subject(ABC):
    """A pipeline and how it is called.

    classes: it takes class labels. text: it takes prompts. video: it makes videos. compiled: its denoisers run
    compiled. profiles: the folder that profiles of it are kept in, if they are.
    """

    name: str
    pipe: Any
    device: str = "cpu"
    steps: int
    sampler: str
    classes: bool
    video: bool
    text: bool = False
    compiled: bool = False
    profiles: Path | None = None

    @abstractmethod
    def inputs(self, samples: Sequence[Sample], steps: int) -> dict[str, Any]:
        """Keyword arguments of one call of the pipeline, with fresh generators."""

    @abstractmethod
    def images(self, output: Any) -> Tensor:
        """The images in what the pipeline returned, as in `Output`."""

    @cached_property
    def denoisers(self) -> dict[str, nn.Module]:
        return {name: unwrap(module) for name, module in find_denoisers(self.pipe).items()}

    @cached_property
    def blocks(self) -> dict[str, nn.Module]:
        """The denoisers' blocks by name: members of their module lists, and a UNet's middle block."""
        found: dict[str, nn.Module] = {}
        for name, denoiser in self.denoisers.items():
            prefix = f"{name}." if len(self.denoisers) > 1 else ""
            for child_name, child in denoiser.named_children():
                if isinstance(child, nn.ModuleList):
                    found |= {f"{prefix}{child_name}.{i}": block for i, block in enumerate(child)}
                elif child_name == "mid_block":
                    found[prefix + child_name] = child
        return {name: block for name, block in found.items() if next(block.parameters(), None) is not None}

    def call(self, samples: Sequence[Sample], steps: int | None = None) -> Any:
        """One call of the pipeline as it stands."""
        return self.pipe(**self.inputs(samples, steps or self.steps))

    def generate(self, samples: Sequence[Sample], steps: int | None = None) -> Output:
        """One call of the pipeline as it stands, with its last latents."""
        with last_state(self.pipe.scheduler) as found:
            output = self.call(samples, steps)
        images = self.images(output)
        latents = found[-1] if found and len(found[-1]) % len(images) == 0 else images.flatten(1)
        latents = latents[: len(images)]  # some pipelines step both guidance branches
        return Output(images.detach().float().cpu(), latents.detach().float().cpu())


class Shipped(Subject):
    """One of the shipped models, on the CPU in float32."""

    classes = True

    def __init__(self, name: str, sampler: str | None = None):
        spec = reference.spec(name)
        self.name, self.steps = name, spec.steps
        self.sampler = sampler or spec.samplers[0]
        self.video = len(spec.sample_shape) == 4
        self.pipe = reference.load(name, sampler)

    def inputs(self, samples: Sequence[Sample], steps: int) -> dict[str, Any]:
        labels = [int(sample.prompt) for sample in samples]
        return reference.inputs(self.name, labels, [sample.seed for sample in samples], steps)

    def images(self, output: Any) -> Tensor:
        return reference.images(self.name, output)


class Pretrained(Subject):
    """A diffusers pipeline from a local folder or a repository."""

    def __init__(self, options: Mapping[str, Any], sampler: Mapping[str, Any]):
        for key, known in (("dtype", DTYPES), ("offload", OFFLOADS), ("compile", COMPILES)):
            if options[key] not in known:
                raise unknown_name(f"model.{key}", options[key], known)
        self.name, self.steps = options["repository"], options["steps"]
        self.device = device_of(options["device"])
        self.pipe = load_pipeline(self.name, DTYPES[options["dtype"]], options["variant"])
        self._set_sampler(sampler)
        self.sampler = type(self.pipe.scheduler).__name__
        self.pipe.set_progress_bar_config(disable=True)
        if options["offload"] == "model":
            self.pipe.enable_model_cpu_offload(device=self.device)
        elif options["offload"] == "sequential":
            self.pipe.enable_sequential_cpu_offload(device=self.device)
        else:
            self.pipe.to(self.device)
        self.compiled = options["compile"] != "none"
        for denoiser in self.denoisers.values():
            if options["compile"] == "denoiser":
                denoiser.compile()
            elif options["compile"] == "blocks":
                denoiser.compile_repeated_blocks()  # type: ignore[operator]
        self._extra = dict(options["call"])
        for key in self._extra.keys() & OWN.keys():
            raise ConfigError(f"model.call.{key} is not yours to give: say {OWN[key]} instead")
        self._parameters = inspect.signature(type(self.pipe).__call__).parameters
        unknown = set(self._extra) - set(self._parameters)
        if unknown:
            raise unknown_name("argument in model.call", sorted(unknown)[0], self._parameters)
        self.classes = "class_labels" in self._parameters
        self.text = not self.classes and "prompt" in self._parameters
        self.video = "num_frames" in self._parameters

    def _set_sampler(self, sampler: Mapping[str, Any]) -> None:
        if sampler["name"] is None and not sampler["options"]:
            return
        import diffusers

        current = self.pipe.scheduler
        name = sampler["name"] or type(current).__name__
        cls = getattr(diffusers, name, None)
        if not hasattr(cls, "from_config") or not hasattr(cls, "step"):
            raise unknown_name("scheduler", name, [n for n in dir(diffusers) if n.endswith("Scheduler")])
        try:
            self.pipe.scheduler = cls.from_config(current.config, **sampler["options"])  # type: ignore[union-attr]
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{name} cannot take the place of {type(current).__name__}: {error}") from error

    def inputs(self, samples: Sequence[Sample], steps: int) -> dict[str, Any]:
        device = "cpu"  # noise that does not depend on the device it is used on
        call: dict[str, Any] = {
            "num_inference_steps": steps,
            "generator": [torch.Generator(device).manual_seed(sample.seed) for sample in samples],
            "output_type": "pt",
            **self._extra,
        }
        for name, value in self._extra.items():
            if name.startswith("negative_prompt") and isinstance(value, str):
                call[name] = [value] * len(samples)
        key = "class_labels" if self.classes else "prompt"
        if key in self._parameters:
            call[key] = [sample.prompt for sample in samples]
        elif "batch_size" in self._parameters:
            call["batch_size"] = len(samples)
        return call

    def images(self, output: Any) -> Tensor:
        found = getattr(output, "frames", None)
        found = output.images if found is None else found
        if not isinstance(found, Tensor):
            found = torch.as_tensor(found).movedim(-1, -3)  # pipelines without "pt" give arrays, channels last
        return found if found.ndim == 5 else found[:, None]


def batches_of(subject: Subject, steps: int) -> MakeBatch:
    """Batches of a subject's generations, for samples given as prompts (class labels as text) and seeds."""

    def make(given: Sequence[Given]) -> Batch:
        samples = [
            Sample(index, int(prompt) if subject.classes else prompt, seed)
            for index, (prompt, seed) in enumerate(given)
        ]
        return Batch(subject.pipe, lambda: subject.call(samples, steps), subject.images, len(samples))

    return make


def device_of(name: str) -> str:
    """The device that a configuration names; a GPU is made the current one, for that is what is timed.

    auto is CUDA where there is one. Of several GPUs each process has its own by LOCAL_RANK, which launchers set and
    children inherit, unless the name says which.

    Raises:
        ConfigError: for what is no device, or one that is not there.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        name = "cuda" if gpus else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"model.device must be auto or a device of torch, not {name!r}") from error
    if device.type != "cuda":
        return name
    index = int(os.environ.get("LOCAL_RANK", 0)) % max(gpus, 1) if device.index is None else device.index
    if index >= gpus:
        raise ConfigError(f"model.device={name} is not there: torch sees {gpus} GPUs; auto takes what there is")
    torch.cuda.set_device(index)
    return f"cuda:{index}"


def quieten_libraries() -> None:
    """Leave out the libraries' remarks on optional packages and rounded sizes; errors still show."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()


def load_pipeline(repository: str, dtype: torch.dtype, variant: str | None = None) -> Any:
    """The diffusers pipeline in a folder or repository.

    Raises:
        ConfigError: if there is none, or it cannot be had without a network.
    """
    from diffusers import DiffusionPipeline

    try:
        return DiffusionPipeline.from_pretrained(repository, dtype=dtype, variant=variant)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"{repository} cannot be loaded as a diffusers pipeline: {reason} (offline, give a local folder, or "
            "download it first with `hf download`)"
        ) from error


def subject(model: Mapping[str, Any], sampler: Mapping[str, Any]) -> Subject:
    """The subject that a `model` and a `sampler` configuration describe.

    Raises:
        ConfigError: for names or options that cannot work, or weights that cannot be had.
    """
    if model["kind"] == "shipped":
        if sampler["options"]:
            raise ConfigError("shipped models take no sampler.options; use one of their samplers by name")
        return Shipped(model["name"], sampler["name"])
    if model["kind"] == "hub":
        return Pretrained(model, sampler)
    raise unknown_name("kind of model", model["kind"], ("shipped", "hub", "random"))
