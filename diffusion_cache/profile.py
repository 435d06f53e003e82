"""A profile: what full runs of a model told about its spans, and the plans made from that. Data only."""

import hashlib
import json
import math
import os
import re
import tempfile
import warnings
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .errors import ConfigError, DiffusionCacheWarning
from .fingerprint import MEANINGS, OF_DENOISERS, UNCOMPARED, Difference, Fingerprint, same_levels
from .plain import Fields, integer, json_object, number, optional, plain_json, text, tuple_of
from .plan import MAX_STEPS, OPTIONAL_TENSORS, TENSORS, Plan, check_facts, positions
from .registry import suggest

SCHEMA = 1
JSON_FILE, ARRAYS_FILE = "profile.json", "arrays.safetensors"
ROUNDING = 1e-5  # of squares, relative to the largest
MAX_JSON, MAX_ARRAYS = 16 * 2**20, 2 * 2**30  # bytes
MAX_SPAN_PASSES = 100_000
MAX_PLANS = 1000
MAX_PLAN_CELLS = 20_000_000  # numbers in the tensors of all plans

GRAMS = ("gram_residual", "gram_output")
WIDE = frozenset({*GRAMS, "cross_input"})  # float64 too: errors are small differences of their entries
# what changes from step to step: step t against t − 1, so that index 0 is NaN
SIGNALS = ("residual_l1", "input_l1", "filtered_l1", "norm_ratio")
# shapes in terms of S spans, P passes, T steps; other letters may be any number
SHAPES = {
    "gram_residual": "SPTT",
    "gram_output": "SPTT",
    "cross_input": "SPTT",
    "input_energy": "SPT",
    **dict.fromkeys(SIGNALS, "SPT"),
    "foreground_share": "ST",
    "sensitivity": "GT",
    "sensitivity_sampled": "GT",
    "select_weights": "KD",
    "select_bias": "K",
}
SPAN_SHAPES = {"channel_mean": "PTC", "channel_square": "PTC", "attention_received": "TN"}  # with a span's index
MAY_BE_NAN = frozenset({*GRAMS, "cross_input", "foreground_share", *SIGNALS})
MEASURED_ONLY = frozenset({"key", "select"})  # facts that say nothing of other noise levels
SPAN_ARRAY = re.compile(r"([a-z_]+)\.(0|[1-9][0-9]{0,5})")


@dataclass(frozen=True)
class SpanFacts:
    """One span. feature: what is measured of it, "residual" or "output". elements: numbers in one sample's feature.

    share: of the denoiser's arithmetic, 0 to 1.
    """

    name: str
    denoiser: str
    kind: str
    feature: str
    elements: int
    share: float

    def __post_init__(self) -> None:
        if self.feature not in ("residual", "output"):
            raise ConfigError(f"span {self.name!r}: feature must be 'residual' or 'output', not {self.feature!r}")
        if self.elements < 1 or not 0 <= self.share <= 1:
            raise ConfigError(f"span {self.name!r}: {self.elements} elements and a share of {self.share} cannot be")


