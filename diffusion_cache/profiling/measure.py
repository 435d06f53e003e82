"""The profiling run: full generations of calibration samples, measured batch by batch, into a Profile.

Every batch's sums are kept in a file of their own until the profile is complete, and are added up in the order of the
batches at the end. So it makes no difference to any bit of a profile whether a run was interrupted, or how many
processes shared its batches.
"""

import json
import math
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..context import SCOPES, Feature
from ..engine import Session
from ..errors import ConfigError, DiffusionCacheWarning
from ..files import read_tensors, write_tensors, written
from ..fingerprint import Fingerprint
from ..models import find_denoisers
from ..plain import check_count, digest, plain_json
from ..plan import FEATURES
from ..profile import JSON_FILE, Profile
from ..registry import unknown_name
from ..signals import Grid, channels_first
from .attention import AttentionReceived
from .foreground import latent_motion
from .generation import Batch, device_of, last_state, teach
from .recorder import EXACT_BYTES, Recorder, State, Survey, attention_names, held_on, surveyed
from .sensitivity import PAIRS, sampled_steps, sensitivities, span_groups
from .sketch import DEFAULT_WIDTH

LEAST_WIDTH = 2**10  # of a sketch: an error of 0.8 % in the mean over 32 samples
MOTION = "motion"
MOST_QUERIES = 1024  # whose attention is looked at in a call

Given = tuple[str, int]  # prompt and seed of a sample
MakeBatch = Callable[[Sequence[Given]], Batch]
Progress = Callable[[str, int, int], None]  # what runs, samples generated, of how many


@dataclass(frozen=True)
class Options:
    """What is measured.

    scope, depth: of the spans, None for the denoiser's default. feature: of a span, see `Forecaster`. batch: samples
    generated at once. sensitivity_samples: samples that sensitivity is measured on, 0 for not at all;
    sensitivity_steps: at how many steps. attention: note the attention that each token receives, at scope block or
    branch; attention_offset: where in the sequence the tokens of a foreground mask begin (of the image, where text
    goes before it); attention_top: the share of tokens that count as most attended. memory: bytes that the features of
    one batch may take on the host; what does not fit is sketched.
    """

    scope: str | None = None
    depth: int | None = None
    feature: Feature = "auto"
    batch: int = 8
    sensitivity_samples: int = 4
    sensitivity_steps: int = 16
    attention: bool = False
    attention_offset: int = 0
    attention_top: float = 0.2
    memory: int = 4 * 2**30

    def __post_init__(self) -> None:
        least = {"batch": 1, "sensitivity_samples": 0, "sensitivity_steps": 1, "attention_offset": 0, "memory": 1}
        for name, bound in least.items():
            check_count(name, getattr(self, name), bound)
        if self.depth is not None:
            check_count("depth", self.depth)
        if self.scope is not None and self.scope not in SCOPES:
            raise unknown_name("scope", self.scope, SCOPES)
        if self.feature not in FEATURES:
            raise unknown_name("feature", self.feature, FEATURES)
        top = self.attention_top
        if isinstance(top, bool) or not isinstance(top, (int, float)) or not 0 < top <= 1:
            raise ConfigError(f"attention_top must be a share in (0, 1], not {top!r}")


