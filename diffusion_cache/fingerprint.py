"""What a profile was measured on: model, weights, sampler, and how they are told apart."""

import hashlib
import json
import math
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ConfigError, DiffusionCacheWarning
from .plain import Fields, integer, json_object, mapping_of, number, optional, plain_json, text, tuple_of

SAMPLED_TENSORS, SAMPLED_ELEMENTS = 64, 4096
LEVEL_TOLERANCE = 1e-3  # log-SNR; two steps closer than this are the same step

# What each field says when it differs. Those of STRICT make a profile unfit for a model; the rest are assumptions.
MEANINGS = {
    "model": "it is another denoiser, with other spans",
    "config": "the denoiser is built differently",
    "layout": "the denoiser has other parameters, or parameters of other shapes",
    "weights": "the weights are others, and so are the features that were measured",
    "lora": "other LoRA adapters act on the denoiser, which changes its features",
    "dtype": "features are taken to change between steps as they do in the profile's precision",
    "pipeline": "the denoiser is taken to be called as in the profile's pipeline",
    "scheduler": "the sampler is another one, for which schedules and weights were not fitted",
    "scheduler_config": "the sampler is set up differently",
    "spacing": "the noise levels of a run may differ from the profile's, which is then resampled to them",
    "steps": "measurements and plans must be resampled to this number of steps",
    "noise_levels": "measurements and plans must be resampled to these noise levels",
    "guidance": "features are taken to change between steps as they do at the profile's guidance",
    "sample_shape": "features are taken to change between steps as they do at the profile's size",
}
OF_DENOISERS = ("model", "config", "layout", "weights", "lora", "dtype")  # kinds; `Difference.field` names whose
UNCOMPARED = frozenset({"steps", "noise_levels"})  # of runs: whoever enables a cache has made none yet
STRICT = frozenset({"model", "config", "layout", "weights", "lora", "scheduler", "scheduler_config"})

# scheduler options that only place the noise levels; these are compared themselves, step by step
SPACING_OPTIONS = frozenset(
    {
        "base_image_seq_len",
        "base_shift",
        "flow_shift",
        "max_image_seq_len",
        "max_shift",
        "rho",
        "shift",
        "shift_terminal",
        "sigma_max",
        "sigma_min",
        "steps_offset",
        "time_shift_type",
        "timestep_spacing",
        "use_beta_sigmas",
        "use_dynamic_shifting",
        "use_exponential_sigmas",
        "use_karras_sigmas",
        "use_lu_lambdas",
    }
)

# what configurations of transformers say of how weights were stored or loaded; their dtype is a field of its own
LOADING_OPTIONS = frozenset({"architectures", "dtype", "torch_dtype", "transformers_version"})


@dataclass(frozen=True)
class DenoiserFacts:
    """One denoiser.

    class_name: of the module. config: digest of its configuration. layout: digest of all parameters' names and
    shapes. weights: digest of the layout and of values sampled from the parameters, None where they could not be
    read. dtype: of most of its numbers. lora: names of the adapters that are active; lora_weights: digest of them.
    """

    class_name: str
    config: str
    layout: str
    weights: str | None
    dtype: str
    lora: tuple[str, ...] = ()
    lora_weights: str | None = None

    @classmethod
    def of(cls, model: nn.Module) -> "DenoiserFacts":
        """Read a denoiser in seconds whatever its size: at most 64 parameters × 4096 elements of it.

        The same weights in the same dtype give the same facts on every device, compiled or not; adapters that are
        not fused are kept apart from the weights under them.
        """
        model = getattr(model, "_orig_mod", model)
        base, adapters = _split_adapters(model)
        config = {key: value for key, value in _config(model).items() if key[:1] != "_"}
        active = sorted(adapters)
        count: Counter[str] = Counter()
        for _, parameter in base:
            count[_dtype_name(parameter)] += parameter.numel()
        return cls(
            class_name=type(model).__name__,
            config=_digest_of(plain_json(config)),
            layout=_digest_of(_layout(base)),
            weights=_weights_digest(base),
            dtype=max(sorted(count), key=lambda name: count[name]) if count else "none",
            lora=tuple(active),
            lora_weights=_weights_digest([item for name in active for item in adapters[name]]) if active else None,
        )