@dataclass(frozen=True, eq=False)
class Profile:
    """Measurements of S spans in P passes over T steps, means over calibration samples, with plans made from them.

    passes: names of the guidance branches; row_passes: how many are stacked in the rows of one call. samples: prompt
    and seed of each calibration run. facts: JSON values. arrays (float32 where nothing else is said; all but the
    Gram matrices may be absent; NaN stands for what a span does not have):

    - gram_residual, gram_output [S, P, T, T]: inner products of the residual (output) at two steps over all elements.
    - cross_input [S, P, T, T]: of the feature at one step with the span's input at another. input_energy [S, P, T].
      Like the Gram matrices, it may be float64, which tells errors below 1e-3 of a feature from rounding.
    - channel_mean.<s>, channel_square.<s> [P, T, C]: per channel of span s, first and second moments of its feature.
    - residual_l1, input_l1, filtered_l1, norm_ratio [S, P, T]: step t against t − 1, index 0 is NaN.
    - attention_received.<s> [T, N]: by each token, mean over queries and heads. foreground_share [S, T].
    - sensitivity [G, T]: relative error of the final latents per relative error of a group of spans at a step.
      sensitivity_sampled [G, T] uint8: 1 where it was measured, 0 where interpolated.
    - select_weights [K, D], select_bias [K]: of system "select", see `planning.selector`.
    """

    fingerprint: Fingerprint
    scope: str
    depth: int | None
    spans: tuple[SpanFacts, ...]
    passes: tuple[str, ...]
    row_passes: int
    samples: tuple[tuple[str, int], ...]
    arrays: Mapping[str, Tensor]
    facts: Mapping[str, Any] = field(default_factory=dict)
    plans: tuple[Plan, ...] = ()

    def __repr__(self) -> str:
        plans = ", ".join(plan.name for plan in self.plans) or "none"
        return (
            f"Profile({self.fingerprint.pipeline}, {self.fingerprint.scheduler}, {self.total} steps, "
            f"scope={self.scope!r}, {len(self.samples)} samples, plans: {plans})"
        )

    def __post_init__(self) -> None:
        sizes = self._sizes()
        check_facts(self.facts, "profile")
        for name in GRAMS:
            if name not in self.arrays:
                raise ConfigError(f"profile: the array {name} is missing")
        for name, tensor in self.arrays.items():
            _check_layout(name, tensor.dtype, tuple(tensor.shape), sizes)
            _check_values(name, tensor, self.spans)
        names = [plan.name for plan in self.plans]
        if len(names) > MAX_PLANS or len(set(names)) < len(names):
            raise ConfigError(f"profile: plans need names of their own, at most {MAX_PLANS}: {', '.join(names[:50])}")
        for plan in self.plans:
            own = (plan.scope, plan.depth) == (self.scope, self.depth)
            if plan.passes not in (1, sizes["P"]) or (own and plan.spans not in (1, sizes["S"])):
                raise ConfigError(
                    f"plan {plan.name!r} is for {plan.passes} passes and {plan.spans} spans, "
                    f"the profile has {sizes['P']} and {sizes['S']}"
                )

    def _sizes(self) -> dict[str, int]:
        return _checked_sizes(self.fingerprint.steps, len(self.spans), len(self.passes), self.row_passes)

    @property
    def noise_levels(self) -> tuple[float, ...]:
        """log-SNR of each step, [T]; empty if unknown."""
        return self.fingerprint.noise_levels

    @property
    def total(self) -> int:
        """Steps."""
        return self._sizes()["T"]

    def with_plans(self, plans: Sequence[Plan]) -> "Profile":
        """The same measurements with these plans in place of the present ones."""
        return replace(self, plans=tuple(plans))

    def with_plan(self, plan: Plan) -> "Profile":
        """The same with one plan more, or in place of the one of its name; the most evaluations first."""
        others = (other for other in self.plans if other.name != plan.name)
        return self.with_plans(sorted([*others, plan], key=lambda plan: -plan.nfe))

    def matches(self, pipe: Any, denoisers: Mapping[str, nn.Module]) -> list[Difference]:
        """Where a pipeline (None for a bare denoiser) is not what was profiled, as far as is known before a run.

        A bare denoiser has no name of its own: it is compared with the profile's, where there is one.
        """
        if pipe is None and len(denoisers) == len(self.fingerprint.denoisers) == 1:
            denoisers = dict(zip(self.fingerprint.denoisers, denoisers.values(), strict=True))
        return self.fingerprint.differences(Fingerprint.of(pipe, denoisers))

    def check(self, pipe: Any, denoisers: Mapping[str, nn.Module], ignore: Collection[str] = ()) -> None:
        """Make sure that the profile is of this pipeline; a difference that does not forbid its use is a warning.

        ignore: fields whose differences are accepted, such as "weights", or "transformer.weights" for one denoiser.

        Raises:
            ConfigError: for a strict difference that is not ignored, or a field to ignore that is unknown or that
                nothing compares.
        """
        known = [*MEANINGS, *(f"{name}.{kind}" for name in self.fingerprint.denoisers for kind in OF_DENOISERS)]
        if isinstance(ignore, str) or not isinstance(ignore, Collection):
            raise ConfigError(f"ignore must be a list of fields, as in ignore=['weights'], not {ignore!r}")
        for name in ignore:
            if name not in known:
                raise ConfigError(f"ignore: there is no field {name!r} in a fingerprint. {suggest(name, MEANINGS)}")
            if name in UNCOMPARED:
                raise ConfigError(f"ignore: {name} is of a run and not compared when a profile is used: leave it out")
        found = [
            difference
            for difference in self.matches(pipe, denoisers)
            if difference.field not in ignore and difference.field.rpartition(".")[2] not in ignore
        ]
        strict = [difference for difference in found if difference.strict]
        if strict:
            fields = sorted({difference.field.rpartition(".")[2] for difference in strict})
            raise ConfigError(
                "this profile is not of this model and sampler:\n"
                + "".join(f"- {difference}\n" for difference in strict)
                + f"Make a profile of it, or use this one all the same with ignore={fields}."
            )
        if found:
            message = "The profile is used beyond what it was measured on:\n" + "\n".join(f"- {item}" for item in found)
            warnings.warn(message, DiffusionCacheWarning, stacklevel=2)

    def resampled(self, noise_levels: Sequence[float]) -> "Profile":
        """The profile as it should look at other noise levels (log-SNR, one a step): other steps, another shift.

        Features are taken to move in a straight line in log-SNR from one profiled step to the next, which gives the
        Gram matrices (that stay positive semi-definite); changes between steps add up; sensitivity to an error at a
        step goes with the step's length. What depends on a NaN is NaN. Levels beyond the profile's take its nearest
        step. Plans: `Plan.resampled`; what was learned of choosing among them is dropped. Warns of that, and returns
        the profile itself where the noise levels are its own to within 1e-3.
        """
        own = self.noise_levels
        if own and same_levels(own, noise_levels):
            return self
        places = positions(own, noise_levels, self.total)
        fingerprint = replace(
            self.fingerprint,
            steps=len(noise_levels),
            noise_levels=tuple(float(level) for level in noise_levels),
            sigmas=None,
            timesteps=None,
        )
        plans = tuple(plan.resampled(noise_levels) for plan in self.plans)
        kept = {name: fact for name, fact in self.facts.items() if name not in MEASURED_ONLY}
        outside = 0
        if own:
            outside = sum(not min(own) - 1e-3 <= level <= max(own) + 1e-3 for level in noise_levels)
        warnings.warn(
            f"The profile was measured at other noise levels ({self.total} steps) than these ({len(noise_levels)} "
            f"steps) and is resampled {'in log-SNR' if own else 'by the share of the run'}: features are assumed to "
            "change evenly between its steps"
            + (f", and as at its ends at {outside} levels beyond them" if outside else "")
            + (
                "; its plans keep their share of computed steps, without figures, and without fitted weights unless "
                "these levels are some of theirs"
                if plans
                else ""
            )
            + ". A profile made at these levels will do better.",
            DiffusionCacheWarning,
            stacklevel=2,
        )
        return replace(
            self,
            fingerprint=fingerprint,
            arrays={
                name: _resample(name, tensor, places) for name, tensor in self.arrays.items() if "T" in _axes(name)
            },
            facts={**kept, "resampled_from_steps": self.total},
            plans=plans,
        )

    def save(self, folder: str | Path) -> None:
        """Write profile.json and arrays.safetensors into a folder; a failure leaves the profile that was there.

        Raises:
            ConfigError: if the folder cannot be written (full, not allowed), or the profile exceeds what `load` takes.
        """
        from safetensors.torch import save

        folder = Path(folder)
        tensors = dict(self.arrays)
        for i, plan in enumerate(self.plans):
            tensors |= {f"plan.{i}.{name}": tensor for name, tensor in plan.tensors().items()}
        # copies, as safetensors refuses tensors that share memory
        arrays = save({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()})
        body = {
            "fingerprint": self.fingerprint.to_json(),
            "scope": self.scope,
            "depth": self.depth,
            "spans": [plain_json(vars(span)) for span in self.spans],
            "passes": list(self.passes),
            "row_passes": self.row_passes,
            "samples": [list(sample) for sample in self.samples],
            "facts": plain_json(self.facts),
            "plans": [plan.to_json() for plan in self.plans],
            "arrays_sha256": hashlib.sha256(arrays).hexdigest(),
        }
        stored = {"schema": SCHEMA, "digest": _digest(body), "profile": body}
        document = (json.dumps(stored, indent=1, allow_nan=False) + "\n").encode()
        if len(document) > MAX_JSON or len(arrays) > MAX_ARRAYS:
            raise ConfigError(
                f"a profile may hold {MAX_JSON >> 20} MiB of text and {MAX_ARRAYS >> 30} GiB of numbers; this one has "
                f"{len(document) / 2**20:.1f} MiB and {len(arrays) / 2**30:.2f} GiB: profile fewer spans or steps"
            )
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _write_both(folder, arrays, document)
        except OSError as error:
            raise ConfigError(f"cannot write a profile to {folder}: {error.strerror or error}") from error

    @classmethod
    def load(cls, folder: str | Path, max_json: int = MAX_JSON, max_arrays: int = MAX_ARRAYS) -> "Profile":
        """Read a profile, by its folder or a shipped one's name. Nothing in it is run or imported, so it may come from
        anyone. Limits are in bytes.

        Raises:
            ConfigError: if there is none, it is of another schema version, was changed or damaged, or is too large.
        """
        folder = folder_of(folder) if str(folder) in shipped_profiles() else Path(folder)
        body = _read_document(folder / JSON_FILE, max_json)
        fields = Fields(body, JSON_FILE)
        read = {
            "fingerprint": fields("fingerprint", Fingerprint.from_json),
            "scope": fields("scope", text),
            "depth": fields("depth", optional(integer)),
            "spans": fields("spans", tuple_of(_read_span)),
            "passes": fields("passes", tuple_of(text)),
            "row_passes": fields("row_passes", integer),
            "samples": fields("samples", tuple_of(_read_sample)),
            "facts": fields("facts", json_object),
        }
        plans = fields("plans", tuple_of(json_object))
        tensors = _read_arrays(folder / ARRAYS_FILE, fields("arrays_sha256", text), max_arrays, len(plans))
        fields.end()
        parts: list[dict[str, Tensor]] = [{} for _ in plans]
        for name in [name for name in tensors if name.startswith("plan.")]:
            _, index, part = name.split(".")
            parts[int(index)][part] = tensors.pop(name)
        if sum(tensor.numel() for part in parts for tensor in part.values()) > MAX_PLAN_CELLS:
            raise ConfigError(f"{folder}: its plans are larger than any profile's")
        return cls(
            **read,  # type: ignore[arg-type]
            arrays=tensors,
            plans=tuple(Plan.from_json(plans[i], parts[i], f"plans[{i}]") for i in range(len(plans))),
        )

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, revision: str | None = None) -> "Profile":
        """From a folder, else the shipped one of that name, else a repository "owner/name" on the Hugging Face Hub.

        Raises:
            ConfigError: if there is none of these or the Hub cannot be reached; and as `load`.
        """
        if not _is_repository(name_or_path):
            return cls.load(folder_of(name_or_path))
        import huggingface_hub

        try:
            folder = huggingface_hub.snapshot_download(
                str(name_or_path), revision=revision, allow_patterns=[JSON_FILE, ARRAYS_FILE]
            )
        except Exception as error:  # which ones, depends on the client's version and its transport
            raise ConfigError(
                f"{str(name_or_path)!r} is no folder here, and no profile of that name could be had from the Hugging "
                f"Face Hub ({type(error).__name__}: {error}). Check the name and the connection, or give a folder."
            ) from error
        return cls.load(folder)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        revision: str | None = None,
        private: bool | None = None,
        commit_message: str = "Add profile",
        create_pr: bool = False,
    ) -> str:
        """Upload to a repository on the Hugging Face Hub, which is made if there is none. Returns the commit's URL.

        The prompts used for calibration go with it.

        Raises:
            ConfigError: if the Hub cannot be reached or refuses.
        """
        import huggingface_hub

        with tempfile.TemporaryDirectory() as folder:
            self.save(folder)
            api = huggingface_hub.HfApi()
            try:
                api.create_repo(repo_id, private=private, exist_ok=True)
                commit = api.upload_folder(
                    repo_id=repo_id,
                    folder_path=folder,
                    revision=revision,
                    commit_message=commit_message,
                    create_pr=create_pr,
                )
            except Exception as error:  # as in from_pretrained
                raise ConfigError(
                    f"the profile could not be uploaded to {repo_id!r} ({type(error).__name__}: {error}). "
                    "Check the name, your access token and the connection; Profile.save writes it to a folder."
                ) from error
        return str(commit.commit_url)


