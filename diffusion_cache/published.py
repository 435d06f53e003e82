"""Published figures of other people's caches, as data: polynomials, ratios, step lists and settings for real models.

They ship in `profiles/published/<method>.json`, one object per file: name → entry, where the name is
`<method>/<model and what the figures depend on>`, with the step count where they depend on it. What an entry's figures
mean is checked when it is loaded, by method.
"""

import difflib
import json
import math
import re
import reprlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from importlib.resources import files
from itertools import chain, pairwise, zip_longest
from numbers import Integral, Real
from typing import Any, NamedTuple

from .errors import ConfigError

ALL = "all"  # the one stream or part of an entry that does not tell several apart
STREAMS = ("cond", "uncond", "ref")  # guidance passes: with the prompt, without it, with the reference image alone
_STREAM_KEYS = {ALL: ("mag_ratios",), **{name: (f"mag_ratios_{name}", f"tail_ratios_{name}") for name in STREAMS}}
BRANCHES = {"attn", "mlp"}
PARTS = ({ALL}, BRANCHES)  # masks of these parts together cover a whole block


class Driven(NamedTuple):
    """A policy with its options and those of the guards; scope where the entry is for one alone.

    forecaster: the one that the figures were made with; None where that of the source is none of this package's.
    """

    policy: str
    options: dict[str, Any]
    forecaster: str | None = None
    scope: str | None = None