@dataclass(frozen=True)
class Difference:
    """A field that is not as expected; strict: a profile must not be used across it unless told to."""

    field: str
    expected: str
    found: str
    meaning: str
    strict: bool

    def __str__(self) -> str:
        return f"{self.field} is {self.found}, the profile's {self.expected}: {self.meaning}"


@dataclass(frozen=True)
class Fingerprint:
    """A model and a sampler with, where steps is not None, one kind of run of them.

    scheduler_config: plain JSON values, private keys left out. sigmas, timesteps: the sampler's own, if it has them.
    noise_levels: log-SNR of each step, noisiest first, empty if unknown. guidance: scale, None without. sample_shape:
    of one sample's latents. versions: of torch, diffusers and diffusion_cache; told, never compared.
    """

    denoisers: Mapping[str, DenoiserFacts]
    pipeline: str
    scheduler: str
    scheduler_config: Mapping[str, Any]
    steps: int | None = None
    sigmas: tuple[float, ...] | None = None
    timesteps: tuple[float, ...] | None = None
    noise_levels: tuple[float, ...] = ()
    guidance: float | None = None
    sample_shape: tuple[int, ...] | None = None
    versions: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < 1:
            raise ConfigError(f"a run has at least one step, not {self.steps}")
        if self.noise_levels and len(self.noise_levels) != self.steps:
            raise ConfigError(f"{len(self.noise_levels)} noise levels for {self.steps} steps: give one a step")
        if any(math.isnan(level) for level in self.noise_levels):
            raise ConfigError("a noise level is NaN: noise levels are log-SNR, ±infinity at the ends at most")

    @classmethod
    def of(
        cls,
        pipe: Any,
        denoisers: Mapping[str, nn.Module],
        *,
        steps: int | None = None,
        noise_levels: Iterable[float] = (),
        guidance: float | None = None,
        sample_shape: Sequence[int] | None = None,
    ) -> "Fingerprint":
        """Of a pipeline (None for a bare denoiser) and its denoisers; with steps, of a run just made with it.

        Warns where weights are offloaded, so that they cannot be read and are taken to match later.
        """
        facts = {name: DenoiserFacts.of(model) for name, model in denoisers.items()}
        unread = [name for name, found in facts.items() if found.weights is None]
        if unread:
            warnings.warn(
                f"The weights of {', '.join(unread)} are offloaded (on the meta device) and cannot be read: whether "
                "a profile is of these weights will not be checked.",
                DiffusionCacheWarning,
                stacklevel=2,
            )
        scheduler = getattr(pipe, "scheduler", None)
        config = {key: value for key, value in dict(getattr(scheduler, "config", {})).items() if key[:1] != "_"}
        return cls(
            denoisers=facts,
            pipeline="" if pipe is None else type(pipe).__name__,
            scheduler="" if scheduler is None else type(scheduler).__name__,
            scheduler_config=plain_json(config),
            steps=steps,
            sigmas=None if steps is None else _numbers(getattr(scheduler, "sigmas", None)),
            timesteps=None if steps is None else _numbers(getattr(scheduler, "timesteps", None)),
            noise_levels=tuple(float(level) for level in noise_levels),
            guidance=guidance,
            sample_shape=None if sample_shape is None else tuple(int(size) for size in sample_shape),
            versions={
                "torch": str(torch.__version__),
                "diffusers": _version("diffusers"),
                # by name: an import statement of the root would look like one of everything above this layer
                "diffusion_cache": import_module(__package__).__version__,
            },
        )

    def differences(self, other: "Fingerprint", strict: Collection[str] = STRICT) -> list[Difference]:
        """Where `other` (what is at hand) is not as this one (what was profiled), with what follows from it.

        strict: fields whose differences are marked so. Weights of another dtype cannot be compared, nor offloaded
        ones: they are then reported, but not strictly; so are those of adapters if their names are the same, and
        options that exist in one version of diffusers only.
        What belongs to a run (steps, noise levels, guidance, size) is compared if both sides know their steps.
        """
        found: list[Difference] = []

        def differ(name: str, expected: Any, actual: Any, meaning: str = "", lenient: bool = False) -> None:
            kind = name.rpartition(".")[2]
            text = meaning or MEANINGS[kind]
            found.append(Difference(name, _shown(expected), _shown(actual), text, kind in strict and not lenient))

        same_version = self.versions.get("diffusers") == other.versions.get("diffusers")
        for name in sorted({*self.denoisers, *other.denoisers}):
            mine, theirs = self.denoisers.get(name), other.denoisers.get(name)
            if mine is None or theirs is None:
                known = (mine or theirs).class_name  # type: ignore[union-attr]
                differ(f"{name}.model", known if mine else "absent", known if theirs else "absent")
                continue
            if mine.class_name != theirs.class_name:
                differ(f"{name}.model", mine.class_name, theirs.class_name)
                continue
            if mine.config != theirs.config:
                note = "" if same_version else "it may be built differently, or diffusers has other options now"
                differ(f"{name}.config", mine.config, theirs.config, note, lenient=not same_version)
            if mine.dtype != theirs.dtype:
                differ(f"{name}.dtype", mine.dtype, theirs.dtype)
            if mine.layout != theirs.layout:
                differ(f"{name}.layout", mine.layout, theirs.layout)
            elif mine.weights is None or mine.weights != theirs.weights:
                note = _uncompared(mine, theirs, mine.weights, theirs.weights)
                differ(f"{name}.weights", mine.weights, theirs.weights, note, lenient=bool(note))
            unread = mine.lora_weights is None and bool(mine.lora)
            if unread or mine.lora_weights != theirs.lora_weights:
                same = mine.lora == theirs.lora  # where weights cannot be compared, names are all that is known
                note = _uncompared(mine, theirs, mine.lora_weights, theirs.lora_weights) if same else ""
                differ(f"{name}.lora", mine.lora, theirs.lora, note, lenient=bool(note))

        if self.pipeline != other.pipeline:
            differ("pipeline", self.pipeline, other.pipeline)
        if self.scheduler != other.scheduler:
            differ("scheduler", self.scheduler, other.scheduler)
        else:
            for key in sorted({*self.scheduler_config, *other.scheduler_config}):
                kind = "spacing" if key in SPACING_OPTIONS else "scheduler_config"
                values = [side.scheduler_config.get(key, "absent") for side in (self, other)]
                if values[0] != values[1]:
                    both = key in self.scheduler_config and key in other.scheduler_config
                    meaning = f"{key}: {MEANINGS[kind]}"
                    differ(kind, f"{key}={values[0]}", f"{key}={values[1]}", meaning, not both and not same_version)
        if self.steps is not None and other.steps is not None:
            if self.steps != other.steps:
                differ("steps", self.steps, other.steps)
            elif self.noise_levels and other.noise_levels and not same_levels(self.noise_levels, other.noise_levels):
                differ("noise_levels", self.noise_levels, other.noise_levels)
            if self.guidance != other.guidance:
                differ("guidance", self.guidance, other.guidance)
            if None not in (self.sample_shape, other.sample_shape) and self.sample_shape != other.sample_shape:
                differ("sample_shape", self.sample_shape, other.sample_shape)
        return found

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; `from_json` reads them back."""
        stored = {**vars(self), "denoisers": {name: asdict(facts) for name, facts in self.denoisers.items()}}
        return plain_json(stored)

    @classmethod
    def from_json(cls, value: Any, where: str = "fingerprint") -> "Fingerprint":
        """Raises ConfigError where the value is not what `to_json` makes."""
        fields = Fields(value, where)
        fingerprint = cls(
            denoisers=fields("denoisers", mapping_of(_read_denoiser)),
            pipeline=fields("pipeline", text),
            scheduler=fields("scheduler", text),
            scheduler_config=fields("scheduler_config", json_object),
            steps=fields("steps", optional(integer)),
            sigmas=fields("sigmas", optional(tuple_of(number))),
            timesteps=fields("timesteps", optional(tuple_of(number))),
            noise_levels=fields("noise_levels", tuple_of(number)),
            guidance=fields("guidance", optional(number)),
            sample_shape=fields("sample_shape", optional(tuple_of(integer))),
            versions=fields("versions", mapping_of(text)),
        )
        fields.end()
        return fingerprint


def same_levels(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether two runs have the same noise levels (log-SNR), step by step, to within 1e-3."""
    pairs = zip(one, other, strict=False)
    return len(one) == len(other) and all(a == b or abs(a - b) <= LEVEL_TOLERANCE for a, b in pairs)