def shipped_profiles() -> dict[str, Path]:
    """The folders of the profiles that come with the package, by name."""
    home = Path(str(resources.files("diffusion_cache.profiles")))
    return {file.parent.name: file.parent for file in sorted(home.glob(f"*/{JSON_FILE}"))}


def folder_of(name_or_path: str | Path) -> Path:
    """A profile's folder: the one given, or that of the shipped profile of this name.

    Raises:
        ConfigError: if there is neither.
    """
    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    name, shipped = str(name_or_path), shipped_profiles()
    if name not in shipped:
        raise ConfigError(f"{name!r} is no folder, nor a profile that comes with the package. {suggest(name, shipped)}")
    return shipped[name]


def _is_repository(name: str | Path) -> bool:
    """Whether this can only be a repository on the Hub: "owner/name", and no folder here."""
    return isinstance(name, str) and bool(re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name)) and not Path(name).is_dir()


def _checked_sizes(steps: int | None, spans: int, passes: int, row_passes: int) -> dict[str, int]:
    """T, S and P; ConfigError if they cannot be."""
    if steps is None:
        raise ConfigError("profile: its fingerprint must know the number of steps")
    if steps > MAX_STEPS or spans * passes > MAX_SPAN_PASSES:
        raise ConfigError(f"profile: {steps} steps or {spans} spans × {passes} passes are more than it can hold")
    if not spans or not passes or not 1 <= row_passes <= passes:
        raise ConfigError(
            f"profile: needs a span, a pass and 1 to {passes} passes in the rows of a call; "
            f"has {spans}, {passes} and {row_passes}"
        )
    return {"T": steps, "S": spans, "P": passes}