@dataclass(frozen=True, eq=False)
class Published:
    """One published set of figures.

    name: what `load` takes. method: "magcache", "teacache", … model: its repository, or "generic". transformer: the
    class in diffusers, None where there is none or any will do. variant: task, resolution or setting. steps: sampler
    steps the figures were measured or made for, None if the source does not tell. figures: by method, as published.
    recommended: settings with the speedups their source states, measured there and not here. source: repository, file
    and revision. licence: of the source.

    Raises:
        ConfigError: for a field or figure that is missing, unknown, out of range or at odds with another.
    """

    name: str
    model: str
    transformer: str | None
    variant: str
    steps: int | None
    figures: Mapping[str, Any]
    recommended: Sequence[Mapping[str, Any]]
    notes: str
    source: str
    licence: str

    def __post_init__(self) -> None:
        _validate(self)

    @property
    def method(self) -> str:
        return self.name.split("/")[0].replace("-", "_")

    @property
    def is_scheduled(self) -> bool:
        """Whether its computed steps are known before a run, and a policy takes them."""
        return self.method == "magcache" or (self.method in _LISTS and self._is_whole(self.masks()))

    def ratios(self) -> dict[str, tuple[float, ...]]:
        """MagCache's γ_s = mean over tokens of ‖R_s‖/‖R_{s−1}‖, R the residual of the block stack; γ_0 = 1.

        Returns:
            One tuple of `steps` values for each guidance stream: "cond", "uncond", "ref", or "all".

        Raises:
            ConfigError: if the entry holds no ratios.
        """
        if self.method != "magcache":
            raise ConfigError(f"{self.name} holds no magnitude ratios; those are published for magcache")
        # steps before a tail are always computed, so that their ratios are never used
        head = (1.0,) * self._stated("first_step_of_tail", 0)
        found = {stream: [self._stated(key, None) for key in keys] for stream, keys in _STREAM_KEYS.items()}
        return {stream: (*head, *next(filter(None, values))) for stream, values in found.items() if any(values)}

    def masks(self) -> dict[str, str]:
        """The published step list: one "1" (compute) or "0" (reuse) a step, for each part of the model.

        The parts are "all", or as in the figures: layer types, layers.

        Raises:
            ConfigError: if the entry is no step list.
        """
        if self.method not in _LISTS:
            told = _POLICIES.get(self.method)
            way = f"its figures are settings: give them to {told}" if told else "no policy here goes by its figures"
            raise ConfigError(
                f"{self.name} holds no step list, as those of {', '.join(sorted(_LISTS))} do: {way}, as "
                f"published.load({self.name!r}).figures has them"
            )
        figures, total = self.figures, self.steps
        assert total is not None  # validated
        if "masks" in figures:
            return {part: _joined(mask) for part, mask in figures["masks"].items()}
        if "mask" in figures:
            return {ALL: _joined(figures["mask"])}
        if "refresh_steps" in figures:
            computed = {*range(figures["full_steps"]), *figures["refresh_steps"]}
        else:
            computed = {step - figures["step_base"] for step in figures["computed_steps"]}
        return {ALL: _joined([step in computed for step in range(total)])}

    def mask(self) -> str:
        """One mask for the whole denoiser and all guidance passes, for policy "mask".

        Raises:
            ConfigError: if the entry is no step list, or its lists cover different parts of a block or differ between
                them.
        """
        masks = self.masks()
        if not self._is_whole(masks):
            raise ConfigError(
                f"{self.name} has no single mask for the whole model, but one for each of {len(masks)} parts "
                f"({', '.join(list(masks)[:4])}{', …' if len(masks) > 4 else ''}); masks() gives them"
            )
        return next(iter(masks.values()))

    def driven(self) -> Driven:
        """What carries the entry out.

        Raises:
            ConfigError: where no policy does.
        """
        return _DRIVEN.get(self.method, Published._by_mask)(self)

    def _by_mask(self) -> Driven:
        others = tuple(map(_joined, self._stated("masks_by_steps", {}).values()))
        options = {"mask": self.mask(), "others": others, "blocks": self.blocks, "source": self.name}
        # MeanCache forecasts mean velocities, by a rule of its own for each gap (`edge_order`)
        forecaster = None if self.method == "meancache" else "reuse"
        scope = "block" if self.blocks else None
        if set(self.masks()) == BRANCHES:  # whose outputs are what was reused
            scope = "branch"
        return Driven("mask", options, forecaster, scope)

    def _by_ratios(self) -> Driven:
        figures = self.figures
        retention, listed = figures["default_retention_ratio"], 0.0
        if figures.get("expert_switch_step"):  # the policy retains the start of a run, and not of each expert's part
            retention, listed = listed, retention
        options = {
            "ratios": tuple(self.ratios().values()),
            "threshold": figures["default_threshold"],
            "max_skip": figures["default_K"],
            "retention": retention,
            "always": tuple(sorted(self._kept(listed))),
            "max_deviation": self._stated("max_single_step_deviation", math.inf),
        }
        return Driven("magcache", options, "reuse", "stack")

    def _by_modulated_input(self) -> Driven:
        kind = self._stated("signal_kind", "one that its source does not name")
        if kind != "modulated_input":
            raise ConfigError(
                f"{self.name} is fitted to another signal than policy 'teacache' looks at (the modulated input): "
                f"{kind.replace('_', ' ')}"
            )
        stated = [self.figures.get("default_threshold"), *(one.get("threshold") for one in self.recommended)]
        threshold = next((value for value in stated if value is not None), None)
        if threshold is None:
            raise ConfigError(
                f"{self.name} recommends no threshold: use policy 'teacache' with its coefficients and one of yours"
            )
        options = {
            "coefficients": tuple(self.figures["coefficients"]),
            "threshold": threshold,
            "warmup": max(self._stated("forced_first_steps", 1), 1),
            "last": self._stated("forced_last_steps", 0),
        }
        setting = next((one for one in self.recommended if one.get("threshold") == threshold), {})
        for name in ("start", "end"):
            if setting.get(f"{name}_percent") is not None:
                options[name] = setting[f"{name}_percent"]
        return Driven("teacache", options, "reuse", "stack")

    @property
    def blocks(self) -> tuple[str, ...]:
        """Names of the blocks that `mask` is for, at scope block with plain reuse; () where it is for any span."""
        return tuple(f"single_transformer_blocks.{index}" for index in self._stated("cached_single_blocks", ()))

    def _is_whole(self, masks: Mapping[str, str]) -> bool:
        return set(masks) in PARTS and len(set(masks.values())) == 1

    def _stated(self, key: str, default: Any) -> Any:
        """An optional figure; null is one that the source does not tell."""
        value = self.figures.get(key)
        return default if value is None else value

    def _kept(self, retention: float) -> set[int]:
        """Steps that are computed whatever the ratios say. retention: share of each expert's steps, at their start."""
        total = self.steps
        assert total is not None  # validated
        switch = self._stated("expert_switch_step", total)
        kept = set(range(max(self._stated("first_step_of_tail", 0), self._stated("first_reusable_step", 0))))
        for expert in (range(switch), range(switch, total)):
            # an expert's first step is computed in any case: it is a denoiser of its own, with nothing to reuse yet
            kept.update(expert[: max(int(retention * len(expert) + 0.5), 1)])
        forced = self._stated("forced_indices_28_grid", ())
        kept.update(step for step in range(total) if round(step * 27 / max(total - 1, 1)) in forced)
        return kept