def start_in(own: Sequence[float], part: Sequence[float]) -> int | None:
    """Where the noise levels of a run that is part of another begin among the other's own; None if it is no part."""
    starts = range(len(own) - len(part) + 1) if part else ()
    return next((first for first in starts if same_levels(own[first : first + len(part)], part)), None)


def _uncompared(mine: DenoiserFacts, theirs: DenoiserFacts, *digests: str | None) -> str:
    """What follows where digests of weights cannot be compared; empty where they can."""
    if None in digests:
        return "they are taken to be the same"
    return "" if mine.dtype == theirs.dtype else "in another precision they are taken to be the same"


def _read_denoiser(value: Any, where: str) -> DenoiserFacts:
    fields = Fields(value, where)
    facts = DenoiserFacts(
        class_name=fields("class_name", text),
        config=fields("config", text),
        layout=fields("layout", text),
        weights=fields("weights", optional(text)),
        dtype=fields("dtype", text),
        lora=fields("lora", tuple_of(text)),
        lora_weights=fields("lora_weights", optional(text)),
    )
    fields.end()
    return facts


def _shown(value: Any) -> str:
    if value is None:
        return "unknown"
    if isinstance(value, (tuple, list)):
        if not value:
            return "none"
        shown = [f"{item:g}" if isinstance(item, float) else str(item) for item in value]
        return ", ".join(shown if len(shown) <= 8 else [*shown[:3], "…", shown[-1]])
    return str(value)