def _check_layout(name: str, dtype: torch.dtype, shape: tuple[int, ...], sizes: Mapping[str, int]) -> None:
    axes = SHAPES.get(name)
    if axes is None:
        match = SPAN_ARRAY.fullmatch(name)
        axes = SPAN_SHAPES.get(match[1]) if match and int(match[2]) < sizes["S"] else None
    if axes is None:
        raise ConfigError(f"profile: there is no array {name!r:.80} in a profile of {sizes['S']} spans")
    wanted = [sizes.get(axis, axis) for axis in axes]
    fits = len(shape) == len(wanted) and all(
        size == want if isinstance(want, int) else size > 0 for size, want in zip(shape, wanted, strict=True)
    )
    expected = _dtypes(name)
    if not fits or dtype not in expected:
        layout, kinds = ", ".join(map(str, wanted)), " or ".join(map(str, expected))
        raise ConfigError(f"profile: the array {name} must be {kinds} [{layout}], not {dtype} {list(shape)}")


def _dtypes(name: str) -> tuple[torch.dtype, ...]:
    """What an array may be of."""
    if name == "sensitivity_sampled":
        return (torch.uint8,)
    return (torch.float32, torch.float64) if name in WIDE else (torch.float32,)


def _check_values(name: str, tensor: Tensor, spans: Sequence[SpanFacts]) -> None:
    if name == "sensitivity_sampled":
        if bool((tensor > 1).any()):
            raise ConfigError(f"profile: {name} holds other values than 0 and 1")
        return
    if bool(tensor.isinf().any()) or (name not in MAY_BE_NAN and bool(tensor.isnan().any())):
        raise ConfigError(f"profile: the array {name} is not finite")
    if name == "sensitivity" and bool((tensor < 0).any()):
        raise ConfigError(f"profile: {name} is negative at some step")
    if name in GRAMS:
        own = [index for index, span in enumerate(spans) if f"gram_{span.feature}" == name]
        bad = tensor[own].isnan().flatten(1).any(dim=1) if own else torch.zeros(0, dtype=torch.bool)
        if bool(bad.any()):
            raise ConfigError(f"profile: {name} of span {spans[own[int(bad.int().argmax())]].name!r} is not a number")
        energy = tensor[own].diagonal(dim1=-2, dim2=-1).double()
        if energy.numel() and bool((energy < -ROUNDING * energy.abs().max()).any()):
            raise ConfigError(f"profile: {name} holds negative squares")