# what has the settings of methods that are no lists of steps
_POLICIES = {
    "dbcache": "policy 'first_block' (front, back, threshold, warmup, max_consecutive)",
    "first_block_cache": "policy 'first_block' (threshold)",
    "pyramid_attention_broadcast": "policy 'pab' (spatial, temporal, cross, start, end)",
    "sea_cache": "policy 'seacache' (threshold)",
    "taylorseer": "policy 'interval' (every, warmup) with forecaster 'taylor'",
}

_DRIVEN = {
    "magcache": Published._by_ratios,
    "teacache": Published._by_modulated_input,
}


def names() -> list[str]:
    """Names of all entries, sorted."""
    return sorted(name for file in _shipped().values() for name in _read(file))


def load(name: str) -> Published:
    """The published figures of that name, "magcache/flux-dev-28" or "published/magcache/flux-dev-28".

    Raises:
        ConfigError: for an unknown name (with the nearest ones).
    """
    short = name.removeprefix("published/")
    file = _shipped().get(short.split("/")[0])
    entries = {} if file is None else _read(file)
    if short not in entries:
        close = difflib.get_close_matches(short, names(), n=3, cutoff=0.5)
        meant = " or ".join(repr(f"published/{one}") for one in close)
        hint = f"Did you mean {meant}?" if close else "published.names() lists them."
        raise ConfigError(f"Unknown published entry {name!r}. {hint}")
    return _entry(short, entries[short])


def _shipped() -> dict[str, Any]:
    """File by method, as written in names."""
    folder = files("diffusion_cache.profiles") / "published"
    return {file.name.removesuffix(".json"): file for file in folder.iterdir() if file.name.endswith(".json")}