def _numbers(values: Any) -> tuple[float, ...] | None:
    return None if values is None else tuple(torch.as_tensor(values).cpu().double().flatten().tolist())


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


Named = list[tuple[str, Tensor]]


def _split_adapters(model: nn.Module) -> tuple[Named, dict[str, Named]]:
    """A model's own parameters, named as without adapters, and those of each active adapter that is not fused.

    PEFT puts a layer with adapters in the place of the layer that it adapts (its `base_layer`), and keeps each of
    the adapter's parts in a dictionary by adapter name.
    """
    layers = [
        (name, module)
        for name, module in model.named_modules()
        if hasattr(module, "adapter_layer_names") and hasattr(module, "base_layer")
    ]
    owner = {f"{name}.{part}.": module for name, module in layers for part in _adapter_parts(module)}
    base: Named = []
    adapters: dict[str, Named] = {}
    for name, parameter in model.named_parameters():
        module = next((owner[prefix] for prefix in _prefixes(name) if prefix in owner), None)
        if module is None:
            base.append((name.replace(".base_layer.", ".").replace("_orig_mod.", ""), parameter))
            continue
        adapter = next((key for key in _active(module) if f".{key}." in f".{name}."), None)
        if adapter is not None:
            anonymous = f".{name}.".replace(f".{adapter}.", ".").replace("._orig_mod.", ".").strip(".")
            adapters.setdefault(adapter, []).append((anonymous, parameter))
    for name, module in layers:
        for adapter in _active(module):
            scale = getattr(module, "scaling", {}).get(adapter, 1.0)
            adapters.setdefault(adapter, []).append((f"{name}.scaling", torch.tensor(float(scale))))
    return base, adapters