def _axes(name: str) -> str:
    """What the axes of an array are, by the letters of SHAPES."""
    return SHAPES[name] if name in SHAPES else SPAN_SHAPES[name.partition(".")[0]]


def _resample(name: str, tensor: Tensor, places: "np.ndarray[Any, Any]") -> Tensor:
    """One of a profile's arrays of steps at positions among its steps."""
    if name == "sensitivity_sampled":
        return torch.zeros(tensor.shape[0], len(places), dtype=torch.uint8)
    wide, steps = tensor.double(), tensor.shape[_axes(name).index("T")]
    if name in SIGNALS:
        return _resample_changes(wide, places, multiply=name == "norm_ratio").to(tensor.dtype)
    weights = _interpolation(places, steps)
    for axis, letter in enumerate(_axes(name)):
        if letter == "T":
            wide = _combined(wide.movedim(axis, -1), weights).movedim(-1, axis)
    if name == "sensitivity":
        wide *= _lengths(places, steps)
    return wide.to(tensor.dtype)


def _interpolation(places: "np.ndarray[Any, Any]", steps: int) -> Tensor:
    """[new, old] weights of linear interpolation at positions among old steps; float64."""
    below = np.minimum(np.floor(places).astype(int), max(0, steps - 2))
    rest = places - below
    weights = torch.zeros(len(places), steps, dtype=torch.float64)
    rows = torch.arange(len(places))
    weights[rows, torch.from_numpy(below)] = torch.from_numpy(1 - rest)
    if steps > 1:
        weights[rows, torch.from_numpy(below + 1)] = torch.from_numpy(rest)
    return weights