def measure(
    make_batch: MakeBatch,
    samples: Sequence[Given],
    options: Options | None = None,
    *,
    foreground: "Tensor | Literal['motion'] | None" = None,
    guidance: float | None = None,
    settings: Mapping[str, Any] | None = None,
    folder: str | Path | None = None,
    overwrite: bool = True,
    rank: int = 0,
    world: int = 1,
    meet: Callable[[], None] = lambda: None,
    progress: Progress = lambda what, done, of: None,
) -> Profile | None:
    """Profile a pipeline on calibration samples; with a folder, save the profile there.

    make_batch: the batch that generates these samples (prompt and seed each), always on the same pipeline with the same
    sampler, size and guidance. foreground: what `foreground_share` compares attention with, a bool mask of the tokens
    ([N], or [samples, …] for each sample its own) or "motion" (`latent_motion`). guidance: scale, default what the
    pipeline says. settings: JSON values that determine what is generated, beside samples and pipeline.

    What is done waits in `<folder>.partial` for an interrupted run to go on from; a finished profile of the same
    settings is returned as it is, and one of others overwritten if that is allowed and it holds no plans. With several
    processes (rank of world; meet waits for all of them), which must see the same folder, the first returns the profile
    and the others None.

    Raises:
        ConfigError: for settings that cannot work, values that are not finite, and a folder that cannot be written or
            that holds another profile, with plans or not to be overwritten.
        NoSpansError: if the pipeline has no spans at this scope.
    """
    options = options or Options()
    samples = [(str(prompt), int(seed)) for prompt, seed in samples]
    if not samples:
        raise ConfigError("a profile needs at least one sample")
    if foreground is not None:
        if not options.attention:
            raise ConfigError("a foreground mask is compared with attention: set attention as well")
        foreground = checked_foreground(foreground, len(samples))
    if world > 1 and folder is None:
        raise ConfigError("several processes meet in a folder: name one")
    with ExitStack() as stack:
        first = make_batch(samples[:1])
        progress("looking at the pipeline", 0, len(samples))
        place = Path(folder) if folder is not None else Path(stack.enter_context(tempfile.TemporaryDirectory())) / "p"
        with surveyed(first, options.scope, options.depth, options.feature) as (session, survey):
            assert session.last_run is not None
            if guidance is None:
                guidance = next(iter(session.last_run.guidance_scales), None)
            found = looked_at(first, survey, guidance)
            run = _Run(
                make_batch, samples, options, foreground, settings or {}, survey, found, place, (rank, world), progress
            )
            made = run.made_before(overwrite)
            if made is None:
                run.measure_batches(session)
        if made is None:
            meet()
        if rank:
            return None
        if made is not None:
            return made
        profile = run.put_together()
        if folder is not None:
            profile.save(folder)
        run.work.remove()
        return profile