def adapters_of(model: nn.Module) -> tuple[tuple[str, bool, float], ...]:
    """(name, whether it is fused, scale) of each adapter that changes what a model gives, in milliseconds."""
    found = set()
    for module in model.modules():
        if hasattr(module, "adapter_layer_names") and hasattr(module, "base_layer"):
            fused = getattr(module, "merged_adapters", ())
            for name in {*_active(module), *fused}:
                found.add((name, name in fused, float(getattr(module, "scaling", {}).get(name, 1.0))))
    return tuple(sorted(found))


def _adapter_parts(module: Any) -> Sequence[str]:
    return module.adapter_layer_names


def _active(module: Any) -> list[str]:
    """Adapters that act in a layer beside its weights: neither switched off nor fused into them."""
    if getattr(module, "disable_adapters", False):
        return []
    merged = getattr(module, "merged_adapters", ())
    parts = [getattr(module, part, None) for part in _adapter_parts(module)]
    present = {key for part in parts if part is not None for key in part}
    return [key for key in getattr(module, "active_adapters", ()) if key in present and key not in merged]


def _config(model: nn.Module) -> dict[str, Any]:
    """How a model of diffusers or of transformers is configured, without how it was loaded."""
    config: Any = getattr(model, "config", None) or {}
    return _as_built(config.to_dict()) if hasattr(config, "to_dict") else dict(config)


def _as_built(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {key: _as_built(part) for key, part in value.items() if key not in LOADING_OPTIONS}


def _prefixes(name: str) -> Iterable[str]:
    """ "a.b.c" → "a.", "a.b." """
    return (name[: place + 1] for place, letter in enumerate(name) if letter == ".")


def _layout(parameters: Named) -> list[Any]:
    return [[name, list(parameter.shape)] for name, parameter in sorted(parameters, key=lambda item: item[0])]


def _weights_digest(parameters: Named) -> str | None:
    """Of all names and shapes, and of values from up to 64 parameters spread evenly over them; None if one is meta."""
    if any(part.is_meta for _, parameter in parameters for part in _plain_tensors(parameter)):
        return None
    ordered = sorted(parameters, key=lambda item: item[0])
    digest = hashlib.sha256(_canonical(_layout(parameters)))
    count = min(SAMPLED_TENSORS, len(ordered))
    for i in range(count):
        _, parameter = ordered[i * (len(ordered) - 1) // max(1, count - 1)]
        for part in _plain_tensors(parameter):
            digest.update(_sample(part))
    return digest.hexdigest()[:32]


def _dtype_name(tensor: Tensor) -> str:
    """A quantised tensor claims the dtype that it computes in; its class says more."""
    name = str(tensor.dtype).removeprefix("torch.")
    return f"{type(tensor).__name__}({name})" if hasattr(tensor, "__tensor_flatten__") else name


def _plain_tensors(tensor: Tensor) -> list[Tensor]:
    """The tensor itself, or those that a quantised or sharded one consists of."""
    if hasattr(tensor, "__tensor_flatten__"):
        names = tensor.__tensor_flatten__()[0]
        return [part for name in names for part in _plain_tensors(getattr(tensor, name))]
    return [tensor.detach()]


def _sample(tensor: Tensor) -> bytes:
    """Up to 4096 elements, evenly strided, as float32 bytes; only these leave the device."""
    flat = tensor.reshape(-1)
    flat = flat[:: max(1, flat.numel() // SAMPLED_ELEMENTS)][:SAMPLED_ELEMENTS].cpu().contiguous()
    try:
        flat = flat.float()
    except (RuntimeError, NotImplementedError):  # packed dtypes that convert to nothing
        flat = flat.view(torch.uint8)
    return flat.numpy().tobytes()


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, allow_nan=False).encode()


def _digest_of(value: Any) -> str:
    return hashlib.sha256(_canonical(value)).hexdigest()[:32]