def _combined(values: Tensor, weights: Tensor) -> Tensor:
    """Values [..., old] weighted for each new step [new, old]; NaN only where one that counts is, [..., new]."""
    unknown = values.isnan()
    lost = unknown.double() @ (weights > 0).double().T > 0
    return (values.masked_fill(unknown, 0.0) @ weights.T).masked_fill(lost, math.nan)


def _resample_changes(changes: Tensor, places: "np.ndarray[Any, Any]", multiply: bool) -> Tensor:
    """Changes from step to step, summed (or multiplied) over what lies between the new steps; NaN at the first."""
    # how much of the way from an old step to the next lies between two new ones, [new − 1, old − 1]
    until = np.clip(places[:, None] - np.arange(changes.shape[-1] - 1), 0.0, 1.0)
    shares = torch.from_numpy(np.diff(until, axis=0))
    along = changes[..., 1:]
    if multiply:
        along = along.clamp(min=torch.finfo(torch.float32).tiny).log()
    steps = _combined(along, shares)
    first = torch.full_like(changes[..., :1], math.nan)
    return torch.cat([first, steps.exp() if multiply else steps], dim=-1)


def _lengths(places: "np.ndarray[Any, Any]", steps: int) -> Tensor:
    """Of new steps at these positions, each until the next one or the run's end, in old steps; float64.

    Those at one position (beyond the profile's levels) share its length.
    """
    own, index, count = np.unique(places, return_inverse=True, return_counts=True)
    return torch.from_numpy((np.diff([*own, steps]) / count)[index])