class _Run:
    """One process's part of a profiling run."""

    def __init__(
        self,
        make_batch: MakeBatch,
        samples: Sequence[Given],
        options: Options,
        foreground: "Tensor | Literal['motion'] | None",
        settings: Mapping[str, Any],
        survey: Survey,
        fingerprint: Fingerprint,
        folder: Path,
        ranks: tuple[int, int],
        progress: Progress,
    ):
        self.make_batch, self.options, self.survey = make_batch, options, survey
        self.samples, self.foreground, self.settings = samples, foreground, plain_json(settings)
        self.fingerprint, self.folder, self.progress = fingerprint, folder, progress
        if options.attention and survey.scope not in ("block", "branch"):
            raise ConfigError(f"attention is noted block by block: use scope block or branch, not {survey.scope}")
        if isinstance(foreground, str) and (len(survey.latent_shape) != 4 or survey.latent_shape[1] < 2):
            raise ConfigError(
                f"motion needs videos, and a sample's latents are {list(survey.sample_shape)}: give a foreground mask"
            )
        self.depth = (options.depth or 1) if survey.scope == "cut" else None
        size = options.batch
        self.batches = [samples[i : i + size] for i in range(0, len(samples), size)]
        self.mine = range(ranks[0], len(self.batches), ranks[1])
        self.width, self.exact_bytes = sketch_sizes(survey, len(self.batches[0]), options.memory)
        self.sensitive = samples[: options.sensitivity_samples] if survey.steps > 1 else []
        spans = [watched.facts for watched in survey.spans]
        cells = len(span_groups(spans)) * len(sampled_steps(survey.steps, options.sensitivity_steps)) + PAIRS
        self.of = sum(len(self.batches[i]) for i in self.mine)  # samples to generate
        if ranks[0] == 0:
            self.of += cells * len(self.sensitive)
        settled = replace(options, scope=survey.scope, sensitivity_samples=0, sensitivity_steps=1)
        masks = foreground.tolist() if isinstance(foreground, Tensor) else foreground
        key = {
            "fingerprint": fingerprint.to_json(),
            "spans": [plain_json(vars(facts)) for facts in spans],
            "samples": samples,
            "settings": self.settings,
            "options": {name: value for name, value in asdict(settled).items() if name != "attention_top"},
            "foreground": None if foreground is None else [masks, options.attention_top],
        }
        self.work = Work(folder, digest(key))
        self.key = digest([key, options.sensitivity_samples, options.sensitivity_steps])

    def made_before(self, overwrite: bool) -> Profile | None:
        """The profile that is in the folder, if it is this one.

        Raises:
            ConfigError: if it is another one that plans were made from or that may not be overwritten, or cannot be
                read.
        """
        if not (self.folder / JSON_FILE).is_file():
            return None
        try:
            found = Profile.load(self.folder)
        except ConfigError as error:
            raise ConfigError(f"{error}. Delete {self.folder} to have its profile made anew") from error
        if found.facts.get("key") == self.key:
            return found
        if found.plans or not overwrite:
            raise ConfigError(
                f"{self.folder} holds a profile of other settings{', and plans made from it' if found.plans else ''}: "
                "choose another folder (out=…, in a sweep one for each value, as in 'out=dit-${steps}'), or delete it"
            )
        return None

    def recorder(self, count: int = 1, seed: int = 0, hold: str | None = None) -> Recorder:
        attention = None
        if self.options.attention:
            attention = AttentionReceived(
                attention_names(self.survey),
                self.survey.steps,
                offset=self.options.attention_offset,
                tokens=self._tokens,
                max_queries=MOST_QUERIES,
                top=None if self.foreground is None else self.options.attention_top,
            )
        return Recorder(
            self.survey,
            count,
            seed=seed,
            width=self.width,
            exact_bytes=self.exact_bytes,
            hold=hold,
            attention=attention,
        )

    def measure_batches(self, session: Session) -> None:
        """This process's batches, each kept when it is done; those that were kept before are passed over."""
        self.work.prepare()
        done = 0
        for index in self.mine:
            self.progress("measuring", done, self.of)
            given = self.batches[index]
            if self.work.batch(index) is None:
                began = time.perf_counter()
                batch = self.make_batch(given)
                device = device_of(batch.pipe)
                # a seed of its own: sketches of samples in different batches err independently
                recorder = self.recorder(len(given), seed=index, hold=held_on(self.survey, len(given), device))
                session.observer = recorder
                with recorder.watching(), last_state(batch.pipe.scheduler) as state:
                    batch.call()
                if recorder.attention is not None and self.foreground is not None:
                    recorder.attention.compare(self._foreground(index, len(given), state))
                facts = {
                    "bytes": recorder.peak_bytes,
                    "seconds": time.perf_counter() - began,
                    "revisited": sorted(recorder.revisited),
                }
                self.work.keep(index, recorder.state_dict(), facts)
            done += len(given)
        self.progress("measuring", done, self.of)

    @cached_property
    def _tokens(self) -> int | None:
        """Tokens of the foreground; None for all that are attended to."""
        if isinstance(self.foreground, Tensor):
            return self.foreground.shape[1]
        return None if self.foreground is None else math.prod(self._grid)

    @cached_property
    def _grid(self) -> Grid:
        grids = [watched.grid for watched in self.survey.spans if watched.grid is not None]
        if not grids:
            raise ConfigError(
                "how the tokens tile the frames cannot be told from the blocks, so that motion says nothing of them: "
                "give a foreground mask"
            )
        return grids[0]

    def _foreground(self, index: int, count: int, state: Sequence[Tensor]) -> Tensor:
        """Masks of a batch's samples, [count, N]."""
        if not isinstance(self.foreground, Tensor):
            return latent_motion(channels_first(state[-1][:count], self.survey.channels), self._grid)
        if len(self.foreground) == 1:
            return self.foreground.expand(count, -1)
        first = index * self.options.batch
        return self.foreground[first : first + count]

    def put_together(self) -> Profile:
        """The profile, from the batches of all processes."""
        total = self.recorder()
        kept = []
        for index in range(len(self.batches)):
            found = self.work.batch(index)
            if found is None:
                raise ConfigError(f"{self.work.folder} lacks batch {index}: all processes must see the same folder")
            part = self.recorder()
            part.load_state_dict(found[0])
            total.merge(part)
            kept.append(found[1])
        arrays = self._arrays(total)
        facts = self._facts(kept)
        if self.sensitive:
            began = time.perf_counter()
            arrays |= self._sensitivity(arrays, facts)
            facts["seconds"] += time.perf_counter() - began
        self.progress("measured", self.of, self.of)
        return Profile(
            fingerprint=self.fingerprint,
            scope=self.survey.scope,
            depth=self.depth,
            spans=tuple(watched.facts for watched in self.survey.spans),
            passes=self.survey.passes,
            row_passes=self.survey.rows,
            samples=tuple(self.samples),
            arrays=arrays,
            facts=facts,
        )

    def _arrays(self, total: Recorder) -> dict[str, Tensor]:
        arrays = total.arrays()
        attention = total.attention
        if attention is None:
            return arrays
        with warnings.catch_warnings():
            if self.survey.scope == "branch":  # feed-forward branches have no attention
                warnings.simplefilter("ignore", DiffusionCacheWarning)
            received = attention.result()
        arrays |= {name: values.nan_to_num(0.0) for name, values in received.items()}
        if self.foreground is not None:
            arrays["foreground_share"] = attention.foreground_share()
        return arrays

    def _facts(self, kept: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        survey, names = self.survey, [watched.facts.name for watched in self.survey.spans]
        limit = self.exact_bytes // (4 * survey.steps)
        sketched = [watched.facts.name for watched in survey.spans if watched.facts.elements > limit]
        revisited = {place for facts in kept for place in facts["revisited"]}
        return {
            "samples": len(self.samples),
            "batch": self.options.batch,
            "feature": self.options.feature,
            "shares": survey.shares,
            "settings": self.settings,
            "bytes": max(facts["bytes"] for facts in kept),
            "seconds": sum(facts["seconds"] for facts in kept),
            "sketch": {"width": self.width, "spans": sketched} if sketched else "exact",
            "unseen": [watched.facts.name for watched in survey.spans if not watched.seen],
            "unusable": dict(survey.unusable),
            "revisited": [names[place] for place in sorted(revisited)],
            "key": self.key,
            **({} if self.foreground is None else {"attention_top": self.options.attention_top}),
        }

    def _sensitivity(self, arrays: Mapping[str, Tensor], facts: dict[str, Any]) -> dict[str, Tensor]:
        size = self.options.batch
        parts = [self.sensitive[i : i + size] for i in range(0, len(self.sensitive), size)]
        done = sum(len(self.batches[i]) for i in self.mine)
        spans = [watched.facts for watched in self.survey.spans]
        own = [arrays[f"gram_{span.feature}"][i] for i, span in enumerate(spans)]
        found = sensitivities(
            [teach(self.make_batch(part)) for part in parts],
            torch.stack(own),
            spans,
            scope=self.survey.scope,
            depth=self.depth,
            feature=self.options.feature,
            steps_sampled=self.options.sensitivity_steps,
            known=self.work.cells(len(self.sensitive)),
            progress=lambda cell, of: self.progress("sensitivity", done + cell * len(self.sensitive), self.of),
        )
        facts["sensitivity"] = {"samples": len(self.sensitive), **found.facts()}
        return {"sensitivity": found.values, "sensitivity_sampled": found.sampled}


def checked_foreground(foreground: "Tensor | str", samples: int) -> "Tensor | Literal['motion']":
    """Masks of one or of all samples, [1 or n, N]; or "motion".

    Raises:
        ConfigError: for a mask of another type or number of samples.
    """
    if isinstance(foreground, str):
        if foreground != MOTION:
            raise unknown_name("foreground", foreground, [MOTION])
        return "motion"
    if foreground.dtype != torch.bool or not foreground.numel():
        raise ConfigError(f"a foreground mask is of bool values, one a token, not of {foreground.dtype}")
    masks = foreground.cpu()[None] if foreground.ndim < 2 else foreground.cpu().flatten(1)
    if len(masks) not in (1, samples):
        raise ConfigError(f"the foreground mask is of {len(masks)} samples, and {samples} are profiled")
    return masks


def sketch_sizes(survey: Survey, count: int, memory: int) -> tuple[int, int]:
    """Width of sketches, and bytes of a sample's features that are kept exactly, so that `count` samples fit.

    Raises:
        ConfigError: if even narrow sketches do not fit.
    """
    # of one sample, span and pass over all steps: its features and its inputs
    share = memory // (2 * len(survey.spans) * len(survey.passes) * count)
    exact_bytes = min(EXACT_BYTES, share)
    width = min(DEFAULT_WIDTH, 1 << max((share // (4 * survey.steps)).bit_length() - 1, 0))
    largest = max(watched.facts.elements for watched in survey.spans)
    if width < LEAST_WIDTH and 4 * survey.steps * largest > exact_bytes:
        need = memory * LEAST_WIDTH / width
        raise ConfigError(
            f"the features of {count} samples in {len(survey.spans)} spans take {need / 2**30:.1f} GiB of memory even "
            f"as sketches, and {memory / 2**30:.1f} may be used: make the batch smaller, or allow more memory"
        )
    return width, exact_bytes


class Work:
    """What a run has finished, in `<folder>.partial/<digest>`: a file for each batch, and one of sensitivities."""

    def __init__(self, folder: Path, key: str):
        self.folder = folder.with_name(f"{folder.name}.partial") / key

    def prepare(self) -> None:
        """Raises ConfigError where nothing can be written."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot write to {self.folder.parent}: {error.strerror or error}") from error

    def _path(self, index: int) -> Path:
        return self.folder / f"batch-{index:05d}.safetensors"

    def batch(self, index: int) -> tuple[State, dict[str, Any]] | None:
        """The sums of a batch and its facts; None where there are none, or they cannot be read."""
        return read_tensors(self._path(index))

    def keep(self, index: int, state: State, facts: Mapping[str, Any]) -> None:
        with self.writing():
            write_tensors(self._path(index), state, facts)

    def cells(self, samples: int) -> "Cells":
        """Final errors with some cells reused, measured on so many samples."""
        return Cells(self, self.folder / f"sensitivity-{samples}.json")

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Says of an error that the block meets what can be done about it."""
        try:
            yield
        except OSError as error:
            raise ConfigError(
                f"cannot write to {self.folder}: {error.strerror or error}. What was done before is kept: asked for "
                "the same profile again, it goes on from there"
            ) from error

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        with suppress(OSError):  # other settings' work may be there
            self.folder.parent.rmdir()


class Cells(dict[str, float]):
    """A dict that is written to a file whenever something is added."""

    def __init__(self, work: Work, path: Path):
        self._work, self._path = work, path
        with suppress(OSError, ValueError):
            super().__init__(json.loads(path.read_text()))

    def __setitem__(self, key: str, value: float) -> None:
        super().__setitem__(key, value)
        with self._work.writing(), written(self._path) as draft:
            draft.write_text(json.dumps(self))


def looked_at(batch: Batch, survey: Survey, guidance: float | None) -> Fingerprint:
    """The fingerprint of what a batch's pipeline has just run, at this scale of guidance."""
    return Fingerprint.of(
        batch.pipe,
        find_denoisers(batch.pipe),
        steps=survey.steps,
        noise_levels=survey.noise_levels,
        guidance=guidance,
        sample_shape=survey.sample_shape,
    )