def _read(file: Any) -> dict[str, dict[str, Any]]:
    """The entries of a file, not yet checked."""
    entries: dict[str, dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
    return entries


def _entry(name: str, given: Mapping[str, Any]) -> Published:
    known = [field.name for field in fields(Published) if field.name != "name"]
    _same_keys(name, given, known, known)
    return Published(name, **given)


class _Check(NamedTuple):
    """What a value must be, in words, and whether it is."""

    what: str
    holds: Callable[[Any], bool]


def _number(low: float = -math.inf, high: float = math.inf, kind: Any = Real, noun: str = "a finite number") -> _Check:
    bounds = [f"at least {low:g}"] * (low > -math.inf) + [f"at most {high:g}"] * (high < math.inf)

    least, most = max(low, -sys.float_info.max), min(high, sys.float_info.max)

    def holds(value: Any) -> bool:
        return isinstance(value, kind) and not isinstance(value, bool) and least <= value <= most

    return _Check(" ".join([noun, " and ".join(bounds)]).strip(), holds)


def _whole(low: int = 0, high: float = math.inf) -> _Check:
    return _number(low, high, Integral, "a whole number")


def _several(item: _Check, least: int = 1, most: float = math.inf) -> _Check:
    def holds(value: Any) -> bool:
        return _is_list(value) and least <= len(value) <= most and all(map(item.holds, value))

    size = f"{least} to {most}" if most < math.inf else f"{least} or more"
    return _Check(f"a list of {size}, each {item.what}", holds)


def _ascending(item: _Check) -> _Check:
    def holds(value: Any) -> bool:
        return _several(item).holds(value) and all(a < b for a, b in pairwise(value))

    return _Check(f"an ascending list, each {item.what}", holds)


def _by_name(item: _Check) -> _Check:
    def holds(value: Any) -> bool:
        return isinstance(value, Mapping) and bool(value) and all(map(item.holds, value.values()))

    return _Check(f"an object of values, each {item.what}", holds)


def _one_of(*options: str) -> _Check:
    return _Check(f"one of {', '.join(options)}", lambda value: value in options)


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


_TEXT = _Check("a text", lambda value: isinstance(value, str) and bool(value.strip()))
_FLAG = _Check("true or false", lambda value: isinstance(value, bool))
_POSITIVE = _Check("a finite number above 0", lambda value: _number().holds(value) and value > 0)
_FRACTION = _number(0, 1)
_LIMIT = _whole(-1)  # −1: none
_RATIOS = _several(_POSITIVE)
_STEPS = _ascending(_whole())
_BITS = _several(_Check("0 or 1", lambda value: _whole(0, 1).holds(value)))
_MASK = _Check("a list of 0 and 1 that starts with 1", lambda value: _BITS.holds(value) and value[0] == 1)
_WINDOW = _Check(
    "a pair of ascending whole numbers from −1",
    lambda value: _ascending(_LIMIT).holds(value) and len(value) == 2,
)
_EXPERT = _Check(
    "an object of max_warmup_steps and max_cached_steps",
    lambda value: _by_name(_LIMIT).holds(value) and set(value) == {"max_warmup_steps", "max_cached_steps"},
)

# by method: every figure it may have; a required one is marked in _REQUIRED, any other may be missing or null
_MASKS = {"masks": _by_name(_MASK)}
_LISTED = {"budget": _whole(1), "computed_steps": _STEPS, "step_base": _whole(0, 1)}
_FIGURES: dict[str, dict[str, _Check]] = {
    "teacache": {
        "coefficients": _several(_number(), 1, 6),
        "polynomial_degree": _whole(0, 5),
        "coefficient_order": _one_of("highest_power_first"),
        "signal_kind": _one_of("modulated_input", "timestep_embedding", "timestep_projection", "raw_input"),
        "signal": _TEXT,
        "forced_first_steps": _whole(),
        "forced_last_steps": _whole(),
        "cfg_streams": _one_of("single_stream", "separate_cond_uncond"),
        "default_threshold": _number(0),
    },
    "magcache": {
        "interleaved_in_source": _FLAG,
        **dict.fromkeys(chain.from_iterable(_STREAM_KEYS.values()), _RATIOS),
        "first_step_of_tail": _whole(1),
        "raw_ratios": _RATIOS,
        "raw_exponent": _POSITIVE,
        "default_threshold": _number(0),
        "default_K": _whole(),
        "default_retention_ratio": _FRACTION,
        "forced_indices_28_grid": _ascending(_whole(0, 27)),
        "max_single_step_deviation": _number(0),
        "expert_switch_step": _whole(1),
        "first_reusable_step": _whole(1),
    },
    "lemica": _LISTED,
    "meancache": {**_LISTED, "edge_order": _several(_whole(0, 6))},
    "scm": {
        "compute_bins": _several(_whole(1)),
        "cache_bins": _several(_whole(1)),
        "mask": _MASK,
        "num_computed": _whole(1),
        "masks_by_steps": _by_name(_MASK),
        "paired_residual_diff_threshold": _number(0),
    },
    "smoothcache": {
        **_MASKS,
        "max_gap_calibrated": _whole(1),
        "threshold": _number(0),
        "computed": _by_name(_whole(1)),
    },
    "fora": {**_MASKS, "interval": _whole(1), "computed": _by_name(_whole(1))},
    "l2c": {**_MASKS, "num_blocks": _whole(1), "computed_total": _whole(1), "total": _whole(1)},
    "profilingdit": {
        "full_steps": _whole(1),
        "refresh_steps": _STEPS,
        "cached_single_blocks": _STEPS,
        "num_single_blocks": _whole(1),
    },
    "dbcache": {
        "Fn_compute_blocks": _whole(),
        "Bn_compute_blocks": _whole(),
        "residual_diff_threshold": _number(0),
        "max_warmup_steps": _LIMIT,
        "warmup_interval": _whole(1),
        "max_cached_steps": _LIMIT,
        "max_continuous_cached_steps": _LIMIT,
        "taylorseer_order": _whole(1),
        "high_noise_expert": _EXPERT,
        "low_noise_expert": _EXPERT,
        "double_stream_threshold_factor": _POSITIVE,
        "single_stream_threshold_factor": _POSITIVE,
        "mask_policy": _one_of("slow", "medium", "fast", "ultra"),
    },
    "first_block_cache": {"threshold": _number(0)},
    "taylorseer": {"cache_interval": _whole(1), "disable_cache_before_step": _whole(), "max_order": _whole()},
    "pyramid_attention_broadcast": {
        "spatial_attention_block_skip_range": _whole(1),
        "spatial_attention_timestep_skip_range": _WINDOW,
    },
    "faster_cache": {
        "spatial_attention_block_skip_range": _whole(1),
        "spatial_attention_timestep_skip_range": _WINDOW,
        "low_frequency_weight_update_timestep_range": _WINDOW,
        "high_frequency_weight_update_timestep_range": _WINDOW,
        "alpha_low_frequency": _POSITIVE,
        "alpha_high_frequency": _POSITIVE,
        "unconditional_batch_skip_range": _whole(1),
        "unconditional_batch_timestep_skip_range": _WINDOW,
    },
    "sea_cache": {
        "threshold": _number(0),
        "residual_order": _whole(),
        "retention_steps": _whole(),
        "cache_end_steps": _whole(),
        "max_consecutive_cached": _whole(1),
        "power_exp": _POSITIVE,
    },
}
_REQUIRED = {
    "teacache": ("coefficients", "polynomial_degree", "coefficient_order"),
    "magcache": ("default_threshold", "default_K", "default_retention_ratio"),
    "lemica": tuple(_LISTED),
    "meancache": tuple(_LISTED),
    "scm": ("compute_bins", "cache_bins", "mask"),
    "smoothcache": ("masks",),
    "fora": ("masks",),
    "l2c": ("masks",),
    "profilingdit": ("full_steps", "refresh_steps"),
    "dbcache": ("residual_diff_threshold",),
}
_LISTS = {"lemica", "meancache", "scm", "smoothcache", "fora", "l2c", "profilingdit"}  # methods that are step lists
_RECOMMENDED = {
    "threshold": _number(0),
    "K": _whole(),
    "retention_ratio": _FRACTION,
    "start_percent": _FRACTION,
    "end_percent": _FRACTION,
    "stated_speedup": _POSITIVE,
    "latency_speedup": _POSITIVE,
    "speedup_basis": _one_of("FLOPs", "latency"),
    "hardware": _TEXT,
    "setting": _TEXT,
}


def _validate(entry: Published) -> None:
    name = entry.name
    if not isinstance(name, str) or not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*/[a-z0-9.]+(-[a-z0-9.]+)*", name):
        raise ConfigError(f"{name!r}: a name is <method>/<model and setting> in lower case with hyphens")
    if entry.method not in _FIGURES:
        raise ConfigError(f"{name}: method {entry.method!r} is not among {', '.join(sorted(_FIGURES))}")
    for field in ("model", "variant", "source", "licence"):
        _check(f"{name}: {field}", getattr(entry, field), _TEXT)
    _check(f"{name}: notes", entry.notes, _Check("a text", lambda value: isinstance(value, str)))
    _check(f"{name}: transformer", entry.transformer, _TEXT, optional=True)
    _check(f"{name}: steps", entry.steps, _whole(1), optional=True)
    _check(f"{name}: figures", entry.figures, _Check("an object", lambda value: isinstance(value, Mapping)))
    _check(f"{name}: recommended", entry.recommended, _Check("a list of objects", _is_list))
    allowed, required = _FIGURES[entry.method], _REQUIRED.get(entry.method, tuple(_FIGURES[entry.method]))
    _same_keys(f"{name}: figures", entry.figures, allowed, required)
    for key, value in entry.figures.items():
        _check(f"{name}: {key}", value, allowed[key], optional=key not in required)
    for setting in entry.recommended:
        _check(f"{name}: recommended", setting, _Check("a list of objects", lambda value: isinstance(value, Mapping)))
        _same_keys(f"{name}: recommended", setting, _RECOMMENDED, ())
        for key, value in setting.items():
            _check(f"{name}: recommended {key}", value, _RECOMMENDED[key], optional=True)
    for problem in _contradictions(entry):
        raise ConfigError(f"{name}: {problem}")


def _contradictions(entry: Published) -> Iterator[str]:
    """What is wrong between figures that are each right by themselves."""
    figures, steps, method = entry.figures, entry.steps, entry.method
    if method == "teacache" and len(figures["coefficients"]) != figures["polynomial_degree"] + 1:
        count, degree = len(figures["coefficients"]), figures["polynomial_degree"]
        yield f"a polynomial of degree {degree} has {degree + 1} coefficients, not {count}"
    if method not in _LISTS | {"magcache"}:
        return
    if steps is None:
        yield "steps is missing: these figures are for one number of steps"
        return
    if method == "magcache":
        yield from _ratio_problems(entry, steps)
    if "computed_steps" in figures:
        listed, base = figures["computed_steps"], figures["step_base"]
        if listed[0] != base or listed[-1] > steps - 1 + base:
            yield f"computed_steps must start with {base} and stay below {steps + base}, not {listed}"
        if len(listed) != figures["budget"]:
            yield f"computed_steps holds {len(listed)} steps, but budget is {figures['budget']}"
        if figures.get("edge_order") is not None and len(figures["edge_order"]) != len(listed) - 1:
            yield f"edge_order needs one entry between neighbours in computed_steps: {len(listed) - 1}"
    if "refresh_steps" in figures and not figures["full_steps"] <= figures["refresh_steps"][0] <= steps - 1:
        yield f"refresh_steps must start at full_steps ({figures['full_steps']}) or later, and within {steps} steps"
    if "refresh_steps" in figures and figures["refresh_steps"][-1] >= steps:
        yield f"refresh_steps must stay below {steps}"
    blocks = figures.get("cached_single_blocks") or [-1]
    if blocks[-1] >= (figures.get("num_single_blocks") or math.inf):
        yield f"cached_single_blocks must stay below num_single_blocks ({figures['num_single_blocks']})"
    yield from _mask_problems(entry, steps)


def _ratio_problems(entry: Published, steps: int) -> Iterator[str]:
    streams, figures = entry.ratios(), entry.figures
    kinds = {key.split("_")[0] for keys in _STREAM_KEYS.values() for key in keys if figures.get(key) is not None}
    if set(streams) not in ({ALL}, {"cond", "uncond"}, set(STREAMS)) or len(kinds) > 1:
        yield "needs mag_ratios, or mag_ratios_cond with mag_ratios_uncond, or tail_ratios of both"
    if ("tail" in kinds) != (figures.get("first_step_of_tail") is not None):
        yield "tail_ratios and first_step_of_tail belong together"
    for stream, values in streams.items():
        if len(values) != steps:
            yield f"stream {stream!r} has ratios for {len(values)} steps, but steps is {steps}"
    raw = figures.get("raw_ratios")
    if raw is not None and len(raw) != steps - 1:
        yield f"raw_ratios needs one value for each step but the first: {steps - 1}, not {len(raw)}"
    for key in ("expert_switch_step", "first_reusable_step"):
        if (figures.get(key) or 0) >= steps:
            yield f"{key} must be below {steps}"


def _mask_problems(entry: Published, steps: int) -> Iterator[str]:
    figures = entry.figures
    masks = {**figures.get("masks", {}), **({"mask": figures["mask"]} if "mask" in figures else {})}
    lengths = dict.fromkeys(masks, steps) | {key: key for key in figures.get("masks_by_steps") or {}}
    for key, mask in {**masks, **(figures.get("masks_by_steps") or {})}.items():
        if str(len(mask)) != str(lengths[key]):
            yield f"mask {key!r} must hold {lengths[key]} steps, not {len(mask)}"
    sums = {key: sum(mask) for key, mask in masks.items()}
    for key, counted in (
        ("num_computed", sum(sums.values())),
        ("computed_total", sum(sums.values())),
        ("computed", sums),
        ("total", steps * len(masks)),
        ("num_blocks", len(masks) / 2),
    ):
        if figures.get(key) is not None and figures[key] != counted:
            yield f"{key} is {figures[key]}, but the masks give {counted}"
    if "compute_bins" in figures:
        pairs = zip_longest(figures["compute_bins"], figures["cache_bins"], fillvalue=0)
        if list(figures["mask"]) != list(chain.from_iterable([1] * full + [0] * reused for full, reused in pairs)):
            yield "mask is not what compute_bins and cache_bins give in turn"


def _check(what: str, value: Any, check: _Check, *, optional: bool = False) -> None:
    if not (check.holds(value) or (optional and value is None)):
        raise ConfigError(f"{what} must be {check.what}{' or null' if optional else ''}, not {reprlib.repr(value)}")


def _same_keys(what: str, given: Mapping[str, Any], known: Any, required: Sequence[str]) -> None:
    for key in given:
        if key not in known:
            raise ConfigError(f"{what}: unknown {key!r}; known are {', '.join(known)}")
    for key in required:
        if key not in given:
            raise ConfigError(f"{what}: {key} is missing")


def _joined(mask: Sequence[Any]) -> str:
    return "".join("1" if entry else "0" for entry in mask)