def _digest(body: Any) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _write_both(folder: Path, arrays: bytes, document: bytes) -> None:
    """Both files are complete before either takes its name; if that fails midway, the earlier one is put back."""
    finals = folder / ARRAYS_FILE, folder / JSON_FILE
    drafts = [path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in finals]
    earlier = finals[0].with_name(f".{ARRAYS_FILE}.{os.getpid()}.old")
    try:
        for draft, data in zip(drafts, (arrays, document), strict=True):
            with draft.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        try:
            with suppress(FileNotFoundError):
                finals[0].replace(earlier)
            drafts[0].replace(finals[0])
            drafts[1].replace(finals[1])
        except BaseException:
            if earlier.exists():
                earlier.replace(finals[0])
            else:
                finals[0].unlink(missing_ok=True)
            raise
    finally:
        for path in (*drafts, earlier):
            with suppress(OSError):
                path.unlink()


def _read_document(path: Path, limit: int) -> Any:
    """The checked content of profile.json."""
    if not path.is_file():
        raise ConfigError(f"{path.parent} holds no profile: there is no {path.name} in it")
    _check_size(path, limit)
    try:
        stored = Fields(json.loads(path.read_bytes()), str(path))
        schema = stored("schema", integer)
        if schema != SCHEMA:
            raise ConfigError(
                f"{path}: a profile of schema version {schema}; this version of diffusion_cache reads version "
                f"{SCHEMA}. Make the profile again, or use the version of diffusion_cache that made it."
            )
        digest, body = stored("digest", text), stored("profile", json_object)
        stored.end()
        sound = digest == _digest(body)
    except ConfigError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not sound:
        raise ConfigError(f"{path} was changed or damaged after it was made: its digest does not fit")
    return body


def _read_arrays(path: Path, digest: str, limit: int, plans: int) -> dict[str, Tensor]:
    """All tensors of the file, after their number, names and dtypes have been looked at."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise ConfigError(f"{path.parent} holds half a profile: there is no {path.name} in it")
    _check_size(path, limit)
    of_plans = {f"plan.{i}.{name}": dtype for i in range(min(plans, MAX_PLANS + 1)) for name, dtype in TENSORS.items()}
    dtypes = {torch.float32: "F32", torch.float64: "F64", torch.int32: "I32", torch.uint8: "U8"}
    try:
        with path.open("rb") as file:
            found = hashlib.sha256()
            while block := file.read(2**20):  # hashlib.file_digest came with Python 3.11
                found.update(block)
        if found.hexdigest() != digest:
            raise ConfigError(f"{path} was changed or damaged after it was made: its digest does not fit")
        tensors = {}
        with safe_open(path, "pt") as stored:
            names = list(stored.keys())
            needed = {name for name in of_plans if name.rpartition(".")[2] not in OPTIONAL_TENSORS}
            missing = sorted(needed - set(names))
            if missing:
                raise ConfigError(f"{path}: {', '.join(missing[:4])} is missing")
            for name in names:
                wanted = (of_plans[name],) if name in of_plans else _dtypes(name)
                known = name in of_plans or name in SHAPES or SPAN_ARRAY.fullmatch(name)
                if not known or stored.get_slice(name).get_dtype() not in [dtypes[dtype] for dtype in wanted]:
                    kinds = " or ".join(map(str, wanted))
                    raise ConfigError(f"{path}: {name!r:.80} is no array of a profile, or of another type than {kinds}")
                # a copy: what safetensors returns may be the file itself, mapped
                tensors[name] = stored.get_tensor(name).clone()
    except ConfigError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    return tensors


def _check_size(path: Path, limit: int) -> None:
    size = path.stat().st_size
    if size > limit:
        raise ConfigError(f"{path} has {size / 2**20:.1f} MiB; a profile's may have {limit / 2**20:.1f}")


def _read_span(value: Any, where: str) -> SpanFacts:
    fields = Fields(value, where)
    span = SpanFacts(
        name=fields("name", text),
        denoiser=fields("denoiser", text),
        kind=fields("kind", text),
        feature=fields("feature", text),
        elements=fields("elements", integer),
        share=fields("share", number),
    )
    fields.end()
    return span


def _read_sample(value: Any, where: str) -> tuple[str, int]:
    if not isinstance(value, list) or len(value) != 2:
        raise ConfigError(f"{where}: expected a prompt and a seed")
    return text(value[0], where), integer(value[1], where)
